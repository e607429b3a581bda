"""Saves checkpoints in a thread while training continues, and deletes those that the policy does not keep.

Training pauses only for the copy to host memory (`EngineState.snapshot`). At most one save is in flight. When the next
one is due before it ends, all ranks first wait for it, at the same step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint.tensors import (
    CheckpointError,
    checkpoint_path,
    list_checkpoints,
    remove,
    save,
    step_of,
    verify,
)
from pretrain.config import CheckpointConfig
from pretrain.distributed import Partition, World, gather_objects, with_own_group
from pretrain.reliability.heartbeat import touch

IO_POLL_S = 1.0
IO_NOISE_BYTES = 1 << 16
"""A process may read and write this number of bytes between two polls for reasons other than a save."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The result of one save."""

    step: int
    path: Path
    stall_s: float
    """Seconds that training paused for the copy to host memory."""
    write_s: float = 0.0
    """Seconds from the end of the copy until the checkpoint was durable and published."""
    bytes: int = 0
    """Total size of all files of the checkpoint."""
    deleted: list[Path] = field(default_factory=list)
    """Older checkpoints that were deleted afterwards."""
    problem: str | None = None
    """Why nothing was published; None after a success."""


class Saver:
    """Writes the checkpoints of a run. Every rank has a Saver and calls its methods at the same steps.

    `heldout_losses` maps the steps evaluated so far to their held-out losses; the caller adds to it.
    """

    def __init__(
        self, root: Path, policy: CheckpointConfig, world: World, heldout_losses: dict[int, float]
    ) -> None:
        self._root, self._policy, self._heldout_losses = root, policy, heldout_losses
        # In a shared group, collectives of the saving thread could be matched with those of training.
        self._world = with_own_group(world)
        self._thread: threading.Thread | None = None
        self._result: Saved | None = None
        self._crash: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank has a save in flight, or one whose result `finished` has not yet returned."""
        return self._thread is not None

    def start(
        self,
        step: int,
        snapshot: Callable[[], dict[str, Partition]],
        state: dict[str, Any],
    ) -> None:
        """Copy the state and start to write it. No other save may be in flight."""
        assert self._thread is None, "one save at a time"
        started = time.monotonic()
        partitions = snapshot()
        begun = Saved(step=step, path=checkpoint_path(self._root, step), stall_s=time.monotonic() - started)
        self._thread = threading.Thread(
            target=self._work, args=(begun, partitions, state), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finished(self, *, wait: bool = False) -> Saved | None:
        """The result of the save in flight, returned only once; None where there is no save or it is not done yet.

        With `wait`, it first waits for the save. A storage failure is returned as `Saved.problem`; any other error of
        the save, such as the death of a rank, is raised here.
        """
        if self._thread is None or (not wait and self._thread.is_alive()):
            return None
        n_bytes = io_bytes()
        while self._thread.is_alive():
            self._thread.join(IO_POLL_S)
            if io_bytes() > n_bytes + IO_NOISE_BYTES:  # tell the watchdog that the write makes progress
                n_bytes = io_bytes()
                touch()
        self._thread = None
        if self._crash is not None:
            raise self._crash
        return self._result

    def _work(self, begun: Saved, partitions: dict[str, Partition], state: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            facts: dict[str, Any] = {}
            try:
                facts["bytes"] = save(self._root, begun.step, partitions, state, self._world)
                facts["write_s"] = time.monotonic() - started
                facts["deleted"] = retain(self._root, self._policy, self._world, self._heldout_losses)
            except CheckpointError as error:
                facts["problem"] = str(error)
            self._result = Saved(**{**vars(begun), **facts})
        except BaseException as error:
            self._crash = error


def retain(
    root: Path, policy: CheckpointConfig, world: World, heldout_losses: dict[int, float] | None = None
) -> list[Path]:
    """Delete the checkpoints that the policy does not keep, after reading back and verifying the newest one.

    All ranks call this together; rank 0 decides. `heldout_losses` by step determine the best checkpoints. Returns the
    deleted folders.
    """
    paths = list_checkpoints(root) if world.is_main else []
    surplus = gather_objects(_surplus(paths, policy, heldout_losses or {}), world)[0]
    newest = gather_objects(paths[-1] if paths else None, world)[0]
    if not surplus or verify(newest, world) is not None:
        return []
    if world.is_main:
        for path in surplus:
            remove(path)
    return surplus


def _surplus(paths: list[Path], policy: CheckpointConfig, heldout_losses: dict[int, float]) -> list[Path]:
    """The checkpoints that are neither among the newest nor permanent nor among the best."""
    measured = [path for path in paths if step_of(path) in heldout_losses]
    best = sorted(measured, key=lambda path: heldout_losses[step_of(path)])[: policy.keep_best]
    return [
        path
        for path in paths[: -policy.keep_last]
        if path not in best and (not policy.keep_every_steps or step_of(path) % policy.keep_every_steps != 0)
    ]


def io_bytes() -> int:
    """Bytes that this process has read and written so far, except on sockets. This call itself reads a few bytes."""
    read, written = Path("/proc/self/io").read_text().splitlines()[:2]
    return int(read.split()[1]) + int(written.split()[1])
