"""Classifiers by fine-tuning: whole runs, their resume, adapters, and the commands that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder
from pretrain.reliability.journal import read_metrics
from pretrain.train.base import new_weights
from pretrain.trained import load_trained
from support.checkpoints import read_tensors
from support.gate import Gate
from support.labeled import CLASSES, labeled_records, make_base
from support.launching import Ranks, run_ranks
from support.preparing import write_jsonl
from support.tiny import TinyCorpus, events, run_arguments
from support.trained_run import script
from support.training import N_STEPS, TRAIN, assert_equals_undisturbed, wait_for

pytestmark = pytest.mark.integration
SHAPE = [
    "model.d_model=32",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.d_ff=48",
    "model.tie_embeddings=true",
]
CLASSIFY = [
    "objective=classify",
    "engine.precision=fp32",
    "optim.lr=2e-2",
    "evaluation.max_sequences=99",
    *SHAPE,
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a language model, and labeled texts for it."""
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


def arguments(base: Path, run_dir: Path, *more: str) -> list[str]:
    return run_arguments(TinyCorpus(base / "corpus"), run_dir, f"init_from={base / 'run'}", *CLASSIFY, *more)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp("tuned")
    more = ["micro_batch_sequences=8", "data.loader_workers=0"]
    run_ranks(1, TRAIN, *arguments(base, folder / "run", *more), log_dir=folder / "logs")
    return folder / "run"


def test_it_begins_with_the_other_weights_and_learns(base: Path, tuned: Path) -> None:
    records = read_metrics(tuned)
    assert records[0]["loss"] == pytest.approx(1.1, abs=0.2)  # ln 3: the new head knows nothing
    assert records[-1]["loss"] < 0.5
    assert records[-1]["heldout/accuracy"] > 0.8
    assert records[-1]["heldout/documents"] == records[-1]["heldout/tokens"]
    assert "heldout/bits_per_byte" not in records[-1]
    ours = read_tensors(checkpoint.checkpoint_path(tuned, 4))
    theirs = read_tensors(checkpoint.checkpoint_path(base / "run", 3))
    assert ours["weight.head.weight"].numel() == 3 * 32
    moved = (ours["weight.embed.weight"] - theirs["weight.embed.weight"]).norm()
    assert 0 < moved < 0.5 * theirs["weight.embed.weight"].norm()


