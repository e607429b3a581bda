"""From text to a corpus: sources, cleaning, splits, resuming, refusing; with real files and real processes."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import time
import unicodedata
from collections import Counter
from email.message import Message
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from data_tools import text as clean
from data_tools.building.gather import choose_sample, heldout_bound, sample_bound
from data_tools.building.pack import choose_chunk_tokens
from data_tools.config import PrepareConfig, TokenizerConfig
from data_tools.gzipped import Gzipped
from data_tools.prepare import prepare
from data_tools.progress import ByteProgress
from data_tools.reading.python_text import distribution_license, python_files
from data_tools.reading.sources import find_files
from data_tools.report.fertility import fit_lines, measure
from data_tools.verify import verify
from pretrain.config import load_config
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from support import ROOT
from support.preparing import (
    ENGLISH,
    all_documents,
    config,
    content,
    documents_of,
    numbered,
    run,
    write_jsonl,
)

STDLIB = Path(sysconfig.get_path("stdlib"))
CHINESE = "上善若水。水善利萬物而不爭，處眾人之所惡，故幾於道。居善地，心善淵。此為第{}篇。"


@pytest.fixture(scope="module")
def stdlib_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About a megabyte of real text: modules of the standard library, one document each."""
    records: list[dict[str, object]] = []
    size = 0
    for path in sorted(STDLIB.glob("*.py")):
        if size > 1_000_000:
            break
        text = path.read_text(encoding="utf-8")
        size += len(text)
        records.append({"id": path.name, "text": text, "license": "PSF-2.0"})
    # What was read before an interruption must still count as seen after it.
    records.append({**records[0], "id": "duplicate"})
    return write_jsonl(tmp_path_factory.mktemp("input") / "stdlib.jsonl", records)


