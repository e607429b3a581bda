"""Every file of an input is read, or named with its reason and counted: kinds, encodings, links, damage."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_tools.config import PrepareConfig
from data_tools.curate import CurateConfig, _check_bad
from data_tools.curation.choice import CurationConfig
from data_tools.curation.executors import TaskProgress
from data_tools.curation.phases import CleanTask, Layout, Tally
from data_tools.reading.evaluation_sets import read_items
from data_tools.reading.listing import LeftOut
from data_tools.reading.sources import InputFile, Rejected, find_files
from data_tools.reading.units import Bad, ReadConfig, read_unit, units_of
from data_tools.record import Record
from data_tools.report.funnel import Unread
from pretrain.errors import ConfigError
from support.preparing import Document, read_one_by_one

N = 40
ROWS = [
    {"text": f'第{number}号: the committee met, and "agreed"\non it.', "id": f"d{number}"}
    for number in range(N)
]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def csv_of(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    quoted = ['"{}"'.format(row["text"].replace('"', '""')) for row in rows]
    return f"id{delimiter}text\r\n" + "".join(
        f"{row['id']}{delimiter}{text}\r\n" for row, text in zip(rows, quoted, strict=True)
    )


CONTENTS = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "pretty.json": "\n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n",
    "objects.json": "".join(json.dumps(row, indent=1) + "\n" for row in ROWS),
    "table.csv": csv_of(ROWS),
    "table.tsv": csv_of(ROWS, "\t"),
}


def curated(entry: Path, **options: object) -> tuple[list[Record], list[Bad], list[LeftOut]]:
    config, bad, left_out = ReadConfig(**options), list[Bad](), list[LeftOut]()
    units = units_of([str(entry)], 1 << 30, config, left_out.extend)
    return [record for unit in units for record in read_unit(unit, config, bad.append)], bad, left_out


def prepared(entry: Path, **options: object) -> tuple[list[Document], list[Rejected], list[LeftOut]]:
    config, left_out = PrepareConfig(input=[str(entry)], output="", **options), list[LeftOut]()
    items = [item for file in find_files(config, left_out.extend) for item in read_one_by_one(file, config)]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Rejected)], left_out


# --- kinds ---


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("suffix", PACKERS)
def test_both_read_every_kind(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACKERS[suffix](CONTENTS[name].encode()))
    for read in (curated, prepared):
        found, bad, left_out = read(path)
        assert [(one.id, one.text, one.source) for one in found] == [
            (row["id"], row["text"], name.partition(".")[0]) for row in ROWS
        ]
        assert (bad, left_out) == ([], [])


def test_a_folder_of_the_kinds_of_public_corpora(tmp_path: Path) -> None:
    """LOG 1: .jsonl, .jsonl.zst (The Pile), .json.gz (C4 and Dolma) and .json."""
    for name in ("a.jsonl", "b.jsonl.zst", "c.json.gz", "d.json"):
        lines = LINES.replace('"id": "d', f'"id": "{name}').encode()
        (tmp_path / name).write_bytes(PACKERS.get(Path(name).suffix, bytes)(lines))
    for read in (curated, prepared):
        found, bad, left_out = read(tmp_path)
        assert (len({one.id for one in found}), bad, left_out) == (4 * N, [], [])


@pytest.mark.parametrize(
    ("content", "n_texts", "problems"),
    [
        ('[{"text": "a"}, 5, "b", [1], {"text": "c"}]', 2, ["JSON int", "JSON str", "JSON list"]),
        ('{"text": "a"}', 1, []),
        ('{\n"text": "a"\n}', 1, []),
        ("[]", 0, ["holds no record"]),
        ('[{"text": "a"}', 1, ["ends within a JSON array"]),
        ('[{"text": "a"}, {"text": "b', 1, ["ends within a JSON value"]),
        ('[{"text": "a"}] {"text": "b"}', 1, ["something follows"]),
        ('{"text": "a\n{"text": "b"}\n{"text": "c"}\n', 2, ["is no JSON"]),  # a broken first line
        ("7 8", 0, ["is no JSON"]),
    ],
)
def test_json_of_any_form(tmp_path: Path, content: str, n_texts: int, problems: list[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    found, bad, _ = curated(tmp_path / "a.json")
    assert len(found) == n_texts
    assert len(bad) == len(problems)
    assert all(words in one.why for one, words in zip(bad, problems, strict=True))


def test_json_values_are_found_wherever_pieces_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["\\", '"', '\\"', "]}{[", "é" * 9, "", "\n"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text, "more": [[{}], "]"]} for text in texts]))
    for size in range(1, 12):
        monkeypatch.setattr("data_tools.reading.spanning._PIECE_BYTES", size)
        found, bad, _ = curated(tmp_path / "a.json")
        assert [one.text for one in found] == texts
        assert bad == []


@pytest.mark.parametrize(
    ("content", "n_texts", "problem"),
    [
        ("text\na\nb,c\nd\n", 2, "has 2 values, the header 1"),
        ('text\na\n"b\nc\n', 1, "ends within a quoted value"),
        ("text\na\n\xff\n", 1, "is not UTF-8"),
        ("id,body\n1,a\n", 0, "has no column 'text' (it has id, body)"),
        ("text\n" + '"' + "x" * 300, 0, "a row has more than 200 bytes"),
        ("", 0, "has no header"),
    ],
)
def test_a_bad_row_of_csv_is_named(tmp_path: Path, content: str, n_texts: int, problem: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    found, [bad], _ = curated(tmp_path / "a.csv", max_line_bytes=200)
    assert len(found) == n_texts
    assert problem in bad.why


def test_values_of_a_row_are_counted_outside_of_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many short values take far more memory than they have bytes."""
    monkeypatch.setattr("data_tools.reading.spanning._MANY_VALUES", 3)
    (tmp_path / "a.csv").write_text('text,id\n"a,b,c,""d"",e,\nf,g,h",1\n' + "," * 9)
    found, [bad], _ = curated(tmp_path / "a.csv")
    assert [one.text for one in found] == ['a,b,c,"d",e,\nf,g,h']
    assert "a row has more than 3 values" in bad.why


