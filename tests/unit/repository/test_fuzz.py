"""Every parser of what others wrote: on honest examples, on what once broke it, and fuzzed.

To look at a finding: python tests/support/fuzz/run.py NAME.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from pathlib import Path

import pytest

from support import ROOT
from support.fuzz.harnesses import CANARY, HARNESSES
from support.fuzz.run import fuzz

CRASHERS = sorted((ROOT / "tests/support/fuzz/crashers").glob("*/*"))
SECONDS = 2 if os.environ.get("CI") == "true" else 60


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", CANARY)


@pytest.mark.parametrize("name", HARNESSES)
def test_honest_examples(name: str) -> None:
    for content in (*HARNESSES[name].seeds(), b""):
        HARNESSES[name].one(content)


@pytest.mark.parametrize("path", CRASHERS, ids=lambda path: f"{path.parent.name}: {path.name}")
def test_what_once_broke_it(path: Path, tmp_path: Path) -> None:
    """In a process of its own: some of these ended the process."""
    harness = HARNESSES[path.parent.name]
    harness.one(harness.seeds()[0])  # so that all is imported
    told = tmp_path / "told.txt"
    child = os.fork()
    if child == 0:
        try:
            harness.one(path.read_bytes())
            os._exit(0)
        except BaseException:
            told.write_text(traceback.format_exc())
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, told.read_text() if told.exists() else f"signal {-code}"


@pytest.mark.integration
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this machine"
)
@pytest.mark.parametrize("name", HARNESSES)
def test_fuzzed(name: str, tmp_path: Path) -> None:
    result = fuzz(name, SECONDS, tmp_path)
    assert not result.findings, "\n\n".join(result.findings)
    assert result.executions > 0
