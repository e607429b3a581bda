"""Tells program code from prose by the content of a text, whatever language its comments are in.

A text is cut into tokens: keywords of common languages, shapes of other words (`w` a lower-case word, `W` one that
begins with a capital letter, `w_w` one with an underscore, ...), numbers, signs, line ends and indentation. A
linear model weighs runs of one to three tokens; letters themselves hardly count. `benchmarks/train_code_model.py`
trained it and says on which text. Everything is integer arithmetic up to one square root, so that every machine
decides the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from data_tools.record import CODE, UNKNOWN, Record

MODEL = Path(__file__).with_name("code_model.tsv")
# The beginning and the middle of a text are read: a source file may begin with pages of license and documentation.
PIECE_CHARS = 2000
_ADDRESS = re.compile(r"https?://[!-~]+")
# Nearly all prose has fewer of these signs, and is ruled out by counting them.
_SIGN = re.compile(r"[=(){}\[\];<>@#/_|$*+\\~&%`:\"]|\n[ \t]")
_CHARS_PER_SIGN = 60
# A text whose id is the name of a source file is code at a lower score, and also where it begins with such a comment:
# it may hold nothing but documentation.
_NAMED_SCORE = -1.5
_COMMENTS = ("//", "/*", '"""', "'''", "--", "(*", "{-", "#!")

_NAME = re.compile(r"[^\s]*\w\.(\w{1,5})(?::\d+)?")
_SUFFIXES = frozenset(
    "c cc cpp cs css cu cuh cxx f90 go h hpp hs java jl js jsx kt lua m ml php pl pm ps1 py pyi pyx r rb rs "
    "scala sh sql swift ts tsx vue zig".split()
)

_KEYWORDS = frozenset(
    """
    alter and as assert async await begin bool break by case catch char class cond const continue create data
    def default defer defun delete deriving do done double drop echo elif else elsif end enum esac except export
    extends extern extends false fi final finally float fn for foreach from func function go group if impl import in
    include inline insert instance int interface into is join lambda let library local loop match mod module mut my
    namespace new nil not null on or order our package pass print printf println private protected pub public puts
    raise require return select self set setq static string struct sub switch table template then this throw trait
    true try type typedef union unless unsigned update use using values var void when where while with yield
    """.split()
)
_TOKEN = re.compile(r"\n[ \t]*|[ \t]+|[0-9][\w.]*|\w+|\S|\s")


def is_code(record: Record) -> bool:
    """Whether a document is program code, also for stages that run before the language is detected."""
    if record.language != UNKNOWN:
        return record.language == CODE
    return is_code_text(record.text, record.id)


def is_code_text(text: str, id: str = "") -> bool:
    """Whether a text is program code: source, queries, markup, style sheets, configuration, patches.

    Prose on programming, with examples in it, is not. An id that is the name of a source file counts only where the
    text agrees: a host name or a title may end in `.pl` or `.js` too.
    """
    is_named = is_code_name(id)
    if is_named and text.lstrip("\ufeff \t\r\n").startswith(_COMMENTS):
        return True
    piece = piece_of(text)
    if len(_SIGN.findall(piece)) * _CHARS_PER_SIGN < len(piece) or not any(map(str.isalpha, piece)):
        return False
    return score(piece) > (_NAMED_SCORE if is_named else 0)


def is_code_name(id: str) -> bool:
    """Whether an id is the name of a source file. Addresses do not count: pages end in .php as well."""
    name = _NAME.fullmatch(id)
    return name is not None and name[1].lower() in _SUFFIXES and "://" not in id


def score(text: str) -> float:
    """The logarithm of the odds that a text is code."""
    weights, bias = _model()
    total = squares = 0
    for gram, n in grams(text).items():
        if (weight := weights.get(gram)) is not None:
            value = n.bit_length()
            total += weight * value
            squares += value * value
    return (total / math.sqrt(squares) if squares else 0.0) / WEIGHT_SCALE + bias / WEIGHT_SCALE


WEIGHT_SCALE = 100
"""Weights are stored as whole numbers, in hundredths."""


def grams(text: str) -> Counter[tuple[str, ...]]:
    """How often each run of one, two and three tokens occurs."""
    tokens = tokens_of(text)
    found: Counter[tuple[str, ...]] = Counter(zip(tokens, strict=True))
    found.update(pairwise(tokens))
    found.update(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return found


def tokens_of(text: str) -> list[str]:
    """The tokens of a text. None of them has white space in it."""
    return list(map(_shape, _TOKEN.findall(f"\n{text}")))


@lru_cache(maxsize=1 << 16)
def _shape(token: str) -> str:
    first = token[0]
    if first == "\n":
        return "NL" if len(token) == 1 else "NL+"
    if first.isspace():
        return "SP" if len(token) == 1 else "SP+"
    if first in "0123456789":
        return "0"
    if not first.isalnum() and first != "_":
        return first if first.isascii() else "sign"
    if token.lower() in _KEYWORDS:
        return "W" if token.istitle() else token
    if "_" in token:
        return "w_w"
    if any(map(str.isdigit, token)):
        return "w0"
    if token.islower():
        return "w"
    if token.isupper():
        return "WW" if len(token) > 1 else "W"
    if token.istitle():
        return "W"
    return "wW" if token.isascii() else "word"  # Chinese and other scripts have no upper case


def piece_of(text: str) -> str:
    """The part of a text that is judged: without blocks of Markdown and addresses, its beginning and its middle."""
    if "```" in text:
        text = _without_fenced(text)
    if len(text) > 2 * PIECE_CHARS:
        middle = len(text) // 2
        text = text[:PIECE_CHARS] + "\n" + text[middle : middle + PIECE_CHARS]
    return _ADDRESS.sub("address", text) if "://" in text else text


def _without_fenced(text: str) -> str:
    kept, is_fenced = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif not is_fenced:
            kept.append(line)
    return "\n".join(kept)


@cache
def _model() -> tuple[dict[tuple[str, ...], int], int]:
    """Weight of each run of tokens, and the weight of the empty one, which every text has."""
    weights = dict(_parsed(MODEL.read_text(encoding="utf-8").splitlines()))
    return weights, weights.pop(())


def _parsed(lines: Iterable[str]) -> Iterable[tuple[tuple[str, ...], int]]:
    for line in lines:
        weight, _, run = line.partition("\t")
        yield tuple(run.split()), int(weight)