@pytest.fixture(scope="module")
def prepared(stdlib_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of it, uninterrupted, by one process."""
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    assert prepare(config(output, stdlib_jsonl, part_bytes=50_000)) == 0
    return output


# --- cleaning: pure functions ---


@given(st.text())
def test_cleaning_leaves_nfc_without_control_characters(text: str) -> None:
    cleaned = clean.clean(text)
    assert clean.clean(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in cleaned)


@given(st.text(alphabet=st.characters(exclude_categories=["C"])))
def test_cleaning_changes_nothing_else(text: str) -> None:
    assert clean.clean(text) == unicodedata.normalize("NFC", text)


def test_cleaning_by_example() -> None:
    assert clean.clean("\ufeffe\u0301\x00\r\nb\rc\td\x85\ud800") == "\u00e9\nb\nc\td"


def test_length_is_without_outer_white_space() -> None:
    problems = clean.length_problems(["  abc \n", "abcd", "x" * 9, "x" * 10], 4, 9)
    assert problems == ["too_short", None, None, "too_long"]


def test_chinese_is_told_from_english() -> None:
    assert clean.count_cjk("上善若水。 water") == (10, 5)
    assert clean.count_cjk("") == (0, 0)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, unique=True), st.floats(0, 0.5))
def test_both_sides_of_the_split_get_a_document(splits: list[int], heldout_frac: float) -> None:
    heldout = sum(split < heldout_bound(np.array(splits, np.uint64), heldout_frac) for split in splits)
    if heldout_frac * 2**64 < 1 or len(splits) == 1:
        assert heldout == 0
    else:
        assert 1 <= heldout <= len(splits) - 1


@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 2), st.just(0), st.integers(1, 50)),
        min_size=1,
        unique_by=lambda d: d[0],
    ),
    st.integers(1, 2000),
)
def test_the_sample_is_as_large_as_asked(rows: list[tuple[int, int, int]], wanted: int) -> None:
    below, taken = sample_bound(np.array(rows, np.uint64), wanted)
    sizes = [size for order, _, size in rows if order < below]
    assert sum(sizes) == taken
    assert taken == sum(size for _, _, size in rows) if taken < wanted else taken - max(sizes) < wanted


@given(st.integers(1, 10**13))
def test_chunks_are_many_enough(n_tokens: int) -> None:
    size = choose_chunk_tokens(n_tokens)
    assert size in [2**power for power in range(12, 19)]
    assert size == 2**12 or n_tokens >= 512 * size
    assert size == 2**18 or n_tokens < 512 * 2 * size


def test_the_progress_line_tells_rate_and_rest() -> None:
    stage = ByteProgress("tokenizing", 100_000_000, None)
    stage.skip(20_000_000)
    stage.advance(20_000_000)
    assert stage.line(10.0) == "tokenizing: 40.0 of 100.0 MB (40%), 2.0 MB/s, 30 s left"


# --- sources ---


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    write_jsonl(
        folder / "a.jsonl", [{"id": 7, "text": ENGLISH.format(1), "source": "novel", "license": "CC0-1.0"}]
    )
    (folder / "deep").mkdir()
    (folder / "deep/one.txt").write_text("\ufeff" + ENGLISH.format(2) + "\r\n", encoding="utf-8")
    (folder / "two.md").write_text(CHINESE.format(3), encoding="utf-8")
    (folder / ".hidden.txt").write_text(ENGLISH.format(4))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    lines = "".join(json.dumps({"text": ENGLISH.format(n)}) + "\n\n" for n in (5, 6))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"text": [CHINESE.format(7), CHINESE.format(8)], "id": ["p7", "p8"], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "table.parquet")
    inputs = (folder, tmp_path / "packed.jsonl.gz", tmp_path / "table.parquet")
    assert prepare(config(tmp_path / "out", *inputs, license="MIT")) == 0
    assert all_documents(tmp_path / "out") == {
        "7": ("novel", "CC0-1.0", ENGLISH.format(1)),
        "mixed/deep/one.txt": ("mixed", "MIT", ENGLISH.format(2) + "\n"),
        "mixed/two.md": ("mixed", "MIT", CHINESE.format(3)),
        "packed.jsonl.gz:1": ("packed", "MIT", ENGLISH.format(5)),
        "packed.jsonl.gz:3": ("packed", "MIT", ENGLISH.format(6)),
        "p7": ("table", "MIT", CHINESE.format(7)),
        "p8": ("table", "MIT", CHINESE.format(8)),
    }


def test_a_record_that_is_too_large_is_a_bad_record_with_its_place(tmp_path: Path) -> None:
    records = [*numbered(3), {"text": "x" * 500}, *numbered(9)[3:]]
    lines = write_jsonl(tmp_path / "a.jsonl", records)
    parquet.write_table(
        pyarrow.table({"text": [record["text"] for record in records]}), tmp_path / "b.parquet"
    )
    for source, what in ((lines, "line"), (tmp_path / "b.parquet", "row")):
        with pytest.raises(ConfigError, match=rf"{source}:4 is a {what} of more than 400 bytes"):
            prepare(config(tmp_path / "out", source, max_record_bytes=400))
        assert not (tmp_path / "out").exists()
        output = tmp_path / f"{what}s"
        assert prepare(config(output, source, max_record_bytes=400, max_bad_records=1)) == 0
        report = json.loads((output / "prepare.json").read_text())
        assert report["funnel"]["kept"] == 9
        assert report["funnel"]["dropped"] == {"bad_record": 1}
        assert report["recipe"]["options"]["max_record_bytes"] == 400


def test_the_bound_on_records_leaves_recipes_of_before_as_they_are(prepared: Path) -> None:
    assert "max_record_bytes" not in json.loads((prepared / "prepare.json").read_text())["recipe"]["options"]


@pytest.mark.parametrize("column", ["text", "id"])
def test_a_column_that_is_no_text_is_named_or_passed_over(tmp_path: Path, column: str) -> None:
    columns = {"text": [ENGLISH.format(n) for n in range(9)], "id": [f"d{n}" for n in range(9)]}
    parquet.write_table(pyarrow.table(columns | {column: [[n] for n in range(9)]}), tmp_path / "a.parquet")
    if column == "id":  # as a record without an id
        assert prepare(config(tmp_path / "out", tmp_path / "a.parquet")) == 0
        assert "a.parquet:1" in all_documents(tmp_path / "out")
    else:
        with pytest.raises(
            ConfigError, match=r"a\.parquet holds list<.* in the column 'text', no text; set text_field"
        ):
            prepare(config(tmp_path / "out", tmp_path / "a.parquet"))


def test_inputs_of_one_name_keep_their_documents_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name / "text").mkdir(parents=True)
        (tmp_path / name / "text/a.txt").write_text(ENGLISH.format(name))
    files = find_files(config(tmp_path / "out", tmp_path / "x/text", tmp_path / "y/text"))
    assert [file.name for file in files] == ["text/a.txt", "text~2/a.txt"]


def test_the_text_of_this_python_is_found_with_its_licenses() -> None:
    everything = python_files(None, 1_000_000)
    some = python_files(2_000_000, 1_000_000)
    licenses = {file.source: file.license for file in everything}
    assert licenses["python-stdlib"] == "PSF-2.0"
    assert licenses["numpy"].startswith("BSD-3-Clause")
    assert [file.name for file in everything] == sorted({file.name for file in everything})
    assert set(some) < set(everything)
    assert 1_500_000 < sum(file.size_bytes for file in some) <= 2_000_000
    # Taken evenly: not only the packages whose names come first.
    assert len({file.source for file in some}) > 5
    assert all(file.path.suffix in {".py", ".pyi", ".rst", ".md", ".txt"} for file in everything)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"License-Expression": "MIT OR Apache-2.0", "License": "x"}, "MIT OR Apache-2.0"),
        ({"License": "BSD"}, "BSD"),
        ({"License": "UNKNOWN", "Classifier": "License :: OSI Approved :: MIT License"}, "MIT License"),
        ({"License": "Permission is hereby granted\nto", "Classifier": "License :: OSI Approved :: X"}, "X"),
        ({"License": "long " * 50, "Classifier": "Topic :: Text"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_license_is_read_from_metadata(headers: dict[str, str], expected: str) -> None:
    message = Message()
    for name, value in headers.items():
        message[name] = value.replace("\n", "\n ")
    assert distribution_license(importlib.metadata._adapters.Message(message)) == expected


def test_the_default_source_becomes_a_corpus(tmp_path: Path) -> None:
    assert prepare(config(tmp_path / "out", "python", python_max_bytes=300_000)) == 0
    manifest = load_manifest(tmp_path / "out/manifest.json")
    assert manifest.n_tokens > 50_000
    assert all(source.license for source in manifest.sources)
    card = (tmp_path / "out/README.md").read_text()
    for source in manifest.sources:
        assert source.documents == 0 or source.license in card


# --- what a corpus holds ---


def test_the_funnel_accounts_for_every_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*numbered(20), {"text": ENGLISH.format(3) + "\x00"}, {"text": "e"}, {"text": "x" * 300}]
    source = write_jsonl(tmp_path / "in/a.jsonl", records)
    (tmp_path / "in/latin.txt").write_bytes("Größe und Länge".encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"latin\.txt is not UTF-8 at byte 2; max_bad_records=N lets N pass"
    ):
        prepare(config(tmp_path / "out", source.parent, max_chars=200))
    assert prepare(config(tmp_path / "out", source.parent, max_chars=200, max_bad_records=1)) == 0
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    assert report["funnel"]["read"] == 23
    assert report["funnel"]["dropped"] == {"duplicate": 1, "too_short": 1, "too_long": 1}
    assert report["funnel"]["unread"] == {
        "files": 1, "documents": 1, "named": {"in/latin.txt": "is not UTF-8 at byte 2"}
    }  # fmt: skip
    assert report["funnel"]["kept"] == 20
    assert report["funnel"]["kept_bytes"] == sum(len(str(record["text"])) for record in records[:20])
    printed = capsys.readouterr().out
    for line in (
        "23 documents read",
        "-1 duplicate",
        "-1 too long",
        "20 kept (0.0 MB), 1 of them held out",
        "1 files not read, or only in part, with about 1 documents:",
        "in/latin.txt is not UTF-8 at byte 2",
    ):
        assert line in printed
        assert line in (tmp_path / "out/README.md").read_text()
    assert len(all_documents(tmp_path / "out")) == 20


def test_held_out_text_is_fixed_by_the_text_alone(tmp_path: Path) -> None:
    """Reading order, other documents and other sources change nothing."""
    some, more = numbered(300), numbered(500)
    first = write_jsonl(tmp_path / "a.jsonl", some)
    second = write_jsonl(tmp_path / "b.jsonl", more[::-1])
    heldout = []
    for output, source in ((tmp_path / "1", first), (tmp_path / "2", second)):
        assert prepare(config(output, source, heldout_frac=0.1)) == 0
        with gzip.open(output / "heldout/documents.jsonl.gz", "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        assert all(record.keys() == {"id", "source", "text"} for record in records)
        found = documents_of(output / "heldout/manifest.json", output / "tokenizer.model")
        assert found == {r["id"]: (r["source"], "unknown", r["text"]) for r in records}
        assert not set(found) & set(documents_of(output / "manifest.json", output / "tokenizer.model"))
        heldout.append({record["text"] for record in records})
    texts = {str(record["text"]) for record in some}
    assert heldout[0] == heldout[1] & texts
    assert 10 < len(heldout[0]) < 60


def test_sources_are_mixed(tmp_path: Path) -> None:
    """Input is read source by source, and yet each chunk holds both."""
    sources = [
        write_jsonl(tmp_path / f"{n}.jsonl", numbered(200, t)) for n, t in (("en", ENGLISH), ("zh", CHINESE))
    ]
    assert prepare(config(tmp_path / "out", *sources, chunk_tokens=2000)) == 0
    corpus = Corpus(tmp_path / "out/manifest.json")
    assert corpus.n_chunks > 4
    for chunk in range(corpus.n_chunks - 1):
        assert set(corpus.documents(chunk).source.tolist()) == {0, 1}


def test_counts_agree(prepared: Path, stdlib_jsonl: Path) -> None:
    manifest, heldout = (load_manifest(prepared / p / "manifest.json") for p in (".", "heldout"))
    texts = {json.loads(line)["text"] for line in stdlib_jsonl.read_text(encoding="utf-8").splitlines()}
    assert manifest.n_documents + heldout.n_documents == len(texts)
    total = sum(source.text_bytes for source in manifest.sources + heldout.sources)
    assert total == sum(len(clean.clean(text).encode()) for text in texts)
    assert (
        manifest.tokenizer_sha256
        == heldout.tokenizer_sha256
        == Tokenizer.trusted(prepared / "tokenizer.model").sha256
    )
    assert {file.name for file in manifest.files} == {
        "tokenizer.model",
        "heldout/manifest.json",
        "shards/ids.npy",
    }
    assert verify(prepared) == []
    assert sorted(path.name for path in prepared.iterdir()) == [
        "README.md",
        "croissant.json",
        "heldout",
        "manifest.json",
        "plots",
        "prepare.json",
        "shards",
        "statistics.json",
        "tokenizer.model",
    ]


# --- the same input gives the same bytes ---


def test_any_number_of_processes_gives_the_same_bytes(
    prepared: Path, stdlib_jsonl: Path, tmp_path: Path
) -> None:
    done = run(f"input=[{stdlib_jsonl}]", f"output={tmp_path}/out", "part_bytes=50000", "workers=2")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(prepared)


def test_the_size_of_parts_does_not_matter(prepared: Path, stdlib_jsonl: Path, tmp_path: Path) -> None:
    assert prepare(config(tmp_path / "out", stdlib_jsonl)) == 0
    assert content(tmp_path / "out", "prepare.json") == content(prepared, "prepare.json")


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stage", ["text-00003.npz", "tokens-00003.npz"])
def test_a_killed_preparation_goes_on_where_it_was(
    prepared: Path, stdlib_jsonl: Path, tmp_path: Path, stage: str
) -> None:
    output = tmp_path / "out"
    # Small parts, so that much is left to do when the fourth is done.
    arguments = (f"input=[{stdlib_jsonl}]", f"output={output}", "part_bytes=5000", "workers=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "data_tools.prepare", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not list(output.glob(f".work/*/{stage}")) and time.monotonic() < until:
        time.sleep(0.001)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in output.glob(".work/*/*.npz")}
    assert len(finished) >= 4
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_running, workers)), "processes outlive the one that started them"

    second = subprocess.Popen([sys.executable, "-m", "data_tools.prepare", *arguments], cwd=ROOT)
    kept: dict[Path, int] = {}
    while second.poll() is None:
        for path in finished:
            try:
                kept[path] = path.stat().st_mtime_ns
            except FileNotFoundError:
                break
        time.sleep(0.01)
    assert second.returncode == 0
    assert kept == finished, "finished parts are not done again"
    assert content(output, "prepare.json") == content(prepared, "prepare.json")


@pytest.mark.parametrize(("what", "code"), [("Ctrl-C", 130), ("a worker is killed", 1)])
def test_an_end_before_the_end_is_one_sentence(
    stdlib_jsonl: Path, tmp_path: Path, what: str, code: int
) -> None:
    output = tmp_path / "out"
    arguments = (f"input=[{stdlib_jsonl}]", f"output={output}", "part_bytes=5000", "workers=2")
    command = [sys.executable, "-m", "data_tools.prepare", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(output.glob(".work/*/tokens-00003.npz")):
        assert process.poll() is None
        time.sleep(0.001)
    if what == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(process.pid)}
        os.kill(next(child for child, line in commands.items() if b"spawn_main" in line), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "run the same command again" in errors.splitlines()[-1]
    assert list(output.glob(".work/*/tokens-00003.npz"))


def test_a_finished_preparation_is_not_repeated(
    prepared: Path, stdlib_jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert prepare(config(prepared, stdlib_jsonl, part_bytes=50_000, workers=2)) == 0
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


# --- refusing ---


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """Input and output of a small finished preparation."""
    source = write_jsonl(tmp_path / "in/a.jsonl", numbered(30))
    assert prepare(config(tmp_path / "out", source)) == 0
    return source, tmp_path / "out"


def test_other_options_are_refused_until_told_to_overwrite(small: tuple[Path, Path]) -> None:
    source, output = small
    before = content(output)
    with pytest.raises(ConfigError, match=r"min_chars .*8 .*9; .*overwrite=true"):
        prepare(config(output, source, min_chars=9))
    assert content(output) == before
    assert prepare(config(output, source, heldout_frac=0, overwrite=True)) == 0
    assert not (output / "heldout").exists()
    assert len(all_documents(output)) == 30
    assert verify(output) == []


def test_other_input_is_refused(small: tuple[Path, Path]) -> None:
    source, output = small
    before = source.stat().st_size
    write_jsonl(source, numbered(31))
    with pytest.raises(
        ConfigError, match=rf"1 files, {before} bytes.* 1 files, {source.stat().st_size} bytes"
    ):
        prepare(config(output, source))


def test_the_input_may_be_named_in_another_way(
    small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = small
    assert prepare(config(output, source.parent / ".." / "in" / "a.jsonl", overwrite=False)) == 0
    assert "already prepared" in capsys.readouterr().out


def test_a_damaged_result_is_not_taken_for_a_finished_one(small: tuple[Path, Path]) -> None:
    source, output = small
    os.truncate(output / "shards/shard-00000.tar", 1000)
    with pytest.raises(ConfigError, match=r"shard-00000\.tar .*overwrite=true"):
        prepare(config(output, source))
    assert prepare(config(output, source, overwrite=True)) == 0
    assert verify(output) == []


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in/a.jsonl", numbered(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no corpus"):
            prepare(config(tmp_path / "out", source, overwrite=overwrite))
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_input_and_output_stay_apart(small: tuple[Path, Path]) -> None:
    source, output = small
    for place in (source.parent, source.parent / "deeper"):
        with pytest.raises(ConfigError, match=r"output=.* and input="):
            prepare(config(place, source.parent))
    with pytest.raises(ConfigError, match=r"output=.* and input="):
        prepare(config(output, output / "heldout/documents.jsonl.gz", overwrite=True))


def test_two_preparations_of_one_output_are_refused(tmp_path: Path, stdlib_jsonl: Path) -> None:
    output = tmp_path / "out"
    arguments = [f"input=[{stdlib_jsonl}]", f"output={output}", "tokenizer.model_type=unigram"]
    first = subprocess.Popen([sys.executable, "-m", "data_tools.prepare", *arguments], cwd=ROOT)
    try:
        while not list(output.glob(".work/*/gathered.json")):
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="another process is preparing"):
            prepare(load_config(PrepareConfig, arguments))
    finally:
        first.kill()
        first.wait()


# --- bad input: one sentence, exit code 2, nothing left behind ---


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, what the error must say)."""
    good = json.dumps({"text": ENGLISH.format(1)}) + "\n"
    files = {
        "broken.jsonl": (good * 2 + '{"text": \n').encode(),
        "latin.jsonl": b'{"text": "\xe9\xe9"}\n',
        "list.jsonl": b"[1]\n",
        "field.jsonl": b'{"content": "some text", "n": 1}\n',
        "number.jsonl": b'{"text": 5}\n',
        "short.jsonl": b'{"text": "x"}\n',
        "empty.txt": b"",
        "cut.jsonl.gz": gzip.compress(good.encode() * 9)[:-9],
        "no.jsonl.gz": b"no gzip",
        "no.parquet": b"no parquet",
        "kind.docx": b"x",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    parquet.write_table(pyarrow.table({"body": ["x"]}), folder / "column.parquet")
    (folder / "nothing").mkdir()
    expected = {
        "broken.jsonl": "broken.jsonl:3 is no JSON: ",
        "latin.jsonl": "latin.jsonl:1 is not UTF-8 at byte 10",
        "list.jsonl": "list.jsonl:1 is a JSON list",
        "field.jsonl": "field.jsonl:1 has no field 'text' (its fields: content, n); set text_field",
        "number.jsonl": "number.jsonl:1 has int in the field 'text', not text",
        "short.jsonl": "leaves no document: 1 read, dropped: 1 too_short",
        "empty.txt": "leaves no document: 1 read, dropped: 1 too_short",
        "cut.jsonl.gz": "cut.jsonl.gz:10 cannot be read from here on: Compressed file ended",
        "no.jsonl.gz": "no.jsonl.gz:1 cannot be read from here on: Not a gzipped file",
        "no.parquet": "no.parquet cannot be read: Parquet magic",
        "kind.docx": "is of an unknown kind; known are .jsonl",
        "column.parquet": "has no column 'text' (it has body)",
        "nothing": "has no file that can be read",
        "missing": "does not exist",
    }
    return {name: ([f"input=[{folder / name}]"], words) for name, words in expected.items()}


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, (arguments, words) in bad_inputs(tmp_path / "in").items():
        with pytest.raises(ConfigError) as caught:
            prepare(load_config(PrepareConfig, [*arguments, f"output={tmp_path}/out", "workers=1"]))
        assert words in str(caught.value), name
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists(), name


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("input=[]", "input=[] names nothing"),
        ("heldout_frac=0.9", "heldout_frac=0.9 is outside 0 to 0.5"),
        ("min_chars=0", "min_chars=0 and max_chars="),
        ("workers=0", "workers=0 must be greater than 0"),
        ("tokenizer.vocab_size=10", "tokenizer.vocab_size=10 is outside 300"),
        ("tokenizer.model_type=wordpiece", "tokenizer.model_type"),
        ("tokenizer.character_coverage=2", "character_coverage=2.0 is outside"),
        ("shard_byte=3", "did you mean shard_bytes"),
        ("max_bad_records=-1", "max_bad_records=-1 is negative"),
    ],
)
def test_wrong_options_are_one_sentence(argument: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PrepareConfig, ["input=[x]", "output=y", argument])
    assert words in str(caught.value)


