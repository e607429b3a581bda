"""The installed program: a wheel in an environment of its own, used from a folder that has nothing of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pretrain.command import COMMANDS
from support import ROOT
from support.launching import free_port
from support.tiny import TinyCorpus, events, python_documents, run_arguments

FOLDERS = ("pretrain", "data_tools", "launch", "conf")


@dataclass(frozen=True)
class Installed:
    """An environment with the program, and an empty folder to be in."""

    venv: Path
    cwd: Path

    def run(self, command: str, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        words = [str(self.venv / "bin" / command), *arguments]
        return subprocess.run(words, cwd=self.cwd, env=env, capture_output=True, text=True, timeout=timeout_s)


PIP = [sys.executable, "-m", "pip"]
LOCAL = ["--quiet", "--no-index", "--no-deps"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("sources")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def environment(folder: Path) -> Installed:
    """An environment that sees the packages of the one that runs the tests."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (shared,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
    (folder / "elsewhere").mkdir()
    return Installed(venv, folder / "elsewhere")


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The program as a wheel, built without a network."""
    folder = tmp_path_factory.mktemp("installed")
    there = environment(folder)
    subprocess.run([*PIP, "wheel", *LOCAL, "--no-build-isolation", "-w", folder, str(sources)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*PIP, "--python", there.venv / "bin" / "python", "install", *LOCAL, wheel], check=True)
    return there


def test_only_two_names_are_taken(installed: Installed) -> None:
    (packages,) = installed.venv.glob("lib/python*/site-packages")
    names = {path.name for path in packages.iterdir() if not path.name.endswith((".dist-info", ".pth"))}
    assert names == {"pretrain", "data_tools"}


def test_everything_that_is_read_at_run_time_came_along(installed: Installed) -> None:
    (packages,) = installed.venv.glob("lib/python*/site-packages")
    wanted = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".sh")
    }
    there = {
        re.sub(r"^pretrain/(launch|conf)/", r"\1/", str(path.relative_to(packages)))
        for folder in ("pretrain", "data_tools")
        for path in (packages / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert there == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_helps(command: str, installed: Installed) -> None:
    done = installed.run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stderr == ""


def test_the_configuration_is_found(installed: Installed, corpus: TinyCorpus) -> None:
    given = run_arguments(corpus, installed.cwd / "run")
    done = installed.run("pretrain-train", *given, "--cfg", "job", "model=1b", "experiment=quickstart")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["manifest"] == str(corpus.manifest)
    as_module = installed.run("python", "-m", "pretrain.launch.train", *given, "--cfg", "job")
    assert as_module.returncode == 0, as_module.stderr


def test_an_editable_installation_uses_the_sources(sources: Path, tmp_path: Path, corpus: TinyCorpus) -> None:
    there = environment(tmp_path)
    python = there.venv / "bin" / "python"
    editable = [*PIP, "--python", python, "install", *LOCAL, "--no-build-isolation", "-e", str(sources)]
    subprocess.run(editable, check=True)
    done = there.run("pretrain-train", *run_arguments(corpus, tmp_path / "run"), "--cfg", "job", "model=1b")
    assert done.returncode == 0, done.stderr
    assert there.run("pretrain-show", str(corpus.folder)).returncode == 0
    assert there.run("python", "-c", "import pretrain; print(pretrain.__file__)").stdout.startswith(
        str(sources)
    )


def test_a_wrong_key_is_one_sentence(installed: Installed) -> None:
    done = installed.run("pretrain-train", "run_dir=x", "optim.learning_rate=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: optim.learning_rate is not a key") and done.stderr.count("\n") == 1


def test_what_needs_the_sources_says_so(installed: Installed) -> None:
    done = installed.run("python", "-m", "pretrain.launch.bench", "bench.output=x", "model=tiny")
    assert done.returncode == 2
    assert "installed as a package" in done.stderr and done.stderr.count("\n") == 1


def test_a_submission_takes_the_installed_code(
    installed: Installed, corpus: TinyCorpus, tmp_path: Path
) -> None:
    """With a stand-in for sbatch; the copy that a job would run composes its configuration by itself."""
    sbatch = installed.venv / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 1\n")
    sbatch.chmod(0o755)
    given = run_arguments(corpus, tmp_path / "run")
    done = installed.run(
        "pretrain-submit", "cluster=slurm", "cluster.nodes=1", "cluster.gpus_per_node=1", *given
    )
    assert done.returncode == 0, done.stderr
    (code,) = tmp_path.glob("run/submit/*/code")
    copied = installed.run("python", str(code / "launch" / "train.py"), *given, "--cfg", "job")
    assert copied.returncode == 0, copied.stderr


@pytest.mark.integration
def test_prepare_train_and_evaluate(installed: Installed, tmp_path: Path) -> None:
    """The whole line with installed commands: ranks that `deepspeed` starts in both of its ways, and one alone."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in python_documents().items():
        (texts / name).with_suffix(".txt").write_text(text)
    small = ["tokenizer.vocab_size=512", "chunk_tokens=1024", "heldout_frac=0.05"]
    prepared = installed.run(
        "pretrain-prepare", f"input=[{texts}]", f"output={tmp_path / 'corpus'}", *small, timeout_s=120
    )
    assert prepared.returncode == 0, prepared.stderr
    assert installed.run("pretrain-verify", str(tmp_path / "corpus")).returncode == 0
    run_dir = tmp_path / "run"
    given = run_arguments(TinyCorpus(tmp_path / "corpus"), run_dir)
    for how, stop in ((["--module", "pretrain.launch.train"], 4), (["--no_python", "pretrain-train"], 8)):
        launcher = ["--num_gpus", "2", "--master_port", str(free_port())]
        deepspeed = [
            "-m",
            "deepspeed.launcher.runner",
        ]  # its own script would run the shared environment's Python
        trained = installed.run(
            "python", *deepspeed, *launcher, *how, *given, f"stop_at_step={stop}", timeout_s=240
        )
        assert trained.returncode == 75, trained.stdout + trained.stderr
    resumed = installed.run("pretrain-train", *given, timeout_s=240)
    assert resumed.returncode == 0, resumed.stderr
    names = [event["event"] for event in events(run_dir)]
    assert (names.count("started"), names.count("resumed"), names[-1]) == (1, 2, "finished")
    scored = installed.run(
        "pretrain-eval", f"run_dir={run_dir}", f"input=[{tmp_path / 'corpus' / 'heldout'}]", timeout_s=120
    )
    assert scored.returncode == 0 and "bits" in scored.stdout
