"""Text of the web: WARC archives, and the main text of their pages."""
