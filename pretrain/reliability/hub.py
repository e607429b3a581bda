"""Lines of JSON between watchers, and the hub's connections: strangers may come, but cannot fill, block or mislead it.

Anyone who reaches the hub's port may connect. Who has not said the password is a stranger: there are few of them at a
time, each gets a few seconds, and none is told anything. Each rank is taken once. What a peer says is checked by type
before use, and what it does not read waits in a bounded buffer. Imports no torch.
"""

from __future__ import annotations

import hmac
import json
import math
import resource
import selectors
import socket
import time
from typing import Any

MAX_LINE_BYTES = 1 << 16
MAX_UNSENT_BYTES = 1 << 20
MAX_STRANGERS = 128
STRANGER_S = 5.0
"""An honest watcher says the password at once, so that this is a round trip on a bad network, in seconds."""
_ACCEPTED_AT_ONCE = 64

Message = dict[str, Any]
_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    # from a watcher
    "token": (str,), "rank": (int,), "host": (str, type(None)),
    "count": (int,), "step": (int, type(None)), "phase": (str,), "age_s": _NUMBER, "limit_s": _NUMBER,
    "stopped": (bool,), "waiting": (bool,), "bye": (bool,), "dead": (str,), "reason": (str,),
    # from the hub
    "alive": (bool,), "dump": (bool,), "end": (dict,), "cause": (str,), "behind": (list,),
}  # fmt: skip
_HELLO = {"token", "rank", "host"}
_VERDICT = {"rank", "host", "cause", "reason", "step", "behind"}


# ---- messages --------------------------------------------------------------------------------------------------------


def parse(line: bytes) -> Message | None:
    """One message, every field of which has the type that it should have; None for anything else."""
    try:
        message = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return message if _is_message(message) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not all(_fits(name, value) for name, value in message.items()):
        return False
    if "dead" in message and "reason" not in message:
        return False
    verdict = message.get("end")
    return verdict is None or ("end" not in verdict and verdict.keys() >= _VERDICT and _is_message(verdict))


def _fits(name: str, value: Any) -> bool:
    if type(value) not in _FIELDS.get(name, ()):
        return False
    match value:
        case str():  # half of a surrogate pair could not be printed or written
            return not any("\ud800" <= char <= "\udfff" for char in value)
        case bool() | None | dict():
            return True
        case list():
            return bool(value) and all(type(rank) is int and 0 <= rank < 1 << 32 for rank in value)
        case _:
            return math.isfinite(value) and abs(value) < 1 << 62


# ---- connections -----------------------------------------------------------------------------------------------------


class Line:
    """A connection that carries messages. Neither end waits for the other."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.since = self.heard = time.monotonic()
        self.rank: int | None = None
        """Of the other end, where this is the hub and the other end has shown that it is one of this run."""
        self.open = True
        """False once the other end is gone, does not read, or has said what is no message."""
        self._received = b""
        self._unsent = b""

    def send(self, message: Message) -> None:
        """Say this, now or in a later `flush`."""
        if self.open:
            self._unsent += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        """Send what the other end has not had room for."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            self.open = self.open and len(self._unsent) <= MAX_UNSENT_BYTES
        except OSError:
            self.open = False

    def receive(self) -> list[Message]:
        """Messages that have come, up to the first line that is none."""
        try:
            block = self.socket.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            block = b""
        if not block:
            self.open = False
            return []
        self.heard = time.monotonic()
        *lines, self._received = (self._received + block).split(b"\n")
        messages = []
        for line in lines:
            message = parse(line)
            if message is None:
                self.open = False
                break
            messages.append(message)
        self.open = self.open and len(self._received) < MAX_LINE_BYTES
        return messages


class Hub:
    """The connections of all other ranks' watchers to that of rank 0.

    It registers `listener` and them with `selector`, a connection with its `Line` as data. Who comes with `password`
    and a rank of [1, size) that nobody has taken yet is that rank's.
    """

    def __init__(
        self, listener: socket.socket, password: str, size: int, selector: selectors.BaseSelector
    ) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.lines: dict[int, Line] = {}
        """By rank."""
        self._strangers: dict[Line, None] = {}  # oldest first
        self._password = password.encode()
        self._missing = set(range(1, size))
        self._selector = selector
        self._listens = False
        self._max_strangers = _room_for_strangers(size)
        self._listen(True)

    def accept(self) -> None:
        """Take the connections that have come; the oldest strangers go where there are too many."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            except (
                OSError
            ):  # given up by its maker, or this process has no descriptor left: not asked again at once
                self._listen(False)
                return
            if len(self._strangers) >= self._max_strangers:
                self.drop(next(iter(self._strangers)))
            line = Line(connection)
            self._strangers[line] = None
            self._selector.register(connection, selectors.EVENT_READ, line)

    def read(self, line: Line) -> list[Message]:
        """What a rank's watcher has said; nothing from a stranger. Once the line is not `open` it is to be dropped."""
        messages = line.receive()
        if messages and line.rank is None:
            hello = messages.pop(0)
            if not self._is_welcome(hello):
                line.open = False
                return []
            self._welcome(line, hello["rank"])
            messages.insert(0, {"rank": line.rank, "host": hello["host"]})
        if any(message.get("rank", line.rank) != line.rank or "token" in message for message in messages):
            line.open = False
            return []
        return messages

    def tend(self) -> list[Line]:
        """To be called every second or so: waits for no stranger too long, and sends what is left to send.

        Returns the lines of ranks that are not open any more.
        """
        self._listen(True)
        now = time.monotonic()
        for line in [line for line in self._strangers if now - line.since > STRANGER_S]:
            self.drop(line)
        for line in self.lines.values():
            line.flush()
        return [line for line in self.lines.values() if not line.open]

    def drop(self, line: Line) -> None:
        """Close a connection. A rank that was taken once stays taken."""
        self._selector.unregister(line.socket)
        line.socket.close()
        self._strangers.pop(line, None)
        if line.rank is not None:
            del self.lines[line.rank]

    def _is_welcome(self, hello: Message) -> bool:
        return (
            hello.keys() == _HELLO
            and hmac.compare_digest(hello["token"].encode(), self._password)
            and hello["rank"] in self._missing
        )

    def _welcome(self, line: Line, rank: int) -> None:
        self._missing.remove(rank)
        del self._strangers[line]
        line.rank = rank
        self.lines[rank] = line
        line.send({"alive": True})

    def _listen(self, on: bool) -> None:
        if on and not self._listens:
            self._selector.register(self.listener, selectors.EVENT_READ)
        elif self._listens and not on:
            self._selector.unregister(self.listener)
        self._listens = on


def _room_for_strangers(size: int) -> int:
    """So many connections that every rank still finds a descriptor; takes as many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return max(1, min(MAX_STRANGERS, (most - size) // 2))
