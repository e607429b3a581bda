"""Files of JSON lines that survive a killed writer: how records are appended, and how they are read back.

Needs no package, so that a watcher can write one and the quickstart read one.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.files import open_for_append, open_regular, try_lock, unlock
from pretrain.printing import say

MAX_LINE_BYTES = 64 << 20
"""A line of the ledger names every sample of a rank's step."""
LOCK_WAIT_S = 2.0
"""Another writer holds the lock for one line. One that holds it for longer than this was stopped by a signal."""
_LOCK_POLL_S = 0.001
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def utc_now() -> str:
    """The time of a record: UTC, for people; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---- writing ---------------------------------------------------------------------------------------------------------


class JsonLines:
    """Appends records to one file of JSON lines; of one process or, where `shared`, of several at the same time.

    A record is written by one system call, so that it survives the death of the process at any later moment. What a
    killed writer or a full disk has left of a line is cut off, by the writer itself or before the next line. Floats
    are written so that reading gives the same bits; NaN and infinities as the strings "NaN", "Infinity", "-Infinity",
    since JSON has none.

    `shared`: each line is written, and a torn one cut off, under a lock of the file; else the cut could take a line
    that another process has just written. The lock costs round trips on a network file system, so files that get a
    line in every step do without it: each of them has one writer.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._shared = shared
        self._warned = False
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_for_append(path)
        except OSError as error:
            self._warn(error)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. A failure is reported once; later records are tried again."""
        line = json.dumps(jsonable(record), allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._descriptor is None:
                return
            try:
                with self._alone(self._descriptor) as alone:
                    _append_line(self._descriptor, line, alone)
            except OSError as error:
                self._warn(error)

    @contextmanager
    def _alone(self, descriptor: int) -> Iterator[bool]:
        """Hold the lock of a shared file meanwhile. Yields False where a stopped process does not give it up."""
        if not self._shared:
            yield True
            return
        deadline = time.monotonic() + LOCK_WAIT_S
        while not (locked := try_lock(descriptor)) and time.monotonic() < deadline:
            time.sleep(_LOCK_POLL_S)
        try:
            yield locked
        finally:
            if locked:
                unlock(descriptor)

    def close(self) -> None:
        """No record can be written after this."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            why = error.strerror or error
            say(f"warning: {self._path} cannot be written ({why}); the run does not depend on it")
        self._warned = True


def _append_line(descriptor: int, line: bytes, alone: bool) -> None:
    """Append a line by one system call.

    Unless `alone`, the file is never shortened: what looks torn may be a line that another process is writing.
    """
    if alone:
        _cut_torn_line(descriptor)
    elif _is_torn(descriptor):
        raise OSError("a stopped process has left half a line")
    if os.write(descriptor, line) < len(line):
        if alone:
            _cut_torn_line(descriptor)
        raise OSError("no space left for a whole line")


def _is_torn(descriptor: int) -> bool:
    end = os.fstat(descriptor).st_size
    return end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"


def _cut_torn_line(descriptor: int) -> None:
    """Shorten the file to its last line feed."""
    if not _is_torn(descriptor):
        return
    end = os.fstat(descriptor).st_size
    start = end
    while start > 0:
        start = max(0, start - 65536)
        at = os.pread(descriptor, min(65536, end - start), start).rfind(b"\n")
        if at >= 0:
            start += at + 1
            break
    if start < end:
        os.ftruncate(descriptor, start)


def jsonable(value: Any) -> Any:
    """The value as JSON can hold it; what JSON has no type for becomes text."""
    match value:
        case None | bool() | str():
            return value
        case Enum():
            return value.name
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            if math.isfinite(number):
                return number
            return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
        case dict():
            return {str(key): jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [jsonable(item) for item in value]
        case _:
            return str(value)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_lines(path: str | Path, **required: type) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; without the last line where it is torn or still being written.

    `required`: keys that each record must have, and the types of their values. A missing file has no records. Raises
    ConfigError where an earlier line is no such JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not line.endswith(b"\n"):
                if len(line) == MAX_LINE_BYTES:
                    raise ConfigError(f"{path}, line {number} has more than {MAX_LINE_BYTES:,} bytes")
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{path}, line {number} is no JSON object")
            for key, kind in required.items():
                if type(record.get(key)) is not kind:
                    raise ConfigError(f"{path}, line {number} has no {key}, or one of another type")
            records.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records
