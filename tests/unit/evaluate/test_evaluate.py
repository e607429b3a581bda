"""Held-out scores against the plain definition: each document alone, each token once, on any number of ranks."""

from __future__ import annotations

import json
import math
import os
import sys
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batch import IGNORED_LABEL, Batch
from pretrain.corpus.shards import Corpus
from pretrain.corpus.writer import CorpusWriter
from pretrain.distributed import World
from pretrain.errors import ConfigError
from pretrain.evaluate import heldout
from pretrain.evaluate.heldout import (
    HeldOutResult,
    TokenDocument,
    check_heldout,
    corpus_documents,
    evaluate_loss,
    first_tokens,
    masked_windows,
    score_documents,
    windows,
)
from pretrain.model.decoder import Decoder, LossSums
from pretrain.trained import load_trained
from support import ROOT
from support.launching import Ranks
from support.trained_run import SMALL, make_run, run_script, script, train_tokenizer
from support.whole import whole_documents, write_whole

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
MODEL = replace(SMALL, vocab_size=64)
LENGTHS = [3, 40, 2, 17, 70, 9, 33, 5, 64, 21]


def write_corpus(
    folder: Path, lengths: list[int] = LENGTHS, chunk_tokens: int = 64, share: float | None = None
) -> Path:
    """Documents of random tokens: [bos] ... [eos], three bytes of text per token, sources in turn.

    With `share`, there is a loss mask, and that share at the end of each document counts, with 5 bytes per token.
    """
    draw = np.random.default_rng(0)
    writer = CorpusWriter(
        folder,
        tokenizer_sha256="0" * 64,
        vocab_size=64,
        bos_id=1,
        eos_id=2,
        chunk_tokens=chunk_tokens,
        sources=["books", "code"],
        loss_mask=share is not None,
    )
    for number, length in enumerate(lengths):
        tokens = np.concatenate([[1], draw.integers(4, 64, length - 2), [2]])
        source = ["books", "code"][number % 2]
        first = first_target(length, share or 0)
        writer.add_document(
            tokens,
            source=source,
            document_id=str(number),
            text_bytes=3 * (length - 2) + 1,
            targets=None if share is None else [first, length],
            target_bytes=5 * (length - first),
        )
    writer.finish()
    return folder / "manifest.json"


def first_target(length: int, share: float) -> int:
    return min(length - 1, round(length * (1 - share)))


def decoder() -> Decoder:
    model = Decoder(MODEL, seed=1).eval()
    with torch.no_grad():
        model.embed.weight.mul_(30)
        model.head.weight.mul_(30)
    return model


def nll(model: Decoder, tokens: np.ndarray) -> list[float]:
    """Of each token after the first, given all before it: by definition, from the logits."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        log_p = model.logits(ids[None, :-1])[0].double().log_softmax(-1)
    return (-log_p.gather(-1, ids[1:, None])[:, 0]).tolist()


def evaluate(model: Decoder, corpus: Corpus, world: World = ALONE, **changes: Any) -> HeldOutResult:
    arguments: dict[str, Any] = {
        "sequence_length": 16,
        "micro_batch_sequences": 3,
        "max_sequences": None,
        "document_masking": True,
    }
    return evaluate_loss(lambda batch: model(*batch[:4]), corpus, world=world, **(arguments | changes))


# --- packed sequences, while training ---


@pytest.mark.parametrize(
    ("sequence_length", "max_sequences"), [(16, None), (16, 7), (24, None), (128, None), (64, 1)]
)
def test_packed_loss_is_that_of_each_visible_piece(
    tmp_path: Path, sequence_length: int, max_sequences: int | None
) -> None:
    """Each piece of a document within a sequence is scored alone; what a sequence's end predicts is read on."""
    corpus, model = Corpus(write_corpus(tmp_path)), decoder()
    expected: list[float] = []
    stream = [corpus.read(chunk, 0, 64) for chunk in range(corpus.n_chunks)]
    sequences = [(c, s) for c, tokens in enumerate(stream) for s in range(0, len(tokens), sequence_length)]
    for chunk, start in sequences[:max_sequences]:
        tokens = stream[chunk][start : start + sequence_length + 1]
        begins = [0, *(np.flatnonzero(tokens[1:] == 1) + 1).tolist(), len(tokens)]
        for a, b in pairwise(begins):
            expected += nll(model, tokens[a:b])
    result = evaluate(model, corpus, sequence_length=sequence_length, max_sequences=max_sequences).overall
    assert result.tokens == len(expected)
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / result.text_bytes, rel=1e-6)


