"""The shell scripts, the container file and the lock file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from stand_ins import write_nvidia_smi

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted(ROOT.glob("launch/*.sh")), ROOT / "tests/run.sh", ROOT / ".ci/run"]


def tool(name: str) -> str:
    """A program of the environment that runs the tests."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path is not None, f"{name} is missing; the tests need the environment that tests/run.sh makes"
    return path


def run(
    *command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


# --- what linters say ---


def test_shell_scripts_are_clean() -> None:
    found = run(tool("shellcheck"), *SCRIPTS)
    assert found.returncode == 0, found.stdout


def test_container_file_is_clean() -> None:
    found = run(tool("hadolint"), "--no-color", ROOT / "docker/Dockerfile")
    assert found.returncode == 0, found.stdout


def test_container_runs_as_nobody_in_particular() -> None:
    """Both targets: no root, a pinned base, and the lock file's environment first on the path."""
    stages = re.split(r"^FROM ", (ROOT / "docker/Dockerfile").read_text(), flags=re.M)[1:]
    by_name = {stage.splitlines()[0].split(" AS ")[1]: stage for stage in stages}
    assert set(by_name) == {"cpu-environment", "cuda-environment", "cpu", "cuda"}
    for target in ("cpu", "cuda"):
        image, environment = by_name[target], by_name[f"{target}-environment"]
        assert re.findall(r"^USER (\S+)", image, flags=re.M) == ["10001"]
        assert "PATH=/opt/venv/bin:$PATH" in image
        assert re.match(r"\S+:[0-9][\w.-]+ ", environment), "the base image has no version"
        assert f"PRETRAIN_TORCH={target}" in environment
        assert "COPY requirements.lock" in environment


# --- the lock file ---


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in pins)
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def test_lock_file_satisfies_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["gcs"], extras["liger"]  # left out of the lock by launch/setup_env.sh
    wanted = project["dependencies"] + sum(extras.values(), [])
    pins = locked()
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(version), f"{requirement} excludes the locked {version}"


def test_no_cuda_is_locked() -> None:
    """A lock file with torch's CUDA libraries would put gigabytes on machines without a GPU."""
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))]
    assert re.fullmatch(r"\d+\.\d+\.\d+", locked()["torch"]), "a local version exists on some machines only"


# --- what is missing is said in one sentence, and nothing is left behind ---


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            {"PRETRAIN_PYTHON": "/no/such/python"},
            "Python 3.11 or newer was not found (looked at: /no/such/python)",
        ),
        ({"PRETRAIN_TORCH": "tpu"}, "PRETRAIN_TORCH=tpu is unknown; allowed: cpu, cuda, existing"),
        ({"CXX": "no-such-compiler", "PATH": "<no compiler>"}, "a C++ compiler was not found"),
    ],
)
def test_set_up_says_what_is_missing(tmp_path: Path, setting: dict[str, str], sentence: str) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for program in ("dirname", "bash", "python3", "mkdir", "sed"):
        (bare / program).symlink_to(sys.executable if program == "python3" else tool(program))
    env = dict(os.environ, PRETRAIN_VENV=str(tmp_path / "venv")) | setting
    env["PATH"] = env["PATH"].replace("<no compiler>", str(bare))
    done = run("bash", ROOT / "launch/setup_env.sh", env=env)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not (tmp_path / "venv").exists()


# --- which torch is installed ---


