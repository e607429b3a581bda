"""Curated documents as a Parquet file: the fields of their JSON lines as columns, compressed with zstd.

`signals`, which differ from document to document, are JSON in a column of text.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

from data_tools.reading.reader import require
from data_tools.record import Record

_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 10_000
"""Size of a row group, which is in memory until it is full: a reader unpacks one at a time too."""
_COLUMNS = ("id", "text", "source", "language", "license", "url", "signals")
_MAYBE_NULL = ("license", "url", "signals")


class ParquetRows:
    """Writes documents to a file. The same documents give the same bytes with the same version of pyarrow."""

    def __init__(self, file: BinaryIO) -> None:
        require("pyarrow.parquet", "output_format=parquet")
        import pyarrow
        import pyarrow.parquet

        fields = [(name, pyarrow.string(), name in _MAYBE_NULL) for name in _COLUMNS]
        self._schema = pyarrow.schema([pyarrow.field(*field) for field in fields])
        self._new_table = pyarrow.table
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._start_group()

    def _start_group(self) -> None:
        self._values: dict[str, list[str | None]] = {name: [] for name in _COLUMNS}
        self._bytes = 0

    def add(self, record: Record) -> None:
        row: dict[str, Any] = {name: getattr(record, name) for name in _COLUMNS}
        row["signals"] = json.dumps(record.signals, ensure_ascii=False) if record.signals else None
        for name, value in row.items():
            self._values[name].append(value if value is None else _valid(value))
        self._bytes += len(record.text)
        if self._bytes >= _GROUP_BYTES or len(self._values["id"]) == _GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        self._writer.write_table(self._new_table(self._values, self._schema))
        self._start_group()

    def finish(self) -> None:
        if self._values["id"]:
            self._write_group()
        self._writer.close()


def _valid(text: str) -> str:
    """Text without halves of characters, as a JSON line has it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