def test_bad_records_pass_where_that_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*numbered(9), {"text": None}, {"no": 1}])
    with pytest.raises(ConfigError, match=r"a\.jsonl:11 .*max_bad_records=1 "):
        prepare(config(tmp_path / "out", source, max_bad_records=1))
    assert prepare(config(tmp_path / "out", source, max_bad_records=2)) == 0
    assert capsys.readouterr().err.count("passed over: ") == 3
    assert json.loads((tmp_path / "out/prepare.json").read_text())["funnel"]["dropped"] == {"bad_record": 2}


def test_files_that_are_left_out_are_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = numbered(20)
    source = write_jsonl(tmp_path / "in/a.jsonl", records)
    size = source.stat().st_size
    (tmp_path / "in/b.jsonl.lz4").write_bytes(bytes(size // 2))  # as much as ten documents take
    (tmp_path / "in/LICENSE").write_text("mine")
    (tmp_path / "in/c.jsonl.gz").write_bytes(gzip.compress(source.read_bytes())[:-9])
    for limit, what in (
        (0, r"in/b\.jsonl\.lz4 is of an unknown kind; "),
        (9, r"c\.jsonl\.gz:21 cannot be read"),
    ):
        with pytest.raises(ConfigError, match=what):
            prepare(config(tmp_path / "out", source.parent, max_bad_records=limit))
    assert prepare(config(tmp_path / "out", source.parent, max_bad_records=100)) == 0
    unread = json.loads((tmp_path / "out/prepare.json").read_text())["funnel"]["unread"]
    assert unread["files"] == 3
    assert [*unread["named"]] == ["in/c.jsonl.gz:21", "in/LICENSE", "in/b.jsonl.lz4"]
    assert 25 <= unread["documents"] <= 40  # 20 and 10, judged by a mean of packed and plain bytes
    told = capsys.readouterr()
    for text in (told.out, (tmp_path / "out/README.md").read_text()):
        assert "3 files not read, or only in part, with about" in text
        assert "in/b.jsonl.lz4 is of an unknown kind (about 1" in text
    assert "not read: in/b.jsonl.lz4 is of an unknown kind" in told.err
    # A limit below what the files hold ends the preparation even if each file alone would pass.
    with pytest.raises(ConfigError, match=r"is of an unknown kind \(about \d+ documents are bad so far\)"):
        prepare(config(tmp_path / "two", source.parent, max_bad_records=25))


def test_a_vocabulary_too_large_for_the_text_says_the_largest(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", numbered(30))

    def attempt(vocab_size: int | None) -> int:
        tokenizer = TokenizerConfig(vocab_size=vocab_size)
        return prepare(config(tmp_path / "out", source, tokenizer=tokenizer))

    with pytest.raises(ConfigError, match=r"vocab_size=9000 .* is (\d+);") as caught:
        attempt(9000)
    largest = int(re.findall(r" is (\d+);", str(caught.value))[0])
    with pytest.raises(ConfigError, match=f"vocab_size={largest + 1} .* is {largest};"):
        attempt(largest + 1)
    assert attempt(largest) == 0
    assert load_manifest(tmp_path / "out/manifest.json").vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters_says_the_smallest(tmp_path: Path) -> None:
    records = [{"text": "".join(map(chr, range(0x4E00 + 40 * n, 0x4E00 + 40 * (n + 1))))} for n in range(9)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    tokenizer = TokenizerConfig(vocab_size=400, character_coverage=1.0)
    with pytest.raises(ConfigError, match=r"vocab_size=400 .* is \d+"):
        prepare(config(tmp_path / "out", source, tokenizer=tokenizer))
    tokenizer.vocab_size = None
    assert prepare(config(tmp_path / "out", source, tokenizer=tokenizer)) == 0


def test_a_given_tokenizer_is_used(small: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = small
    model = output / "tokenizer.model"
    more = write_jsonl(tmp_path / "b.jsonl", numbered(40))
    assert prepare(config(tmp_path / "other", more, tokenizer=TokenizerConfig(path=str(model)))) == 0
    assert (tmp_path / "other/tokenizer.model").read_bytes() == model.read_bytes()
    assert load_manifest(tmp_path / "other/manifest.json").tokenizer_sha256 == Tokenizer.trusted(model).sha256
    with pytest.raises(ConfigError, match=r"a\.jsonl is not a tokenizer\.json: "):
        prepare(config(tmp_path / "third", more, tokenizer=TokenizerConfig(path=str(source))))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("largest_file_bytes", [30_000, 400_000], ids=["in a part", "in a shard"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    stdlib_jsonl: Path, prepared: Path, tmp_path: Path, largest_file_bytes: int
) -> None:
    """A limit on the size of a file stands for the end of the disk: the same call fails in the same way."""
    arguments = (f"input=[{stdlib_jsonl}]", f"output={tmp_path}/out", "part_bytes=50000", "workers=2")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))

    failed = run(*arguments, preexec_fn=limit)
    assert failed.returncode == 1
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in failed.stderr
    assert f"output={tmp_path}/out " in errors[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", ".tar")]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(prepared)


INTERRUPTED = """
import os, signal, sys
from data_tools.building import vocabulary
from data_tools.config import PrepareConfig
from data_tools.prepare import prepare
trainer_lines = vocabulary._trainer_lines
def with_ctrl_c(*arguments):
    for number, line in enumerate(trainer_lines(*arguments)):
        if number == 50:
            os.kill(os.getpid(), signal.SIGINT)
        yield line
vocabulary._trainer_lines = with_ctrl_c
sys.exit(prepare(PrepareConfig(input=[sys.argv[1]], output=sys.argv[2], workers=1)))
"""


def test_ctrl_c_while_the_tokenizer_is_trained(stdlib_jsonl: Path, tmp_path: Path) -> None:
    """The trainer is C++ code that would make an error of its own of KeyboardInterrupt."""
    command = [sys.executable, "-c", INTERRUPTED, stdlib_jsonl, tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted; ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


# --- the commands ---


def test_the_command_exits_2_with_one_line(tmp_path: Path) -> None:
    done = run(f"input=[{tmp_path}/nothing]", f"output={tmp_path}/out")
    assert done.returncode == 2 and done.stderr.startswith(f"error: input={tmp_path}/nothing ")


def test_verify_and_show(small: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = small
    good = run(str(output), module="verify")
    assert good.returncode == 0
    assert load_manifest(output / "manifest.json").root_sha256 in good.stdout
    shown = run(str(output), "--chunk", "0", module="show")
    assert shown.returncode == 0
    assert "| It is a truth universally acknowledged" in shown.stdout
    for word in ("source", "license", "unknown", "held out", "4,096"):
        assert word in shown.stdout
    wrong = run(str(output), "--chunk", "99", module="show")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --chunk 99 does not exist; the corpus has chunks 0 to 0\n",
    )

    heldout = output / "heldout/documents.jsonl.gz"
    heldout.write_bytes(heldout.read_bytes()[:-1])
    (output / "tokenizer.model").unlink()
    (output / "shards/shard-00000.tar").unlink()
    bad = run(str(output), module="verify")
    assert bad.returncode == 1
    problems = [line for line in bad.stdout.splitlines() if line.startswith("corrupt: ")]
    assert [sum(name in line for line in problems) for name in ("shard-00000", "tokenizer", "documents")] == [
        1,
        1,
        1,
    ]
    assert run(str(output), module="show").returncode != 0

    missing = run(str(tmp_path / "none"), module="verify")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "holds no manifest.json" in missing.stderr


def test_a_manifest_of_another_corpus_is_seen(small: tuple[Path, Path], prepared: Path) -> None:
    """Each file by itself is good, but they do not belong together."""
    _, output = small
    (output / "heldout/manifest.json").write_bytes((prepared / "heldout/manifest.json").read_bytes())
    problems = verify_corpus(output / "manifest.json")
    assert len(problems) == 1
    assert "heldout/manifest.json has" in problems[0]


# --- the card ---


def test_a_license_that_is_not_known_is_refused_where_licenses_are_required(tmp_path: Path) -> None:
    records = [
        *numbered(20),
        {"id": "free", "text": ENGLISH.format("free"), "source": "b", "license": "CC0-1.0"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"require_licenses": True, "tokenizer": TokenizerConfig(vocab_size=400)}
    with pytest.raises(ConfigError, match=r"^the license of a is not known; state it"):
        prepare(config(tmp_path / "out", source, **options))
    assert prepare(config(tmp_path / "out", source, license="MIT", **options)) == 0
    sources = load_manifest(tmp_path / "out/manifest.json").sources
    assert {s.name: s.license for s in sources} == {"a": "MIT", "b": "CC0-1.0"}


# --- the tokenizer's fit ---


def test_the_fit_of_the_tokenizer_is_told_by_script(tmp_path: Path) -> None:
    records = numbered(400) + [
        {"id": f"zh-{n}", "text": CHINESE.format(n) + "𠮷" * (n % 2)} for n in range(400)
    ]
    source = write_jsonl(tmp_path / "both.jsonl", records)
    tokenizer = TokenizerConfig(vocab_size=500, character_coverage=0.99)
    options = config(tmp_path / "out", source, heldout_frac=0.1, tokenizer=tokenizer)
    assert prepare(options) == 0
    fits = json.loads((tmp_path / "out/prepare.json").read_text())["tokenizer"]["heldout_fit"]
    heldout = load_manifest(tmp_path / "out/heldout/manifest.json")
    assert sum(fit["documents"] for fit in fits.values()) == heldout.n_documents
    assert sum(fit["tokens"] for fit in fits.values()) == heldout.n_tokens - 2 * heldout.n_documents
    assert 1.0 < fits["other"]["tokens_per_word"] < 2.5  # words of 5 letters and a blank, mostly in one piece
    corpus, model = (
        Corpus(tmp_path / "out/heldout/manifest.json"),
        Tokenizer.trusted(tmp_path / "out/tokenizer.model"),
    )
    tokens = np.concatenate([corpus.read(chunk, 0, corpus.chunk_tokens) for chunk in range(corpus.n_chunks)])
    n_bytes = sum(model.piece(token).startswith("<0x") for token in tokens.tolist())
    assert (
        sum(fit["byte_tokens"] for fit in fits.values()) == n_bytes > 0
    )  # 1% of the characters have no entry
    assert fits["cjk"]["bytes_per_token"] < fits["cjk"]["characters_per_token"] * 4
    card = (tmp_path / "out/README.md").read_text()
    assert f"{fits['cjk']['characters_per_token']:.2f} characters per token" in card
    assert f"{fits['other']['tokens_per_word']:.2f} tokens per word" in card


def test_the_fit_is_told_by_language_where_the_input_says_it(tmp_path: Path) -> None:
    records = [{**record, "language": "en"} for record in numbered(60)]
    records += [{"id": f"zh-{n}", "text": CHINESE.format(n), "language": "zh"} for n in range(60)]
    records += [{"id": f"none-{n}", "text": f"x = {n}; y = x + 1"} for n in range(60)]
    source = write_jsonl(tmp_path / "all.jsonl", records)
    assert (
        prepare(config(tmp_path / "out", source, heldout_frac=0.3, tokenizer=TokenizerConfig(vocab_size=500)))
        == 0
    )
    with gzip.open(tmp_path / "out/heldout/documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        heldout = [json.loads(line) for line in lines]
    report = json.loads((tmp_path / "out/prepare.json").read_text())["tokenizer"]
    fits = report["heldout_fit_by_language"]
    counts = Counter(record.get("language", "") for record in heldout)
    assert {name: fit["documents"] for name, fit in fits.items()} == {"en": counts["en"], "zh": counts["zh"]}
    assert fits["zh"] == report["heldout_fit"]["cjk"]
    assert fits["en"]["unk_frac"] == 0
    assert fits["en"]["returned"] == counts["en"]
    card = (tmp_path / "out/README.md").read_text()
    assert f"- language `en`: {fits['en']['bytes_per_token']:.2f} bytes per token" in card
    assert f"{fits['en']['tokens_per_word']:.2f} tokens per word" in card
    assert f"{fits['zh']['characters_per_token']:.2f} characters per token" in card
    (tmp_path / "ids").write_text(heldout[0]["id"] + "\n")
    done = run(str(tmp_path / "out"), "--ids", str(tmp_path / "ids"), module="remove")
    assert done.returncode == 0, done.stderr
    with gzip.open(tmp_path / "out/heldout/documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == heldout[1:]
    assert "- language `en`: " in (tmp_path / "out/README.md").read_text()


def test_unknown_characters_and_lost_text_are_counted(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH] * 9),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "small.model").write_bytes(model.getvalue())
    fits, _ = measure(
        Tokenizer.trusted(tmp_path / "small.model"), [("truth  universally", ""), ("truth ЖЖ truth", "")]
    )
    assert (fits["other"]["unk_tokens"], fits["other"]["returned"]) == (
        1,
        0,
    )  # one run of two; a space is lost
    assert "2 documents do not come back" in fit_lines(fits, {})[0]


# --- the tokenizer's sample ---


def weighted(*weights: float) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.sampled_from(weights)] * 3)


@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 2), st.just(0), st.integers(1, 50), st.integers(0, 2)),
        min_size=1,
        unique_by=lambda d: d[0],
    ),
    weighted(0.0, 0.5, 1.0, 2.0, 7.0),
    st.integers(1, 4000),
)
def test_each_source_gives_its_weight_of_the_sample(
    rows: list[tuple[int, int, int, int]], weights: tuple[float, ...], wanted: int
) -> None:
    sample = choose_sample(np.array(rows, np.uint64), weights, wanted)
    sizes = [sum(size for _, _, size, source in rows if source == number) for number in range(3)]
    total = sum(size * weight for size, weight in zip(sizes, weights, strict=True))
    for number, (times, below, n_bytes) in enumerate(sample):
        mine = [(order, size) for order, _, size, source in rows if source == number]
        assert n_bytes == sum(size * (times + (order < below)) for order, size in mine)
        if total and len(set(weights)) > 1:  # within one document, since documents are taken whole
            share = min(1.0, wanted / total) * weights[number] * sizes[number]
            assert -1 <= n_bytes - share < max((size for _, size in mine), default=1)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert choose_sample(np.array(shuffled, np.uint64), weights, wanted) == sample


def letters(letter: str, count: int) -> list[dict[str, object]]:
    """Documents of words of one letter, so that the vocabulary shows what was in the sample."""
    return [
        {
            "id": f"{letter}{n}",
            "source": letter,
            "text": " ".join([letter * (1 + n % 7), *[letter] * 9, str(n)]),
        }
        for n in range(count)
    ]


def test_the_tokenizer_is_trained_on_sources_by_their_weight(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*letters("a", 150), *letters("b", 150), *letters("c", 150)])
    options = [f"input=[{source}]", "workers=1", "heldout_frac=0"]
    weights = "tokenizer.source_weights={a: 2, b: 0.5, c: 0}"
    outputs = [tmp_path / name for name in ("plain", "weighted", "parts")]
    for output, more in zip(outputs, ([], [weights], [weights, "part_bytes=1000"]), strict=True):
        assert prepare(load_config(PrepareConfig, [*options, f"output={output}", *more])) == 0
    reports = [json.loads((output / "prepare.json").read_text())["tokenizer"] for output in outputs]
    full = reports[0]["sample_bytes_by_source"]
    found = reports[1]["sample_bytes_by_source"]
    assert found["a"] == 2 * full["a"]
    assert found["b"] == pytest.approx(full["b"] / 2, abs=30)
    assert found["c"] == 0
    models = [Tokenizer.trusted(output / "tokenizer.model") for output in outputs]
    assert models[1].sha256 == models[2].sha256 != models[0].sha256
    pieces = ["".join(model.piece(i) for i in range(model.vocab_size)) for model in models]
    assert "cc" in pieces[0]
    assert "cc" not in pieces[1]
    with pytest.raises(ConfigError, match=r"tokenizer\.source_weights was \{'a': 2.*\} and is None"):
        prepare(load_config(PrepareConfig, [*options, f"output={outputs[1]}"]))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("{d: 1}", "names 'd', which is no source of the input; its sources are a, b"),
        ("{a: 0, b: 0}", "leaves no text to train a tokenizer on"),
        ("{a: -1}", "'a' has weight -1; allowed: 0 to 1000"),
        ("{a: much}", "'a' has weight much; allowed: 0 to 1000"),
        ("2", "source_weights=2 is no map; give one like {wiki: 2, code: 0.5}"),
        ("{a: nan}", "'a' has weight nan; allowed: 0 to 1000"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(tmp_path: Path, weights: str, words: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*letters("a", 20), *letters("b", 20)])
    arguments = [f"input=[{source}]", f"output={tmp_path}/out", "workers=1"]
    with pytest.raises(ConfigError) as caught:
        prepare(load_config(PrepareConfig, [*arguments, f"tokenizer.source_weights={weights}"]))
    assert words in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("level", [4, 9])
def test_gzip_files_have_the_bytes_of_the_standard_library(level: int) -> None:
    """So corpora and curations stay the same, whatever the size of the pieces."""
    rng = random.Random(level)
    pieces = [bytes(rng.choices(b"abcdefgh ", k=rng.choice([0, 1, 99, 40_000]))) for _ in range(60)]
    ours, theirs = io.BytesIO(), io.BytesIO()
    packed = Gzipped(ours, level)
    with gzip.GzipFile(filename="", fileobj=theirs, mode="wb", mtime=0, compresslevel=level) as expected:
        for piece in pieces:
            packed.write(memoryview(piece))
            expected.write(piece)
    packed.finish()
    assert ours.getvalue() == theirs.getvalue()
    assert gzip.decompress(ours.getvalue()) == b"".join(pieces)
