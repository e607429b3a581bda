"""The recipes: their shapes against the published ones, the formulas they follow, their plans, and a few real steps."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from pretrain.arithmetic import count_parameters
from pretrain.config import ModelConfig
from pretrain.config.load import CONF_DIR
from pretrain.config.words.arguments import presets
from pretrain.plan.loss import OLMO_BATCH_TOKENS, OLMO_LR, ladder_parameters
from pretrain.plan.recipes import RECIPES, VOCABULARY, recipes_table
from support import ROOT
from support.launching import run_ranks
from support.recipes import shrunken, whole

LLAMA = {"norm_eps": 1e-5, "rope_theta": 1e4, "qk_norm": False, "tie_embeddings": False, "z_loss": 0.0}
OLMO = {"norm_eps": 1e-6, "rope_theta": 5e5, "qk_norm": True, "tie_embeddings": False, "z_loss": 1e-5}
TIED = LLAMA | {"tie_embeddings": True}
# Layers, width, heads, key and value heads, inner width, vocabulary, and the rest: as published (docs/recipes.md).
SHAPES = {
    "125m_one_gpu": (12, 768, 12, 12, 2048, VOCABULARY, LLAMA),
    "1b_one_node": (22, 2048, 32, 4, 5632, VOCABULARY, LLAMA),
    "7b_cluster": (32, 4096, 32, 32, 11008, VOCABULARY, LLAMA),
    "nanogpt/125m": (12, 768, 6, 6, 2048, 50304, LLAMA | {"qk_norm": True}),
    "olmo/190m": (12, 768, 12, 12, 3072, 100352, OLMO),
    "olmo/370m": (16, 1024, 16, 16, 4096, 100352, OLMO),
    "olmo/760m": (16, 1536, 16, 16, 6144, 100352, OLMO),
    "olmo/1.3b": (16, 2048, 16, 16, 8192, 100352, OLMO),
    "olmo2/1b": (16, 2048, 16, 16, 8192, 100352, OLMO),
    "smollm2/135m": (30, 576, 9, 3, 1536, 49152, TIED),
    "smollm2/360m": (32, 960, 15, 5, 2560, 49152, TIED),
    "smollm2/1.7b": (24, 2048, 32, 32, 8192, 49152, TIED),
    "tinyllama/1.1b": (22, 2048, 32, 4, 5632, 32000, LLAMA),
}
# Published parameter counts. OLMo's are without the token embedding, and with 4 norms of the width in each block
# instead of our 2 and 2 narrow ones.
PARAMETERS = {
    "smollm2/135m": 134_515_008,
    "smollm2/360m": 361_821_120,
    "smollm2/1.7b": 1_711_376_384,
    "tinyllama/1.1b": 1_100_048_384,
    "olmo2/1b": 1_484_916_736,
}
OLMO_SIZES = {
    "olmo/190m": 190_354_176,
    "olmo/370m": 371_262_464,
    "olmo/760m": 758_220_288,
    "olmo/1.3b": 1_279_395_840,
}


def test_every_experiment_that_is_a_recipe_is_planned() -> None:
    found = set(presets(CONF_DIR / "experiment")) - {"none", "quickstart", "continue", "ladder"}
    assert set(RECIPES) == found == set(SHAPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shape_is_the_published_one(name: str) -> None:
    model = whole(name).model
    *numbers, rest = SHAPES[name]
    assert [model.n_layers, model.d_model, model.n_heads, model.kv_heads, model.d_ff] == numbers[:5]
    assert model.vocab_size == numbers[5]
    assert {key: getattr(model, key) for key in rest} == rest
    assert model.d_model == model.n_heads * model.head_width
    said = {"n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "init_std", *rest}
    said.add("activation_checkpointing")
    usual = {f.name: getattr(ModelConfig(), f.name) for f in fields(ModelConfig) if f.name not in said}
    assert {key: getattr(model, key) for key in usual} == usual


@pytest.mark.parametrize(("name", "published"), PARAMETERS.items())
def test_the_number_of_parameters_is_the_published_one(name: str, published: int) -> None:
    """Exactly, but for the norms of OLMo 2."""
    model = whole(name).model
    norms = model.n_layers * (4 * model.d_model - 2 * model.d_model - 2 * model.head_width)
    assert count_parameters(model) + (norms if model.qk_norm else 0) == published


@pytest.mark.parametrize(("name", "published"), OLMO_SIZES.items())
def test_the_ladder_sizes_follow_the_formulas_of_olmo(name: str, published: int) -> None:
    config = whole(name)
    size = ladder_parameters(config.model)
    assert size == pytest.approx(published, rel=2e-4)
    batch_tokens = config.global_batch_sequences * config.data.sequence_length
    assert batch_tokens == 64 * 2048 * round(OLMO_BATCH_TOKENS.at(size) / 64 / 2048)
    assert config.optim.lr == pytest.approx(OLMO_LR.at(size), rel=5e-4)
    assert config.schedule.warmup_steps == round(size / batch_tokens)
    assert config.total_tokens == 20 * size


def test_the_formulas_are_those_that_olmo_writes() -> None:
    assert OLMO_BATCH_TOKENS.at(108e6) == pytest.approx(327_680)
    assert OLMO_BATCH_TOKENS.at(8 * 108e6) == pytest.approx(4 * 327_680)
    assert OLMO_LR.at(108e6) == pytest.approx(0.00235)
    assert OLMO_LR.at(8 * 108e6) == pytest.approx(0.00235 / 2)


def test_the_pages_table_is_what_the_planner_gives() -> None:
    """So every recipe fits its hardware, and no figure on the page is older than the code."""
    assert recipes_table() in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunken_form_keeps_the_ratios(name: str) -> None:
    full, small = whole(name).model, shrunken(name).model
    assert count_parameters(small) < 1e6
    assert small.n_heads / small.kv_heads == full.n_heads / full.kv_heads
    assert small.d_ff / small.d_model == pytest.approx(full.d_ff / full.d_model, abs=1 / small.d_model)
    assert (small.qk_norm, small.tie_embeddings, small.rope_theta, small.z_loss) == (
        full.qk_norm,
        full.tie_embeddings,
        full.rope_theta,
        full.z_loss,
    )


def test_every_recipe_trains_in_a_shrunken_form(tmp_path: Path) -> None:
    """Three steps under DeepSpeed with the recipe's own optimizer, rate and ZeRO stage."""
    out = tmp_path / "losses.json"
    run_ranks(1, "tests/support/workers/recipe_worker.py", str(out), *RECIPES, log_dir=tmp_path / "logs")
    losses = json.loads(out.read_text())
    assert set(losses) == set(RECIPES)
    for name, values in losses.items():
        assert len(values) == 3 and all(math.isfinite(value) for value in values), name
        assert values[-1] < values[0], name
