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
        ({"PRETRAIN_TORCH": "tpu"}, "PRETRAIN_TORCH=tpu is unknown; allowed: cpu, cuda"),
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
