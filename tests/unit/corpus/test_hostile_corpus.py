"""Corpora of others, whose hashes all fit: each file has a schema, and what is checked is what is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.building.lineage import curation_lineage
from data_tools.config import CardConfig, PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare
from data_tools.remove import remove
from data_tools.report import card, plots
from data_tools.report.fertility import heldout_records
from data_tools.report.funnel import Funnel, funnel_table
from data_tools.report.schemas import read_curation_report, read_prepare_report, read_statistics
from data_tools.report.statistics import drop_figures
from data_tools.show import show
from data_tools.verify import verify
from pretrain.config import Precision, TrainConfig, load_config
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.chunk_documents import parse_documents
from pretrain.corpus.ids import chunks_of
from pretrain.corpus.manifest import CorruptShardError, Manifest, load_manifest
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.writer import CorpusWriter
from pretrain.data.inputs import resolve_inputs
from pretrain.errors import ConfigError
from support import ROOT

BAD_VALUES: list[Any] = [None, -1, 1.5, 1e300, "", "3", [], {}, True, "x" * 2_000_000, "a\0b", [[]], 1 << 70]
Piece = tuple[int, int, str, int, int]
"""start, source, id, offset, text bytes"""


class Forger(CorpusWriter):
    """Writes pieces of documents as `change(chunk, pieces)` has them."""

    change: Callable[[int, list[Piece]], list[Any]]

    def _flush_chunk(self) -> None:
        keys = ("starts", "source", "ids", "offsets", "text_bytes")
        pieces = self.change(self._n_chunks, list(zip(*map(self._columns.__getitem__, keys), strict=True)))
        self._columns |= dict(zip(keys, map(list, zip(*pieces, strict=True)), strict=True))
        super()._flush_chunk()


def write(folder: Path, change: Callable[[int, list[Piece]], list[Any]], **options: Any) -> Path:
    """A corpus of 3 documents of 60 tokens in chunks of 64; its manifest."""
    given = {"tokenizer_sha256": "0" * 64, "vocab_size": 100, "bos_id": 1, "eos_id": 2, "chunk_tokens": 64}
    writer = Forger(folder, **(given | {"sources": ["code"]} | options))
    writer.change = change  # type: ignore[method-assign]
    for number in range(3):
        more = {"targets": [1, 60], "target_bytes": 5} if options.get("loss_mask") else {}
        tokens = np.arange(60) % 100
        writer.add_document(tokens, source="code", document_id=f"d{number}", text_bytes=99, **more)
    writer.finish()
    return folder / "manifest.json"


def forge(manifest: Path, **changes: Any) -> None:
    """Change a manifest, with hashes that fit what is there."""
    raw = json.loads(manifest.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for name in parents:
            place = place[int(name) if name.isdigit() else name]
        place[last] = value
    for shard in raw["shards"] if isinstance(raw["shards"], list) else []:
        for name, key in (("tar", "sha256"), ("idx", "index_sha256")):
            if isinstance(shard, dict) and (path := manifest.parent / f"shards/shard-00000.{name}").is_file():
                shard[key] = (
                    hashlib.sha256(path.read_bytes()).hexdigest() if key not in changes else shard[key]
                )
    seal(manifest, raw)


def seal(manifest: Path, raw: dict[str, Any]) -> None:
    """Write a manifest with the root hash of what it says."""
    content = {key: value for key, value in raw.items() if key != "root_sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    raw["root_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(raw))


def replaced(value: Any, bad: Any) -> Iterator[Any]:
    """Copies of a JSON value in which one part is another."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for other in replaced(inner, bad):
                yield {**value, key: other}
        yield {**value, "unknown": bad}
        for key in value:
            yield {name: inner for name, inner in value.items() if name != key}
    elif isinstance(value, list):
        for number, inner in enumerate(value[:2]):
            for other in replaced(inner, bad):
                yield [*value[:number], other, *value[number + 1 :]]
    yield bad


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What is read, or None where it is refused in one short sentence."""
    sentence = None
    try:
        return read(path)
    except ConfigError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert len(sentence) < 500
    return None


@contextmanager
def at_once(seconds: int = 20) -> Iterator[None]:
    """What waits for a pipe that nobody writes to is ended."""

    def stop(*_: Any) -> None:
        raise AssertionError("it waits")  # which no handler of OSError takes

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- the manifest ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("honest") / "corpus", lambda _, pieces: pieces)


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: repr(bad)[:12])
def test_a_manifest_with_one_wrong_value_is_refused_in_a_sentence(
    honest: Path, tmp_path: Path, bad: Any
) -> None:
    raw = json.loads(honest.read_text())
    path = tmp_path / "manifest.json"
    n_read = 0
    for value in replaced(raw, bad):
        if not isinstance(value, dict):
            path.write_text(json.dumps(value))
        else:
            seal(path, dict(value))
        n_read += outcome(load_manifest, path) is not None
    assert n_read <= 12  # a text for a name, and fields that have a default


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards__0__name": "shard-٠٠٠٠٠.tar"}, r"shards\.0\.name is "),
        ({"shards__0__name": "shard-00000.tar\n"}, r"shards\.0\.name is "),
        ({"files__0__name": "shards/ids.npy\0"}, r"files\.0\.name is "),
        ({"files__0__name": "shards/../../x"}, r"files\.0\.name is "),
        ({"files__0__name": "shard-00000.tar"}, "its files"),
        ({"bos_id": 100}, "ids of bos and eos"),
        ({"vocab_size": 1 << 23}, "vocab_size is 8388608"),
        ({"chunk_tokens": 1 << 40, "n_tokens": 1 << 40}, "chunk_tokens is "),
        ({"shards__0__chunks": 1 << 23}, r"shards\.0\.chunks is "),
        ({"tokenizer_sha256": "A" * 64}, "tokenizer_sha256 is "),
        ({"created_by": "a\x1b[31m"}, "created_by is "),
        ({"sources": []}, "sources is "),
        ({"shards": []}, "shards is "),
        ({"shards__0__x": 1}, r"shards\.0\.x is unknown"),
        ({"format_version": 2}, "has format version 2, this program reads 1"),
    ],
)
def test_a_manifest_that_claims_what_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    forge(manifest)
    assert verify_corpus(manifest) == []  # an honest forgery is read
    forge(manifest, **changes)
    with pytest.raises(ConfigError, match=words):
        load_manifest(manifest)


def test_names_of_sources_may_be_anything_that_fits_a_line_of_json(tmp_path: Path) -> None:
    """They come from file names and records; the corpora of before have them."""
    name = "新闻 a\x1b[2J\nb\u202e<b>\0"
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    forge(manifest, sources__0__name=name, sources__0__license=name)
    assert load_manifest(manifest).sources[0].name == name
    assert verify_corpus(manifest) == []


@given(st.binary(max_size=300))
def test_any_bytes_are_no_manifest(content: bytes) -> None:
    with pytest.raises(ConfigError):
        Manifest.from_json(content)


def test_a_manifest_of_absurd_content_takes_little_memory(tmp_path: Path) -> None:
    """Each would take gigabytes where every wrong value is told with a copy of what is around it."""
    head, n = '{"format_version": 1, ', 440_000
    bombs = {
        "numbers": head + '"shards": [' + "0," * n + "0]}",
        "objects": head + '"sources": [' + "{}," * (n // 2) + "0]}",
        "keys": head + ",".join(f'"a{i:06d}":0' for i in range(n)) + "}",
        "lists": head + '"shards": [' + ",".join(["[" * 200 + "]" * 200] * 45_000) + "]}",
        "nested": head + '"shards": [' + ",".join(['{"a":{"b":{}}}'] * (n // 5)) + "]}",
        "text": head + '"created_by": "' + "a" * (19 << 20) + '"}',
        "wide": head + '"created_by": "' + "😀" * ((19 << 20) // 4) + '"}',
        "depth": "[" * (19 << 20),
        "more": "[" + "0," * (9 << 20) + "0]",
    }
    for name, content in bombs.items():
        (tmp_path / name).write_text(content)
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom pretrain.corpus.manifest import load_manifest\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_manifest(path)\n"
        "    except ValueError as error: print(len(str(error)))\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10)"
    )
    paths = [str(tmp_path / name) for name in bombs]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    *lengths, peak_mib = map(int, done.stdout.split())
    assert len(lengths) == len(bombs), done.stderr
    assert max(lengths) < 500
    assert peak_mib < 200


# ---- the documents of a chunk ----------------------------------------------------------------------------------------


def changed(chunk: int, column: int, value: Any, row: int = 0) -> Callable[[int, list[Piece]], list[Any]]:
    """The pieces with another value in one column of one row of a chunk."""

    def change(number: int, pieces: list[Piece]) -> list[Any]:
        if number != chunk:
            return pieces
        piece = list(pieces[row])
        piece[column] = value
        return [*pieces[:row], tuple(piece), *pieces[row + 1 :]]

    return change


START, SOURCE, ID, OFFSET, TEXT_BYTES = range(5)


def continued(number: int, pieces: list[Piece]) -> list[Any]:
    """The first chunk begins within a document."""
    return [(0, 0, "d0", 5, 0), *pieces[1:]] if number == 0 else pieces


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(0, START, 7), "starts"),
        (changed(0, START, -1), "starts"),
        (changed(0, START, 0, row=1), "starts"),
        (changed(0, START, 64, row=1), "starts"),
        (changed(0, START, 1 << 62, row=1), "starts"),
        (changed(0, START, 0.0), "list of documents"),
        (changed(0, START, "0"), "list of documents"),
        (changed(0, START, None), "list of documents"),
        (changed(0, START, 1 << 64), "list of documents"),
        (changed(0, SOURCE, 1), "source"),
        (changed(0, SOURCE, -1), "source"),
        (changed(0, ID, 5), "list of documents"),
        (changed(0, ID, None), "list of documents"),
        (changed(0, ID, "a" * 70_000), "id of more than 65536 characters"),
        (changed(0, OFFSET, -3), "offsets"),
        (continued, "first chunk|text size"),
        (changed(0, OFFSET, 1 << 60), "offsets"),
        (changed(0, OFFSET, 5, row=1), "offsets"),
        (changed(0, TEXT_BYTES, -1), "text size"),
        (changed(0, TEXT_BYTES, 1 << 50), "text size"),
        (changed(1, TEXT_BYTES, 4), "text size"),
        (changed(1, OFFSET, 5), "does not continue the document"),
        (changed(1, ID, "other"), "does not continue the document"),
    ],
)
def test_documents_of_a_chunk_are_checked(tmp_path: Path, masked: bool, change: Any, words: str) -> None:
    """With a loss mask and without, in verify and where the corpus is read."""
    assert_refused(write(tmp_path / "c", change, loss_mask=masked), words)


def test_more_documents_than_tokens_are_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces[:1] * 70)
    assert_refused(manifest, "starts|empty or differ")


def assert_refused(manifest: Path, words: str) -> None:
    problems = verify_corpus(manifest)
    assert len([problem for problem in problems if re.search(words, problem)]) >= 1, problems
    assert all("shard-00000.tar: 00000" in problem or "ids.npy" in problem for problem in problems)
    with pytest.raises(CorruptShardError, match=words):
        list(documents_of(Corpus(manifest)))


def test_honest_documents_are_read(tmp_path: Path) -> None:
    for masked in (False, True):
        manifest = write(tmp_path / str(masked), lambda _, pieces: pieces, loss_mask=masked)
        assert verify_corpus(manifest) == []
        assert [document.id for document in documents_of(Corpus(manifest))] == ["d0", "d1", "d2"]


GOOD = {"starts": [0, 5], "source": [0, 1], "ids": ["a", "b"], "offsets": [3, 0], "text_bytes": [0, 9]}


@pytest.mark.parametrize(
    "changes",
    [
        {"starts": []},
        {"starts": {"0": 1}},
        {"starts": "01"},
        {"starts": [[0], [5]]},
        {"starts": None},
        {"ids": "ab"},
        {"ids": {"a": 1, "b": 2}},
        {"ids": ["a", ["b"]]},
        {"ids": ["a", "\ud800"]},
        {"unknown": [0, 0]},
        {"targets": [0, 1], "target_bytes": [0, 1]},
        {"ends": [3, 9]},
    ],
)
def test_members_of_another_form_are_refused(changes: dict[str, Any]) -> None:
    def read(content: dict[str, Any]) -> None:
        parse_documents(json.dumps(content).encode(), "x", n_tokens=9, n_sources=2, masked=False)

    read(GOOD)
    with pytest.raises(CorruptShardError, match=r"^x "):
        read(GOOD | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ends": [2, 3]},
        {"ends": [2, 3, 7, 8]},
        {"ends": [2, 2, 7]},  # an empty document
        {"ends": [3, 3, 7]},  # beyond the next start
        {"ends": [1, 3, 7]},  # filler within a sequence
        {"ends": [2, 3, 9]},
        {"ends": [2, 3, 1 << 62]},
        {"starts": [0, 2, 3]},  # a document that reaches into the next sequence
        {"starts": [0, 2, 5]},  # filler at the beginning of one
        {"starts": [0, 1, 2], "ends": [1, 2, 4]},  # a sequence of filler
        {"offsets": [1, 0, 0], "text_bytes": [0, 0, 0]},
    ],
)
def test_documents_that_are_not_packed_whole_are_refused(changes: dict[str, Any]) -> None:
    """Of two sequences of 4 tokens, the first has two documents, the second has one, and both end with filler."""

    def read(content: dict[str, Any]) -> None:
        sizes = {"n_tokens": 8, "n_sources": 2, "masked": False}
        parse_documents(json.dumps(content).encode(), "x", sequence_tokens=4, **sizes)  # type: ignore[arg-type]

    good = {"starts": [0, 2, 4], "ends": [2, 3, 7], "source": [0, 1, 0], "ids": ["a", "b", "c"]}
    good |= {"offsets": [0, 0, 0], "text_bytes": [0, 0, 9]}
    read(good)
    with pytest.raises(CorruptShardError, match=r"^x "):
        read(good | changes)
    with pytest.raises(CorruptShardError, match=r"^x has no ends"):
        read({key: value for key, value in good.items() if key != "ends"})


def test_targets_that_ascend_by_overflow_alone_are_refused() -> None:
    targets = [0, (1 << 63) - 1, -(1 << 63), -1, 5, 6]
    content = json.dumps(GOOD | {"targets": targets, "target_bytes": [0, 1]}).encode()
    with pytest.raises(CorruptShardError, match="ascending pairs"):
        parse_documents(content, "x", n_tokens=9, n_sources=2, masked=True)


@pytest.mark.parametrize("item", ["0", "{}", '""'])
def test_more_values_than_a_chunk_can_have_are_refused_before_they_are_parsed(
    item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As objects they would take more than a gigabyte."""
    content = b'{"ids":[' + f"{item},".encode() * ((60 << 20) // (len(item) + 1)) + b"0]}"
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(CorruptShardError, match="list of documents"):
        parse_documents(content, "x", n_tokens=1 << 18, n_sources=1, masked=False)


@given(st.binary(max_size=200))
def test_any_bytes_are_no_documents(content: bytes) -> None:
    with pytest.raises(CorruptShardError):
        parse_documents(content, "x", n_tokens=9, n_sources=2, masked=False)


def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """They would be rows of an embedding that do not exist, which a GPU reads all the same."""
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    forge(manifest, vocab_size=50)
    problems = verify_corpus(manifest)
    assert len(problems) == 3
    assert "000000.tok has the token 59" in problems[0] and "50 entries" in problems[0]
    for read in (lambda: Corpus(manifest).read(0, 0, 8), lambda: Corpus(manifest).read_many([(0, 0, 8)])):
        with pytest.raises(CorruptShardError, match=r"000000\.tok has the token 59"):
            read()


# ---- the index of a shard and of ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + b"\0" * 100, b"", b"\x93NUMPY", b"\x80\x04.", b"\0" * 272]
)
def test_an_index_that_is_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    (tmp_path / "c/shards/shard-00000.idx").write_bytes(content)
    forge(manifest)
    with pytest.raises(CorruptShardError, match=r"shard-00000\.idx is .* index of 3 chunks"):
        Corpus(manifest).read(0, 0, 8)
    assert len(verify_corpus(manifest)) == 1


