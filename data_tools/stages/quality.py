"""Rules on the quality of a document, after Gopher, C4 and FineWeb, which share one split into words.

They were made for flowing text on the web. Where they would drop good text of another form or script, they are changed,
and each threshold says how; docs/curation.md has what that does.

Sources: Gopher: Rae et al. 2021, appendix A1. C4: Raffel et al. 2020, section 2.2. FineWeb: Penedo et al. 2024,
section 3.6. Chinese thresholds of repetition: FineWeb2's for cmn_Hani (Penedo et al. 2025).
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from data_tools.record import CHINESE, CHINESE_TRADITIONAL, CODE, ENGLISH, Record, Signal
from data_tools.stages import junk
from data_tools.stages import words as text_of
from data_tools.stages.layout import layout
from data_tools.stages.web_prose import is_dialogue, is_law
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

_STOP_WORDS = {
    ENGLISH: frozenset("the be to of and that have with".split()),  # Gopher's eight
    CHINESE: frozenset("的了是在和有不为这就也与以其之对中年"),
    CHINESE_TRADITIONAL: frozenset("的了是在和有不為這就也與以其之對中年"),
}
_MANY_BLANK = re.compile(r"\n{3,}")
_ELLIPSES = ("...", "…", "。。。")
_LEADERS = re.compile(r"\.{7,}")
_DIGITS = re.compile(r"\d+")
# Languages without a sign for the end of a sentence.
_NO_FULL_STOP = ("th", "lo")
_FORMED, _PARTLY_FORMED = 0.5, 0.25
_LEAST_LINES, _MOST_LINES = 10, 100
_NOTICE_CHARS = 200
# Fewer characters in repeated runs (half as many without blanks), if less than a quarter of the text, are a name that a
# short article mentions again. The thresholds of Chinese were made for its short texts.
_LEAST_CHARS_AGAIN = 120
_BAD_PHRASES = (
    "javascript",
    *("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
    *("使用条款", "隐私政策", "使用條款", "隱私政策"),
)


class QualityMode(Enum):
    drop = "drop"
    annotate = "annotate"


@dataclass(kw_only=True, slots=True)
class ThresholdsConfig:
    """Bounds of one language, as fractions from 0 to 1 unless stated otherwise; null: the rule is not applied."""

    min_words: float | None = 50
    """Smallest number of words with a letter or digit (Chinese: characters). Gopher."""
    max_words: float | None = 100_000
    """Largest number of such words. Gopher."""
    min_mean_word_length: float | None = 3
    """Smallest mean number of characters per word, without punctuation. Gopher."""
    max_mean_word_length: float | None = 10
    """Largest mean number of characters per word. Gopher."""
    max_hash_ratio: float | None = 0.1
    """Largest number of # signs per word. Gopher."""
    max_ellipsis_ratio: float | None = 0.1
    """Largest number of ellipses per word. Gopher."""
    max_bullet_lines: float | None = 0.9
    """Largest fraction of lines that begin with a bullet. Gopher."""
    max_ellipsis_lines: float | None = 0.3
    """Largest fraction of lines that end with an ellipsis, of three lines or more. Gopher."""
    min_alpha_words: float | None = 0.75
    """Smallest fraction of words that contain a letter; numbers contain none. Gopher has 0.8 and counts signs too."""
    min_stop_words: float | None = 2
    """Smallest number of different stop words, in languages that have a list (English and Chinese). Gopher."""
    min_function_words: float | None = 0.12
    """Smallest fraction of words that are among the 90 most frequent ones (English only): prose has 0.2 to 0.5."""
    max_duplicate_lines: float | None = 0.3
    """Largest fraction of lines that repeat an earlier line. Gopher."""
    max_duplicate_paragraphs: float | None = 0.3
    """Largest fraction of paragraphs that repeat an earlier one. Gopher."""
    max_duplicate_paragraph_chars: float | None = 0.2
    """Largest fraction of characters in such paragraphs. Gopher."""
    max_top_2gram: float | None = 0.20
    """Largest fraction of characters in the most frequent run of 2 words (Chinese: 4 characters). Gopher."""
    max_top_3gram: float | None = 0.18
    """The same for runs of 3 words (Chinese: 6 characters)."""
    max_top_4gram: float | None = 0.16
    """The same for runs of 4 words (Chinese: 8 characters)."""
    max_duplicate_5gram: float | None = 0.15
    """Largest fraction of characters in repeated runs of 5 words (Chinese: 10 characters). Gopher."""
    max_duplicate_6gram: float | None = 0.14
    """The same for runs of 6 words (Chinese: 12 characters)."""
    max_duplicate_7gram: float | None = 0.13
    """The same for runs of 7 words (Chinese: 14 characters)."""
    max_duplicate_8gram: float | None = 0.12
    """The same for runs of 8 words (Chinese: 16 characters)."""
    max_duplicate_9gram: float | None = 0.11
    """The same for runs of 9 words (Chinese: 18 characters)."""
    max_duplicate_10gram: float | None = 0.10
    """The same for runs of 10 words (Chinese: 20 characters)."""
    min_sentences: float | None = None
    """Smallest number of sentences in the lines that C4 keeps. C4 has 5, which would drop half of the paragraphs of
    encyclopedias."""
    max_lorem_ipsum: float | None = 0.2
    """Largest fraction of words that belong to the usual filler (lorem ipsum). C4 allows no "lorem ipsum"."""
    max_curly_brackets: float | None = 0.1
    """Largest number of curly brackets per word. C4 allows none, which would drop formulas and manuals."""
    min_terminal_lines: float | None = 0.12
    """Smallest fraction of lines that end in terminal punctuation, go on in the next line, or have the form of verse,
    lists, tables, formulas or programs. FineWeb, which knows no forms."""
    max_short_lines: float | None = 0.67
    """Largest fraction of lines of at most 30 characters and three words (Chinese: 6 characters) that are none of
    these. FineWeb, which counts all short lines."""
    max_duplicate_line_chars: float | None = 0.1
    """Largest fraction of characters in repeated lines. FineWeb has 0.01, Gopher 0.2."""
    max_newline_ratio: float | None = 0.3
    """Largest number per word of lines without such a form. FineWeb, which counts all line ends."""
    max_template_line_chars: float | None = 0.5
    """Largest fraction of characters in lines that repeat an earlier line but for its numbers: logs, lists of hosts."""
    max_stock_phrases: float | None = 1.5
    """Largest number of different stock phrases beyond the third, per 100 words (Chinese: characters): cookie notices,
    error pages, tests for robots, offers, refusals of assistants."""
    max_garbled: float | None = 0.015
    """Largest number per character of letters that a wrong encoding has destroyed."""
    max_odd_pairs: float | None = 0.06
    """Largest fraction of articles and prepositions followed by a word that cannot follow them (English only)."""
    max_noise_words: float | None = 0.08
    """Largest number per word of signs and digits inside words, as scanners produce."""
    max_address_words: float | None = 0.2
    """Largest fraction of words that are names of hosts or pages."""
    min_classifier_score: float | None = None
    """Smallest score of `classifier_label` by the classifier, where one is given."""
    max_perplexity: float | None = None
    """Largest perplexity per word by the language model, where one is given."""


