"""Phases on datatrove's executors: real processes, killed workers, marks of finished tasks. Slurm: tests/cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from data_tools.curation.executors import (
    ExecutorConfig,
    ExecutorKind,
    TaskProgress,
    _environment,
    run_phase,
)
from pretrain.errors import ConfigError, RunError


@dataclass
class Square:
    """Writes the square of the rank, and which process did it."""

    folder: Path
    fails: int | None = None
    killed: int | None = None

    def run(self, rank: int, progress: TaskProgress) -> None:
        flag = self.folder / "mended"
        if rank == self.fails and not flag.exists():
            raise ConfigError("task 2 does not like its input")
        if rank == self.killed and not flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        progress.advance(10)
        with (self.folder / f"{rank}.txt").open("a") as file:
            file.write(f"{rank**2} {os.getpid()}\n")


def test_paths_are_quoted_for_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a b;$(touch hurt)'"
    (folder / "bin").mkdir(parents=True)
    line = f'{_environment(folder, folder / "bin")}; printf \'%s\\n\' "$PYTHONPATH" "${{PATH%%:/*}}" "$PWD"'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(folder), str(folder / "bin"), str(folder)]
    assert not list(tmp_path.rglob("hurt"))
    with pytest.raises(ConfigError, match="without quotes"):
        run_phase("x", Square(folder), 1, folder, ExecutorConfig(kind=ExecutorKind.slurm), 1)


def lines(folder: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in sorted(folder.glob("*.txt"))]


def run(task: Square, workers: int, n_tasks: int = 5) -> None:
    run_phase("squares", task, n_tasks, task.folder / "phase", ExecutorConfig(workers=workers), 10 * n_tasks)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once(workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second call finds all done
        run(Square(tmp_path), workers)
    assert [[line.split()[0] for line in one] for one in lines(tmp_path)] == [[str(n**2)] for n in range(5)]
    processes = {one[0].split()[1] for one in lines(tmp_path)}
    assert 1 <= len(processes) <= workers
    assert str(os.getpid()) not in processes
    assert [path.read_text() for path in sorted((tmp_path / "phase").glob("*.bytes"))] == ["10"] * 5
    assert "squares: done in" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["fails", "killed"])
def test_a_task_that_ends_badly_ends_the_phase_and_only_what_is_missing_is_done_again(
    how: str, tmp_path: Path
) -> None:
    task = Square(tmp_path, **{how: 2})
    expected = (
        (ConfigError, "does not like") if how == "fails" else (RunError, "was killed.*executor.workers")
    )
    started = time.monotonic()
    with pytest.raises(expected[0], match=expected[1]):
        run(task, 1)
    assert time.monotonic() - started < 60  # it does not wait for ever, as datatrove's own pool would
    assert not (tmp_path / "2.txt").exists()
    (tmp_path / "mended").touch()
    run(task, 2)
    assert [len(one) for one in lines(tmp_path)] == [1] * 5


def test_wrong_options_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"executor.workers=0 must be 1 or more"):
        ExecutorConfig(workers=0)


@pytest.mark.integration
def test_ray_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is there for this machine alone."""
    if not find_spec("ray"):
        pytest.skip("ray is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where its workers find `Square`
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        config = ExecutorConfig(kind=ExecutorKind.ray, workers=3)
        run_phase("squares", Square(tmp_path), 5, tmp_path / "phase", config, 50)
        ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        listening = [
            one for one in psutil.net_connections("inet") if one.status == "LISTEN" and one.pid in ours
        ]
    finally:
        import ray

        ray.shutdown()
    assert [[line.split()[0] for line in one] for one in lines(tmp_path)] == [[str(n**2)] for n in range(5)]
    assert len(listening) > 3
    assert {one.laddr.ip.removeprefix("::ffff:") for one in listening} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
