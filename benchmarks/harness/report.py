"""Turns the results of a benchmark into figures and tables. All functions depend only on results.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.harness.worker import PARTS

Table = tuple[list[str], list[list[str]]]
"""The header and the rows of a table."""
GATHERS = "all_gather_into_tensor"


def alternated(variants: Sequence[str], repeat: int) -> list[str]:
    """The order of the variants in a repeat, counted from 0: A B C, then C B A, and so on.

    Alternating keeps a machine whose speed drifts from favoring a variant.
    """
    return list(variants) if repeat % 2 == 0 else list(reversed(variants))


def merged(ranks: Sequence[dict[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    """The reports of all ranks merged into one result: times and bytes of rank 0, and the largest memory of any
    rank."""
    first = ranks[0]
    losses = [sum(values) / len(ranks) for values in zip(*(rank["losses"] for rank in ranks), strict=True)]
    return first | {
        "losses": losses,
        "tokens_per_second": tokens_per_step * len(first["step_s"]) / sum(first["step_s"]),
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
    }


def done(runs: Sequence[dict[str, Any]], variant: str) -> dict[int, dict[str, Any]]:
    """The results of a variant by repeat."""
    return {run["repeat"]: run["result"] for run in runs if run["variant"] == variant and "result" in run}


def paired_ratios(
    runs: Sequence[dict[str, Any]], variant: str, reference: str, *, in_turns: bool = False
) -> list[float]:
    """Speed relative to the reference for each repeat that both have done, because runs close in time compare best.

    With `in_turns` there is a ratio for each step, because both did each step directly one after the other.
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
    """Values as `median (min..max)`, or a single value alone."""
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
    """Tokens per second, its ratio to the first variant, MFU, memory, and the losses, which should nearly agree."""
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
    """Milliseconds of a step by part, and the bytes that its collectives move.

    All columns except the first are from the instrumented steps.
    """
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
                # There are no calls with a single process, or where C++ code starts the collectives.
                *(counts if calls else ["-"] * 3),
            ]
        )
    return header, rows


def markdown(table: Table) -> str:
    """A table in Markdown."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