def other_thresholds() -> ThresholdsConfig:
    """Thresholds for other languages that are written with spaces: the English ones but for the lengths of words.

    Korean words have 2 to 3 characters on average, those of Tamil and Malayalam 8 to 11. Languages that write with
    fewer and longer words need fewer of them to say the same.
    """
    return ThresholdsConfig(min_words=40, min_mean_word_length=2, max_mean_word_length=14)


def chinese_thresholds() -> ThresholdsConfig:
    """Thresholds for Chinese, where words are characters: about 1.7 to a word, so figures per word are lower.

    Repetition and terminal punctuation are FineWeb2's. A text with a mean length above 4 is mostly Latin. Laws and
    minutes repeat their headings, so more repetition is allowed.
    """
    return ThresholdsConfig(
        min_words=80,
        max_words=170_000,
        min_mean_word_length=None,
        max_mean_word_length=4,
        max_hash_ratio=0.06,
        max_ellipsis_ratio=0.06,
        max_duplicate_lines=0.287,
        max_top_2gram=0.256,
        max_top_3gram=0.201,
        max_top_4gram=0.171,
        max_duplicate_5gram=0.198,
        max_duplicate_6gram=0.182,
        max_duplicate_7gram=0.167,
        max_duplicate_8gram=0.154,
        max_duplicate_9gram=0.14,
        max_duplicate_10gram=0.127,
        min_terminal_lines=0.106,
        max_newline_ratio=0.2,
    )