def set_up(code: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run shell code with the functions of setup_env.sh, for an environment in `tmp_path`."""
    functions = (ROOT / "launch/setup_env.sh").read_text().removesuffix('main "$@"\n')
    script = tmp_path / "launch" / "functions.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"{functions}\n{code}\n")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    given = {"PRETRAIN_VENV": str(tmp_path / "venv"), "PATH": path, **env}
    return run("bash", script, env=os.environ | given)


@pytest.mark.parametrize(
    ("gpus", "build"),
    [
        ("580.65.06, 9.0", "cuda"),
        ("580.65.06, 7.5\\n580.65.06, 12.0", "cuda"),
        ("575.57.08, 9.0", "cuda126"),
        ("535.161.08, 8.0\\n535.161.08, 8.0", "cuda126"),
        ("525.60.13, 8.6", "cuda126"),
        ("580.65.06, 7.0", "cuda126"),  # V100: CUDA 13 has no code for it
        ("580.65.06, 7.0\\n580.65.06, 9.0", "cuda126"),
        ("", "cuda"),  # where an image is built
        ("No devices were found", "cuda"),
    ],
)
def test_the_build_of_torch_fits_the_driver(gpus: str, build: str, tmp_path: Path) -> None:
    """With a stand-in for nvidia-smi."""
    write_nvidia_smi(tmp_path / "bin", gpus)
    for asked in ({}, {"PRETRAIN_TORCH": "cuda"}):
        done = set_up("torch_flavor", tmp_path, **asked)
        assert (done.returncode, done.stdout) == (0, f"{build}\n"), done.stderr


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("515.65.01, 8.0", ["driver is of version 515", "needs 525 or newer", "PRETRAIN_TORCH=cpu"]),
        ("570.86.15, 10.0", ["driver 570", "10.0 to 10.0", "update the driver", "PRETRAIN_TORCH=cpu"]),
        ("580.65.06, 7.0\\n580.65.06, 12.0", ["7.0 to 12.0", "7.5 or newer", "ends at 9.0"]),
    ],
)
def test_where_no_build_fits_a_sentence_says_so(gpus: str, words: list[str], tmp_path: Path) -> None:
    write_nvidia_smi(tmp_path / "bin", gpus)
    done = run(
        "bash",
        ROOT / "launch/setup_env.sh",
        env=os.environ
        | {"PRETRAIN_VENV": str(tmp_path / "venv"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("build", "found", "requirement", "problem"),
    [
        ("cuda", "cuda", "torch===VERSION", None),  # as 2.13.0+cpu is not
        ("cuda126", "cuda", "--index-url https://download.pytorch.org/whl/cu126 torch==VERSION+cu126", None),
        ("cpu", "cpu", "--no-deps torch==VERSION+cpu", None),
        ("cuda", "cpu", "torch===VERSION", "a build of torch for cuda was asked for, and pip found one for cpu"),
        ("cpu", "cuda", "torch==VERSION+cpu", "a build of torch for cpu was asked for, and pip found one for cuda"),
    ],
)  # fmt: skip
def test_what_was_installed_is_what_was_asked_for(
    build: str, found: str, requirement: str, problem: str | None, tmp_path: Path
) -> None:
    """With stand-ins for pip and for the environment's Python, which would import the torch that pip installed."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho {found}\n")
    python.chmod(0o755)
    done = set_up(f'pip() {{ echo "pip $*"; }}\ninstall_torch {build}', tmp_path)
    assert requirement.replace("VERSION", locked()["torch"]) in done.stdout
    assert (done.returncode, problem or "") == (1 if problem else 0, problem or ""), done.stderr
    assert (problem or "") in done.stderr


# --- over a Python that has torch ---


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (
            "2.9.1+cu128",
            "has torch 2.9.1+cu128, and this project works with 2.10 or newer and older than 2.14",
        ),
        (
            "2.10.0a0+b4e4ee81d3.nv25.12",
            "has torch 2.10.0a0+b4e4ee81d3.nv25.12, and this project works with 2.10",
        ),
        ("2.14.0", "has torch 2.14.0"),
        (None, "has no torch that can be imported (No module named 'torch')"),
        ("2.10.0", None),
        ("2.11.0a0+a0b1c2d3.nv26.02", None),
        ("2.13.0+cpu", None),
    ],
)
def test_an_existing_torch_is_checked(version: str | None, sentence: str | None, tmp_path: Path) -> None:
    """With a stand-in for torch that has a version only, in an environment of its own."""
    base = tmp_path / "base"
    run(sys.executable, "-m", "venv", "--without-pip", base)
    if version is not None:
        (package,) = base.glob("lib/python*/site-packages")
        (package / "torch.py").write_text(f"__version__ = {version!r}\n")
    done = set_up(f"existing_torch {base}/bin/python", tmp_path)
    if sentence is None:
        assert (done.returncode, done.stdout) == (0, f"{version}\n")
    else:
        assert done.returncode == 1
        assert sentence in done.stderr and f"{base}/bin/python" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_environment_cannot_lie_over_itself(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    env = {
        "PRETRAIN_VENV": str(venv),
        "PRETRAIN_TORCH": "existing",
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
    }
    done = run("bash", ROOT / "launch/setup_env.sh", env=os.environ | env)
    assert done.returncode == 1
    assert f"{venv} is active, which is this project's own environment" in done.stderr
    assert (venv / "bin" / "python").exists()


@pytest.mark.integration
def test_an_environment_over_the_one_that_runs_the_tests(tmp_path: Path) -> None:
    """Everything is there, so pip needs no index; what it would add goes into the new environment alone."""
    base, venv = Path(sys.prefix), tmp_path / "venv"
    (packages,) = base.glob("lib/python*/site-packages")
    before = sorted(path.name for path in packages.iterdir())
    env = {
        "PRETRAIN_VENV": str(venv),
        "PRETRAIN_TORCH": "existing",
        "PIP_NO_INDEX": "1",
        "PATH": f"{base / 'bin'}:{os.environ['PATH']}",
    }
    setup = ["bash", str(ROOT / "launch/setup_env.sh")]
    done = subprocess.run(setup, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + (tmp_path / "venv.log").read_text()
    code = "import torch, hydra, deepspeed, sys; print(torch.__file__, sys.prefix)"
    seen = run(venv / "bin" / "python", "-c", code).stdout.split()[-2:]
    assert seen == [str(packages / "torch" / "__init__.py"), str(venv)]
    assert sorted(path.name for path in packages.iterdir()) == before
    env["PATH"] = f"{venv / 'bin'}:{os.environ['PATH']}"  # activated, it finds what it lies over
    assert "is up to date" in run(*setup, env=os.environ | env).stdout
