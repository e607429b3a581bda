"""Reads records from files. Every record, page, row and line is bounded in size before memory is allocated for it."""
