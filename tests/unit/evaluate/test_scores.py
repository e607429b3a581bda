"""Scores against the libraries' own, and standard errors against what resampling the items themselves gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)

from pretrain.evaluate.scores import Array, resampled, score_named, standard_error, value_of
from pretrain.evaluate.tasks.answers import exact_match, statistics_of, token_f1, units
from pretrain.evaluate.tasks.choices import by_label, chosen, classified
from pretrain.evaluate.tasks.task import Language, Metric

ENGLISH = [
    (
        "The cat sat on the mat, and the dog did not.",
        ["The cat sat on a mat; the dog didn't.", "A cat sat there."],
    ),
    ("It was the best of times.", ["It was the best of times, it was the worst of times."]),
    ("", ["Nothing was written here."]),
    ("Call me Ishmael some years ago", ["Call me Ishmael. Some years ago, never mind how long."]),
]
CHINESE = [
    ("今天天气很好，我们去公园吧。", ["今天天气很好，我们去公园玩吧。"]),
    ("这本书写得不错", ["这本书写得很不错！", "书不错"]),
    ("用 Python 写", ["用Python写的程序"]),
]
SETS = {Language.EN: ENGLISH, Language.ZH: CHINESE}


def columns(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[row[n] if n < len(row) else None for row in references] for n in range(most)]


def statistics(metric: Metric, language: Language) -> dict[str, Array]:
    answers, references = zip(*SETS[language], strict=True)
    return statistics_of(metric, language, answers, references)


# --- written answers ---


@pytest.mark.parametrize("language", Language)
def test_bleu_and_chrf_are_those_of_sacrebleu(language: Language) -> None:
    answers, references = map(list, zip(*SETS[language], strict=True))
    bleu = BLEU(tokenize="zh" if language is Language.ZH else "13a")
    for metric, theirs in ((Metric.BLEU, bleu), (Metric.CHRF, CHRF())):
        rows = statistics(metric, language)[metric.value]
        expected = theirs.corpus_score(answers, columns(references)).score
        assert expected > 5
        assert value_of(metric.value, rows) == pytest.approx(expected, abs=1e-9)
        # A resampled set is scored as a set of these items.
        drawn = [0, 1, 1, 2]
        again = theirs.corpus_score(
            [answers[n] for n in drawn], columns([references[n] for n in drawn])
        ).score
        weights = np.bincount(drawn, minlength=len(rows)).astype(float)
        assert score_named(metric.value).of(rows, weights[None]) == pytest.approx([again], abs=1e-9)


def test_chinese_bleu_counts_characters() -> None:
    answers, references = zip(*CHINESE, strict=True)
    as_words = statistics_of(Metric.BLEU, Language.EN, answers, references)["bleu"]
    assert value_of("bleu", statistics(Metric.BLEU, Language.ZH)["bleu"]) > 2 * value_of("bleu", as_words)


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = statistics(Metric.ROUGE, Language.EN)
    for name, rows in found.items():
        expected = [scorer.score_multi(references, answer)[name].fmeasure for answer, references in ENGLISH]
        assert rows[:, 0].tolist() == expected
        assert max(expected) > 0


def test_rouge_of_chinese_is_that_of_its_characters() -> None:
    """Written apart as ASCII words, the characters give what rouge-score itself computes."""
    letters: dict[str, str] = {}

    def spelled(text: str) -> str:
        return " ".join(letters.setdefault(unit, f"w{len(letters)}") for unit in units(text))

    scorer = RougeScorer(["rougeL"])
    expected = [
        scorer.score_multi([spelled(one) for one in references], spelled(answer))["rougeL"].fmeasure
        for answer, references in CHINESE
    ]
    assert statistics(Metric.ROUGE, Language.ZH)["rougeL"][:, 0].tolist() == expected
    assert min(expected) > 0.5


@pytest.mark.parametrize(
    ("answer", "reference", "language", "match", "f1"),
    [
        ("The cat!", "a Cat", Language.EN, 1.0, 1.0),
        ("black cat", "the cat sat", Language.EN, 0.0, 0.5),
        ("", "cat", Language.EN, 0.0, 0.0),
        ("the", "a", Language.EN, 1.0, 1.0),
        ("cat cat", "cat", Language.EN, 0.0, 2 / 3),
        ("北京。", "北京", Language.ZH, 1.0, 1.0),
        ("北京市", "北京", Language.ZH, 0.0, 0.8),
        ("《Python 3》", "python3", Language.ZH, 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(answer: str, reference: str, language: Language, match: float, f1: float) -> None:
    assert exact_match(answer, reference, language) == match
    assert token_f1(answer, reference, language) == pytest.approx(f1)


# --- choices ---


def probabilities(n_items: int, n_labels: int) -> tuple[Array, np.ndarray]:
    draw = np.random.default_rng(3)
    log_p = draw.normal(size=(n_items, n_labels)) * 2 - 40
    gold = draw.integers(n_labels, size=n_items)
    log_p[np.arange(n_items), gold] += 1
    return log_p, gold


@pytest.mark.parametrize("n_labels", [2, 4])
def test_classification_is_that_of_sklearn(n_labels: int) -> None:
    log_p, gold = probabilities(200, n_labels)
    found = classified(log_p, gold.tolist(), [1] * n_labels)
    p = np.exp(log_p) / np.exp(log_p).sum(1, keepdims=True)
    predicted = p.argmax(1)
    assert found.predicted == predicted.tolist()
    macro = precision_recall_fscore_support(gold, predicted, average="macro")
    expected = {
        "accuracy": accuracy_score(gold, predicted),
        "macro_precision": macro[0],
        "macro_recall": macro[1],
        "macro_f1": macro[2],
        "brier": brier_score_loss(gold, p[:, 1] if n_labels == 2 else p, labels=list(range(n_labels))),
        "log_loss": log_loss(gold, p),
    }
    assert {name: value_of(name, found.statistics[name]) for name in expected} == pytest.approx(expected)
    details = by_label(gold.tolist(), found.predicted, [f"label {n}" for n in range(n_labels)])
    assert details["confusion_matrix"] == confusion_matrix(gold, predicted).tolist()
    f1 = [row["f1"] for row in details["labels"].values()]
    assert np.mean(f1) == pytest.approx(macro[2])


def test_a_label_that_does_not_occur_is_in_no_average() -> None:
    pairs = np.array([[0, 0], [0, 1], [2, 2], [2, 2]], float)
    macro = precision_recall_fscore_support([0, 0, 2, 2], [0, 1, 2, 2], labels=[0, 2], average="macro")
    found = [value_of(f"macro_{name}", pairs) for name in ("precision", "recall", "f1")]
    assert found == pytest.approx(macro[:3])


def test_calibration_is_that_of_sklearn() -> None:
    log_p, gold = probabilities(500, 3)
    found = classified(log_p, gold.tolist(), [1] * 3)
    confidence, hit = found.statistics["ece"].T
    accuracy, mean = calibration_curve(hit, confidence, n_bins=10)
    counts = np.histogram(confidence, np.linspace(0, 1, 11))[0]
    expected = (np.abs(accuracy - mean) * counts[counts > 0]).sum() / 500
    assert value_of("ece", found.statistics["ece"]) == pytest.approx(expected)


def test_length_normalization() -> None:
    """The likelihoods of a long right choice and of a short wrong one. A Chinese character has three bytes."""
    log_p = [np.array([-6.0, -4.0])]
    found = chosen(log_p, [0], [["中文字", "abcd"]], [[4, 2]]).statistics
    assert {name: rows[0, 0] for name, rows in found.items() if name != "gold_bits_per_byte"} == {
        "accuracy": 0.0,  # -6 < -4
        "accuracy_per_token": 1.0,  # -1.5 > -2
        "accuracy_per_byte": 1.0,  # -6/9 > -4/4
        "accuracy_per_character": 0.0,  # -2 < -1
    }
    assert value_of("gold_bits_per_byte", found["gold_bits_per_byte"]) == pytest.approx(6 / math.log(2) / 9)


# --- noise ---


def test_the_error_of_a_mean_is_the_known_one() -> None:
    hits = (np.arange(400) < 100).astype(float)[:, None]
    found = standard_error("accuracy", hits, seed=1)
    assert found == pytest.approx(
        math.sqrt(0.25 * 0.75 / 400), rel=0.1
    )  # 1,000 resamples: 2.2 % of the error
    assert found == standard_error("accuracy", hits, seed=1)
    assert math.isnan(standard_error("accuracy", hits[:1]))


def test_a_score_of_the_whole_is_resampled_as_a_whole() -> None:
    """The mean of the items' own ratios would be another figure."""
    pairs = np.array([[1.0, 1.0], [30.0, 10.0]])
    assert value_of("loss", pairs) == pytest.approx(31 / 11)
    assert set(np.round(resampled("loss", pairs), 9)) == set(np.round([1.0, 3.0, 31 / 11], 9))
