"""Small files that become gigabytes: each is refused with its place, quickly, and with little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import bombs

pytest.importorskip("trafilatura", exc_type=ImportError)
for package in ("pyarrow", "warcio", "zstandard"):
    pytest.importorskip(package)

pytestmark = pytest.mark.integration

MOST_MB = 200
TEXT = {name: suffix for name, suffix, _ in bombs.bombs()}
PREPARED = [
    name
    for name, suffix in TEXT.items()
    if suffix in (".jsonl.gz", ".json.gz", ".csv.gz", ".parquet", ".tar")
]


def read(folder: Path, *readers: str) -> dict[tuple[str, str], dict[str, Any]]:
    command = [sys.executable, bombs.__file__, str(folder), *readers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {(one["name"], one["reader"]): one for one in told}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What came of every file, by its name and who read it."""
    folder = tmp_path_factory.mktemp("bombs")
    bombs.write(folder / "text", bombs.bombs())
    bombs.write(folder / "chat", bombs.chat_bombs())
    bombs.write(folder / "honest", bombs.honest())
    found = read(folder / "text", "curate", "prepare") | read(folder / "chat", "chat")
    return found | read(folder / "honest", "curate", "prepare")


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        *((name, "curate") for name in TEXT),
        *((name, "prepare") for name in PREPARED),
        *((name, "chat") for name, _, _ in bombs.chat_bombs()),
    ],
)
def test_a_bomb_is_refused_with_little_memory(
    told: dict[tuple[str, str], dict[str, Any]], name: str, reader: str
) -> None:
    one = told[name, reader]
    assert one["bytes"] < 1_100_000
    assert one.get("raised") is None
    assert (one["records"], one["n_bad"], one["status"]) == (0, 1, 0)
    assert f"{name}/bomb" in one["bad"][0]
    assert "\n" not in one["bad"][0]
    honest = max(other["peak_mb"] for (key, _), other in told.items() if key.startswith("honest"))
    assert one["peak_mb"] + one["children_mb"] < honest + MOST_MB
    assert one["seconds"] < 30  # before, minutes


@pytest.mark.parametrize("name", [name for name, _, _ in bombs.honest()])
def test_honest_files_of_these_kinds_are_read(told: dict[tuple[str, str], dict[str, Any]], name: str) -> None:
    one = told[name, "curate"]
    assert one["bad"] == []
    assert one["records"] == (1 if "WARC" in name else len(bombs.HONEST))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz"])
def test_a_command_ends_with_a_sentence_and_writes_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(next(make() for _, kind, make in bombs.bombs() if kind == suffix))
    command = [sys.executable, "-m", "data_tools.prepare", f"input=[{path}]", f"output={tmp_path}/out"]
    done = subprocess.run(command, cwd=bombs.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"{path}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
