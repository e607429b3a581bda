"""Programs that tests start by their paths, usually one process per rank."""