def formed_thresholds() -> ThresholdsConfig:
    """Thresholds for verse, lists, tables and formulas, in all languages: texts of which half of the lines have a form.

    Refrains and columns repeat themselves, tables consist of numbers, and a poem may have 20 words. Lines are judged as
    in prose, so a menu with bullets is still dropped.
    """
    return replace(
        code_thresholds(),
        min_words=20,
        max_words=170_000,
        max_bullet_lines=0.9,
        min_alpha_words=0.15,
        max_duplicate_lines=0.3,
        max_lorem_ipsum=0.2,
        max_short_lines=0.67,
        max_duplicate_line_chars=0.3,
        max_template_line_chars=0.5,
        max_stock_phrases=1.5,
        max_garbled=0.015,
        max_odd_pairs=0.15,
        max_address_words=0.2,
    )


def code_thresholds() -> ThresholdsConfig:
    """Thresholds for code: only repetition counts, against tables and generated code. 395 of SymPy's 398 files pass.

    In its median file, half of the words have no letter, half of the lines are short, and 17 % of the characters are
    in repeated runs of 5 words: the other rules, and Gopher's bounds, would drop good programs.
    """
    off = dict.fromkeys(threshold.name for threshold in fields(ThresholdsConfig))
    return ThresholdsConfig(
        **off
        | dict.fromkeys(("max_duplicate_lines", "max_duplicate_5gram", "max_duplicate_6gram"), 0.6)
        | dict.fromkeys(("max_duplicate_line_chars", "max_duplicate_7gram", "max_duplicate_8gram"), 0.5)
        | dict.fromkeys(("max_duplicate_paragraphs", "max_duplicate_9gram", "max_duplicate_10gram"), 0.5)
        | dict.fromkeys(("max_duplicate_paragraph_chars",), 0.3)
        | dict.fromkeys(("max_top_2gram", "max_top_3gram", "max_top_4gram"), 0.4)
    )


def curated_thresholds() -> ThresholdsConfig:
    """Thresholds for text that people chose: they drop only text that repeats itself or has hardly any letters.

    Of 10,033 encyclopedia entries, 59 plays and poems, 31,429 short Chinese reviews and 7,167 dialogues, the
    thresholds for the web drop 19, 5, 63 and 47 %, most for their length. These drop 0.01, 1.7, 0.4 and 0.5 %:
    repeated phrases, and one list of addresses. Of 53,762 documents of ten sources, all but three have letters in more
    than a quarter of their words; two of the three are tables of prices.
    """
    return replace(code_thresholds(), min_alpha_words=0.25)


