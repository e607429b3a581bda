"""Measure what a save costs training, in the background or not: `python benchmarks/save_stall.py MANIFEST --out DIR`

Trains the quickstart's model on 2 processes of this machine, in turns with checkpoint.background=true and =false,
saving every --every-steps, and prints the median and the range of all saves except the first of each run:

- stall: time that training paused (for the copy to host memory, or without the background for the whole write);
- slowed: total time by which the steps during the write exceeded the median step;
- share: stall + slowed, relative to the time of the steps between two saves at an interval of --interval steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.config import CheckpointConfig
from pretrain.reliability.events import Event, read_events
from pretrain.reliability.journal import read_metrics


class Save(NamedTuple):
    """One save of one run, in seconds."""

    stall_s: float
    slowed_s: float
    write_s: float
    step_s: float
    """Median time of a step in the same run."""


def train(manifest: Path, run_dir: Path, n_steps: int, every_steps: int, background: bool) -> list[Save]:
    """Do one run from the start. Returns its saves without the last and without the first, which allocates memory."""
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_gpus", "2", "--master_port", "29611", "launch/train.py"),
        *(f"run_dir={run_dir}", f"data.manifest={manifest}", "experiment=quickstart"),
        *("global_batch_sequences=16", "micro_batch_sequences=8", f"total_steps={n_steps}"),
        f"checkpoint.every_steps={every_steps}",
        *(f"checkpoint.background={str(background).lower()}", "logging.wandb=disabled"),
    ]
    with (run_dir.with_suffix(".log")).open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    times_s = {record["step"]: record["step_time_s"] for record in read_metrics(run_dir)}
    step_s = statistics.median(times_s.values())
    saves = []
    for event in read_events(run_dir):
        if event["event"] != Event.CHECKPOINT_SAVED or event["step"] in (every_steps, n_steps):
            continue
        if not background:
            saves.append(Save(event["stall_s"] + event["write_s"], 0.0, event["write_s"], step_s))
            continue
        beside_s, slowed_s, step = 0.0, 0.0, event["step"] + 1
        while beside_s < event["write_s"] and step in times_s:
            beside_s += times_s[step]
            slowed_s += times_s[step] - step_s
            step += 1
        saves.append(Save(event["stall_s"], max(0.0, slowed_s), event["write_s"], step_s))
    return saves


def spread(values: list[float], scale: float = 1.0) -> str:
    """Values as their median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{scale * middle:.4g} ({scale * low:.4g} to {scale * high:.4g})"


def main() -> None:
    """Do the runs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every-steps", type=int, default=10)
    parser.add_argument("--interval", type=int, default=CheckpointConfig().every_steps)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    saves: dict[bool, list[Save]] = {True: [], False: []}
    for repeat in range(options.repeats):
        for background in (True, False) if repeat % 2 == 0 else (False, True):
            run_dir = options.out.absolute() / f"{repeat}-{'background' if background else 'waiting'}"
            saves[background] += train(
                options.manifest.absolute(), run_dir, options.steps, options.every_steps, background
            )
            print(f"{run_dir.name}: done", file=sys.stderr, flush=True)
    print(f"| saving | saves | stall, ms | slowed, ms | write, ms | step, ms | share at {options.interval} |")
    print("|---|---|---|---|---|---|---|")
    for background, rows in saves.items():
        shares = [(row.stall_s + row.slowed_s) / (options.interval * row.step_s) for row in rows]
        columns = [spread([getattr(row, name) for row in rows], 1000) for name in Save._fields]
        name = "beside training" if background else "training waits"
        print(f"| {name} | {len(rows)} | {' | '.join(columns)} | {spread(shares, 100)} % |")


if __name__ == "__main__":
    main()
