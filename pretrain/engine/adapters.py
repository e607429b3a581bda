"""Puts frozen weights and adapters into a model that ZeRO may have partitioned."""

from __future__ import annotations

from functools import partial

import deepspeed
import torch

from pretrain.config import TrainConfig
from pretrain.distributed import World
from pretrain.engine.state import gathered
from pretrain.model.decoder import Decoder
from pretrain.model.lora import add_adapters, is_trained


@torch.no_grad()
def adapt(model: Decoder, base: dict[str, torch.Tensor], config: TrainConfig, world: World) -> None:
    """Load the weights of the base into the model, freeze them, and add adapters. All ranks call this together.

    `base` holds this rank's share of each flattened weight by key (`weight.<name>`), as `share` cuts it. Under ZeRO
    stage 3, one block at a time is whole. The adapters are made whole on every rank; `deepspeed.initialize` partitions
    them like the other parameters.
    """
    whole = partial(deepspeed.zero.GatheredParameters, enabled=config.engine.zero_stage == 3)
    for name, parameter in model.named_parameters():
        if is_trained(name, config.model):  # the head of a classifier keeps its initial weights
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        values = gathered(base[f"weight.{name}"], shape, world)
        with whole([parameter], modifier_rank=0):
            parameter.data.copy_(values)
    add_adapters(model, config.lora, config.seed, whole)