@dataclass(kw_only=True, slots=True)
class QualityConfig:
    """Which documents are good enough, by thresholds that depend on the source, the script and the form of a text."""

    mode: QualityMode = QualityMode.drop
    """drop: drop documents that break a rule, and remove the lines that C4 drops; annotate: store the figures in the
    signals of the document, as `quality.<figure>`, and drop nothing."""
    english: ThresholdsConfig = field(default_factory=ThresholdsConfig)
    """Thresholds for English."""
    other: ThresholdsConfig = field(default_factory=other_thresholds)
    """Thresholds for other languages that are written with spaces."""
    chinese: ThresholdsConfig = field(default_factory=chinese_thresholds)
    """Thresholds for Chinese, simplified and traditional, and for other text without spaces between words."""
    formed: ThresholdsConfig = field(default_factory=formed_thresholds)
    """Thresholds for texts of which half of the lines have the form of verse, lists, tables or formulas."""
    code: ThresholdsConfig = field(default_factory=code_thresholds)
    """Thresholds for program code."""
    curated: ThresholdsConfig = field(default_factory=curated_thresholds)
    """Thresholds for documents of `curated_sources` in every language; code among them is judged by `code`."""
    curated_sources: list[str] = field(default_factory=list)
    """Sources that people chose (books, poems, reviews, reference works), by name or pattern such as `zh_*`; `*`: all.
    No lines are removed from their documents, neither by this stage nor by `boilerplate`."""
    remove_lines: bool = True
    """Remove the lines that C4 drops from documents that are kept; never from code, laws and dialogues, nor from texts
    of which a quarter of the lines have the form of verse, lists, tables or formulas."""
    require_terminal_punctuation: bool = False
    """Count lines without terminal punctuation among those that C4 drops; FineWeb found that this removes too much."""
    min_line_words: int = 3
    """Smallest number of words (text without spaces: characters) in a line that does not end a sentence. C4 drops every
    shorter line."""
    max_line_word_chars: int = 1000
    """Largest number of characters in a word; C4 drops lines with a longer word."""
    classifier_path: PathText | None = None
    """Path of your fastText model, which reads the text as one line; null: none."""
    classifier_label: str = "__label__hq"
    """The label whose probability is the score."""
    perplexity_path: PathText | None = None
    """Path of your KenLM model (ARPA or binary), over lower-case words as `words.py` splits them; null: none."""

    def __post_init__(self) -> None:
        for key in ("min_line_words", "max_line_word_chars"):
            if (value := getattr(self, key)) < 1:
                raise ConfigError(f"curation.quality.{key}={value} must be greater than 0")
        for language in ("english", "other", "chinese", "formed", "code", "curated"):
            thresholds = getattr(self, language)
            for rule in RULES:
                value, highest = getattr(thresholds, rule.field), None if rule.field in _UNBOUNDED else 1
                if value is not None and not 0 <= value <= (highest or math.inf):
                    raise ConfigError(
                        f"curation.quality.{language}.{rule.field}={value} must be "
                        + ("from 0 to 1" if highest else "0 or greater")
                    )
            for key, path in (
                ("min_classifier_score", "classifier_path"),
                ("max_perplexity", "perplexity_path"),
            ):
                if getattr(thresholds, key) is not None and getattr(self, path) is None:
                    raise ConfigError(
                        f"curation.quality.{language}.{key}={getattr(thresholds, key)} needs a model; "
                        f"give curation.quality.{path}=PATH"
                    )

    def is_curated(self, source: str) -> bool:
        """Whether people chose the documents of a source."""
        return any(fnmatchcase(source, pattern) for pattern in self.curated_sources)

    def thresholds(
        self, language: str, source: str = "", figures: Mapping[str, Signal] = MappingProxyType({})
    ) -> ThresholdsConfig:
        """The thresholds for a document of a language and a source whose text has these figures."""
        if language == CODE:
            return self.code
        if self.is_curated(source):
            return self.curated
        if float(figures.get("quality.formed_lines", 0)) >= _FORMED:
            return self.formed
        if text_of.is_chinese(language) or figures.get("quality.unspaced"):
            return self.chinese
        return self.english if language == ENGLISH else self.other


class Rule(NamedTuple):
    """One bound; its signal and reason follow from the name of its threshold."""

    field: str
    signal: str
    is_minimum: bool
    reason: str


def _rule(threshold: str) -> Rule:
    side, figure = threshold.split("_", 1)
    return Rule(
        threshold, f"quality.{figure}", side == "min", f"{'low' if side == 'min' else 'high'}_{figure}"
    )


RULES = [_rule(threshold.name) for threshold in fields(ThresholdsConfig)]
_UNBOUNDED = set(
    "min_words max_words min_mean_word_length max_mean_word_length min_stop_words min_sentences max_hash_ratio "
    "max_ellipsis_ratio max_newline_ratio max_curly_brackets max_stock_phrases max_noise_words max_perplexity".split()
)


def reasons(signals: Mapping[str, Signal], thresholds: ThresholdsConfig) -> list[str]:
    """The rules that a document breaks, by its figures. A missing figure breaks no rule."""
    found = []
    for threshold, signal, is_minimum, reason in RULES:
        bound, value = getattr(thresholds, threshold), signals.get(signal)
        if bound is not None and value is not None and (value < bound if is_minimum else value > bound):
            found.append(reason)
    return found


