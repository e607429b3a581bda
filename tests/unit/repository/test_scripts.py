"""The shell scripts, the container file and the lock file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import ROOT
from support.stand_ins import write_nvidia_smi

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
    stages = re.split(r"^FROM ", (ROOT / "docker/Dockerfile").read_text(), flags=re.M)
    by_name = {stage.splitlines()[0].split(" AS ")[1]: stage for stage in stages[1:]}
    assert set(by_name) == {"cpu-environment", "cuda-environment", "cpu", "cuda"}
    for target in ("cpu", "cuda"):
        image, environment = by_name[target], by_name[f"{target}-environment"]
        assert re.findall(r"^USER (\S+)", image, flags=re.M) == ["10001"]
        assert "PATH=/opt/venv/bin:$PATH" in image
        assert environment.startswith(f"${{{target.upper()}_BASE}} ")
        base = re.search(rf"^ARG {target.upper()}_BASE=(.*)$", stages[0], flags=re.M)
        assert base and re.fullmatch(r"\S+:[0-9][\w.-]+@sha256:[0-9a-f]{64}", base.group(1)), (
            "no version or digest"
        )
        assert f"PRETRAIN_TORCH={target}" in environment
        assert f"COPY requirements.{target}.lock" in environment


# --- the lock files ---

CPU, CUDA = "requirements.cpu.lock", "requirements.cuda.lock"
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def locked(name: str = CPU) -> dict[str, str]:
    """The version of each package; every line is a pin or one of its hashes, and no pin is without one."""
    pins: dict[str, str] = {}
    before = ""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith(" "):
            assert HASH.fullmatch(line) and before.endswith("\\"), line
        elif not line.startswith("#"):
            assert line.endswith(" \\") and not before.endswith("\\"), f"{line} has no hash"
            pin = Requirement(line.removesuffix(" \\"))
            assert [specifier.operator for specifier in pin.specifier] == ["=="]
            assert pin.name == canonicalize_name(pin.name) and pin.name not in pins, pin.name
            pins[pin.name] = next(iter(pin.specifier)).version
        before = line
    return pins


@pytest.mark.parametrize("name", [CPU, CUDA])
def test_lock_file_satisfies_the_project(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["gcs"], extras["liger"]  # left out of the locks by launch/lock.sh
    wanted = project["dependencies"] + sum(extras.values(), [])
    pins = locked(name)
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(version), f"{requirement} excludes the locked {version}"


def test_the_lock_files_differ_in_torch_and_cuda_alone() -> None:
    """A CPU lock with CUDA libraries would put gigabytes on machines without a GPU."""
    cpu, cuda = locked(CPU), locked(CUDA)
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert all(cuda[name] == version for name, version in cpu.items() if name != "torch")
    only = [name for name in cuda if name not in cpu]
    assert only and all(name.startswith(("nvidia-", "cuda-", "triton")) for name in only)


@pytest.mark.parametrize("is_reachable", [True, False])
def test_hashes_of_torch_for_cpus(tmp_path: Path, is_reachable: bool) -> None:
    """As PyTorch's index has them, or where it is out of reach, as the lock file has them of the same version."""
    names = [f"{python}-{python}-manylinux_2_28_x86_64" for python in ("cp310", "cp311", "cp313")]
    page = "".join(
        f'<a href="/torch-2.13.0%2Bcpu-{name}.whl#sha256={i:064d}">' for i, name in enumerate(names)
    )
    curl = f"curl() {{ cat <<'END'\n{page}\nEND\n}}" if is_reachable else "curl() { return 6; }"
    functions = (ROOT / "launch/lock.sh").read_text().removesuffix('main "$@"\n')
    script = tmp_path / "launch" / "functions.sh"
    script.parent.mkdir()
    script.write_text(f'{functions}\n{curl}\ntorch_for_cpus "$1"\n')
    shutil.copy(ROOT / CPU, tmp_path)
    done = run("bash", script, "2.13.0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "torch==2.13.0+cpu \\"
    if is_reachable:
        assert lines[1:] == [f"    --hash=sha256:{1:064d} \\", f"    --hash=sha256:{2:064d}"]
    else:
        assert done.stdout in (ROOT / CPU).read_text() and len(lines) > 1
        assert run("bash", script, "2.14.0").returncode == 1


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


WITH_HELP = [*sorted(ROOT.glob("launch/*.sh")), *sorted(ROOT.glob("tests/*.sh"))]


@pytest.mark.parametrize("script", WITH_HELP, ids=lambda path: path.name)
def test_help_is_printed_and_nothing_is_begun(script: Path, tmp_path: Path) -> None:
    """With a PATH of what prints alone, so that an installation could not even begin."""
    for name in ("sed", "dirname", "python3"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    env = {"PATH": str(tmp_path), "PRETRAIN_VENV": str(tmp_path / "venv")}
    done = run(shutil.which("bash") or "bash", script, "--help", env=env)
    assert done.returncode == 0, done.stderr
    assert script.name in done.stdout and "set -euo" not in done.stdout
    assert not (tmp_path / "venv").exists()


# --- which torch is installed ---


def set_up(code: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run shell code with the functions of setup_env.sh, for an environment in `tmp_path`."""
    functions = (ROOT / "launch/setup_env.sh").read_text().removesuffix('main "$@"\n')
    script = tmp_path / "launch" / "functions.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"{functions}\n{code}\n")
    for name in (CPU, CUDA, "pyproject.toml"):
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
        ("cuda", "cuda", "--require-hashes torch==VERSION \\", None),
        ("cuda126", "cuda", "--index-url https://download.pytorch.org/whl/cu126 torch==VERSION+cu126", None),
        ("cpu", "cpu", "--require-hashes torch==VERSION+cpu \\", None),
        ("cuda", "cpu", "torch==VERSION", "a build of torch for cuda was asked for, and pip found one for cpu"),
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
    lock = CUDA if build == "cuda" else CPU
    pip = 'pip() { case $* in *-r*) echo "pip --require-hashes $(cat "${@: -1}")" ;; *) echo "pip $*" ;; esac; }'
    done = set_up(f"{pip}\nLOCK=$ROOT/{lock}\ninstall_torch {build}", tmp_path)
    assert requirement.replace("VERSION", locked(CUDA)["torch"]) in done.stdout
    assert (done.returncode, problem or "") == (1 if problem else 0, problem or ""), done.stderr
    assert (problem or "") in done.stderr


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    """pip gets a wheel of the right name and version, and the hash of another one."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tqdm-4.70.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "tqdm-4.70.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tqdm\nVersion: 4.70.1\n"
        )
        wheel.writestr(
            "tqdm-4.70.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tqdm-4.70.1.dist-info/RECORD", "")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (pip,) = Path(sys.prefix).glob("lib/python*/site-packages/pip")
    (packages / "pip").symlink_to(pip)
    (tmp_path / "requirements").write_text(f"tqdm==4.70.1 --hash=sha256:{'0' * 64}\n")
    given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    done = set_up(f"install_hashed {tmp_path}/requirements", tmp_path, **given)
    assert done.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in (tmp_path / "venv.log").read_text()
    assert not list((tmp_path / "venv").glob("lib/python*/site-packages/tqdm*"))


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


def test_what_is_missing_over_an_existing_torch(tmp_path: Path) -> None:
    """What is not there, what pyproject.toml does not admit, what an added package needs newer; never torch."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (there,) = Path(sys.prefix).glob("lib/python*/site-packages/packaging")
    shutil.copytree(there, packages / "packaging")
    have = {name: version for name, version in locked().items() if name != "tqdm"}
    have |= {"numpy": "1.26.0", "rich": "14.5", "torch": "2.12.0", "idna": "1.0"}
    for name, version in have.items():
        folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        needs = "Requires-Dist: idna>=3\nRequires-Dist: six>=99; extra == 'x'\n" if name == "requests" else ""
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    done = set_up("missing_packages", tmp_path)
    assert (done.returncode, done.stdout) == (0, "idna numpy tqdm\n"), done.stderr


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
