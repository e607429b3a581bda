"""Writes a run folder that holds weights only: the result of an import or of an average, not of training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint import tensors as checkpoint
from pretrain.config import to_dict
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.distributed import Partition, World
from pretrain.files import write_atomically
from pretrain.trained import TrainedModel

_NOT_A_RUN = "noresume"
"""The run id in such a checkpoint, which belongs to no run that could be resumed."""


def save_weights(run_dir: Path, model: TrainedModel) -> None:
    """Write the tokenizer, its chat template, if any, and the weights as the checkpoint of `model.step` into `run_dir`.

    The checkpoint holds no moments and no position in a corpus, so it can start a run but not continue one. Raises
    CheckpointError where writing fails.
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
        "tensors": {name: list(weight.shape) for name, weight in model.weights.items()},
    }
    partitions = {f"weight.{name}": Partition(w.flatten(), w.numel()) for name, w in model.weights.items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        checkpoint.save(run_dir, model.step, partitions, state, World(0, 1, 0, torch.device("cpu")))
    finally:
        dist.destroy_process_group()
