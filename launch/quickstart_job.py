"""The quickstart: from text to a trained model on a fresh machine. Started by launch/quickstart.sh.

It prepares the text as a tokenizer and shards, trains a model on them in two starts, scores it on held-out text,
exports it, and generates a sample. The same command continues with what is already in the folder. Exit codes:
0 finished, 1 a stage failed, 2 an argument is wrong, 75 stopped on request (Ctrl-C, SIGTERM, SIGHUP, or the file `stop`
in the run folder).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# None of these imports needs an installed package, because there may be no environment yet.
from pretrain.command import begin

begin(__name__, goes_on=True)

from pretrain.errors import ConfigError
from pretrain.files import hold_lock, refuse_links, write_atomically
from pretrain.ports import free_port
from pretrain.quickstart.length import (
    FEWEST_STEPS,
    LONGEST_STEPS,
    Length,
    Measured,
    choose_length,
    first_half_limit_s,
    length_overrides,
    second_half_limit_s,
)
from pretrain.quickstart.runner import CommandRunner, Failed, Stopped, say
from pretrain.reliability.events import Event, read_events
from pretrain.reliability.journal import METRICS_FILE
from pretrain.reliability.json_lines import read_lines

EXIT_FAILED, EXIT_STOPPED = 1, 75
PLANNED_STOPS = ("stop_at_step=", "stop_after_s=")
"""Beginnings of the stop reasons that this script causes itself."""
DEFAULT_MAX_BYTES, DEFAULT_MAX_CHARS = 24_000_000, 20_000
"""Size limits of the default corpus in bytes, and of each of its files in characters.

