"""Fuzz every parser of untrusted input: python tests/support/fuzz/run.py [--seconds S] [NAME...]

The fuzzer is atheris (libFuzzer), which is guided by coverage. Each harness of harnesses.py runs in its own process,
with limits on memory and time. Prints a table and each distinct finding with its input. The exit code is 1 if there is
a finding. Inputs that reach new code are kept in .found beside this file for the next run, and inputs of findings in
.found/NAME-findings. To turn a finding into a seed and a test, reduce its input and put it into crashers/NAME.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[3]
FOUND = HERE / ".found"
MAX_INPUT_BYTES = 1 << 14
MAX_MEMORY_BYTES = 512 << 20
"""Memory in bytes that one input may use beyond what the process used before."""
MAX_CPU_S = 3.0
"""CPU time in seconds for one input, with instrumented code."""
MAX_WALL_S = 20
MAX_RESTARTS = 20
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, 1e308, 1.5, "", "0", "a" * 300, "../x", "/etc/passwd", "\0", "\ud800",
    "\x1b[31m\n", "${oc.env:CANARY}", "${oc.decode:'${oc.env:CANARY}'}", "${seed}", "file:///dev/zero", "memory://x",
    [], {}, [[]], [0, -1], {"": ""}, [None] * 50, float("nan"), float("inf"),
]  # fmt: skip


@dataclass
class Result:
    """The result of fuzzing one harness."""

    name: str
    seconds: float = 0.0
    executions: int = 0
    coverage: int = 0
    findings: list[str] = field(default_factory=list)


# --- the process of one harness ---


def changed_json(data: bytes, rng: random.Random) -> bytes | None:
    """Replace, remove, double or move one value of a JSON text or of one of its lines. None if it is not JSON."""
    lines = data.split(b"\n")
    row = rng.randrange(len(lines))
    whole = b"\n" not in data.strip() or rng.random() < 0.5
    try:
        value = json.loads(data if whole else lines[row])
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left and len(places) < 20_000:
        node = left.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            left += [node[key] for key in keys]
    if not places:
        return None
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        node, key = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):  # an earlier change has removed it
            match rng.randrange(5):
                case 0:
                    del node[key]
                case 1 if isinstance(node[key], int | float):
                    node[key] += rng.choice([1, -1, 1 << 20, 0.5])
                case 2:
                    node[key] = rng.choice(places)[0]
                case 3 if isinstance(node, list):
                    node.insert(key, node[key])
                case _:
                    node[key] = rng.choice(ODD_VALUES)
    try:
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):  # the value now contains itself
        return None
    return text if whole else b"\n".join([*lines[:row], text, *lines[row + 1 :]])


def fault_of(error: BaseException) -> tuple[str, str]:
    """What identifies a finding: the error, and the last line of this project's code in its traceback."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))
    ]
    inside = [frame for frame in frames if not frame.filename.startswith(str(HERE))] or frames
    place = f"{Path(inside[-1].filename).relative_to(ROOT)}:{inside[-1].lineno}" if inside else "?"
    return type(error).__name__, place


class Checked:
    """A harness that records the smallest input of each kind of finding, and continues."""

    def __init__(self, one: Any, folder: Path) -> None:
        self.one, self.folder = one, folder
        self.smallest: dict[tuple[str, str], int] = {}

    def __call__(self, data: bytes) -> None:
        started, before = time.process_time(), peak_bytes()
        try:
            self.one(data)
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as error:  # panics of Rust's parsers are not subclasses of Exception, nor are some errors of torch
            self.keep(fault_of(error), data, "".join(traceback.format_exception(error)[-8:]))
        if (took_s := time.process_time() - started) > MAX_CPU_S:
            self.keep(("slow", ""), data, f"it took {took_s:.1f} s")
        if (grown := peak_bytes() - before) > MAX_MEMORY_BYTES // 2:
            self.keep(("memory", ""), data, f"it took {grown >> 20} MiB")

    def keep(self, fault: tuple[str, str], data: bytes, text: str) -> None:
        if len(data) >= self.smallest.get(fault, 1 << 60):
            return
        self.smallest[fault] = len(data)
        name = f"finding-{hashlib.sha256(repr(fault).encode()).hexdigest()[:12]}"
        (self.folder / name).write_bytes(data)
        (self.folder / f"{name}.txt").write_text(f"{' '.join(fault)}\n{text}")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_here(name: str, folder: Path, arguments: list[str]) -> None:
    """Fuzz in this process. This call does not return, because the fuzzer ends the process."""
    import atheris

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with atheris.instrument_imports(include=["pretrain", "data_tools", "warcio"]):
        from support.fuzz.harnesses import HARNESSES

        harness = HARNESSES[name]
        seeds = harness.seeds()
        crashers = sorted((HERE / "crashers" / name).glob("*"))
        for number, seed in enumerate([*seeds, *(path.read_bytes() for path in crashers)]):
            Path(folder / "corpus" / f"seed-{number}").write_bytes(seed)
        harness.one(seeds[0])  # so that the modules that it imports are loaded and instrumented

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if harness.words and rng.random() < 0.3:
                at = rng.randrange(len(data) + 1)
                data = data[:at] + rng.choice(harness.words) + data[at + rng.choice([0, 0, 1, 9]) :]
            elif harness.is_json and rng.random() < 0.7 and (found := changed_json(data, rng)) is not None:
                data = found
            else:
                data = atheris.Mutate(data, max_size)
            return data[:max_size]

        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
        checked = Checked(harness.one, folder / "findings")
        atheris.Setup([sys.argv[0], str(folder / "corpus"), *arguments], checked, custom_mutator=mutate)
        atheris.Fuzz()


