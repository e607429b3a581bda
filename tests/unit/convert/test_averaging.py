"""The average of checkpoints: the mean of their weights, in a folder that every reader of runs takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.corpus.shards import Corpus
from pretrain.errors import ConfigError
from pretrain.evaluate.heldout import corpus_documents, first_tokens, score_documents
from pretrain.trained import load_trained
from support.peak import peak_bytes
from support.trained_run import make_run, script, write_heldout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 3, 5 and 8, whose weights differ."""
    folder = tmp_path_factory.mktemp("averaged")
    for step in (3, 5, 8):
        make_run(folder / str(step), step=step)
    for step in (3, 5):
        name = f"step-{step:08d}"
        shutil.copytree(folder / str(step) / "checkpoints" / name, folder / "8" / "checkpoints" / name)
    return folder / "8"


def average(run_dir: Path, output: Path, **options: Any) -> None:
    launch = script("average")
    launch.main(launch.AverageConfig(run_dir=str(run_dir), output=str(output), **options))


@pytest.mark.parametrize(
    ("options", "steps"), [({"last": 2}, (5, 8)), ({"last": 3}, (3, 5, 8)), ({"steps": [8, 3]}, (3, 8))]
)
def test_the_weights_are_the_mean(
    run_dir: Path, tmp_path: Path, options: dict[str, Any], steps: tuple[int, ...]
) -> None:
    average(run_dir, tmp_path / "mean", **options)
    found = load_trained(tmp_path / "mean")
    parts = [load_trained(run_dir, step) for step in steps]
    assert (found.step, found.tokens_seen) == (parts[-1].step, parts[-1].tokens_seen)
    for name, weight in found.weights.items():
        expected = torch.stack([part.weights[name].double() for part in parts]).mean(0).float()
        assert torch.equal(weight, expected), name


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """50 MB in each checkpoint, of which the largest weight has 1.4 MB."""
    for step in (3, 5):
        make_run(tmp_path / str(step), ModelConfig(n_layers=8, d_model=384, n_heads=4, d_ff=896), step=step)
    name = "step-00000003"
    shutil.move(tmp_path / "3" / "checkpoints" / name, tmp_path / "5" / "checkpoints" / name)
    before = peak_bytes(reset=True)
    average(tmp_path / "5", tmp_path / "mean", last=2)
    grown = peak_bytes() - before
    assert sum(path.stat().st_size for path in (tmp_path / "mean").rglob("*.safetensors")) > 50_000_000
    assert grown < 25_000_000, f"{grown:,}"


def test_the_mean_is_evaluated_against_the_last(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = write_heldout(load_trained(run_dir).tokenizer, tmp_path / "heldout")
    average(run_dir, tmp_path / "mean", last=2, heldout=str(heldout), max_tokens=100)
    lines = [line for line in capsys.readouterr().out.splitlines() if "held-out loss" in line]
    told = {name: float(rest.split()[2].rstrip(",")) for name, rest in (line.split(": ") for line in lines)}
    for name, folder in (("mean", tmp_path / "mean"), ("step 8", run_dir)):
        trained = load_trained(folder)
        scores = score_documents(
            trained.decoder(torch.device("cpu"), torch.float32),
            first_tokens(corpus_documents(Corpus(heldout)), 100),
            sequence_length=trained.sequence_length,
            micro_batch_sequences=8,
            device=torch.device("cpu"),
        )
        assert told[name] == pytest.approx(scores.overall.loss, rel=0.02)  # there it may compute in bf16
    assert told.keys() == {"mean", "step 8"}


def test_without_held_out_text_it_says_so(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average(run_dir, tmp_path / "mean", last=2)
    assert "no held-out text; give heldout=DIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"last": 4}, "last=4.*3, 5, 8"),
        ({"steps": [3, 4]}, "step 4"),
        ({"run_dir": "none", "last": 2}, "run_dir=none"),
    ],
)
def test_checkpoints_that_are_not_there(
    run_dir: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        average(**({"run_dir": run_dir, "output": tmp_path / "mean"} | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{}, {"last": 2, "steps": [3, 5]}, {"last": 1}, {"steps": [3]}, {"steps": [3, 3]}]
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"last=|steps="):
        script("average").AverageConfig(run_dir="r", output="o", **options)