def test_eval_gives_the_scores_of_the_loop_and_names_what_it_does_not_know(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = script("eval")
    heldout = base / "corpus" / "heldout"
    evaluate.main(evaluate.EvalConfig(run_dir=str(tuned), input=[str(heldout)], json=True))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = read_metrics(tuned)[-1]
    assert found["documents"] == last["heldout/documents"]
    assert found["accuracy"] == pytest.approx(last["heldout/accuracy"])
    assert found["macro_f1"] == pytest.approx(last["heldout/macro_f1"])
    assert found["log_loss"] == pytest.approx(last["heldout/loss"], rel=1e-3)
    assert list(found["classes"]) == CLASSES
    texts = write_jsonl(tmp_path / "all.jsonl", labeled_records())
    evaluate.main(evaluate.EvalConfig(run_dir=str(tuned), input=[str(texts)], json=True))
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert (found["documents"], found["cut_documents"]) == (240, 30)
    assert "taken for so-so" in printed and "calibration error" in printed
    for record, word in (
        ({"label": "meh"}, "'meh', which is none of the classes bad, good, so-so"),
        ({}, "no label"),
    ):
        wrong = write_jsonl(
            tmp_path / "wrong.jsonl", [*labeled_records(3), {"text": "Another one.", **record}]
        )
        with pytest.raises(ConfigError) as raised:
            evaluate.main(evaluate.EvalConfig(run_dir=str(tuned), input=[str(wrong)]))
        assert all(part in str(raised.value) for part in ("wrong.jsonl:4", word)), raised.value
    for options, word in (
        ({"max_tokens": 9}, "max_tokens=9"),
        ({"sequence_length": 32}, "sequence_length=32"),
    ):
        with pytest.raises(ConfigError, match=word):
            evaluate.main(evaluate.EvalConfig(run_dir=str(tuned), input=[str(texts)], **options))


def test_no_command_writes_text_with_it(base: Path, tuned: Path) -> None:
    generate = script("generate")
    with pytest.raises(ConfigError, match="objective=classify"):
        generate.main(generate.GenerateConfig(run_dir=str(tuned), prompt=["It was"]))
    evaluate = script("eval")
    with pytest.raises(ConfigError, match=r"labeled documents.*not trained with objective=classify"):
        evaluate.main(
            evaluate.EvalConfig(run_dir=str(base / "run"), input=[str(base / "corpus" / "heldout")])
        )


def test_only_the_head_of_a_new_classifier_is_new(base: Path, tuned: Path) -> None:
    config = load_trained(tuned).config
    language_model, classifier = (checkpoint.find_latest(path).verified for path in (base / "run", tuned))
    assert language_model is not None and classifier is not None
    assert new_weights(language_model, config) == ["head.weight"]
    assert new_weights(classifier, config) == []
    config.model.classes = ["yes", "no"]
    assert new_weights(classifier, config) == ["head.weight"]
    config.model.classes = []
    with pytest.raises(ConfigError, match=r"init_from=.*objective=classify"):
        new_weights(classifier, config)
    assert new_weights(language_model, config) == []


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [[], ["model.pooling=mean", "ema.decay=0.9", "engine.zero_stage=3"]], ids=str
)
def test_kill_9_then_resume_is_identical_to_the_bit(
    base: Path, tuned: Path, tmp_path: Path, more: list[str]
) -> None:
    """On 2 ranks; the first losses are those of one rank but for the order of sums."""
    wanted = arguments(base, tmp_path / "run", *more)
    gate, saved = Gate(tmp_path / "gate", "step-6"), checkpoint.checkpoint_path(tmp_path / "run", 4)
    with Ranks(2, TRAIN, *wanted, log_dir=tmp_path / "first", env=gate.env) as ranks:
        wait_for(lambda: gate.reached("step-6") and saved.exists(), ranks)
        ranks.processes[1].kill()
        gate.open("step-6")
        ranks.wait()
    run_ranks(2, TRAIN, *wanted, log_dir=tmp_path / "second")
    assert [e["step"] for e in events(tmp_path / "run") if e["event"] == "resumed"] == [4]
    straight = arguments(base, tmp_path / "straight", *more)
    run_ranks(2, TRAIN, *straight, log_dir=tmp_path / "third")
    assert_equals_undisturbed(tmp_path / "run", tmp_path / "straight")
    if not more:
        ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tuned)
        assert [r["predicted_tokens"] for r in ours] == [r["predicted_tokens"] for r in theirs]
        assert [r["loss"] for r in ours[:6]] == pytest.approx([r["loss"] for r in theirs[:6]], rel=1e-3)


@pytest.mark.long
def test_adapters_train_the_head_beside_them(base: Path, tmp_path: Path) -> None:
    """On 2 ranks under ZeRO stage 3; the merged model and peft, with the folder of adapters, compute the same."""
    from pretrain.convert.adapters import export_adapters

    more = ["lora.r=4", "engine.zero_stage=3", "optim.lr=5e-2"]
    run_ranks(2, TRAIN, *arguments(base, tmp_path / "run", *more), log_dir=tmp_path / "logs")
    saved = read_tensors(checkpoint.checkpoint_path(tmp_path / "run", N_STEPS))
    weights = {key for key in saved if key.startswith("weight.")}
    assert {key for key in weights if ".lora_" not in key} == {"weight.head.weight"}
    frozen = checkpoint.find_base(tmp_path / "run").state["tensors"]
    assert "head.weight" not in frozen and "embed.weight" in frozen
    trained = load_trained(tmp_path / "run")
    assert torch.equal(trained.weights["head.weight"], saved["weight.head.weight"].view(3, 32))
    initial = Decoder(trained.config.model, trained.config.seed).head.weight.detach()
    assert (trained.weights["head.weight"] - initial).norm() > 0.5 * initial.norm()
    exported = export_adapters(trained, str(tmp_path / "run"), tmp_path / "out")
    assert (exported.adapters, exported.parity.holds) == (14, True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
