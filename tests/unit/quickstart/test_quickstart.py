"""The quickstart: its arguments, its length, its requests to stop, its closing table, and once the whole of it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.config import PrepareConfig
from pretrain.config import TrainConfig, load_config
from pretrain.corpus.shards import Corpus
from pretrain.corpus.writer import CorpusWriter
from pretrain.engine.optim import learning_rate
from pretrain.errors import ConfigError, RunError
from pretrain.quickstart.length import (
    AFTER_STARTS,
    AFTER_STEPS,
    FEWEST_STEPS,
    LONGEST_STEPS,
    USABLE_FRAC,
    WARMUP_STEPS,
    Length,
    Measured,
    choose_length,
    length_overrides,
)
from pretrain.quickstart.runner import CommandRunner, Failed, Stopped
from pretrain.reliability.journal import read_metrics
from pretrain.reliability.json_lines import read_lines
from support import ROOT

QUICKSTART = ROOT / "launch" / "quickstart.sh"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"launch/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


job = script("quickstart_job")
summary = script("quickstart_summary")


def quickstart(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(QUICKSTART), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


# --- wrong arguments are answered with one sentence, and leave nothing behind ---


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--corpus"], "--corpus: "),
        (["--corpus", "/does/not/exist"], "--corpus: /does/not/exist "),
        (["--corpus", "--out", "x"], "--corpus: "),
        (["--steps", "many"], "--steps: many "),
        (["--steps", "1"], "--steps: 1 "),
        (["--minutes", "0.5"], "--minutes: 0.5 "),
        (["--minutes", "nan"], "--minutes: nan "),
        (["--minutes", "5", "--steps", "9"], "--steps: .* --minutes"),
        (["--out"], "--out: "),
        (["--unknown"], ": --unknown"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str], named: str) -> None:
    done = quickstart(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(named, done.stderr.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_help_describes_all_options(tmp_path: Path) -> None:
    done = quickstart("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--corpus PATH", "--out DIR", "--minutes M", "--steps N"))


@pytest.mark.parametrize(
    ("earlier", "arguments"),
    [
        ("/some/other/text minutes=10", []),
        ("python minutes=10", ["--minutes", "20"]),
        ("python minutes=10", ["--steps", "20"]),
    ],
)
def test_a_folder_remembers_its_arguments(tmp_path: Path, earlier: str, arguments: list[str]) -> None:
    (tmp_path / "asked").write_text(f"{earlier}\n")
    done = quickstart("--out", tmp_path, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert f"({earlier})" in done.stderr


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", QUICKSTART],
        env={**os.environ, "PRETRAIN_PYTHON": "/no/such/python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "/no/such/python" in done.stderr and "3.11" in done.stderr


# --- the length of the run ---

MEASURED = st.builds(
    Measured,
    steps=st.integers(1, LONGEST_STEPS // 2),
    step_s=st.floats(0.001, 100),
    start_s=st.floats(0, 300),
)


def needed_s(measured: Measured, steps: int) -> float:
    """From the choice to the end, by the model of the choice."""
    starts, work = 1 + AFTER_STARTS, steps - measured.steps + AFTER_STEPS
    return starts * measured.start_s + work * measured.step_s


@given(measured=MEASURED, left_s=st.floats(-1000, 7200))
def test_the_longest_run_that_fits_is_chosen(measured: Measured, left_s: float) -> None:
    length = choose_length(measured, left_s, 10)
    fewest = max(FEWEST_STEPS, measured.steps + 1)
    assert length.stop_step == measured.steps < length.steps
    assert fewest <= length.steps <= LONGEST_STEPS
    if length.steps > fewest:
        assert needed_s(measured, length.steps) <= left_s * USABLE_FRAC * (1 + 1e-9)
    if length.steps < LONGEST_STEPS:
        assert needed_s(measured, length.steps + 1) > left_s * USABLE_FRAC * (1 - 1e-9)
    late = "instead of 10" in length.reason
    assert late == (needed_s(measured, length.steps) > max(0, left_s * USABLE_FRAC) * (1 + 1e-9))


@given(measured=MEASURED, left_s=st.floats(0, 7200), more_s=st.floats(0, 7200))
def test_more_time_never_gives_a_shorter_run(measured: Measured, left_s: float, more_s: float) -> None:
    shorter, longer = (choose_length(measured, s, 10).steps for s in (left_s, left_s + more_s))
    assert shorter <= longer


@pytest.mark.parametrize(
    ("measured", "left_s", "sentence"),
    [
        (
            Measured(400, 0.25, 15.0),
            400.0,
            "800 steps, the full length: a step takes 0.25 s on this machine, and 154 of the 400 s left suffice.",
        ),
        (
            Measured(132, 1.5, 20.0),
            340.0,
            "261 steps: a step takes 1.50 s on this machine, and 340 s are left of 10 minutes, 112 s of them for the "
            "second start, the evaluation, the export and the sample.",
        ),
        (
            Measured(8, 27.5, 30.0),
            330.0,
            "200 steps, the fewest that teach the model something: a step takes 27.50 s on this machine, so the whole "
            "job will take about 110 minutes instead of 10.",
        ),
    ],
)
def test_the_choice_is_explained_in_a_sentence(measured: Measured, left_s: float, sentence: str) -> None:
    assert choose_length(measured, left_s, 10).reason == sentence


def test_the_length_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    assert Length.load(path) is None
    length = choose_length(Measured(66, 3.0, 20.0), 340.0, 10)
    length.save(path)
    assert Length.load(path) == length


def config_of(steps: int) -> TrainConfig:
    overrides = ["run_dir=x", "data.manifest=y", "experiment=quickstart", *length_overrides(steps)]
    return load_config(TrainConfig, overrides, "config")


def test_the_first_half_does_not_depend_on_the_length() -> None:
    """It is trained as part of the longest run, before the length is chosen."""

    def rates(steps: int, up_to: int) -> list[float]:
        config = config_of(steps)
        return [
            learning_rate(config.schedule, config.optim.lr, n, config.n_steps) for n in range(1, up_to + 1)
        ]

    for steps in range(FEWEST_STEPS, LONGEST_STEPS, 20):
        assert rates(steps, steps // 2) == rates(LONGEST_STEPS, steps // 2)
        assert rates(steps, steps)[-1] < 0.1 * config_of(steps).optim.lr


@pytest.mark.parametrize("steps", [2, 3, 6, 59])
def test_every_length_is_a_valid_run(steps: int) -> None:
    assert config_of(steps).n_steps == steps


def test_the_longest_run_is_that_of_the_experiment() -> None:
    config = load_config(TrainConfig, ["run_dir=x", "data.manifest=y", "experiment=quickstart"], "config")
    assert config.total_steps == LONGEST_STEPS
    assert config.schedule.warmup_steps == WARMUP_STEPS


# --- commands one after another, and requests to stop ---


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[CommandRunner]:
    """With the folder of a run, whose file `stop` is from an earlier start."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    yield CommandRunner(
        cwd=tmp_path,
        logs=tmp_path / "logs",
        table=tmp_path / "stages.tsv",
        stop_file=tmp_path / "run" / "stop",
    )
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_output_goes_to_the_screen_and_to_a_log(
    runner: CommandRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", '{"run_dir": 1}', "[2026-01-01 00:00:00,000] [INFO] [comm.py:1:x] chatter", "two"]
    assert runner.run("talk", ["printf", "%s\\n", *lines]) == 0
    assert capsys.readouterr().out.split() == ["one", "two"]
    assert (tmp_path / "logs" / "talk.log").read_text().splitlines()[2:] == lines
    assert re.fullmatch(r"talk\t\d+\n", (tmp_path / "stages.tsv").read_text())


def test_a_failure_names_the_error_and_the_log(runner: CommandRunner, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"stage bad .* 2: .*no such key\n.*bad\.log"):
        runner.run("bad", ["bash", "-c", "echo error: no such key; echo more; exit 2"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_command_and_all_below_it(runner: CommandRunner, tmp_path: Path, name: str) -> None:
    command = f"sleep 300 & echo $! >child; kill -{name[3:]} $PPID; wait"
    with pytest.raises(Stopped, match=name):
        runner.run("slow", ["bash", "-c", command])
    gone = int((tmp_path / "child").read_text())
    psutil.wait_procs([psutil.Process(gone)] if psutil.pid_exists(gone) else [], timeout=10)
    assert not psutil.pid_exists(gone)
    with pytest.raises(Stopped):
        runner.run("next", ["touch", "next"])
    assert not (tmp_path / "next").exists()


def test_a_stop_file_ends_the_command_and_is_used_up(runner: CommandRunner, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="run/stop"):
        runner.run("slow", ["bash", "-c", "touch run/stop; sleep 300"])
    assert not (tmp_path / "run" / "stop").exists()


@pytest.mark.parametrize("ask", ["kill -TERM $PPID", "touch run/stop"])
def test_a_training_run_saves_before_it_ends(runner: CommandRunner, tmp_path: Path, ask: str) -> None:
    """It may be starting, and then deletes the file; SIGTERM would end it without a checkpoint."""
    run = "sleep 1; rm -f run/stop; until [ -e run/stop ]; do sleep 0.1; done; touch saved; exit 75"
    with pytest.raises(Stopped):
        runner.run("train", ["bash", "-c", f"{ask}; {run}"], codes=(0, 75), trains=True)
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "run" / "stop").exists()


def test_a_killed_job_ends_its_command(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pretrain.quickstart.runner import CommandRunner
out = Path(sys.argv[1])
runner = CommandRunner(cwd=out, logs=out / "logs", table=out / "table", stop_file=out / "stop")
runner.run("slow", ["bash", "-c", "trap 'touch asked; exit' TERM; touch up; while :; do sleep 0.1; done"])
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    wait_until((tmp_path / "up").exists, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until(condition: object, process: subprocess.Popen, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- training in two halves, with a stand-in for the launcher and the run ---

STAND_IN = """#!/usr/bin/env python3
# In place of `deepspeed`. Each start takes the next entry of plan.json: steps done, seconds of a step, why it stops.
import json, pathlib, sys
here = pathlib.Path(__file__).parent
starts = json.loads((here / "plan.json").read_text())
(here / "plan.json").write_text(json.dumps(starts[1:]))
n_steps, step_s, reason = starts[0]
run = here / "out" / "run"
before = len(list((run / "checkpoints").glob("*"))) and max(int(p.name[5:]) for p in (run / "checkpoints").glob("*"))
attempt = len(list(here.glob("arguments-*"))) + 1
(here / f"arguments-{attempt}").write_text(chr(10).join(sys.argv))
folder = run / "checkpoints" / f"step-{before + n_steps:08d}"
folder.mkdir(parents=True, exist_ok=True)
(folder / "COMPLETE").touch()
with open(run / "metrics.jsonl", "a") as metrics, open(run / "events.jsonl", "a") as events:
    for step in range(before + 1, before + n_steps + 1):
        print(json.dumps(dict(kind="step", attempt=attempt, step=step, step_time_s=step_s)), file=metrics)
    print(json.dumps(dict(event="stopped" if reason else "finished", reason=reason)), file=events)
sys.exit(75 if reason else 0)
"""


@pytest.fixture
def quick_job(tmp_path: Path, runner: CommandRunner, monkeypatch: pytest.MonkeyPatch) -> object:
    """A quickstart of 10 minutes that has come to its training; `plan` says what each start will do."""
    (tmp_path / "deepspeed").write_text(STAND_IN)
    (tmp_path / "deepspeed").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "out").mkdir()
    return job.Job(job.parse([]), tmp_path / "out", time.monotonic())


def test_files_to_be_left_out_are_told_to_the_preparation(
    tmp_path: Path, quick_job: job.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job.parse(["--corpus", str(tmp_path), "--ignore", "*.pdf", "it's"])
    asked = job.Job(given, tmp_path / "out", time.monotonic())
    commands: list[list[str]] = []
    monkeypatch.setattr(asked.stages, "run", lambda _, command: commands.append(command))
    with pytest.raises(Failed):  # nothing was prepared
        asked.prepare_corpus()
    config = load_config(PrepareConfig, commands[0][3:])
    assert (config.input, config.ignore) == ([str(tmp_path)], ["*.pdf", "it's"])


def plan(folder: Path, *starts: tuple[int, float, str | None]) -> None:
    (folder / "plan.json").write_text(json.dumps(starts))


def overrides_of_start(folder: Path, number: int) -> list[str]:
    return [
        word
        for word in (folder / f"arguments-{number}").read_text().splitlines()
        if "step" in word or "stop" in word
    ]


def test_the_length_is_chosen_after_the_first_half(tmp_path: Path, quick_job: job.Job) -> None:
    plan(tmp_path, (150, 1.5, "stop_after_s=240"), (169, 1.5, None))
    steps = quick_job.train()
    # The stand-in takes no time: 0.9 x 600 s hold 325 more steps beside the 35 that stand for what follows.
    assert 465 <= steps <= 475
    assert "stop_at_step=400" in overrides_of_start(tmp_path, 1)
    assert "stop_after_s=240" in overrides_of_start(tmp_path, 1)
    assert f"total_steps={steps}" in overrides_of_start(tmp_path, 2)
    assert Length.load(tmp_path / "out" / "steps.json").stop_step == 150


@pytest.mark.parametrize("reason", ["SIGTERM", "file stop", "loss of the launcher"])
def test_a_stop_that_nobody_planned_ends_the_quickstart(
    tmp_path: Path, quick_job: job.Job, reason: str
) -> None:
    """In the first half, where the ranks end as after the planned stop; and the next start chooses."""
    plan(tmp_path, (20, 1.0, reason), (30, 1.0, "stop_after_s=240"), (1, 1.0, reason), (1, 1.0, None))
    with pytest.raises(Stopped, match=reason):
        quick_job.train()
    assert Length.load(tmp_path / "out" / "steps.json") is None
    with pytest.raises(Stopped, match=reason):
        quick_job.train()
    length = Length.load(tmp_path / "out" / "steps.json")
    assert length is not None and length.stop_step == 50
    assert quick_job.train() == length.steps
    assert f"total_steps={length.steps}" in overrides_of_start(tmp_path, 4)  # nothing is chosen anew
    assert not [word for word in overrides_of_start(tmp_path, 4) if word.startswith("stop_at_step")]


@pytest.mark.parametrize("done", [FEWEST_STEPS - 60, FEWEST_STEPS + 60])
def test_a_machine_that_becomes_slower_shortens_the_run(
    tmp_path: Path, quick_job: job.Job, done: int
) -> None:
    """But not below the shortest length, for which the run starts once more."""
    plan(tmp_path, (100, 1.5, "stop_after_s=240"), (done - 100, 3.0, "stop_after_s=555"), (60, 3.0, None))
    assert quick_job.train() == max(done, FEWEST_STEPS)
    # Of 600 s, the time of 35 steps is left for what follows.
    [clock] = [word for word in overrides_of_start(tmp_path, 2) if word.startswith("stop_after_s")]
    assert 540 <= int(clock.partition("=")[2]) <= 555
    assert (tmp_path / "arguments-3").exists() == (done < FEWEST_STEPS)
    assert quick_job.train() == max(done, FEWEST_STEPS)  # with nothing left to do


def test_a_given_length_has_no_clock(tmp_path: Path, runner: CommandRunner, quick_job: job.Job) -> None:
    quick_job.steps = 500
    plan(tmp_path, (250, 3.0, "stop_at_step=250"), (250, 3.0, None))
    assert quick_job.train() == 500
    for start in (1, 2):
        assert not [word for word in overrides_of_start(tmp_path, start) if word.startswith("stop_after_s")]


def test_a_start_that_takes_the_whole_first_half_measures_some_steps(
    tmp_path: Path, quick_job: job.Job
) -> None:
    plan(tmp_path, (0, 1.0, "stop_after_s=240"), (100, 30.0, "stop_at_step=100"), (100, 30.0, None))
    assert quick_job.train() == FEWEST_STEPS
    assert "stop_at_step=100" in overrides_of_start(tmp_path, 2)
    assert not [word for word in overrides_of_start(tmp_path, 2) if word.startswith("stop_after")]


# --- the closing table ---


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Four documents over three chunks; ids 4, 5, 6 occur 8, 4 and 4 times, EOS (2) four times."""
    writer = CorpusWriter(
        tmp_path / "corpus",
        tokenizer_sha256="0" * 64,
        vocab_size=300,
        bos_id=1,
        eos_id=2,
        chunk_tokens=8,
        sources=["made"],
    )
    for number in range(4):
        writer.add_document([1, 4, 5, 4, 6, 2], source="made", document_id=str(number), text_bytes=4)
    writer.finish()
    return Corpus(tmp_path / "corpus" / "manifest.json")


def test_unigram_entropy(corpus: Corpus) -> None:
    """BOS is never predicted, so it does not count: frequencies 8, 4, 4, 4 of 20."""
    expected = -(0.4 * math.log(0.4) + 3 * 0.2 * math.log(0.2))
    assert summary.unigram_entropy(corpus, 24) == pytest.approx(expected)


def test_unigram_entropy_of_the_beginning(corpus: Corpus) -> None:
    """Of 1 4 5 4 6 2 1 4 5 (the first chunk has 8 tokens), 4 occurs three times, 5 twice, 6 and 2 once."""
    expected = -sum(n / 7 * math.log(n / 7) for n in (3, 2, 1, 1))
    assert summary.unigram_entropy(corpus, 9) == pytest.approx(expected)


def test_mean_loss_takes_the_steps_up_to_one() -> None:
    losses = [float(step) for step in range(1, 21)]
    assert summary.mean_loss(losses, 20) == np.mean([16, 17, 18, 19, 20])
    assert summary.mean_loss(losses, 10) == np.mean([6, 7, 8, 9, 10])
    assert summary.mean_loss([3.0, 1.0], 2) == 2.0


@pytest.fixture
def small_quickstart(corpus: Corpus, tmp_path: Path) -> Path:
    """What a quickstart leaves that scored 18 of the 24 held-out tokens."""
    shutil.copytree(tmp_path / "corpus", tmp_path / "heldout")
    (tmp_path / "heldout").rename(tmp_path / "corpus" / "heldout")
    (tmp_path / "run").mkdir()
    lines = [{"kind": "step", "attempt": 1, "step": n, "loss": 5.0 - n / 10} for n in range(1, 11)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 2.5, "max_tokens": 18}
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    (tmp_path / "stages.tsv").write_text("environment\t40\ncorpus\t\n")
    Length(10, 4, "10 steps.", after_s=60.0).save(tmp_path / "steps.json")
    return tmp_path


def test_summary_of_a_small_quickstart(
    small_quickstart: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    summary.summarize(summary.SummaryConfig(output=str(small_quickstart)))
    printed = capsys.readouterr().out
    assert re.search(r"environment +40 s\n +corpus +reused", printed)
    assert "4 documents, 0.0 MB of text, 24 tokens" in printed
    assert re.search(r"stopped at step 4 +4\.750\n +resumed, to step 10 +4\.200", printed)
    assert "its first 18 of 24 tokens" in printed
    entropy = summary.unigram_entropy(corpus, 18)
    assert f"{1 - 1 / entropy:.0%} below the unigram entropy" in printed


@pytest.mark.parametrize("chosen", [True, False])
def test_a_model_that_learned_nothing_fails(
    small_quickstart: Path, capsys: pytest.CaptureFixture[str], chosen: bool
) -> None:
    """A run whose length was given may be as short as it likes; the table says what it is worth."""
    Length(10, 4, "10 steps.", 60.0 if chosen else None).save(small_quickstart / "steps.json")
    result = {"loss": 1.33, "perplexity": 3.8, "bits_per_byte": 2.5, "max_tokens": 24}
    (small_quickstart / "evaluation.json").write_text(json.dumps(result))
    config = summary.SummaryConfig(output=str(small_quickstart))
    if chosen:
        with pytest.raises(RunError, match=r"loss 1\.330 .* 1\.332"):
            summary.summarize(config)
    else:
        summary.summarize(config)
    assert "0% below the unigram entropy" in capsys.readouterr().out


def test_summary_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished quickstart"):
        summary.summarize(summary.SummaryConfig(output=str(tmp_path)))


# --- the whole of it, with stops that nobody planned ---


def heed_hangups() -> None:
    """SIGHUP stays ignored in all processes below `nohup`, and the tests may run there."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.integration
def test_requests_to_stop_are_heeded_in_both_halves(tmp_path: Path) -> None:
    """By the file in the first half, by a signal in the second; each time the same command goes on."""
    out = tmp_path / "out"
    command = ["bash", str(QUICKSTART), "--out", str(out), "--steps", "16"]
    environment = {**os.environ, "QUICKSTART_MAX_BYTES": "1000000", "PRETRAIN_VENV": sys.prefix}

    def start(number: int) -> subprocess.Popen:
        with (tmp_path / f"{number}.log").open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=heed_hangups)

    def steps_done() -> int:
        return len(read_metrics(out / "run"))

    first = start(1)
    wait_until(lambda: steps_done() >= 1, first)
    (out / "run" / "stop").touch()
    assert first.wait(120) == 75
    assert "stopped on request (file" in (tmp_path / "1.log").read_text()
    assert 1 <= steps_done() < 8
    assert not (out / "run" / "stop").exists()

    second = start(2)
    wait_until(lambda: steps_done() >= 9, second)
    second.send_signal(signal.SIGHUP)
    assert second.wait(120) == 75
    assert "the run has stopped after step 8;" in (tmp_path / "2.log").read_text()
    assert "stopped on request (SIGHUP)" in (tmp_path / "2.log").read_text()
    assert steps_done() < 16

    assert start(3).wait(300) == 0, (tmp_path / "3.log").read_text()
    assert [record["step"] for record in read_metrics(out / "run")] == list(range(1, 17))
    reasons = [
        event["reason"] for event in read_lines(out / "run" / "events.jsonl") if event["event"] == "stopped"
    ]
    assert reasons == ["file stop", "stop_at_step=8", "file stop"]
    evaluated = json.loads((out / "evaluation.json").read_text())
    assert evaluated["tokens"] <= evaluated["max_tokens"] == job.EVALUATED_TOKENS

    assert start(4).wait(120) == 0, (tmp_path / "4.log").read_text()  # all but the sample is there
    stages = (out / "stages.tsv").read_text().splitlines()
    assert sum(line.endswith("\t") for line in stages) == 5, stages
