"""Detects the language of a document offline: code by its form, Chinese by its characters, others by a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.record import CHINESE, CHINESE_TRADITIONAL, CODE, UNKNOWN, Record
from data_tools.stages.code_text import is_code_text
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

Identified = tuple[str, float]

_CODE_KEY = re.compile(r"[a-z]{2,3}|zh-hant|code")
# The language is detected from the beginning and the middle, so that long documents take no more time.
_PIECE_CHARS = 1000
_KANA_SHARE = 0.1
_SCORE_DIGITS = 3

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile(r"[\u3041-\u30fa\u30fd-\u30ff\uff66-\uff9d]")
_HANGUL = re.compile(r"[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
_OTHER_WORD = re.compile(
    r"[^\W\d_\u1100-\u11ff\u3041-\u30ff\u3131-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9d]+"
)

_ADDRESS = re.compile(r"(?:https?://|www\.)[!-~]+")
_EAST_ASIAN = frozenset({"zh", "wuu", "yue", "ja", "ko"})
_PRIOR = {"en": 20.0, **dict.fromkeys("de es fr it nl pl pt ru tr".split(), 5.0)}

# Three-letter codes of models as two-letter ones, and the Chinese languages, which are distinguished by script.
_SAME = {"eng": "en", "jpn": "ja", "kor": "ko", "fra": "fr", "deu": "de", "spa": "es", "rus": "ru"}
_CHINESE_LABELS = frozenset({"zh", "zho", "cmn", "yue", "wuu", "lzh"})


@dataclass(kw_only=True, slots=True)
class LanguageConfig:
    """Which languages are kept, and how they are detected."""

    model_path: PathText | None = None
    """Path of a fastText model such as lid.176.bin; null: count scripts, then use the model of py3langid."""
    keep: list[str] = field(default_factory=list)
    """Codes of languages to keep (`zh` is simplified Chinese, `zh-hant` traditional, `code`, `und` where there
    are no letters); other documents are dropped. Empty: all are kept."""
    min_score: float = 0.0
    """Documents with a lower score (0 to 1) are dropped as unsure; 0: none are."""

    def __post_init__(self) -> None:
        for code in self.keep:
            if not _CODE_KEY.fullmatch(code):
                raise ConfigError(
                    f"curation.language.keep has {code!r}; allowed are codes of two or three letters, "
                    "zh-hant and code"
                )
        if not 0 <= self.min_score <= 1:
            raise ConfigError(f"curation.language.min_score={self.min_score} is outside 0 to 1")


class LanguageStage:
    """Sets `record.language` and the signal `language.score`, rounded to 3 digits.

    Code has the score 1, and so has a text that is entirely in the script of one language.
    """

    name = "language"

    def __init__(self, config: LanguageConfig) -> None:
        self._config = config
        self._identify: Callable[[str], Identified] | None = None
        if config.model_path is not None and not Path(config.model_path).is_file():
            raise ConfigError(
                f"curation.language.model_path={config.model_path} is no file; give a fastText model, or null"
            )

    def process(self, record: Record) -> str | None:
        """Returns `other_language` where the language is not kept, `unsure` where the score is below min_score."""
        record.language, score = self._language(record)
        record.signals["language.score"] = round(score, _SCORE_DIGITS)
        if self._config.keep and record.language not in self._config.keep:
            return "other_language"
        return "unsure" if record.signals["language.score"] < self._config.min_score else None

    def _language(self, record: Record) -> Identified:
        if is_code_text(record.text, record.id):
            return CODE, 1.0
        piece = _pieces(record.text, _PIECE_CHARS)
        if self._identify is None:  # the model is loaded at the first document
            path = self._config.model_path
            self._identify = _packaged() if path is None else _fasttext(path)
        language, score = self._identify(piece)
        if language == CHINESE and is_traditional(piece):
            language = CHINESE_TRADITIONAL
        return language, score


def is_traditional(text: str) -> bool:
    """Whether a Chinese text has more characters of only traditional writing than of only simplified writing."""
    simplified, traditional = _one_sided_characters()
    in_text = _HAN.findall(text)
    return sum(map(traditional.__contains__, in_text)) > sum(map(simplified.__contains__, in_text))


@cache
def _one_sided_characters() -> tuple[frozenset[str], frozenset[str]]:
    """Characters that are in only one of the standards GB 2312 (1980, simplified) and Big5 (1984, traditional).

    Rare characters of names are in Big5 only: 0.002 % of the Han characters of simplified news, whereas
    30 % are in GB 2312 only. Most characters are in both.
    """
    han = map(chr, range(0x4E00, 0xA000))
    in_gb, in_big5 = {}, {}
    for char in han:
        in_gb[char] = bool(char.encode("gb2312", "ignore"))
        in_big5[char] = bool(char.encode("big5", "ignore"))
    simplified = frozenset(c for c in in_gb if in_gb[c] and not in_big5[c])
    return simplified, frozenset(c for c in in_gb if in_big5[c] and not in_gb[c])


def by_script(text: str) -> Identified | None:
    """Chinese, Japanese or Korean where at least half of the words are theirs; one character counts as one word.

    The score is that fraction. For other languages, the result is None.
    """
    if text.isascii():
        return None
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    east_asian = han + kana + hangul
    words = east_asian + len(_OTHER_WORD.findall(text))
    if not east_asian or east_asian < words / 2:
        return None
    share = east_asian / words
    if hangul > han + kana:
        return "ko", share
    return ("ja" if _is_japanese(text, han, kana) else CHINESE), share


def _is_japanese(text: str, han: int, kana: int) -> bool:
    """Whether a text of Han characters and kana is Japanese.

    A title or an official text may have less than a tenth of kana. Then it is Japanese if it has no character that
    Japanese lacks: every longer Chinese text has some, such as 们 or 說.
    """
    if not kana or kana >= _KANA_SHARE * (han + kana):
        return kana > 0
    try:
        "".join(_HAN.findall(text)).encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True


def _pieces(text: str, chars: int) -> str:
    """The beginning and the middle of a long text, `chars` characters each."""
    if len(text) <= 2 * chars:
        return text
    middle = len(text) // 2
    return text[:chars] + "\n" + text[middle : middle + chars]


def _packaged() -> Callable[[str], Identified]:
    """Detect by script first, then by a model. Where the script decides for all texts, the model, which takes half a
    second to load, is never loaded."""
    by_model = cache(_naive_bayes)

    def identify(text: str) -> Identified:
        text = _ADDRESS.sub(" ", text)
        found = by_script(text)
        if found is not None:
            return found
        return by_model()(text) if any(map(str.isalpha, text)) else (UNKNOWN, 0.0)

    return identify


def _naive_bayes() -> Callable[[str], Identified]:
    """Detect by the naive Bayes model in the wheel of py3langid.

    The package sums in single precision, in an order that depends on the processor's BLAS. Here sums are in double
    precision, so that differences between machines are far below the digits of the score. On short texts, rare
    languages would win by chance, so there is a prior for the large languages of the web (W3Techs, 2024: English has
    half of it, the others 1 to 7 % each).
    """
    import numpy as np
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model: Any = LanguageIdentifier.from_model_file(MODEL_FILE)
    features_of = _features_by(model)
    # Stored in half precision, from which a processor converts ten times as slowly.
    table = model.nb_ptc.astype(np.float32)
    log1p = np.array(
        [math.log1p(n) for n in range(len(_pieces(" " * 3 * _PIECE_CHARS, _PIECE_CHARS)) * 4 + 1)]
    )
    prior = model.nb_pc.astype(np.float64)

    def identify(text: str) -> Identified:
        encoded = (text.lower() if text.isupper() else text).encode("utf-8", "replace")
        # A word as short as `No.` may have nothing that the model knows: then the prior decides, with a low score.
        counts = Counter(features_of(encoded))
        weights = log1p[np.fromiter(counts.values(), np.int64, len(counts))]
        # Divide by the square root of the length, as the package does to calibrate probabilities.
        raw = weights @ table[np.fromiter(counts, np.int64, len(counts))].astype(np.float64) + prior
        scores = (raw / math.sqrt(len(encoded))).tolist()
        best = max(scores)  # subtracted below, so that exp cannot overflow
        odds: dict[str, float] = {}
        for label, score in zip(model.nb_classes, scores, strict=True):
            if label not in _EAST_ASIAN:  # by_script has ruled these out already
                odds[label] = odds.get(label, 0.0) + math.exp(score - best) * _PRIOR.get(label, 1.0)
        label = max(odds, key=odds.__getitem__)
        return _code_of(label), odds[label] / sum(odds.values())

    return identify


def _features_by(model: Any) -> Callable[[bytes], list[int]]:
    """A function that finds the features of a text: the short strings of bytes that the model knows.

    The automaton of the model takes a step per byte. Its state tells no more than the last few bytes, so here it runs
    over these few bytes from each place on, at all places of the text at once.
    """
    import numpy as np

    following = np.asarray(model.tk_nextmove)
    rows = np.asarray(model.tk_row).astype(np.int64) << 8
    output = np.array(model.tk_output, np.int32)
    # The longest string that a state stands for: each round follows the states that one more byte leads to. States
    # with the same row go on alike, so each row is followed once.
    by_row, is_followed, n_bytes = following.reshape(-1, 256), np.zeros(len(following) >> 8, bool), 0
    is_reached = np.zeros(len(rows), bool)
    new = np.zeros(1, np.int64)
    while len(new):
        n_bytes += 1
        before = is_reached.copy()
        is_followed[new] = True
        is_reached[by_row[new]] = True
        new = np.unique(rows[is_reached & ~before] >> 8)
        new = new[~is_followed[new]]

    def features(text: bytes) -> list[int]:
        codes = np.frombuffer(text, np.uint8)
        states = np.zeros(len(codes), np.uint32)
        for begin in range(min(n_bytes, len(codes)) - 1, -1, -1):
            states[begin:] = following[rows[states[begin:]] + codes[: len(codes) - begin]]
        found = output[states]
        return found[found >= 0].tolist()

    return features


def _fasttext(path: str) -> Callable[[str], Identified]:
    """Detect by the user's model; the score is the probability of its first label."""
    try:
        import fasttext
    except ImportError as error:
        raise ConfigError(
            "curation.language.model_path needs fasttext: pip install fasttext-numpy2-wheel"
        ) from error
    try:
        model = fasttext.load_model(path)
    except ValueError as error:
        raise ConfigError(f"curation.language.model_path={path} is no fastText model: {error}") from error

    def identify(text: str) -> Identified:
        if not any(map(str.isalpha, text)):
            return UNKNOWN, 0.0
        labels, scores = model.predict(" ".join(text.split()))
        return (
            (_code_of(labels[0].removeprefix("__label__")), min(float(scores[0]), 1.0))
            if labels
            else (UNKNOWN, 0.0)
        )

    return identify


def _code_of(label: str) -> str:
    """The ISO 639-1 code of a label where there is one; a script after it (`eng_Latn`) is removed."""
    label = label.split("_")[0].lower()
    if label in _CHINESE_LABELS:
        return CHINESE
    return UNKNOWN if label == "zxx" else _SAME.get(label, label)
