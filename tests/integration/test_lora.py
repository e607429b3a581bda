"""A run of adapters on 2 ranks: its events, its checkpoints, its end under kill -9, and every command that reads it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.tensors import CheckpointError
from pretrain.config import TrainConfig, Weights, load_config
from pretrain.distributed import World
from pretrain.errors import ConfigError, RunError
from pretrain.train.base import check_same_model, source_of
from pretrain.trained import load_trained
from support.adapted import adapted_decoder
from support.checkpoints import assert_same_state, read_tensors
from support.launching import Ranks, run_ranks
from support.tiny import TinyCorpus, events, run_arguments
from support.trained_run import script
from support.training import TRAIN, losses, steps_done, wait_for

pytestmark = pytest.mark.integration
N_STEPS, N_ADAPTERS = 8, 14
ALONE = World(0, 1, 0, torch.device("cpu"))
RANK_4 = [
    "lora.r=4",
    "lora.dropout=0.1",
    "optim.lr=1e-2",
    "ema.decay=0.5",
    "evaluation.every_steps=4",  # the second finds no such gain, and ends the run at step 8 of 12
    "evaluation.patience=1",
    "evaluation.min_gain=9",
    "evaluation.max_sequences=4",
]


def arguments(corpus: TinyCorpus, run_dir: Path, base: Path, *more: str) -> list[str]:
    return run_arguments(corpus, run_dir, f"init_from={base}", *RANK_4, *more)


@pytest.fixture(scope="module")
def adapted(corpus: TinyCorpus, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of adapters on 2 ranks, on the weights of `straight`."""
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    run_ranks(2, TRAIN, *arguments(corpus, run_dir, straight), log_dir=run_dir.parent / "logs")
    return run_dir


@pytest.fixture
def copied(adapted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "copied"))


def test_events_say_what_is_trained(adapted: Path) -> None:
    (started,) = (event for event in events(adapted) if event["event"] == "started")
    state = checkpoint.read_state(checkpoint.checkpoint_path(adapted, N_STEPS))
    n_trained = sum(torch.Size(shape).numel() for shape in state["tensors"].values())
    assert (started["adapters"], started["trained_parameters"]) == (N_ADAPTERS, n_trained)
    base = checkpoint.find_base(adapted).state["tensors"]
    assert started["parameters"] == n_trained + sum(torch.Size(shape).numel() for shape in base.values())
    assert started["base"] == state["base"]
    (checked,) = (event for event in events(adapted) if event["event"] == "adapters_checked")
    assert (checked["step"], checked["adapters"]) == (N_STEPS, N_ADAPTERS)
    assert checked["norm"] > 0.1


def test_it_stops_early_and_keeps_an_average(adapted: Path) -> None:
    (finished,) = (event for event in events(adapted) if event["event"] == "finished")
    assert finished["step"] == N_STEPS
    assert "heldout/loss" in finished["reason"] and "step 4" in finished["reason"]
    told = [event["losses"] for event in events(adapted) if event["event"] == "evaluated"]
    assert [set(losses) for losses in told] == [{"loss", "ema/loss"}] * 2
    assert all(losses["loss"] != losses["ema/loss"] for losses in told)


def test_checkpoints_hold_adapters_and_the_base_is_the_other_run(adapted: Path, straight: Path) -> None:
    saved = read_tensors(checkpoint.checkpoint_path(adapted, N_STEPS))
    assert all(".lora_" in key for key in saved)
    assert len(saved) == 4 * 2 * N_ADAPTERS  # weight, two moments and an average of two factors
    ours, theirs = (
        read_tensors(checkpoint.checkpoint_path(root, 12)) for root in (adapted / "base", straight)
    )
    assert ours.keys() == {key for key in theirs if key.startswith("weight.")}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_is_bit_identical(corpus: TinyCorpus, copied: Path, adapted: Path, straight: Path) -> None:
    """As after a crash between two checkpoints. The other run is gone by then: the copy of its weights is enough."""
    checkpoint.remove(checkpoint.checkpoint_path(copied, N_STEPS))
    words = arguments(corpus, copied, straight.parent / "gone")
    run_ranks(2, TRAIN, *words, log_dir=copied.parent / "logs")
    assert losses(copied) == losses(adapted)
    assert_same_state(*(checkpoint.checkpoint_path(run, N_STEPS) for run in (copied, adapted)))


