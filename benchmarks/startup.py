"""Measure the CPU time (user, system) to the first step: `python benchmarks/startup.py [CHECKOUT ...] [--repeats N]`

Starts the smallest run on 2 ranks with one loader worker each, as a user would, and reads from /proc the CPU time of
each process when both ranks have done their first step. A rank's time is divided by the phases that it marks for its
watcher. Then it times commands that only print help or an error, and lists the time of a rank's imports by package. The
figures are medians of N starts. CPU time depends less on other load than wall time, but on a busy machine it rises too.
So several checkouts are measured in turns, and should be compared only with each other.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pretrain.reliability import heartbeat
from support.tiny import TinyCorpus, make_corpus, run_arguments

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
N_RANKS = 2
POLL_S = 0.004
SLOWEST_START_S = 300
KINDS = {  # kind of a process, by a part of its command line; the first match counts
    "launcher, deepspeed": "bin/deepspeed",
    "launcher, launch.py": "deepspeed.launcher.launch",
    "watcher": "pretrain.reliability.watcher",
    "loader worker": "pretrain.data.workers",
    "loader worker of torch": "multiprocessing.spawn",
    "resource tracker": "multiprocessing.resource_tracker",
    "rank": "launch/train.py",
}
PER_RANK = ("watcher", "loader worker", "loader worker of torch", "resource tracker")
TOTALS = ("rank, all phases (each)", "all but the launcher", "all")
# Python may write byte code, as on a user's machine, so that only the first start of a checkout compiles it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
TRAINER_IMPORTS = "import pretrain.train.loop"


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkouts", type=Path, nargs="*", default=[ROOT], help="checkouts to compare (default: this one)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkouts = [path.resolve() for path in options.checkouts]
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus")
        numbers = itertools.count()
        starts = in_turns(
            checkouts,
            options.repeats,
            lambda checkout: measure_start(checkout, corpus, Path(folder) / f"run-{next(numbers)}"),
        )
    print_table("CPU-seconds to the first step", starts)
    print_table("CPU-seconds of commands", in_turns(checkouts, options.repeats, measure_commands))
    print_table(
        f"seconds of `{TRAINER_IMPORTS}` by package", in_turns(checkouts, options.repeats, measure_imports)
    )


def in_turns(
    checkouts: list[Path], repeats: int, measure: Callable[[Path], dict[str, float]]
) -> list[list[dict[str, float]]]:
    """The measurements of each checkout. Checkouts take turns, so that a machine whose speed drifts favors none."""
    for checkout in checkouts:
        measure(checkout)  # not counted: this reads files from the disk and compiles byte code
    rounds = [[measure(checkout) for checkout in checkouts] for _ in range(repeats)]
    return [list(rows) for rows in zip(*rounds, strict=True)]


# ---- a start ---------------------------------------------------------------------------------------------------------


def measure_start(checkout: Path, corpus: TinyCorpus, run_dir: Path) -> dict[str, float]:
    """CPU time in seconds of one start, by process and by phase of the ranks. The run is killed afterwards."""
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(N_RANKS)),
        *("--master_port", "29613", "launch/train.py"),
        *run_arguments(corpus, run_dir, "total_steps=1000000", "checkpoint.every_steps=1000000"),
        *("checkpoint.keep_every_steps=null", "evaluation.every_steps=1000000", "data.loader_workers=1"),
    ]
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command,
            cwd=checkout,
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
        )
    phases: dict[
        int, tuple[str, float]
    ] = {}  # phase and CPU time in seconds of each rank at its last measurement
    used: dict[str, float] = defaultdict(float)
    processes: dict[int, tuple[str, float]] = {}
    until = time.monotonic() + SLOWEST_START_S
    try:
        while sum(phase == "done" for phase, _ in phases.values()) < N_RANKS:
            if launcher.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the run did not come to its first step:\n{log.read_text()}")
            processes |= tree(launcher.pid)
            for pid, (kind, cpu_s) in processes.items():
                if kind == "rank":
                    follow(pid, cpu_s, phases, used)
            time.sleep(POLL_S)
    finally:
        for pid in tree(launcher.pid):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
    for kind, cpu_s in processes.values():
        if kind != "rank":
            used[f"{kind} (each)" if kind in PER_RANK else kind] += cpu_s
    ranks_s = sum(cpu_s for name, cpu_s in used.items() if name.startswith("rank: "))
    result = {
        name: cpu_s / (N_RANKS if "each" in name or name.startswith("rank: ") else 1)
        for name, cpu_s in used.items()
    }
    launcher_s = sum(cpu_s for name, cpu_s in used.items() if name.startswith("launcher"))
    total_s = sum(used.values())
    result["rank, all phases (each)"] = ranks_s / N_RANKS
    result["all but the launcher"] = total_s - launcher_s
    result["all"] = total_s
    return result


def follow(pid: int, cpu_s: float, phases: dict[int, tuple[str, float]], used: dict[str, float]) -> None:
    """Add the CPU time that a rank has used since the last call to the phase in which it is."""
    phase, before_s = phases.get(pid, ("config", 0.0))
    if phase == "done":
        return
    used[f"rank: {phase}"] += cpu_s - before_s
    beat = last_mark(pid)
    if beat is not None:
        phase = beat.phase.replace("micro batch", "first step")
        if beat.step > 1 or (beat.step == 1 and phase == "update done"):
            phase = "done"
    phases[pid] = (phase, cpu_s)


def last_mark(pid: int) -> heartbeat.Heartbeat | None:
    """The last mark that a rank has set for its watcher, read from the memory that both share."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link).startswith("/memfd:progress"):
                descriptor = os.open(link, os.O_RDONLY)
                try:
                    return heartbeat.read(descriptor)
                finally:
                    os.close(descriptor)
    except OSError:  # the process has ended or has just started
        pass
    return None