# --- the process that starts them ---


def fuzz(name: str, seconds: float, folder: Path) -> Result:
    """Run one harness for this number of seconds. Inputs stay in `folder`."""
    shutil.rmtree(folder / "findings", ignore_errors=True)  # left by an earlier run
    for part in ("corpus", "findings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    result = Result(name)
    log = folder / "log.txt"
    log.write_text("")
    started = time.monotonic()
    for number in range(MAX_RESTARTS):
        left_s = seconds - result.seconds
        if left_s < 1:
            break
        size = log.stat().st_size
        code = start(name, folder, left_s, number + 1, log)
        said = log.read_bytes()[size:].decode(errors="replace")
        counts = re.findall(r"^(?:#|stat::number_of_executed_units: )(\d+)", said, re.M)
        result.executions += max(map(int, counts), default=0)
        result.coverage = max([result.coverage, *map(int, re.findall(r"cov: (\d+)", said))])
        result.seconds = time.monotonic() - started
        if code == 0:
            break
        if not list((folder / "findings").glob("[cto]*-*")):
            result.findings.append(f"the harness itself ended with code {code}; see {log}")
            break
    result.findings += [path.read_text() for path in sorted((folder / "findings").glob("finding-*.txt"))]
    ended = re.compile("(crash|timeout|oom|leak)-")
    result.findings += [
        f"{path.name}, see {log}" for path in (folder / "findings").iterdir() if ended.match(path.name)
    ]
    return result


def start(name: str, folder: Path, seconds: float, seed: int, log: Path) -> int:
    """Run one process, whose working folder is in memory. Returns its exit code."""
    arguments = [
        f"-max_total_time={int(seconds)}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={MAX_WALL_S}",
        "-rss_limit_mb=4096", f"-artifact_prefix={folder}/findings/", "-print_final_stats=1", "-reload=0",
    ]  # fmt: skip
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = tempfile.mkdtemp(prefix="fuzz-", dir=memory)
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": scratch}
    command = [sys.executable, __file__, "--here", name, str(folder), *arguments]
    try:
        with log.open("ab") as file:
            limit_s = seconds + 2 * MAX_WALL_S + 60
            return subprocess.run(
                command, cwd=scratch, env=os.environ | quiet, stdout=file, stderr=file, timeout=limit_s
            ).returncode
    except subprocess.TimeoutExpired:
        return -1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    if sys.argv[1:2] == ["--here"]:
        fuzz_here(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.fuzz.harnesses import HARNESSES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each harness; 60 where not given")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(HARNESSES)}")
    given = parser.parse_args()
    if unknown := set(given.names) - set(HARNESSES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(HARNESSES)}")
    print(f"{'harness':<20}{'executions':>12}{'per second':>12}{'coverage':>10}{'findings':>10}")
    results = []
    for name in given.names or HARNESSES:
        result = fuzz(name, given.seconds, FOUND / name)
        rate, count = result.executions / max(result.seconds, 1e-9), len(result.findings)
        print(
            f"{name:<20}{result.executions:>12,}{rate:>12,.0f}{result.coverage:>10,}{count:>10}", flush=True
        )
        results.append(result)
    for result in results:
        for finding in result.findings:
            print(f"\n== {result.name}: {finding.rstrip()}")
    return int(any(result.findings for result in results))


if __name__ == "__main__":
    sys.exit(main())
