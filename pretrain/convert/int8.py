"""Writes a Hugging Face folder whose matrices are int8, in torchao's form, which `transformers` loads without a pickle.

Each row of a matrix of a block has one scale: its largest magnitude / 127. Embedding, output head and norms keep the
precision of the run, as in what `transformers` itself quantizes and saves. The weights are quantized one at a time, by
the package `torchao`, which is optional and so imported where it is used.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.convert.hugging_face import (
    MAX_SHARD_BYTES,
    WEIGHTS_NAME,
    hugging_face_names,
    parameter_shapes,
    require,
    stored_tensors,
    write_config,
    write_index,
)
from pretrain.model.streamed import LazyWeights
from pretrain.trained import TrainedModel


def require_torchao() -> None:
    """Raise ConfigError where the package is not installed."""
    for name in ("torchao", "torch.utils._pytree"):  # they warn of GPU code that is not used here
        logging.getLogger(name).setLevel(logging.ERROR)
    require("torchao", "export")


def write_int8(
    trained: TrainedModel,
    folder: Path,
    rest: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write config.json, generation_config.json and the weights. `rest` is the type of what is not int8."""
    require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-untyped]
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(Int8WeightOnlyConfig(version=2)).to_dict()
    write_config(trained, folder, rest, quantization_config=quantization)
    files: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    # transformers merges the metadata of all files, so each one names the weights of all.
    every = {
        "format": "pt",
        "tensor_names": json.dumps(list(hugging_face_names(trained.config.model).values())),
    }
    for tensors, metadata in _shards(_converted(trained, rest), max_shard_bytes):
        file = folder / f".{len(files)}.safetensors"
        save_file(tensors, file, metadata | every)
        files.append((file, list(tensors)))
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        total_bytes += n_bytes
        progress(n_bytes)
    if len(files) == 1:
        files[0][0].rename(folder / WEIGHTS_NAME)
        return
    file_of: dict[str, str] = {}
    for number, (file, names) in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.rename(folder / name)
        file_of |= dict.fromkeys(names, name)
    write_index(folder, file_of, total_bytes)


def int8_bytes(trained: TrainedModel, rest: torch.dtype) -> int:
    """Size in bytes of the weights that `write_int8` writes."""
    model = trained.config.model
    # A row has a scale, and a zero point, which is always 0.
    return sum(
        shape.numel() + (rest.itemsize + 1) * shape[0] if is_int8(name) else shape.numel() * rest.itemsize
        for name, shape in parameter_shapes(model).items()
    )


def is_int8(ours: str) -> bool:
    """Whether a weight is a matrix of a block."""
    return re.fullmatch(r"blocks\.\d+\.(attention|feed_forward)\.[a-z]+\.weight", ours) is not None


def exported_weights(folder: Path, model: ModelConfig) -> LazyWeights:
    """The weights in a Hugging Face folder in fp32, under our names: int8 or not. It needs no package of torchao."""
    names, stored = hugging_face_names(model), stored_tensors(folder)
    known = set(stored)

    def read(ours: str) -> Tensor:
        theirs = names[ours]
        if theirs in known:
            return stored[theirs].float()
        module = theirs.removesuffix("weight")
        return stored[f"{module}_weight_qdata"].float() * stored[f"{module}_weight_scale"].float()

    return LazyWeights(list(names), read)


def _converted(
    trained: TrainedModel, rest: torch.dtype
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Each weight as the tensors and the metadata that are stored of it."""
    from torchao.prototype.safetensors.safetensors_support import (  # type: ignore[import-untyped]
        flatten_tensor_state_dict,
    )
    from torchao.quantization import Int8Tensor, PerRow

    for ours, theirs in hugging_face_names(trained.config.model).items():
        weight = trained.weights[ours].to(rest)
        if is_int8(ours):
            weight = Int8Tensor.from_hp(weight, granularity=PerRow())
        tensors, metadata = flatten_tensor_state_dict({theirs: weight})
        yield {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata


def _shards(
    converted: Iterable[tuple[dict[str, Tensor], dict[str, str]]], max_bytes: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """The tensors and metadata of each file, of at most `max_bytes` unless one weight is larger."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for more, described in converted:
        n_bytes = sum(tensor.nbytes for tensor in (*tensors.values(), *more.values()))
        if tensors and n_bytes > max_bytes:
            yield tensors, metadata
            tensors, metadata = {}, {}
        tensors |= more
        metadata |= described
    yield tensors, metadata
