"""Bytes of strangers, taken in: any bytes give records or a named error, and honest ones what they hold."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_tools.reading.bounded import (
    BOMB_FREE_BYTES,
    Bounds,
    Line,
    TooManyValuesError,
    line_groups,
    lines,
    parsed_together,
    unpacked,
)
from data_tools.reading.columns.columnar import ParquetFile
from data_tools.reading.columns.parquet_pages import read_thrift
from support import ROOT, bombs
from support.tables import SMALL, USUAL, arrow_rows, parquet_rows, table


def lines_of(
    data: bytes, suffix: str = ".jsonl", bounds: Bounds = SMALL
) -> list[tuple[int, int, bytes | None]]:
    found = lines(unpacked(io.BytesIO(data), suffix, bounds), bounds.record_bytes)
    return [(line.number, line.begin, line.content) for line in found]


# --- lines ---


def test_lines_have_numbers_and_places() -> None:
    data = b"one\n\n  \r\ntwo\r\nthree"
    assert lines_of(data) == [(1, 0, b"one\n"), (4, 9, b"two\r\n"), (5, 14, b"three")]
    packed = gzip.compress(data[:6]) + gzip.compress(data[6:])
    assert lines_of(packed, ".jsonl.gz") == lines_of(data)


def test_a_long_line_is_told_and_passed_over() -> None:
    data = b"a" * 1000 + b"\n" + b"b" * 1001 + b"\n" + b"c" * 5000 + b"\nd"
    assert lines_of(data) == [(1, 0, b"a" * 1000 + b"\n"), (2, 1001, None), (3, 2003, None), (4, 7004, b"d")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_ends_early_or_goes_on_as_something_else_is_told(suffix: str) -> None:
    whole = gzip.compress(b"text\n" * 99) if suffix == ".gz" else bombs.zst(b"", b"text\n", 99)
    for data in (whole[:-3], whole + b"more text"):
        with pytest.raises(OSError):
            lines_of(data, suffix)
    assert len(lines_of(whole + whole, suffix)) == 198


def test_frames_that_are_passed_over_hold_nothing() -> None:
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    assert lines_of(skipped + bombs.zst(b"", b"a\n", 3) + skipped, ".zst") == [
        (1, 0, b"a\n"),
        (2, 2, b"a\n"),
        (3, 4, b"a\n"),
    ]
    with pytest.raises(OSError):
        lines_of(struct.pack("<II", 0x184D2A50, 1 << 31) + b"hello", ".zst")


def test_a_window_larger_than_zstd_takes_unasked_is_refused() -> None:
    frame = (
        struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + b"\x01\x00\x00"
    )  # a window of 2 GiB, an empty block
    with pytest.raises(OSError, match=r"memory|window"):
        lines_of(frame, ".zst")


def test_values_are_counted_outside_of_texts() -> None:
    def line(value: str) -> Any:
        [one] = lines(io.BytesIO(value.encode()), 64 << 20)
        return one.json()

    commas = json.dumps({"text": ',[{"\\' * 400_000})
    assert line(commas)["text"] == ',[{"\\' * 400_000
    assert len(line(json.dumps({"x": [0] * 400_000}))["x"]) == 400_000
    for values in ("[]," * 600_000, '"",' * 600_000, '{"a":1},' * 300_000):
        with pytest.raises(TooManyValuesError, match="500,000"):
            line(f'{{"text": "a", "x": [{values[:-1]}]}}')
    with pytest.raises(ValueError):
        line('{"text": "' + '\\"' * 1_000_000)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".gz", ".zst"]))
def test_any_bytes_are_lines_or_a_named_error(data: bytes, suffix: str) -> None:
    try:
        for line in lines(unpacked(io.BytesIO(data), suffix, SMALL), SMALL.record_bytes):
            with contextlib.suppress(ValueError):
                line.json()
    except OSError:
        pass


# --- lines together ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
GOOD_LINES = st.dictionaries(st.text(max_size=3), VALUES, max_size=3).map(
    lambda value: json.dumps(value).encode()
)
BAD_LINES = st.sampled_from(
    [
        b"[1",
        b"2]",
        b'{"a": 1},{"b": 2}',
        b'{"a": 1',
        b'"b": 2}',
        b'{"a": "',
        b'"}',
        b"{} x",
        b"[]",
        b"\xff",
        b"{}\xef",
    ]
)


def parsed_singly(group: list[Line]) -> list[Any] | None:
    try:
        values = [Line(line.number, line.begin, line.content, line.end).json() for line in group]
    except ValueError:
        return None
    return values if all(isinstance(value, dict) for value in values) else None


@given(st.lists(st.one_of(GOOD_LINES, GOOD_LINES, BAD_LINES), min_size=2, max_size=6))
def test_lines_that_are_parsed_together_give_what_each_gives(contents: list[bytes]) -> None:
    group = list(lines(io.BytesIO(b"\n".join(contents)), 1000))
    assert parsed_together(group) == parsed_singly(group)


def test_no_line_reaches_into_the_next() -> None:
    for contents in ([b'{"a": [1', b"2]}"], [b"{},{}", b"[", b"]"], [b'{"a": "', b'"}'], [b"{}", b"[{}]"]):
        group = list(lines(io.BytesIO(b"\n".join(contents)), 1000))
        assert len(group) == len(contents)
        assert parsed_together(group) is None
    forged = f'{{}},"{"0" * 32}",{{}}'.encode()  # as if the mark were known
    assert parsed_together(list(lines(io.BytesIO(forged + b"\n[\n]"), 1000))) is None


def test_groups_are_bounded_and_come_before_an_error() -> None:
    def group_sizes(sizes: list[int]) -> list[list[int]]:
        found = (Line(1, 0, bytes(size), size) for size in sizes)
        return [[len(line.content or b"") for line in group] for group in line_groups(found)]

    assert group_sizes([1] * 600) == [[1] * 256, [1] * 256, [1] * 88]
    assert group_sizes([10, 1 << 18, 10, 20]) == [[10], [1 << 18], [10, 20]]
    assert group_sizes([200_000] * 3) == [[200_000]] * 3

    def broken() -> Iterator[Line]:
        yield Line(1, 0, b"a", 1)
        raise OSError("broken")

    found = line_groups(broken())
    assert [line.content for line in next(found)] == [b"a"]
    with pytest.raises(OSError, match="broken"):
        next(found)


# --- Parquet ---


@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_honest_tables_are_read_however_they_are_packed(encoding: str | None, version: str) -> None:
    content = table(500)
    rows = content.to_pylist()
    options: dict[str, Any] = {"data_page_version": version, "row_group_size": 210, "write_batch_size": 64}
    if encoding:
        names = ("text", "messages.list.element.content")
        options |= {"use_dictionary": False, "column_encoding": dict.fromkeys(names, encoding)}
    for compression, size in itertools.product(
        ("none", "snappy", "gzip", "brotli", "zstd", "lz4"), (300, 1 << 20)
    ):
        out = io.BytesIO()
        parquet.write_table(content, out, compression=compression, data_page_size=size, **options)
        for columns in (["text", "id"], ["messages"]):
            expected = [{name: row[name] for name in columns} for row in rows]
            assert list(parquet_rows(out.getvalue(), columns)) == expected


def test_a_column_beside_the_text_that_packs_well_does_not_matter() -> None:
    """The text's own pages are what counts: a struct before it has several leaves."""
    info = [{"a": "x", "b": "y" * 1_000_000, "c": "z"}] * 40
    out = io.BytesIO()
    options: dict[str, Any] = {"use_dictionary": False, "compression": "zstd"}
    parquet.write_table(
        pyarrow.table({"info": info, "text": [f"text {i}" for i in range(40)]}), out, **options
    )
    assert [row["text"] for row in parquet_rows(out.getvalue(), ["text"])] == [f"text {i}" for i in range(40)]