def tree(root: int) -> dict[int, tuple[str, float]]:
    """Kind and CPU time of a process and all its descendants, including the time of children that have ended."""
    stats: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            stats[int(folder.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / TICKS_PER_S)
    found = {root}
    grown = True
    while grown:
        more = {pid for pid, (parent, _) in stats.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return {pid: (kind_of(pid), stats[pid][1]) for pid in found if pid in stats}


def kind_of(pid: int) -> str:
    """The kind of a process, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "other"
    return next((kind for kind, part in KINDS.items() if part in words), "other")


# ---- commands and imports --------------------------------------------------------------------------------------------


def measure_commands(checkout: Path) -> dict[str, float]:
    """CPU time in seconds of every command's --help, and of a run with a wrong configuration."""
    scripts = sorted((checkout / "launch").glob("*.py"))
    modules = sorted(
        f"data_tools.{path.stem}"
        for path in (checkout / "data_tools").glob("*.py")
        if "__main__" in path.read_text()
    )
    commands = {f"launch/{path.name} --help": [str(path), "--help"] for path in scripts}
    commands |= {f"python -m {module} --help": ["-m", module, "--help"] for module in modules}
    commands["launch/train.py --cfg job"] = ["launch/train.py", "run_dir=x", "total_steps=9", "--cfg", "job"]
    commands["launch/train.py, an unknown key"] = ["launch/train.py", "run_dir=x", "modle=tiny"]
    commands["launch/train.py, no such corpus"] = [
        *(
            "launch/train.py",
            "run_dir=x",
            "total_steps=9",
            "schedule.warmup_steps=2",
            "data.manifest=nothing",
        ),
    ]
    used = {}
    for name, arguments in commands.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments], cwd=checkout, env=ENVIRONMENT, capture_output=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used[name] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used


def measure_imports(checkout: Path) -> dict[str, float]:
    """Seconds that a rank's imports take, by top-level package."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", TRAINER_IMPORTS],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"},
    )
    seconds: dict[str, float] = defaultdict(float)
    for own_us, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", done.stderr, re.M):
        seconds[module.split(".")[0]] += int(own_us) / 1e6
    named = {name: s for name, s in seconds.items() if s >= 0.02}
    return {**named, "all others": sum(seconds.values()) - sum(named.values()), "all": sum(seconds.values())}


def print_table(title: str, measured: list[list[dict[str, float]]]) -> None:
    """Print the median and the range of each entry, with two columns per checkout."""
    names = dict.fromkeys(name for rows in measured for row in rows for name in row)
    print(f"\n| {title} |{' median | range |' * len(measured)}\n|---|{'---|---|' * len(measured)}")
    for name in sorted(names, key=lambda name: (name in TOTALS, name)):
        columns = []
        for rows in measured:
            values = [row[name] for row in rows if name in row]
            columns.append(
                f" {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |"
                if values
                else " - | |"
            )
        print(f"| {name} |{''.join(columns)}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
