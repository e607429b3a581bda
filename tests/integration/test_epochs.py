"""A run of whole epochs on packed dialogues whose mask leaves most steps nothing to predict, with real processes."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from pretrain.checkpoint import tensors as checkpoint
from pretrain.corpus.manifest import Packed
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.corpus.writer import CorpusWriter
from pretrain.data.history import ReadHistory
from pretrain.reliability.journal import read_metrics
from support.launching import Ranks, run_ranks
from support.tiny import SEQUENCE_LENGTH, TinyCorpus, events, python_documents, run_arguments
from support.training import TRAIN, samples_by_step, steps_done, wait_for

pytestmark = pytest.mark.integration

N_DOCUMENTS = 240
BATCH = 8


def masked(corpus: TinyCorpus, folder: Path, n_answers: int) -> TinyCorpus:
    """Whole documents of 20 to 60 tokens. Only the last four of `n_answers` of them, far apart, are targets."""
    folder.mkdir()
    shutil.copy(corpus.folder / "tokenizer.model", folder)
    tokenizer = Tokenizer.trusted(folder / "tokenizer.model")
    writer = CorpusWriter(
        folder,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        chunk_tokens=256,
        sources=["code"],
        loss_mask=True,
        packed=Packed(sequence_tokens=SEQUENCE_LENGTH, dropped_documents=3),
    )
    text = "".join(python_documents().values())
    for number in range(N_DOCUMENTS):
        n_tokens = 20 + number * 7 % 41
        tokens = [*tokenizer.encode_document(text[number * 1000 :][:1000])[: n_tokens - 1], tokenizer.eos_id]
        targets = [len(tokens) - 4, len(tokens)] if number % 40 == 0 and number < 40 * n_answers else []
        writer.add_document(tokens, source="code", document_id=str(number), text_bytes=1000, targets=targets)
    writer.finish()
    return TinyCorpus(folder)


def test_an_epoch_is_read_exactly_once_and_steps_without_targets_train_nothing(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Two ranks begin it and are killed, and one ends it. The last step has fewer sequences than the others."""
    text = masked(corpus, tmp_path / "corpus", n_answers=5)
    manifest = Corpus(text.manifest).manifest
    n_sequences = manifest.n_tokens // SEQUENCE_LENGTH
    n_steps = -(-n_sequences // BATCH)
    assert n_sequences % BATCH, "else the last step is no special one"
    run_dir = tmp_path / "run"
    epochs = ["total_steps=null", "total_epochs=1", "data.lanes=5", "logging.every_steps=1"]
    arguments = run_arguments(text, run_dir, *epochs, "evaluation.manifest=null")
    guard = ["loss_guard.spike_sigmas=1000", "loss_guard.window_steps=2"]
    with Ranks(2, TRAIN, *arguments, *guard, log_dir=tmp_path / "first") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 9, ranks)
        for process in ranks.processes:
            process.kill()
        ranks.wait()
    run_ranks(1, TRAIN, *arguments, *guard, log_dir=tmp_path / "second")

    steps = samples_by_step(run_dir)
    assert [s for step in sorted(steps) for s in steps[step]] == list(range(n_sequences))
    (finished,) = [event for event in events(run_dir) if event["event"] == "finished"]
    assert finished["step"] == len(steps) == n_steps
    records = read_metrics(run_dir)
    assert records[-1]["samples_seen"] == n_sequences
    assert records[-1]["tokens_seen"] == n_sequences * SEQUENCE_LENGTH
    assert records[-1]["epochs/corpus"] == 1.0
    assert sum(record["padding_tokens"] for record in records) == manifest.filler_tokens > 0
    assert all(record["cut_documents_frac"] == 0 for record in records)
    packed = {"sequence_tokens": SEQUENCE_LENGTH, "dropped_documents": 3, "cut_documents": 0}
    packed["filler_frac"] = manifest.filler_tokens / manifest.n_tokens
    begun = [event for event in events(run_dir) if event["event"] in ("started", "resumed")]
    assert [event["packed"] for event in begun] == [{"corpus": packed}] * 2
    nothing = [record for record in records if record["predicted_tokens"] == 0]
    trained = [record for record in records if record["predicted_tokens"] > 0]
    assert len(nothing) > n_steps // 3 and len(trained) >= 3
    assert sum(record["predicted_tokens"] for record in trained) == 5 * 4
    assert all(
        r["loss"] is r["grad_norm"] is r["tokens_per_second"] is None and r["skipped"] for r in nothing
    )
    assert all(r["loss"] > 1 and r["grad_norm"] > 0 and not r["skipped"] for r in trained)
    state = checkpoint.read_state(checkpoint.checkpoint_path(run_dir, n_steps))
    assert state["optimizer_step"] == len(trained)
    assert state["loss_guard"]["losses"] == [record["loss"] for record in trained][-2:]
    history, _ = ReadHistory.of_run(run_dir)
    of_ranks = [history.read_in(n_steps, rank, world_size=2) for rank in (0, 1)]
    assert sum(map(len, of_ranks)) == len(history.read_in(n_steps)) == len(steps[n_steps])
    read = [piece for step in steps for row in history.read_in(step) for piece in row.pieces]
    assert Counter(piece.document for piece in read) == Counter(map(str, range(N_DOCUMENTS)))


@pytest.mark.long  # test_evaluate.py has the check alone
def test_a_heldout_text_with_nothing_to_predict_is_refused_before_training(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    heldout = masked(corpus, tmp_path / "heldout", n_answers=0)
    arguments = run_arguments(corpus, tmp_path / "run", f"evaluation.manifest={heldout.manifest}")
    with Ranks(1, TRAIN, *arguments, log_dir=tmp_path / "logs") as ranks:
        assert ranks.wait() == [2]
        assert f"evaluation.manifest={heldout.manifest} has no token to predict" in ranks.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
