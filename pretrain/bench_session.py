"""A benchmark session: variants side by side, each run a set of fresh processes, in alternating order."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.bench_report import alternated, markdown, merged, parts_table, speed_table
from pretrain.bench_worker import Job

ROOT = Path(__file__).resolve().parent.parent
PEAK = "peak"
"""The runner that measures matrix products; it comes first in each repeat."""
_TAIL_LINES = 15
_PARAMETERS_MAY_DIFFER_FRAC = 1e-3
_GRACE_S = 10
"""What other ranks get to end by themselves after one has failed."""


@dataclass(frozen=True)
class Variant:
    """One column of a comparison."""

    text: str
    """As given: the runner's name and its overrides."""
    script: Path
    python: str
    job: Job
    n_parameters: int
    flops_per_token: float


class RunFailed(Exception):
    """A run gave no result; the text says why, and where its logs are."""


class Session:
    """Runs what is not yet in `folder`/results.json, which is written after each run."""

    def __init__(self, folder: Path, variants: list[Variant], peak: Variant, repeats: int, timeout_s: float):
        self.folder, self.variants, self._peak = folder, variants, peak
        self._repeats, self._timeout_s = repeats, timeout_s
        self._path = folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        old = json.loads(self._path.read_text())["runs"] if self._path.exists() else []
        jobs = {variant.text: asdict(variant.job) for variant in [*variants, peak]}
        self.runs: list[dict[str, Any]] = [
            run for run in old if run["job"] == jobs.get(run["variant"], run["job"]) and "result" in run
        ]
        """Those of variants that are not asked for now stay in the file."""
        self._taken_s: dict[str, list[float]] = {}

    def run(self, say: Callable[[str], None]) -> None:
        """All runs that are missing. A variant that fails is not tried in later repeats."""
        by_text = {variant.text: variant for variant in self.variants}
        known = {(run["variant"], run["repeat"]) for run in self.runs}
        wanted = [
            (repeat, variant)
            for repeat in range(self._repeats)
            for variant in [self._peak, *(by_text[text] for text in alternated(list(by_text), repeat))]
        ]
        todo = [(repeat, variant) for repeat, variant in wanted if (variant.text, repeat) not in known]
        if len(todo) < len(wanted):
            say(f"{len(wanted) - len(todo)} runs of {self._path} are kept")
        failed: set[str] = set()
        for number, (repeat, variant) in enumerate(todo):
            if variant.text in failed:
                continue
            before = f"[{number + 1}/{len(todo)}] repeat {repeat + 1}, {variant.text}:"
            started = time.monotonic()
            run: dict[str, Any] = {"variant": variant.text, "repeat": repeat, "job": asdict(variant.job)}
            try:
                run["result"] = self._run_one(variant, repeat)
                said = _said(run["result"])
            except RunFailed as error:
                run["problem"] = said = str(error)
                failed.add(variant.text)
            self.runs.append(run)
            self.write()
            taken = time.monotonic() - started
            self._taken_s.setdefault(variant.text, []).append(taken)
            left = self._left_s([v.text for _, v in todo[number + 1 :] if v.text not in failed])
            say(f"{before} {said} ({taken:.0f} s{f', about {left / 60:.0f} min left' if left else ''})")

    def _left_s(self, texts: list[str]) -> float:
        """How long the coming runs will take: each as the same variant before, else as the mean of all."""
        means = {text: sum(taken) / len(taken) for text, taken in self._taken_s.items()}
        overall = sum(means.values()) / len(means)
        return sum(means.get(text, overall) for text in texts)

    def _run_one(self, variant: Variant, repeat: int) -> dict[str, Any]:
        name = re.sub(r"[^\w.=-]+", "_", variant.text)[:100]
        folder = self.folder / "logs" / f"repeat-{repeat + 1}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps(asdict(variant.job), indent=1))
        command = [variant.python, str(variant.script), str(folder / "job.json")]
        _run_ranks(command, variant.job, folder, self._timeout_s)
        ranks = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(variant.job.ranks)]
        if variant.job.runner == PEAK:
            return ranks[0] | {"flops_per_second": sum(rank["flops_per_second"] for rank in ranks)}
        found, expected = ranks[0]["n_parameters"], variant.n_parameters
        if abs(found - expected) > _PARAMETERS_MAY_DIFFER_FRAC * expected:
            raise RunFailed(f"has {found:,} parameters where the others have {expected:,}: not comparable")
        return merged(ranks, variant.job.global_batch_sequences * variant.job.sequence_length)

    # ---- what was found ----

    @property
    def peak_flops_per_second(self) -> float:
        """The best of the session, of all ranks together."""
        found = [r["result"]["flops_per_second"] for r in self.runs if r["variant"] == PEAK and "result" in r]
        return max(found, default=float("nan"))

    @property
    def problems(self) -> dict[str, str]:
        """By variant."""
        return {run["variant"]: run["problem"] for run in self.runs if "problem" in run}

    def tables(self) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
        """Titles and tables."""
        texts = [variant.text for variant in self.variants]
        flops = {variant.text: variant.flops_per_token for variant in self.variants}
        peak = self.peak_flops_per_second
        first = next(iter(self.variants)).job
        title = (
            f"{first.global_batch_sequences} x {first.sequence_length} tokens per step, {first.steps} steps, "
            f"{self._repeats} repeats; peak {peak / 1e12:.3f} TFLOP/s; median (min..max); "
            f"ratio: to the first variant in the same repeat"
        )
        return [
            (title, speed_table(self.runs, texts, flops, peak)),
            (
                "Milliseconds of a step; parts and collectives of instrumented steps",
                parts_table(self.runs, texts),
            ),
        ]

    def write(self) -> None:
        """results.json and table.md, each replaced as a whole."""
        texts = {"results.json": json.dumps({"runs": self.runs}, indent=1)}
        texts["table.md"] = "\n".join(f"{title}\n\n{markdown(table)}" for title, table in self.tables())
        for name, text in texts.items():
            new = self.folder / f".{name}"
            new.write_text(text)
            new.replace(self.folder / name)


def _said(result: dict[str, Any]) -> str:
    if "tokens_per_second" not in result:
        return f"{result['flops_per_second'] / 1e12:.3f} TFLOP/s"
    losses = result["losses"]
    return f"{result['tokens_per_second']:,.0f} tokens/s, loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def _run_ranks(command: list[str], job: Job, folder: Path, timeout_s: float) -> None:
    """Start the processes of one run and wait for them. Raises RunFailed; none is left behind."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    try:
        for rank in range(job.ranks):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": job.ranks,
                "LOCAL_WORLD_SIZE": job.ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": job.threads,
                "HF_HUB_OFFLINE": 1,
            }
            env = os.environ | {name: str(value) for name, value in variables.items()}
            with (folder / f"rank-{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        codes = _wait(processes, timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(code != 0 for code in codes):
        rank = max(range(len(codes)), key=lambda r: (codes[r] not in (0, None), codes[r] is None))
        lines = (folder / f"rank-{rank}.log").read_text().splitlines()[-_TAIL_LINES:]
        ended = "took too long" if codes[rank] is None else f"ended with exit code {codes[rank]}"
        text = "\n    ".join([f"failed: rank {rank} {ended}; its last lines ({folder}):", *lines])
        raise RunFailed(text)


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Exit codes, None for a process that still ran at the end."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.1)
    return [process.poll() for process in processes]


def missing_module(python: str, module: str) -> bool:
    """Whether an interpreter cannot import a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True).returncode != 0
