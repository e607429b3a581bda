"""Scores of choices by their likelihood: labels of a classification, and the choices of a question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.evaluate.scores import Array, lacks


class Chosen(NamedTuple):
    """What a model chose."""

    predicted: list[int]
    """Number of the likeliest choice of each item; of equal ones the first."""
    statistics: dict[str, Array]
    """Statistics [items, k] by the name of a score, the main one first."""


def classified(log_p: Array, right: Sequence[int], label_bytes: Sequence[int]) -> Chosen:
    """From the log likelihoods of all labels, in nats [items, labels]. `right` are the true labels' numbers.

    The probability of a label is its likelihood among those of all labels.
    """
    rows, gold = np.arange(len(log_p)), np.array(right)
    shifted = log_p - log_p.max(1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    predicted = log_p.argmax(1)
    hit = (predicted == gold).astype(np.float64)
    truth = np.eye(log_p.shape[1])[gold]
    # sklearn's convention: with two labels, the squared error of one of them.
    scale = 0.5 if log_p.shape[1] == 2 else 1.0
    log_of_right = shifted[rows, gold] - np.log(np.exp(shifted).sum(1))
    pairs = np.stack([gold, predicted], 1).astype(np.float64)
    return Chosen(
        predicted.tolist(),
        {
            "accuracy": hit[:, None],
            "macro_precision": pairs,
            "macro_recall": pairs,
            "macro_f1": pairs,
            "ece": np.stack([probabilities.max(1), hit], 1),
            "brier": scale * np.square(probabilities - truth).sum(1)[:, None],
            "log_loss": -log_of_right[:, None],
            "gold_bits_per_byte": _bits_per_byte(log_p[rows, gold], np.array(label_bytes)[gold]),
        },
    )


def chosen(
    log_p: Sequence[Array],
    right: Sequence[int],
    texts: Sequence[Sequence[str]],
    n_tokens: Sequence[Sequence[int]],
) -> Chosen:
    """From the log likelihood of each choice of each item, in nats, with the text of the choice and its tokens.

    `accuracy` compares the likelihoods of whole choices, which favors short ones; the others those per token, byte and
    character. lm-eval's acc is `accuracy`, its acc_norm `accuracy_per_character`.
    """
    sizes = {
        "accuracy": [[1 for _ in row] for row in texts],
        "accuracy_per_token": n_tokens,
        "accuracy_per_byte": [[len(text.encode()) for text in row] for row in texts],
        "accuracy_per_character": [[len(text) for text in row] for row in texts],
    }
    statistics: dict[str, Array] = {}
    best: dict[str, list[int]] = {}
    for name, of_items in sizes.items():
        pairs = zip(log_p, of_items, strict=True)
        best[name] = [int(np.argmax(found / np.array(size))) for found, size in pairs]
        hits = [float(one == gold) for one, gold in zip(best[name], right, strict=True)]
        statistics[name] = np.array(hits)[:, None]
    of_gold = np.array([found[gold] for found, gold in zip(log_p, right, strict=True)])
    bytes_of_gold = [len(row[gold].encode()) for row, gold in zip(texts, right, strict=True)]
    statistics["gold_bits_per_byte"] = _bits_per_byte(of_gold, np.array(bytes_of_gold))
    return Chosen(best["accuracy"], statistics)


def _bits_per_byte(log_p: Array, text_bytes: np.ndarray) -> Array:
    """Statistics for the bits per byte of what is right: unlike an accuracy, it moves with every item."""
    return np.stack([-log_p / math.log(2), text_bytes.astype(np.float64)], 1)


def by_label(right: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each label, and the confusion matrix: rows are true labels, columns predicted ones.

    Raises ConfigError where scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
            confusion_matrix,
            precision_recall_fscore_support,
        )
    except ImportError as error:
        raise lacks(error, "classification") from error
    numbers = list(range(len(labels)))
    columns = precision_recall_fscore_support(right, predicted, labels=numbers, zero_division=0)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    names = ("precision", "recall", "f1", "items")
    return {
        "labels": {
            label: dict(zip(names, row, strict=True)) for label, row in zip(labels, rows, strict=True)
        },
        "confusion_matrix": confusion_matrix(right, predicted, labels=numbers).tolist(),
    }
