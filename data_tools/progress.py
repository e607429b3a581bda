"""Shows the progress of long stages on stderr: a bar on a terminal, otherwise a plain line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pretrain.printing import visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0


class ByteProgress:
    """Progress of one stage, counted in bytes."""

    def __init__(self, name: str, total_bytes: int, bar: Progress | None) -> None:
        self._name, self._total, self._bar = visible(name), max(total_bytes, 1), bar
        self._done, self._first_done = 0, 0
        self._start = self._last_line = time.monotonic()
        self._task: TaskID | None = bar.add_task(self._name, total=total_bytes) if bar else None

    def skip(self, done_bytes: int) -> None:
        """Count work that an earlier, interrupted call has done, but do not include it in the rate."""
        self._first_done += done_bytes
        self.advance(done_bytes)

    def advance(self, more_bytes: int) -> None:
        self._done += more_bytes
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, elapsed_s: float) -> str:
        """The current state as a line of text."""
        rate = (self._done - self._first_done) / max(elapsed_s, 1e-9)
        left_s = max(self._total - self._done, 0) / rate if rate > 0 else 0.0
        share = min(self._done / self._total, 1.0)
        megabytes = f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB ({share:.0%})"
        return f"{self._name}: {megabytes}, {rate / 1e6:.1f} MB/s, {left_s:.0f} s left"


@contextmanager
def stage(name: str, total_bytes: int) -> Iterator[ByteProgress]:
    """Show the progress of a stage, and at its end the time that it took."""
    start = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield ByteProgress(name, total_bytes, bar)
    else:
        yield ByteProgress(name, total_bytes, None)
    print(f"{visible(name)}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Show that work of unknown length is in progress."""
    start, over = time.monotonic(), threading.Event()

    def tick() -> None:
        while not over.wait(LINE_EVERY_S):
            print(f"{name}: {time.monotonic() - start:.0f} s so far", file=sys.stderr, flush=True)

    print(name, file=sys.stderr, flush=True)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    print(f"{name}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
