"""Tells lines of verse, lists, tables, formulas and programs from lines of menus.

The rules on lines by FineWeb look for flowing text. A poem breaks them as a menu does: its lines are short and few end
a sentence. What sets it apart is the form of its lines, which this module finds by their signs, without models.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from data_tools.stages.words import ends_sentence, has_sentence_end

BULLETS = "•-*●○▪■◆·‣◦–—"
_SHORT_CHARS, _SHORT_CHARS_UNSPACED = 30, 12
# Entries of menus have up to three words. Few lines of verse are that short, and few items of a list of instructions.
_MENU_SPACES, _MENU_CHARS_UNSPACED = 2, 6
_VERSE_CHARS, _VERSE_CHARS_UNSPACED = 50, 16
_VERSE_WORDS, _VERSE_WORDS_UNSPACED = 2.5, 5
_LEAST_LINES, _MOST_LINES = 3, 100
_INNER_CHARS, _PARAGRAPH_CHARS = 120, 250
_KEY_CHARS, _KEY_SPACES = 60, 3
# A line of verse, a row of a table, a formula or a line of a program may end so.
_OPEN_ENDS = frozenset(",;:—–-，；：、،؛|\\{}_=")
# Bullets, quotes, headings, numbers, numbered items and paragraphs, commands of TeX.
_BEGIN = re.compile(
    r"""[•●○▪■◆·‣◦–—§|\d\[<]
    |[-*+>$]\ |\#{1,6}\ |\\[a-zA-Z]|```
    |[(\[]?(?:[A-Za-z]|[ivxIVX]{1,5}|[一二三四五六七八九十]{1,3})[).、．](?:\s|[^\x00-\x7f])
    |第[一二三四五六七八九十百千\d]{1,6}[条條章节節回]
    """,
    re.VERBOSE,
)
# Columns, leaders of dots, blanks of forms, years from and to, signs of programs and formulas.
_INNER = re.compile(
    r"[\t{}\\`]|\ (?:\|\ |[=<>]=?\ |(?<=[^\s.!?:]\ )\ +\S)|\.{4}|_{3}|\((?<=\w\()\S*\)|[-=](?:>|(?<=\d{3}-)\d{3})"
    r"|–(?<=\d{3}–)\d{3}|::|</"
)
# Numbers without a word, as in dumps of bytes, have no form.
_BARE = re.compile(r"(?=.*\d)(?!.*(?:[^\W\d_]{3}|[\u3040-\uffef]))")
# One or more clauses of a Chinese poem.
_COUPLET = re.compile(r"(?:[\u3400-\u9fff\U00020000-\U0003ffff]{2,9}[，、；。！？,.!?]){1,4}[』」”]?$")


# Signs of grammar in Chinese and Japanese, which hardly occur in menus and names of goods.
_GRAMMAR = re.compile(r"[的了着著在是不他她它這这那有沒没就都也還还里\u3041-\u30ff]")


class Layout(NamedTuple):
    """Fractions of the lines of a text that are not blank."""

    formed: float
    """Lines with the form of verse, lists, tables, formulas or programs, whatever they end in."""
    terminal: float
    """Lines that end a sentence, are paragraphs in which one ends, have such a form, or go on in the next line, which
    begins with a small letter."""
    menu: float
    """Short lines that are none of these and have few words."""
    bullets: float
    """Lines that begin with a bullet and have few words."""
    loose: float
    """Number of lines without such a form; not a fraction."""


def layout(lines: list[str], unspaced: bool) -> Layout:
    """Classify the lines of `words.lines_of`; of many lines, `_MOST_LINES` evenly spaced ones."""
    if not lines:
        return Layout(0, 0, 0, 0, 0)
    if _is_open_verse(lines, unspaced):
        return Layout(1, 1, 0, 0, 0)
    n_formed = n_terminal = n_menu = n_bullets = 0
    short = _SHORT_CHARS_UNSPACED if unspaced else _SHORT_CHARS
    places = range(0, len(lines), -(-len(lines) // _MOST_LINES))
    for place in places:
        line = lines[place]
        n_chars = len(line)
        ends = ends_sentence(line)
        goes_on = not ends and place + 1 < len(lines) and lines[place + 1][0].islower()
        is_formed = (goes_on and n_chars <= _VERSE_CHARS) or (
            n_chars <= _PARAGRAPH_CHARS and _is_formed(line, unspaced)
        )
        n_formed += is_formed
        few_words = n_chars <= short and (
            n_chars <= _MENU_CHARS_UNSPACED if unspaced else line.count(" ") <= _MENU_SPACES
        )
        if is_formed or goes_on or ends or _is_paragraph(line, unspaced):
            n_terminal += 1
            n_bullets += few_words and line[0] in BULLETS
        else:
            n_menu += few_words
    formed = n_formed / len(places)
    return Layout(
        formed if unspaced or len(lines) >= _LEAST_LINES else 0,
        n_terminal / len(places),
        n_menu / len(places),
        n_bullets / len(places),
        (1 - formed) * len(lines),
    )


def _is_paragraph(line: str, unspaced: bool) -> bool:
    """Whether a line is long and a sentence ends inside it."""
    return len(line) > _INNER_CHARS // (1 + unspaced) and has_sentence_end(line, unspaced)


def _is_open_verse(lines: list[str], unspaced: bool) -> bool:
    """Whether a text is verse without punctuation in a script without capitals, as in Persian.

    In other scripts, the small letters at the beginnings of lines tell it from a list of headlines.
    """
    longest = _VERSE_CHARS_UNSPACED if unspaced else _VERSE_CHARS
    if len(lines) < 2 * _LEAST_LINES or max(map(len, lines)) > longest:
        return False
    if any(line[0].isupper() or line[0].islower() or not line[0].isalpha() for line in lines):
        return False
    if unspaced:
        n_words = (
            sum(map(len, lines)) if sum(map(bool, map(_GRAMMAR.search, lines))) >= 0.4 * len(lines) else 0
        )
        return n_words >= _VERSE_WORDS_UNSPACED * len(lines)
    return sum(line.count(" ") + 1 for line in lines) >= _VERSE_WORDS * len(lines)


def _is_formed(line: str, unspaced: bool) -> bool:
    has_sign = (
        line[-1] in _OPEN_ENDS
        or _BEGIN.match(line)
        or _has_key(line, ": ")
        or (len(line) <= _INNER_CHARS and _INNER.search(line))
        or (unspaced and (_has_key(line, "：") or (len(line) <= 2 * _VERSE_CHARS and _COUPLET.match(line))))
    )
    return bool(has_sign) and not (line[0].isdigit() and _BARE.match(line))


def _has_key(line: str, colon: str) -> bool:
    """Whether a line begins with a name or key and a colon, as in plays, dialogues and forms."""
    end = line.find(colon, 1, _KEY_CHARS)
    return end > 0 and line.count(" ", 0, end) <= _KEY_SPACES
