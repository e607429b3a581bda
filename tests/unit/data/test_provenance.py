"""What a run has read, looked up from its state: the same as the ledger that it wrote, token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import BadChunk, Packing, StageConfig
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.data.history import ReadHistory
from pretrain.data.state import OrderState, Substitution
from pretrain.errors import ConfigError
from pretrain.reliability.journal import read_ledger
from support import ROOT
from support.texts import CHUNK, Text, data_config, make_loader
from support.tiny import TinyCorpus, python_documents


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    folder = tmp_path_factory.mktemp("corpora")
    return [Text(folder / "a", 33 * CHUNK + 3, seed=1), Text(folder / "b", 20 * CHUNK + 37, seed=2)]


GROWTH = [
    StageConfig(start_tokens=16 * 36, sequence_length=32, global_batch_sequences=6),
    StageConfig(start_tokens=16 * 108, sequence_length=64, weights={"s0": 1.0, "s1": 1.0}),
]
STOOD_IN = Substitution(source=0, epoch=0, chunk=5, first_sample=0, substitute=7, reason="damaged")


@settings(max_examples=12)
@given(
    packing=st.sampled_from(Packing),
    passed_over=st.booleans(),
    substituted=st.booleans(),
    seed=st.integers(0, 5),
)
def test_documents_and_steps_are_found_both_ways(
    texts: list[Text], packing: Packing, passed_over: bool, substituted: bool, seed: int
) -> None:
    """Each step's pieces are the tokens that the loader gave; each document's readings are those pieces again."""
    data = data_config(
        texts, lanes=4, stages=GROWTH, packing=packing, on_bad_chunk=BadChunk.substitute, verify_chunks=False
    )
    state = make_loader(data, seed=seed).state_at(0)
    if substituted:
        state.substitutions = [STOOD_IN]
    loader = make_loader(data, seed=seed, total_steps=30, state=state)
    if passed_over:
        loader.pass_over(5, 4)
    state = OrderState.from_dict(json.loads(json.dumps(loader.state_at(30).to_dict())))
    history = ReadHistory(data, state, step=30, world_size=1)
    by_document: dict[str, list[tuple]] = {}
    for number, batches in enumerate(loader.steps(1), 1):
        reads = {read.sample: read for read in history.read_in(number)}
        for batch in batches:
            for row, sample in enumerate(batch.samples.tolist()):
                tokens = []
                for piece in reads[sample].pieces:
                    corpus = history.corpora[history.names.index(piece.corpus)]
                    tokens += corpus.read(piece.chunk, piece.start, piece.start + piece.n_tokens).tolist()
                    by_document.setdefault(piece.document, []).append((number, sample, piece))
                row_tokens = batch.tokens[row].tolist()
                assert row_tokens[: len(tokens)] == tokens
                assert set(row_tokens[len(tokens) :]) <= {2}, "the rest is padding"
    for document in list(by_document)[:: max(1, len(by_document) // 10)]:
        found = history.reads_of(document)
        taken = [(read.step, read.sample, read.piece) for read in found if read.step is not None]
        assert sorted(taken, key=str) == sorted(by_document[document], key=str)
        assert passed_over or len(taken) == len(found)


def test_pieces_know_their_place_in_the_document(texts: list[Text]) -> None:
    data = data_config(texts[:1], lanes=1)
    loader = make_loader(data, total_steps=11)  # one epoch of 132 samples, nearly
    history = ReadHistory(data, loader.state_at(11), step=11, world_size=1)
    starts = {f"d{n + 1}": start for n, start in enumerate(texts[0].starts)}
    for read in history.read_in(3):
        for piece in read.pieces:
            at = starts[piece.document] + piece.first_token
            assert at == piece.chunk * CHUNK + piece.start
            assert piece.source == "text"


def test_ranks_share_a_step(texts: list[Text]) -> None:
    data = data_config(texts, lanes=6)
    history = ReadHistory(data, make_loader(data).state_at(10), step=10, world_size=3)
    parts = [[read.sample for read in history.read_in(2, rank)] for rank in range(3)]
    for rank in range(3):
        loader = make_loader(data, rank=rank, world_size=3)
        batches = next(iter(loader.steps(2)))
        assert parts[rank] == [int(s) for batch in batches for s in batch.samples]


@pytest.mark.parametrize(
    ("question", "named"),
    [
        (lambda h: h.read_in(11), ["step=11", "1 to 10"]),
        (lambda h: h.read_in(0), ["step=0", "1 to 10"]),
        (lambda h: h.read_in(1, rank=3), ["rank=3", "2 ranks"]),
        (lambda h: h.reads_of("nobody"), ["document=nobody", "s0, s1"]),
    ],
)
def test_a_question_without_an_answer_is_refused(texts: list[Text], question, named: list[str]) -> None:
    data = data_config(texts)
    history = ReadHistory(data, make_loader(data).state_at(10), step=10, world_size=2)
    with pytest.raises(ConfigError) as refusal:
        question(history)
    assert [word for word in named if word not in str(refusal.value)] == [], refusal.value


def test_another_corpus_is_refused(texts: list[Text], tmp_path: Path) -> None:
    state = make_loader(data_config(texts)).state_at(10)
    other = Text(tmp_path / "c", 33 * CHUNK + 3, seed=9)
    with pytest.raises(ConfigError, match="the corpus of 's0' has root hash"):
        ReadHistory(data_config([other, texts[1]]), state, step=10, world_size=1)


def test_a_late_step_of_a_long_run_is_found_at_once(texts: list[Text]) -> None:
    """No loop over what came before: step 10^9 is as near as step 1."""
    data = data_config(texts)
    loader = make_loader(data, total_steps=10**9)
    history = ReadHistory(data, loader.state_at(10**9), step=10**9, world_size=1)
    (read, *_) = history.read_in(10**9)
    assert read.sample >= 12 * (10**9 - 1)
    assert read.epoch > 10**6


# --- a finished run ---


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/provenance.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_the_answer_is_what_the_ledger_says(staged_run: Path) -> None:
    """Tokens are hashed in the ledger; the looked-up pieces have the same hash, for every step and rank."""
    history, _ = ReadHistory.of_run(staged_run)
    entries = read_ledger(staged_run)
    assert len(entries) == 2 * 12
    for number, entry in enumerate(entries):
        rank = number % 2 if entries[0]["step"] == entries[1]["step"] else number // 12
        reads = history.read_in(entry["step"], rank, world_size=2)
        assert [read.sample for read in reads] == entry["samples"]
        digest = xxhash.xxh3_64()
        length = 64 if entry["step"] <= 4 else 128
        for read in reads:
            tokens = [
                token
                for piece in read.pieces
                for token in history.corpora[0]
                .read(piece.chunk, piece.start, piece.start + piece.n_tokens)
                .tolist()
            ]
            digest.update(b"".join(t.to_bytes(8, "little") for t in [*tokens, *[2] * (length - len(tokens))]))
        assert digest.hexdigest() == entry["tokens_xxh3"]


@pytest.mark.integration
def test_the_command_prints_documents_and_their_text(staged_run: Path, corpus: TinyCorpus) -> None:
    done = ask(f"run_dir={staged_run}", "step=7", "rank=1", "json=true")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert len(answer["sequences"]) == 2
    piece = max(
        (piece for read in answer["sequences"] for piece in read["pieces"]),
        key=lambda piece: piece["n_tokens"],
    )
    text = python_documents()[piece["document"]]
    assert piece["text"].strip()
    assert piece["text"] in text
    ids = Tokenizer.trusted(staged_run / "tokenizer.model").encode_document(text)
    assert piece["first_token"] + piece["n_tokens"] <= len(ids)
    back = ask(f"run_dir={staged_run}", f"document={piece['document']}", "json=true")
    assert back.returncode == 0, back.stderr
    assert 7 in json.loads(back.stdout.splitlines()[-1])["steps"]
    assert f"{piece['document']}: read at steps" in back.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["step=1"], ["run_dir"]),
        (["run_dir={empty}", "step=1"], ["{empty}", "checkpoint"]),
        (["run_dir={empty}"], ["step", "document"]),
        (["run_dir={empty}", "step=1", "document=a, [b]"], ["step=1", "document=a, [b]"]),
    ],
)
def test_a_wrong_command_is_one_sentence(tmp_path: Path, arguments: list[str], named: list[str]) -> None:
    done = ask(*(argument.format(empty=tmp_path) for argument in arguments))
    assert done.returncode == 2
    words = [word.format(empty=tmp_path) for word in named]
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
