"""Monitors and step records for tests of the files that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import TrainConfig, load_config
from pretrain.gpus import PeakFlops
from pretrain.monitor.monitor import Monitor, StepRecord

BASE = [
    "data.manifest=unused.json",
    "total_steps=200",
    "global_batch_sequences=32",
    "data.sequence_length=128",
]
TOKENS_PER_STEP = 32 * 128


def a_config(run_dir: Path, *overrides: str) -> TrainConfig:
    defaults = ["logging.wandb=disabled", "logging.every_steps=10", "engine.precision=fp32"]
    return load_config(TrainConfig, [f"run_dir='{run_dir}'", *BASE, *defaults, *overrides], "config")


def a_monitor(run_dir: Path, *overrides: str, **arguments: Any) -> Monitor:
    given = {"rank": 0, "world_size": 2, "attempt": 1, "wandb_run_id": "abcd1234", "first_step": 1}
    given |= {
        "flops_per_token": lambda length: 6e7,
        "peak_flops_per_second": PeakFlops(1e12, "measured peak"),
        "n_steps": 200,
    }
    return Monitor(a_config(run_dir, *overrides), run_dir=run_dir, **(given | arguments))


def a_record(step: int, **values: Any) -> StepRecord:
    given: dict[str, Any] = {"tokens_seen": step * TOKENS_PER_STEP, "samples_seen": step * 32, "loss": 3.0}
    given |= {"predicted_tokens": TOKENS_PER_STEP}
    given |= {"step_tokens": TOKENS_PER_STEP, "sequence_length": 128, "cut_documents_frac": 0.25}
    given |= {"padding_tokens": 0, "substituted_chunks": 0}
    given |= {"z_loss": None, "grad_norm": 0.83, "lr": 3e-4, "step_time_s": 0.25, "data_wait_s": 0.01}
    return StepRecord(step=step, **(given | {"skipped": False} | values))
