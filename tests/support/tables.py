"""Untrusted Parquet and Arrow tables as bytes, and functions that read them within bounds."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import pyarrow

from data_tools.reading.bounded import Bounds
from data_tools.reading.columns.columnar import ArrowStream, ParquetFile, name_columns
from support import bombs

SMALL, USUAL = Bounds(record_bytes=1000), Bounds()


def table(n: int) -> pyarrow.Table:
    choose = random.Random(1)
    return pyarrow.Table.from_pylist(
        [
            {
                "info": {"a": 1, "b": [1, 2]},
                "text": None if i % 17 == 0 else "w" * choose.randrange(300) + f"{i} 发明",
                "id": i,
                "messages": [{"role": "user", "content": str(i) * j} for j in range(choose.randrange(4))],
            }
            for i in range(n)
        ]
    )


def parquet_rows(data: bytes, columns: list[str], bounds: Bounds = USUAL) -> Iterator[Any]:
    file = ParquetFile(io.BytesIO(data))
    for group in range(len(file.groups)):
        for row in file.rows(group, columns, 64, bounds):
            yield row.fields if row.fields is not None else row.problem


def arrow_rows(data: bytes, bounds: Bounds = USUAL) -> list[Any]:
    file = ArrowStream(io.BytesIO(data), bounds)
    return [row.fields for row in file.rows(name_columns(file.schema, ["text", "id"]))]


def seeds() -> list[tuple[Any, bytes]]:
    content = table(40)
    columns = {name: content[name] for name in ("text", "id", "messages")}
    delta = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "compression": "none"}
    made = [
        bombs.parquet(columns),
        bombs.parquet(columns, compression="zstd", data_page_version="2.0", data_page_size=50),
        bombs.parquet(columns, **delta),
    ]
    streams = [bombs.arrow({"text": content["text"]}, compression=packed) for packed in (None, "zstd")]
    return [
        *((lambda data: parquet_rows(data, ["text", "id"]), data) for data in made),
        *((lambda data: parquet_rows(data, ["messages"]), data) for data in made),
        *((arrow_rows, data) for data in streams),
    ]