@pytest.mark.parametrize("share", [None, 0.5])
def test_packed_loss_by_source(tmp_path: Path, share: float | None) -> None:
    """That of a source's own tokens, in the sequences where they stand beside those of the other source."""
    corpus, model = Corpus(write_corpus(tmp_path, share=share)), decoder()
    expected: dict[str, list[float]] = {"books": [], "code": []}
    for number, document in enumerate(corpus_documents(corpus)):
        start = sum(LENGTHS[:number])
        for begin in range(start - start % 16, start + len(document.tokens), 16):  # 16 divides a chunk
            first, last = max(begin, start) - start, min(begin + 16, start + len(document.tokens)) - start
            # What a sequence's end predicts is read on, but not into the next chunk.
            stop = last if (begin + 16) % 64 == 0 else last + 1
            counts = document.labels[first:stop][1:] != -100
            found = np.array(nll(model, document.tokens[first:stop]))[counts]
            expected[document.source] += found.tolist()
    result = evaluate(model, corpus)
    for name, values in expected.items():
        scores = result.sources[name]
        assert scores.tokens == len(values) > 20
        assert scores.loss == pytest.approx(np.mean(values), rel=1e-5)
    assert sum(s.tokens for s in result.sources.values()) == result.overall.tokens
    assert sum(s.documents for s in result.sources.values()) == result.overall.documents == len(LENGTHS)
    assert abs(sum(s.text_bytes for s in result.sources.values()) - result.overall.text_bytes) <= 1  # rounded
    assert result.figures()["source/code/loss"] == result.sources["code"].loss


def test_text_of_very_many_sources_is_scored_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, model = Corpus(write_corpus(tmp_path)), decoder()
    by_source = evaluate(model, corpus)
    monkeypatch.setattr(heldout, "MAX_SOURCES", 1)
    whole = evaluate(model, corpus)
    assert whole.sources == {}
    assert whole.overall.tokens == by_source.overall.tokens
    assert whole.overall.loss == pytest.approx(by_source.overall.loss, rel=1e-6)


def test_a_shard_that_cannot_be_read_is_said_before_training(tmp_path: Path) -> None:
    corpus = Corpus(write_corpus(tmp_path))
    (shard,) = (tmp_path / "shards").glob("*.tar")
    shard.unlink()
    with pytest.raises(
        ConfigError, match=rf"evaluation\.sets\.law={tmp_path}.* cannot be read: .*{shard.name}"
    ):
        check_heldout(
            corpus, sequence_length=16, max_sequences=2, document_masking=True, key="evaluation.sets.law"
        )


def test_packed_loss_is_that_of_the_targets(tmp_path: Path) -> None:
    """The same tokens as without a loss mask, of which half count."""
    plain, masked = Corpus(write_corpus(tmp_path / "a")), Corpus(write_corpus(tmp_path / "b", share=0.5))
    model = decoder()
    expected: list[float] = []
    for chunk in range(plain.n_chunks):
        tokens, counts = plain.read(chunk, 0, 64), masked.is_target(chunk, 0, 64)
        for start in range(0, len(tokens), 16):
            seen, counted = tokens[start : start + 17], counts[start : start + 17]
            expected += [
                value for value, counts in zip(nll(model, seen), counted[1:], strict=False) if counts
            ]
    result = evaluate(model, masked, document_masking=False).overall
    assert (
        result.tokens == len(expected) < evaluate(model, plain, document_masking=False).overall.tokens * 0.6
    )
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-6)
    assert result.text_bytes == sum(5 * (length - first_target(length, 0.5)) for length in LENGTHS)
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / result.text_bytes, rel=1e-6)


