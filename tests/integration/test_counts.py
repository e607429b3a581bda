"""What a step moves between ranks, counted exactly: no clock, so that noise of the machine cannot hide a regression.

tests/support/counts.json has for each ZeRO stage every collective of one step of a small model on 2 ranks, by phase. It
changes on purpose only: `python tests/integration/test_counts.py` counts again and writes it, and the change is to be
read in the diff. What must hold of it whatever the implementation, the bytes, is spelled out below.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
import torch.distributed as dist

from benchmarks.harness.collectives import Kind, Traffic, counted, watch
from pretrain.arithmetic import count_parameters
from support.launching import run_ranks
from support.workers.engine_worker import small_config

TABLE = ROOT / "tests/support/counts.json"
STAGES = {"zero0": (0, "fp32"), "zero1": (1, "bf16"), "zero2": (2, "bf16"), "zero3": (3, "bf16")}
# Nothing is kept between the passes, so that stage 3 shows each gather.
OVERRIDES = ["engine.max_live_elements=1", "engine.prefetch_bucket_elements=1", "model.attention_bias=false"]
RANKS = 2

Counts = dict[str, list[list]]
"""Stage -> [phase, collective, dtype, calls, bytes of whole tensors] of one step on rank 0."""


def count(folder: Path) -> Counts:
    jobs = [
        {"stage": stage, "precision": precision, "overrides": OVERRIDES, "out": str(folder / name)}
        for name, (stage, precision) in STAGES.items()
    ]
    run_ranks(RANKS, "tests/support/workers/plan_worker.py", json.dumps(jobs), log_dir=folder / "logs")
    return {name: json.loads((folder / f"{name}.0.json").read_text())["kinds"] for name in STAGES}


def written(counts: Counts) -> str:
    stages = [
        f'"{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]"
        for name, rows in counts.items()
    ]
    return "{\n " + ",\n ".join(stages) + "\n}\n"


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    return count(tmp_path_factory.mktemp("counts"))


@pytest.mark.integration
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_what_the_table_says(counts: Counts, stage: str) -> None:
    assert counts[stage] == json.loads(TABLE.read_text())[stage], (
        "is it on purpose? python tests/integration/test_counts.py"
    )


def moved(stage: str, phase: str, collective: str) -> int:
    """Bytes in the table, without losses and norms, which are a few bytes each."""
    rows = json.loads(TABLE.read_text())[stage]
    return sum(n for at, name, _, _, n in rows if (at, name) == (phase, collective) and n >= 100)


def calls(stage: str, phase: str, collective: str) -> int:
    rows = json.loads(TABLE.read_text())[stage]
    return sum(n for at, name, _, n, _ in rows if (at, name) == (phase, collective))


def test_bytes_follow_from_the_parameters() -> None:
    """P parameters of 2 bytes (stage 0: 4), N norm gains of them, A micro batches. Stages 0 and 1 all-reduce the
    gradients once per step, stage 2 after each micro batch; 1 and 2 gather the parameters after the update. Stage 3
    gathers all but the norms for each forward pass, and again for each backward pass, which finds the head still there;
    it scatters the gradients once per micro batch and gathers the norms after the update."""
    config = small_config(3, "bf16", OVERRIDES)
    model, accum = config.model, config.grad_accum_steps(RANKS)
    total = count_parameters(model)
    norms = (2 * model.n_layers + 1) * model.d_model
    head = model.vocab_size * model.d_model
    assert accum == 2
    assert moved("zero0", "update", "all_reduce") + moved("zero0", "backward", "all_reduce") == 4 * total
    assert moved("zero1", "update", "all_reduce") + moved("zero1", "backward", "all_reduce") == 2 * total
    assert moved("zero2", "backward", "all_reduce") == accum * 2 * total
    for stage in ("zero1", "zero2"):
        assert moved(stage, "update", "all_gather_into_tensor") == 2 * total
    assert moved("zero3", "forward", "all_gather_into_tensor") == accum * 2 * (total - norms)
    assert moved("zero3", "backward", "all_gather_into_tensor") == accum * 2 * (total - norms - head)
    assert moved("zero3", "backward", "reduce_scatter_tensor") == accum * 2 * total


def test_gathers_per_step_of_stage_3() -> None:
    """At most one per block, embedding and head in each pass of a micro batch: a block is gathered as a whole."""
    config = small_config(3, "bf16", OVERRIDES)
    most = config.grad_accum_steps(RANKS) * (config.model.n_layers + 2)
    assert 0 < calls("zero3", "forward", "all_gather_into_tensor") <= most
    assert 0 < calls("zero3", "backward", "all_gather_into_tensor") <= most


# ---- the counting itself ----


@pytest.fixture
def world_of_one() -> None:
    watch()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("world_of_one")
def test_each_collective_is_counted_once() -> None:
    """Torch 2.13 lets reduce_scatter_tensor call reduce_scatter_single; that is one collective, under either name."""
    whole, traffic = torch.ones(10), Traffic()
    dist.all_reduce(whole)  # not yet
    with counted(traffic):
        dist.reduce_scatter_tensor(torch.empty(10), whole)
        dist.all_gather_into_tensor(torch.empty(10, dtype=torch.int64), torch.ones(10, dtype=torch.int64))
        traffic.phase = "forward"
        dist.all_reduce(tensor=whole, async_op=True).wait()
    dist.all_reduce(whole)  # no more
    assert traffic.bytes == {
        Kind("", "reduce_scatter_tensor", "float32"): 40,
        Kind("", "all_gather_into_tensor", "int64"): 80,
        Kind("forward", "all_reduce", "float32"): 40,
    }
    assert set(traffic.calls.values()) == {1}
    assert traffic.by_kind(traffic.bytes)["all_reduce float32"] == 40
    assert traffic.seconds > 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        TABLE.write_text(written(count(Path(scratch))))
    print(TABLE.read_text(), end="")