def _word_signals(text: str, lower: str, words: text_of.Split, language: str) -> dict[str, float]:
    """Figures on words. Signs are words where a figure says `per word`, as in datatrove, but not in `words`."""
    n_all = max(1, len(words.numbers))
    distinct_kinds = junk.kinds_of(words)
    kinds = distinct_kinds[words.numbers]
    present = int(np.bitwise_or.reduce(distinct_kinds, initial=0))

    def count(kind: int) -> int:
        return int(np.count_nonzero(kinds & kind)) if present & kind else 0

    n_words = count(junk.WORD)
    per_word = 1 / max(1, n_words)
    n_ellipses = sum(map((_LEADERS.sub("", text) if "......." in text else text).count, _ELLIPSES))
    figures = {
        "words": n_words,
        "mean_word_length": int(words.lengths[(kinds & junk.WORD) != 0].sum()) * per_word,
        "hash_ratio": text.count("#") / n_all,
        # the Chinese ellipsis consists of two signs
        "ellipsis_ratio": (n_ellipses - text.count("……")) / n_all,
        "alpha_words": count(junk.ALPHA) * per_word,
        "curly_brackets": (text.count("{") + text.count("}")) / n_all,
        "stock_phrases": junk.stock_phrases(lower, words, distinct_kinds, n_words),
        "lorem_ipsum": count(junk.FILLER) * per_word,
        "garbled": junk.garbled(text),
        "noise_words": junk.noise_words(text, n_words, n_all),
        "address_words": count(junk.HOST) * per_word,
    }
    if language == ENGLISH:
        figures["odd_pairs"], figures["function_words"] = (
            junk.odd_pairs(kinds, count(junk.LEFT)),
            count(junk.FUNCTION) * per_word,
        )
    if language in _STOP_WORDS:
        figures["stop_words"] = len(_STOP_WORDS[language].intersection(words.table))
    return figures


def _line_signals(text: str, lines: list[str], words: text_of.Split, language: str) -> dict[str, float]:
    """Figures on lines and paragraphs; blank lines do not count."""
    n_lines, n_chars = max(1, len(lines)), max(1, sum(map(len, lines)))
    paragraphs = text_of.paragraphs_of(text)
    n_again, chars_again = _again(lines)
    n_paragraphs_again, paragraph_chars_again = _again(paragraphs)
    # A log shows itself in a hundred lines, and fewer than ten are none; this spares most texts the work.
    head = lines[:_MOST_LINES] if n_lines >= _LEAST_LINES else []
    numberless = _DIGITS.sub("0", "\n".join(head)).split("\n")
    forms = layout(lines, words.unspaced)
    figures = {
        "formed_lines": forms.formed,
        "bullet_lines": forms.bullets,
        "ellipsis_lines": sum(line.endswith(_ELLIPSES) for line in lines) / n_lines if n_lines > 2 else 0,
        "short_lines": forms.menu,
        "newline_ratio": forms.loose / max(1, len(words.numbers)),
        "duplicate_lines": n_again / n_lines,
        "duplicate_line_chars": chars_again / n_chars,
        "template_line_chars": _again(numberless)[1] / max(1, sum(map(len, numberless))),
        "duplicate_paragraphs": n_paragraphs_again / max(1, len(paragraphs)),
        "duplicate_paragraph_chars": paragraph_chars_again / max(1, len(text)),
    }
    if language not in _NO_FULL_STOP:
        figures["terminal_lines"] = forms.terminal
    return figures


def _again(parts: list[str]) -> tuple[int, int]:
    """Number of parts that repeat an earlier one, and number of their characters."""
    distinct = set(parts)
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def measure(text: str, language: str, config: QualityConfig) -> tuple[dict[str, float], set[str]]:
    """All figures of a text, named `quality.<figure>`, and the lines that C4 drops."""
    lines = text_of.lines_of(text)
    lower = text.lower()
    words = text_of.split(text, language)
    bad = _bad_lines(lines, lower, words.unspaced, config)
    kept = [line for line in lines if line not in bad] if bad else lines
    n_chars = max(1, len(text))
    figures = _word_signals(text, lower, words, language)
    figures |= _line_signals(text, lines, words, language)
    least_chars_again = 0 if text_of.is_chinese(language) else _LEAST_CHARS_AGAIN // (1 + words.unspaced)
    figures |= {
        name: chars / n_chars if chars >= min(least_chars_again, n_chars / 4) else 0
        for name, chars in text_of.gram_chars(words).items()
    }
    figures["sentences"] = text_of.count_sentences(kept, words.unspaced)
    figures["unspaced"] = int(words.unspaced)
    return {"quality." + name: round(value, 5) if value else 0 for name, value in figures.items()}, bad


