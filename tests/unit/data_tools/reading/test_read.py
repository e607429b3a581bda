"""Real files of every kind, whole and broken, and units of every size."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.reading.units import Bad, ReadConfig, Unit, read_unit, units_of
from data_tools.record import Record
from pretrain.errors import ConfigError

TEXTS = [
    "The committee met on Friday.",
    "为了保护专利权人的合法权益，制定本法。",
    "def f(x):\n    return x\n",
    "",
    "naïve \U0001f600 line\u2028separator",
]
WHOLE = 1 << 40


def read(
    inputs: list[str], unit_bytes: int = WHOLE, **options: object
) -> tuple[list[Record], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    records = [
        record
        for unit in units_of(inputs, unit_bytes)
        for record in read_unit(unit, ReadConfig(**options), lambda one: bad.append((one.where, one.why)))
    ]
    return records, bad


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


ROWS = [{"id": f"d{i}", "text": text, "source": "s", "url": f"http://u/{i}"} for i, text in enumerate(TEXTS)]


def pack(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return data


# --- JSONL ---


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl(ROWS), suffix))
    records, bad = read([str(tmp_path / f"a.jsonl{suffix}")])
    assert [(r.id, r.text, r.source, r.url) for r in records] == [
        (row["id"], row["text"], "s", row["url"]) for row in ROWS
    ]
    assert bad == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_ids_are_places(tmp_path: Path, suffix: str) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\n\r\n{"text": "b"}\r\n{"text": "c"}'
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(data, suffix))
    records, bad = read([str(tmp_path)])
    name = f"{tmp_path.name}/a.jsonl{suffix}"
    places = [data.index(text) for text in (b'{"text": "b"', b'{"text": "c"')]
    assert [(r.id, r.text, r.source) for r in records] == [
        (f"{name}:0", "a", "a"),
        (f"{name}:{places[0]}", "b", "a"),
        (f"{name}:{places[1]}", "c", "a"),
    ]
    assert bad == []


def test_fields_are_chosen(tmp_path: Path) -> None:
    row = {"content": "text", "key": 7, "site": "web", "link": "http://u", "terms": "CC0", "text": "no"}
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    names = {"text": "content", "id": "key", "source": "site", "url": "link", "license": "terms"}
    [record], bad = read([str(tmp_path)], **{f"{field}_field": name for field, name in names.items()})
    assert record == Record(id="7", text="text", source="web", url="http://u", license="CC0")
    assert bad == []


LINES = [jsonl([row]) for row in ROWS] + [
    b"\n",
    b" \r\n",
    b"no json\n",
    b"[1]\n",
    b'{"text": 1}\n',
    b'{"other": "x"}\n',
    b'{"text": "\xff\xfe"}\n',
    b'{"text": "' + b"x" * 300 + b'"}\n',
    b"[" * 300 + b"\n",
]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from(LINES), min_size=1, max_size=9),
    st.integers(1, 1200),
    st.booleans(),
    st.sampled_from([20, 200, 1 << 20]),
)
def test_units_of_any_size_give_the_same(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int, is_closed: bool, longest: int
) -> None:
    folder = tmp_path_factory.mktemp("units")
    data = b"".join(lines)
    (folder / "a.jsonl").write_bytes(data if is_closed else data.removesuffix(b"\n"))
    path = [str(folder / "a.jsonl")]
    whole = read(path, max_line_bytes=longest)
    assert read(path, size, max_line_bytes=longest) == whole
    assert len(whole[0]) + len(whole[1]) == sum(bool(line.strip()) for line in lines)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_units_of_single_bytes_give_the_same(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES[:-1]))
    whole = read([str(tmp_path)], max_line_bytes=200)
    assert len(whole[0]) == len(ROWS)
    assert read([str(tmp_path)], size, max_line_bytes=200) == whole


def test_bad_lines_are_named_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join([*LINES, LINES[0]]))
    records, bad = read([str(tmp_path)], max_line_bytes=200)
    assert [r.text for r in records] == [*TEXTS, TEXTS[0]]
    data = b"".join(LINES)
    name = f"{tmp_path.name}/a.jsonl"
    assert [where for where, _ in bad] == [f"{name}:{data.index(line)}" for line in LINES[len(ROWS) + 2 :]]
    reasons = [why for _, why in bad]
    for why, part in zip(
        reasons,
        [
            "no JSON",
            "list, no object",
            "int, no text",
            "missing",
            "not UTF-8 at byte 10",
            "more than 200",
            "more",
        ],
        strict=True,
    ):
        assert part in why


def test_deep_json_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000 + b"\n" + LINES[0])
    records, bad = read([str(tmp_path)])
    assert (len(records), len(bad)) == (1, 1)


def test_halves_of_surrogate_pairs_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud83d b \\ud83d\\ude00", "id": "\\udc00"}\n')
    [record], _ = read([str(tmp_path)])
    assert (record.text, record.id) == ("a\ufffd b \U0001f600", "\ufffd")


def test_a_line_of_100_mb_takes_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(LINES[0])
        file.seek(100_000_000, os.SEEK_CUR)  # a hole: zeros that take no place on the disk
        file.write(b"\n" + LINES[1])
    tracemalloc.start()
    records, bad = read([str(tmp_path)], max_line_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [r.text for r in records] == TEXTS[:2]
    assert bad == [(f"{tmp_path.name}/a.jsonl:{len(LINES[0])}", "is a line of more than 1048576 bytes")]
    assert peak < 16 << 20
    assert read([str(tmp_path)], 10_000_000, max_line_bytes=1 << 20) == (records, bad)


# --- compressed ---


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_comes_before_the_break_is_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": os.urandom(1000).hex()} for _ in range(400)]
    packed = pack(jsonl(rows), suffix)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    records, [(where, why)] = read([str(tmp_path)])
    assert [r.text for r in records] == [row["text"] for row in rows[: len(records)]]
    assert 100 <= len(records) <= 200  # whole blocks of what half of the bytes hold
    line_bytes = len(jsonl(rows[:1]))
    assert where == f"{tmp_path.name}/a.jsonl{suffix}:{len(records) * line_bytes}"
    assert "cannot be read from here on" in why


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_flipped_bit_is_seen(tmp_path: Path, suffix: str) -> None:
    data = jsonl([{"text": "x" * 50}] * 50)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    else:
        packed = bytearray(pack(data, suffix))
    packed[-3] ^= 1  # in the checksum
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    _, bad = read([str(tmp_path)])
    assert len(bad) == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_are_one_file(tmp_path: Path, suffix: str) -> None:
    packed = b"".join(pack(jsonl([row]), suffix) for row in ROWS)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    records, bad = read([str(tmp_path)])
    assert [r.text for r in records] == TEXTS
    assert bad == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("line", [b"\0" * (1 << 20), b'{"text": "' + b"a" * 1000 + b'"}\n'])
def test_a_bomb_is_given_up(tmp_path: Path, suffix: str, line: bytes) -> None:
    if suffix == ".gz":
        packed = gzip.compress(line * (100_000_000 // len(line)))
    else:
        packed = (
            pytest.importorskip("zstandard")
            .ZstdCompressor(level=9)
            .compress(line * (100_000_000 // len(line)))
        )
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    [unit] = units_of([str(tmp_path)], WHOLE)
    bad: list[str] = []
    tracemalloc.start()
    options = ReadConfig(max_line_bytes=1 << 20, max_ratio=20)
    number = sum(1 for _ in read_unit(unit, options, lambda one: bad.append(one.why)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "unpacks to more than 20 times its size" in bad[-1]
    assert number < 50_000
    assert peak < 64 << 20


def test_the_limit_of_unpacked_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl([{"text": os.urandom(500).hex()}] * 100)))
    records, bad = read([str(tmp_path)], max_unpacked_bytes=50_000)
    assert "unpacks to more than 50000 bytes" in bad[0][1]
    assert len(records) < 100


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".warc", ".warc.gz"])
@pytest.mark.parametrize("data", [b"this is no archive\n" * 10, b"\x1f\x8b\x08\x00broken", b"PAR1PAR1"])
def test_what_is_no_archive_is_one_bad_record(tmp_path: Path, suffix: str, data: bytes) -> None:
    for package in ("zstandard", "pyarrow", "warcio"):
        pytest.importorskip(package)
    pytest.importorskip("trafilatura", exc_type=ImportError)
    (tmp_path / f"a{suffix}").write_bytes(data)
    records, bad = read([str(tmp_path)])
    assert records == []
    assert len(bad) == 1


# --- tables ---


def write_parquet(path: Path, rows: list[dict], group: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


@pytest.mark.parametrize("size", [1, 100, 1000, WHOLE])
def test_parquet(tmp_path: Path, size: int) -> None:
    rows = [{"text": f"text {i} 发明", "url": f"http://u/{i}"} for i in range(23)]
    write_parquet(tmp_path / "a.parquet", rows, group=5)
    records, bad = read([str(tmp_path)], size)
    assert [(r.id, r.text, r.url, r.source) for r in records] == [
        (f"{tmp_path.name}/a.parquet:{i}", row["text"], row["url"], "a") for i, row in enumerate(rows)
    ]
    assert bad == []
    assert len(units_of([str(tmp_path)], size)) == {1: 5, WHOLE: 1}.get(
        size, len(units_of([str(tmp_path)], size))
    )


def test_a_missing_column_is_told_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"content": "x"}] * 20, group=5)
    write_parquet(tmp_path / "b.parquet", [{"text": "x"}], group=5)
    records, bad = read([str(tmp_path)], 1)
    assert [r.text for r in records] == ["x"]
    assert bad == [(f"{tmp_path.name}/a.parquet", "has no column 'text' (it has content)")]


def test_a_null_and_a_broken_string_are_bad_rows(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = pyarrow.array([b"a", b"\xff", None, b"b"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    records, bad = read([str(tmp_path)])
    assert [r.text for r in records] == ["a", "b"]
    assert [where.rsplit(":")[-1] for where, _ in bad] == ["1", "2"]


def test_a_broken_row_group_leaves_the_others(tmp_path: Path) -> None:
    rows = [{"text": os.urandom(400).hex()} for _ in range(30)]
    write_parquet(tmp_path / "a.parquet", rows, group=10)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = data.index(rows[15]["text"][:100].encode())
    start = data.index(rows[11]["text"][:40].encode()) - 4  # its length stands before it
    data[start:middle] = b"\xff" * (middle - start)
    (tmp_path / "a.parquet").write_bytes(data)
    records, bad = read([str(tmp_path)])
    assert {row["text"] for row in [*rows[:10], *rows[20:]]} <= {r.text for r in records}
    assert len(bad) >= 1


def test_a_parquet_bomb_is_given_up(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a" * 1_000_000] * 40})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    records, [(where, why)] = read([str(tmp_path)])
    assert (records, where) == ([], f"{tmp_path.name}/a.parquet:0")
    assert "unpacks to" in why


def test_hugging_face_folders(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    ipc = pytest.importorskip("pyarrow.ipc")
    table = pyarrow.Table.from_pylist([{"text": text, "label": 1} for text in TEXTS])
    for split in ("train", "test"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text("{}")
        for name in ("data-00000-of-00001.arrow", "cache-0123.arrow"):
            with ipc.new_stream(str(folder / name), table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    stray = tmp_path / "set" / "stray.arrow"
    stray.write_bytes(b"not of a dataset")
    (tmp_path / "set" / "data").mkdir()
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", ROWS, group=9)
    records, bad = read([str(tmp_path / "set")])
    assert [r.text for r in records] == TEXTS * 3
    assert [r.source for r in records] == ["s"] * 5 + ["test"] * 5 + ["train"] * 5
    assert records[5].id == "set/test/data-00000-of-00001.arrow:0"
    assert bad == []
    arrow = tmp_path / "set" / "train" / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-300])
    records, bad = read([str(tmp_path / "set" / "train")])
    assert [r.text for r in records] == TEXTS[: len(records)]
    assert len(bad) == 1


# --- text and files ---


def test_text_folders(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Title\n")
    (tmp_path / "a.txt").write_text("\ufeff发明\n")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "c.bin").write_text("no")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "long.txt").write_text("x" * 101)
    records, bad = read([str(tmp_path)], max_line_bytes=100)
    label = tmp_path.name
    assert [(r.id, r.text, r.source) for r in records] == [
        (f"{label}/a.txt", "发明\n", label),
        (f"{label}/b.md", "# Title\n", label),
    ]
    assert [where for where, _ in bad] == [f"{label}/bad.txt", f"{label}/long.txt"]


def test_links_and_loops(tmp_path: Path) -> None:
    root, blobs = tmp_path / "root", tmp_path / "blobs"
    (root / "z").mkdir(parents=True)
    blobs.mkdir()
    (root / "z" / "real.txt").write_text("real")
    (root / "a.txt").symlink_to(root / "z" / "real.txt")
    (root / "loop").symlink_to(root)
    (root / "z" / "up").symlink_to("..")
    (root / "self.txt").symlink_to("self.txt")
    (root / "dangling.txt").symlink_to("nowhere")
    (blobs / "0123").write_bytes(jsonl(ROWS[:1]))
    (root / "snapshot.jsonl").symlink_to(blobs / "0123")
    (root / "other").symlink_to(blobs)
    records, bad = read([str(root)])
    assert [(r.id, r.text) for r in records] == [("root/z/real.txt", "real"), ("d0", TEXTS[0])]
    assert bad == []
    assert len(read([str(root), str(root / "z"), str(root / "a.txt")])[0]) == 2


def test_odd_names_stay_apart(tmp_path: Path) -> None:
    names = [
        b"new\nline.txt",
        b"a\xff.txt",
        b"a\xfe.txt",
        "发明 #?*::[x].txt".encode(),
        b"%41.txt",
        b"UP.TXT",
    ]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(repr(name))
    records, bad = read([str(tmp_path)])
    assert sorted(r.text for r in records) == sorted(map(repr, names))
    assert len({r.id for r in records}) == len(names)
    assert all(r.id.encode().isascii() or "发明" in r.id for r in records)
    assert not any("\n" in r.id for r in records)
    assert bad == []
    assert [json.loads(json.dumps(unit.path)) for unit in units_of([str(tmp_path)], 1)]


def test_a_file_that_cannot_be_opened_is_one_bad_record(tmp_path: Path) -> None:
    gone = Unit(str(tmp_path / "gone.jsonl"), "gone.jsonl", "gone", "jsonl")
    bad: list[tuple[str, str]] = []
    assert list(read_unit(gone, ReadConfig(), lambda one: bad.append((one.where, one.why)))) == []
    assert bad == [("gone.jsonl", "cannot be read: No such file or directory")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_caller_can_stop(tmp_path: Path, name: str) -> None:
    if name == "a.jsonl":
        (tmp_path / name).write_bytes(b"bad\nbad\n")
    else:
        write_parquet(tmp_path / name, [{"text": 1}, {"text": 2}], group=9)

    def on_bad(one: Bad) -> None:
        raise ConfigError(f"too many: {one.where} {one.why}")

    [unit] = units_of([str(tmp_path)], WHOLE)
    with pytest.raises(ConfigError, match="too many"):
        list(read_unit(unit, ReadConfig(), on_bad))


def test_inputs_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "same").mkdir(parents=True)
        (tmp_path / folder / "same" / "a.txt").write_text(folder)
    records, _ = read([str(tmp_path / "x" / "same"), str(tmp_path / "y" / "same")])
    assert [(r.id, r.text) for r in records] == [("same/a.txt", "x"), ("same~2/a.txt", "y")]


def test_versions_change_with_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = units_of([str(tmp_path)], 1)
    assert units_of([str(tmp_path)], 1) == before
    (tmp_path / "a.txt").write_text("other")
    assert units_of([str(tmp_path)], 1)[0].version != before[0].version


@pytest.mark.parametrize("made", [None, "empty", "unknown"])
def test_an_input_without_text_is_named(tmp_path: Path, made: str | None) -> None:
    path = tmp_path / "input"
    if made == "empty":
        path.mkdir()
    elif made == "unknown":
        path.write_text("x")
    with pytest.raises(ConfigError, match=r"input=.*input"):
        units_of([str(path)], 1)
    with pytest.raises(ConfigError, match="input=http"):
        units_of(["http://127.0.0.1:1/here"], 1)


# --- URLs ---


@pytest.mark.parametrize("size", [1, 17, WHOLE])
def test_urls(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A store that needs no server, and that is none of those that are allowed.
    monkeypatch.setattr("data_tools.reading.listing.check_url", lambda *_: None)
    for module in ("listing", "reader"):
        monkeypatch.setattr(f"data_tools.reading.{module}.file_system", fsspec.core.url_to_fs)
    data = {"a.jsonl": jsonl(ROWS), "sub/b.jsonl.gz": gzip.compress(jsonl(ROWS)), "sub/.c.txt": b"no"}
    memory = fsspec.filesystem("memory")
    for name, content in data.items():
        memory.pipe(f"/corpus/{name}", content)
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(content)
    try:
        local = read([str(tmp_path / "corpus")], size)
        assert [r.text for r in local[0]] == TEXTS * 2
        assert read([f"file://{tmp_path}/corpus"], size) == local
        assert read(["memory://corpus"], size) == local
        assert read(["memory://corpus/a.jsonl"], size)[0] == local[0][: len(ROWS)]
    finally:
        memory.rm("/corpus", recursive=True)


# --- WARC ---


def html(text: str) -> bytes:
    body = "".join(
        f"<p>{text} Paragraph {i} has words of its own, enough of them to be text.</p>" for i in range(6)
    )
    return f"<html><head><title>T</title></head><body><article>{body}</article></body></html>".encode()


def write_warc(path: Path, gzipped: bool, answers: list[tuple[str, str, str, bytes]]) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    writer_module = pytest.importorskip("warcio.warcwriter")
    headers_module = pytest.importorskip("warcio.statusandheaders")
    with path.open("wb") as file:
        writer = writer_module.WARCWriter(file, gzip=gzipped)
        writer.write_record(writer.create_warcinfo_record("a", {"software": "test"}))
        for url, status, kind, payload in answers:
            headers = [("Content-Type", kind)] if kind else []
            http = headers_module.StatusAndHeaders(status, headers, protocol="HTTP/1.1")
            writer.write_record(
                writer.create_warc_record(url, "response", payload=io.BytesIO(payload), http_headers=http)
            )


ANSWERS = [
    ("http://u/1", "200 OK", "text/html; charset=utf-8", html("The committee met on Friday.")),
    ("http://u/2", "404 Not Found", "text/html", html("Not here.")),
    ("http://u/3", "200 OK", "image/png", b"\x89PNG"),
    ("http://u/4", "200 OK", "text/html", html("专利法保护发明人的权利，并且鼓励创造。" * 3)),
    ("http://u/5", "200 OK", "text/html", b"<html></html>"),
    ("http://u/6", "200 OK", "", b"no type"),
    ("http://u/7", "200 OK", "text/html", html("last")),
]


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz"])
def test_warc(tmp_path: Path, suffix: str) -> None:
    write_warc(tmp_path / f"a{suffix}", suffix.endswith("gz"), ANSWERS)
    records, bad = read([str(tmp_path)], 1)
    assert [(r.id.rsplit(":")[-1], r.url, r.source) for r in records] == [
        ("1", "http://u/1", "a"),
        ("4", "http://u/4", "a"),
        ("5", "http://u/5", "a"),
        ("7", "http://u/7", "a"),
    ]
    assert "The committee met on Friday. Paragraph 3" in records[0].text
    assert "专利法保护发明人的权利" in records[1].text
    assert records[2].text == ""
    assert bad == []


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz"])
def test_a_truncated_warc(tmp_path: Path, suffix: str) -> None:
    write_warc(tmp_path / f"a{suffix}", suffix.endswith("gz"), ANSWERS)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(path.read_bytes()[:-100])
    records, [(where, why)] = read([str(tmp_path)])
    assert [r.url for r in records] == ["http://u/1", "http://u/4", "http://u/5"]
    assert where.startswith(f"{tmp_path.name}/a{suffix}:")
    assert "cannot be read from here on" in why


def test_a_page_that_is_too_large_is_a_bad_record(tmp_path: Path) -> None:
    large = ("http://u/0", "200 OK", "text/html", html("x" * 9000))
    write_warc(tmp_path / "a.warc.gz", True, [large, *ANSWERS[:1]])
    records, bad = read([str(tmp_path)], max_line_bytes=9000)
    assert [r.url for r in records] == ["http://u/1"]
    assert bad == [(f"{tmp_path.name}/a.warc.gz:1", "is a page of more than 9000 bytes")]


@pytest.mark.parametrize("key", ["max_line_bytes", "max_ratio", "max_unpacked_bytes", "text_field"])
def test_a_wrong_option_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"read.{key}"):
        ReadConfig(**{key: "" if key == "text_field" else 0})