@pytest.mark.long
def test_kill_9_changes_no_bit(corpus: TinyCorpus, adapted: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = arguments(corpus, run_dir, straight)
    with Ranks(2, TRAIN, *words, log_dir=tmp_path / "first") as ranks:
        wait_for(lambda: steps_done(run_dir) >= 5 and (run_dir / "checkpoints/step-00000004").is_dir(), ranks)
        for process in ranks.processes:
            process.send_signal(signal.SIGKILL)
    run_ranks(2, TRAIN, *words, log_dir=tmp_path / "second")
    assert losses(run_dir) == losses(adapted)
    assert_same_state(*(checkpoint.checkpoint_path(run, N_STEPS) for run in (run_dir, adapted)))


@pytest.mark.long
def test_one_rank_goes_on_with_the_state_of_two(
    corpus: TinyCorpus, copied: Path, adapted: Path, straight: Path
) -> None:
    """The state is the same to the bit and so is the order of samples; dropout is drawn by rank, so losses differ."""
    checkpoint.remove(checkpoint.checkpoint_path(copied, N_STEPS))
    run_ranks(1, TRAIN, *arguments(corpus, copied, straight), log_dir=copied.parent / "logs")
    ours, theirs = ([float.fromhex(loss) for loss in losses(run)] for run in (copied, adapted))
    assert ours[:4] == theirs[:4]
    assert ours[4:] == pytest.approx(theirs[4:], abs=0.1)


@pytest.mark.long
def test_ranks_may_share_sequences_or_hold_parameters_twice(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Sequence parallelism adds in another order; a second copy of the parameters changes no bit."""
    shape = ["model.n_kv_heads=2", "engine.precision=fp32"]
    base = tmp_path / "base"
    words = run_arguments(corpus, base, "total_steps=2", "schedule.warmup_steps=1", *shape)
    run_ranks(1, TRAIN, *words, log_dir=tmp_path / "logs-base")
    for name, option in (
        ("plain", "engine.hpz_partition_ranks=1"),
        ("twice", "engine.hpz_partition_ranks=2"),
        ("shared", "engine.sequence_parallel_ranks=2"),
    ):
        words = arguments(corpus, tmp_path / name, base, "lora.dropout=0", *shape, option)
        run_ranks(2, TRAIN, *words, log_dir=tmp_path / f"logs-{name}")
    assert losses(tmp_path / "twice") == losses(tmp_path / "plain")
    plain, shared = ([float.fromhex(x) for x in losses(tmp_path / name)] for name in ("plain", "shared"))
    assert shared == pytest.approx(plain, abs=5e-6)


# --- what cannot go on ---


def test_weights_of_another_run_are_refused(copied: Path, straight: Path) -> None:
    """A base that is whole and intact, but not the one that the adapters were trained on."""
    base = copied / "base" / "checkpoints"
    shutil.rmtree(base / "step-00000012")
    shutil.copytree(straight / "checkpoints" / "step-00000008", base / "step-00000008")
    with pytest.raises(CheckpointError, match="holds other weights than those that the adapters"):
        load_trained(copied)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="no intact weights"):
        load_trained(copied)


def test_a_damaged_base_is_refused(copied: Path) -> None:
    (shard, *_) = sorted((copied / "base" / "checkpoints" / "step-00000012").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="hash mismatch"):
        load_trained(copied)


def test_adapters_are_no_base(adapted: Path) -> None:
    tokenizer = checkpoint.find_latest(adapted).verified.state["tokenizer_sha256"]
    with pytest.raises(ConfigError, match=r"init_from=.* holds adapters"):
        source_of(str(adapted), ALONE, tokenizer)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("model.rope_theta=500", ("model.rope_theta=500", "trained with 10000")),
        ("objective=mlm", ("objective=mlm", "trained with causal")),
    ],
)
def test_another_model_is_refused(
    corpus: TinyCorpus, straight: Path, tmp_path: Path, word: str, parts: tuple[str, ...]
) -> None:
    """Positions and what may be seen do not show in the shapes of weights."""
    source = checkpoint.find_latest(straight).verified
    assert source is not None
    rows, _ = source.state["tensors"]["embed.weight"]
    words = arguments(corpus, tmp_path / "run", straight, f"model.vocab_size={rows}")
    check_same_model(load_config(TrainConfig, words, "config"), source)
    with pytest.raises(ConfigError) as caught:
        check_same_model(load_config(TrainConfig, [*words, word], "config"), source)
    assert [part for part in parts if part not in str(caught.value)] == []


# --- what reads it ---


def test_a_run_of_adapters_is_merged_for_use(adapted: Path) -> None:
    trained = load_trained(adapted)
    assert trained.config.lora.r == 0
    assert trained.adapters is not None
    base = checkpoint.load_base_weights(adapted, trained.adapters.base)
    assert trained.weights.keys() == base.keys()
    tokens = torch.arange(20)[None]
    apart = adapted_decoder(trained.config.model, trained.adapters.config, base, trained.adapters.weights)
    expected, found = apart.logits(tokens), trained.decoder("cpu", torch.float32).logits(tokens)
    assert float((expected - found).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    alone = load_trained(adapted / "base").decoder("cpu", torch.float32).logits(tokens)
    assert float((alone - found).abs().max()) > 1e-3


def test_the_average_of_the_adapters_is_merged_too(adapted: Path) -> None:
    trained, averaged = load_trained(adapted), load_trained(adapted, weights=Weights.ema)
    assert averaged.adapters is not None
    saved = read_tensors(checkpoint.checkpoint_path(adapted, N_STEPS))
    base = checkpoint.load_base_weights(adapted, averaged.adapters.base)
    name = "blocks.1.feed_forward.up"
    a, b = (saved[f"ema.{name}.lora_{part}.weight"] for part in "AB")
    expected = base[f"{name}.weight"] + 16 / 4 * b.view(-1, 4) @ a.view(4, -1)
    torch.testing.assert_close(averaged.weights[f"{name}.weight"], expected)
    assert float((averaged.weights[f"{name}.weight"] - trained.weights[f"{name}.weight"]).abs().max()) > 1e-4


def test_checkpoints_of_adapters_are_averaged_as_whole_models(adapted: Path, tmp_path: Path) -> None:
    words = (f"run_dir={adapted}", f"output={tmp_path / 'mean'}", "last=2", "max_tokens=0")
    run_command("average", "AverageConfig", *words)
    mean, parts = load_trained(tmp_path / "mean"), [load_trained(adapted, step) for step in (4, N_STEPS)]
    assert (mean.adapters, mean.config.lora.r, mean.step) == (None, 0, N_STEPS)
    for name, weight in mean.weights.items():
        expected = torch.stack([part.weights[name].double() for part in parts]).mean(0).float()
        assert torch.equal(weight, expected), name


def whole_model(adapted: Path, folder: Path) -> Path:
    """What docs/finetuning.md says of beginning another run with it: the export in fp32, imported."""
    run_command("export", "ExportConfig", f"run_dir={adapted}", f"output={folder / 'merged'}", "dtype=fp32")
    words = (f"input={folder / 'merged'}", f"output={folder / 'imported'}")
    run_command("import_model", "ImportConfig", *words)
    return folder / "imported"


def test_its_export_is_imported_as_what_a_run_begins_with(
    adapted: Path, corpus: TinyCorpus, tmp_path: Path
) -> None:
    imported = whole_model(adapted, tmp_path)
    merged = load_trained(adapted)
    source = source_of(str(imported), ALONE, merged.tokenizer.sha256)
    shape = [f"model.vocab_size={merged.config.model.vocab_size}"]
    check_same_model(
        load_config(TrainConfig, arguments(corpus, tmp_path, imported, *shape), "config"), source
    )
    found = load_trained(imported).weights
    assert found.keys() == merged.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in merged.weights.items())


@pytest.mark.long
@pytest.mark.parametrize("more", [["lora.r=2", "optim.lr=1e-2"], []], ids=["adapters", "all weights"])
def test_a_run_begins_with_it(adapted: Path, corpus: TinyCorpus, tmp_path: Path, more: list[str]) -> None:
    """Its loss begins below that of the base of the adapters, since they have learned from the same text."""
    imported = whole_model(adapted, tmp_path)
    for name, source in (("merged", imported), ("base", adapted / "base")):
        words = run_arguments(corpus, tmp_path / name, f"init_from={source}", "total_steps=3", *more)
        run_ranks(1, TRAIN, *words, log_dir=tmp_path / f"logs-{name}")
    merged, base = (float.fromhex(losses(tmp_path / name)[0]) for name in ("merged", "base"))
    assert merged < base - 0.005


def run_command(name: str, schema: str, *words: str) -> None:
    module = script(name)
    module.main(load_config(getattr(module, schema), list(words)))


def test_eval_and_generate_read_it(adapted: Path, corpus: TinyCorpus, capsys: pytest.CaptureFixture) -> None:
    run_command("eval", "EvalConfig", f"run_dir={adapted}", f"input=[{corpus.heldout}]", "json=true")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["step"], result["documents"]) == (N_STEPS, 2)
    assert 3 < result["loss"] < 6
    run_command(
        "generate", "GenerateConfig", f"run_dir={adapted}", "prompt=[def]", "max_new_tokens=4", "json=true"
    )
    (sample,) = json.loads(capsys.readouterr().out.splitlines()[-1])["samples"]
    assert len(sample["tokens"]) <= 4


def test_exports_load_in_stock_peft_and_transformers(adapted: Path, tmp_path: Path) -> None:
    """Adapters on the exported base, and the merged export: the same logits, up to rounding in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for run, name, more in (
        (adapted, "merged", ["dtype=fp32"]),
        (adapted / "base", "base", ["dtype=fp32"]),
        (adapted, "adapters", ["adapters=true"]),
    ):
        run_command("export", "ExportConfig", f"run_dir={run}", f"output={tmp_path / name}", *more)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        alone = base(tokens).logits
        adapted_logits = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()(tokens).logits
        merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        merged_logits = merged_model(tokens).logits
    largest = max(1.0, float(merged_logits.abs().max()))
    assert float((adapted_logits - merged_logits).abs().max()) < 1e-5 * largest
    assert float((alone - merged_logits).abs().max()) > 1e-3


def test_an_export_of_other_adapters_is_not_published(
    adapted: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    real = peft.set_peft_model_state_dict

    def forget(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        real(model, {name: torch.zeros_like(weight) for name, weight in weights.items()})

    monkeypatch.setattr(peft, "set_peft_model_state_dict", forget)
    words = [f"output={tmp_path / 'out'}", "adapters=true"]
    with pytest.raises(RunError, match="does not hold what was trained"):
        run_command("export", "ExportConfig", f"run_dir={adapted}", *words)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"adapters=true, but run_dir=.* has trained all weights"):
        run_command("export", "ExportConfig", f"run_dir={straight}", *words)
