"""Fit the planner's constants on published runs of at most 64 GPUs: `python benchmarks/fit_planner.py`

Prints the constants for pretrain/plan/time.py, and the residuals by source: of the fitted runs, and of larger and other
runs that were not fitted. published_runs.csv has one row per run; docs/planning.md gives their sources.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.config import EngineConfig, ModelConfig, Recompute
from pretrain.plan.hardware import known_gpu
from pretrain.plan.memory import Partitioning, Pass
from pretrain.plan.time import CALIBRATIONS, Calibration, Cluster, step_time

RUNS = ROOT / "benchmarks" / "published_runs.csv"
# Constants that both devices share, because there are too few runs of each device to fit them separately.
SHARED = ("passes", "exposed_frac", "link_frac", "network_frac")
PER_GPU = ("matmul_frac", "attention_frac")
BOUNDS = {
    "passes": (0.0, 20.0),
    "exposed_frac": (0.0, 1.0),
    "link_frac": (0.1, 1.0),
    "network_frac": (0.1, 1.0),
    "matmul_frac": (0.3, 1.0),
    "attention_frac": (0.1, 1.0),
}


class Run(NamedTuple):
    """One published figure."""

    source: str
    fitted: bool
    model: ModelConfig
    engine: EngineConfig
    partitioning: Partitioning
    cluster: Cluster
    each: Pass
    accum_steps: int
    tokens_per_s_gpu: float
    parameters: int | None
    """Number of parameters as published."""


def read_runs() -> list[Run]:
    """All published runs. A feed-forward layer without a gate counts as a gated one with as many parameters."""
    with RUNS.open(newline="") as file:
        return [_run(row) for row in csv.DictReader(file)]


def _run(row: dict[str, str]) -> Run:
    n, gpu = int(row["gpus"]), known_gpu(row["gpu"])
    d_ff = int(row["d_ff"])
    model = ModelConfig(
        n_layers=int(row["n_layers"]),
        d_model=int(row["d_model"]),
        n_heads=int(row["n_heads"]),
        n_kv_heads=int(row["n_kv_heads"]),
        d_ff=d_ff if row["gated"] == "1" else round(2 * d_ff / 3),
        vocab_size=int(row["vocab"]),
        tie_embeddings=row["tied"] == "1",
        activation_checkpointing=Recompute.full if row["checkpointing"] == "full" else Recompute.none,
    )
    # FSDP keeps no parameter whole, and gathers all of them again for the backward pass.
    engine = EngineConfig(zero_stage=int(row["stage"]), persistence_threshold_elements=0, max_live_elements=0)
    nodes = max(1, n // 8)
    return Run(
        source=row["source"],
        fitted=row["use"] == "fit",
        model=model,
        engine=engine,
        partitioning=Partitioning(n_ranks=n, ranks_per_copy=int(row["shard_ranks"])),
        cluster=Cluster(
            gpu=gpu, nodes=nodes, gpus_per_node=n // nodes, nic_bits_per_s=float(row["nic_gbit"]) * 1e9
        ),
        each=Pass(sequences=int(row["micro"]), sequence_length=int(row["seq"]), masked=False),
        accum_steps=int(row["accum"]),
        tokens_per_s_gpu=float(row["tokens_per_s_gpu"]),
        parameters=int(row["parameters"]) if row["parameters"] else None,
    )


def residual(run: Run, constants: dict[str, Calibration]) -> float:
    """log(predicted / published) of the tokens per second. +0.1 means that the prediction is 10.5% too fast."""
    step = step_time(
        run.model,
        run.engine,
        run.partitioning,
        run.cluster,
        run.each,
        run.accum_steps,
        constants=constants[run.cluster.gpu.calibrated_as],
        host_s_per_block=0.0,  # this is the cost of DeepSpeed's hooks, which FSDP does not have
    )
    return math.log(step.tokens_per_second / run.cluster.n_ranks / run.tokens_per_s_gpu)


def spread(residuals: list[float]) -> tuple[float, float, float]:
    """Mean, root mean square and largest absolute value of the residuals."""
    square = statistics.fmean(r * r for r in residuals)
    return statistics.fmean(residuals), math.sqrt(square), max(abs(r) for r in residuals)


def fit(runs: list[Run], start: dict[str, Calibration]) -> dict[str, Calibration]:
    """Constants with the least squared residuals.

    They are fitted one at a time with halving steps, until none changes by more than 0.1%.
    """
    names = [(None, name) for name in SHARED] + [(gpu, name) for gpu in start for name in PER_GPU]

    def value(constants: dict[str, Calibration], which: tuple[str | None, str]) -> float:
        gpu, name = which
        return getattr(constants[gpu or next(iter(constants))], name)

    def loss(constants: dict[str, Calibration]) -> float:
        return statistics.fmean(residual(run, constants) ** 2 for run in runs)

    best, found = start, loss(start)
    step = dict.fromkeys(names, 0.3)
    while max(step.values()) > 1e-3:
        for which in names:
            for factor in (1 + step[which], 1 / (1 + step[which])):
                tried = _with(best, which, value(best, which) * factor)
                if (now := loss(tried)) < found:
                    best, found = tried, now
                    break
            else:
                step[which] /= 2
    return best


def _with(
    constants: dict[str, Calibration], which: tuple[str | None, str], value: float
) -> dict[str, Calibration]:
    gpu, name = which
    low, high = BOUNDS[name]
    value = min(high, max(low, value))
    return {key: replace(c, **{name: value}) if gpu in (None, key) else c for key, c in constants.items()}


def report(runs: list[Run], constants: dict[str, Calibration], say: Callable[[str], None] = print) -> None:
    """Print one line per group of runs."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        kind = "fitted" if run.fitted else "not fitted"
        gpus = "up to 64" if run.cluster.n_ranks <= 64 else "more than 64"
        groups.setdefault(f"{kind}: {run.source}, {run.cluster.gpu.name}, {gpus} GPUs", []).append(
            residual(run, constants)
        )
    for name in sorted(groups):
        mean, rms, most = spread(groups[name])
        say(f"{name}: {len(groups[name])} runs, mean {mean:+.3f}, rms {rms:.3f}, largest {most:.3f}")


def main() -> None:
    """Fit the constants, and print them and the residuals."""
    runs = read_runs()
    constants = fit([run for run in runs if run.fitted], CALIBRATIONS)
    for gpu, found in constants.items():
        print(gpu, found)
    report(runs, constants)


if __name__ == "__main__":
    main()
