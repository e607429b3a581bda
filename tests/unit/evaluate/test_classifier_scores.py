"""Scores of classifiers: as defined, and the same in the loop, which works without scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.evaluate.classifier_scores import classifier_scores
from pretrain.evaluate.heldout import Scores, with_classes

sklearn_metrics = pytest.importorskip("sklearn.metrics")
CLASSES = ["a", "b", "c", "never"]
RNG = np.random.default_rng(1)
LABELS = RNG.integers(0, 3, 200)
PROBABILITIES = RNG.dirichlet([1, 1, 1, 0.01], 200)


def test_scores_are_those_of_their_definitions() -> None:
    scores = classifier_scores(LABELS, PROBABILITIES, CLASSES)
    labels, predicted, right = LABELS, PROBABILITIES.argmax(1), np.eye(4)[LABELS]
    is_right = predicted == labels
    assert scores["documents"] == 200
    assert scores["accuracy"] == pytest.approx(is_right.mean())
    assert scores["brier"] == pytest.approx(((PROBABILITIES - right) ** 2).sum(1).mean())
    assert scores["log_loss"] == pytest.approx(-np.log(PROBABILITIES[np.arange(200), LABELS]).mean())
    for at, name in enumerate(CLASSES):
        hits = int((is_right & (labels == at)).sum())
        of_class = scores["classes"][name]
        assert of_class["documents"] == (labels == at).sum()
        assert of_class["precision"] == pytest.approx(hits / max(1, (predicted == at).sum()))
        assert of_class["recall"] == pytest.approx(hits / max(1, (labels == at).sum()))
        assert [int(((labels == at) & (predicted == other)).sum()) for other in range(4)] == scores[
            "confusion_matrix"
        ][at]


def test_macro_averages_are_over_classes_that_occur_or_are_predicted() -> None:
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])
    scores = classifier_scores(labels, np.eye(4)[predicted] * 0.97 + 0.0075, CLASSES)
    for name in ("precision", "recall", "f1"):
        of_classes = [scores["classes"][label][name] for label in "abc"]
        assert scores[f"macro_{name}"] == pytest.approx(np.mean(of_classes))
    theirs = sklearn_metrics.f1_score(labels, predicted, average="macro")
    assert scores["macro_f1"] == pytest.approx(theirs)


def test_calibration_by_hand() -> None:
    """Two bins: 0.75 predicted and half of them right, 0.95 and all right."""
    confidence = np.array([0.75, 0.75, 0.95, 0.95])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    scores = classifier_scores(np.array([0, 1, 0, 0]), probabilities, ["a", "b"])
    assert scores["calibration"] == [
        {"documents": 2, "probability": pytest.approx(0.75), "right": 0.5},
        {"documents": 2, "probability": pytest.approx(0.95), "right": 1.0},
    ]
    assert scores["ece"] == pytest.approx((2 * 0.25 + 2 * 0.05) / 4)


@pytest.mark.parametrize("edge", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_a_probability_on_the_edge_of_a_bin_is_counted_once(edge: float) -> None:
    probabilities = np.array([[edge, 1 - edge], [0.55, 0.45]])
    scores = classifier_scores(np.array([0, 1]), probabilities, ["a", "b"])
    assert sum(of_bin["documents"] for of_bin in scores["calibration"]) == 2


def test_the_loop_computes_the_same_from_the_confusion_matrix() -> None:
    theirs = classifier_scores(LABELS, PROBABILITIES, CLASSES)
    plain = Scores(loss=1, perplexity=1, bits_per_byte=None, tokens=1, text_bytes=1, documents=1)
    ours = with_classes(plain, np.array(theirs["confusion_matrix"], float))
    assert ours.accuracy == pytest.approx(theirs["accuracy"])
    assert ours.macro_f1 == pytest.approx(theirs["macro_f1"])
    assert with_classes(plain, np.zeros((0, 0))) is plain