# --- files that are left out ---


def test_what_is_not_read_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DATA R3, and what stands beside data without being data."""
    (tmp_path / "a.jsonl").write_text(LINES)
    for name in ("page.html", "b.jsonl.lz4", "c.docx"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    for name in ("LICENSE", "_SUCCESS", "a.jsonl.sha256", "cover.png", ".gitattributes"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").touch()
    (tmp_path / "part-00001.jsonl").touch()  # as tasks write that had nothing to write: nothing to tell
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    label = tmp_path.name
    for read in (curated, prepared):
        found, bad, left_out = read(tmp_path)
        assert (len(found), bad) == (N, [])
        assert {
            (one.name.removeprefix(f"{label}/"), one.reason, one.holds_documents) for one in left_out
        } == {
            ("page.html", "is of an unknown kind", True),
            ("b.jsonl.lz4", "is of an unknown kind", True),
            ("c.docx", "is of an unknown kind", True),
            ("gone.jsonl", "is a link that leads nowhere", True),
            ("pipe.jsonl", "is not a regular file", True),
            ("empty.jsonl.gz", "is empty", True),
            ("empty.jsonl", "is empty", False),
            ("LICENSE", "is no text", False),
            ("_SUCCESS", "is no text", False),
            ("a.jsonl.sha256", "is no text", False),
            ("cover.png", "is no text", False),
            (".gitattributes", "is hidden", False),
            ("deep/loop", "is a link to a folder that is read already", False),
        }
    units_of([str(tmp_path)], 1)
    told = capsys.readouterr().err
    assert f"not read: {label}/page.html is of an unknown kind\n" in told
    assert f"not read, and not counted as bad: {label}/.gitattributes (is hidden), " in told


def test_a_linked_folder_is_read_once_by_both(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_text(LINES)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "two").symlink_to(tmp_path / "real")
    for read in (curated, prepared):
        found, bad, left_out = read(tmp_path / "in")
        assert (len(found), bad) == (N, [])
        assert [one.name for one in left_out] == ["in/two"]


def test_ignored_files_are_named_and_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "b.html", "sub/c.jsonl"):
        (tmp_path / name).write_text(LINES)
    for read in (curated, prepared):
        found, bad, left_out = read(tmp_path, ignore=["*.html", "sub/*"])
        assert (len(found), bad) == (N, [])
        assert [(one.reason, one.holds_documents) for one in left_out] == [
            ("is ignored as the configuration says", False)
        ] * 2


# --- encodings ---

CHINESE = "图书馆的新馆将于明年春天动工。委员会认为，旧馆面积太小。\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "gb18030"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.xz", "a.jsonl.gz"])
def test_text_is_decoded_by_its_mark_or_as_the_option_says(tmp_path: Path, encoding: str, name: str) -> None:
    line = json.dumps({"text": CHINESE}, ensure_ascii=False)
    content = {
        "a.jsonl": f"{line}\n" * 3,
        "a.json": f"[{line}, {line}]",
        "a.csv": csv_of([{"text": CHINESE, "id": "1"}]),
    }
    plain = name.removesuffix(".xz").removesuffix(".gz")
    data = content.get(plain, CHINESE).encode(encoding)
    (tmp_path / name).write_bytes(PACKERS[name.removeprefix(plain)](data))
    (tmp_path / f"b{plain}").write_bytes(content.get(plain, CHINESE).encode())  # the same in UTF-8 beside it
    given = encoding if encoding in ("utf-16-le", "utf-16-be", "gb18030") else "utf-8"
    for read in (curated, prepared):
        found, bad, _ = read(tmp_path, encoding=given)
        assert {one.text for one in found} == {CHINESE}
        assert len(found) == 2 * {"a.jsonl": 3, "a.json": 2}.get(plain, 1)
        assert bad == []


def test_files_in_gb_18030_and_utf_16(tmp_path: Path) -> None:
    """LOG 3: an undecodable file is named, with the option that reads it; a mark of UTF-16 decides."""
    for number, encoding in enumerate(["utf-8", "gb18030", "utf-16"] * 4):
        (tmp_path / f"{number:02d}.txt").write_bytes(f"第{number}号。{CHINESE}".encode(encoding))
    for read, key in ((curated, "read.encoding"), (prepared, "encoding")):
        found, bad, _ = read(tmp_path)
        assert len(found) == 8
        assert len(bad) == 4
        for one in bad:
            words = one.why if isinstance(one, Bad) else one.problem
            assert words == f"is not UTF-8 at byte 0; it looks like GB 18030, which {key}=gb18030 reads"
        found, bad, _ = read(tmp_path, encoding="gbk")
        assert (len(found), bad) == (12, [])
        assert all(one.text.endswith(CHINESE) for one in found)


def test_advice_is_only_given_where_it_is_right(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Größe und Länge der Wörter".encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": "abc"}) + "\n").encode("utf-16-le"))
    _, bad, _ = curated(tmp_path)
    assert bad[0].why == "is not UTF-8 at byte 2"
    assert "looks like UTF-16, which read.encoding=utf-16-le reads" in bad[1].why


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_texts_in_tars_are_decoded_too(tmp_path: Path, encoding: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, text in (("0.txt", CHINESE), ("1.json", json.dumps({"text": CHINESE}, ensure_ascii=False))):
            info = tarfile.TarInfo(name)
            info.size = len(text.encode(encoding))
            file.addfile(info, io.BytesIO(text.encode(encoding)))
    found, bad, _ = curated(tmp_path, encoding="gb18030")
    assert ([one.text for one in found], bad) == ([CHINESE] * 2, [])


def test_a_character_that_pieces_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a" + "图书馆" * 20
    (tmp_path / "a.json").write_bytes(json.dumps([{"text": text}], ensure_ascii=False).encode("gb18030"))
    (tmp_path / "b.json").write_bytes(json.dumps([{"text": text}], ensure_ascii=False).encode())
    for size in range(60, 68):
        monkeypatch.setattr("data_tools.reading.encodings._PIECE_BYTES", size)
        found, bad, _ = curated(tmp_path, encoding="gb18030")
        assert [one.text for one in found] == [text] * 2
        assert bad == []


def test_short_lines_in_gb_18030_are_not_taken_for_utf_8(tmp_path: Path) -> None:
    """The bytes of 图 are also those of a Greek letter in UTF-8, and so on."""
    texts = [
        ("图", "gb18030"),
        ("图图图", "gb18030"),
        ("图abc", "gb18030"),
        ("«»éè", "utf-8"),
        ("a’b", "utf-8"),
    ]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode(encoding) for text, encoding in texts]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, bad, _ = curated(tmp_path, encoding="gb18030")
    assert [one.text for one in found] == [text for text, _ in texts]
    assert bad == []


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"read\.encoding=latin-9 is unknown; known are utf-8"):
        ReadConfig(encoding="latin-9")
    with pytest.raises(ConfigError, match=r"^encoding=latin-9 is unknown"):
        prepared(tmp_path, encoding="latin-9")


# --- damage: what is lost counts ---


def checked(folder: Path, work: Path, **options: object) -> Unread:
    """What the first phase of a curation says of a folder that it reads as a whole."""
    left_out: list[LeftOut] = []
    units = units_of([str(folder)], 1 << 30, on_left_out=left_out.extend)
    layout, tally = Layout(work), Tally()
    work.mkdir()
    task = CleanTask(units, ReadConfig(), CurationConfig(stages=[]), layout)
    for rank in range(len(units)):
        task.run(rank, TaskProgress(work / "progress"))
        tally.add(Tally.of_file(layout.tally("clean", rank)))
    total_bytes = sum(unit.size_bytes for unit in units)
    return _check_bad(
        CurateConfig(input=["in"], output="out", **options), tally, left_out, total_bytes, layout
    )


def random_lines(count: int) -> bytes:
    draw = random.Random(count)
    rows = [{"text": "".join(draw.choices("abcdefghij klmnopqrstuvwxyz", k=200))} for _ in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def damage(kind: str, folder: Path) -> None:
    """Write a file of 400 records beside one of 400 that is whole, and take about half of its records away."""
    data = random_lines(400)
    (folder / "good.jsonl").write_bytes(random_lines(401))
    if kind == "parquet":
        table = pyarrow.table({"text": [json.loads(line)["text"] for line in data.splitlines()]})
        parquet.write_table(table, folder / "bad.parquet", compression="none", use_dictionary=False)
        content = (folder / "bad.parquet").read_bytes()
        (folder / "bad.parquet").write_bytes(content[: len(content) // 2])
    elif kind == "column":
        table = pyarrow.table({"body": ["x"] * 200})
        parquet.write_table(table, folder / "bad.parquet")
    elif kind in ("array", "csv"):
        rows = [json.loads(line) | {"id": "1"} for line in data.splitlines()]
        text = json.dumps(rows) if kind == "array" else csv_of(rows)
        (folder / ("bad.json" if kind == "array" else "bad.csv")).write_text(text[: len(text) // 2])
    elif kind == "html":
        (folder / "bad.html").write_bytes(data[: len(data) // 2])
    elif kind == "table of many":
        (folder / "bad.json").write_text(
            json.dumps({"data": [json.loads(line) for line in data.splitlines()[:200]]})
        )
    elif kind == "plain":
        (folder / "bad.jsonl").write_bytes(data[: len(data) // 2 - 9])
    else:
        packed = PACKERS[kind](data)
        (folder / f"bad.jsonl{kind}").write_bytes(packed[: len(packed) // 2])


@pytest.mark.parametrize(
    "kind", [".gz", ".zst", ".xz", "plain", "parquet", "column", "array", "csv", "html", "table of many"]
)
def test_what_a_damaged_file_loses_counts(tmp_path: Path, kind: str) -> None:
    """DATA R1: half of the records of a file are lost, which is a third of all."""
    folder = tmp_path / "in"
    folder.mkdir()
    damage(kind, folder)
    with pytest.raises(
        ConfigError, match=r"records cannot be read, more than max_bad_frac=0\.15 allows; the first: in/bad"
    ):
        checked(folder, tmp_path / "strict", max_bad_frac=0.15)
    unread = checked(folder, tmp_path / "lax", max_bad_frac=0.5)
    assert unread.files == 1
    assert 100 <= unread.documents <= 400  # 200 are lost; the estimate may be wrong by a factor of two
    [(name, reason)] = unread.named.items()
    assert name.startswith("in/bad.") and reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.csv"])
@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_what_comes_before_damage_in_a_small_file_is_read(tmp_path: Path, name: str, suffix: str) -> None:
    """Whatever is read of the beginning of a file, to know its form and encoding, must not come to the damage first."""
    half, rest = (json.loads(line) | {"id": "1"} for line in random_lines(2).splitlines())
    if name == "array.json":
        parts = [f"[{json.dumps(half)},", f"{json.dumps(rest)}]"]
    elif name == "a.csv":
        parts = [csv_of([half]), csv_of([rest]).partition("\n")[2]]
    else:
        parts = [json.dumps(half) + "\n", json.dumps(rest) + "\n"]
    packer = PACKERS[suffix]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(packer(parts[0].encode()) + packer(parts[1].encode())[:-80])
    for read in (curated, prepared):
        found, [_], _ = read(path)
        assert [one.text for one in found] == [half["text"]]


def test_a_file_that_cannot_be_opened_counts_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DATA R2. Tests may run as root, who may read any file, so opening fails in another way."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.jsonl").write_bytes(random_lines(400))
    (folder / "good.jsonl").write_bytes(random_lines(401))

    def denied(path: str | Path, inside: Path | None = None) -> None:
        if str(path).endswith("bad.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, inside)

    from pretrain.files import open_regular as original

    for module in ("reader", "sources"):
        monkeypatch.setattr(f"data_tools.reading.{module}.open_regular", denied)
    unread = checked(folder, tmp_path / "work", max_bad_frac=0.6)
    assert unread.named == {
        "in/bad.jsonl": f"cannot be read: Permission denied (about {unread.documents} documents)"
    }
    assert 390 < unread.documents < 410
    _, [rejected], _ = prepared(folder)
    assert (rejected.file, rejected.problem) == ("in/bad.jsonl", "cannot be read: Permission denied")
    assert rejected.lost_bytes == (folder / "bad.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[]"),
        ("a.csv", b"text\n"),
        ("a.tar", bytes(10240)),
        ("a.jsonl.gz", gzip.compress(b"\n\n", mtime=0)),
    ],
)
def test_a_file_without_a_record_is_named_and_loses_nothing(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    _, [bad], _ = curated(tmp_path)
    assert bad == Bad(f"{tmp_path.name}/{name}", "holds no record", is_record=False, lost=0)
    _, [rejected], _ = prepared(tmp_path)
    assert (rejected.file, rejected.problem, rejected.lost) == (
        f"{tmp_path.name}/{name}",
        "holds no record",
        0,
    )


def test_a_member_of_a_tar_that_belongs_to_no_sample_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("README", "0.txt", "page", "1.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            file.addfile(info, io.BytesIO(name.encode()))
    found, [bad], _ = curated(tmp_path / "a.tar")
    assert [one.text for one in found] == ["0.txt", "1.txt"]
    assert bad.why == "(member 'page') has no suffix, so it belongs to no sample"


# --- evaluation sets ---


@pytest.mark.parametrize("name", CONTENTS)
def test_evaluation_sets_are_of_the_same_kinds(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.bz2"
    path.write_bytes(bz2.compress(CONTENTS[name].encode()))
    assert list(read_items(str(path), ["question", "text"])) == [[text] for text in TEXTS]


def test_items_without_a_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + '{"choices": ["a"]}\n')
    assert len(list(read_items(str(path), ["text"]))) == N
    assert f"{path}: 1 of {N + 1} items have none of the fields text" in capsys.readouterr().err
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(
        ConfigError, match=r"b\.parquet cannot be read: it has none of the columns text \(it has body\)"
    ):
        list(read_items(str(tmp_path / "b.parquet"), ["text"]))


# --- one numbering used in another ---


@pytest.mark.parametrize(("first", "wanted"), [("struct", "text"), ("list", "text"), ("map", "body")])
def test_nested_columns_before_the_text_do_not_shift_it(tmp_path: Path, first: str, wanted: str) -> None:
    """LOG 6: a constant leaf before the text packs well, and is not the text."""
    n = 12_000
    constant = "the same words in each row of this column " * 40
    nested = {
        "struct": pyarrow.array([{"crawl": "x", "segment": constant}] * n),
        "list": pyarrow.array([[constant, "x"]] * n),
        "map": pyarrow.array([[("crawl", constant)]] * n, pyarrow.map_(pyarrow.string(), pyarrow.string())),
    }[first]
    columns = {
        "meta": nested,
        wanted: [f"Row {row}: {row * 31 % 9973} boats" for row in range(n)],
        "last": [1] * n,
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table(columns), path, use_dictionary=False, compression="zstd", row_group_size=n
    )
    found, bad, _ = curated(path, text_field=wanted)
    assert (len(found), bad) == (n, [])
    assert found[-1].text == f"Row {n - 1}: {(n - 1) * 31 % 9973} boats"


def test_nested_columns_of_arrow_do_not_shift_the_text(tmp_path: Path) -> None:
    meta = pyarrow.array([{"crawl": "x", "segment": "y"}] * 3)
    table = pyarrow.table(
        {"meta": meta, "tags": [["a", "b"]] * 3, "text": ["1", "2", "3"], "id": ["a", "b", "c"]}
    )
    (tmp_path / "dataset_info.json").write_text("{}")
    with pyarrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    for read in (curated, prepared):
        found, bad, _ = read(tmp_path)
        assert [(one.id, one.text) for one in found] == [("a", "1"), ("b", "2"), ("c", "3")]
        assert bad == []


def test_a_preparation_of_a_url_is_refused_with_the_command_that_reads_it() -> None:
    with pytest.raises(ConfigError, match=r"input=s3://a/b is a URL, which only data_tools.curate reads"):
        find_files(PrepareConfig(input=["s3://a/b"], output=""))


def test_a_file_of_python_that_is_no_text_is_dropped(tmp_path: Path) -> None:
    """Python's own tests hold files that are no UTF-8. Nobody has named them, so they are no error."""
    path = tmp_path / "badsyntax_pep3120.py"
    path.write_bytes(b'print("b\xf6se")\n')
    file = InputFile("python/bad.py", path, "python", "PSF-2.0", path.stat().st_size, 0, is_named=False)
    (item,) = read_one_by_one(file, PrepareConfig(input=["python"], output="x"))
    assert isinstance(item, Rejected) and (item.reason, item.is_error) == ("not_text", False)
    (item,) = read_one_by_one(replace(file, is_named=True), PrepareConfig(input=["x"], output="x"))
    assert isinstance(item, Rejected) and item.is_error
