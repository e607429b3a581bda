"""Puts the questions of a task to a model, and scores what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain.corpus.chat import Chat
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError, RunError
from pretrain.evaluate.scores import Array
from pretrain.evaluate.tasks.answers import statistics_of
from pretrain.evaluate.tasks.choices import Chosen, by_label, chosen, classified
from pretrain.evaluate.tasks.encoding import CannotEncodeError, Encoder
from pretrain.evaluate.tasks.likelihood import Request, log_likelihoods
from pretrain.evaluate.tasks.questions import Question, Unscored
from pretrain.evaluate.tasks.task import Kind, Task
from pretrain.generation.batch import Prompt
from pretrain.generation.sampling import Sampling
from pretrain.generation.writer import prompt_seed, write
from pretrain.model.decoder import Decoder

OnDone = Callable[[int], None]
"""Called with a number of bytes of prompts that are done."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is asked, and how."""

    model: Decoder
    tokenizer: Tokenizer
    sequence_length: int
    micro_batch_sequences: int
    device: torch.device
    clean: Callable[[str], str]
    sampling: Sampling
    seed: int
    chat: Chat | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a task."""

    questions: list[Question]
    """The questions that have scores."""
    unscored: list[Unscored]
    statistics: dict[str, Array]
    """Statistics [questions, k] by the name of a score, the main one first."""
    predictions: list[str]
    expected: list[list[str]]
    truncated: int
    empty: int = 0
    by_label: dict[str, Any] | None = None
    """Of a classification: `labels` and `confusion_matrix`."""


def ask(task: Task, questions: Sequence[Question], subject: Subject, on_done: OnDone) -> Outcome:
    """Put the questions to the model, and score the answers. Raises ConfigError where none can be put to it."""
    encoder = Encoder(subject.tokenizer, subject.sequence_length, task.separator, subject.clean, subject.chat)
    if task.kind is Kind.GENERATION:
        return _written(task, questions, subject, encoder, on_done)
    return _chosen(task, questions, subject, encoder, on_done)


def check_packages(task: Task) -> None:
    """Raise ConfigError where a package that the scores of a task need is not installed."""
    if task.kind is Kind.GENERATION:
        for metric in task.metrics:
            statistics_of(metric, task.language, ["a"], [["a"]])
    elif task.kind is Kind.CLASSIFICATION:
        by_label([0, 1], [0, 1], ["a", "b"])


def text_bytes(question: Question) -> int:
    """Size of a question's own prompt, by which progress is counted."""
    return len(question.prompt.encode()) + 1


def encodable(
    task: Task, questions: Sequence[Question], encode: Callable[[Question], Any]
) -> tuple[list[Question], list[Any], list[Unscored]]:
    """The questions that can be put to the model, with their tokens, and those that cannot. Raises ConfigError where
    there is none."""
    kept, tokens, unscored = [], [], []
    for question in questions:
        try:
            tokens.append(encode(question))
            kept.append(question)
        except CannotEncodeError as why:
            unscored.append(Unscored(question.id, str(why)))
    if not kept:
        raise ConfigError(
            f"the task {task.path} has no item that can be scored: {unscored[0].id!r} {unscored[0].reason}"
        )
    return kept, tokens, unscored


# ---- choices ---------------------------------------------------------------------------------------------------------


def _chosen(
    task: Task, questions: Sequence[Question], subject: Subject, encoder: Encoder, on_done: OnDone
) -> Outcome:
    kept, of_questions, unscored = encodable(task, questions, encoder.choices)
    requests = [request for row in of_questions for request in row]
    sizes = [text_bytes(question) / len(question.choices) for question in kept]
    owed = 0.0

    def progress(n_requests: int) -> None:
        nonlocal owed
        owed += n_requests * sum(sizes) / len(sizes)
        on_done(int(owed))
        owed -= int(owed)

    found = log_likelihoods(
        subject.model,
        requests,
        micro_batch_sequences=subject.micro_batch_sequences,
        device=subject.device,
        progress=progress,
    )
    if not np.isfinite(found).all():
        raise RunError(
            f"the task {task.name}: the model's likelihoods are no numbers; its training has diverged"
        )
    result, details = choose(task, kept, of_questions, found), None
    names = [list(task.labels) if task.labels else list(question.choices) for question in kept]
    if task.kind is Kind.CLASSIFICATION:
        details = by_label([question.right for question in kept], result.predicted, list(task.labels))
    return Outcome(
        questions=kept,
        unscored=unscored,
        statistics=result.statistics,
        predictions=[row[number] for row, number in zip(names, result.predicted, strict=True)],
        expected=[[row[question.right]] for row, question in zip(names, kept, strict=True)],
        truncated=encoder.n_truncated,
        by_label=details,
    )


def choose(
    task: Task, questions: Sequence[Question], requests: Sequence[Sequence[Request]], log_p: Array
) -> Chosen:
    """What follows from the log likelihoods of all requests, in their order."""
    right = [question.right for question in questions]
    bounds = np.cumsum([len(row) for row in requests])[:-1]
    rows = np.split(log_p, bounds)
    if task.kind is Kind.CLASSIFICATION:
        return classified(np.stack(rows), right, [len(text.encode()) for text in questions[0].choices])
    n_tokens = [[request.n_scored for request in row] for row in requests]
    return chosen(rows, right, [question.choices for question in questions], n_tokens)


# ---- written answers -------------------------------------------------------------------------------------------------


def _written(
    task: Task, questions: Sequence[Question], subject: Subject, encoder: Encoder, on_done: OnDone
) -> Outcome:
    kept, prompts, unscored = encodable(
        task, questions, lambda question: encoder.prompt(question, task.max_new_tokens)
    )
    answers = [""] * len(kept)
    longest_first = sorted(range(len(kept)), key=lambda number: -len(prompts[number]))
    for first in range(0, len(kept), subject.micro_batch_sequences):
        batch = longest_first[first : first + subject.micro_batch_sequences]
        requests = [(_prompt(task, prompts[number], subject), task.stop, None) for number in batch]
        for number, answer in zip(batch, write(subject.model, subject.tokenizer, requests), strict=True):
            answers[number] = subject.clean(answer.text)
        on_done(sum(text_bytes(kept[number]) for number in batch))
    answers = [answer.strip() for answer in answers]
    references = [list(question.references) for question in kept]
    statistics: dict[str, Array] = {}
    for metric in dict.fromkeys(task.metrics):
        statistics |= statistics_of(metric, task.language, answers, references)
    return Outcome(
        questions=kept,
        unscored=unscored,
        statistics=statistics,
        predictions=answers,
        expected=references,
        truncated=encoder.n_truncated,
        empty=answers.count(""),
    )


def _prompt(task: Task, tokens: list[int], subject: Subject) -> Prompt:
    ends = {subject.tokenizer.eos_id} if subject.chat is None else subject.chat.end_ids
    return Prompt(
        tokens=tokens,
        max_new_tokens=task.max_new_tokens,
        sampling=subject.sampling,
        seed=prompt_seed(subject.seed, tokens, 0),
        end_ids=ends,
    )
