"""Small files that unpack to gigabytes, and a script that reads each of them in its own child process.

As a script: python tests/support/bombs.py FOLDER READER..., which prints a line of JSON for each file of the folder.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import struct
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
SENTENCE = "The committee met on Friday and agreed on the report. "
HONEST = [{"text": SENTENCE * 3, "id": f"d{i}"} for i in range(50)]
LARGE_DICTIONARY = {"dictionary_pagesize_limit": 1 << 30}
DIALOGUE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": SENTENCE}]


def gzipped(head: bytes, piece: bytes, times: int, tail: bytes = b"") -> bytes:
    """A large file compressed as many gzip members, so that it is never in memory as a whole."""
    members = gzip.compress(piece * 16, 9, mtime=0) * (times // 16)
    return gzip.compress(head, 9, mtime=0) + members + gzip.compress(tail, 9, mtime=0)


def zst(head: bytes, piece: bytes, times: int) -> bytes:
    import zstandard

    packed = io.BytesIO()
    with zstandard.ZstdCompressor(level=3).stream_writer(packed, closefd=False) as file:
        file.write(head)
        for _ in range(times):
            file.write(piece)
    return packed.getvalue()


def streams(compress: Callable[[bytes], bytes], head: bytes, piece: bytes, times: int) -> bytes:
    """A large file of xz or bz2, as many streams."""
    return compress(head) + compress(piece * 16) * (times // 16)


def many_values() -> bytes:
    """Empty lists and objects in an order that cannot be packed tightly."""
    choose = random.Random(0).choices
    values = ",".join("".join(pair) for pair in choices_of(choose, 5_000_000))
    return gzip.compress(f'{{"text": "a", "more": [{values}]}}\n'.encode(), 6)


def choices_of(choose: Callable[..., list[str]], n: int) -> list[str]:
    return choose(["[]", "{}"], k=n)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet as files

    out = io.BytesIO()
    files.write_table(pyarrow.table(columns), out, **options)
    return out.getvalue()


def same(value: str, times: int) -> Any:
    """A column that repeats one value, which is in memory only once."""
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), [value])


def struct_before_text() -> bytes:
    info = [{"a": "x", "b": os.urandom(2000).hex()}] * 10
    return parquet({"info": info, "text": ["a" * 10_000_000] * 10}, use_dictionary=False, compression="zstd")


def one_dialogue() -> bytes:
    """A single row with a dialogue of 500 turns, all with the same text of 15 MB."""
    import pyarrow

    turns = pyarrow.StructArray.from_arrays(
        [same("user", 500), same("a" * 15_000_000, 500)], ["role", "content"]
    )
    messages = pyarrow.ListArray.from_arrays(pyarrow.array([0, 500], pyarrow.int32()), turns)
    return parquet({"messages": messages}, compression="zstd", **LARGE_DICTIONARY)


def arrow(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import ipc

    table, out = pyarrow.table(columns), io.BytesIO()
    with ipc.new_stream(out, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return out.getvalue()


def arrow_claim() -> bytes:
    """An Arrow file whose record batch claims a body of one terabyte."""
    whole = bytearray(arrow({"text": ["a" * 1000] * 10}))
    at = 8 + struct.unpack_from("<i", whole, 4)[0]  # after the schema
    body_bytes = len(whole) - 8 - (at + 8 + struct.unpack_from("<i", whole, at + 4)[0])
    place = whole.index(struct.pack("<q", body_bytes), at)
    whole[place : place + 8] = struct.pack("<q", 1 << 40)
    return bytes(whole)


def warc_record(answer: bytes, n_bytes: int | None = None, header: bytes = b"") -> bytes:
    size = len(answer) if n_bytes is None else n_bytes
    return (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://u/1\r\n"
        + header
        + b"Content-Length: %d\r\n\r\n" % size
        + answer
        + b"\r\n\r\n"
    )


def answer(page: bytes, header: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n" + header + b"\r\n" + page


def page(body: str = "") -> bytes:
    text = "".join(f"<p>{SENTENCE} Paragraph {i} has words of its own.</p>" for i in range(6))
    return f"<html><head><title>T</title></head><body>{body}<article>{text}</article></body></html>".encode()


def attributes(n: int) -> str:
    return "<p " + " ".join(f"a{i}=1" for i in range(n)) + ">x</p>"


def tar(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tar_claim() -> bytes:
    """A tar whose pax header claims a size of one terabyte."""
    header = tarfile.TarInfo("0.txt")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)


def bombs() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Name, file name extension and content of each bomb."""
    blanks, start = b"a" * (1 << 20), b'{"text": "'
    yield "gzip, one line of 1 GiB", ".jsonl.gz", lambda: gzipped(start, blanks, 1024)
    yield "gzip, empty values", ".jsonl.gz", many_values
    yield "zstd, one line of 1 GiB", ".jsonl.zst", lambda: zst(start, blanks, 1024)
    yield "xz, one line of 1 GiB", ".jsonl.xz", lambda: streams(lzma.compress, start, blanks, 1024)
    yield "bz2, one line of 1 GiB", ".jsonl.bz2", lambda: streams(bz2.compress, start, blanks, 1024)
    yield "JSON, an array of 1 GiB", ".json.gz", lambda: gzipped(b'[{"text": "', blanks, 1024)
    yield "JSON, an object of 1 GiB", ".json.gz", lambda: gzipped(b'{\n"text": "', blanks, 1024)
    yield "CSV, a value of 1 GiB", ".csv.gz", lambda: gzipped(b'text\n"', blanks, 1024)
    yield "CSV, empty values", ".csv.gz", lambda: gzipped(b"text\n", b"," * (1 << 16), 240)
    yield "UTF-16, one line of 1 GiB", ".jsonl.gz", lambda: gzipped(b"\xff\xfe" + start, blanks, 1024)
    big = "a" * 15_000_000
    packed = {"compression": "zstd", **LARGE_DICTIONARY}
    yield "Parquet, dictionary", ".parquet", lambda: parquet({"text": same(big, 256)}, **packed)
    yield (
        "Parquet, dictionary of ids",
        ".parquet",
        lambda: parquet({"text": ["a"] * 256, "id": same(big, 256)}, **packed),
    )
    plain = {"use_dictionary": False, "compression": "zstd"}
    yield "Parquet, pages", ".parquet", lambda: parquet({"text": [big] * 30}, **plain)
    yield (
        "Parquet, pages of a value",
        ".parquet",
        lambda: parquet({"text": [big] * 30}, data_page_size=1, write_batch_size=1, **plain),
    )
    yield "Parquet, a struct before the text", ".parquet", struct_before_text
    delta = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    yield "Parquet, prefixes", ".parquet", lambda: parquet({"text": ["a" * 900_000] * 400}, **delta)
    yield "Arrow, packed", ".arrow", lambda: arrow({"text": ["a" * 10_000_000] * 30}, compression="zstd")
    yield "Arrow, dictionary", ".arrow", lambda: arrow({"text": same("a" * 500_000, 100_000)})
    yield "Arrow, a claim of 1 TiB", ".arrow", arrow_claim
    zeros = b"\0" * (1 << 20)
    head = b"WARC/1.0\r\nWARC-Type: response\r\nX: "
    yield "WARC, a header of 1 GiB", ".warc.gz", lambda: gzipped(head, zeros, 1024)
    long = answer(b"")
    yield (
        "WARC, a page of 1 GiB",
        ".warc.gz",
        lambda: gzipped(warc_record(long, len(long) + GIB)[:-4], zeros, 1024),
    )
    page_of_64_mib = gzip.compress(b"<p>" + b"a" * (64 << 20), 6)
    yield (
        "WARC, a packed page",
        ".warc",
        lambda: warc_record(answer(page_of_64_mib, b"Content-Encoding: gzip\r\n")),
    )
    yield "tar, a packed member", ".tar", lambda: tar(("0.json.gz", gzipped(start, blanks, 1024)))
    yield "tar, a claim of 1 TiB", ".tar", tar_claim
    yield "HTML, 60,000 attributes", ".warc", lambda: warc_record(answer(page(attributes(60_000))))
    yield "HTML, 300,000 tags", ".warc", lambda: warc_record(answer(page("<a>" * 300_000)))


