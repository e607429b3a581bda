"""Exports a run in any form: writes it, reads it back with other programs, and says what the form costs.

One weight is in memory at a time, or one file of them, so the model may be larger than memory. The output appears as a
whole, after all checks, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import Precision
from pretrain.convert.form import Form, Format, Stored
from pretrain.convert.gguf import GgufType, gguf_bytes, gguf_weights, write_gguf
from pretrain.convert.gguf_tokenizer import check_gguf_tokenizer
from pretrain.convert.heldout_loss import FormLoss, heldout_loss
from pretrain.convert.hugging_face import (
    MAX_SHARD_BYTES,
    Parity,
    check_output,
    compare_logits,
    exported_bytes,
    is_large,
    require,
    require_transformers,
    write_checked,
    write_tokenizer_of,
)
from pretrain.convert.int8 import exported_weights, int8_bytes, require_torchao, write_int8
from pretrain.convert.model_card import CardFacts, model_card
from pretrain.corpus.shards import Corpus
from pretrain.errors import ConfigError, RunError
from pretrain.files import published_together
from pretrain.model.kernels import DTYPES
from pretrain.trained import TrainedModel

CARD_NAME = "README.md"
_MAX_ERROR = {Stored.fp32: 0.0, Stored.bf16: 0.004, Stored.fp16: 0.004, Stored.int8: 0.25}
"""Largest accepted error of a weight as read back, in its Frobenius norm. Another weight in its place gives about 1.4,
and int8 about 0.01; only far outliers in most rows could bring it to 0.25, and then int8 is of no use."""


@dataclass(frozen=True)
class Exported:
    """What was found out about an export."""

    form: Form
    n_bytes: int
    """Size of all files in bytes."""
    weight_error: float
    """Largest relative error (Frobenius norm) of a weight, as read back from the files."""
    parity: Parity | None
    """How well `transformers` agrees; None where it can only read the form into memory, and the model is too large."""
    loss: FormLoss | None
    """What the form costs on held-out text; None where none was given."""


def require_packages(form: Form, large: bool) -> None:
    """Raise ConfigError where a package that the form needs is not installed."""
    require_transformers()
    if form.format is Format.gguf:
        require("gguf", "export")
    elif form.stored is Stored.int8:
        require_torchao()
    elif large:
        require("accelerate", "export")


def written_bytes(trained: TrainedModel, form: Form) -> int:
    """Size in bytes of the weights that `export_form` writes. Raises ConfigError where the form has no place for the
    model."""
    _check_form(trained, form)
    if form.format is Format.gguf:
        return gguf_bytes(trained, _gguf_type(form))
    if form.stored is Stored.int8:
        return int8_bytes(trained, DTYPES[trained.precision])
    return exported_bytes(trained, DTYPES[Precision(form.stored.value)])


def _check_form(trained: TrainedModel, form: Form) -> None:
    """Raise ConfigError for a classifier in a form for programs that write text."""
    if trained.config.model.classes and (form.format is Format.gguf or form.stored is Stored.int8):
        raise ConfigError(
            f"the model was trained with objective=classify, and {form.name} is for models that write text; leave out "
            "format and dtype, or give dtype=fp32"
        )


def export_form(
    trained: TrainedModel,
    run_dir: Path,
    output: Path,
    form: Form,
    *,
    heldout: Corpus | None = None,
    heldout_tokens: int = 0,
    device_watts: float | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> Exported:
    """Write the folder `output`, check it, and describe it in its README.md.

    `progress` is called with the bytes of weights that have been written since its last call. Raises ConfigError where
    `output` may not be replaced or the form has no place for something, and RunError where what was written differs.
    """
    _check_form(trained, form)
    require_packages(form, is_large(trained))
    check_output(output, overwrite)
    with published_together(output) as folder:
        match form:
            case Form(Format.gguf, _):
                weights, parity = _gguf(trained, folder, output, form, progress)
            case Form(_, Stored.int8):
                weights, parity = _int8(trained, folder, output, max_shard_bytes, progress)
            case _:
                dtype = DTYPES[Precision(form.stored.value)]
                parity = write_checked(
                    trained, folder, output, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
                )
                weights = exported_weights(folder, trained.config.model)
        error = _weight_error(trained.weights, weights)
        if not error <= _MAX_ERROR[form.stored]:
            raise RunError(
                f"a weight of the exported model differs from the run's by {error:.2g} of its size (allowed "
                f"{_MAX_ERROR[form.stored]:.2g} as {form.name}); {output} was not written"
            )
        loss = None
        if heldout is not None:
            loss = heldout_loss(trained, weights, heldout, heldout_tokens)
        facts = CardFacts(form, error, parity, loss, device_watts)
        (folder / CARD_NAME).write_text(model_card(trained, run_dir, facts), encoding="utf-8")
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(form, n_bytes, error, parity, loss)


def _gguf(
    trained: TrainedModel, folder: Path, output: Path, form: Form, progress: Callable[[int], None]
) -> tuple[Mapping[str, Tensor], Parity | None]:
    kind = _gguf_type(form)
    path = folder / f"model-{kind.name}.gguf"
    write_gguf(trained, path, kind, trained.chat_template, progress=progress)
    check_gguf_tokenizer(trained.tokenizer, path)
    weights = gguf_weights(path, trained)
    reading: dict[str, Any] = {"gguf_file": path.name}
    if not trained.config.model.attention_bias:  # the configuration of Qwen2 has no such key
        reading["head_dim"] = trained.config.model.head_width
    return weights, _parity(trained, weights, folder, output, **reading)


def _int8(
    trained: TrainedModel, folder: Path, output: Path, max_shard_bytes: int, progress: Callable[[int], None]
) -> tuple[Mapping[str, Tensor], Parity | None]:
    write_int8(trained, folder, DTYPES[trained.precision], max_shard_bytes, progress)
    write_tokenizer_of(trained, folder)
    weights = exported_weights(folder, trained.config.model)
    return weights, _parity(trained, weights, folder, output)


def _parity(
    trained: TrainedModel, weights: Mapping[str, Tensor], folder: Path, output: Path, **reading: object
) -> Parity | None:
    """Compare logits of the weights as read back by us with those of `transformers`, which reads the same files.

    It can only read these forms whole, so a large model is left out.
    """
    if is_large(trained):
        return None
    parity = compare_logits(replace(trained, weights=weights), folder, None, **reading)
    parity.require(output)
    return parity


def _gguf_type(form: Form) -> GgufType:
    return GgufType.q8_0 if form.stored is Stored.int8 else GgufType.f16


def _weight_error(weights: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> float:
    """The largest relative error of a weight; NaN where one is not finite."""
    worst = torch.zeros(())
    for name in weights:
        expected = weights[name]
        error = (back[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        worst = torch.maximum(worst, error)  # unlike max, it keeps NaN
    return float(worst)
