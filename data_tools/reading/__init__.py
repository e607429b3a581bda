"""Files to records. Every record, page, row and line is bounded in size before memory is taken for it."""
