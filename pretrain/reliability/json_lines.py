"""Appends records to files of JSON lines and reads them back, even after a writer was killed in the middle of a line.

This module imports the standard library only, so that a watcher can write such a file and the quickstart can read one.
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
"""Longer lines are refused. The longest lines are those of the ledger, which name all samples of a rank's step."""
LOCK_WAIT_S = 2.0
"""Seconds to wait for a lock. Writers hold it for one line only; one that holds it longer was stopped by a signal."""
_LOCK_POLL_S = 0.001
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def utc_now() -> str:
    """The time of day (UTC) for a record. People read it; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---- writing ---------------------------------------------------------------------------------------------------------


class JsonLines:
    """Appends records to one file of JSON lines. If it is `shared`, several processes may do so at the same time.

    Each record is written by one system call and survives if the process dies right after it. An incomplete line,
    left by a killed writer or a full disk, is cut off before the next line is written. Reading a float back gives the
    same bits. NaN and the infinities are written as the strings "NaN", "Infinity" and "-Infinity", since JSON cannot
    represent them.

    A `shared` file is locked while a line is written or an incomplete one is cut off. Without the lock, the cut could
    remove a line that another process has just written. Locking costs round trips on a network file system, so files
    that get a line in every step are not shared: each has a single writer.
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
        """Write one record. Only the first failure is reported, but every later record is tried."""
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
        """Hold the lock of a shared file within the block. Yields False if a stopped process keeps the lock."""
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
        """Close the file. Later records are dropped."""
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
    """Append a line with one system call.

    The file is shortened only if this process writes to it `alone`; otherwise an incomplete line may be one that
    another process is still writing.
    """
    if alone:
        _cut_torn_line(descriptor)
    elif _is_torn(descriptor):
        raise OSError("a stopped process has left an incomplete line")
    if os.write(descriptor, line) < len(line):
        if alone:
            _cut_torn_line(descriptor)
        raise OSError("no space left for a whole line")


def _is_torn(descriptor: int) -> bool:
    end = os.fstat(descriptor).st_size
    return end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"


def _cut_torn_line(descriptor: int) -> None:
    """Cut off what follows the last line feed of the file."""
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
    """The value in a form that JSON can represent. A value of a type that JSON lacks becomes text."""
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
    """The records of a file of JSON lines. A missing file has none, and an incomplete last line is left out.

    `required` names the keys that each record must have, and the types of their values. Raises ConfigError if a line
    is not a JSON object or lacks such a key.
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
                    raise ConfigError(
                        f"{path}, line {number}: the key {key} is missing or is not of type {kind.__name__}"
                    )
            records.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records
