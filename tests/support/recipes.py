"""The recipes of conf/experiment/, and a form of each that is small enough to train in a test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from pretrain.config import TrainConfig
from pretrain.plan.recipes import recipe

N_LAYERS, HEAD_WIDTH, KV_HEADS, VOCABULARY = 2, 8, 2, 128


@cache
def whole(name: str) -> TrainConfig:
    """A recipe as it is, which nobody may change."""
    return recipe(name)


def shrunken(name: str) -> TrainConfig:
    """A recipe with 2 blocks, narrow heads and a small vocabulary, whose other ratios and settings are the recipe's."""
    config = whole(name)
    shape = config.model
    heads = KV_HEADS * shape.n_heads // shape.kv_heads
    width = heads * HEAD_WIDTH
    small = replace(
        shape,
        n_layers=N_LAYERS,
        d_model=width,
        n_heads=heads,
        n_kv_heads=KV_HEADS,
        d_ff=width * shape.d_ff // shape.d_model,
        vocab_size=VOCABULARY,
    )
    return replace(config, model=small)
