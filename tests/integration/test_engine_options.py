"""Where stage 3 keeps its partitions: an optimizer on NVMe, and a second copy of the parameters (hpZ)."""

from __future__ import annotations

import ctypes.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint import tensors as checkpoint
from support.checkpoints import assert_same_state
from support.launching import run_ranks
from support.workers.engine_worker import losses

STEPS = 3
# A rank's part of a sub-group must be 1 MiB at least to be moved to a file; and no parameter stays gathered, so that
# each is gathered again for the backward pass.
WIDE = ["model.d_model=128", "model.d_ff=640", "engine.max_live_elements=1"]
VARIANTS = {
    "plain": [],
    "host": ["engine.offload_optimizer=true", "engine.offload_params=true"],
    "nvme": ["engine.offload_optimizer=true", "engine.offload_params=true", "engine.nvme_path={root}"],
    "nvme-muon": ["optim=muon", "engine.offload_optimizer=true", "engine.nvme_path={root}"],
    "hpz": ["engine.hpz_partition_ranks=2"],
}

pytestmark = pytest.mark.integration
IN_MEMORY, ON_NVME = ("plain", "host", "hpz"), ("nvme", "nvme-muon")
# DeepSpeed compiles its reader and writer of NVMe for the first engine that has one, which takes many minutes.
NVME_CASES = [pytest.param(name, marks=pytest.mark.long) for name in ON_NVME]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with the runs of these variants on 2 ranks: all steps straight, and the first, saved, loaded and the
    others. Those in memory run together, and so do those on NVMe."""
    root = tmp_path_factory.mktemp("options")
    (root / "nvme").mkdir()
    done: set[tuple[str, ...]] = set()

    def runs_of(*names: str) -> Path:
        for group in (IN_MEMORY, ON_NVME):
            if group not in done and not set(group).isdisjoint(names):
                done.add(group)
                train(group, root)
        return root

    return runs_of


def train(names: tuple[str, ...], root: Path) -> None:
    if names == ON_NVME and not ctypes.util.find_library("aio"):
        pytest.skip("libaio is not installed (tests/install_system.sh)")
    jobs = []
    for name in names:
        overrides = WIDE + [word.format(root=root / "nvme") for word in VARIANTS[name]]
        first = str(checkpoint.checkpoint_path(root / f"first-{name}", 1))
        for kind, more in {
            "straight": {"steps": STEPS},
            "first": {"steps": 1},
            "resumed": {"steps": STEPS - 1, "load": first, "before_load": 1},
        }.items():
            where = {"save": str(root / f"{kind}-{name}"), "out": str(root / f"{kind}-{name}.json")}
            jobs.append({"stage": 3, "precision": "bf16", "overrides": overrides, **more, **where})
    log_dir = root / f"logs-{names[0]}"
    run_ranks(2, "tests/support/workers/engine_worker.py", json.dumps(jobs), log_dir=log_dir, timeout_s=1800)


@pytest.mark.parametrize("name", [*IN_MEMORY, *NVME_CASES])
def test_resume_is_bit_identical(trained: Callable[..., Path], name: str) -> None:
    root = trained(name)
    assert losses(root, f"first-{name}") + losses(root, f"resumed-{name}") == losses(root, f"straight-{name}")
    straight, resumed = root / f"straight-{name}", root / f"resumed-{name}"
    assert_same_state(checkpoint.checkpoint_path(straight, STEPS), checkpoint.checkpoint_path(resumed, STEPS))


@pytest.mark.parametrize(
    ("name", "same"), [("hpz", "plain"), pytest.param("nvme", "host", marks=pytest.mark.long)]
)
def test_where_partitions_are_kept_changes_nothing(
    trained: Callable[..., Path], name: str, same: str
) -> None:
    root = trained(name, same)
    assert losses(root, f"straight-{name}") == losses(root, f"straight-{same}")
    one, other = (checkpoint.checkpoint_path(root / f"straight-{kept}", STEPS) for kept in (name, same))
    assert_same_state(one, other)


def test_parameters_are_held_twice(trained: Callable[..., Path]) -> None:
    """After a forward pass; else the two runs above would agree for nothing."""
    root = trained("plain", "hpz")
    copies = {
        name: json.loads((root / f"straight-{name}.json").read_text())["second_copies"]
        for name in ("plain", "hpz")
    }
    assert copies["plain"] == 0
    assert copies["hpz"] >= 2 * 7  # each matrix of the blocks


@pytest.mark.parametrize("name", NVME_CASES)
def test_the_optimizer_is_in_files_while_training_and_they_go_at_the_end(
    trained: Callable[..., Path], name: str
) -> None:
    root = trained(name)
    files = json.loads((root / f"straight-{name}.json").read_text())["files"]
    assert any("momentum_buffer" in file if "muon" in name else "exp_avg_sq" in file for file in files)
    assert list((root / "nvme").iterdir()) == []
