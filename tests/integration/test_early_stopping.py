"""Runs that stop early, with several held-out sets, a task and averaged weights: killed, started again, and used."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pretrain.checkpoint import tensors as checkpoint
from pretrain.reliability.journal import read_metrics
from support.checkpoints import assert_same_state
from support.gate import Gate
from support.launching import Ranks, run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.trained_run import script
from support.training import TRAIN, losses, wait_for

pytestmark = pytest.mark.integration


def arguments(corpus: TinyCorpus, run_dir: Path) -> list[str]:
    """A loss that falls by 0.2 nats in two steps, and gains of 0.5 that are asked for."""
    return run_arguments(
        corpus,
        run_dir,
        f"evaluation.sets={{own: {corpus.folder}}}",
        "evaluation.by=own",
        "evaluation.every_steps=2",
        "evaluation.max_sequences=4",
        "evaluation.patience=2",
        "evaluation.min_gain=0.5",
        "ema.decay=0.9",
        "data.loader_workers=0",
        f"evaluation.tasks=[{write_task(run_dir.parent)}]",
        "evaluation.task_items=3",
    )


def write_task(folder: Path) -> Path:
    """A task of which 3 of 5 items are scored: 6 choices, which are 3 or 2 forward passes on 1 or 2 ranks."""
    items = [
        {"text": f"import {name}", "label": str(n % 2)}
        for n, name in enumerate(["os", "re", "io", "abc", "ast"])
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    keys = {
        "kind": "classification",
        "data": "items.jsonl",
        "prompt": "{text}",
        "labels": {"0": " # no", "1": " # yes"},
    }
    (folder / "imports.json").write_text(json.dumps(keys))
    return folder / "imports.json"


TASK = {
    f"task/{ema}imports/{score}{error}"
    for ema in ("", "ema/")
    for score in ("accuracy", "gold_bits_per_byte")
    for error in ("", "_standard_error")
}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def early(
    request: pytest.FixtureRequest, corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The undisturbed run, on as many ranks as its folder's name says."""
    run_dir = tmp_path_factory.mktemp("early") / str(request.param)
    run_ranks(request.param, TRAIN, *arguments(corpus, run_dir), log_dir=run_dir.parent / "logs")
    return run_dir


def ending(run_dir: Path) -> tuple[int, str]:
    (finished,) = [event for event in events(run_dir) if event["event"] == "finished"][-1:]
    return finished["step"], finished["reason"]


def heldout(run_dir: Path) -> dict[int, dict[str, str]]:
    """The bits of all held-out losses and scores of tasks by step."""
    return {
        record["step"]: {
            k: v.hex()
            for k, v in record.items()
            if k.startswith(("heldout/", "task/")) and (k.endswith("loss") or k in TASK)
        }
        for record in read_metrics(run_dir)
    }


def test_it_finishes_where_nothing_is_gained(early: Path) -> None:
    step, reason = ending(early)
    assert step == 6
    assert "heldout/own/loss" in reason and "step 2" in reason
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(early)] == [4, 6]
    measured = heldout(early)
    names = {"heldout/loss", "heldout/own/loss", "heldout/ema/loss", "heldout/own/ema/loss"}
    assert [set(measured[step]) for step in range(1, 7)] == [set(), names | TASK] * 3
    bits = [float.fromhex(measured[step]["task/imports/gold_bits_per_byte"]) for step in (2, 4, 6)]
    assert bits[0] > bits[1] > bits[2] > 0
    told = [event for event in events(early) if event["event"] == "evaluated"]
    assert [event["step"] for event in told] == [2, 4, 6]
    assert {f"heldout/{name}" for name in told[0]["losses"]} == names


def test_kill_9_before_the_evaluation_of_the_saved_step(
    early: Path, corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The checkpoint of step 4 is older than the evaluation of step 4. A run that missed it would stop at step 8."""
    n_ranks, run_dir = int(early.name), tmp_path / "run"
    gate, place = Gate(tmp_path / "gate", "step-5"), "step-5"
    saved = checkpoint.checkpoint_path(run_dir, 4)
    words = arguments(corpus, run_dir)
    with Ranks(n_ranks, TRAIN, *words, log_dir=tmp_path / "first", env=gate.env) as ranks:
        wait_for(lambda: gate.reached(place, n_ranks) and saved.exists(), ranks)
        for process in ranks.processes:
            process.kill()
        assert ranks.wait() == [-signal.SIGKILL] * n_ranks
    counted = json.loads((saved / "state.json").read_text())["early_stop"]
    assert (counted["step"], counted["best_step"]) == (2, 2)
    run_ranks(n_ranks, TRAIN, *words, log_dir=tmp_path / "second")
    assert ending(run_dir) == ending(early)
    assert losses(run_dir) == losses(early)
    assert heldout(run_dir) == heldout(early)
    paths = [checkpoint.checkpoint_path(one, 6) for one in (run_dir, early)]
    assert_same_state(*paths)
    states = [json.loads((path / "state.json").read_text())["early_stop"] for path in paths]
    assert states[0] == states[1]
    run_ranks(n_ranks, TRAIN, *words, log_dir=tmp_path / "third")  # it stays finished
    assert ending(run_dir) == ending(early)
    assert len(losses(run_dir)) == 6


def test_the_best_and_the_average_are_used_by_name(
    early: Path, corpus: TinyCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best is made to be the older checkpoint, by a line as the run writes them."""
    launch = script("eval")

    def evaluated(**options: object) -> tuple[int, float]:
        chosen = {"max_tokens": 300, "json": True, **options}
        launch.main(launch.EvalConfig(run_dir=str(early), input=[str(corpus.heldout.parent)], **chosen))
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found["step"], found["loss"]

    metrics = early / "metrics.jsonl"
    before = metrics.read_bytes()
    newest, best = evaluated(), evaluated(which=launch.Which.best)
    assert newest == best and newest[0] == 6
    averaged = evaluated(weights=launch.Weights.ema)
    assert averaged[0] == 6 and averaged[1] > newest[1] + 0.01  # the average follows a falling loss
    with metrics.open("a") as file:
        file.write('{"kind": "evaluation", "attempt": 1, "step": 6, "heldout/own/loss": 99.0}\n')
    assert evaluated(which=launch.Which.best)[0] == 4
    metrics.write_bytes(before)
