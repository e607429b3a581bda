"""Strangers at the port of the watchers' hub: they are few, short-lived and not heard, and no rank is lost to them."""

from __future__ import annotations

import json
import random
import resource
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.reliability import hub
from pretrain.reliability.hub import Hub, Line, Message, parse
from pretrain.reliability.watcher import LEAVE_S, Watcher

PASSWORD = "5" * 32
VERDICT = {"rank": 1, "host": "b", "cause": "hang", "reason": "no progress", "step": None, "behind": [1, 2]}
STATUS = {
    "rank": 1, "count": 7, "step": 3, "phase": "data", "age_s": 0.5, "limit_s": 600, "stopped": False, "bye": False
}  # fmt: skip
HONEST: list[Message] = [
    {"token": PASSWORD, "rank": 1, "host": "node-7"},
    STATUS,
    STATUS | {"dead": "error", "reason": "RunError: der Datenträger ist voll"},
    {"rank": 1, "waiting": True, "stopped": False},
    {"rank": 1, "bye": True},
    {"alive": True},
    {"dump": True},
    {"end": VERDICT},
]


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", HONEST, ids=lambda message: next(reversed(message)))
def test_what_watchers_say_is_understood(message: Message) -> None:
    assert parse(json.dumps(message).encode()) == message


@pytest.mark.parametrize(
    "message",
    [
        STATUS | {"rank": "1"},
        STATUS | {"rank": True},
        STATUS | {"rank": 1.0},
        STATUS | {"count": None},
        STATUS | {"count": 10**30},
        STATUS | {"age_s": "0"},
        STATUS | {"age_s": float("nan")},
        STATUS | {"limit_s": float("inf")},
        STATUS | {"bye": 1},
        STATUS | {"phase": "\ud800"},
        STATUS | {"unknown": 1},
        {"rank": 1, "dead": "killed"},
        {"end": None},
        {"end": {"rank": 1}},
        {"end": VERDICT | {"behind": []}},
        {"end": VERDICT | {"behind": [-1]}},
        {"end": VERDICT | {"end": VERDICT}},
    ],
)
def test_a_value_of_another_type_makes_no_message(message: Message) -> None:
    assert parse(json.dumps(message).encode()) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*hub._FIELDS, "x"]), inner),
    max_leaves=6,
)


