"""Configuration: composition, validation, and the sentences that a user reads."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.arithmetic import count_parameters
from pretrain.config import Precision, TrainConfig, load_config, to_dict, validate
from pretrain.config.load import CONF_DIR
from pretrain.config.words.arguments import presets
from pretrain.errors import ConfigError

BASE = ["run_dir=/tmp/run", "data.manifest=/tmp/corpus/manifest.json", "total_steps=100"]
ROOT = CONF_DIR.parent


def compose(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, [*BASE, *overrides], "config")


def test_defaults_compose() -> None:
    config = compose()
    assert config.engine.zero_stage == 3
    assert config.engine.precision is Precision.auto
    assert config.n_steps == 100


@pytest.mark.parametrize(
    ("group", "option"),
    sorted(
        (p.parent.name, p.stem)
        for p in CONF_DIR.glob("*/*.yaml")
        if p.parent.name not in ("experiment", "cluster")
    ),
)
def test_every_group_option_composes(group: str, option: str) -> None:
    extra = ["data.sources=[{name: a, manifest: b}]", "data.manifest=null"] if option == "mixture" else []
    extra += ["engine.nvme_path=/nvme"] if option == "zero3_nvme" else []
    config = compose(f"{group}={option}", *extra)
    assert config.data.corpora()


@pytest.mark.parametrize("name", presets(CONF_DIR / "experiment"))
def test_every_experiment_composes(name: str) -> None:
    overrides = BASE if name in ("none", "continue") else BASE[:2]
    config = load_config(TrainConfig, [*overrides, f"experiment={name}"], "config")
    assert config.n_steps > 0
    assert validate(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lrr=3"], ["optim.lrr", "did you mean lr?"]),
        (["modle=1b"], ["modle"]),
        (["model=2b"], ["model=2b", "conf/model", "tiny, 125m, 350m, 1b, 3b, 7b, 13b, 70b"]),
        (["model=1"], ["model=1", "conf/model", "tiny"]),
        (["experiment=[none]"], ["experiment=[none]", "conf/experiment", "quickstart"]),
        (
            ["experiment=olmo/2b"],
            ["experiment=olmo/2b", "olmo/190m, olmo/370m, olmo/760m, olmo/1.3b, olmo2/1b"],
        ),
        (["experiment=olmo"], ["experiment=olmo does not name", "olmo/190m"]),
        (["optim=null"], ["optim=null", "adamw, muon"]),
        (["optim.lr=fast"], ["optim.lr=fast", "number"]),
        (["+optim.warmth=1"], ["optim.warmth", "weight_decay"]),
        (["schedule.name=cosin"], ["schedule.name", "cosin", "cosine"]),
        (["total_steps=1.5"], ["total_steps=1.5", "whole number"]),
        (["total_tokens=5"], ["total_steps=100", "total_tokens=5", "exactly one"]),
        (["total_epochs=2"], ["total_steps=100", "total_epochs=2", "exactly one"]),
        (["total_steps=null", "total_epochs=0"], ["total_epochs=0", "greater than 0"]),
        (
            [
                "total_steps=null",
                "total_epochs=2",
                "data.manifest=null",
                "data.sources=[{name: a, manifest: x, weight: 3}]",
            ],
            ["weight=3.0", "'a'", "total_epochs=2"],
        ),
        (
            [
                "total_steps=null",
                "total_epochs=2",
                "data.manifest=null",
                "data.sources=[{name: a, manifest: x, max_epochs: 3}]",
            ],
            ["max_epochs=3", "'a'", "total_epochs=2"],
        ),
        (
            ["total_steps=null", "total_epochs=2", "data.stages=[{start_tokens: 9, weights: {corpus: 1}}]"],
            ["data.stages", "'corpus': 1.0", "total_epochs=2"],
        ),
        (["total_steps=null"], ["total_steps=None", "exactly one"]),
        (["model.n_heads=3"], ["model.d_model=256", "model.n_heads=3"]),
        (["model.n_kv_heads=3"], ["model.n_kv_heads=3", "model.n_heads=4"]),
        (["model.dropout=1.0"], ["model.dropout=1.0"]),
        (
            ["engine=zero0", "engine.precision=bf16"],
            ["engine.precision=bf16", "engine.zero_stage=0", "zero1"],
        ),
        (["optim=muon", "engine.precision=fp16"], ["optim.name=muon", "engine.precision=fp16", "adamw"]),
        (["engine=zero1", "engine.offload_params=true"], ["engine.offload_params", "engine.zero_stage=3"]),
        (["engine.zero_stage=4"], ["engine.zero_stage=4", "0, 1, 2, 3"]),
        (["global_batch_sequences=10"], ["global_batch_sequences=10", "micro_batch_sequences=4"]),
        (["optim.lr=0"], ["optim.lr=0", "greater than 0"]),
        (["schedule.warmup_steps=100"], ["schedule.warmup_steps=100", "100 steps"]),
        (["schedule.warmup_frac=1"], ["schedule.warmup_frac=1.0", "smaller"]),
        (["schedule.warmup_frac=2"], ["schedule.warmup_frac=2.0", "0 to 1"]),
        (["schedule.moment_warmup_steps=100"], ["schedule.moment_warmup_steps=100", "100 steps"]),
        (["schedule.moment_warmup_steps=-1"], ["schedule.moment_warmup_steps=-1", "0 or more"]),
        (["model.qk_norm=true", "model.attention_bias=true"], ["model.attention_bias", "model.qk_norm"]),
        (["model.rope_scaling.factor=2"], ["model.rope_scaling.factor=2.0", "rope_type=default"]),
        (["model.rope_scaling.rope_type=llama3"], ["rope_type=llama3", "original_max_position_embeddings"]),
        (["model.rope_scaling.rope_type=dynamic"], ["model.rope_scaling.rope_type=dynamic", "yarn"]),
        (["model.rope_scaling.factor=0.5"], ["model.rope_scaling.factor=0.5"]),
        (["model.rope_scaling.beta_fast=1"], ["model.rope_scaling.beta_fast=1.0", "beta_slow=1.0"]),
        (
            ["schedule.warmup_frac=0.1", "schedule.warmup_steps=2"],
            ["schedule.warmup_frac=0.1", "schedule.warmup_steps=2"],
        ),
        (["data.manifest=null"], ["data.manifest", "manifest.json"]),
        (["data.stages=[{start_tokens: 5, weights: {web: 1}}]"], ["unknown sources ['web']", "corpus"]),
        (["run_dir=???"], ["run_dir is missing"]),
        (["data.sources=[{name: a, manifst: b}]", "data.manifest=null"], ["manifst", "manifest"]),
        (["optim.lr"], ["optim.lr=VALUE"]),
        (["model.activation_checkpointing=true"], ["model.activation_checkpointing", "selective"]),
        (["kernels=fp8", "engine.precision=fp32"], ["kernels.fp8=true", "bf16, not fp32"]),
        (["kernels=fp8", "model.d_ff=712"], ["model.d_ff is 712", "16"]),
        (["kernels=fp8", "model.d_head=20"], ["head width is 40", "16"]),
        (["kernels=fp8", "data.sequence_length=1000"], ["sequence length is 1000", "16"]),
        (["kernels=liger", "kernels.compile=auto"], ["kernels.compile=never", "auto"]),
        (["kernels=liger", "model.z_loss=1e-4"], ["model.z_loss=0.0001", "kernels.liger=false"]),
    ],
)
def test_mistakes_are_named_in_one_sentence(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(*overrides)
    text = str(raised.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert "https" not in text
    assert "full_key" not in text


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("tiny", 8192, 10),
        ("125m", 50304, 162),  # untied: the published 125M share one embedding
        ("350m", 50304, 405),
        ("1b", 32000, 1100),  # TinyLlama: 1.1B
        ("3b", 128256, 3210),  # Llama 3.2 3B: 3.21B
        ("7b", 32000, 6740),  # Llama 2 7B: 6.74B
        ("13b", 32000, 13020),  # Llama 2 13B: 13.0B
        ("70b", 32000, 68980),  # Llama 2 70B: 69.0B
    ],
)
def test_model_sizes_are_what_they_are_called(name: str, vocab_size: int, millions: int) -> None:
    model = compose(f"model={name}", f"model.vocab_size={vocab_size}").model
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.06 if name == "tiny" else 0.01)


def test_batch_divides_over_ranks() -> None:
    config = compose("global_batch_sequences=32", "micro_batch_sequences=4")
    assert config.grad_accum_steps(2) == 4
    with pytest.raises(ConfigError, match="3 ranks = 12"):
        config.grad_accum_steps(3)


def test_total_tokens_rounds_up_to_whole_steps() -> None:
    config = compose("total_steps=null", "total_tokens=32769", "data.sequence_length=1024")
    assert (config.stages[0].batch_sequences * config.stages[0].sequence_length, config.n_steps) == (32768, 2)


def run_train(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/train.py", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_wrong_key_exits_2_without_starting_torch(tmp_path: Path) -> None:
    started = time.monotonic()
    result = run_train(f"run_dir={tmp_path}/run", "data.manifest=m", "total_steps=1", "optim.lrr=1")
    assert result.returncode == 2
    assert result.stderr == "error: optim.lrr is not a key of the configuration; did you mean lr?\n"
    assert time.monotonic() - started < 5  # the contract: 5 seconds; takes about 0.5
    assert not (tmp_path / "run").exists()


def test_missing_corpus_exits_2(tmp_path: Path) -> None:
    result = run_train(
        f"run_dir={tmp_path}/run", f"data.manifest={tmp_path}/none/manifest.json", "total_steps=1"
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{tmp_path}/none/manifest.json" in result.stderr
    assert not (tmp_path / "run").exists()


def test_cfg_job_prints_the_composed_config() -> None:
    result = run_train(*BASE, "model=7b", "optim.lr=1e-4", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "d_model: 4096" in result.stdout
    assert "lr: 0.0001" in result.stdout


def test_importing_config_imports_no_torch() -> None:
    code = "import sys, pretrain.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
