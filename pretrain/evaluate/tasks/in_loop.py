"""Scores tasks during training: choices by their likelihood, on a fixed number of items.

Every rank makes the same number of forward passes, since these are collective under ZeRO-3, and all passes have one
shape, so that compiled code is compiled once. Nothing is drawn at random, and training is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.batch import IGNORED_LABEL, Batch
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.distributed import World, sum_over_ranks
from pretrain.errors import ConfigError
from pretrain.evaluate.scores import standard_error, value_of
from pretrain.evaluate.tasks.encoding import Encoder
from pretrain.evaluate.tasks.likelihood import Request
from pretrain.evaluate.tasks.questions import Question, questions_of
from pretrain.evaluate.tasks.running import choose, encodable
from pretrain.evaluate.tasks.task import Kind, Task, load_task
from pretrain.model.decoder import LossSums

RECORDED = ("accuracy", "accuracy_per_character", "gold_bits_per_byte")
"""The scores that are recorded, of those that a task has. The others move too little on so few items."""
_MULTIPLE = 64  # the number of tokens of a row is a multiple of this, as kernels like it
_RESAMPLES = 200


class LoopTask(NamedTuple):
    """A task whose items have become tokens."""

    task: Task
    questions: list[Question]
    requests: list[list[Request]]
    """A request for each choice of each question."""
    note: str
    """What has to be known of the items that are scored."""


def prepare(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    max_items: int,
    clean: Callable[[str], str],
) -> list[LoopTask]:
    """Read the tasks, and make tokens of their items. Raises ConfigError."""
    found: list[LoopTask] = []
    for path in paths:
        task = load_task(path)
        if task.kind is Kind.GENERATION:
            raise ConfigError(
                f"evaluation.tasks: {path} has kind: {task.kind}, and during training only choices are scored; use "
                "launch/eval.py for written answers"
            )
        if task.name in [other.task.name for other in found]:
            raise ConfigError(
                f"evaluation.tasks: {path} has the name {task.name}, which is taken; change its name:"
            )
        questions, unscored = questions_of(task, clean, max_items)
        encoder = Encoder(tokenizer, sequence_length, task.separator, clean)
        kept, requests, unencodable = encodable(task, questions, encoder.choices)
        n_lost = len(unscored) + len(unencodable)
        lost = f", {n_lost:,} others have no score" * (n_lost > 0)
        cut = f", the beginning of {encoder.n_truncated:,} is cut off" * (encoder.n_truncated > 0)
        note = f"task {task.name}: {len(kept):,} items, {sum(map(len, requests)):,} choices{lost}{cut}"
        found.append(LoopTask(task, kept, requests, note))
    return found


@torch.no_grad()
def evaluate_tasks(
    forward: Callable[[Batch], LossSums],
    tasks: Sequence[LoopTask],
    *,
    micro_batch_sequences: int,
    world: World,
) -> dict[str, float]:
    """The scores of all tasks with their standard errors, as `<task>/<score>`. All ranks call this together.

    `forward` returns the sums of each sequence. The choices of all tasks are divided over the ranks; ranks that share
    sequences get the same ones.
    """
    requests = [request for task in tasks for row in task.requests for request in row]
    n_tokens = -(-max(len(request.tokens) - 1 for request in requests) // _MULTIPLE) * _MULTIPLE
    log_p = np.zeros(len(requests))
    for first in range(0, len(requests), micro_batch_sequences * world.n_readers):
        start = first + world.reader * micro_batch_sequences
        mine = requests[start : start + micro_batch_sequences]
        sums = forward(_batch(mine, micro_batch_sequences, n_tokens))
        log_p[start : start + len(mine)] = -sums.nll_sum[: len(mine)].double().cpu().numpy()
    log_p = np.array(sum_over_ranks(log_p.tolist(), world))
    figures: dict[str, float] = {}
    for task in tasks:
        n = sum(map(len, task.requests))
        statistics = choose(task.task, task.questions, task.requests, log_p[:n]).statistics
        log_p = log_p[n:]
        for name in RECORDED:
            if name in statistics:
                key = f"{task.task.name}/{name}"
                figures[key] = value_of(name, statistics[name])
                figures[f"{key}_standard_error"] = standard_error(
                    name, statistics[name], n_resamples=_RESAMPLES
                )
    return figures


def _batch(requests: Sequence[Request], n_sequences: int, n_tokens: int) -> Batch:
    """The requests as padded sequences, of which only the scored tokens count. Rows without a request count nothing."""
    tokens = torch.zeros(n_sequences, n_tokens, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    documents = torch.ones_like(tokens)  # padding is a document of its own
    for row, request in enumerate(requests):
        ids = torch.tensor(request.tokens)
        n, n_scored = len(ids) - 1, request.n_scored
        tokens[row, :n], documents[row, :n] = ids[:-1], 0
        labels[row, n - n_scored : n] = ids[-n_scored:]
    positions = torch.arange(n_tokens).expand_as(tokens)
    return Batch(tokens, labels, positions, documents, np.zeros(n_sequences, np.int64))
