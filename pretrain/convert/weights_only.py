"""Writes a run folder that holds weights only: the result of an import or of an average, not of training."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import to_dict
from pretrain.convert.streamed import Weight, write_safetensors
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.files import write_atomically
from pretrain.trained import TrainedModel

_NOT_A_RUN = "noresume"
"""The run id in such a checkpoint, which belongs to no run that could be resumed."""


def save_weights(run_dir: Path, model: TrainedModel, weights: dict[str, Weight]) -> None:
    """Write the tokenizer, its chat template, if any, and `weights` as the checkpoint of `model.step` into `run_dir`.

    Those of `model` are not read. The checkpoint holds no moments and no position in a
    corpus, so it can start a run but not continue one. Raises CheckpointError where writing fails.
    """
    write_atomically(run_dir / model.tokenizer.file_name, model.tokenizer.content)
    if model.chat_template is not None:
        write_atomically(run_dir / CHAT_TEMPLATE_NAME, model.chat_template.encode())
    state = {
        "step": model.step,
        "tokens_seen": model.tokens_seen,
        "sequence_length": model.sequence_length,
        "optimizer_step": 0,
        "weights_only": "fp32",
        "order": {},
        "tokenizer_sha256": model.tokenizer.sha256,
        "run_id": _NOT_A_RUN,
        "wandb_run_id": _NOT_A_RUN,
        "attempt": 0,
        "world_size": 1,
        "precision": model.precision.value,
        "config": to_dict(model.config),
        "tensors": {name: list(weight.shape) for name, weight in weights.items()},
    }
    checkpoint.save_written(
        run_dir, model.step, lambda folder: _write(folder, weights), state, checkpoint.ALONE
    )


def _write(folder: Path, weights: dict[str, Weight]) -> None:
    """Write flattened fp32 weights, in files that are named as those of rank 0 and hold about 1 GiB each."""
    files: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if size and size + 4 * weight.numel > checkpoint.FILE_BYTES:
            files.append({})
            size = 0
        files[-1][f"weight.{name}"] = Weight((weight.numel,), weight.dtype, weight.read, weight.in_order)
        size += 4 * weight.numel
    for number, members in enumerate(files, 1):
        name = f"shard-00001-model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, members, torch.float32)
