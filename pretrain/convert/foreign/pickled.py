"""Decodes a pickle as plain data, without importing or calling what it names.

The result consists of None, bool, int, float, str, bytes, list, dict, tuple, set, and these:

- `Name`: a class or function that loading the pickle would import;
- `Made`: what a call of it would return, with its arguments, and the state that would be set in it;
- `Persistent`: a reference to something outside of the pickle, such as a tensor's bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_BYTES = 256 << 20
_MAX_KEY_DEPTH = 3
_SIMPLE = (type(None), bool, int, float, str, bytes)
_MARK = object()


class PickledError(Exception):
    """A pickle is damaged, or holds what this program does not read. The message is one sentence."""


class Name(NamedTuple):
    """A class or function that loading the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Persistent(NamedTuple):
    """A reference to something that is stored outside of the pickle."""

    reference: Any


@dataclass(eq=False)
class Made:
    """What a call would return. Two of them are equal only if they are the same."""

    what: Any
    """Usually the Name of the class or function."""
    arguments: tuple[Any, ...]
    state: Any = None
    """The state that would be set; for most classes, a dict of attributes."""
    items: list[Any] = field(default_factory=list)
    """What would be appended."""
    entries: dict[Any, Any] = field(default_factory=dict)
    """What would be set by key."""

    @property
    def kind(self) -> str:
        """The full name of what would be called, or an empty text where that is no name."""
        return str(self.what) if isinstance(self.what, Name) else ""


def decode(content: bytes) -> Any:
    """The object that a pickle describes. Raises PickledError."""
    if len(content) > MAX_BYTES:
        raise PickledError(f"its pickle has {len(content):,} bytes; at most {MAX_BYTES:,} are read")
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except PickledError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise PickledError(f"its pickle is damaged ({type(error).__name__}: {error})") from error
    except (RecursionError, MemoryError) as error:
        raise PickledError("its pickle is nested too deeply or too large") from error
    raise PickledError("its pickle ends early")


def plain(value: Any) -> Any:
    """A dict for what would be a dict or an object with attributes, otherwise the value itself."""
    if not isinstance(value, Made):
        return value
    if isinstance(value.state, dict) and not value.entries:
        return value.state
    return value.entries


def _key(value: Any, depth: int = 0) -> Any:
    """A value that may be a key of a dict: its hash takes no time that an author of pickles could make long."""
    if (
        isinstance(value, tuple)
        and not isinstance(value, Persistent)
        and depth < _MAX_KEY_DEPTH
        and len(value) < 64
    ):
        for item in value:
            _key(item, depth + 1)
    elif not isinstance(value, (*_SIMPLE, Made)):
        raise PickledError(f"its pickle has a key of type {type(value).__name__}")
    return value


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._simple: dict[str, Callable[[], Any]] = {
            "NONE": lambda: None,
            "NEWTRUE": lambda: True,
            "NEWFALSE": lambda: False,
            "EMPTY_LIST": list,
            "EMPTY_DICT": dict,
            "EMPTY_SET": set,
            "EMPTY_TUPLE": tuple,
            "MARK": lambda: _MARK,
            "DUP": lambda: self.stack[-1],
            "TUPLE1": lambda: tuple(self.pops(1)),
            "TUPLE2": lambda: tuple(self.pops(2)),
            "TUPLE3": lambda: tuple(self.pops(3)),
            "TUPLE": lambda: tuple(self.to_mark()),
            "LIST": lambda: self.to_mark(),
            "FROZENSET": lambda: {_key(item) for item in self.to_mark()},
            "DICT": lambda: self.pairs(self.to_mark(), {}),
            "STACK_GLOBAL": lambda: self.name(*self.pops(2)),
            "REDUCE": lambda: self.call(*self.pops(2)),
            "NEWOBJ": lambda: self.call(*self.pops(2)),
            "NEWOBJ_EX": lambda: self.call(*self.pops(3)[:2]),
            "BINPERSID": lambda: Persistent(self.pop()),
        }

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickledError("its pickle has a mark in place of a value")
        return value

    def pops(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def pairs(self, values: list[Any], target: dict[Any, Any]) -> dict[Any, Any]:
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value
        return target

    def name(self, module: Any, name: Any) -> Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickledError("its pickle names something by what is no text")
        return Name(module, name)

    def call(self, what: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise PickledError("its pickle calls something with what are no arguments")
        return Made(what, arguments)

    def run(self, opcode: str, argument: Any) -> None:
        """Apply one instruction."""
        if (make := self._simple.get(opcode)) is not None:
            self.stack.append(make())
            return
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.to_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[int(argument)])
            case "GLOBAL":
                self.stack.append(self.name(*argument.split(" ", 1)))
            case "APPEND" | "APPENDS":
                items = self.pops(1) if opcode == "APPEND" else self.to_mark()
                self.list_below().extend(items)
            case "SETITEM" | "SETITEMS":
                values = self.pops(2) if opcode == "SETITEM" else self.to_mark()
                self.pairs(values, self.dict_below())
            case "ADDITEMS":
                items = self.to_mark()
                target = self.stack[-1]
                if not isinstance(target, set):
                    raise PickledError("its pickle adds to what is no set")
                target.update(_key(item) for item in items)
            case "BUILD":
                state = self.pop()
                if not isinstance(self.stack[-1], Made):
                    raise PickledError("its pickle sets the state of what it has not made")
                self.stack[-1].state = state
            case _ if isinstance(argument, int | float | str | bytes | bytearray) and not opcode.startswith(
                "EXT"
            ):
                if opcode in ("INST", "PERSID"):
                    raise PickledError(f"its pickle has the instruction {opcode}, which is not read")
                self.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
            case _:
                raise PickledError(f"its pickle has the instruction {opcode}, which is not read")

    def list_below(self) -> list[Any]:
        target = self.stack[-1]
        if isinstance(target, Made):
            return target.items
        if not isinstance(target, list):
            raise PickledError("its pickle appends to what is no list")
        return target

    def dict_below(self) -> dict[Any, Any]:
        target = self.stack[-1]
        if isinstance(target, Made):
            return target.entries
        if not isinstance(target, dict):
            raise PickledError("its pickle sets entries of what is no dict")
        return target
