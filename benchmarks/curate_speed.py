"""Compare whole curations by two checkouts: `python benchmarks/curate_speed.py --before CHECKOUT FILE.jsonl...`

Each file is curated with the default stages and one evaluation set, in turns by the code of CHECKOUT and by this one,
--repeats times, each in a process of its own. Prints CPU seconds by phase and by stage. What the stages leave of a
phase is reading, hashing and writing.

The default set is made of the files: 300 characters of every hundredth document, so that there is something to find.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SET_EVERY, SET_CHARS = 100, 300


def evaluation_set(files: list[Path], path: Path) -> Path:
    """Write a set of items that are in the files."""
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            with file.open(encoding="utf-8") as lines:
                for line in list(lines)[::SET_EVERY]:
                    text = json.loads(line)["text"]
                    out.write(json.dumps({"text": text[len(text) // 3 :][:SET_CHARS]}) + "\n")
    return path


def cost(checkout: Path, output: Path, evaluation: Path, file: Path) -> dict[str, float]:
    """CPU seconds of one curation, by stage."""
    command = [sys.executable, HERE / "runners" / "run_curation.py", checkout, output, evaluation, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{checkout} cannot curate {file}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    """Values as their median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and print a table per file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--set", type=Path, help="a file of an evaluation set (default: made of the files)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = args.set or evaluation_set(args.files, Path(folder) / "items.jsonl")
        for file in args.files:
            before, now = list[dict[str, float]](), list[dict[str, float]]()
            for number in range(args.repeats):
                for runs, checkout in ((before, args.before), (now, HERE.parent)):
                    output = Path(folder) / f"{file.stem}-{number}-{len(now)}-{len(before)}"
                    runs.append(cost(checkout.resolve(), output, evaluation.resolve(), file.resolve()))
            print(f"\n{file.name}, {file.stat().st_size / 1e6:.1f} MB\n")
            print("| CPU seconds | before | now | now / before |")
            print("|---|---|---|---|")
            for name in now[0]:
                pairs = [(one.get(name, 0.0), other[name]) for one, other in zip(before, now, strict=True)]
                ratios = [new / old for old, new in pairs if old]
                cells = [name, spread([old for old, _ in pairs]), spread([new for _, new in pairs])]
                print(f"| {' | '.join(cells)} | {spread(ratios) if ratios else 'new'} |", flush=True)


if __name__ == "__main__":
    main()
