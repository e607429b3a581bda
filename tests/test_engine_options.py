"""Where stage 3 keeps its partitions: an optimizer on NVMe, and a second copy of the parameters (hpZ)."""

from __future__ import annotations

import ctypes.util
import json
from pathlib import Path

import pytest
from launching import run_ranks
from test_engine import assert_same_state, losses

from pretrain import checkpoint

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

# Long: DeepSpeed compiles its reader and writer of NVMe for the first engine that has one, which takes minutes.
pytestmark = [pytest.mark.integration, pytest.mark.long]
ON_NVME = ("nvme", "nvme-muon")


def needs_libaio(name: str) -> None:
    if name in ON_NVME and not ctypes.util.find_library("aio"):
        pytest.skip("libaio is not installed (tests/install_system.sh)")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant on 2 ranks: all steps straight, and the first, saved, loaded and the others."""
    root = tmp_path_factory.mktemp("options")
    (root / "nvme").mkdir()
    jobs = []
    for name, words in VARIANTS.items():
        if name in ON_NVME and not ctypes.util.find_library("aio"):
            continue
        overrides = WIDE + [word.format(root=root / "nvme") for word in words]
        first = str(checkpoint.checkpoint_path(root / f"first-{name}", 1))
        for kind, more in {
            "straight": {"steps": STEPS},
            "first": {"steps": 1},
            "resumed": {"steps": STEPS - 1, "load": first, "before_load": 1},
        }.items():
            where = {"save": str(root / f"{kind}-{name}"), "out": str(root / f"{kind}-{name}.json")}
            jobs.append({"stage": 3, "precision": "bf16", "overrides": overrides, **more, **where})
    run_ranks(
        2, "tests/engine_worker.py", json.dumps(jobs), log_dir=root / "logs", timeout_s=900
    )  # compiles once
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_bit_identical(trained: Path, name: str) -> None:
    needs_libaio(name)
    assert losses(trained, f"first-{name}") + losses(trained, f"resumed-{name}") == losses(
        trained, f"straight-{name}"
    )
    straight, resumed = trained / f"straight-{name}", trained / f"resumed-{name}"
    assert_same_state(checkpoint.checkpoint_path(straight, STEPS), checkpoint.checkpoint_path(resumed, STEPS))


@pytest.mark.parametrize(("name", "same"), [("hpz", "plain"), ("nvme", "host")])
def test_where_partitions_are_kept_changes_nothing(trained: Path, name: str, same: str) -> None:
    needs_libaio(name)
    assert losses(trained, f"straight-{name}") == losses(trained, f"straight-{same}")
    one, other = (checkpoint.checkpoint_path(trained / f"straight-{kept}", STEPS) for kept in (name, same))
    assert_same_state(one, other)


def test_parameters_are_held_twice(trained: Path) -> None:
    """After a forward pass; else the two runs above would agree for nothing."""
    copies = {
        name: json.loads((trained / f"straight-{name}.json").read_text())["second_copies"]
        for name in ("plain", "hpz")
    }
    assert copies["plain"] == 0
    assert copies["hpz"] >= 2 * 7  # each matrix of the blocks


@pytest.mark.parametrize("name", ON_NVME)
def test_the_optimizer_is_in_files_while_training_and_they_go_at_the_end(trained: Path, name: str) -> None:
    needs_libaio(name)
    files = json.loads((trained / f"straight-{name}.json").read_text())["files"]
    assert any("momentum_buffer" in file if "muon" in name else "exp_avg_sq" in file for file in files)
    assert list((trained / "nvme").iterdir()) == []
