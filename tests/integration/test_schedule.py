"""Runs whose mixture, sequence length and batch change on the way, and runs that meet a damaged chunk."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import TrainConfig, load_config
from pretrain.corpus.shards import Corpus
from pretrain.data.loader import TrainLoader
from pretrain.reliability.journal import read_ledger, read_metrics
from support.launching import Ranks, run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.training import TRAIN, losses, samples_by_step, staged

pytestmark = pytest.mark.integration


def test_stages_are_trained_as_configured(corpus: TinyCorpus, staged_run: Path) -> None:
    records = read_metrics(staged_run)
    assert [r["step_tokens"] for r in records] == [512] * 8 + [1024] * 4
    assert [r["sequence_length"] for r in records] == [64] * 4 + [128] * 8
    assert records[-1]["tokens_seen"] == 8 * 512 + 4 * 1024
    assert records[-1]["samples_seen"] == 4 * 8 + 4 * 4 + 4 * 8
    assert [s for step in samples_by_step(staged_run).values() for s in step] == list(range(80))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert all(0 < r["cut_documents_frac"] <= 1 for r in records)
    assert all(r["padding_tokens"] <= 2 * 128 for r in records)
    manifest = Corpus(corpus.manifest).manifest
    epochs = {r["step"]: r["epochs/corpus"] for r in records if "epochs/corpus" in r}
    assert sorted(epochs) == [4, 8, 12]
    read = records[-1]["tokens_seen"] / manifest.n_tokens
    assert epochs[12] == pytest.approx(read, abs=1.5 / manifest.n_chunks)  # a short last chunk counts as one


def test_resuming_in_a_later_stage_is_bit_identical(
    corpus: TinyCorpus, staged_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for stop in (3, 6, 10):  # before the first change, between the two, after both
        arguments = staged(corpus, run_dir, f"stop_at_step={stop}")
        run_ranks(2, TRAIN, *arguments, log_dir=tmp_path / f"to-{stop}", expect=75)
    run_ranks(2, TRAIN, *staged(corpus, run_dir), log_dir=tmp_path / "last")
    assert losses(run_dir) == losses(staged_run)
    ours, theirs = read_ledger(run_dir), read_ledger(staged_run)
    assert [e["tokens_xxh3"] for e in ours] == [e["tokens_xxh3"] for e in theirs]


def test_another_number_of_ranks_reads_the_same(corpus: TinyCorpus, staged_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(2, TRAIN, *staged(corpus, run_dir, "stop_at_step=6"), log_dir=tmp_path / "two", expect=75)
    run_ranks(1, TRAIN, *staged(corpus, run_dir), log_dir=tmp_path / "one")
    assert samples_by_step(run_dir) == samples_by_step(staged_run)
    ours, theirs = ([r["loss"] for r in read_metrics(path)] for path in (run_dir, staged_run))
    assert ours[:6] == theirs[:6]
    assert ours == pytest.approx(theirs, abs=4e-3)  # bf16 sums in another order, as in test_engine


def test_the_batch_may_change_when_a_run_goes_on(corpus: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = run_arguments(corpus, run_dir, "stop_at_step=4")
    run_ranks(1, TRAIN, *arguments, log_dir=tmp_path / "first", expect=75)
    larger = run_arguments(corpus, run_dir, "global_batch_sequences=12")
    run_ranks(1, TRAIN, *larger, log_dir=tmp_path / "second")
    steps = samples_by_step(run_dir)
    assert [len(steps[step]) for step in range(1, 13)] == [8] * 4 + [12] * 8
    assert [s for step in range(1, 13) for s in steps[step]] == list(range(128))
    changed = [e["config_changed"] for e in events(run_dir) if e["event"] == "resumed"]
    assert changed == [["global_batch_sequences: 8 -> 12"]]
    printed = "".join(path.read_text() for path in (tmp_path / "second").iterdir())
    assert "\n  global_batch_sequences: 8 -> 12\n" in printed  # as a list, a key per line
    run_ranks(1, TRAIN, *larger, log_dir=tmp_path / "third")
    printed = "".join(path.read_text() for path in (tmp_path / "third").iterdir())
    assert "already finished at step 12" in printed and "has changed" not in printed


def test_a_damaged_chunk_is_substituted_and_recorded(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Two lanes, a chunk that rank 1 alone reads: both ranks' state has it, and a restart goes the same way."""
    damaged = TinyCorpus(Path(shutil.copytree(corpus.folder, tmp_path / "corpus")))
    policy = ["data.lanes=2", "data.on_bad_chunk=substitute"]
    victim = chunk_of_rank_1(damaged, run_arguments(damaged, tmp_path / "unused", *policy))
    corpus_file = Corpus(damaged.manifest)
    shard, row = corpus_file._locate(victim)
    with shard.path.open("r+b") as file:
        file.seek(int(shard.index[row, 0, 0]) + 10)
        file.write(b"\xff\xff")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(2, TRAIN, *run_arguments(damaged, whole, *policy), log_dir=tmp_path / "logs")
    (event,) = [e for e in events(whole) if e["event"] == "chunk_substituted"]
    assert (event["source"], event["epoch"], event["chunk"]) == ("corpus", 0, victim)
    assert event["substitute"] != victim
    assert f"{shard.path}: member {victim:06d}.tok has xxh3-64" in event["reason"]
    assert read_metrics(whole)[-1]["substituted_chunks"] == 1
    stop = run_arguments(damaged, halves, *policy, f"stop_at_step={event['step']}")
    run_ranks(2, TRAIN, *stop, log_dir=tmp_path / "first", expect=75)
    state = checkpoint.read_state(checkpoint.checkpoint_path(halves, event["step"]))
    assert [entry["chunk"] for entry in state["order"]["substitutions"]] == [victim]
    run_ranks(2, TRAIN, *run_arguments(damaged, halves, *policy), log_dir=tmp_path / "second")
    assert losses(halves) == losses(whole)
    assert len([e for e in events(halves) if e["event"] == "chunk_substituted"]) == 1


def chunk_of_rank_1(corpus: TinyCorpus, arguments: list[str]) -> int:
    """One of those that only rank 1 reads, in the first step."""
    config = load_config(TrainConfig, arguments, "config")
    loader = TrainLoader(
        config.data,
        config.seed,
        global_batch_sequences=config.global_batch_sequences,
        micro_batch_sequences=config.micro_batch_sequences,
        rank=1,
        world_size=2,
        total_steps=12,
        state=None,
    )
    first, end = loader.plan[1].first_sample, loader.plan[1].end_sample
    chunks = loader.order.locate(np.arange(first, end)).chunk
    mine = {int(c) for batch in next(loader.steps(1)) for c in loader.order.locate(batch.samples).chunk}
    others = {int(c) for c in chunks} - mine
    return min(mine - others)


def test_a_stage_that_has_begun_may_not_change(corpus: TinyCorpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(1, TRAIN, *staged(corpus, run_dir, "stop_at_step=6"), log_dir=tmp_path / "first", expect=75)
    with Ranks(1, TRAIN, *run_arguments(corpus, run_dir), log_dir=tmp_path / "second") as ranks:
        assert ranks.wait() == [2]
    assert "data.packing=concat was best_fit" in ranks.logs[0].read_text()
    assert "the stage that began after 2048 tokens is gone" in ranks.logs[0].read_text()
