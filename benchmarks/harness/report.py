"""What a benchmark found, as figures and tables: pure functions of results.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.harness.worker import PARTS

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""
GATHERS = "all_gather_into_tensor"


def alternated(variants: Sequence[str], repeat: int) -> list[str]:
    """The order of a repeat (from 0): A B C, then C B A, and so on, so that a machine that drifts favors none."""
    return list(variants) if repeat % 2 == 0 else list(reversed(variants))


def merged(ranks: Sequence[dict[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    """One result of what each rank reported. Times and what was moved are rank 0's, memory the largest of all."""
    first = ranks[0]
    losses = [sum(values) / len(ranks) for values in zip(*(rank["losses"] for rank in ranks), strict=True)]
    return first | {
        "losses": losses,
        "tokens_per_second": tokens_per_step * len(first["step_s"]) / sum(first["step_s"]),
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
    }


def done(runs: Sequence[dict[str, Any]], variant: str) -> dict[int, dict[str, Any]]:
    """Results of a variant by repeat."""
    return {run["repeat"]: run["result"] for run in runs if run["variant"] == variant and "result" in run}


def paired_ratios(
    runs: Sequence[dict[str, Any]], variant: str, reference: str, *, in_turns: bool = False
) -> list[float]:
    """Speed over the reference's, of each repeat that both have done: what ran within the same minutes is compared.

    `in_turns`: of each step, which both have done one after the other.
    """
    ours, theirs = done(runs, variant), done(runs, reference)
    both = [(ours[repeat], theirs[repeat]) for repeat in sorted(ours) if repeat in theirs]
    if not in_turns:
        return [one["tokens_per_second"] / other["tokens_per_second"] for one, other in both]
    steps = [zip(_step_speeds(one), _step_speeds(other), strict=True) for one, other in both]
    return [mine / its for pairs in steps for mine, its in pairs]


def _step_speeds(result: dict[str, Any]) -> list[float]:
    """Tokens per second of each timed step."""
    seconds = result["step_s"]
    tokens = result["tokens_per_second"] * sum(seconds) / len(seconds)
    return [tokens / one for one in seconds]


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """`median (min..max)`, or the one value."""
    if not values:
        return "-"
    middle = form(median(values))
    return middle if len(values) == 1 else f"{middle} ({form(min(values))}..{form(max(values))})"


def speed_table(
    runs: Sequence[dict[str, Any]],
    variants: Sequence[str],
    flops_per_token: dict[str, float],
    peak_flops_per_second: float,
    *,
    in_turns: bool = False,
) -> Table:
    """Tokens per second, its ratio to the first variant, MFU, memory, and the losses, which should be alike."""
    header = ["variant", "tokens/s", "ratio", "MFU", "GiB per rank", "loss first, last"]
    rows = []
    for variant in variants:
        results = list(done(runs, variant).values())
        if not results:
            rows.append([variant, "left out", *["-"] * 4])
            continue
        speeds = [result["tokens_per_second"] for result in results]
        used = [speed * flops_per_token[variant] / peak_flops_per_second for speed in speeds]
        memory = [result["peak_memory_bytes"] / 2**30 for result in results]
        losses = results[0]["losses"]
        rows.append(
            [
                variant,
                spread(speeds, "{:,.0f}".format),
                spread(paired_ratios(runs, variant, variants[0], in_turns=in_turns), "{:.3f}".format),
                spread(used, "{:.1%}".format),
                spread(memory, "{:.2f}".format),
                f"{losses[0]:.4f}, {losses[-1]:.4f}",
            ]
        )
    return header, rows


def parts_table(runs: Sequence[dict[str, Any]], variants: Sequence[str]) -> Table:
    """ms of a step by part, and what its collectives move: of instrumented steps, but for the first column."""
    header = ["variant", "step", *PARTS, "collectives", "gathers", "MB moved"]
    rows = []
    for variant in variants:
        results = list(done(runs, variant).values())
        if not results:
            continue
        steps = [median(result["step_s"]) for result in results]
        parts = [
            spread([1000 * r["parts_s"].get(part, 0.0) for r in results if r["parts_s"]], "{:,.1f}".format)
            for part in PARTS
        ]
        calls, moved = results[0]["calls"], sum(results[0]["bytes"].values())
        gathers = sum(count for kind, count in calls.items() if kind.startswith(GATHERS))
        counts = [f"{sum(calls.values()):,.0f}", f"{gathers:,.0f}", f"{moved / 1e6:,.3f}"]
        rows.append(
            [
                variant,
                spread([1000 * seconds for seconds in steps], "{:,.1f}".format),
                *parts,
                *(counts if calls else ["-"] * 3),  # one process, or collectives that C++ starts
            ]
        )
    return header, rows


def markdown(table: Table) -> str:
    """A table for a page of documentation."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
