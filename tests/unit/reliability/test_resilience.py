"""Requests to stop, and one run per folder, with real signals and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.reliability.heartbeat import LAUNCHER_LOST
from pretrain.reliability.run_lock import lock_run
from pretrain.reliability.stop import StopRequest
from support import ROOT


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_a_request(
    tmp_path: Path,
    number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopRequest(tmp_path, watch_file=False)
    assert not stop.asked()
    monkeypatch.delenv("RANK", raising=False)
    os.kill(os.getpid(), number)
    assert f"({number.name})" in capfd.readouterr().err, "said before the current step is over"
    monkeypatch.setenv("RANK", "1")
    os.kill(os.getpid(), number)
    assert capfd.readouterr().err == "", "one rank speaks for all"
    assert stop.asked()
    assert stop.reason == number.name


def test_nohup_is_respected(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(tmp_path, watch_file=False)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.asked()


def test_a_file_is_a_request_until_the_next_start(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, watch_file=True)
    assert not stop.asked()
    (tmp_path / "stop").touch()
    assert not StopRequest(tmp_path / "other", watch_file=False).asked()
    assert stop.asked()
    assert not StopRequest(tmp_path, watch_file=True).asked()
    assert not (tmp_path / "stop").exists()


HOLDER = """
import sys, time
from pathlib import Path
from pretrain.reliability.run_lock import lock_run
lock_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is in use by another run .process {holder.pid} on"):
            lock_run(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    lock_run(tmp_path)


ORPHAN = """
import os, subprocess, sys
from pathlib import Path
code = '''
import sys, time
from pathlib import Path
from pretrain.reliability.stop import StopRequest
stop = StopRequest(Path(sys.argv[1]), watch_file=False)
Path(sys.argv[1], "ready").touch()
while not stop.asked():
    time.sleep(0.01)
Path(sys.argv[1], "asked").write_text(stop.reason)
'''
subprocess.Popen([sys.executable, "-c", code, sys.argv[1]])
while not Path(sys.argv[1], "ready").exists():
    pass
os.kill(os.getpid(), 9)
"""


def test_ranks_hear_of_a_killed_launcher(tmp_path: Path) -> None:
    launcher = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path)], cwd=ROOT)
    assert launcher.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "asked").read_text() == LAUNCHER_LOST
