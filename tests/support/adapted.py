"""A decoder with adapters that are not merged, to compare the merged one with."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import LoraConfig, ModelConfig
from pretrain.model.decoder import Decoder, build_decoder
from pretrain.model.lora import add_adapters, plain_name


def adapted_decoder(
    model: ModelConfig, lora: LoraConfig, base: dict[str, Tensor], adapters: dict[str, Tensor]
) -> Decoder:
    """It is in fp32 on the CPU, in evaluation mode."""
    decoder = build_decoder(model, base, "cpu", torch.float32)
    add_adapters(decoder, lora, seed=0)
    parameters = {plain_name(name): p for name, p in decoder.named_parameters() if p.requires_grad}
    assert parameters.keys() == adapters.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(adapters[name])
    return decoder.eval().requires_grad_(False)
