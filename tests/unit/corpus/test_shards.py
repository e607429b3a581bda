"""The corpus on disk: what is written is what is read, by us and by webdataset; damage is seen and named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import tarfile
import tempfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic_core import to_json

from pretrain.corpus import ids as document_ids
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.ids import chunks_of
from pretrain.corpus.manifest import (
    CorpusSource,
    CorruptShardError,
    Manifest,
    Packed,
    load_manifest,
    token_dtype,
)
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.writer import CorpusWriter, Documents
from pretrain.corpus.writer import _header as tar_header
from pretrain.errors import ConfigError

os.environ["WDS_SECURE"] = "1"  # read when webdataset is imported
import webdataset

CHUNK_TOKENS = 64
SHARD_BYTES = 8 * 1024  # three chunks


def write(
    folder: Path, documents: list[np.ndarray], *, vocab_size: int = 1000, chunk_tokens: int = CHUNK_TOKENS
) -> Manifest:
    writer = CorpusWriter(
        folder,
        tokenizer_sha256="0" * 64,
        vocab_size=vocab_size,
        bos_id=1,
        eos_id=2,
        chunk_tokens=chunk_tokens,
        sources=[CorpusSource(name="code", license="MIT"), "prose"],
        shard_bytes=SHARD_BYTES,
    )
    for number, tokens in enumerate(documents):
        source = ("code", "prose")[number % 2]
        writer.add_document(tokens, source=source, document_id=f"文 {number}", text_bytes=10 * number)
    return writer.finish()


@pytest.mark.parametrize("count", [1, 40])
def test_documents_that_are_added_together_give_the_same_bytes(count: int, tmp_path: Path) -> None:
    documents = random_documents(count)
    alone = write(tmp_path / "alone", documents)
    header = {"tokenizer_sha256": "0" * 64, "vocab_size": 1000, "bos_id": 1, "eos_id": 2}
    sources = [CorpusSource(name="code", license="MIT"), "prose"]
    writer = CorpusWriter(
        tmp_path / "together",
        **header,
        chunk_tokens=alone.chunk_tokens,
        sources=sources,
        shard_bytes=SHARD_BYTES,
    )
    numbers = np.arange(count)
    writer.add_documents(
        Documents(
            tokens=np.concatenate(documents).astype(np.uint16),
            starts=np.cumsum([0, *map(len, documents)]),
            source=numbers % 2,
            ids=[f"文 {number}" for number in range(count)],
            text_bytes=10 * numbers,
        )
    )
    assert writer.finish().root_sha256 == alone.root_sha256


def test_no_more_shards_are_written_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.corpus.writer.MAX_SHARDS", 3)
    with pytest.raises(ConfigError, match=r" 3 shards; .*shard_bytes .*8,192"):
        write(tmp_path, random_documents())


def random_documents(count: int = 40, vocab_size: int = 1000) -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    return [numbers.integers(0, vocab_size, numbers.integers(1, 150)) for _ in range(count)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    write(folder, random_documents())
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "corpus"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def member_offset(tar: Path, name: str) -> int:
    with tarfile.open(tar) as file:
        return file.getmember(name).offset_data


def edit(path: Path, **changes: object) -> None:
    """Change a manifest and give it a root hash that fits, as a person with bad intent would."""
    manifest = Manifest.from_json(path.read_text())
    for name, value in changes.items():
        setattr(manifest, name, value)
    manifest.root_sha256 = manifest.compute_root_sha256()
    path.write_text(manifest.to_json())


# --- what is written is what is read ---


@hypothesis_settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    chunk_tokens=st.integers(16, 100),
    vocab_size=st.sampled_from([500, 65_536, 65_537, 200_000]),
)
def test_documents_come_back(lengths: list[int], chunk_tokens: int, vocab_size: int) -> None:
    documents = [
        np.random.default_rng(number).integers(0, vocab_size, size) for number, size in enumerate(lengths)
    ]
    with tempfile.TemporaryDirectory() as name:
        manifest = write(Path(name), documents, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
        corpus = Corpus(Path(name) / "manifest.json")
        chunks = [corpus.read(chunk, 0, chunk_tokens) for chunk in range(corpus.n_chunks)]
        pieces = [corpus.documents(chunk) for chunk in range(corpus.n_chunks)]
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_tokens] * (len(chunks) - 1)
    assert len(chunks[-1]) == corpus.last_chunk_tokens == manifest.last_chunk_tokens
    assert all(chunk.dtype == token_dtype(vocab_size) for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), np.concatenate(documents))
    rebuilt: dict[str, list[np.ndarray]] = {}
    for chunk, piece in zip(chunks, pieces, strict=True):
        assert piece.starts[0] == 0
        for index, tokens in enumerate(np.split(chunk, piece.starts[1:])):
            seen = rebuilt.setdefault(piece.ids[index], [])
            number = len(rebuilt) - 1
            assert piece.ids[index] == f"文 {number}"
            assert piece.source[index] == number % 2
            assert piece.offsets[index] == sum(map(len, seen))
            assert piece.text_bytes[index] == (0 if seen else 10 * number)
            seen.append(tokens)
    for expected, found in zip(documents, rebuilt.values(), strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_the_manifest_counts_what_there_is(original: Path) -> None:
    documents = random_documents()
    manifest = load_manifest(original / "manifest.json")
    assert manifest.n_tokens == sum(map(len, documents))
    assert manifest.n_documents == len(documents)
    assert manifest.n_chunks == -(-manifest.n_tokens // CHUNK_TOKENS)
    code, prose = manifest.sources
    assert (code.name, code.license, prose.license) == ("code", "MIT", "unknown")
    assert code.documents == prose.documents == 20
    assert code.tokens == sum(len(tokens) for tokens in documents[::2])
    assert prose.text_bytes == sum(range(10, 400, 20))
    assert len(manifest.shards) > 3
    for shard in manifest.shards:
        path = original / "shards" / shard.name
        assert path.stat().st_size == shard.bytes <= SHARD_BYTES + 1024
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert not list(original.rglob("*.tmp"))


def test_tokens_of_65536_entries_take_two_bytes() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_the_same_documents_give_the_same_bytes(original: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", random_documents())
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (original / file).read_bytes()


def test_tar_members_bear_no_trace_of_the_machine(original: Path) -> None:
    with tarfile.open(original / "shards/shard-00001.tar") as tar:
        members = tar.getmembers()
    first = load_manifest(original / "manifest.json").shards[1].first_chunk
    assert [member.name for member in members[:2]] == [f"{first:06d}.tok", f"{first:06d}.doc"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == 0o644


@given(name=st.from_regex(r"[0-9a-z.]{1,100}", fullmatch=True), size=st.integers(0, (8 << 30) - 1))
def test_a_header_is_that_of_python(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@given(st.lists(st.text(max_size=5), max_size=5))
def test_ids_are_written_as_python_writes_json(ids: list[str]) -> None:
    columns = {"starts": [0, 5], "ids": ids}
    assert to_json(columns) == json.dumps(columns, ensure_ascii=False, separators=(",", ":")).encode()


def test_the_index_says_where_members_lie(original: Path) -> None:
    index = np.load(original / "shards/shard-00000.idx", allow_pickle=False)  # [chunks, 2, 3]
    with tarfile.open(original / "shards/shard-00000.tar") as tar:
        found = [(member.offset_data, member.size) for member in tar.getmembers()]
    assert index[:, :, :2].reshape(-1, 2).tolist() == [list(place) for place in found]


def test_plain_webdataset_reads_it(original: Path) -> None:
    corpus = Corpus(original / "manifest.json")
    urls = [str(original / "shards" / shard.name) for shard in corpus.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert webdataset.utils.enforce_security
    assert [sample["__key__"] for sample in samples] == [f"{chunk:06d}" for chunk in range(corpus.n_chunks)]
    for chunk, sample in enumerate(samples):
        np.testing.assert_array_equal(
            np.frombuffer(sample["tok"], "<u2"), corpus.read(chunk, 0, CHUNK_TOKENS)
        )
        assert json.loads(sample["doc"])["ids"] == corpus.documents(chunk).ids


def test_reading_is_bounded_by_the_chunk(original: Path) -> None:
    corpus = Corpus(original / "manifest.json")
    whole = corpus.read(2, 0, CHUNK_TOKENS)
    np.testing.assert_array_equal(corpus.read(2, 10, 20), whole[10:20])
    np.testing.assert_array_equal(corpus.read(2, 60, 1000), whole[60:])
    assert len(corpus.read(corpus.n_chunks - 1, 0, 1000)) == corpus.last_chunk_tokens
    for chunk, start in ((-1, 0), (corpus.n_chunks, 0), (0, -1), (0, CHUNK_TOKENS + 1)):
        with pytest.raises(IndexError):
            corpus.read(chunk, start, CHUNK_TOKENS)
    with pytest.raises(IndexError):
        corpus.documents(corpus.n_chunks)


def _read_first(corpus: Corpus, answers: multiprocessing.queues.Queue) -> None:
    answers.put(corpus.read(0, 0, CHUNK_TOKENS).tolist())


def test_a_forked_process_can_use_an_opened_corpus(original: Path) -> None:
    corpus = Corpus(original / "manifest.json")
    expected = corpus.read(0, 0, CHUNK_TOKENS).tolist()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_read_first, args=(corpus, answers))
    process.start()
    assert answers.get(timeout=60) == expected
    process.join()
    assert process.exitcode == 0
    assert corpus.read(0, 0, CHUNK_TOKENS).tolist() == expected


def test_an_opened_corpus_can_be_sent_to_a_process(original: Path) -> None:
    corpus = Corpus(original / "manifest.json")
    expected = corpus.read(3, 0, CHUNK_TOKENS)
    sent = ForkingPickler.dumps(corpus)
    assert len(sent) < 1000  # a pipe holds 64 KiB, however large the manifest is
    np.testing.assert_array_equal(ForkingPickler.loads(sent).read(3, 0, CHUNK_TOKENS), expected)


def test_a_corpus_that_was_replaced_meanwhile_is_not_opened_in_its_stead(original: Path) -> None:
    manifest = original / "manifest.json"
    with pytest.raises(CorruptShardError, match=rf"^{manifest} "):
        Corpus(manifest, root_sha256="0" * 64)
    assert Corpus(manifest, root_sha256=load_manifest(manifest).root_sha256).n_chunks > 0


def test_few_files_are_open_at_a_time(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.corpus.shards._OPEN_SHARDS", 2)
    monkeypatch.setattr("pretrain.corpus.shards._CACHED_DOCUMENTS", 2)
    corpus = Corpus(original / "manifest.json")
    before = len(os.listdir("/proc/self/fd"))
    for chunk in range(corpus.n_chunks):
        assert len(corpus.read(chunk, 0, 1)) == 1
        assert corpus.documents(chunk).starts[0] == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(corpus._documents) == 2


# --- a loss mask ---


def write_masked(folder: Path, documents: list[tuple[int, list[int]]], **options: object) -> Manifest:
    """Documents of (length, targets)."""
    arguments = {"tokenizer_sha256": "0" * 64, "vocab_size": 1000, "bos_id": 1, "eos_id": 2}
    arguments |= {"chunk_tokens": CHUNK_TOKENS, "sources": ["chat"], "shard_bytes": SHARD_BYTES}
    writer = CorpusWriter(folder, **(arguments | {"loss_mask": True} | options))  # type: ignore[arg-type]
    for number, (length, targets) in enumerate(documents):
        tokens = np.arange(length) % 1000
        name, size = f"d{number}", 7 + number
        writer.add_document(tokens, source="chat", document_id=name, targets=targets, target_bytes=size)
    return writer.finish()


@st.composite
def masked_document(draw: st.DrawFn) -> tuple[int, list[int]]:
    length = draw(st.integers(1, 200))
    borders = draw(st.lists(st.integers(0, length), max_size=9, unique=True))
    return length, sorted(borders)[: len(borders) // 2 * 2]


@hypothesis_settings(max_examples=50)
@given(documents=st.lists(masked_document(), min_size=1, max_size=8), chunk_tokens=st.integers(16, 100))
def test_targets_come_back(documents: list[tuple[int, list[int]]], chunk_tokens: int) -> None:
    """Also where chunks cut them."""
    with tempfile.TemporaryDirectory() as name:
        manifest = write_masked(Path(name), documents, chunk_tokens=chunk_tokens)
        corpus = Corpus(Path(name) / "manifest.json")
        assert verify_corpus(Path(name) / "manifest.json") == []
        found = list(documents_of(corpus))
        pieces = [corpus.documents(chunk) for chunk in range(corpus.n_chunks)]
        stream = [corpus.is_target(chunk, 0, corpus.tokens_in(chunk)) for chunk in range(corpus.n_chunks)]
        assert not corpus.is_target(corpus.n_chunks - 1, corpus.last_chunk_tokens, 200).any()
    assert manifest.loss_mask
    for number, (document, (length, targets)) in enumerate(zip(found, documents, strict=True)):
        expected = np.zeros(length, bool)
        for start, stop in zip(targets[::2], targets[1::2], strict=True):
            expected[start:stop] = True
        np.testing.assert_array_equal(document.is_target, expected)
        assert document.target_bytes == 7 + number
        assert len(document.tokens) == length
    np.testing.assert_array_equal(np.concatenate(stream), np.concatenate([d.is_target for d in found]))
    for chunk, piece in enumerate(pieces):
        assert piece.targets is not None
        assert piece.target_bytes is not None
        assert ((piece.target_bytes > 0) == (piece.offsets == 0)).all()
        assert piece.targets.dtype == np.int64
        assert (np.diff(piece.targets) >= 0).all()
        assert set(piece.targets.tolist()) <= set(range(corpus.tokens_in(chunk) + 1))


def test_a_corpus_without_a_mask_has_the_bytes_that_it_had_before_there_was_one(original: Path) -> None:
    tars = b"".join(path.read_bytes() for path in sorted((original / "shards").glob("*.tar")))
    assert (
        hashlib.sha256(tars).hexdigest() == "d011db9b0a2f57f1f8ce8eb4df6b2584a9bb57db0c1b4759ddc321d18de02042"
    )
    text = (original / "manifest.json").read_text()
    raw = json.loads(text)
    assert "loss_mask" not in raw
    root = raw.pop("root_sha256")
    content = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    assert root == hashlib.sha256(content.encode()).hexdigest()
    assert not load_manifest(original / "manifest.json").loss_mask
    corpus = Corpus(original / "manifest.json")
    assert corpus.documents(0).targets is None
    assert corpus.is_target(0, 3, 9).tolist() == [True] * 6
    assert all(document.is_target is None for document in documents_of(corpus))


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([3], "ascending pairs"),
        ([5, 9, 7, 11], "ascending pairs"),
        ([4, 4], "empty or outside"),
        ([60, CHUNK_TOKENS + 1], "empty or outside of the chunk's 64 tokens"),
        ([-1, 2], "empty or outside"),
        (["a", 2], "list of documents"),
    ],
)
def test_wrong_targets_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: list[object], words: str
) -> None:
    """Written by a program that is wrong, so that all hashes fit."""
    monkeypatch.setattr("pretrain.corpus.writer._spans_within", lambda *_: spans)
    write_masked(tmp_path, [(CHUNK_TOKENS, [1, 2])])
    problems = verify_corpus(tmp_path / "manifest.json")
    assert len(problems) == 1
    assert f"shard-00000.tar: 000000.doc {'is' if 'list of' in words else 'has'}" in problems[0]
    assert words in problems[0]
    with pytest.raises(CorruptShardError, match=words):
        Corpus(tmp_path / "manifest.json").documents(0)


def test_manifest_and_chunks_agree_on_the_mask(tmp_path: Path, folder: Path) -> None:
    write_masked(tmp_path / "masked", [(30, [1, 5])])
    edit(tmp_path / "masked/manifest.json", loss_mask=False)
    with pytest.raises(CorruptShardError, match="has a loss mask"):
        Corpus(tmp_path / "masked/manifest.json").documents(0)
    edit(folder / "manifest.json", loss_mask=True)
    assert "has no loss mask" in verify_corpus(folder / "manifest.json")[0]
    edit(folder / "manifest.json", loss_mask="no")
    with pytest.raises(ConfigError, match="loss_mask is 'no'"):
        load_manifest(folder / "manifest.json")


@pytest.mark.parametrize("targets", [[3], [5, 4], [4, 4], [0, 31], [-1, 3], [1, 6, 5, 9]])
def test_the_writer_refuses_wrong_targets(tmp_path: Path, targets: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending starts and stops"):
        write_masked(tmp_path, [(30, targets)])


def test_the_writer_wants_targets_just_where_there_is_a_mask(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document .* loss mask"):
        write_masked(tmp_path / "a", [(30, [1, 2])], loss_mask=False)
    with pytest.raises(ValueError, match=r"document .* loss mask"):
        write_masked(tmp_path / "b", [(30, None)])  # type: ignore[list-item]


# --- what the writer refuses ---


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    for tokens in ([1000], [-1], [], [[1]]):
        with pytest.raises(ValueError, match="文 0"):
            write(tmp_path, [np.array(tokens)])
    documents = [*random_documents(3), np.array([5, 1000, 6], np.uint16), *random_documents(3)]
    with pytest.raises(ValueError, match="文 3'"):  # of the stored type, so checked when its chunk is written
        write(tmp_path / "stored", documents)


def test_a_corpus_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document"):
        write(tmp_path, [])


def test_a_corpus_is_not_written_over(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="already holds a corpus"):
        write(folder, random_documents(1))
    assert (folder / "manifest.json").read_bytes() == before


def test_an_unfinished_corpus_has_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="文 3"):
        write(tmp_path, [*random_documents(3), np.array([5000])])
    with pytest.raises(ConfigError, match="does not exist"):
        load_manifest(tmp_path / "manifest.json")


# --- damage is seen and named ---


@pytest.mark.parametrize("kind", ["tok", "doc"])
def test_a_flipped_bit_is_named_at_first_use(folder: Path, kind: str) -> None:
    tar = folder / "shards/shard-00000.tar"
    flip(tar, member_offset(tar, f"000001.{kind}") + 5)
    corpus = Corpus(folder / "manifest.json")
    for _ in range(2):  # the second time too
        with pytest.raises(CorruptShardError, match=rf"shard-00000\.tar: member 000001\.{kind} .*xxh3-64"):
            corpus.read(1, 8, 16) if kind == "tok" else corpus.documents(1)
    assert len(corpus.read(0, 0, 64)) == len(corpus.read(2, 0, 64)) == 64
    problems = verify_corpus(folder / "manifest.json")
    assert len(problems) == 2
    assert "shard-00000.tar has sha256" in problems[0]
    assert re.search(rf"member 000001\.{kind} .*xxh3-64", problems[1])


def test_chunks_are_not_checked_where_that_is_not_wanted(folder: Path) -> None:
    tar = folder / "shards/shard-00000.tar"
    flip(tar, member_offset(tar, "000001.tok"))
    assert len(Corpus(folder / "manifest.json", verify_chunks=False).read(1, 0, 64)) == 64


def test_a_truncated_shard_is_named(folder: Path) -> None:
    tar = folder / "shards/shard-00001.tar"
    size = tar.stat().st_size
    chunk = load_manifest(folder / "manifest.json").shards[1].first_chunk + 1
    os.truncate(tar, member_offset(tar, f"{chunk:06d}.tok") + 7)
    expected = rf"shard-00001\.tar has \d+ bytes, its manifest says {size}; .* cut off is {chunk:06d}\.tok"
    with pytest.raises(CorruptShardError, match=expected):
        Corpus(folder / "manifest.json").read(chunk, 0, 64)
    problems = verify_corpus(folder / "manifest.json")
    assert f"says {size}" in problems[0]
    assert f"member {chunk:06d}.tok is cut off" in problems[1]
    assert f"member {chunk:06d}.doc is cut off" in problems[2]


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_missing_file_is_named(folder: Path, suffix: str) -> None:
    (folder / f"shards/shard-00000.{suffix}").unlink()
    with pytest.raises(CorruptShardError, match=rf"shard-00000\.{suffix} .*: No such file"):
        Corpus(folder / "manifest.json").read(0, 0, 64)
    (problem,) = verify_corpus(folder / "manifest.json")
    assert f"shard-00000.{suffix} cannot be read" in problem


def test_a_damaged_index_is_named(folder: Path) -> None:
    flip(folder / "shards/shard-00000.idx", 140)
    with pytest.raises(CorruptShardError, match=r"shard-00000\.idx .*sha256"):
        Corpus(folder / "manifest.json").read(0, 0, 64)
    (problem,) = verify_corpus(folder / "manifest.json")
    assert re.search(r"shard-00000\.idx .*sha256", problem)


def test_verify_lists_every_problem_and_shows_progress(folder: Path) -> None:
    assert verify_corpus(folder / "manifest.json") == []
    flip(folder / "shards/shard-00000.tar", 600)
    (folder / "shards/shard-00002.tar").unlink()
    shutil.copy(folder / "shards/shard-00001.tar", folder / "shards/shard-00099.tar")
    seen: list[tuple[int, int]] = []
    problems = verify_corpus(folder / "manifest.json", lambda done, total: seen.append((done, total)))
    assert [next(n for n in ("00000", "00002", "00099") if n in text) for text in problems] == [
        "00000",
        "00000",
        "00002",
        "00099",
    ]
    assert "not in the manifest" in problems[-1]
    manifest = load_manifest(folder / "manifest.json")
    assert seen[-1][0] == seen[-1][1] == sum(file.bytes for file in [*manifest.shards, *manifest.files])


def test_the_error_survives_the_way_between_processes() -> None:
    """As torch's DataLoader does it: the type is called with the text alone."""
    error = CorruptShardError("shard-00000.tar: member 000001.tok")
    assert str(type(error)(str(error))) == str(error)


