"""Whole runs with objective=mlm: the masks of each step are the same on any number of ranks and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import TrainConfig, load_config
from pretrain.errors import ConfigError
from pretrain.reliability.journal import read_ledger, read_metrics
from pretrain.train.run_folder import check_resumable
from support.gate import Gate
from support.launching import Ranks, run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.training import N_STEPS, TRAIN, assert_equals_undisturbed, losses, wait_for

pytestmark = pytest.mark.integration

MLM = ["objective=mlm", "mlm.fraction=0.2", "engine.precision=fp32"]


def masked_tokens(run_dir: Path) -> dict[int, str]:
    """Hash of the masked tokens of each step, which one rank alone has read in the order of the samples."""
    return {entry["step"]: entry["tokens_xxh3"] for entry in read_ledger(run_dir)}


@pytest.fixture(scope="module")
def killed(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks, one of which was killed with SIGKILL in step 6, and which then went on from step 4."""
    folder = tmp_path_factory.mktemp("mlm")
    arguments = run_arguments(corpus, folder / "run", *MLM)
    gate, saved = Gate(folder / "gate", "step-6"), checkpoint.checkpoint_path(folder / "run", 4)
    with Ranks(2, TRAIN, *arguments, log_dir=folder / "first", env=gate.env) as ranks:
        wait_for(lambda: gate.reached("step-6") and saved.exists(), ranks)
        ranks.processes[1].kill()
        gate.open("step-6")
        ranks.wait()
    run_ranks(2, TRAIN, *arguments, log_dir=folder / "second")
    assert [e["step"] for e in events(folder / "run") if e["event"] == "resumed"] == [4]
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlm-straight")
    run_ranks(2, TRAIN, *run_arguments(corpus, folder / "run", *MLM), log_dir=folder / "logs")
    return folder / "run"


def test_it_learns_and_is_evaluated_on_the_same_masks(undisturbed: Path) -> None:
    records = read_metrics(undisturbed)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert all(0.1 < record["predicted_tokens"] / 512 < 0.3 for record in records)
    assert records[-1]["heldout/perplexity"] > 1
    assert "heldout/bits_per_byte" not in records[-1]


def test_kill_9_then_resume_is_identical_to_the_bit(killed: Path, undisturbed: Path) -> None:
    """Losses, weights, moments, samples, and the masked tokens themselves."""
    assert_equals_undisturbed(killed, undisturbed)


def test_one_rank_sees_what_two_see(corpus: TinyCorpus, undisturbed: Path, tmp_path: Path) -> None:
    """As without masks: the first loss is the same but for the order of sums; masks are those of the same samples."""
    arguments = run_arguments(
        corpus, tmp_path / "run", *MLM, "micro_batch_sequences=8", "data.loader_workers=0"
    )
    run_ranks(1, TRAIN, *arguments, log_dir=tmp_path / "logs")
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(undisturbed)
    assert [r["predicted_tokens"] for r in ours] == [r["predicted_tokens"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    assert ours[-1]["heldout/loss"] == pytest.approx(theirs[-1]["heldout/loss"], rel=1e-4)
    assert ours[-1]["heldout/tokens"] == theirs[-1]["heldout/tokens"]
    assert losses(tmp_path / "run") and len(masked_tokens(tmp_path / "run")) == N_STEPS


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([], ["objective=causal (was mlm)"]),
        (["objective=mlm"], ["mlm.fraction=0.15 (was 0.2)"]),
        (["objective=mlm", "mlm.fraction=0.2", "mlm.mask_fraction=0.7"], ["mlm.mask_fraction=0.7 (was 0.8)"]),
    ],
)
def test_a_run_keeps_its_objective(
    corpus: TinyCorpus, undisturbed: Path, changed: list[str], words: list[str]
) -> None:
    found = checkpoint.find_latest(undisturbed).verified
    assert found is not None
    arguments = run_arguments(corpus, undisturbed, "engine.precision=fp32", "model.vocab_size=512", *changed)
    with pytest.raises(ConfigError) as raised:
        check_resumable(load_config(TrainConfig, arguments, "config"), found.state)
    assert all(word in str(raised.value) for word in words), raised.value