def _bad_lines(lines: list[str], lower: str, unspaced: bool, config: QualityConfig) -> set[str]:
    """Lines that C4 drops."""
    least, longest = config.min_line_words, config.max_line_word_chars
    if unspaced:
        bad = {line for line in lines if len(line) < least}
    else:
        bad = {line for line in lines if len(line.split(None, least - 1)) < least}
    bad = {line for line in bad if not text_of.ends_sentence(line)}
    bad |= {line for line in lines if len(line) > longest and max(map(len, line.split())) > longest}
    if config.require_terminal_punctuation:
        bad |= {line for line in lines if not text_of.ends_sentence(line) or line.endswith(_ELLIPSES)}
    if phrases := [phrase for phrase in _BAD_PHRASES if phrase in lower]:
        # longer ones are paragraphs, which C4 drops for a mention
        short = (line for line in lines if len(line) <= _NOTICE_CHARS)
        bad |= {line for line in short if any(phrase in line.lower() for phrase in phrases)}
    return bad


def _remove_lines(record: Record, bad: set[str]) -> None:
    """Remove lines. One of the blank lines around a removed line stays, so that paragraphs remain separate."""
    lines = record.text.split("\n")
    kept = [line for line in lines if line.strip() not in bad]
    record.text = _MANY_BLANK.sub("\n\n", "\n".join(kept)).strip("\n")
    record.count("quality.lines", len(lines) - len(kept))


class QualityStage:
    """Drops documents that break a rule, or records their figures."""

    name = "quality"

    def __init__(self, config: QualityConfig) -> None:
        self.config = config
        self._classifier: Any = None
        self._language_model: Any = None

    def process(self, record: Record) -> str | None:
        """Returns the first rule that the record breaks, as `low_<figure>` or `high_<figure>`."""
        signals, bad = measure(record.text, record.language, self.config)
        if self.config.classifier_path is not None:
            signals["quality.classifier_score"] = round(self._score(record.text), 5)
        if self.config.perplexity_path is not None:
            signals["quality.perplexity"] = round(self._perplexity(record.text, record.language), 2)
        if self.config.mode is QualityMode.annotate:
            record.signals.update(signals)
            return None
        if found := reasons(signals, self.config.thresholds(record.language, record.source, signals)):
            record.signals.update(
                signals
            )  # of the rejected document: data_tools.rejects tries other thresholds on them
            return found[0]
        if bad and self.config.remove_lines and not self._keeps_lines(record, signals):
            _remove_lines(record, bad)
        return None

    def _keeps_lines(self, record: Record, figures: Mapping[str, Signal]) -> bool:
        if record.language == CODE or self.config.is_curated(record.source):
            return True
        if float(figures["quality.formed_lines"]) >= _PARTLY_FORMED:
            return True
        return is_law(record.text) or is_dialogue(record.text)

    def _score(self, text: str) -> float:
        """Probability of the label, by the user's classifier."""
        if self._classifier is None:
            self._classifier = _load("classifier_path", self.config.classifier_path, "fasttext", "load_model")
            if self.config.classifier_label not in self._classifier.labels:
                raise ConfigError(
                    f"curation.quality.classifier_label={self.config.classifier_label} is no label of "
                    f"{self.config.classifier_path}; it has {', '.join(sorted(self._classifier.labels)[:20])}"
                )
        labels, scores = self._classifier.predict(text.replace("\n", " "), k=len(self._classifier.labels))
        return float(dict(zip(labels, scores, strict=True)).get(self.config.classifier_label, 0.0))

    def _perplexity(self, text: str, language: str) -> float:
        """Perplexity per word and line end, by the user's language model, which takes each line as a sentence."""
        if self._language_model is None:
            self._language_model = _load("perplexity_path", self.config.perplexity_path, "kenlm", "Model")
        lines = [text_of.words_of(line, language) for line in text_of.lines_of(text.lower())]
        log10 = sum(self._language_model.score(" ".join(words)) for words in lines)
        return 10 ** (-log10 / max(1, sum(map(len, lines)) + len(lines)))


def _load(key: str, path: str | None, package: str, loader: str) -> Any:
    """Load a model of the user. Raises ConfigError where its package or file is missing, or the file is no model."""
    if not Path(str(path)).is_file():
        raise ConfigError(f"curation.quality.{key}={path} is no file")
    try:
        return getattr(importlib.import_module(package), loader)(path)
    except ImportError as error:
        raise ConfigError(f"curation.quality.{key}={path} needs the package {package}; install it") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"curation.quality.{key}={path} cannot be read by {package}: {error}") from error
