"""Scores of a classifier from the probabilities that it gives, through scikit-learn (the extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import ConfigError

N_BINS = 10
"""Number of bins of equal width, by the probability of the predicted class, in which calibration is measured."""


def require_scikit_learn() -> None:
    """Raise ConfigError where the optional package is not installed."""
    try:
        import sklearn  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the scores of a classifier need the package scikit-learn; install it with: pip install 'pretrain[eval]'"
        ) from error


def classifier_scores(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: Sequence[str]
) -> dict[str, Any]:
    """The scores of documents whose classes have the numbers `labels` [N], given the probabilities [N, C].

    Macro averages are over the classes that occur or are predicted. `brier` is the mean of the squared distance from
    the probabilities to 1 for the right class and 0 for the others, from 0 to 2, and `ece` the expected calibration
    error. `calibration` has, for each bin that is not empty, its documents, their mean probability of the predicted
    class, and the fraction of them that is right.
    """
    from sklearn.calibration import calibration_curve  # type: ignore[import-untyped]
    from sklearn.metrics import (  # type: ignore[import-untyped]
        accuracy_score,
        brier_score_loss,
        confusion_matrix,
        log_loss,
        precision_recall_fscore_support,
    )

    numbers = list(range(len(classes)))
    predicted = probabilities.argmax(1)
    each = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0.0)
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    occurs = matrix.sum(0) + matrix.sum(1) > 0
    confidence, is_right = probabilities.max(1), predicted == labels
    right, mean = calibration_curve(is_right, np.clip(confidence, 0, 1), n_bins=N_BINS)
    # The edges of calibration_curve: a probability on an edge belongs to the bin below it.
    bins = np.searchsorted(np.linspace(0, 1, N_BINS + 1)[1:-1], confidence)
    sizes = np.bincount(bins, minlength=N_BINS)
    sizes = sizes[sizes > 0]
    names = ("precision", "recall", "f1", "documents")
    return {
        "documents": len(labels),
        "accuracy": float(accuracy_score(labels, predicted)),
        **{f"macro_{name}": float(each[at][occurs].mean()) for at, name in enumerate(names[:3])},
        "log_loss": float(log_loss(labels, probabilities, labels=numbers)),
        "brier": float(brier_score_loss(labels, probabilities, labels=numbers, scale_by_half=False)),
        "ece": float((sizes * np.abs(right - mean)).sum() / len(labels)),
        "classes": {
            label: {name: values[at].item() for name, values in zip(names, each, strict=True)}
            for at, label in enumerate(classes)
        },
        "confusion_matrix": matrix.tolist(),
        "calibration": [
            {"documents": n, "probability": p, "right": r}
            for n, p, r in zip(sizes.tolist(), mean.tolist(), right.tolist(), strict=True)
        ],
    }