@given(st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_message_of_known_types_or_none(line: bytes) -> None:
    message = parse(line)
    if message is not None:
        assert message.keys() <= hub._FIELDS.keys()
        assert all(type(message[name]) in hub._FIELDS[name] for name in message)
        json.dumps(message, allow_nan=False).encode()


@pytest.mark.parametrize("line", [b"[" * 60_000, b"9" * 60_000, b'{"step": 1e999}', b"\xff", b"", b"null"])
def test_what_would_harm_a_parser_is_no_message(line: bytes) -> None:
    assert parse(line) is None


# ---- connections -----------------------------------------------------------------------------------------------------


class Meeting:
    """A hub and those who connect to it, in one process."""

    def __init__(self, size: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.address = self.listener.getsockname()
        self.hub = Hub(self.listener, PASSWORD, size, self.selector)
        self.heard: list[tuple[int | None, Message]] = []
        self.clients: list[socket.socket] = []

    def connect(self, *words: bytes | Message) -> socket.socket:
        client = socket.create_connection(self.address)
        self.clients.append(client)
        for word in words:
            client.sendall(word if isinstance(word, bytes) else json.dumps(word).encode() + b"\n")
        return client

    def turn(self) -> None:
        """What the watcher does until nothing is left to be heard."""
        while ready := [key for key, _ in self.selector.select(0.05)]:
            for key in ready:
                if self.selector.get_map().get(key.fd) is not key:
                    continue
                if key.data is None:
                    self.hub.accept()
                    continue
                self.heard += [(key.data.rank, message) for message in self.hub.read(key.data)]
                if not key.data.open:
                    self.hub.drop(key.data)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self.selector.close()


@contextmanager
def meeting(size: int = 3) -> Iterator[Meeting]:
    held = Meeting(size)
    try:
        yield held
    finally:
        held.close()


def hello(rank: Any, password: str = PASSWORD) -> Message:
    return {"token": password, "rank": rank, "host": f"node-{rank}"}


def is_closed(client: socket.socket) -> bool:
    """Whether the hub has closed this connection, without having said anything."""
    client.settimeout(2)
    with suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


def test_a_rank_is_welcomed_and_heard() -> None:
    with meeting() as held:
        client = held.connect(hello(2), STATUS | {"rank": 2})
        held.turn()
        assert held.heard == [(2, {"rank": 2, "host": "node-2"}), (2, STATUS | {"rank": 2})]
        assert list(held.hub.lines) == [2]
        assert client.recv(100) == b'{"alive": true}\n'


@pytest.mark.parametrize(
    "words",
    [
        [hello(1, "6" * 32)],
        [hello(1, "pässword")],
        [hello(1, "")],
        [hello(0)],  # the hub's own
        [hello(3)],
        [hello(-1)],
        [hello(True)],
        [hello("1")],
        [hello(1) | {"dead": "killed", "reason": "a lie"}],
        [{"rank": 1, "dead": "killed", "reason": "a lie"}],
        [{"token": PASSWORD, "rank": 1}],
        [b"\x16\x03\x01\x02\x00\x01\n"],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"\n" * 60_000],
        [b"[" * (hub.MAX_LINE_BYTES + 1)],
    ],
)
def test_a_stranger_is_shown_the_door(words: list[Any]) -> None:
    with meeting() as held:
        stranger = held.connect(*words)
        held.turn()
        assert held.heard == []
        assert held.hub.lines == {}
        assert is_closed(stranger)


def test_a_rank_is_taken_once_also_when_it_has_gone() -> None:
    with meeting() as held:
        first = held.connect(hello(1))
        held.turn()
        assert is_closed_after_turn(held, hello(1))
        assert list(held.hub.lines) == [1]
        first.close()
        held.turn()
        assert held.hub.lines == {}
        assert is_closed_after_turn(held, hello(1))  # a replay of what was said before
        assert [message for _, message in held.heard] == [{"rank": 1, "host": "node-1"}]


def is_closed_after_turn(held: Meeting, *words: Message) -> bool:
    client = held.connect(*words)
    held.turn()
    return is_closed(client)


@pytest.mark.parametrize("word", [STATUS | {"rank": 2}, hello(1), b"no JSON\n", STATUS | {"age_s": "x"}])
def test_a_rank_that_says_what_no_watcher_says_is_let_go(word: Any) -> None:
    """Nobody would watch it any more, so the watcher of rank 0 takes it for lost; the hub itself goes on."""
    with meeting() as held:
        held.connect(hello(1))
        held.connect(hello(2))
        held.turn()
        held.clients[0].sendall(word if isinstance(word, bytes) else json.dumps(word).encode() + b"\n")
        held.turn()
        assert list(held.hub.lines) == [2]
        assert len(held.heard) == 2


def test_silent_strangers_are_few_and_have_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with meeting() as held:
        strangers = [held.connect() for _ in range(hub.MAX_STRANGERS + 50)]
        held.turn()
        assert len(held.selector.get_map()) == 1 + hub.MAX_STRANGERS
        assert all(is_closed(stranger) for stranger in strangers[:50])  # the oldest
        held.connect(hello(1))
        held.turn()
        assert list(held.hub.lines) == [1]
        monkeypatch.setattr(hub, "STRANGER_S", 0.0)
        assert held.hub.tend() == []
        assert len(held.selector.get_map()) == 2  # the listener and rank 1
        assert all(is_closed(stranger) for stranger in strangers)


def test_a_rank_comes_through_where_descriptors_run_out() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with meeting() as held:
        held.connect(hello(1))
        clients = [held.connect() for _ in range(5)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            held.turn()  # it is over: the hub does not ask again and again
            assert held.heard == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        held.hub.tend()
        held.turn()
        assert list(held.hub.lines) == [1]
        assert len(held.selector.get_map()) == 2 + len(clients)


def test_the_room_for_strangers_is_what_the_ranks_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    assert [hub._room_for_strangers(size) for size in (2, 1000, 4096)] == [hub.MAX_STRANGERS, 12, 1]


def test_one_that_does_not_read_neither_blocks_the_hub_nor_fills_it() -> None:
    here, there = socket.socketpair()
    line = Line(here)
    n_sent = 0
    while line.open and n_sent < 10_000:
        line.send({"rank": 0, "reason": "x" * 4096})
        n_sent += 1
    assert not line.open
    assert len(line._unsent) <= hub.MAX_UNSENT_BYTES + 5000
    line.send({"alive": True})
    here.close()
    there.close()


def test_what_found_no_room_is_sent_later() -> None:
    here, there = socket.socketpair()
    line, other = Line(here), Line(there)
    messages = [{"rank": number, "reason": "x" * 4096} for number in range(150)]
    for message in messages:
        line.send(message)
    assert line._unsent
    found: list[Message] = []
    for _ in range(1000):
        found += other.receive()
        line.flush()
    assert line.open and other.open
    assert found == messages
    here.close()
    there.close()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_strangers_do_the_ranks_stay(seed: int) -> None:
    """Random bytes, halves of lines, replays, spoofed ranks, floods, resets, in any order; the ranks come amidst it."""
    numbers = random.Random(seed)
    lines = [
        json.dumps(one).encode() + b"\n"
        for one in [hello(1), hello(2), hello(1, "6" * 32), hello(7), *HONEST]
    ]
    with meeting() as held:
        for number in range(300):
            if number in (100, 200):
                held.connect(hello(number // 100))
                held.turn()
            known = list(held.hub.lines.values())
            stranger = held.connect()
            with suppress(OSError):
                for _ in range(numbers.randrange(4)):
                    # Who comes first with the password is welcome, so before that strangers do not have it.
                    line = numbers.choice(lines if len(known) == 2 else lines[2:4])
                    cut = numbers.randrange(len(line) + 1)
                    pieces = (line, line[:cut], line[cut:], numbers.randbytes(cut), b"[" * 300 * cut)
                    stranger.sendall(numbers.choice(pieces))
            if numbers.random() < 0.3:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.close()
            if numbers.random() < 0.2:
                held.turn()
                held.hub.tend()
        held.turn()
        assert sorted(held.hub.lines) == [1, 2]
        assert [message["host"] for _, message in held.heard] == ["node-1", "node-2"]
        assert len(held.selector.get_map()) <= 3 + hub.MAX_STRANGERS


# ---- a watcher that meets the hub ------------------------------------------------------------------------------------


def watcher_of_rank_1(address: tuple[str, int]) -> Any:
    """A watcher that watches nothing, just before it joins the hub at an address."""
    watcher: Any = object.__new__(Watcher)
    watcher.selector = selectors.DefaultSelector()
    watcher.rank, watcher.host, watcher.limits = 1, "node-1", {"lost_s": 20}
    watcher.listener = watcher.peers = watcher.hub = None
    watcher.bye = watcher.dead = watcher.welcomed = False
    watcher.verdicts = []
    watcher._end = lambda verdict, told=False: watcher.verdicts.append(verdict)
    watcher._join([*address, PASSWORD])
    return watcher


def test_a_watcher_that_a_full_hub_has_dropped_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.reliability.watcher.JOIN_PAUSE_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        watcher = watcher_of_rank_1(listener.getsockname())

        def turn() -> None:
            for key in watcher._ready():
                watcher._handle(key)

        for _ in range(3):
            connection, _ = listener.accept()
            assert parse(connection.recv(1000).strip()) == hello(1)
            connection.close()
            turn()
        connection, _ = listener.accept()
        connection.sendall(b'{"alive": true}\n')
        turn()
        assert watcher.welcomed and not watcher.verdicts
        connection.close()
        turn()  # but not once it has been taken: then rank 0's watcher is gone
        assert [verdict["reason"] for verdict in watcher.verdicts] == ["the watcher of rank 0 is gone"]
        watcher.selector.close()


@pytest.mark.parametrize("word", [b"no JSON\n", json.dumps(STATUS | {"rank": 2}).encode() + b"\n", b""])
def test_a_rank_that_leaves_with_its_first_words_is_lost(word: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        watcher: Any = object.__new__(Watcher)
        watcher.selector, watcher.table, watcher.size = selectors.DefaultSelector(), {}, 3
        watcher.listener, watcher.hub = listener, None
        watcher._join([*listener.getsockname(), PASSWORD])
        lost: list[tuple[int, str]] = []
        watcher._decide = lambda rank, cause, reason: lost.append((rank, cause))
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(json.dumps(hello(1)).encode() + b"\n" + word)
            client.shutdown(socket.SHUT_WR)
            while not lost:
                for key in watcher._ready():
                    watcher._handle(key)
        assert lost == [(1, "lost")]
        watcher.selector.close()


@pytest.mark.parametrize(
    ("verdict", "since_s", "over"), [(None, 60, False), ({}, 1, False), ({}, LEAVE_S + 1, True)]
)
def test_a_hub_does_not_wait_for_a_lost_host_to_close_its_connection(
    verdict: Any, since_s: float, over: bool
) -> None:
    """It would keep the job's node from being free. Without a verdict it does wait: the others still have work."""
    hub: Any = object.__new__(Watcher)
    hub.dead, hub.verdict, hub.ended_at = True, verdict, time.monotonic() - since_s
    hub.peers = SimpleNamespace(lines={1: object()})
    assert hub._over() is over
    hub.dead = False
    assert not hub._over()