# --- manifests that are refused ---


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"license": "MIT"', '"license": "CC0-1.0"'))
    with pytest.raises(ConfigError, match="root_sha256 does not match"):
        Corpus(path)
    assert "root_sha256 does not match" in verify_corpus(path)[0]


@pytest.mark.parametrize("name", ["../../shard-00000.tar", "/etc/passwd", "shard-00000.tar/../x", "x.tar"])
def test_shards_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    shards = load_manifest(path).shards
    shards[0].name = name
    edit(path, shards=shards)
    with pytest.raises(ConfigError, match=r"shards\.0\.name is "):
        load_manifest(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_files_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"] = [{"name": name, "bytes": 1, "sha256": "0" * 64}]
    (folder / "manifest.json").write_text(json.dumps(raw))
    manifest_json = json.dumps(
        {key: raw[key] for key in raw if key != "root_sha256"}, sort_keys=True, separators=(",", ":")
    )
    raw["root_sha256"] = hashlib.sha256(manifest_json.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"files\.0\.name is "):
        load_manifest(folder / "manifest.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_chunks": 5},
        {"n_tokens": 7},
        {"dtype": "uint32"},
        {"chunk_tokens": 1},
        {"packed": Packed(sequence_tokens=48)},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder: Path, changes: dict[str, object]) -> None:
    edit(folder / "manifest.json", **changes)
    with pytest.raises(ConfigError, match="contradicts itself"):
        load_manifest(folder / "manifest.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a corpus manifest: "),
        (b"[]", "is not a corpus manifest: "),
        (b"{}", "is not a corpus manifest: "),
        (b'{"format_version": 99}', "has format version 99, this program reads 1"),
        (b'{"format_version": 1, "sources": 3}', "is not a corpus manifest: "),
        (
            b'{"format_version": 1, "sources": [], "shards": [], "files": [], "x": 1}',
            "is not a corpus manifest: ",
        ),
        (b"\xff\xfe", "is not a corpus manifest: "),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_manifest(path)


