"""A ladder: its runs, the fit against losses of a known law, and what is said of a larger run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ModelConfig, TrainConfig, load_config
from pretrain.errors import ConfigError, ExitCode
from pretrain.plan.ladder import (
    INTERVAL_FRAC,
    LadderFit,
    RungResult,
    predict,
    read_fit,
    rungs_of,
)
from pretrain.plan.ladder_fit import fit_ladder, fit_law, write_fit
from pretrain.plan.loss import CHINCHILLA, OLMO_BATCH_TOKENS, OLMO_LR, LossLaw, ladder_parameters
from pretrain.plan.report import loss_figures, loss_lines
from support.recipes import whole
from support.tiny import TinyCorpus
from support.trained_run import run_script, script

SIZES = [10**7, 2 * 10**7, 4 * 10**7, 8 * 10**7]
POINTS = [(size, ratio * size) for size in SIZES for ratio in (5, 10, 20, 40)]
BIG = (10**9, 20 * 10**9)
MODEL = ModelConfig(n_layers=2, d_model=64, n_heads=2, d_ff=160, vocab_size=512)


def result(size: int, tokens: int, loss: float, lr: float = 1e-3, batch_tokens: int = 1000) -> RungResult:
    return RungResult(
        name="run", n_parameters=size, tokens=tokens, loss=loss, lr=lr, batch_tokens=batch_tokens
    )


def noisy(law: LossLaw, sigma: float, seed: int, points: list[tuple[int, int]]) -> list[RungResult]:
    """Runs whose losses follow a law, but for noise."""
    noise = np.exp(sigma * np.random.default_rng(seed).standard_normal(len(points)))
    return [result(n, d, law.loss(n, d) * float(x)) for (n, d), x in zip(points, noise, strict=True)]


def interval(fit: LadderFit, size: int, tokens: int) -> tuple[float, float]:
    """The interval of `predict`, for a size that is given as a number."""
    losses = sorted(one.law.loss(size, tokens) * one.noise_factor for one in fit.resampled)
    outside = int((1 - INTERVAL_FRAC) / 2 * len(losses))
    return losses[outside], losses[-1 - outside]


# ---- the fit ----


@pytest.mark.parametrize(
    "law", [CHINCHILLA, LossLaw(e=0.9, a=60.0, alpha=0.25, b=900.0, beta=0.4)], ids=["published", "other"]
)
def test_losses_without_noise_give_the_law_back(law: LossLaw) -> None:
    sizes, tokens = np.array(POINTS, dtype=float).T
    found = fit_law(sizes, tokens, np.array([law.loss(n, d) for n, d in POINTS]))
    expected = pytest.approx([law.e, law.a, law.alpha, law.b, law.beta], rel=0.02)
    assert [found.e, found.a, found.alpha, found.b, found.beta] == expected
    assert found.loss(*BIG) == pytest.approx(law.loss(*BIG), rel=1e-4)


def test_one_spoiled_run_does_not_move_the_fit() -> None:
    """What Huber's loss is for: a run that diverged a little."""
    sizes, tokens = np.array(POINTS, dtype=float).T
    losses = np.array([CHINCHILLA.loss(n, d) for n, d in POINTS])
    losses[5] *= 1.05
    assert fit_law(sizes, tokens, losses).loss(*BIG) == pytest.approx(CHINCHILLA.loss(*BIG), rel=2e-3)


def test_runs_that_follow_no_law_are_told_apart() -> None:
    """A learning rate that was too high for the larger models: they end above the smaller ones."""
    runs = [
        result(n, d, CHINCHILLA.loss(n, d) * (1.1 if n == SIZES[2] and d > 10**9 else 1)) for n, d in POINTS
    ]
    fit = fit_ladder(runs, "heldout/loss", 512, resamplings=20)
    assert 0.05 < fit.departure_frac < 0.15


