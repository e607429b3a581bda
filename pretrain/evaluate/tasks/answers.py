"""Compares written answers with references: BLEU, chrF, ROUGE, exact match and the F1 of shared words."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pretrain.evaluate.scores import Array, lacks, sacrebleu_metric
from pretrain.evaluate.tasks.task import Language, Metric

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Han, kana and hangul, of which each character is a unit, and runs of other letters and digits.
_HAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323ff"
_UNITS = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")


def statistics_of(
    metric: Metric, language: Language, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Array]:
    """The statistics [items, k] of the answers by the name of a score. Each answer has one reference or more.

    Raises ConfigError where the package of the metric is not installed.
    """
    match metric:
        case Metric.BLEU | Metric.CHRF:
            return {metric.value: _sacrebleu(metric.value, language, answers, references)}
        case Metric.ROUGE:
            return _rouge(language, answers, references)
        case Metric.EXACT_MATCH:
            return {metric.value: _best(exact_match, language, answers, references)}
        case Metric.F1:
            return {metric.value: _best(token_f1, language, answers, references)}


def _sacrebleu(
    name: str, language: Language, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Array:
    metric = sacrebleu_metric(name, language.value)
    most = max(map(len, references))
    # sacrebleu wants the first references of all items, then the second ones, with None for a missing one.
    columns = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    return np.array(metric._extract_corpus_statistics(answers, columns), np.float64)


def _rouge(
    language: Language, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Array]:
    try:
        from rouge_score import rouge_scorer  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise lacks(error, "rouge") from error
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(names, tokenizer=_ChineseUnits() if language is Language.ZH else None)
    rows = [scorer.score_multi(row, answer) for answer, row in zip(answers, references, strict=True)]
    return {name: np.array([[row[name].fmeasure] for row in rows]) for name in names}


class _ChineseUnits:
    """A tokenizer for rouge-score, whose own one keeps nothing but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return units(text)


def units(text: str) -> list[str]:
    """The Chinese characters of a text, and its words in other scripts, without signs and case."""
    return _UNITS.findall(text.lower())


def _best(
    score: Callable[[str, str, Language], float],
    language: Language,
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Array:
    """The score against the reference that fits best."""
    pairs = zip(answers, references, strict=True)
    return np.array([[max(score(answer, one, language) for one in row)] for answer, row in pairs])


def normalized(text: str, language: Language) -> str:
    """Without case and signs; English without articles and with single spaces (SQuAD), Chinese without spaces."""
    text = text.lower()
    if language is Language.ZH:
        return "".join(c for c in text if unicodedata.category(c)[0] not in "PSZC")
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str, language: Language) -> float:
    """1 where both are the same once they are normalized, else 0."""
    return float(normalized(answer, language) == normalized(reference, language))


def token_f1(answer: str, reference: str, language: Language) -> float:
    """The harmonic mean of precision and recall of the answer's words, or of its characters in Chinese (SQuAD)."""
    split: Callable[[str], Any] = units if language is Language.ZH else str.split
    found, wanted = split(normalized(answer, language)), split(normalized(reference, language))
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * shared / (len(found) + len(wanted))
