"""A benchmark session: runs several variants in alternating order, with new processes for each run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.ranks import Ranks, RunFailed, take_turns
from benchmarks.harness.report import alternated, markdown, merged, parts_table, speed_table
from benchmarks.harness.worker import Job
from pretrain.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PEAK = "peak"
"""Name of the runner that measures matrix products. It comes first in each repeat."""
_PARAMETERS_MAY_DIFFER_FRAC = 1e-3


@dataclass(frozen=True)
class Variant:
    """One column of a comparison."""

    text: str
    """The variant as the user wrote it: a runner's name and its overrides."""
    script: Path
    python: str
    job: Job
    n_parameters: int
    flops_per_token: float


class Session:
    """Runs the variants whose results are not yet in `folder`/results.json. That file is written after each run."""

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
        """All runs in the file, which keeps those of variants that are not requested now."""
        self._taken_s: dict[str, list[float]] = {}

    def run(self, say: Callable[[str], None]) -> None:
        """Do all missing runs. A variant that fails is not run again in later repeats."""
        wanted = [(repeat, group) for repeat in range(self._repeats) for group in self._groups(repeat)]
        known = {(run["variant"], run["repeat"]) for run in self.runs}
        todo = [
            (repeat, group)
            for repeat, group in wanted
            if not {(variant.text, repeat) for variant in group} <= known
        ]
        kept = sum(len(group) for _, group in wanted) - sum(len(group) for _, group in todo)
        if kept:
            say(f"{kept} runs of {self._path} are kept")
        for number, (repeat, group) in enumerate(todo):
            group = self._well(group)
            if not group:
                continue
            started = time.monotonic()
            runs = self._run_group(group, repeat)
            again = {(run["variant"], run["repeat"]) for run in runs}
            self.runs = [run for run in self.runs if (run["variant"], run["repeat"]) not in again] + runs
            self.write()
            taken = time.monotonic() - started
            self._taken_s.setdefault(_name(group), []).append(taken)
            coming = [group for _, group in todo[number + 1 :]]
            left = self._left_s([_name(group) for group in coming if self._well(group)])
            for run in runs:
                said = _said(run["result"]) if "result" in run else run["problem"]
                say(
                    f"[{number + 1}/{len(todo)}] repeat {repeat + 1}, {run['variant']}: {said} "
                    f"({taken:.0f} s{f', about {left / 60:.0f} min left' if left else ''})"
                )

    def _groups(self, repeat: int) -> list[list[Variant]]:
        """The groups of variants of a repeat, in order. The variants of a group run at the same time."""
        by_text = {variant.text: variant for variant in self.variants}
        ordered = [by_text[text] for text in alternated(list(by_text), repeat)]
        in_turns = self.variants[0].job.in_turns
        return [[self._peak], *([ordered] if in_turns else [[variant] for variant in ordered])]

    def _well(self, group: list[Variant]) -> list[Variant]:
        """The variants of a group that have not failed so far."""
        return [variant for variant in group if variant.text not in self.problems]

    def _left_s(self, names: list[str]) -> float:
        """Estimated seconds for the coming groups: each takes as long as its last run, or as the mean of all."""
        means = {name: sum(taken) / len(taken) for name, taken in self._taken_s.items()}
        overall = sum(means.values()) / len(means)
        return sum(means.get(name, overall) for name in names)

    def _run_group(self, group: list[Variant], repeat: int) -> list[dict[str, Any]]:
        """Start the processes of these variants, let them take turns, and return the run of each."""
        deadline = time.monotonic() + self._timeout_s * len(group)
        started: list[Ranks] = []
        runs: list[dict[str, Any]] = []
        try:
            for variant in group:
                folder = self._fresh_folder(variant, repeat)
                command = [variant.python, str(variant.script), str(folder / "job.json")]
                started.append(Ranks(command, folder, variant.job))
            if group[0].job.in_turns:
                take_turns(started, deadline)
            for variant, ranks in zip(group, started, strict=True):
                run: dict[str, Any] = {"variant": variant.text, "repeat": repeat, "job": asdict(variant.job)}
                try:
                    ranks.wait(deadline)
                    run["result"] = _result(variant, ranks.folder)
                except RunFailed as error:
                    run["problem"] = str(error)
                runs.append(run)
        finally:
            for ranks in started:
                ranks.kill()
        return runs

    def _fresh_folder(self, variant: Variant, repeat: int) -> Path:
        """An empty folder for the job file and the logs of one run."""
        name = re.sub(r"[^\w.=-]+", "_", variant.text)[:100]
        folder = self.folder / "logs" / f"repeat-{repeat + 1}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        content = json.dumps(asdict(variant.job), indent=1).encode()
        write_atomically(folder / "job.json", content, durable=False)
        return folder

    # ---- results ----

    @property
    def peak_flops_per_second(self) -> float:
        """The best measured FLOP/s of the session, for all ranks together."""
        found = [r["result"]["flops_per_second"] for r in self.runs if r["variant"] == PEAK and "result" in r]
        return max(found, default=float("nan"))

    @property
    def problems(self) -> dict[str, str]:
        """The reason for each failure, by variant."""
        return {run["variant"]: run["problem"] for run in self.runs if "problem" in run}

    def tables(self) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
        """The titles and tables of the results."""
        texts = [variant.text for variant in self.variants]
        flops = {variant.text: variant.flops_per_token for variant in self.variants}
        peak = self.peak_flops_per_second
        first = next(iter(self.variants)).job
        title = (
            f"{first.global_batch_sequences} x {first.sequence_length} tokens per step, {first.steps} steps, "
            f"{self._repeats} repeats; peak {peak / 1e12:.3f} TFLOP/s; median (min..max); "
            f"ratio: to the first variant in the same {'step, taken in turns' if first.in_turns else 'repeat'}"
        )
        return [
            (title, speed_table(self.runs, texts, flops, peak, in_turns=first.in_turns)),
            (
                "Milliseconds of a step; parts and collectives of instrumented steps",
                parts_table(self.runs, texts),
            ),
        ]

    def write(self) -> None:
        """Write results.json and table.md, each atomically."""
        texts = {"results.json": json.dumps({"runs": self.runs}, indent=1)}
        texts["table.md"] = "\n".join(f"{title}\n\n{markdown(table)}" for title, table in self.tables())
        for name, text in texts.items():
            write_atomically(self.folder / name, text.encode())


def _name(group: list[Variant]) -> str:
    return " / ".join(sorted(variant.text for variant in group))


def _result(variant: Variant, folder: Path) -> dict[str, Any]:
    """The merged reports of a run's ranks. Raises RunFailed where the run is not comparable with the others."""
    job = variant.job
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(job.ranks)]
    if job.runner == PEAK:
        return ranks[0] | {"flops_per_second": sum(rank["flops_per_second"] for rank in ranks)}
    found, expected = ranks[0]["n_parameters"], variant.n_parameters
    if abs(found - expected) > _PARAMETERS_MAY_DIFFER_FRAC * expected:
        raise RunFailed(f"has {found:,} parameters where the others have {expected:,}: not comparable")
    return merged(ranks, job.global_batch_sequences * job.sequence_length)


def _said(result: dict[str, Any]) -> str:
    if "tokens_per_second" not in result:
        return f"{result['flops_per_second'] / 1e12:.3f} TFLOP/s"
    losses = result["losses"]
    return f"{result['tokens_per_second']:,.0f} tokens/s, loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def missing_module(python: str, module: str) -> bool:
    """Whether a Python interpreter lacks a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True).returncode != 0
