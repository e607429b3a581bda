"""Writes a model as a GGUF file, which llama.cpp and its relatives read, and reads its weights back.

The file is written one weight at a time. Matrices are stored as F16, or as Q8_0: blocks of 32 int8 values with one fp16
scale. Norms and biases are stored as F32, as llama.cpp does. The package `gguf` is optional, so it is imported where it
is used.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import RopeType, TrainConfig
from pretrain.convert.gguf_tokenizer import GgufVocabulary, gguf_vocabulary
from pretrain.convert.hugging_face import hugging_face_names, parameter_shapes, require
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.model.streamed import LazyWeights
from pretrain.trained import TrainedModel

_BLOCK = 32
"""Values that share a scale in Q8_0. A row must consist of whole blocks."""


class GgufType(Enum):
    """How matrices are stored. The value is the name in the package `gguf`."""

    f16 = "F16"
    q8_0 = "Q8_0"


class _Names:
    """The names of the weights in a GGUF file, and the order of rows there."""

    def __init__(self, config: TrainConfig) -> None:
        import gguf

        model = config.model
        if not config.causal:
            raise ConfigError(
                "format=gguf has no form for a model trained with objective=mlm, whose tokens see later ones; "
                "use format=hugging_face"
            )
        if model.rope_scaling.rope_type is not RopeType.default:
            raise ConfigError(
                f"model.rope_scaling.rope_type={model.rope_scaling.rope_type.value} is not written as GGUF, since "
                "transformers does not read it there and could not check the file; use format=hugging_face"
            )
        if model.attention_bias and model.n_heads * model.head_width != model.d_model:
            raise ConfigError(
                f"model.d_head={model.d_head} is not written as GGUF with biases, since transformers would read "
                f"{model.d_model // model.n_heads} there and could not check the file; use format=hugging_face"
            )
        kind = "QWEN3" if model.qk_norm else "QWEN2" if model.attention_bias else "LLAMA"
        self.architecture = getattr(gguf.MODEL_ARCH, kind)
        table = gguf.get_tensor_name_map(self.architecture, model.n_layers)
        self.theirs_of = {
            ours: str(table.get_name(theirs, try_suffixes=(".weight", ".bias")))
            for ours, theirs in hugging_face_names(model).items()
        }
        # llama.cpp rotates neighbors (0 with 1) in the architecture "llama", and halves (0 with K/2), as we do, in
        # others. So rows of queries and keys change places.
        self._heads = {"q": model.n_heads, "k": model.kv_heads} if kind == "LLAMA" else {}

    def heads(self, ours: str) -> int | None:
        """The number of heads whose rows change places in this weight; None where none do."""
        _, _, part = ours.removesuffix(".weight").rpartition(".")
        return self._heads.get(part)


def write_gguf(
    trained: TrainedModel,
    path: Path,
    kind: GgufType,
    chat_template: str | None = None,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write the file. Raises ConfigError for a model or tokenizer that GGUF has no words for."""
    require("gguf", "export")
    import gguf

    model, stored = trained.config.model, getattr(gguf.GGMLQuantizationType, kind.value)
    names = _Names(trained.config)
    shapes = parameter_shapes(model)
    _check_blocks(shapes, kind)
    vocabulary = gguf_vocabulary(trained.tokenizer).padded(model.vocab_size or 0)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[names.architecture])
    try:
        _add_model(writer, trained, kind)
        _add_tokenizer(writer, trained.tokenizer, vocabulary)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        for ours, shape in shapes.items():
            as_type = stored if len(shape) == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor_info(
                names.theirs_of[ours], shape, np.dtype(np.float32), _stored_bytes(shape, as_type), as_type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, shape in shapes.items():
            as_type = stored if len(shape) == 2 else gguf.GGMLQuantizationType.F32
            weight = trained.weights[ours].float().numpy()
            if (heads := names.heads(ours)) is not None:
                weight = _interleaved(weight, heads)
            data = gguf.quants.quantize(np.ascontiguousarray(weight), as_type)
            writer.write_tensor_data(data)
            progress(data.nbytes)
    finally:
        writer.close()


def gguf_bytes(trained: TrainedModel, kind: GgufType) -> int:
    """Size in bytes of the weights that `write_gguf` writes."""
    import gguf

    matrix = getattr(gguf.GGMLQuantizationType, kind.value)
    return sum(
        _stored_bytes(shape, matrix if len(shape) == 2 else gguf.GGMLQuantizationType.F32)
        for shape in parameter_shapes(trained.config.model).values()
    )


def gguf_weights(path: Path, trained: TrainedModel) -> LazyWeights:
    """The weights in a GGUF file in fp32, under our names. Each is read with the package `gguf` when it is used."""
    import gguf

    names = _Names(trained.config)

    # The reader maps the file into memory. Only the places of the weights are taken from it, since pages that were read
    # through a map count as memory of this process.
    places = {
        found.name: (found.data_offset, found.tensor_type, found.n_bytes)
        for found in gguf.GGUFReader(path).tensors
    }
    shapes = parameter_shapes(trained.config.model)

    def read(ours: str) -> Tensor:
        offset, as_type, n_bytes = places[names.theirs_of[ours]]
        shape = shapes[ours]
        stored = np.fromfile(path, np.uint8, count=int(n_bytes), offset=int(offset)).reshape(*shape[:-1], -1)
        weight = gguf.quants.dequantize(stored, as_type).reshape(shape)
        if (heads := names.heads(ours)) is not None:
            weight = _halves(weight, heads)
        return torch.from_numpy(np.array(weight, dtype=np.float32))

    return LazyWeights(list(names.theirs_of), read)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, K/2, 1, K/2 + 1, ... instead of 0, 1, ..."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_interleaved`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _check_blocks(shapes: dict[str, torch.Size], kind: GgufType) -> None:
    odd = {shape[1] for shape in shapes.values() if len(shape) == 2 and shape[1] % _BLOCK}
    if kind is GgufType.q8_0 and odd:
        raise ConfigError(
            f"GGUF stores int8 weights in blocks of {_BLOCK}, and this model has rows of {min(odd)} values; use "
            "dtype=fp16"
        )


def _stored_bytes(shape: tuple[int, ...], as_type: Any) -> int:
    import gguf

    values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[as_type]
    return torch.Size(shape).numel() // values_per_block * bytes_per_block


def _add_model(writer: Any, trained: TrainedModel, kind: GgufType) -> None:
    import gguf

    model = trained.config.model
    writer.add_name(f"step {trained.step}")
    writer.add_context_length(trained.sequence_length)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.value}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
