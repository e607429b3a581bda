"""The faults of a chaos run: their plan, their victims, the causes that may be reported, and damage to the disk."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.reliability.starts import Cause
from support.supervised import below

STOPPING = {signal.SIGTERM, signal.SIGUSR1}
KINDS = {"SIGKILL": 8, "SIGSEGV": 2, "SIGABRT": 2, "SIGTERM": 3, "SIGUSR1": 2, "SIGSTOP": 2}
VICTIMS = {
    "rank": 8,
    "launcher": 3,
    "deepspeed": 3,
    "loader worker": 2,
    "watcher": 2,
    "guard": 1,
    "supervisor": 2,
    "everything": 3,
}
# SIGSTOP is left out, because whoever stops a supervisor also continues it.
SUPERVISOR_KINDS = {"SIGKILL", "SIGTERM", "SIGUSR1"}
DAMAGES = ("bit flip", "truncation", "missing file", "empty COMPLETE")


@dataclass(frozen=True)
class Fault:
    """A planned fault. The victim is chosen only when the fault is delivered, from the processes that live then."""

    kind: str
    moment: float
    """When it is delivered, as a fraction of the attempt's expected length."""
    aim: str
    """When exactly to deliver it: `uniform` at `moment`; `loading` or `saving` at the next such phase after it;
    `recovery` during startup; `trained` after two checkpoints and two steps."""
    victim: float
    """Random number from 0 to 1 that picks the kind of process, by weight."""
    index: float
    """Random number from 0 to 1 that picks a process of that kind."""
    damage: str | None
    """Damage to the newest checkpoint. It is done only if the victim is `everything` and an older checkpoint exists."""
    dice: float
    """Random number from 0 to 1 that picks the damaged file and the place in it."""


def plan(seed: int, number: int, broken: str) -> Fault:
    """The fault with this number in the sequence that follows from a seed."""
    dice = random.Random(f"{seed}/{number}")
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    aim = dice.choices(["uniform", "loading", "saving", "recovery"], [16, 1, 2, 1])[0]
    damage = dice.choice([*DAMAGES, None, None])
    fault = Fault(kind, dice.random(), aim, dice.random(), dice.random(), damage, dice.random())
    if broken:  # only a power cut after two checkpoints shows what a missing protection loses
        damage = "bit flip" if broken == "hash" else None
        return Fault("SIGKILL", 0.0, "trained", 1.0, 0.0, damage, fault.dice)
    return fault


def choose(fault: Fault, by_role: dict[str, list[int]], supervisor: int) -> tuple[str | None, int]:
    """The kind and process id of the victim; the kind is None if no living process suits the fault."""
    living = {name: pids for name, pids in by_role.items() if name in VICTIMS}
    living["everything"] = [0]
    if fault.kind in SUPERVISOR_KINDS:
        living["supervisor"] = [supervisor]
    names = [name for name in VICTIMS if name in living]
    weights = [VICTIMS[name] for name in names]
    at = fault.victim * sum(weights)
    for name, weight in zip(names, weights, strict=True):
        at -= weight
        if at <= 0:
            pids = sorted(living[name])
            return name, pids[min(len(pids) - 1, int(fault.index * len(pids)))]
    return None, 0


def harmless(fault: dict) -> bool:
    """Whether the attempt continues: loader workers and watchers ignore requests, and a stopped launcher only waits."""
    number, victim = signal.Signals[fault["kind"]], fault["victim"]
    if number == signal.SIGSTOP:
        return victim in ("launcher", "deepspeed", "guard")
    return number in STOPPING and victim in ("loader worker", "watcher")


def expected_causes(faults: list[dict]) -> set[str]:
    """The causes that the supervisor may report for an unfinished attempt after these faults."""
    allowed: set[Cause] = set()
    for fault in faults:
        number, victim = signal.Signals[fault["kind"]], fault["victim"]
        stopping = number in STOPPING
        match victim:
            case "rank" if number == signal.SIGSTOP:
                allowed |= {Cause.FROZEN, Cause.HANG}
            case "rank":
                allowed |= {Cause.STOPPED if stopping else Cause.KILLED}
            case "loader worker":
                allowed |= {Cause.HANG} if number == signal.SIGSTOP else {Cause.CRASH}
            case "watcher":
                allowed |= {Cause.HOST_LOST}
            case (
                "launcher"
            ):  # `deepspeed` returns 0 when its child is ended by a signal; at SIGTERM the child exits
                allowed |= {Cause.STOPPED if number == signal.SIGTERM else Cause.LAUNCHER_LOST}
            case "deepspeed" | "guard" | "supervisor":
                allowed |= {Cause.STOPPED if stopping else Cause.LAUNCHER_LOST}
        if (
            fault["phase"] == "start-up"
        ):  # the run may not have started, and then only the exit of the launcher is known
            allowed |= {Cause.NOT_STARTED, Cause.KILLED, Cause.CRASH, Cause.LAUNCHER_LOST, Cause.HOST_LOST}
            allowed |= {Cause.FROZEN, Cause.HANG} if number == signal.SIGSTOP else set()
            allowed |= {Cause.STOPPED, Cause.UNSAVED_STOP} if stopping else set()
    return {str(cause) for cause in allowed}


# ---- the machine -----------------------------------------------------------------------------------------------------


def kill_all() -> None:
    """Kill all descendants of this process, and reap those that it has inherited."""
    while left := below(os.getpid()):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def forget_unsynced(run_dir: Path) -> None:
    """Truncate every file under checkpoints/ to its synced length, as a power failure may."""
    log = run_dir.with_suffix(".synced")
    synced = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        device, inode, length = (int(word) for word in line.split())
        synced[device, inode] = length
    for path in (run_dir / "checkpoints").rglob("*"):
        status = path.stat()
        length = synced.get((status.st_dev, status.st_ino), 0)
        if path.is_file() and status.st_size > length:
            os.truncate(path, length)


def damage(checkpoint: Path, fault: Fault) -> None:
    """Damage one file of a complete checkpoint."""
    if fault.damage == "empty COMPLETE":
        os.truncate(checkpoint / "COMPLETE", 0)
        return
    paths = sorted(checkpoint.glob("*.safetensors"))
    path = paths[int(fault.dice * len(paths))]
    if fault.damage == "missing file":
        path.unlink()
    elif fault.damage == "truncation":
        os.truncate(path, int(path.stat().st_size * fault.dice))
    else:
        content = bytearray(path.read_bytes())
        # The flipped bit is in the exponent of a number in the last quarter of the file, so it is never in the header.
        at = len(content) * 3 // 4 // 4 * 4 + 3
        content[at] ^= 0x02
        path.write_bytes(content)
