"""Which device a run uses. There is no GPU here: stand-ins are nvidia-smi (a script), torch.cuda's answers and /dev."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain import device
from pretrain.device import Place, device_problem, device_type, joint_problem, own_device, rank_place
from pretrain.errors import ConfigError
from support import ROOT
from support.launching import Ranks
from support.stand_ins import write_nvidia_smi
from support.tiny import TinyCorpus, events, run_arguments

ON_PURPOSE = "to train on the CPU on purpose, set DS_ACCELERATOR=cpu"


@pytest.fixture(autouse=True)
def nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process whose user set nothing; other tests' engines set DS_ACCELERATOR."""
    monkeypatch.setattr(device, "ASKED", None)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand-ins: `gpus` that torch can use, what `nvidia-smi` says, the `cuda` that torch is for, `/dev` files."""

    def pretend(
        gpus: int = 0,
        smi: str | None = None,
        status: int = 0,
        cuda: str | None = "13.0",
        files: int = 0,
        says: str = "",
    ) -> None:
        def run(command: list[str], **_: object) -> SimpleNamespace:
            if smi is None:
                raise FileNotFoundError(command[0])
            return SimpleNamespace(returncode=status, stdout=smi)

        def init() -> None:
            if says:
                raise RuntimeError(says)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}")
        )
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(device, "glob", lambda _: [f"/dev/nvidia{n}" for n in range(files)])
        monkeypatch.setattr(subprocess, "run", run)

    return pretend


# --- one process ---


def test_no_gpu_is_the_cpu(pretend: Callable[..., None]) -> None:
    for cuda in ("13.0", None):  # also with a build for CUDA
        pretend(cuda=cuda)
        assert own_device() == torch.device("cpu")


def test_a_gpu_that_works_is_used(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(gpus=2, smi="580.65.06\n")
    assert own_device() == torch.device("cuda")
    monkeypatch.setattr(device, "ASKED", "cuda")
    assert own_device() == torch.device("cuda")


def test_the_cpu_of_a_machine_with_gpus(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DS_ACCELERATOR=cpu: whatever asks follows, also where torch could use the GPU or is not able to."""
    monkeypatch.setattr(device, "ASKED", "cpu")
    for gpus in (2, 0):
        pretend(gpus=gpus, smi="535.161.08\n", files=2)
        assert device_type() == "cpu"
        assert own_device() == torch.device("cpu")
        assert rank_place().device == "cpu"
        assert device_problem() is None


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_on_purpose(
    value: str, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(smi="580.65.06\n", files=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert own_device() == torch.device("cpu")


def test_a_job_without_gpus_on_a_node_that_has_some(pretend: Callable[..., None]) -> None:
    """Slurm's cgroups: the device files are there, and cannot be opened."""
    pretend(smi="No devices were found\n", status=6, files=8)
    assert own_device() == torch.device("cpu")


OLD_DRIVER = {"smi": "535.161.08\n535.161.08\n"}
NO_FABRIC = "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"smi": "580.65.06\n", "cuda": None},
            ["CPU build", "PRETRAIN_TORCH=cuda bash launch/setup_env.sh"],
        ),
        (
            OLD_DRIVER,
            ["driver has version 535", "CUDA 13.0 needs 580 or newer", "or install torch for CUDA 12.6"],
        ),
        ({"smi": "470.82\n"}, ["version 470", "needs 580 or newer; update the driver;"]),
        ({"smi": "515.65\n", "cuda": "12.6"}, ["version 515", "CUDA 12.6 needs 525 or newer"]),
        ({"smi": "580.65.06\n", "says": NO_FABRIC}, [f"torch says: {NO_FABRIC}"]),
        ({"smi": "NVIDIA-SMI has failed", "status": 9, "files": 1, "says": "none"}, ["torch says: none"]),
        ({"files": 1, "says": "no driver"}, ["has an NVIDIA GPU", "torch says: no driver"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_one_sentence(
    facts: dict[str, object], words: list[str], pretend: Callable[..., None]
) -> None:
    pretend(**facts)
    with pytest.raises(ConfigError) as raised:
        own_device()
    assert all(word in str(raised.value) for word in [*words, ON_PURPOSE]), raised.value
    assert "\n" not in str(raised.value)


def test_visible_devices_that_are_not_there_are_named(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(smi="580.65.06\n", says="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match=r"No CUDA GPUs are available \(CUDA_VISIBLE_DEVICES=7\)"):
        own_device()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("xpu", "DS_ACCELERATOR=xpu is not supported; allowed: cpu, cuda"),
        ("cuda", "DS_ACCELERATOR=cuda, but this process sees no NVIDIA GPU"),
    ],
)
def test_what_is_asked_for_and_cannot_be(
    asked: str, sentence: str, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    monkeypatch.setattr(device, "ASKED", asked)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        own_device()


# --- ranks ---


def places(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch, visible: list[str | None], gpus: int
) -> list[Place]:
    """Of the ranks of one host, each with its CUDA_VISIBLE_DEVICES; each sees `gpus` of them."""
    pretend(gpus=gpus, smi="580.65.06\n")
    found = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(visible)))
    for rank, value in enumerate(visible):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        if value is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
            name = value if gpus == 1 else None
            monkeypatch.setattr(
                torch.cuda,
                "get_device_properties",
                lambda index, name=name: SimpleNamespace(uuid=f"gpu-{name or index}"),
            )
        found.append(rank_place())
    return found


def test_each_rank_takes_the_gpu_of_its_number(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for visible in (None, "0,1,2,3"):
        found = places(pretend, monkeypatch, [visible] * 4, gpus=4)
        assert [place.device for place in found] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
        assert joint_problem(found) is None


def test_tasks_that_see_one_gpu_each(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1`: each counts its own as number 0."""
    found = places(pretend, monkeypatch, ["0", "1", "2"], gpus=1)
    assert [place.device for place in found] == ["cuda:0"] * 3
    assert joint_problem(found) is None


def test_ranks_that_share_one_gpu_are_refused(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = joint_problem(places(pretend, monkeypatch, ["1", "1"], gpus=1))
    assert problem is not None
    assert "ranks 0 and 1" in problem and "share one GPU (gpu-1)" in problem and ON_PURPOSE in problem


def test_more_ranks_than_gpus_are_refused(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = joint_problem(places(pretend, monkeypatch, ["0,1"] * 4, gpus=2))
    assert problem is not None
    for words in ("4 ranks", "only 2 GPUs", "CUDA_VISIBLE_DEVICES=0,1", "--num_gpus 2", ON_PURPOSE):
        assert words in problem


def test_one_rank_may_use_a_part_of_a_gpu_and_several_may_not(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (alone,) = places(pretend, monkeypatch, ["MIG-a"], gpus=1)
    assert alone.device == "cuda:0" and joint_problem([alone]) is None
    problem = joint_problem(places(pretend, monkeypatch, ["MIG-a", "MIG-b"], gpus=1))
    assert problem is not None
    assert "2 ranks" in problem and "(CUDA_VISIBLE_DEVICES=MIG-a)" in problem and "one rank" in problem


def test_the_same_number_on_two_hosts_is_two_gpus() -> None:
    assert joint_problem([Place("a", "cuda:0", "gpu-0"), Place("b", "cuda:0", "gpu-0")]) is None


def test_a_host_without_gpus_among_others_is_named() -> None:
    problem = joint_problem([Place("a", "cuda:0", "gpu-0"), Place("b", "cpu")])
    assert problem is not None
    assert "rank 0 on a computes on cuda:0 and rank 1 on b on cpu" in problem


def test_one_rank_s_problem_is_everybody_s() -> None:
    assert (
        joint_problem([Place("a", "cuda:0", "gpu-0"), Place("b", "cpu", problem="it is old")]) == "it is old"
    )


# --- whoever depends on the device asks here ---


def test_nothing_else_asks_torch_for_gpus() -> None:
    asking = [
        str(path.relative_to(ROOT))
        for folder in ("pretrain", "launch", "data_tools", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"cuda\.(is_available|device_count)\(", path.read_text())
    ]
    # The last one checks a node before anything runs there.
    assert asking == ["pretrain/device.py", "launch/preflight.py"]


def test_the_peers_of_the_benchmark_can_ask_too() -> None:
    """Their environment has torch, and not what this project's configuration needs."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'deepspeed']))"
    subprocess.run(
        [sys.executable, "-c", f"{hidden}\nimport benchmarks.harness.worker"], cwd=ROOT, check=True
    )


# --- real processes, with a stand-in for nvidia-smi ---


@pytest.mark.integration
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_run_ends_where_a_gpu_cannot_be_used(
    n_ranks: int, corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank's nvidia-smi lists a GPU, which this torch cannot use; all ranks end alike, and one says it."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that works")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    path = f"{write_nvidia_smi(tmp_path / 'bin', '535.161.08')}:{os.environ['PATH']}"
    arguments = run_arguments(corpus, tmp_path / "run")
    given = {n_ranks - 1: {"PATH": path}}
    with Ranks(n_ranks, "launch/train.py", *arguments, log_dir=tmp_path / "logs", env_of=given) as ranks:
        codes, said = ranks.wait(240), ranks.output()
    assert codes == [2] * n_ranks, said
    assert said.count("has an NVIDIA GPU, but torch cannot use it") == 1
    assert ON_PURPOSE in said and "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.integration
def test_a_run_on_the_cpu_on_purpose(corpus: TinyCorpus, tmp_path: Path) -> None:
    path = f"{write_nvidia_smi(tmp_path / 'bin', '535.161.08')}:{os.environ['PATH']}"
    given = {0: {"PATH": path, "DS_ACCELERATOR": "cpu"}}
    arguments = run_arguments(corpus, tmp_path / "run")
    with Ranks(1, "launch/train.py", *arguments, log_dir=tmp_path / "logs", env_of=given) as ranks:
        assert ranks.wait(240) == [0], ranks.output()
    assert events(tmp_path / "run")[-1]["event"] == "finished"