def test_a_folder_in_place_of_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is not a regular file"):
        load_manifest(tmp_path)


def test_the_root_hash_covers_every_field(original: Path) -> None:
    manifest = load_manifest(original / "manifest.json")
    before = manifest.compute_root_sha256()
    manifest.shards[0].index_sha256 = "0"
    assert manifest.compute_root_sha256() != before


def test_documents_are_found_by_their_ids(tmp_path: Path) -> None:
    """Also those that begin in one chunk and end in another, and several of one id."""
    writer = CorpusWriter(
        tmp_path / "c",
        tokenizer_sha256="f" * 64,
        vocab_size=100,
        bos_id=1,
        eos_id=2,
        chunk_tokens=16,
        sources=["a"],
    )
    lengths = {"short": 5, "long": 40, "twice": 3, "文": 9}
    for name in ("short", "long", "twice", "文", "twice"):
        writer.add_document([1, *range(3, 3 + lengths[name]), 2], source="a", document_id=name)
    writer.finish()
    corpus = Corpus(tmp_path / "c" / "manifest.json")
    expected = {
        name: [chunk for chunk in range(corpus.n_chunks) if name in corpus.documents(chunk).ids]
        for name in lengths
    }
    assert expected["long"] == [0, 1, 2, 3]
    assert {name: chunks_of(corpus, name) for name in lengths} == expected
    assert chunks_of(corpus, "nobody") == []
    (tmp_path / "c" / "shards" / "ids.npy").unlink()
    assert any("ids.npy cannot be read" in problem for problem in verify_corpus(corpus.manifest_path))
    corpus.manifest.files.clear()
    with pytest.raises(ConfigError, match=r"has no shards/ids\.npy"):
        chunks_of(corpus, "short")


@settings(max_examples=20)
@given(n=st.integers(1, 400), data=st.data())
def test_ids_are_searched_in_blocks(n: int, data: st.DataObject) -> None:
    """An index larger than a block: the first of equal hashes is found wherever it lies."""
    hashes = np.sort(np.array(data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n)), np.uint64))
    rows = np.stack([hashes, np.arange(n, dtype=np.uint64)], axis=1)
    wanted = data.draw(st.integers(0, 31))
    low = int(np.searchsorted(hashes, np.uint64(wanted)))
    first = max(0, low - data.draw(st.integers(0, document_ids._BLOCK_ROWS)))
    found = document_ids._equal_rows(lambda a, b: rows[a:b], first, n, wanted)
    assert found == np.flatnonzero(hashes == np.uint64(wanted)).tolist()