def test_the_interval_holds_the_loss_and_grows_with_the_noise() -> None:
    widths = []
    for sigma in (0.001, 0.01):
        fit = fit_ladder(noisy(CHINCHILLA, sigma, 3, POINTS), "heldout/loss", 512, resamplings=20)
        low, high = interval(fit, *BIG)
        assert low < CHINCHILLA.loss(*BIG) < high
        widths.append(high - low)
    assert widths[0] < 0.5 * widths[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "points",
    [POINTS, [(size, ratio * size) for size in SIZES for ratio in (10, 20)]],
    ids=["16 runs", "8 runs"],
)
def test_the_interval_covers_as_often_as_it_says(points: list[tuple[int, int]]) -> None:
    """60 simulated ladders with half a percent of noise, 12 times beyond their largest model: docs/planning.md."""
    hits = 0
    for seed in range(60):
        runs = noisy(CHINCHILLA, 0.005, seed, points)
        low, high = interval(fit_ladder(runs, "heldout/loss", 512, resamplings=40), *BIG)
        actual = noisy(CHINCHILLA, 0.005, 1000 + seed, [BIG])[0].loss
        hits += low <= actual <= high
    print(f"{hits} of 60 intervals hold the loss")
    assert 0.78 <= hits / 60 <= 1  # 90%, less three standard errors


def test_the_best_learning_rate_of_each_size_makes_the_law_of_the_rate() -> None:
    runs = [
        result(n, d, CHINCHILLA.loss(n, d) + 0.1 * math.log(factor) ** 2, factor * OLMO_LR.at(n))
        for n, d in POINTS
        for factor in (0.5, 1.0, 2.0)
    ]
    fit = fit_ladder(runs, "heldout/loss", 512, resamplings=20)
    assert fit.departure_frac < 1e-3
    assert fit.lr.at(BIG[0]) == pytest.approx(OLMO_LR.at(BIG[0]), rel=1e-6)
    assert fit.law.loss(*BIG) == pytest.approx(CHINCHILLA.loss(*BIG), rel=1e-3)


def test_what_all_runs_share_holds_for_a_larger_one() -> None:
    fit = fit_ladder(noisy(CHINCHILLA, 0.001, 1, POINTS), "heldout/loss", 512, resamplings=20)
    assert fit.lr.at(BIG[0]) == pytest.approx(1e-3)
    assert fit.batch_tokens.at(BIG[0]) == pytest.approx(1000)


# ---- the runs ----


def a_ladder(**changes: object) -> list:
    given = {
        "depths": [4, 6, 8],
        "head_width": 64,
        "tokens": [],
        "tokens_per_parameter": [10.0, 20.0],
        "lr_multipliers": [1.0],
        "sequence_length": 1024,
        "batch_multiple": 8,
        "batch_sequences": None,
        "lr": None,
    }
    return rungs_of(MODEL, **(given | changes))


def test_the_runs_follow_the_formulas_of_olmo() -> None:
    rungs = a_ladder()
    assert len(rungs) == 6
    assert [r.n_parameters * r.tokens for r in rungs] == sorted(r.n_parameters * r.tokens for r in rungs)
    for rung in rungs:
        assert rung.n_parameters == ladder_parameters(rung.model)
        assert rung.tokens in (10 * rung.n_parameters, 20 * rung.n_parameters)
        assert rung.batch_sequences % 8 == 0
        assert abs(rung.batch_sequences - OLMO_BATCH_TOKENS.at(rung.n_parameters) / 1024) <= 4
        assert rung.lr == OLMO_LR.at(rung.n_parameters)


def test_depth_12_is_the_smallest_model_of_olmos_ladder() -> None:
    """So a ladder ends where the recipes olmo/190m and olmo/370m begin."""
    for depth, name in ((12, "olmo/190m"), (16, "olmo/370m")):
        expected = whole(name).model
        rungs = rungs_of(
            replace(expected, n_layers=2),
            depths=[4, 6, depth],
            head_width=64,
            tokens=[],
            tokens_per_parameter=[10.0, 20.0],
            lr_multipliers=[1.0],
            sequence_length=2048,
            batch_multiple=64,
            batch_sequences=None,
            lr=None,
        )
        assert rungs[-1].model == expected
        assert rungs[-1].batch_sequences == whole(name).global_batch_sequences