def ids(rows: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array(rows))
    return content.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows + np.array([[0, 9]], np.uint64), "a chunk that does not exist"),
        (lambda rows: rows + np.array([[0, 1 << 63]], np.uint64), "a chunk that does not exist"),
        (lambda rows: rows[::-1], "ascending"),
        (lambda rows: rows[:2], "documents"),
        (lambda rows: rows.astype(np.float64), "index of 3 documents"),
    ],
)
def test_an_index_of_ids_that_claims_what_cannot_be_is_refused(
    tmp_path: Path, change: Any, words: str
) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    path = tmp_path / "c/shards/ids.npy"
    path.write_bytes(ids(change(np.load(path))))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    forge(manifest, files__0__sha256=digest, files__0__bytes=path.stat().st_size)
    (problem,) = verify_corpus(manifest)
    assert re.search(words, problem)
    if "chunk" in words:
        with pytest.raises(CorruptShardError, match="names a chunk that does not exist"):
            chunks_of(Corpus(manifest), "d1")


# ---- files that are no files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shard-00000.tar", "shard-00000.idx", "ids.npy"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_no_regular_file_within_the_corpus_is_named(tmp_path: Path, name: str, kind: str) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    path = tmp_path / "c/shards" / name
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    words = "is a link to a file outside of" if kind == "link" else "it is not a regular file"
    with at_once():
        problems = verify_corpus(manifest)
        assert any(name in problem and words in problem for problem in problems), problems
        with pytest.raises(CorruptShardError, match=words):
            chunks_of(Corpus(manifest), "d1") if name == "ids.npy" else Corpus(manifest).read(0, 0, 8)