def test_a_row_that_is_too_large_is_told_and_the_others_are_read() -> None:
    data = bombs.parquet({"text": ["a", "b" * 5000, "c"]})
    found = list(parquet_rows(data, ["text"], SMALL))
    assert found == [{"text": "a"}, "is a row of more than 1000 bytes", {"text": "c"}]


def delta_page(n_values: int, n_lengths: int) -> bytes:
    """A Parquet file with a page of texts whose lengths are said to be so many, all of them 0."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def number(n: int) -> bytes:
        return varint(n << 1)

    def fields(*parts: tuple[int, int, bytes]) -> bytes:
        ids = [0, *(field for field, _, _ in parts)]
        heads = [
            bytes([(after - before) << 4 | kind])
            for before, (after, kind, _) in zip(ids, parts, strict=False)
        ]
        return b"".join(head + value for head, (_, _, value) in zip(heads, parts, strict=True)) + b"\0"

    def items(kind: int, *parts: bytes) -> bytes:
        return bytes([len(parts) << 4 | kind]) + b"".join(parts)

    block = 1 << 29
    data = varint(block) + varint(4) + varint(n_lengths) + b"\0" + b"\0\0\0\0\0" * 2
    inner = fields((1, 5, number(n_values)), (2, 5, number(6)), (3, 5, number(3)), (4, 5, number(3)))
    sizes = number(len(data))
    chunk = fields((1, 5, number(0)), (2, 5, sizes), (3, 5, sizes), (5, 12, inner)) + data
    size, name = number(len(chunk)), b"\x04text"
    column = fields(
        (1, 5, number(6)), (2, 9, items(5, number(6))), (3, 9, items(8, name)), (4, 5, number(0)),
        (5, 6, number(n_values)), (6, 6, size), (7, 6, size), (9, 6, number(4)),
    )  # fmt: skip
    group = fields(
        (1, 9, items(12, fields((2, 6, number(4)), (3, 12, column)))), (2, 6, size), (3, 6, number(n_values))
    )
    root = fields((4, 8, b"\x06schema"), (5, 5, number(1)))
    leaf = fields((1, 5, number(6)), (3, 5, number(0)), (4, 8, name), (6, 5, number(0)))
    footer = fields(
        (1, 5, number(1)), (2, 9, items(12, root, leaf)), (3, 6, number(n_values)), (4, 9, items(12, group))
    )
    return b"PAR1" + chunk + footer + struct.pack("<I", len(footer)) + b"PAR1"


def test_more_lengths_than_texts_are_refused() -> None:
    """113 bytes took 2 GB."""
    data = delta_page(10, 500_000_000)
    assert len(data) < 200
    with pytest.raises(ValueError, match="10 values has lengths for 500,000,000"):
        list(parquet_rows(data, ["text"]))


def test_a_footer_that_claims_a_million_columns_takes_no_memory() -> None:
    footer = b"\x15\x02\x19\xfc\xc0\x84\x3d"  # version 1, then a list of 1,000,000 structs
    with pytest.raises((OSError, ValueError)):
        ParquetFile(io.BytesIO(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_of_a_page_or_an_error(data: bytes) -> None:
    try:
        fields, size = read_thrift(data)
    except (EOFError, ValueError):
        return
    assert 0 < size <= len(data)
    assert all(isinstance(field, int) for field in fields)


# --- Arrow ---


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_honest_streams_are_read(compression: str | None) -> None:
    content = table(300)
    rows = [{"text": row["text"], "id": row["id"]} for row in content.to_pylist()]
    columns = {name: content[name] for name in content.column_names}
    assert arrow_rows(bombs.arrow(columns, compression=compression)) == rows
    shared = {"text": bombs.same("the same", 50), "id": list(range(50))}
    assert arrow_rows(bombs.arrow(shared)) == [{"text": "the same", "id": i} for i in range(50)]


def test_offsets_that_lead_out_of_a_batch_are_refused() -> None:
    """pyarrow goes by them, and reads the memory behind."""
    whole = bytearray(bombs.arrow({"text": ["abc", "defg"]}))
    place = whole.index(struct.pack("<iii", 0, 3, 7))
    whole[place : place + 12] = struct.pack("<iii", 0, 3, 1 << 20)
    with pytest.raises(ValueError):
        arrow_rows(bytes(whole))


# --- files that were changed ---

FUZZ = """
import io, random, sys
sys.path[:0] = [{tests!r}, {root!r}]
from support.tables import seeds
choose = random.Random({seed})
seeds = seeds()
for _ in range({times}):
    read, data = choose.choice(seeds)
    data = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 16])):
        at = choose.randrange(len(data))
        if choose.random() < 0.5:
            at = max(0, len(data) - choose.randrange(1, 1500))
        data[at : at + choose.randrange(3)] = bytes(choose.choices(b"\\0\\1\\x7f\\x80\\xff", k=choose.randrange(4)))
    try:
        for _ in read(bytes(data)):
            pass
    except (OSError, ValueError):
        pass
print("whole")
"""


@pytest.mark.integration
def test_changed_tables_are_read_or_refused_and_end_no_process() -> None:
    """pyarrow ended the process where a column's metadata was broken."""
    code = FUZZ.format(tests=str(ROOT / "tests"), root=str(ROOT), seed=0, times=1500)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]


def test_small_files_may_be_of_any_ratio() -> None:
    data = gzip.compress(b"a" * (BOMB_FREE_BYTES - 1))
    assert lines_of(data, ".gz", USUAL)[0][2] == b"a" * (BOMB_FREE_BYTES - 1)
    with pytest.raises(OSError, match="200 times"):
        lines_of(gzip.compress(b"a" * (BOMB_FREE_BYTES + (2 << 20))), ".gz", USUAL)