def test_each_run_is_a_valid_training_run() -> None:
    base = ["run_dir=x", "data.manifest=y", "experiment=ladder"]
    for rung in a_ladder(tokens=[10**6], lr_multipliers=[0.5, 1.0]):
        words = [f"{key}={value}" for key, value in rung.words(1024).items()]
        config = load_config(TrainConfig, [*base, *words], "config")
        assert config.model.d_model == 64 * config.model.n_layers
        assert config.schedule.warmup_steps <= 0.1 * config.n_steps + 1
    assert len({rung.name for rung in a_ladder(tokens=[10**6], lr_multipliers=[0.5, 1.0])}) == 18


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": [4, 6]}, ["4 runs", "2 sizes", "depths"]),
        ({"tokens_per_parameter": [], "tokens": [10**6, 10**7]}, ["2 lengths"]),
        ({"tokens_per_parameter": [10.0]}, ["3 runs"]),
    ],
)
def test_too_few_runs_are_refused(changes: dict, named: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        a_ladder(**changes)
    assert [word for word in named if word not in str(refused.value)] == []


# ---- the fit file and the prediction ----


@pytest.fixture(scope="module")
def fit() -> LadderFit:
    return fit_ladder(noisy(CHINCHILLA, 0.002, 5, POINTS), "heldout/loss", 512, resamplings=20)


def test_a_fit_file_is_read_as_it_was_written(fit: LadderFit, tmp_path: Path) -> None:
    write_fit(fit, tmp_path / "fit.json")
    assert read_fit(str(tmp_path)) == read_fit(str(tmp_path / "fit.json")) == fit


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 2}, "format_version"),
        ({"law": {"e": 1.0}}, "law.a"),
        ({"rungs": []}, "rungs"),
        ({"vocab_size": "512"}, "vocab_size"),
        ({"more": 1}, "more"),
    ],
)
def test_a_wrong_fit_file_is_one_sentence(change: dict, named: str, fit: LadderFit, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(json.dumps(asdict(fit) | change))
    with pytest.raises(ConfigError, match=named):
        read_fit(str(tmp_path))


def test_a_missing_fit_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ladder=.*none.* cannot be read"):
        read_fit(str(tmp_path / "none"))


def test_a_prediction_says_how_far_it_goes_beyond(fit: LadderFit) -> None:
    found = predict(fit, MODEL, 32 * 10**8)
    assert found.beyond_tokens == pytest.approx(1.0)
    assert found.beyond_size == ladder_parameters(MODEL) / SIZES[-1]
    assert found.low < found.loss < found.high
    assert predict(fit, MODEL, 64 * 10**8).beyond_tokens == pytest.approx(2.0)


def test_other_tokens_are_refused(fit: LadderFit) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1024 differs from the ladder's 512"):
        predict(fit, replace(MODEL, vocab_size=1024), 10**6)


def test_the_plan_says_that_it_extrapolates(fit: LadderFit) -> None:
    config = load_config(
        TrainConfig,
        [
            *("run_dir=x", "data.manifest=y", "total_tokens=1_000_000"),
            *("model=125m", "model.n_layers=6", "model.vocab_size=512"),
        ],
        "config",
    )
    inside, beyond = (loss_lines(config, tokens, fit) for tokens in (10**8, 10**10))
    assert not any("EXTRAPOLATED" in line for line in inside)
    assert any("EXTRAPOLATED" in line and "3.12 times its longest run" in line for line in beyond)
    figures = loss_figures(config, 10**8, fit)
    assert figures["expected_loss_low"]["value"] < figures["expected_loss_high"]["value"]
    assert figures["ladder_lr"]["value"] == pytest.approx(1e-3)


def test_without_a_ladder_the_plan_names_the_published_law() -> None:
    words = ["run_dir=x", "data.manifest=y", "model=7b", "model.vocab_size=32_000", "total_tokens=1000"]
    config = load_config(TrainConfig, words, "config")
    figure = loss_figures(config, 2 * 10**12)["expected_loss"]
    assert figure["value"] == pytest.approx(
        1.8172 + 482.01 / 6.738e9**0.3478 + 2085.43 / 2e12**0.3658, rel=1e-4
    )
    assert figure["known"] == "projected"
    assert any("Besiroglu" in line for line in loss_lines(config, 2 * 10**12))
    for more in ("objective=mlm", "init_from=z"):
        assert loss_figures(load_config(TrainConfig, [*words, more], "config"), 10**9) == {}


# ---- the command ----

LAW = LossLaw(e=2.0, a=20.0, alpha=0.3, b=30.0, beta=0.3)


def arguments(corpus: TinyCorpus, output: Path, *more: str) -> list[str]:
    return [
        f"output={output}",
        "experiment=ladder",
        f"data.manifest={corpus.manifest}",
        f"evaluation.manifest={corpus.heldout}",
        "data.sequence_length=64",
        "micro_batch_sequences=2",
        "depths=[1,2,3]",
        "head_width=16",
        "tokens_per_parameter=[0.05,0.1]",
        "logging=quiet",
        "engine.precision=fp32",
        *more,
    ]


class Trainer:
    """Stands in for the training runs: it writes what a finished run of a known law would, or stops."""

    def __init__(self, stop_at: int | None = None, loss: float | None = None) -> None:
        self.stop_at, self.loss, self.trained = stop_at, loss, []

    def __call__(self, command: list[str], run_dir: Path) -> ExitCode:
        config = load_config(TrainConfig, command[2:], "config")
        run_dir.mkdir(parents=True, exist_ok=True)  # a stopped run has one
        if len(self.trained) == self.stop_at:
            return ExitCode.STOPPED
        self.trained.append(run_dir.name)
        tokens = config.n_steps * config.global_batch_sequences * config.data.sequence_length
        size = ladder_parameters(replace(config.model, vocab_size=512))
        step = {"kind": "step", "step": config.n_steps, "attempt": 1, "tokens_seen": tokens}
        evaluation = {"kind": "evaluation", "step": config.n_steps, "attempt": 1}
        evaluation["heldout/loss"] = LAW.loss(size, tokens) if self.loss is None else self.loss
        (run_dir / "metrics.jsonl").write_text(f"{json.dumps(step)}\n{json.dumps(evaluation)}\n")
        finished = {"event": "finished", "step": config.n_steps}
        (run_dir / "events.jsonl").write_text(json.dumps(finished) + "\n")
        return ExitCode.FINISHED


def ladder(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, words: list[str]) -> int:
    """launch/ladder.py in this process, with the stand-in for its training runs. Returns the exit code."""
    module = script("ladder")
    monkeypatch.setattr(module, "train", trainer)
    monkeypatch.setattr(sys, "argv", ["ladder.py", *words])
    with pytest.raises(SystemExit) as ending:
        module.run_command(module.LadderConfig, module.main, config_name="config", doc=module.__doc__)
    return ending.value.code


def test_a_ladder_goes_on_where_it_stopped_and_predicts(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = arguments(corpus, tmp_path / "l")
    first, second, third = Trainer(stop_at=2), Trainer(), Trainer(stop_at=1)
    assert ladder(monkeypatch, first, words) == ExitCode.STOPPED
    assert not (tmp_path / "l" / "fit.json").exists()
    assert ladder(monkeypatch, second, words) == 0
    assert len(first.trained) == 2 and len(second.trained) == 4
    assert not set(first.trained) & set(second.trained)
    assert capsys.readouterr().out.count("finished before") == 2
    fit = read_fit(str(tmp_path / "l"))
    assert fit.vocab_size == 512 and len(fit.rungs) == 6
    assert fit.law.loss(50_000, 20_000) == pytest.approx(LAW.loss(50_000, 20_000), rel=0.02)
    # Longer lists add runs.
    assert ladder(monkeypatch, third, [*words, "depths=[1,2,3,4]"]) == ExitCode.STOPPED
    assert [name.split("-")[0] for name in third.trained] == ["d4"]

    plan = script("plan")
    size = ["model.n_layers=4", "model.d_model=64", "model.n_heads=4", "model.n_kv_heads=4", "model.d_ff=256"]
    given = [f"ladder={tmp_path / 'l'}", "total_tokens=200_000", "json=true"]
    given += ["cluster.nodes=1", "cluster.gpus_per_node=1", "data.sequence_length=64"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *given, *size])
    with pytest.raises(SystemExit) as ending:
        plan.run_command(plan.PlanConfig, plan.main, config_name="plan", doc=plan.__doc__)
    assert ending.value.code == 0
    output = capsys.readouterr().out
    loss = json.loads(output.splitlines()[-1])["loss"]
    shape = ModelConfig(n_layers=4, d_model=64, n_heads=4, d_ff=256, vocab_size=512)
    n = ladder_parameters(shape)
    assert loss["expected_loss"]["value"] == pytest.approx(LAW.loss(n, 200_000), rel=0.05)
    assert loss["ladder_lr"]["value"] == pytest.approx(OLMO_LR.at(n), rel=0.01)
    assert "EXTRAPOLATED" in output


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["total_steps=5"], ["total_steps=5", "tokens_per_parameter"]),
        (["optim.lrr=5"], ["optim.lrr", "did you mean"]),
        (["micro_batch_sequences=x"], ["micro_batch_sequences=x"]),
        (["model.dropout=2"], ["model.dropout=2"]),
        (["evaluation.manifest=null"], ["evaluation.manifest"]),
        (["depths=[1,2]"], ["4 runs", "2 sizes"]),
        (["depths=[0,2,3]"], ["depths=[0, 2, 3]"]),
        (["depth=[1]"], ["depth", "depths"]),
        (["global_batch_sequences=3"], ["global_batch_sequences=3"]),
        (["tokens=[2e6,2e6]"], ["tokens=[2000000, 2000000]"]),
    ],
)
def test_a_wrong_ladder_is_refused_before_anything_is_trained(
    more: list[str],
    named: list[str],
    corpus: TinyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    trainer = Trainer()
    assert ladder(monkeypatch, trainer, arguments(corpus, tmp_path / "l", *more)) == ExitCode.CONFIG_ERROR
    said = capsys.readouterr().err
    assert [word for word in named if word not in said] == [], said
    assert said.count("\n") == 1 and not (tmp_path / "l").exists()


def test_a_batch_suits_the_ranks_and_the_micro_batch(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch of an ordinary run would be; and several ranks are started by DeepSpeed's launcher."""
    commands = []

    def trainer(command: list[str], run_dir: Path) -> ExitCode:
        commands.append(command)
        return ExitCode.STOPPED

    words = arguments(corpus, tmp_path / "l", "ranks=3", "micro_batch_sequences=48")
    assert ladder(monkeypatch, trainer, words) == ExitCode.STOPPED
    assert commands[0][:3] == ["deepspeed", "--num_gpus", "3"]
    given = dict(word.split("=", 1) for word in commands[0][6:])
    assert given["global_batch_sequences"] == "144" and given["total_tokens"] == "618"


def test_runs_of_another_ladder_are_not_mixed_in(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert ladder(monkeypatch, Trainer(stop_at=0), arguments(corpus, tmp_path / "l")) == ExitCode.STOPPED
    for more in ("optim.lr=0.01", "ranks=2"):
        trainer = Trainer()
        words = arguments(corpus, tmp_path / "l", more)
        assert ladder(monkeypatch, trainer, words) == ExitCode.CONFIG_ERROR
        assert "another ladder" in capsys.readouterr().err and trainer.trained == []


def test_a_run_that_diverged_is_named(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = arguments(corpus, tmp_path / "l")
    assert ladder(monkeypatch, Trainer(loss=math.nan), words) == ExitCode.CONFIG_ERROR
    said = capsys.readouterr().err
    assert "heldout/loss=nan" in said and str(tmp_path / "l" / "d1-") in said and "optim.lr" in said


@pytest.mark.long
@pytest.mark.integration
def test_a_real_ladder(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Six real runs of seconds each, under the supervisor, and a second start that trains none of them again."""
    words = arguments(corpus, tmp_path / "l", "evaluation.max_sequences=16", "optim.lr=5e-3")
    done = run_script("ladder", *words, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    fit = read_fit(str(tmp_path / "l"))
    assert len(fit.rungs) == 6 and all(2 < rung.loss < 7 for rung in fit.rungs)
    assert {rung.lr for rung in fit.rungs} == {5e-3}
    again = run_script("ladder", *words)
    assert again.returncode == 0 and again.stdout.count("finished before") == 6
