"""A short chaos run, and the proof that its oracle sees what is broken. Long: tests/support/chaos/run.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.reliability.json_lines import read_lines
from support import ROOT
from support.chaos.faults import DAMAGES, KINDS, VICTIMS, choose, plan


def test_the_plan_follows_from_the_seed_and_covers_everything() -> None:
    faults = [plan(1, number, "") for number in range(300)]
    assert faults == [plan(1, number, "") for number in range(300)]
    assert faults != [plan(2, number, "") for number in range(300)]
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.damage for fault in faults} == {*DAMAGES, None}
    assert {fault.aim for fault in faults} == {"uniform", "loading", "saving", "recovery"}
    living = {
        "rank": [3, 4],
        "launcher": [2],
        "deepspeed": [1],
        "loader worker": [5],
        "watcher": [6],
        "guard": [8],
    }
    victims = [
        choose(fault, living, supervisor=9) for fault in faults if fault.kind in ("SIGTERM", "SIGKILL")
    ]
    assert {name for name, _ in victims} == set(VICTIMS)
    assert {pid for name, pid in victims if name == "rank"} == {3, 4}


def chaos(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/support/chaos/run.py", "--out", str(out), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: they share the undisturbed run."""
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.integration
@pytest.mark.parametrize("kills", [4, pytest.param(7, marks=pytest.mark.long)])  # long: three faults more
def test_faults_without_a_violation(out: Path, kills: int) -> None:
    """The same folder for all: what the log has already is not done again."""
    done = chaos(out, "--kills", str(kills), "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line["type"] == "fault" for line in read_lines(out / "log.jsonl")) == kills
    assert "violations: 0" in done.stdout
    again = chaos(out, "--kills", str(kills), "--seed", "1")  # the log says that nothing is missing
    assert again.returncode == 0
    assert sum(line["type"] == "fault" for line in read_lines(out / "log.jsonl")) == kills


@pytest.mark.integration
@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("hash", "but the newest good checkpoint is of step"),
        ("loader", "on other samples"),
        ("fsync", "can be trusted"),
    ],
)
def test_the_oracle_fails_without_a_protection(out: Path, broken: str, complaint: str) -> None:
    """Negative controls: checkpoints are not verified, the position in the data is lost, files are not synced."""
    done = chaos(out, "--kills", "1", "--seed", "1", "--break", broken)
    assert done.returncode == 1, done.stdout + done.stderr
    texts = [line["text"] for line in read_lines(out / f"log-{broken}.jsonl") if line["type"] == "violation"]
    assert any(complaint in text for text in texts), texts
