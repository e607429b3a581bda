"""A decoder whose weights are read when they are used, so that a model may be larger than memory.

    decoder = streamed_decoder(config, weights)  # no weight is in memory
    decoder.logits(tokens)  # one weight at a time is

It computes the same as `build_decoder` in fp32 on the CPU. Every forward pass reads all weights again, so it is for a
few large batches, as in a check of an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.decoder import Decoder


class LazyWeights(Mapping[str, Tensor]):
    """Weights by name that `read` makes from a name, whenever one is asked for."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def streamed_decoder(config: ModelConfig, weights: Mapping[str, Tensor], causal: bool = True) -> Decoder:
    """A decoder in evaluation mode that takes each weight from `weights` when it needs it, in fp32 on the CPU.

    The keys are the names in `Decoder.named_parameters()`.
    """
    with torch.device("meta"):
        model = Decoder(config, seed=0, causal=causal)
    stream_weights(model, weights)
    return model


def stream_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let each module of a model without weights take them from `weights` while it runs, in fp32."""
    model.eval().requires_grad_(False)
    names: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        empty = dict(module.named_parameters(recurse=False))
        if empty:
            module.register_forward_pre_hook(
                _filler(weights, {key: names[id(p)] for key, p in empty.items()})
            )
            module.register_forward_hook(_emptier(empty))


def _filler(weights: Mapping[str, Tensor], own: dict[str, str]) -> Callable[..., None]:
    def fill(module: nn.Module, inputs: Any) -> None:
        for key, name in own.items():
            setattr(module, key, nn.Parameter(weights[name].float(), requires_grad=False))

    return fill


def _emptier(empty: dict[str, nn.Parameter]) -> Callable[..., None]:
    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        for key, parameter in empty.items():
            setattr(module, key, parameter)

    return drop