Long files are mostly tables, and a few of them would fill the held-out text. Less than half of the bytes are in files
that are short enough, which is still more than the longest run reads.
"""
EVALUATED_TOKENS = 30_000
"""Number of held-out tokens that are scored. It is as much work as ten training steps, but runs in a single process."""

# ---- arguments -------------------------------------------------------------------------------------------------------


def whole_steps(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 2")
    return int(text)


def whole_job_minutes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes of at least 1")
    return float(text)


def existing_path(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist; give existing folders or files")
    return Path(text).resolve()


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart.sh",
        usage="bash launch/quickstart.sh [--corpus PATH...] [--out DIR] [--minutes M | --steps N]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        type=existing_path,
        default=[],
        metavar="PATH",
        help="your text: folders or files (JSON lines, JSON, CSV, Parquet, text, tar; docs/corpus.md). "
        "Default: the Python code and documentation installed on this machine",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="files in these folders that are to be left out, such as '*.pdf'; any other file that cannot be read ends "
        "the quickstart",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart-out"),
        metavar="DIR",
        help="folder for all output (default: ./quickstart-out). A second run continues with what is in it",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=whole_job_minutes,
        default=10.0,
        metavar="M",
        help="time for the whole command, including installation (default: 10). The number of training steps is chosen "
        f"to fit, from {FEWEST_STEPS} to {LONGEST_STEPS}",
    )
    length.add_argument(
        "--steps",
        type=whole_steps,
        metavar="N",
        help="number of training steps, regardless of the time they take",
    )
    return parser.parse_args(words)


# ---- the job ---------------------------------------------------------------------------------------------------------


def quoted(text: Path | str) -> str:
    """A path or a pattern as an item of a list, whatever its characters. Backslashes before a quote are doubled."""
    escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", str(text))
    return "'" + escaped.replace("'", "\\'") + "'"


class Job:
    """One quickstart in the folder `out`. Each of its stages is a method."""

    def __init__(self, options: argparse.Namespace, out: Path, started: float) -> None:
        self.corpus_paths: list[Path] = options.corpus
        self.ignore: list[str] = options.ignore
        self.steps: int | None = options.steps
        self.minutes: float = options.minutes
        self.out, self.run_dir = out, out / "run"
        self.heldout = out / "corpus" / "heldout"
        self.deadline = started + 60 * self.minutes
        self.stages = CommandRunner(
            cwd=ROOT, logs=out / "logs", table=out / "stages.tsv", stop_file=self.run_dir / "stop"
        )

    def do(self) -> None:
        say("\n== 1 of 6: the environment")
        self.make_environment()
        say("\n== 2 of 6: the corpus")
        self.prepare_corpus()
        say("\n== 3 of 6: training, which stops halfway as planned and resumes")
        steps = self.train()
        finished = self._complete_file(steps).stat().st_mtime
        say("\n== 4 of 6: the loss on held-out text")
        self.evaluate(finished)
        say("\n== 5 of 6: the Hugging Face folder")
        self.export(finished)
        say("\n== 6 of 6: a sample")
        self.generate()
        self.stages.run("summary", ["python", "launch/quickstart_summary.py", f"output={self.out}"])

    def make_environment(self) -> None:
        self.stages.run("environment", ["bash", "launch/setup_env.sh"])
        venv = Path(os.environ.get("PRETRAIN_VENV", ROOT / ".venv"))
        # Compiled extensions get their own folder: a stale lock file in a shared folder would hang every later load.
        extensions = self.out / "torch_extensions"
        shutil.rmtree(extensions, ignore_errors=True)
        os.environ.update(
            PATH=f"{venv.resolve() / 'bin'}:{os.environ['PATH']}",
            PYTHONUNBUFFERED="1",
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_OFFLINE="1",
            TORCH_EXTENSIONS_DIR=str(extensions),
        )

    def prepare_corpus(self) -> None:
        corpus = self.out / "corpus"
        if self.corpus_paths:
            inputs = ",".join(map(quoted, self.corpus_paths))
            options = [f"ignore=[{','.join(map(quoted, self.ignore))}]"] if self.ignore else []
        else:
            max_bytes = os.environ.get("QUICKSTART_MAX_BYTES", DEFAULT_MAX_BYTES)
            inputs = "python"
            options = [f"python_max_bytes={max_bytes}", f"max_chars={DEFAULT_MAX_CHARS}"]
            options += ["tokenizer.vocab_size=8192", "heldout_frac=0.03"]
        if (corpus / "manifest.json").exists():
            self.stages.reuse("corpus", str(corpus))
        else:
            command = [
                "python",
                "-m",
                "data_tools.prepare",
                f"input=[{inputs}]",
                f"output={corpus}",
            ]
            self.stages.run("corpus", [*command, *options])
        if not (self.heldout / "manifest.json").exists():
            raise Failed(
                "the text is a single document, so no text can be held out to test the model; "
                "give several files, or JSON lines"
            )

    def train(self) -> int:
        """Train both halves of the run. Returns the number of steps."""
        path = self.out / "steps.json"
        length = Length.load(path)
        if length is None and self.steps:
            length = Length(self.steps, self.steps // 2, f"{self.steps} steps, as asked.", after_s=None)
            length.save(path)
        if length is None:
            length = self._measured_first_half()
            length.save(path)
            say(length.reason)
        else:
            say(length.reason)
            if self._newest_step() < length.stop_step:
                self._start("train-first-half", length.steps, f"stop_at_step={length.stop_step}")
            else:
                self.stages.reuse("train-first-half", f"{self.run_dir} up to step {self._newest_step()}")
        if self._complete_file(length.steps).exists():
            self.stages.reuse("train-second-half", f"{self.run_dir}, finished")
        else:
            length = self._second_half(length)
        return length.steps

    def _measured_first_half(self) -> Length:
        """Train until the time limit, or for half of the longest run, and choose the length from the measured speed."""
        half = LONGEST_STEPS // 2
        if self._newest_step() >= half:  # the quickstart was killed before it could choose
            reason = f"{LONGEST_STEPS} steps, the full length."
            return Length(LONGEST_STEPS, self._newest_step(), reason, after_s=0.0)
        limit_s = first_half_limit_s(self._left_s())
        say(
            f"the number of steps is chosen after the first half, which ends after {half} steps or {limit_s:.0f} s, "
            f"so that the whole job ends within {self.minutes:g} minutes"
        )
        started = time.monotonic()
        self._start("train-first-half", LONGEST_STEPS, f"stop_at_step={half}", f"stop_after_s={limit_s:.0f}")
        if self._newest_step() == 0:  # the start alone took the whole time
            started = time.monotonic()
            self._start("train-first-half", LONGEST_STEPS, f"stop_at_step={FEWEST_STEPS // 2}")
        measured = self._measure(time.monotonic() - started)
        return choose_length(measured, self._left_s(), self.minutes)

    def _second_half(self, length: Length) -> Length:
        """Train to the end, or until the time limit stops the run. Returns the length that the run then has."""
        say(
            f"the run has stopped after step {self._newest_step()}; the same command resumes it to step {length.steps}:"
        )
        limit_s = second_half_limit_s(length, self._left_s())
        clock = [f"stop_after_s={limit_s:.0f}"] if length.has_clock else []
        if self._start("train-second-half", length.steps, *clock) == 0:
            return length
        shortened = length.shortened(self._newest_step())
        shortened.save(self.out / "steps.json")
        say(shortened.reason)
        if not self._complete_file(shortened.steps).exists():
            self._start("train-second-half", shortened.steps)
        return shortened

    def _measure(self, wall_s: float) -> Measured:
        """Measurements of the start of the run that took `wall_s` seconds."""
        lines = read_lines(self.run_dir / METRICS_FILE, kind=str)
        records = [line for line in lines if line["kind"] == "step"]
        times_s = [line["step_time_s"] for line in records if line["attempt"] == records[-1]["attempt"]]
        usual_s = times_s[1:] or times_s  # without the first step, which is slow because it allocates memory
        return Measured(self._newest_step(), sum(usual_s) / len(usual_s), max(0.0, wall_s - sum(times_s)))

    def _start(self, name: str, steps: int, *stop: str) -> int:
        """Start the training run and return its exit code. The overrides `stop` say when it stops as planned.

        Raises Stopped for any other stop.
        """
        command = [
            "deepspeed",
            "--num_gpus",
            str(n_ranks()),
            "--master_port",
            str(free_port()),
            "launch/train.py",
        ]
        settings = [
            f"run_dir={self.run_dir}",
            f"data.manifest={self.out / 'corpus' / 'manifest.json'}",
            f"evaluation.manifest={self.heldout / 'manifest.json'}",
            "experiment=quickstart",
        ]
        command += [*settings, *length_overrides(steps), *stop]
        code = self.stages.run(name, command, codes=(0, EXIT_STOPPED), trains=True)
        if code == EXIT_STOPPED:
            stops = [event for event in read_events(self.run_dir) if event["event"] == Event.STOPPED]
            if not stops[-1]["reason"].startswith(PLANNED_STOPS):
                raise Stopped(stops[-1]["reason"])
        return code

    def evaluate(self, finished: float) -> None:
        result = self.out / "evaluation.json"
        if is_newer(result, finished):
            return self.stages.reuse("evaluate", str(result))
        command = ["python", "launch/eval.py", f"run_dir={self.run_dir}"]
        command += [f"input=[{quoted(self.heldout)}]", f"max_tokens={EVALUATED_TOKENS}", "json=true"]
        self.stages.run("evaluate", command)
        log = (self.out / "logs" / "evaluate.log").read_text(encoding="utf-8")
        write_atomically(result, (log.splitlines()[-1] + "\n").encode())
        return None

    def export(self, finished: float) -> None:
        folder = self.out / "export"
        if is_newer(folder / "config.json", finished):
            return self.stages.reuse("export", str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        self.stages.run(
            "export", ["python", "launch/export.py", f"run_dir={self.run_dir}", f"output={folder}"]
        )
        return None

    def generate(self) -> None:
        # With the user's text, the model starts a new document instead.
        prompt = [] if self.corpus_paths else ["prompt=def "]
        command = ["python", "launch/generate.py", f"run_dir={self.run_dir}", *prompt]
        self.stages.run("generate", [*command, "max_new_tokens=64", "seed=1"])

    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    def _complete_file(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step-{step:08d}" / "COMPLETE"

    def _newest_step(self) -> int:
        complete = (self.run_dir / "checkpoints").glob("step-*/COMPLETE")
        return max((int(path.parent.name.removeprefix("step-")) for path in complete), default=0)


def n_ranks() -> int:
    """Number of ranks: 2, or 1 where there is a single GPU."""
    with suppress(FileNotFoundError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        if len(re.findall(r"^GPU", listed, re.M)) == 1:
            return 1
    return 2


def is_newer(path: Path, time_s: float) -> bool:
    return path.exists() and path.stat().st_mtime > time_s


def open_folder(options: argparse.Namespace) -> tuple[Path, IO[str]]:
    """The folder of this quickstart, and a file that keeps it locked while it is open. Raises Failed."""
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        refuse_links(out, out, "remove it", leave_out="run/wandb/*run-*")  # W&B itself makes links there
        out = out.resolve()
        busy = f"another quickstart is running in {out}"
        lock = hold_lock(out / ".lock", busy, "wait for it, or choose another folder with --out")
    except ConfigError as error:
        raise Failed(str(error)) from error
    except OSError as error:
        raise Failed(
            f"{out} cannot be created ({error.strerror}); choose another folder with --out"
        ) from error
    text = " ".join(map(str, options.corpus)) or "python"
    asked = f"{text} steps={options.steps}" if options.steps else f"{text} minutes={options.minutes:g}"
    remembered = out / "asked"
    earlier = remembered.read_text(encoding="utf-8").strip() if remembered.exists() else asked
    if earlier != asked:
        raise Failed(
            f"{out} has a quickstart with other arguments ({earlier}); use those, or choose another folder with --out"
        )
    write_atomically(remembered, (asked + "\n").encode())
    return out, lock


def main(words: list[str]) -> int:
    started = time.monotonic()
    options = parse(words)
    try:
        out, lock = open_folder(options)
        with lock:
            Job(options, out, started).do()
    except Failed as failure:
        print(f"\nquickstart: {failure}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as stop:
        print(
            f"\nquickstart: stopped on request ({stop}); the same command continues from here",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"\nThe whole job took {minutes} min {seconds} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
