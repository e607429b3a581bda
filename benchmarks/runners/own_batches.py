"""Configuration and batches, shared by the runners of this program's own model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.harness.worker import Job, own_tokens
from pretrain.batch import Batch
from pretrain.config import TrainConfig, validate

SYNTHETIC = "synthetic"
"""Value of data.manifest that stands for random tokens instead of a corpus."""
DOCUMENTS = 4
"""Number of documents per sequence, of equal length, with data.document_masking."""


def train_config(job: Job) -> TrainConfig:
    """The job's configuration as a validated TrainConfig."""
    return validate(TrainConfig, job.config)


def synthetic_batches(job: Job, rank: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step. All are made in advance, so that making them is not timed."""
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
