"""Waits for runs of launch/train.py, and compares their results bit by bit."""

from __future__ import annotations

import time
from pathlib import Path

from pretrain.checkpoint import tensors as checkpoint
from pretrain.reliability.journal import read_ledger, read_metrics
from support.checkpoints import assert_same_state
from support.launching import Ranks
from support.tiny import GLOBAL_BATCH, TinyCorpus, run_arguments

TRAIN = "launch/train.py"
N_STEPS = 12


def losses(run_dir: Path) -> list[str]:
    """The loss of each step as a hexadecimal float, so that equal texts mean identical bits."""
    return [record["loss"].hex() for record in read_metrics(run_dir)]


def samples_by_step(run_dir: Path) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for entry in read_ledger(run_dir):
        steps.setdefault(entry["step"], []).extend(entry["samples"])
    return {step: sorted(samples) for step, samples in steps.items()}


def assert_each_sample_once(run_dir: Path) -> None:
    steps = samples_by_step(run_dir)
    assert sorted(steps) == list(range(1, N_STEPS + 1))
    assert [s for step in sorted(steps) for s in steps[step]] == list(range(N_STEPS * GLOBAL_BATCH))


def assert_equals_undisturbed(run_dir: Path, straight: Path) -> None:
    """Check that losses, parameters and moments are identical to the bit, and samples and tokens are the same."""
    assert losses(run_dir) == losses(straight)
    assert_same_state(
        checkpoint.checkpoint_path(run_dir, N_STEPS), checkpoint.checkpoint_path(straight, N_STEPS)
    )
    assert_each_sample_once(run_dir)
    ours, theirs = read_ledger(run_dir), read_ledger(straight)
    assert [e["tokens_xxh3"] for e in ours] == [e["tokens_xxh3"] for e in theirs]


def wait_for(condition, ranks: Ranks, timeout_s: float = 120, poll_s: float = 0.01) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen\n{ranks.output()}"
        assert all(p.poll() is None for p in ranks.processes), f"a rank ended early\n{ranks.output()}"
        time.sleep(poll_s)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


# 4 steps of 8 x 64 tokens, then 4 of 4 x 128, then 4 of 8 x 128, so the batch in sequences gets smaller and larger.
STAGES = (
    "data.stages=[{start_tokens: 2048, sequence_length: 128, global_batch_sequences: 4}, "
    "{start_tokens: 4096, global_batch_sequences: 8}]"
)


def staged(corpus: TinyCorpus, run_dir: Path, *more: str) -> list[str]:
    return run_arguments(corpus, run_dir, STAGES, "data.packing=best_fit", "data.lanes=4", *more)
