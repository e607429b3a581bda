"""What the runners of this program's own model share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.harness.worker import Job, own_tokens
from pretrain.batch import Batch
from pretrain.config import TrainConfig, validate

SYNTHETIC = "synthetic"
"""data.manifest of tokens that are drawn, not read."""
DOCUMENTS = 4
"""With data.document_masking, each sequence holds so many documents of the same length."""


def train_config(job: Job) -> TrainConfig:
    """The run as launch/train.py would have it."""
    return validate(TrainConfig, job.config)


def synthetic_batches(job: Job, rank: int) -> Iterator[list[Batch]]:
    """This rank's micro batches of each step, made beforehand."""
    masked = job.config["data"]["document_masking"]
    length = -(-job.sequence_length // DOCUMENTS) if masked else job.sequence_length
    place = torch.arange(job.sequence_length)
    steps = []
    for step in range(job.all_steps):
        own = own_tokens(job, step, rank)
        n = len(own)
        tensors = [own[:, :-1], own[:, 1:], (place % length).expand(n, -1), (place // length).expand(n, -1)]
        pieces = zip(*(t.contiguous().split(job.micro_batch_sequences) for t in tensors), strict=True)
        steps.append([Batch(*piece, samples=np.empty(0, np.int64)) for piece in pieces])
    return iter(steps)
