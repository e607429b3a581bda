"""Programs that tests start by path, mostly one process per rank."""
