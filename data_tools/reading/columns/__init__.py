"""Files that store columns: Parquet and Arrow, read within bounds."""
