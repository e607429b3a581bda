"""The program of a rank's watcher; `pretrain/watchdog.py` starts it and says what it is for. Imports no torch.

Messages between watchers are lines of JSON. A watcher says `{"rank", "count", "step", "phase", "age_s", ...}` every
second; `dead` or `bye` when its rank is gone; the hub answers every second, says `dump`, and then `end` with a verdict.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain import heartbeat
from pretrain.command import begin

TICK_S = 0.5
DUMP_S = 5.0
"""A rank that runs at all writes its stacks within this time, in seconds, also on a busy host."""
MAX_LINE_BYTES = 1 << 16
LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|MemoryError", re.IGNORECASE)
WAITING = re.compile(r'File "[^"]*(torch/distributed/|deepspeed/comm/)')


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.heard = time.monotonic()
        self.rank: int | None = None
        self.open = True
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def receive(self) -> list[dict[str, Any]]:
        """Whole lines that have come; `open` is False once the other end is gone."""
        try:
            block = self.socket.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            block = b""
        self.open = self.open and bool(block) and len(self._received) < MAX_LINE_BYTES
        self.heard = time.monotonic()
        *lines, self._received = (self._received + block).split(b"\n")
        messages: list[Any] = []
        with contextlib.suppress(ValueError, RecursionError):  # of one that is no watcher
            messages = [json.loads(line) for line in lines]
        if len(messages) < len(lines) or not all(isinstance(message, dict) for message in messages):
            self.open = False
            return []
        return messages


class Watcher:
    """Watches one rank; on rank 0 also the hub of all watchers."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.rank, self.size = facts["rank"], facts["world_size"]
        self.run_dir = Path(facts["run_dir"])
        self.limits = {name: facts[name] for name in ("startup_s", "step_s", "lost_s")}
        self.progress, self.stacks = facts["progress"], facts["stacks"]
        self.pid = facts["pid"]
        self.host = os.uname().nodename
        self.selector = selectors.DefaultSelector()
        self.process = os.pidfd_open(self.pid)
        self.launchers = _launchers(self.pid)
        for descriptor in (self.process, *self.launchers, sys.stdin.fileno()):
            self.selector.register(descriptor, selectors.EVENT_READ)
        self.listener = socket.socket(fileno=facts["hub"]) if facts["hub"] is not None else None
        self.hub: Line | None = None
        self.lines: list[Line] = []
        """Connections of the other watchers, where this is the hub."""
        self.table: dict[int, dict[str, Any]] = {}
        """What each rank said last, where this is the hub."""
        self.token = ""
        self.attempt = 0
        self.joined = self.started = self.bye = self.dead = self.dumped = False
        self.found_stopped = False
        """Whether the rank was stopped when it was asked for its stacks, for which it runs a moment."""
        self.verdict: dict[str, Any] | None = None
        self._pipe = b""
        self._told = 0.0

    def run(self) -> None:
        """Until the rank has ended and, on the hub, all others have too."""
        while not self._over():
            for key, _ in self.selector.select(TICK_S):
                if key.fd in self.selector.get_map():  # else closed by what came before it in this round
                    self._handle(key.fileobj)
            if time.monotonic() - self._told >= 2 * TICK_S:
                self._told = time.monotonic()
                self._report(self._status())
                for line in self.lines:
                    line.send({"alive": True})
            if self.verdict is None:
                self._judge()

    def _over(self) -> bool:
        return self.dead and not any(line.rank is not None for line in self.lines)

    # ---- what is heard ----

    def _handle(self, source: Any) -> None:
        if source == self.process:
            self._rank_ended()
        elif source in self.launchers:  # one that launched the rank has died: save and end
            self.selector.unregister(source)
            self._kill(heartbeat.LAUNCHER_LOST_SIGNAL)
        elif source == sys.stdin.fileno():
            self._read_pipe()
        elif source is self.listener:
            connection, _ = self.listener.accept()
            line = Line(connection)
            self.lines.append(line)
            self.selector.register(connection, selectors.EVENT_READ)
        else:
            self._read_line(source)

    def _read_pipe(self) -> None:
        block = os.read(sys.stdin.fileno(), MAX_LINE_BYTES)
        if not block:
            self.selector.unregister(sys.stdin.fileno())
        *lines, self._pipe = (self._pipe + block).split(b"\n")
        for message in map(json.loads, lines):
            self.attempt = message.get("attempt", self.attempt)
            self.started = message.get("started", self.started)
            self.bye = message.get("bye", self.bye)
            if "join" in message:
                self._join(message["join"])

    def _join(self, hub: list[Any] | None) -> None:
        self.joined = True
        if hub is None:
            return
        host, port, self.token = hub
        if self.listener is not None:
            self.selector.register(self.listener, selectors.EVENT_READ)
            return
        try:
            self.hub = Line(socket.create_connection((host, port), timeout=self.limits["lost_s"]))
        except OSError as error:
            self._end({"rank": 0, "cause": "lost", "reason": f"rank 0's watcher cannot be reached ({error})"})
            return
        self.selector.register(self.hub.socket, selectors.EVENT_READ)
        self.hub.send({"token": self.token, "rank": self.rank, "host": self.host})

    def _read_line(self, source: Any) -> None:
        line = self.hub if self.hub and source is self.hub.socket else None
        line = line or next(line for line in self.lines if line.socket is source)
        for message in line.receive():
            if line is self.hub:
                self._obey(message)
            else:
                self._note(line, message)
        if not line.open:
            self._drop(line)

    def _drop(self, line: Line) -> None:
        self.selector.unregister(line.socket)
        line.socket.close()
        if line is self.hub:
            self.hub = None
            if not (self.bye or self.dead):
                self._end({"rank": 0, "cause": "lost", "reason": "the watcher of rank 0 is gone"})
            return
        self.lines.remove(line)
        if line.rank is not None and not self.table[line.rank].get("bye"):
            self._decide(line.rank, "lost", "its watcher is gone")

    def _obey(self, message: dict[str, Any]) -> None:
        if "dump" in message:
            self._report({"rank": self.rank} | self._dump())
        elif "end" in message:
            self._end(message["end"], told=True)

    def _note(self, line: Line, message: dict[str, Any]) -> None:
        """The hub: a watcher has said something."""
        if line.rank is None:  # the first message must show that it is one of this run
            if message.get("token") != self.token:
                line.open = False
                return
            line.rank = message["rank"]
        self.table[line.rank] = self.table.get(line.rank, {}) | message
        if "dead" in message:
            self._decide(line.rank, message["dead"], message["reason"])

    # ---- what is said ----

    def _report(self, message: dict[str, Any]) -> None:
        if self.hub is not None:
            self.hub.send(message)
        elif self.joined:
            self.table[self.rank] = self.table.get(self.rank, {"host": self.host}) | message
            if "dead" in message:
                self._decide(self.rank, message["dead"], message["reason"])

    def _status(self) -> dict[str, Any]:
        beat = heartbeat.read(self.progress)
        age_s = 0.0 if self.bye or self.dead else time.monotonic() - beat.time_s
        return {
            "rank": self.rank,
            "count": beat.marks,
            "step": beat.step,
            "phase": beat.phase,
            "age_s": age_s,
            "limit_s": self.limits["step_s" if self.started else "startup_s"],
            "stopped": self.found_stopped or (not self.dead and _state(self.pid) in "Tt"),
            "bye": self.bye,
        }

    def _rank_ended(self) -> None:
        self.selector.unregister(self.process)
        if sys.stdin.fileno() in self.selector.get_map():
            self._read_pipe()  # its last word may still be in there
        self.dead = True
        if self.bye or self.verdict is not None:
            self._report({"rank": self.rank, "bye": True})
        else:
            words = heartbeat.read(self.progress).last_words
            oom = heartbeat.memory_ran_out() or OUT_OF_MEMORY.search(words) is not None
            cause = "oom" if oom else "error" if words else "killed"
            reason = words or (
                "it was killed when the kernel ran out of memory" if oom else "it was killed by a signal"
            )
            if self.joined:
                self._report(self._status() | {"dead": cause, "reason": reason})
            else:
                self._end({"rank": self.rank, "cause": cause, "reason": reason})
        if self.hub is not None:
            self.selector.unregister(self.hub.socket)
            self.hub.socket.close()
            self.hub = None

    # ---- what is decided ----

    def _judge(self) -> None:
        now = time.monotonic()
        if not self.joined:
            beat = heartbeat.read(self.progress)
            if not self.dead and now - beat.time_s > self.limits["startup_s"]:
                self._dump()
                self._end(
                    {"rank": self.rank, "cause": "hang", "reason": f"no progress in phase {beat.phase}"}
                )
            return None
        if self.hub is not None:
            if now - self.hub.heard > self.limits["lost_s"]:
                self._end({"rank": 0, "cause": "lost", "reason": "no sign of life from its host"})
            return None
        for line in self.lines:
            silent_s = now - line.heard
            if line.rank is not None and silent_s > self.limits["lost_s"]:
                return self._decide(line.rank, "lost", f"no sign of life from its host for {silent_s:.0f} s")
        # The others wait for the one that goes on, so all stand still, or none is stuck.
        ages_s = [row.get("age_s", 0) for row in self.table.values() if not row.get("bye")]
        limits_s = [row.get("limit_s", 0) for row in self.table.values() if not row.get("bye")]
        if ages_s and min(ages_s) > max(limits_s):
            self._decide_hang(max(ages_s))
        return None

    def _decide_hang(self, age_s: float) -> None:
        """All stand still: name those that are stopped, or have come least far, or are the ones not waiting."""
        behind = self._ask_all()
        stopped = [rank for rank in behind if self.table[rank].get("stopped")]
        least = min(self.table[rank].get("count", 0) for rank in behind)
        behind = stopped or [rank for rank in behind if self.table[rank].get("count", 0) == least]
        busy = [rank for rank in behind if self.table[rank].get("waiting") is False]
        behind = behind if stopped else busy or behind
        row = self.table[behind[0]]
        where = f"step {row.get('step')}, phase {row.get('phase')}"
        state = "stopped by a signal" if stopped else "without progress"
        self._decide(
            behind[0], "stopped" if stopped else "hang", f"{state} for {age_s:.0f} s in {where}", behind
        )

    def _ask_all(self) -> list[int]:
        """Have all ranks dump their stacks; the ranks that still run, in order.

        A stopped rank has to run for a moment to write its stacks, which may let go of those that wait for it, so it
        is asked when they have written theirs.
        """
        running = sorted(rank for rank, row in self.table.items() if not row.get("bye"))
        stopped = [rank for rank in running if self.table[rank].get("stopped")]
        self._ask([rank for rank in running if rank not in stopped])
        self._ask(stopped)
        return [rank for rank in running if not self.table[rank].get("bye")]

    def _ask(self, ranks: list[int]) -> None:
        """Have these ranks dump their stacks, and wait until they have."""
        for rank in ranks:
            self.table[rank].pop("waiting", None)
        for line in self.lines:
            if line.rank in ranks:
                line.send({"dump": True})
        if self.rank in ranks and not self.dead:
            self.table[self.rank] |= self._dump()
        deadline = time.monotonic() + DUMP_S + 1
        while time.monotonic() < deadline:
            rows = [self.table[rank] for rank in ranks]
            if all("waiting" in row or row.get("bye") for row in rows):
                return
            for key, _ in self.selector.select(TICK_S):
                if any(line.socket is key.fileobj for line in self.lines):
                    self._read_line(key.fileobj)

    def _decide(self, rank: int, cause: str, reason: str, behind: list[int] | None = None) -> None:
        """The hub: one rank is the trouble; all end."""
        if self.verdict is not None:
            return
        row = self.table.get(rank, {})
        verdict = {"rank": rank, "host": row.get("host"), "cause": cause, "reason": reason}
        verdict |= {"step": row.get("step"), "behind": behind or [rank]}
        self.verdict = verdict
        for line in self.lines:
            line.send({"end": verdict})
        self._end(verdict)

    def _end(self, verdict: dict[str, Any], *, told: bool = False) -> None:
        """Leave the stacks and a word in the run folder, and end this rank. `told`: by the hub, which says it."""
        self.verdict = verdict
        if self.listener is not None or self.size == 1 or (self.rank == 1 and not told):
            self._say(verdict)
        if not self.dead:
            if not self.dumped:
                self._dump()
            self._kill(signal.SIGKILL)

    def _say(self, verdict: dict[str, Any]) -> None:
        event = {"event": "rank_failed", "attempt": self.attempt, "time": _now()} | verdict
        try:
            with (self.run_dir / "events.jsonl").open("ab", buffering=0) as file:
                file.write(json.dumps(event).encode() + b"\n")
        except OSError:
            pass
        host = f" on {verdict['host']}" if verdict.get("host") else ""
        text = (
            f"watchdog: rank {verdict['rank']}{host}: {verdict['cause']}: {verdict['reason']}; all ranks end"
        )
        print(f"{text}, their stacks are in {self._folder()}", file=sys.stderr, flush=True)

    def _folder(self) -> Path:
        return self.run_dir / "stacks" / f"attempt-{self.attempt:03d}"

    def _dump(self) -> dict[str, bool]:
        """Write the rank's stacks to the run folder; whether they show it waiting for other ranks, and was stopped."""
        if self.dead:
            return {"waiting": False}
        self.dumped = True
        stopped = self.found_stopped = _state(self.pid) in "Tt"
        os.ftruncate(self.stacks, 0)
        os.lseek(self.stacks, 0, os.SEEK_SET)
        self._ask_for_stacks()
        if stopped:
            self._kill(signal.SIGCONT)
        text = self._wait_for_stacks()
        if stopped:
            self._kill(signal.SIGSTOP)
        beat = heartbeat.read(self.progress)
        head = f"rank {self.rank} on {self.host}, process {self.pid}{', was stopped' if stopped else ''}, {_now()}\n"
        head += f"step {beat.step}, phase {beat.phase}, since {time.monotonic() - beat.time_s:.1f} s\n\n"
        try:
            self._folder().mkdir(parents=True, exist_ok=True)
            (self._folder() / f"rank-{self.rank:05d}.txt").write_text(head + text)
        except OSError:
            pass
        threads = [part for part in text.split("\n\n") if "pretrain/saving.py" not in part]
        waiting = not stopped and any(WAITING.search("\n".join(part.splitlines()[:9])) for part in threads)
        return {"waiting": waiting, "stopped": stopped}

    def _wait_for_stacks(self) -> str:
        """What the rank writes: whole once the outermost frame of the main thread is there, which comes last."""
        text, deadline = "", time.monotonic() + DUMP_S
        while not text.endswith(" in <module>\n") and time.monotonic() < deadline:
            time.sleep(0.02)
            text = os.pread(self.stacks, os.fstat(self.stacks).st_size, 0).decode(errors="replace")
        return text or f"no answer within {DUMP_S:.0f} s\n"

    def _ask_for_stacks(self) -> None:
        """To the main thread: a stopped one then writes before it goes on; another thread could come too late."""
        to_thread = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30
        if to_thread is None:
            self._kill(signal.SIGUSR2)
        else:
            to_thread(self.pid, self.pid, signal.SIGUSR2)

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, number)


def _launchers(pid: int) -> list[int]:
    """File descriptors of the launcher processes above `pid`, nearest first."""
    found = []
    while (pid := int(_stat(pid)[1])) > 1:  # its parent
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if not any(name in command for name in LAUNCHERS) or b"supervise.py" in command:
                break
            found.append(os.pidfd_open(pid))
        except OSError:
            break
    return found


def _stat(pid: int) -> list[str]:
    try:  # the name, in parentheses, may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    begin(__name__, goes_on=True)
    # Unbuffered: `select` must see what is still to be read.
    first = b""
    while not first.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit(0)
        first += byte
    facts = json.loads(first)
    if os.getppid() == facts["pid"]:  # else the rank is gone already
        Watcher(facts).run()
