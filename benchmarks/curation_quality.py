"""Measure what curation does to text: `python benchmarks/curation_quality.py CORPORA [--topic NAME ...]`

CORPORA is a folder of `train/SOURCE.jsonl` files. Every topic is a module of `benchmarks/curation/`. The output is a
table with one row per value: ours, its goal, and datatrove's where datatrove does the same work. It exits with 1 if a
goal is missed.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.curation.figures import Figure

TOPICS = sorted(
    path.stem
    for path in (ROOT / "benchmarks/curation").glob("*.py")
    if path.stem not in ("__init__", "figures")
)
_COMPARE = {"<=": operator.le, ">=": operator.ge}


def is_met(figure: Figure) -> bool:
    """Whether a value satisfies its goal; true where there is none."""
    if not figure.goal:
        return True
    sign, limit = figure.goal.split()
    return bool(_COMPARE[sign](figure.ours, float(limit)))


def _row(figure: Figure) -> str:
    theirs = figure.theirs if isinstance(figure.theirs, float) else None
    peer = f"{theirs:.3f}" if theirs is not None else str(figure.theirs or "")
    verdict = "" if not figure.goal else "met" if is_met(figure) else "MISSED"
    cells = (figure.name, f"{figure.ours:.3f}", figure.counted, figure.goal, verdict, peer)
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=Path)
    parser.add_argument(
        "--topic", action="append", choices=TOPICS, help="may be repeated; without it, all topics"
    )
    parser.add_argument("--json", type=Path, help="also write all values to this file")
    args = parser.parse_args()
    figures: list[Figure] = []
    print("| measured | ours | counted | goal | verdict | datatrove |\n|---|---|---|---|---|---|", flush=True)
    for topic in args.topic or TOPICS:
        for figure in import_module(f"benchmarks.curation.{topic}").measure(args.corpora):
            figures.append(figure)
            print(_row(figure), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps([figure._asdict() for figure in figures], ensure_ascii=False, indent=1)
        )
    return 0 if all(map(is_met, figures)) else 1


if __name__ == "__main__":
    sys.exit(main())