def chat_bombs() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Bombs that are dialogues, in the same form as those of `bombs`."""
    yield "Parquet, one dialogue", ".parquet", one_dialogue


def honest() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """A valid file of each kind, in the same form as `bombs`."""
    lines = "".join(json.dumps(row) + "\n" for row in HONEST).encode()
    columns = {"text": [row["text"] for row in HONEST], "id": [row["id"] for row in HONEST]}
    yield "honest gzip", ".jsonl.gz", lambda: gzip.compress(lines)
    yield "honest zstd", ".jsonl.zst", lambda: zst(b"", lines, 1)
    yield "honest xz", ".jsonl.xz", lambda: lzma.compress(lines)
    yield "honest JSON", ".json.bz2", lambda: bz2.compress(json.dumps(HONEST, indent=1).encode())
    rows = "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in HONEST)
    yield "honest CSV", ".csv", lambda: rows.encode()
    yield "honest Parquet", ".parquet", lambda: parquet(columns)
    yield "honest Arrow", ".arrow", lambda: arrow(columns)
    samples = [(f"{row['id']}.json", json.dumps(row).encode()) for row in HONEST]
    yield "honest tar", ".tar", lambda: tar(*samples)
    yield "honest WARC", ".warc.gz", lambda: gzipped(warc_record(answer(page())), b"", 1)


def write(folder: Path, made: Iterator[tuple[str, str, Callable[[], bytes]]]) -> None:
    """Write each file into its own folder, which has its name."""
    for name, suffix, content in made:
        inner = folder / name.replace("/", " ")
        inner.mkdir(parents=True)
        (inner / f"bomb{suffix}").write_bytes(content())
        if suffix == ".arrow":
            (inner / "dataset_info.json").write_text("{}")


def curate(folder: Path) -> tuple[int, list[str]]:
    """Read as a curation does. Returns the number of records and the problems that were found."""
    from data_tools.reading.units import ReadConfig, read_unit, units_of

    bad: list[str] = []
    count = 0
    for unit in units_of([str(folder)], 64 << 20):
        for _ in read_unit(unit, ReadConfig(), lambda one: bad.append(f"{one.where} {one.why}")):
            count += 1
    return count, bad


def prepare(folder: Path, format: str = "text") -> tuple[int, list[str]]:
    from data_tools.config import DocumentFormat, PrepareConfig, TokenizerConfig
    from data_tools.reading.sources import Rejected, find_files, read_documents
    from pretrain.errors import ConfigError

    config = PrepareConfig(
        input=[str(folder)], output="", format=DocumentFormat(format), tokenizer=TokenizerConfig(path="given")
    )
    count = 0
    try:
        for file in find_files(config):
            for item in read_documents(file, config):
                if isinstance(item, Rejected):
                    return count, [item.where]
                count += len(item)
    except ConfigError as error:
        return count, [str(error)]
    return count, []


def chat(folder: Path) -> tuple[int, list[str]]:
    return prepare(folder, "chat")


def read_in_child(
    reader: Callable[[Path], tuple[int, list[str]]], folder: Path, limit_bytes: int
) -> dict[str, Any]:
    """Read in a forked process. Returns the result and the memory that it took."""
    begin = time.monotonic()
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        try:
            count, bad = reader(folder)
            told = {"records": count, "bad": bad[:3], "n_bad": len(bad)}
        except BaseException as error:
            told = {"raised": f"{type(error).__name__}: {error}"[:200]}
        if "data_tools.reading.web.pages" in sys.modules:
            sys.modules["data_tools.reading.web.pages"].page_reader().close()
        told["children_mb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        os.write(into, json.dumps(told).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        told = json.loads(pipe.read() or b'{"raised": "died"}')
    _, status, usage = os.wait4(pid, 0)
    seconds = round(time.monotonic() - begin, 2)
    return told | {"peak_mb": round(usage.ru_maxrss / 1024), "seconds": seconds, "status": status}


def main(folder: str, *readers: str) -> None:
    sys.path.insert(0, os.environ.get("BOMBS_ROOT", str(ROOT)))
    import pyarrow.compute  # imported before the measurement, so that only the memory of reading counts
    import pyarrow.ipc
    import pyarrow.parquet
    import zstandard

    import data_tools.reading.sources
    import data_tools.reading.units

    del pyarrow, zstandard, data_tools
    limit = int(os.environ.get("BOMBS_LIMIT_BYTES", 2 * GIB))
    for reader in readers:
        for inner in sorted(Path(folder).iterdir()):
            [file] = inner.glob("bomb*")
            if reader != "curate" and file.name.endswith(
                (".zst", ".xz", ".bz2", ".arrow", ".warc", ".warc.gz")
            ):
                continue  # the reader is the same
            told = read_in_child(globals()[reader], inner, limit)
            print(
                json.dumps({"name": inner.name, "reader": reader, "bytes": file.stat().st_size, **told}),
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
