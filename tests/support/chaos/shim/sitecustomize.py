"""Runs first in every Python process of a chaos run. Records what was synced, and disables protections on request.

CHAOS_SYNCED names a file that gets (device, inode, bytes) of every synced file. To simulate a power failure, run.py
truncates files to what it lists. CHAOS_BREAK disables a protection, to show that it is needed: `fsync` (files are never
synced), `hash` (every checkpoint counts as good) or `loader` (a resumed run reads from the beginning).
"""

import importlib.abc
import importlib.machinery
import os
import stat
import sys
from types import ModuleType

BROKEN = os.environ.get("CHAOS_BREAK", "")
real_fsync = os.fsync


def fsync(file: object) -> None:
    if BROKEN == "fsync":
        return
    descriptor = file if isinstance(file, int) else file.fileno()  # type: ignore[attr-defined]
    real_fsync(descriptor)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        line = f"{status.st_dev} {status.st_ino} {status.st_size}\n".encode()
        log = os.open(os.environ["CHAOS_SYNCED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(log, line)
        os.close(log)


if "CHAOS_SYNCED" in os.environ:
    os.fsync = fsync


def trust_everything(module: ModuleType) -> None:
    assert callable(module.file_problem)
    module.file_problem = lambda folder, name, entry: None  # type: ignore[attr-defined]


def forget_the_position(module: ModuleType) -> None:
    steps = module.TrainLoader.steps
    module.TrainLoader.steps = lambda self, first_step, *exchange: steps(self, 1, *exchange)


PATCHES = {
    "hash": ("pretrain.checkpoint.tensors", trust_everything),
    "loader": ("pretrain.data.loader", forget_the_position),
}


class Patcher(importlib.abc.MetaPathFinder):
    """Imports one module as usual, then changes it."""

    def __init__(self, name, patch) -> None:
        self.name, self.patch = name, patch

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.patch(module)

        spec.loader.exec_module = exec_module
        return spec


if BROKEN in PATCHES:
    sys.meta_path.insert(0, Patcher(*PATCHES[BROKEN]))