def test_a_link_within_the_shards_is_followed(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    shards = tmp_path / "c/shards"
    (shards / "elsewhere").mkdir()
    (shards / "shard-00000.tar").rename(shards / "elsewhere/data")
    (shards / "shard-00000.tar").symlink_to("elsewhere/data")
    assert len(Corpus(manifest).read(0, 0, 8)) == 8
    assert verify_corpus(manifest) == [f"{shards / 'elsewhere'} is not in the manifest; remove it"]


def test_every_file_that_is_not_listed_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", lambda _, pieces: pieces)
    for name in ("zzz.tar", "shard-00001.idx", ".hidden", "x\x1b.txt"):
        (tmp_path / "c/shards" / name).touch()
    problems = verify_corpus(manifest)
    assert len(problems) == 4
    assert all("is not in the manifest" in problem for problem in problems)


def test_corpora_of_one_tokenizer_have_one_vocabulary(tmp_path: Path) -> None:
    """Else the tokens of the second would be outside of the model's embedding."""
    paths = [write(tmp_path / name, lambda _, pieces: pieces) for name in ("a", "b")]
    forge(paths[1], vocab_size=60_000)
    sources = ",".join(f"{{name: n{i}, manifest: {path}, weight: 1}}" for i, path in enumerate(paths))
    options = [
        "run_dir=x",
        "total_steps=9",
        "model=tiny",
        "data.sequence_length=64",
        f"data.sources=[{sources}]",
    ]
    with pytest.raises(ConfigError, match="another tokenizer"):
        resolve_inputs(load_config(TrainConfig, options, "config"), 1)


# ---- what lies beside a corpus ---------------------------------------------------------------------------------------

NAMES = [
    "a\x1b[2J\x1b]0;x\x07",
    "b\x9b31m\u202e\u2066",
    "c\r\ncorrupt: all of it\x85\u2028",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "d | e ` ``` \\",
    "图书馆",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records whose every name is hostile."""
    path = tmp_path_factory.mktemp("text") / "x.jsonl"
    words = (
        "The orchard was planted in the year {} and the valley had {} trees, of which {} were apple trees."
    )
    records = [
        {
            "id": f"{name}{n}",
            "text": words.format(number, n, 7 * n, n * n),
            "source": name,
            "license": name,
            "language": name,
        }
        for n in range(40)
        for number, name in enumerate(NAMES)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def prepared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    assert prepare(options_of(text, output)) == 0
    return output


def options_of(text: Path, output: Path) -> PrepareConfig:
    stated = CardConfig(name=NAMES[4], description="\n".join(NAMES), creator=NAMES[3])
    tokenizer = TokenizerConfig(vocab_size=340)
    return PrepareConfig(
        input=[str(text)], output=str(output), heldout_frac=0.2, card=stated, tokenizer=tokenizer, workers=1
    )


def check_printed(printed: str) -> None:
    assert not re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", printed)
    assert not any(line.startswith("corrupt: all of it") for line in printed.split("\n"))


def test_hostile_names_are_printed_and_written_as_what_they_are(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(options_of(text, tmp_path / "c")) == 0
    manifest = load_manifest(tmp_path / "c/manifest.json")
    assert {source.name for source in manifest.sources} == set(NAMES)
    for chunk in range(2):
        show(tmp_path / "c", chunk)
    assert verify(tmp_path / "c") == []
    ids = next(documents_of(Corpus(tmp_path / "c/manifest.json"))).id
    assert remove(tmp_path / "c", {ids}) == {ids: 1}
    captured = capfd.readouterr()
    check_printed(captured.out + captured.err)
    assert "图书馆" in captured.out
    check_page((tmp_path / "c/README.md").read_text(encoding="utf-8"))
    croissant = (tmp_path / "c/croissant.json").read_text(encoding="utf-8")
    assert not re.findall("[<>\x00-\x09\x0b-\x1f\x7f-\x9f]", croissant)
    assert set(json.loads(croissant)["license"]) == set(NAMES)
    for path in (tmp_path / "c").glob("plots/*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")
        assert "onerror=alert(1)>" not in path.read_text(encoding="utf-8")


def check_page(source: str) -> None:
    from markdown_it import MarkdownIt

    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(source)
    assert not re.search('<(script|a |img(?! src="plots/))|onerror=alert[(]1[)]>', page)
    check_printed(page)
    assert page.count("<table>") == 2
    assert page.count("<h1>") == 1
    assert re.findall("<h2>(.*)</h2>", page) == [
        "Sources and licenses",
        "Statistics",
        "From the input to here",
        "Lineage",
        "Reading it",
    ]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: repr(bad)[:12])
def test_reports_with_one_wrong_value_are_refused_or_harmless(
    prepared: Path, tmp_path: Path, bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "write_plots", lambda *_: {})
    manifest = load_manifest(prepared / "manifest.json")
    report = read_prepare_report(prepared / "prepare.json")
    report["lineage"], report["curation_funnels"] = report["lineage"][:1], ["a funnel"]
    statistics = read_statistics(prepared / "statistics.json")
    statistics |= {"personal_data": {"email": 3}, "languages": {"en": {"documents": 1, "text_bytes": 2}}}
    statistics["duplicates"] |= {"cluster_sizes": {"2": 1}}
    statistics["sources"] = statistics["sources"][:1]
    path = tmp_path / "file.json"
    for read, honest in ((read_prepare_report, report), (read_statistics, statistics)):
        path.write_text(json.dumps(honest))
        read(path)
        for value in replaced(honest, bad):
            path.write_text(json.dumps(value))
            found = outcome(read, path)
            if found is None:
                continue
            both = (found, statistics) if read is read_prepare_report else (report, found)
            card._card(manifest, None, both[0], both[1], {}, ("a", "b"))
            for describe in plots._PLOTS.values():
                describe(both[1])


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "[" * 100_000, '{"recipe": {"options": {}}}'])
def test_a_corpus_with_a_report_that_is_none_is_left_alone(
    prepared: Path, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    for read in (read_prepare_report, read_statistics, read_curation_report):
        with pytest.raises(ConfigError, match=r"file\.json is not the "):
            read(path)
    path.unlink()
    os.mkfifo(path)
    with at_once(), pytest.raises(ConfigError, match="not a regular file"):
        read_statistics(path)


@pytest.mark.parametrize(
    "lines",
    [
        b"null\n",
        b"[]\n",
        b"{}\n",
        b'{"id": 3, "text": "a"}\n',
        b'{"id": "a", "text": null}\n',
        b"x\n",
        b"\xff\n",
    ],
)
def test_held_out_text_that_is_none_is_refused(tmp_path: Path, lines: bytes) -> None:
    path = tmp_path / "documents.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    with pytest.raises(ConfigError, match=r"documents\.jsonl\.gz "):
        list(heldout_records(path))


def test_a_bomb_among_the_held_out_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.report.fertility.MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "documents.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (8 << 20)))
    with pytest.raises(ConfigError, match="a line of more than 1,048,576 bytes"):
        list(heldout_records(path))


# ---- curations -------------------------------------------------------------------------------------------------------

TALLIES = (
    "read read_bytes dropped dropped_bytes dropped_of kept kept_bytes languages language_bytes lengths counts"
)
CURATION = {
    "tally": {
        **{name: {"a": 3} for name in TALLIES.split()},
        "dropped": {"read/bad_record": 1, "pii/x": 2, "dedup/exact_duplicate": 1},
        "contaminated": {"quiz": 1},
    },
    "clusters": {"clusters": 1, "documents": 2, "sizes": {"2": 1}, "largest": [], "repeated_lines": 0},
    "stages": ["pii"],
    "units": 1,
    "recipe": {
        "version": 1,
        "options": {
            "read": {},
            "curation": {"pii": {}, "dedup": {}, "decontaminate": {"files": ["a/quiz.jsonl"]}},
        },
        "files": {"a": "0" * 64},
        "input": {"units": 1, "sha256": "0" * 64},
        "packages": {"ftfy": "6", "trafilatura": None},
    },
}


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: repr(bad)[:12])
def test_curations_with_one_wrong_value_are_refused_or_harmless(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(CURATION))
    assert read_curation_report(path) == CURATION
    for value in replaced(CURATION, bad):
        path.write_text(json.dumps(value))
        found = outcome(read_curation_report, path)
        if found is not None:
            check_printed(funnel_table(found))
            curation_lineage("out", found)
            for describe in plots._PLOTS.values():
                describe({**FIGURES, **drop_figures([found], 1, Funnel(read=1, kept=1))})


FIGURES = {"lengths": {"histogram": {"2": 1}}, "sources": [], "scripts": {}}


# ---- what other commands print ---------------------------------------------------------------------------------------


def test_commands_print_text_of_models_and_corpora_visibly(capsys: pytest.CaptureFixture[str]) -> None:
    from launch import eval as evaluation
    from launch import generate, provenance
    from pretrain.data.history import Piece
    from pretrain.evaluate.heldout import HeldOutResult, Scores

    hostile = "".join(NAMES) + "[red]x[/red][link=http://z]y[/link]"
    where = {"first_token": 0, "n_tokens": 1, "chunk": 0, "start": 0}
    print(provenance._name(Piece(corpus=hostile, source=hostile, document=hostile, **where)))
    provenance._print_text(hostile, 1000)
    generate.show(NAMES[0], 0, NAMES[0], "\x1b[2J\tb\nc", finished=True)
    scores = Scores(loss=1.0, perplexity=2.7, bits_per_byte=1.0, tokens=1, text_bytes=1, documents=1)
    trained = SimpleNamespace(step=1, tokens_seen=1)
    options = SimpleNamespace(max_documents=None, max_tokens=None)
    result = HeldOutResult(scores, sources={hostile: scores})
    evaluation.print_table(result, trained, options, Precision.fp32)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    check_printed(printed.replace("\t", ""))
    assert "\tb\nc" in printed
    assert "[red]x[/red]" in printed.replace("\n", "")


# ---- links where a corpus is written ---------------------------------------------------------------------------------


def test_a_lock_that_is_a_link_is_not_written_through(text: Path, tmp_path: Path) -> None:
    (tmp_path / "c/.work").mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "c/.work/lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="lock is a link"):
        prepare(options_of(text, tmp_path / "c"))
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_work_folder_that_is_a_link_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "precious/old").mkdir(parents=True)
    (tmp_path / "c/.work").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="is a link"):
        prepare(options_of(text, tmp_path / "c"))
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["old"]