@pytest.mark.parametrize(("sequence_length", "max_sequences"), [(16, None), (16, 9), (64, None), (32, 3)])
def test_whole_documents_are_scored_as_each_alone(
    tmp_path: Path, sequence_length: int, max_sequences: int | None
) -> None:
    """By source too, also where a sequence joins several packed ones; filler counts nowhere."""
    sizes = np.random.default_rng(1).integers(2, 17, 40).tolist()
    documents = whole_documents(sizes)
    corpus, model = Corpus(write_whole(tmp_path, documents)), Decoder(replace(MODEL, vocab_size=320), seed=1)
    assert corpus.manifest.filler_tokens > 0
    end = corpus.manifest.n_tokens if max_sequences is None else max_sequences * sequence_length
    read, text_bytes, n_documents = {"a": [], "b": []}, 0, 0  # type: ignore[var-annotated]
    for chunk in range(corpus.n_chunks):
        pieces = corpus.documents(chunk)
        for name, start in zip(pieces.ids, pieces.starts.tolist(), strict=True):
            if chunk * 64 + start < end:
                one = documents[name]
                read[one.source] += nll(model, np.array(one.tokens))[-len(one.labels) :]
                text_bytes, n_documents = text_bytes + 2 * len(one.tokens), n_documents + 1
    result = evaluate(model, corpus, sequence_length=sequence_length, max_sequences=max_sequences)
    for name, values in read.items():
        assert result.sources[name].tokens == len(values) > 20
        assert result.sources[name].loss == pytest.approx(np.mean(values), rel=1e-5)
    assert (result.overall.documents, result.overall.text_bytes) == (n_documents, text_bytes)


def test_a_mask_that_leaves_nothing_is_said(tmp_path: Path) -> None:
    corpus = Corpus(write_corpus(tmp_path, [60, 60], share=0.1))
    with pytest.raises(ConfigError, match=r"first 2 sequences; raise evaluation\.max_sequences"):
        evaluate(decoder(), corpus, max_sequences=2)
    assert evaluate(decoder(), corpus, max_sequences=4).overall.tokens == 6


def test_without_document_masking_a_sequence_is_one_text(tmp_path: Path) -> None:
    corpus, model = Corpus(write_corpus(tmp_path)), decoder()
    expected: list[float] = []
    for chunk in range(corpus.n_chunks):
        tokens = corpus.read(chunk, 0, 64)
        for start in range(0, len(tokens), 16):
            expected += nll(model, tokens[start : start + 17])
    result = evaluate(model, corpus, document_masking=False).overall
    assert result.tokens == len(expected)
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-6)


@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=12),
    chunk_tokens=st.sampled_from([16, 64]),
    sequence_length=st.sampled_from([8, 12]),
    max_sequences=st.integers(1, 60),
)
def test_text_bytes_of_a_part_are_in_proportion(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    chunk_tokens: int,
    sequence_length: int,
    max_sequences: int,
) -> None:
    corpus = Corpus(write_corpus(tmp_path_factory.mktemp("corpus"), lengths, chunk_tokens))
    per_chunk = -(-chunk_tokens // sequence_length)
    chunks, sequences = divmod(max_sequences, per_chunk)
    read = min(chunks * chunk_tokens + min(sequences * sequence_length, chunk_tokens), sum(lengths))
    text_bytes, documents, start = 0.0, 0, 0
    for length in lengths:
        inside = min(max(read - start, 0), length)
        text_bytes += (3 * (length - 2) + 1) * inside / length
        documents += inside > 0
        start += length
    forward = lambda batch: LossSums(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1))  # noqa: E731
    result = evaluate_loss(
        forward,
        corpus,
        sequence_length=sequence_length,
        micro_batch_sequences=4,
        max_sequences=max_sequences,
        world=ALONE,
        document_masking=True,
    ).overall
    assert result.documents == documents
    assert result.text_bytes == pytest.approx(text_bytes, abs=0.500001)


def test_every_rank_calls_forward_equally_often(tmp_path: Path) -> None:
    """Without a process group: what each rank of a world would do with its share, up to the reduction."""
    corpus, model = Corpus(write_corpus(tmp_path)), decoder()
    whole = evaluate(model, corpus)
    for world_size in (2, 3, 8):
        calls, nll_sum, n_predicted = [], 0.0, 0
        for rank in range(world_size):
            sums: list[LossSums] = []

            def forward(batch: Batch, sums: list[LossSums] = sums) -> LossSums:
                assert batch.tokens.shape[1] == 16
                sums.append(model(*batch[:4]))
                return sums[-1]

            shard = World(rank=rank, size=world_size, local_rank=rank, device=torch.device("cpu"))
            with pytest.raises(ValueError, match="process group"):
                evaluate_loss(
                    forward,
                    corpus,
                    sequence_length=16,
                    micro_batch_sequences=3,
                    max_sequences=None,
                    world=shard,
                    document_masking=True,
                )
            calls.append(len(sums))
            nll_sum += sum(float(s.nll_sum) for s in sums)
            n_predicted += sum(int(s.n_predicted) for s in sums)
        assert len(set(calls)) == 1
        assert n_predicted == whole.overall.tokens
        assert nll_sum / n_predicted == pytest.approx(whole.overall.loss, rel=1e-6)


