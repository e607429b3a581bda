"""Tars of text, in webdataset's conventions, as input of a curation and of a preparation: whole, broken and hostile."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from data_tools.config import DocumentFormat, PrepareConfig, TokenizerConfig
from data_tools.reading.bounded import Bounds
from data_tools.reading.listing import expand_ranges
from data_tools.reading.sources import Rejected, find_files
from data_tools.reading.tars import samples
from data_tools.reading.units import ReadConfig, read_unit, units_of
from data_tools.record import Record
from pretrain.errors import ConfigError
from support.preparing import Document, read_one_by_one

os.environ["WDS_SECURE"] = "1"  # read when webdataset is imported


def member(name: str, content: bytes = b"", **header: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    return info, content


def packed(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


HONEST = (
    member("a/000.txt", b"The committee met."),
    member("a/000.json", as_json(id="d0", source="s", url="http://u/0", license="CC0", text="not this")),
    member("a/000.jpg", b"\xff" * 700),
    member("a/001.json", as_json(text="发明")),
    member("a", type=tarfile.DIRTYPE),
    member("a/002.json.gz", gzip.compress(as_json(text="packed", id=2))),
    member("README", b"passed over"),
    member("a/._000.txt", b"passed over"),
    member("__meta__/x.txt", b"passed over"),
    member("a/003.TXT", b"\xef\xbb\xbflast"),
)
TEXTS = ["The committee met.", "发明", "packed", "last"]


def curated(folder: Path, **options: int) -> tuple[list[Record], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    records = [
        record
        for unit in units_of([str(folder)], 1)
        for record in read_unit(unit, ReadConfig(**options), lambda one: bad.append((one.where, one.why)))
    ]
    return records, bad


def prepared(folder: Path, **options: object) -> list:
    config = PrepareConfig(input=[str(folder)], output="", **options)
    return [item for file in find_files(config) for item in read_one_by_one(file, config)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_both_read_it(tmp_path: Path, format: int) -> None:
    (tmp_path / "web-007.tar").write_bytes(packed(*HONEST, format=format))
    name = f"{tmp_path.name}/web-007.tar"
    records, bad = curated(tmp_path)
    assert [(r.id, r.text, r.source, r.url, r.license) for r in records] == [
        ("d0", TEXTS[0], "s", "http://u/0", "CC0"),
        (f"{name}:1", TEXTS[1], "web", None, None),
        ("2", TEXTS[2], "web", None, None),
        (f"{name}:3", TEXTS[3], "web", None, None),
    ]
    assert bad == []
    assert [(d.id, d.text, d.source, d.license) for d in prepared(tmp_path)] == [
        ("d0", TEXTS[0], "s", "CC0"),
        (f"{name}:2", TEXTS[1], "web", "unknown"),
        ("2", TEXTS[2], "web", "unknown"),
        (f"{name}:4", TEXTS[3], "web", "unknown"),
    ]


def test_webdataset_groups_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with path.open("wb") as raw, webdataset.TarWriter(raw) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": f"{number:03}", "txt": text, "json": {"id": number}, "cls": 1})
    theirs = [
        (sample["__key__"], sample["txt"].decode(), json.loads(sample["json"]))
        for sample in webdataset.WebDataset(f"file:{path}", shardshuffle=False, empty_check=False)
    ]
    with path.open("rb") as file:
        ours = [(sample.text, sample.fields) for sample in samples(file, Bounds())]
    assert ours == [(text, fields) for _, text, fields in theirs]
    assert [text for text, _ in ours] == TEXTS


def test_dialogues_in_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        packed(member("0.json", as_json(prompt="Why?", response="So.")), member("1.txt", b"none"))
    )
    options = {"format": DocumentFormat.chat, "tokenizer": TokenizerConfig(path="given")}
    dialogue, bad = prepared(tmp_path, **options)
    assert json.loads(dialogue.text) == [["user", "Why?"], ["assistant", "So."]]
    assert "a.tar:2" in bad.where and "no dialogue" in bad.where


def test_long_names(tmp_path: Path) -> None:
    folder = "发明" * 60
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        made = packed(
            member(f"{folder}/0.txt", b"a"), member(f"{folder}/0.json", b'{"id": "x"}'), format=format
        )
        (tmp_path / "a.tar").write_bytes(made)
        [record], bad = curated(tmp_path)
        assert (record.text, record.id, bad) == ("a", "x", [])


# --- a tar that was cut off ---


def test_a_tar_cut_anywhere_is_told(tmp_path: Path) -> None:
    whole = packed(*HONEST)
    end = whole.rindex(b"last") + 512 - (whole.rindex(b"last") % 512) + 1024
    path = tmp_path / "a.tar"
    for cut in [*range(512, end, 512), *range(1, end, 509)]:
        path.write_bytes(whole[:cut])
        records, bad = curated(tmp_path)
        assert [r.text for r in records] == TEXTS[: len(records)]
        assert len(bad) == 1, cut
        where, why = bad[0]
        assert where == f"{tmp_path.name}/a.tar:{len(records)}"
        assert "cannot be read from here on" in why and "cut off" in why
        *_, last = prepared(tmp_path)
        assert isinstance(last, Rejected) and last.is_error
        assert last.lost_bytes == cut if not records else last.lost == len(records)
        assert re.search(r"a\.tar:\d+ cannot be read from here on", last.where)
    path.write_bytes(whole[:end])
    assert [r.text for r in curated(tmp_path)[0]] == TEXTS
    assert curated(tmp_path)[1] == []


def test_a_flipped_header_is_told(tmp_path: Path) -> None:
    whole = bytearray(packed(*HONEST))
    at = whole.index(b"a/001.json")
    whole[at] ^= 1
    (tmp_path / "a.tar").write_bytes(whole)
    records, [(where, why)] = curated(tmp_path)
    assert (len(records), where) == (0, f"{tmp_path.name}/a.tar:0")  # the first sample may not be whole
    assert f"no header of a tar at byte {at}" in why


def test_several_tars_in_a_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed(*HONEST) * 2)
    records, [(_, why)] = curated(tmp_path)
    assert len(records) == len(TEXTS) - 1
    assert "several tars" in why


@pytest.mark.parametrize("data", [b"no tar\n" * 200, gzip.compress(packed(*HONEST))])
def test_what_is_no_tar_is_one_bad_record(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    records, bad = curated(tmp_path)
    assert (records, len(bad)) == ([], 1)


# --- bad samples ---

TEXT = member("0.txt", b"a")
BAD = {
    "no text": ((member("0.jpg", b"x"), member("0.cls", b"1")), "(it has .jpg, .cls)"),
    "same key twice": ((TEXT, member("0.txt", b"b")), "two members .txt"),
    "two kinds of JSON": ((member("0.json", b"{}"), member("0.json.gz", gzip.compress(b"{}"))), "both"),
    "no UTF-8": ((member("0.txt", b"\xff"),), "no UTF-8"),
    "no JSON": ((TEXT, member("0.json", b"{")), "no JSON"),
    "no object": ((TEXT, member("0.json", b"[1]")), "list, no object"),
    "no field": ((member("0.json", b"{}"),), "'text'"),
    "no gzip": ((member("0.json.gz", b"{}"),), "cannot be unpacked"),
    "cut gzip": ((member("0.json.gz", gzip.compress(os.urandom(5000))[:-99]),), "cannot be unpacked"),
    "too large": ((member("0.txt", b"a" * 60_001),), "more than 60000 bytes"),
    "together too large": ((member("0.txt", b"a" * 40_000), member("0.json", b" " * 40_000)), "more than 60000 bytes"),
    "a bomb": ((member("0.json.gz", gzip.compress(b" " * 70_000)),), "more than 60000 bytes"),
    "deep": ((member("0.json", b"[" * 50_000),), "nested too deep"),
    "absolute": ((member("/etc/0.txt", b"a"),), "'/etc/0.txt'"),
    "parent": ((member("a/../../0.txt", b"a"),), "leads out of the tar"),
    "control": ((member("a\x1b[2J/0.txt", b"a"),), r"\x1b"),
    "bytes": ((member("a\udcff/0.txt", b"a"),), r"\udcff"),
    "symbolic link": ((member("0.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"),), "a symbolic link"),
    "hard link": ((member("0.txt", type=tarfile.LNKTYPE, linkname="x"),), "a hard link"),
    "device": ((member("0.txt", type=tarfile.CHRTYPE),), "a device"),
    "pipe": ((member("0.txt", type=tarfile.FIFOTYPE),), "a pipe"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_sample_is_named_and_passed_over(tmp_path: Path, what: str) -> None:
    members, words = BAD[what]
    made = packed(
        member("before.txt", b"before"), *members, member("z.txt", b"after"), format=tarfile.GNU_FORMAT
    )
    (tmp_path / "a.tar").write_bytes(made)
    records, bad = curated(tmp_path, max_line_bytes=60_000)
    assert [r.text for r in records] == ["before", "after"]
    [(where, why)] = bad
    assert where == f"{tmp_path.name}/a.tar:1"
    assert words in why and why.isprintable()
    first, rejected, last = prepared(tmp_path, max_record_bytes=60_000)
    assert (first.text, last.text, rejected.is_error) == ("before", "after", True)
    assert f"{tmp_path}/a.tar:2 " in rejected.where and words in rejected.where
    assert ("max_record_bytes=60000" in rejected.where) is ("more than" in words)


def test_a_key_that_comes_again_later_is_another_sample(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed(TEXT, member("1.txt", b"b"), member("0.txt", b"c")))
    records, bad = curated(tmp_path)
    assert ([r.text for r in records], len({r.id for r in records}), bad) == (["a", "b", "c"], 3, [])


def with_header(raw: bytes, **fields: bytes) -> bytes:
    """A header with other bytes at the places of the fields, and the checksum for it."""
    places = {"size": 124, "type": 156}
    block = bytearray(raw[:512])
    for name, value in fields.items():
        block[places[name] : places[name] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + raw[512:]


ONE = packed(member("0.txt", b"a"))
GIVEN_UP = {
    "sparse": (with_header(ONE, type=b"S"), "sparse"),
    "sparse in pax": (
        packed(member("0.txt", b"a", pax_headers={"GNU.sparse.major": "1"}), format=tarfile.PAX_FORMAT),
        "sparse",
    ),
    "huge pax": (
        packed(member("0.txt", b"a", pax_headers={"comment": "x" * 70_000}), format=tarfile.PAX_FORMAT),
        "more than 65,536",
    ),
    "a pax header of 1 TiB": (with_header(ONE, type=b"x", size=b"\x80" + (1 << 40).to_bytes(11, "big")), "65,536"),
    "a name of 1 TiB": (with_header(ONE, type=b"L", size=b"\x80" + (1 << 40).to_bytes(11, "big")), "65,536"),
    "a member of 1 TiB": (with_header(ONE, size=b"\x80" + (1 << 40).to_bytes(11, "big")), "cut off"),
    "a negative size": (with_header(ONE, size=b"\xff" * 12), "where a number should be"),
    "broken pax": (with_header(packed(member("0.txt", b"99 path=x\n")), type=b"x"), "pax header is broken"),
    "a global name": (
        with_header(packed(member("0.txt", b"10 path=x\n")), type=b"g"),
        "name or the size of all members",
    ),
    "a size in words": (
        with_header(packed(member("0.txt", b"10 size=x\n"))[:1024], type=b"x") + ONE,
        "no number",
    ),
    "an unknown kind": (with_header(ONE, type=b"V"), "unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize("what", GIVEN_UP)
def test_a_hostile_tar_is_given_up(tmp_path: Path, what: str) -> None:
    data, words = GIVEN_UP[what]
    (tmp_path / "a.tar").write_bytes(data)
    tracemalloc.start()
    records, [(_, why)] = curated(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records == []
    assert words in why and "cannot be read from here on" in why
    assert peak < 8 << 20
    [rejected] = prepared(tmp_path)
    assert rejected.is_error and "cannot be read from here on" in rejected.where


# --- bombs ---


def test_a_bomb_in_a_member_takes_little_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(b" " * (1 << 30), 6)
    assert 1 << 19 < len(bomb) < 1 << 21
    (tmp_path / "a.tar").write_bytes(packed(member("0.json.gz", bomb), member("1.txt", b"after")))
    del bomb
    tracemalloc.start()
    records, [(_, why)] = curated(tmp_path, max_line_bytes=4 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [r.text for r in records] == ["after"]
    assert "more than 4194304 bytes" in why
    assert peak < 24 << 20


def test_many_small_bombs_are_one(tmp_path: Path) -> None:
    bomb = gzip.compress(b"{}" + b" " * 1_000_000, 9)
    made = packed(*(member(f"{number}.json.gz", bomb) for number in range(100)))
    (tmp_path / "a.tar").write_bytes(made)
    _, bad = curated(tmp_path)
    assert "unpack to more than 200 times their size" in bad[-1][1]
    assert len(bad) < 20
    _, bad = curated(tmp_path, max_unpacked_bytes=3_000_000)
    assert "unpack to more than 3000000 bytes" in bad[-1][1]


def test_many_values(tmp_path: Path) -> None:
    values = b'{"text": "a", "more": [' + b"[]," * 600_000 + b"0]}"
    (tmp_path / "a.tar").write_bytes(packed(member("0.json", values)))
    records, [(_, why)] = curated(tmp_path)
    assert records == [] and "values" in why


# --- shards ---


def write_shards(folder: Path) -> None:
    for number in range(8, 12):
        made = packed(member("0.txt", b"shard %d" % number))
        (folder / f"web-{number:03}.tar").write_bytes(made)


def test_shards_by_a_range(tmp_path: Path) -> None:
    write_shards(tmp_path)
    config = PrepareConfig(input=[f"{tmp_path}/web-{{009..011}}.tar"], output="")
    documents = [d for file in find_files(config) for d in read_one_by_one(file, config)]
    assert all(isinstance(d, Document) for d in documents)
    assert [(d.id, d.text, d.source) for d in documents] == [
        (f"web-{number:03}.tar:1", f"shard {number}", "web") for number in (9, 10, 11)
    ]
    units = units_of([f"{tmp_path}/web-{{009..011}}.tar"], 1)
    assert [(unit.name, unit.source) for unit in units] == [(f"web-{n:03}.tar", "web") for n in (9, 10, 11)]
    with pytest.raises(ConfigError, match=r"web-012\.tar does not exist"):
        units_of([f"{tmp_path}/web-{{011..012}}.tar"], 1)


def test_ranges(tmp_path: Path) -> None:
    assert expand_ranges(["a{8..10}", "b{08..10}", "c", "{0..1}{0..1}"]) == [
        *("a8", "a9", "a10", "b08", "b09", "b10", "c", "00", "01", "10", "11")
    ]
    for wrong in ("a{2..1}", "a{0..100000}", "a{0..99999}{0..99999}"):
        with pytest.raises(ConfigError, match="input=a"):
            expand_ranges([wrong])
    literal = tmp_path / "a{1..2}.tar"
    literal.write_bytes(b"")
    assert expand_ranges([str(literal)]) == [str(literal)]


def test_sources_of_shards(tmp_path: Path) -> None:
    for name in ("web-000.tar", "train-00000-of-00009.tar", "part_1.tar", "000.tar", "v2.tar"):
        (tmp_path / name).write_bytes(packed(TEXT))
    sources = {unit.name.split("/")[1]: unit.source for unit in units_of([str(tmp_path)], 1)}
    assert sources == {
        "web-000.tar": "web",
        "train-00000-of-00009.tar": "train",
        "part_1.tar": "part",
        "000.tar": tmp_path.name,
        "v2.tar": "v",
    }
    config = PrepareConfig(input=[str(tmp_path)], output="")
    assert {file.name.split("/")[1]: file.source for file in find_files(config)} == sources
    single = [str(tmp_path / "000.tar")]
    assert [unit.source for unit in units_of(single, 1)] == [tmp_path.name]
    assert [file.source for file in find_files(PrepareConfig(input=single, output=""))] == [tmp_path.name]
