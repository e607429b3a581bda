"""Process 1 of the container: run the command, hand on stop requests, outlive every rank.

`docker stop` signals process 1 alone. The deepspeed launcher does not survive SIGTERM, and the container ends with
process 1, so neither may end before the ranks have saved. A request to stop goes

- to the command itself, if it handles SIGTERM (launch/supervise.py, launch/train.py, a script with a trap);
- else to the ranks that it has started: they save and exit 75, and the launcher reports that code;
- else, where there are no ranks, to the command, as it came.

The exit code is the command's, or 128 + N where signal N ended it. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# How long processes that outlive the command may take to end; a rank that saves is one of them.
LEFT_BEHIND_S = 300


def process_ids() -> list[int]:
    """Every process of the container but this one."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def read(pid: int, name: str) -> bytes:
    """A file of /proc/<pid>, empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """The parent's id; 0 once the process is gone."""
    fields = read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def handles_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    for line in read(pid, "status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def ranks() -> list[int]:
    """The processes that a launcher gave a RANK; not what they have started in turn, which inherits it."""
    numbered = {pid for pid in process_ids() if b"\0RANK=" in b"\0" + read(pid, "environ")}
    return [pid for pid in numbered if parent_of(pid) not in numbered]


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def end_the_rest(code: int) -> None:
    """Ranks that outlive their launcher are asked to save, and waited for; where there are none, nothing is."""
    if left := ranks():
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.alarm(LEFT_BEHIND_S)
        send(left, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):  # all have ended
            while True:
                os.wait()


def run(command: list[str]) -> int:
    """Run the command to its end, and what it leaves behind to theirs; the command's exit code."""
    child = 0

    def stop(number: int, _frame: FrameType | None) -> None:
        if child and not handles_sigterm(child) and (started := ranks()):
            send(started, signal.SIGTERM)
        elif child:
            send([child], number)

    # Before the command starts: the kernel drops signals to process 1 that have no handler.
    stops = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    for number in stops:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        child = os.posix_spawnp(
            command[0], command, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ], setsigmask=[]
        )
    except OSError as error:
        print(f"error: {command[0]} cannot be run in this container: {error.strerror}", file=sys.stderr)
        return 127
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)

    while (ended := os.wait())[0] != child:
        pass  # an orphan
    child = 0
    status = os.waitstatus_to_exitcode(ended[1])
    code = 128 - status if status < 0 else status
    end_the_rest(code)
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