def test_ranks_agree_on_the_result(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "corpus")
    expected = evaluate(decoder(), Corpus(manifest)).overall
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with Ranks(2, __file__, str(manifest), str(tmp_path), log_dir=tmp_path / "logs", env=env) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.output()
    for rank in range(2):
        found = json.loads((tmp_path / f"result-{rank}.json").read_text())
        assert found == pytest.approx(expected.as_dict(), rel=1e-6)


def rank_main(manifest: str, folder: str) -> None:
    """One rank of the test above."""
    from pretrain.distributed import init_world, shutdown_world

    world = init_world(timeout_s=60)
    result = evaluate(decoder(), Corpus(manifest), world)
    Path(folder, f"result-{world.rank}.json").write_text(json.dumps(result.overall.as_dict()))
    shutdown_world()


# --- whole documents, after training ---


@given(length=st.integers(2, 200), sequence_length=st.integers(1, 40))
def test_windows_score_each_token_once_with_context(length: int, sequence_length: int) -> None:
    tokens = np.arange(length)  # a token is its own position
    scored = []
    for window in windows(tokens, tokens, sequence_length):
        assert 1 <= len(window.tokens) == len(window.labels) <= sequence_length
        for index in np.flatnonzero(window.labels != IGNORED_LABEL):
            scored.append(window.labels[index])
            assert window.labels[index] == window.tokens[index] + 1
            assert index + 1 >= min(window.labels[index], sequence_length - sequence_length // 2)
    assert scored == list(range(1, length))


@given(length=st.integers(2, 200), sequence_length=st.integers(1, 40))
def test_masked_windows_score_each_token_once_with_context_on_both_sides(
    length: int, sequence_length: int
) -> None:
    tokens = np.arange(length)
    scored = []
    for window in masked_windows(tokens, tokens, sequence_length):
        assert 1 <= len(window.tokens) == len(window.labels) <= sequence_length
        for index in np.flatnonzero(window.labels != IGNORED_LABEL):
            place = window.labels[index]
            scored.append(place)
            assert place == window.tokens[index]
            assert index >= min(place, sequence_length // 4)
            assert len(window.tokens) - 1 - index >= min(length - 1 - place, sequence_length // 4 - 1)
    assert scored == list(range(length))


def test_documents_are_scored_whole(tmp_path: Path) -> None:
    corpus, model = Corpus(write_corpus(tmp_path)), decoder()
    documents = list(corpus_documents(corpus))
    result = score_documents(
        model, documents, sequence_length=80, micro_batch_sequences=3, device=torch.device("cpu")
    )
    for name, index in (("books", 0), ("code", 1)):
        mine = documents[index::2]
        expected = [value for document in mine for value in nll(model, document.tokens)]
        scores = result.sources[name]
        assert (scores.documents, scores.tokens) == (len(mine), len(expected))
        assert scores.text_bytes == sum(3 * (length - 2) + 1 for length in LENGTHS[index::2])
        assert scores.loss == pytest.approx(np.mean(expected), rel=1e-6)
        assert scores.bits_per_byte == pytest.approx(
            sum(expected) / math.log(2) / scores.text_bytes, rel=1e-6
        )
    parts = result.sources.values()
    assert result.overall.tokens == sum(part.tokens for part in parts)
    assert result.overall.text_bytes == sum(part.text_bytes for part in parts)
    assert result.overall.documents == len(LENGTHS)
    assert result.overall.loss == pytest.approx(
        sum(part.loss * part.tokens for part in parts) / result.overall.tokens
    )


@pytest.mark.parametrize("sequence_length", [80, 10])
def test_only_targets_of_documents_are_scored(tmp_path: Path, sequence_length: int) -> None:
    corpus, model = Corpus(write_corpus(tmp_path / "b", share=0.3)), decoder()
    scored = list(corpus_documents(corpus))
    device = torch.device("cpu")
    arguments = {"sequence_length": sequence_length, "micro_batch_sequences": 3, "device": device}
    found = score_documents(model, scored, **arguments).overall
    everything = [d._replace(is_target=None) for d in scored]
    before = [
        d._replace(is_target=np.arange(len(d.tokens)) < first_target(len(d.tokens), 0.3)) for d in scored
    ]
    whole, rest = (score_documents(model, some, **arguments).overall for some in (everything, before))
    assert found.tokens == sum(length - first_target(length, 0.3) for length in LENGTHS)
    assert found.tokens + rest.tokens == whole.tokens
    nats = found.loss * found.tokens
    assert nats + rest.loss * rest.tokens == pytest.approx(whole.loss * whole.tokens, rel=1e-6)
    assert abs(found.loss - rest.loss) > 0.05
    assert found.text_bytes == 5 * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.text_bytes)
    if sequence_length == 80:  # all of each document before a target is seen
        expected = [v for d in scored for v in nll(model, d.tokens)[first_target(len(d.tokens), 0.3) - 1 :]]
        assert found.loss == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_long_document_is_scored_in_overlapping_windows(tmp_path: Path) -> None:
    """With 10-token windows every 5 tokens: the first scores 10 labels, each later one its last 5."""
    model = decoder()
    tokens = np.random.default_rng(1).integers(4, 64, 133)
    result = score_documents(
        model,
        [TokenDocument("x", tokens, 100)],
        sequence_length=10,
        micro_batch_sequences=1,
        device=torch.device("cpu"),
    )
    expected = nll(model, tokens[:11])
    for start in range(5, 130, 5):
        expected += nll(model, tokens[start : start + 11])[5:]
    assert len(expected) == result.overall.tokens == 132
    assert result.overall.loss == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_uniform_model_has_the_loss_of_a_uniform_guess() -> None:
    model = decoder()
    torch.nn.init.zeros_(model.head.weight)
    documents = [TokenDocument("x", np.arange(1, length), length) for length in (5, 30)]
    scores = score_documents(
        model, documents, sequence_length=8, micro_batch_sequences=4, device=torch.device("cpu")
    ).overall
    assert scores.loss == pytest.approx(math.log(64))
    assert scores.perplexity == pytest.approx(64, rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(6 * (3 + 28) / 35)


def test_documents_come_back_from_a_corpus(tmp_path: Path) -> None:
    """Pieces that straddle chunks are joined; some documents here span three chunks of 32."""
    lengths = [70, 2, 32, 30, 100, 2]
    found = list(corpus_documents(Corpus(write_corpus(tmp_path, lengths, chunk_tokens=32))))
    assert [len(document.tokens) for document in found] == lengths
    assert all(d.tokens[0] == 1 and d.tokens[-1] == 2 and 1 not in d.tokens[1:] for d in found)
    assert [document.source for document in found] == ["books", "code"] * 3
    assert [document.text_bytes for document in found] == [3 * (length - 2) + 1 for length in lengths]


def test_a_source_without_targets_has_no_scores() -> None:
    """It has no mean, so it is neither a row of the table nor a division by zero."""
    tokens, nothing = np.arange(1, 20), np.zeros(19, np.bool_)
    masked = TokenDocument("code", tokens, 40, nothing, 0)
    arguments = {"sequence_length": 8, "micro_batch_sequences": 4, "device": torch.device("cpu")}
    result = score_documents(decoder(), [TokenDocument("books", tokens, 40), masked], **arguments)
    alone = score_documents(decoder(), [TokenDocument("books", tokens, 40)], **arguments)
    assert result.sources == alone.sources
    assert (result.overall.loss, result.overall.tokens) == (alone.overall.loss, 18)
    with pytest.raises(ConfigError, match="excludes every token"):
        score_documents(decoder(), [masked], **arguments)


def test_heldout_text_is_checked_for_a_token_to_predict(tmp_path: Path) -> None:
    """The first token that counts is the 70th, which is in the fifth sequence and the second chunk."""
    corpus = Corpus(write_corpus(tmp_path, [70, 9], share=0.01))
    arguments = {"sequence_length": 16, "document_masking": True}
    for enough in (None, 5):
        check_heldout(corpus, max_sequences=enough, **arguments)
    with pytest.raises(
        ConfigError, match=r"evaluation\.manifest=.* no token to predict in its first 4 sequences"
    ):
        check_heldout(corpus, max_sequences=4, **arguments)


def test_no_documents_is_an_error() -> None:
    with pytest.raises(ValueError, match="no documents"):
        score_documents(decoder(), [], sequence_length=8, micro_batch_sequences=1, device=torch.device("cpu"))


# --- a run as its readers see it ---


def test_a_trained_model_is_read_back(tmp_path: Path) -> None:
    expected = make_run(tmp_path / "run", replace(SMALL, tie_embeddings=True))
    trained = load_trained(tmp_path / "run")
    model = trained.decoder(torch.device("cpu"), torch.float32)
    tokens = torch.tensor([[1, 5, 9, 200]])
    assert torch.equal(model.logits(tokens), expected.logits(tokens))
    tokens = trained.config.global_batch_sequences * trained.config.data.sequence_length
    assert (trained.step, trained.tokens_seen) == (3, 3 * tokens)
    assert trained.tokenizer.decode(trained.tokenizer.encode("a good wife")) == "a good wife"


def test_a_run_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.model"
    train_tokenizer(path, vocab_size=380)
    with pytest.raises(ConfigError, match=r"put back the tokenizer\.model"):
        load_trained(tmp_path / "run")
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trained(tmp_path / "run")


def test_a_missing_step_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="of step 4"):
        load_trained(tmp_path / "run", step=4)


# --- launch/eval.py ---

LINES = [
    {"text": "It is a truth universally acknowledged.", "source": "novels"},
    {"text": "道可道,非常道。" * 20, "source": "classics"},
    {"text": "However little known the feelings of such a man may be.", "source": "novels"},
]


def write_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_the_script_scores_text_and_corpora_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a person runs it: on JSONL, and on the same documents as a prepared corpus."""
    make_run(tmp_path / "run")
    text = write_lines(tmp_path / "held.jsonl")
    tokenizer = load_trained(tmp_path / "run").tokenizer
    writer = CorpusWriter(
        tmp_path / "corpus",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=1,
        eos_id=2,
        chunk_tokens=32,
        sources=["novels", "classics"],
    )
    for number, line in enumerate(LINES):
        tokens = tokenizer.encode_document(line["text"])
        size = len(line["text"].encode())
        writer.add_document(tokens, source=line["source"], document_id=str(number), text_bytes=size)
    writer.finish()
    done = run_script("eval", f"run_dir={tmp_path / 'run'}", f"input=[{text}]", "--json")
    assert done.returncode == 0, done.stderr
    assert "novels" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["step"], found["documents"]) == (3, 3)
    assert found["sources"]["novels"]["documents"] == 2
    assert found["text_bytes"] == sum(len(line["text"].encode()) for line in LINES)
    evaluate_script = script("eval")
    evaluate_script.main(
        evaluate_script.EvalConfig(run_dir=str(tmp_path / "run"), input=[str(tmp_path / "corpus")], json=True)
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_a_text_scores_alike_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, from Windows, from macOS, with a byte-order mark, and with characters that no text has."""
    make_run(tmp_path / "run")
    text = "A man went out.\nCaf\u00e9 \u9053, and so on.\n"
    forms = {
        "lf.jsonl": text,
        "crlf.jsonl": text.replace("\n", "\r\n"),
        "nfd.jsonl": unicodedata.normalize("NFD", text),
        "surrogate.jsonl": text.replace("out", "o\ud83dut"),
        "control.jsonl": text.replace("out", "o\x07ut"),
    }
    for name, form in forms.items():
        (tmp_path / name).write_text(json.dumps({"text": form}) + "\n")
    (tmp_path / "bom.txt").write_text("\ufeff" + text, encoding="utf-8")
    evaluate_script = script("eval")
    found = []
    for name in [*forms, "bom.txt"]:
        options = {"run_dir": str(tmp_path / "run"), "input": [str(tmp_path / name)], "json": True}
        evaluate_script.main(evaluate_script.EvalConfig(**options))
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [scores["tokens"] for scores in found] == [found[0]["tokens"]] * len(found)
    assert [scores["bits_per_byte"] for scores in found] == [found[0]["bits_per_byte"]] * len(found)


def test_the_script_reads_no_more_than_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "texts").mkdir()
    write_lines(tmp_path / "texts" / "a.jsonl")
    write_lines(tmp_path / "texts" / "b.jsonl")
    (tmp_path / "texts" / "c.txt").write_text("one document")
    evaluate_script = script("eval")
    for limit, documents in ((None, 7), (2, 2), (4, 4)):
        evaluate_script.main(
            evaluate_script.EvalConfig(
                run_dir=str(tmp_path / "run"), input=[str(tmp_path / "texts")], max_documents=limit, json=True
            )
        )
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == documents


@given(max_tokens=st.integers(2, sum(LENGTHS) + 10))
def test_the_bound_on_tokens_is_exact(max_tokens: int) -> None:
    """Whole documents and the beginning of one more, unless that would be a BOS alone."""
    documents = [TokenDocument("books", np.arange(n) + 4, 3 * n) for n in LENGTHS]
    found = list(first_tokens(documents, max_tokens))
    stream = np.concatenate([document.tokens for document in documents])[:max_tokens]
    got = np.concatenate([document.tokens for document in found])
    alone = len(got) == len(stream) - 1
    assert np.array_equal(got, stream[:-1] if alone else stream)
    assert not alone or max_tokens in np.cumsum(LENGTHS) + 1
    assert all(document == whole for document, whole in zip(found[:-1], documents, strict=False))
    assert sum(document.text_bytes for document in found) == 3 * len(got)


def test_the_bound_on_tokens_with_a_loss_mask(tmp_path: Path) -> None:
    """Bytes of targets go with the targets that are left; a beginning without any is left out."""
    documents = list(corpus_documents(Corpus(write_corpus(tmp_path, share=0.5))))
    assert documents[1].is_target is not None and not documents[1].is_target[:20].any()  # of 40
    [first, second] = first_tokens(documents, 3 + 30)
    assert first == documents[0]
    assert (second.target_bytes, documents[1].target_bytes) == (50, 100)
    assert [d.source for d in first_tokens(documents, 3 + 20)] == ["books"]
    with pytest.raises(ConfigError, match="max_tokens=20 ends before the first token that counts"):
        list(first_tokens(documents[1:], 20))


def test_the_script_scores_as_many_tokens_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so: below the table and in the JSON."""
    make_run(tmp_path / "run")
    text = write_lines(tmp_path / "held.jsonl")
    evaluate_script = script("eval")

    def printed(max_tokens: int | None) -> str:
        arguments = {"run_dir": str(tmp_path / "run"), "input": [str(text)], "json": True}
        evaluate_script.main(evaluate_script.EvalConfig(**arguments, max_tokens=max_tokens))
        return capsys.readouterr().out

    everything, part = printed(None), printed(20)
    assert "of each input at most 20 tokens" in part and "at most" not in everything
    whole, found = (json.loads(output.splitlines()[-1]) for output in (everything, part))
    assert (whole["max_tokens"], found["max_tokens"]) == (None, 20)
    assert found["tokens"] == 20 - found["documents"] < whole["tokens"]  # all but BOS


def test_the_script_refuses_what_does_not_fit(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    evaluate_script = script("eval")
    text = str(write_lines(tmp_path / "held.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"txt": "no text here"}\n')
    other = str(write_corpus(tmp_path / "other"))
    run_dir = str(tmp_path / "run")
    for run, entry, message in (
        (run_dir, "nowhere.jsonl", "nowhere.jsonl does not exist"),
        (run_dir, str(tmp_path / "empty.jsonl"), "holds no record"),
        (run_dir, str(tmp_path / "broken.jsonl"), "no field 'text'"),
        (run_dir, other, "different tokenizer"),
        (str(tmp_path), text, "no usable checkpoint"),
        (str(tmp_path / "nowhere"), text, "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_script.main(evaluate_script.EvalConfig(run_dir=run, input=[entry]))
    done = run_script("eval", f"run_dir={run_dir}", "input=[nowhere.jsonl]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: input=nowhere.jsonl does not exist\n"


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
