"""Compare the results of two models: `python launch/compare.py A B`

A and B are files of results of launch/eval.py, or the folders that it wrote with output=DIR. For each task that both
have, prints the difference of its main score, the interval that holds the true difference with 95 % confidence, and
whether the difference is real or within noise. Where the items are the same, they are compared one by one. The verdicts
of several tasks are corrected for their number (Holm). Several results of one task in the subfolders of A or B are
those of runs with other seeds: their mean is compared, and their spread counts as noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from pretrain.errors import ConfigError, ExitCode
from pretrain.printing import print_error, say, shown

if TYPE_CHECKING:
    from pretrain.evaluate.compare import Comparison, Side


def main() -> int:
    """Read both sides, compare them, and print the table."""
    parser = argparse.ArgumentParser(prog="python launch/compare.py", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="file or folder of results")
    parser.add_argument("b", type=Path, metavar="B", help="file or folder of results")
    parser.add_argument(
        "--score",
        action="append",
        default=[],
        metavar="NAME",
        help="score to compare instead of each task's main one",
    )
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="rate of false alarms that is allowed (default: 0.05)"
    )
    parser.add_argument("--json", action="store_true", help="print the comparisons as JSON on the last line")
    arguments = parser.parse_args()
    try:
        compare_folders(arguments.a, arguments.b, arguments.score, arguments.alpha, arguments.json)
    except ConfigError as error:
        print_error("error", error)
        return ExitCode.CONFIG_ERROR
    return ExitCode.FINISHED


def compare_folders(a: Path, b: Path, scores: list[str], alpha: float, as_json: bool) -> None:
    """Compare two files or folders. Raises ConfigError."""
    from pretrain.evaluate.compare import compare, results_in

    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha {alpha} must be greater than 0 and less than 1")
    of_a, of_b = results_in(a), results_in(b)
    found = compare(of_a, of_b, scores, alpha=alpha)
    print_table(found, alpha)
    for task in sorted({*of_a, *of_b}):
        if task not in of_a or task not in of_b:
            say(f"{task}: only {'B' if task in of_b else 'A'} has it, so it is not compared")
        elif len({results.task_sha256 for results in (*of_a[task], *of_b[task])}) > 1:
            say(f"{task}: the task files of A and B differ, and so may what was asked")
    for row in found:
        if row.left_out:
            say(f"{row.task}: {row.left_out:,} items that only one side has are left out")
    if all(row.a.n_seeds == row.b.n_seeds == 1 for row in found):
        say(
            "each side is one run: the noise of the items is in the verdict, that of training is not; runs with other "
            "seeds, each in a subfolder of A or B, add it"
        )
    if as_json:
        print(json.dumps([asdict(row) | {"verdict": row.verdict} for row in found]))


def print_table(found: list[Comparison], alpha: float) -> None:
    """A row for each comparison."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("task", "score")
    for name in ("A", "B", "B - A", f"{1 - alpha:.0%} interval", "p, corrected", "items"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    has_overlap = any(row.overlap is not None for row in found)
    if has_overlap:
        table.add_column("in corpus", justify="right")
    for row in found:
        overlap = "" if row.overlap is None else f"{row.overlap:.1%}"
        table.add_row(
            Text(shown(row.task)),
            Text(shown(row.score)),
            side_text(row.a),
            side_text(row.b),
            f"{row.difference:+.4f}",
            f"{row.low:+.4f} to {row.high:+.4f}",
            f"{row.p_corrected:.4f}",
            f"{row.n_items:,} {'paired' if row.is_paired else 'unpaired'}",
            row.verdict,
            *([overlap] if has_overlap else []),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.width = max(console.width, console.measure(table).minimum)
    console.print(table)


def side_text(side: Side) -> str:
    """The value of a side, with its spread over seeds."""
    return (
        f"{side.value:.4f}"
        if side.spread is None
        else f"{side.value:.4f} ± {side.spread:.4f} ({side.n_seeds})"
    )


if __name__ == "__main__":
    sys.exit(main())
