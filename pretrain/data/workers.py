"""The processes that read micro batches ahead of the trainer. They import no torch, so each starts in half a second.

Items are sent to the workers in turn (0, 1, ..., 0, ...), and answers are received in the same turn, so their order is
the same as with a single process. Each worker has its own socket to the trainer. It sends arrays, because tensors would
need shared memory, of which a container has only 64 MB by default.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pretrain.config.data_stages import stage_at
from pretrain.data.order import Order
from pretrain.data.permutation import Ints
from pretrain.data.sequences import SequenceReader, Sequences
from pretrain.errors import RunError
from pretrain.reliability.heartbeat import memory_ran_out
from pretrain.reliability.processes import end_with_parent

_ROOT = Path(__file__).resolve().parents[2]
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_END_S = 1.0
"""Seconds that a worker gets to end after its connection is closed; then it is killed."""


class MicroBatches:
    """Reads micro batches: (samples of a micro batch, samples to prefetch) -> (its sequences, its samples [B])."""

    def __init__(self, reader: SequenceReader, order: Order) -> None:
        self._reader, self._order = reader, order

    def __call__(self, wanted: tuple[Ints, Ints]) -> tuple[Sequences, Ints]:
        """Read one micro batch. Raises the errors of `SequenceReader.read`."""
        samples, upcoming = wanted
        if len(upcoming):
            self._reader.prefetch(self._order.locate(upcoming))
        length = self._order.stages[stage_at(self._order.stages, int(samples[0]))].sequence_length
        return self._reader.read(self._order.locate(samples), samples, length), samples


def read_ahead(read: Callable[[Any], Any], items: Iterator[Any], n_workers: int, ahead: int) -> Iterator[Any]:
    """Yield `read(item)` for each item, in order, computed in `n_workers` processes with up to `ahead` items each.

    The iterator owns its workers, which end with it. Raises what `read` raises (RunError, OSError), and RunError if a
    worker dies.
    """
    workers: list[_Worker] = []
    try:
        for _ in range(n_workers):
            workers.append(_Worker())
        for worker in workers:
            worker.send(read)
        asked: deque[_Worker] = deque()
        for item, worker in zip(items, cycle(workers), strict=False):
            worker.send(item)
            asked.append(worker)
            if len(asked) > n_workers * ahead:
                yield asked.popleft().receive()
        while asked:
            yield asked.popleft().receive()
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.end()


class _Worker:
    """One worker process, as the trainer sees it."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        code = f"from pretrain.data.workers import serve; serve({theirs.fileno()}, {os.getpid()})"
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # A request to stop (Ctrl-C, Slurm, the launcher) reaches every process of a job, but only the trainer may
        # act on it: it finishes the step and saves. In its workers these signals are blocked from the start.
        allowed = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            # Start a new program instead of forking: the trainer has threads of gloo, autograd and OpenMP, and a fork
            # at the wrong moment for one of them leaves the child hanging (seen once in 23 starts).
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **one_thread, "PYTHONPATH": path},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
            theirs.close()

    def send(self, value: Any) -> None:
        try:
            self.connection.send(value)
        except OSError as error:
            raise self._dead() from error

    def receive(self) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Wait for the worker to end, and kill it if it does not. Its connection must have been closed."""
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _dead(self) -> RunError:
        code = self._process.wait()
        if code >= 0:
            reason, cause = f"exit code {code}", "what it has printed above says why"
        else:
            reason = signal.Signals(-code).name
            cause = "the kernel ran out of memory" if memory_ran_out() else "killed from outside"
        return RunError(
            f"a process that reads training data died (pid {self._process.pid}, {reason}): {cause}; start again to go "
            "on from the last checkpoint"
        )


# ---- in the worker ---------------------------------------------------------------------------------------------------


def serve(descriptor: int, trainer_pid: int) -> None:
    """The program of a worker. It answers items until the trainer closes the connection or dies."""
    # If the trainer is killed while its worker is reading from a slow store, the worker must end at once.
    end_with_parent(trainer_pid, signal.SIGKILL)
    connection = Connection(descriptor)
    answers: SimpleQueue[Any] = SimpleQueue()
    # A separate thread sends the answers, so that reading continues while the trainer is busy and the socket is full.
    threading.Thread(target=_send, args=(connection, answers), daemon=True).start()
    read = _receive(connection)
    while True:
        item = _receive(connection)
        try:
            answer = read(item)
        except (RunError, OSError) as error:
            answer = error  # raised by the trainer; raised here, it would only print a traceback
        answers.put(ForkingPickler.dumps(answer))


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        os._exit(0)


def _send(connection: Connection, answers: SimpleQueue[Any]) -> None:
    with suppress(OSError):
        while True:
            connection.send_bytes(answers.get())
    os._exit(0)
