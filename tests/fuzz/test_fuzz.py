"""Every parser of what others wrote: on honest examples, on what once broke it, and fuzzed.

Findings are looked at by hand: python tests/fuzz/run.py NAME.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from harnesses import HARNESSES
from run import fuzz

CRASHERS = Path(__file__).parent / "crashers"
SECONDS = 5 if os.environ.get("CI") == "true" else 60


@pytest.mark.parametrize("name", HARNESSES)
def test_honest_examples_and_what_once_broke_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", "canary-3b1f")
    crashers = [path.read_bytes() for path in sorted((CRASHERS / name).glob("*"))]
    for content in (*HARNESSES[name].seeds(), b"", *crashers):
        HARNESSES[name].one(content)


@pytest.mark.integration
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this machine"
)
@pytest.mark.parametrize("name", HARNESSES)
def test_fuzzed(name: str, tmp_path: Path) -> None:
    result = fuzz(name, SECONDS, tmp_path)
    assert not result.findings, "\n\n".join(result.findings)
    assert result.executions > 0
