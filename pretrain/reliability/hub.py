"""The messages between watchers (lines of JSON), and the hub's side of the connections. Imports no torch.

Anyone who can reach the hub's port may connect, so strangers must not be able to exhaust, block or mislead the hub. A
connection that has not yet sent the password is a stranger. Few strangers are kept at a time, each for a few seconds
only, and the hub sends them nothing. Each rank is accepted once. The type of every received field is checked before
use. What a peer does not read waits in a bounded buffer.
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
"""Seconds that a stranger may take to send the password: a watcher sends it at once, but a network may be slow."""
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
    """The message in a line of JSON, or None if it is malformed or one of its fields is unknown or has a wrong type."""
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
        case str():  # half of a surrogate pair can be neither printed nor written to a file
            return not any("\ud800" <= char <= "\udfff" for char in value)
        case bool() | None | dict():
            return True
        case list():
            return bool(value) and all(type(rank) is int and 0 <= rank < 1 << 32 for rank in value)
        case _:
            return math.isfinite(value) and abs(value) < 1 << 62


# ---- connections -----------------------------------------------------------------------------------------------------


class Line:
    """A connection that carries messages. Sending and receiving never block."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.since = self.heard = time.monotonic()
        self.rank: int | None = None
        """On the hub: the rank of the watcher at the other end; None until that watcher has sent the password."""
        self.open = True
        """False once the other end is gone, has stopped reading, or has sent something that is not a message."""
        self._received = b""
        self._unsent = b""

    def send(self, message: Message) -> None:
        """Send a message. What the connection cannot take now is kept for a later `flush`."""
        if self.open:
            self._unsent += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages, as far as the connection can take it."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            self.open = self.open and len(self._unsent) <= MAX_UNSENT_BYTES
        except OSError:
            self.open = False

    def receive(self) -> list[Message]:
        """The messages that have arrived. Nothing is read beyond a malformed one, and the line is no longer `open`."""
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
    """The connections between the watcher of rank 0, which is the hub, and those of all other ranks.

    It registers `listener` and all connections with `selector`; the data of a connection is its `Line`. A connection
    that sends `password` and a rank in [1, size) is accepted as that rank's watcher, unless the rank has one already.
    """

    def __init__(
        self, listener: socket.socket, password: str, size: int, selector: selectors.BaseSelector
    ) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.lines: dict[int, Line] = {}
        """The open connections to watchers that were accepted, by rank."""
        self._strangers: dict[Line, None] = {}  # an ordered set, oldest first
        self._password = password.encode()
        self._missing = set(range(1, size))
        self._selector = selector
        self._listens = False
        self._max_strangers = _room_for_strangers(size)
        self._listen(True)

    def accept(self) -> None:
        """Accept the waiting connections. If there are too many strangers, the oldest ones are dropped."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # The other end has given up, or this process has run out of file descriptors. `tend` listens again; a
                # retry at once could keep the hub busy.
                self._listen(False)
                return
            if len(self._strangers) >= self._max_strangers:
                self.drop(next(iter(self._strangers)))
            line = Line(connection)
            self._strangers[line] = None
            self._selector.register(connection, selectors.EVENT_READ, line)

    def read(self, line: Line) -> list[Message]:
        """The messages of an accepted watcher; none of a stranger. The caller drops the line once it is not `open`."""
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
        """Drop strangers whose time is over, and send what is left to send. To be called about once a second.

        Returns the lines of ranks whose connections are no longer open; the caller drops them.
        """
        self._listen(True)
        now = time.monotonic()
        for line in [line for line in self._strangers if now - line.since > STRANGER_S]:
            self.drop(line)
        for line in self.lines.values():
            line.flush()
        return [line for line in self.lines.values() if not line.open]

    def drop(self, line: Line) -> None:
        """Close a connection. If it was a rank's, no other connection is accepted for that rank."""
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
    """The maximum number of strangers. Raises this process's limit on file descriptors as far as allowed.

    At most half of the descriptors that the ranks do not need go to strangers, so that every rank can still connect.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return max(1, min(MAX_STRANGERS, (most - size) // 2))
