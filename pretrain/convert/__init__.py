"""Our checkpoints in the formats of other tools."""
