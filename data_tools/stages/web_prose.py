"""Tells in which documents a line that many documents share is the page's and not the author's: prose from the web.

Elsewhere shared lines belong to the text: imports of programs, penalty clauses of laws, answers of an assistant,
refrains.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from data_tools.record import Record
from data_tools.stages.code_text import is_code

# Numbered clauses of laws and contracts, with the number before or after the word.
_CLAUSE = re.compile(
    r"""^[ \t\u3000]*(?:
     第\s?[〇零一二三四五六七八九十百千\d]{1,7}\s?[条條章节節编編款项項]
    |(?:article|art\.?|section|sec\.?|clause|rule|artikel|artículo|artigo|articolo|paragraf|статья|ст\.)\s?
       (?:\d|[IVXLC]+\b|premier\b)
    |§{1,2}\s?\d|제\s?\d+\s?조|\(?\d{1,3}(?:\.\d{1,3}){1,3}[.)]?\s
    )""",
    re.X | re.M | re.I,
)
_TURN = re.compile(r"^[ \t]*([^\W\d_][\w .'’-]{0,24}|Q|A)\s?[:：]", re.M)
_FEWEST_CLAUSES = 3
_FEWEST_TURNS = 4
_SHARE = 1 / 3
"""Fraction of the lines that begin with a clause's number or a speaker's name, in a law or dialogue that is short."""


def is_web_prose(record: Record, web_sources: list[str]) -> bool:
    """Whether a document is a web page (it has an address, or its source is one of `web_sources`) of prose.

    Code, laws and dialogues are not, told by their text.
    """
    is_page = record.url is not None or any(fnmatchcase(record.source, name) for name in web_sources)
    return is_page and not (is_law(record.text) or is_dialogue(record.text) or is_code(record))


def is_law(text: str) -> bool:
    """Whether three lines, or a third of the lines, begin with the number of a clause."""
    n_clauses = sum(1 for _ in _CLAUSE.finditer(text))
    return n_clauses >= _FEWEST_CLAUSES or n_clauses >= max(1, _SHARE * _n_lines(text))


def is_dialogue(text: str) -> bool:
    """Whether the lines begin with names of speakers: all of them, or a third, where speakers have several turns."""
    turns, n_lines = _TURN.findall(text), _n_lines(text)
    if len(turns) == n_lines > 1:
        return True
    has_turns = len(turns) >= _FEWEST_TURNS and 2 * len(set(turns)) <= len(turns)
    return has_turns and len(turns) > _SHARE * n_lines


def _n_lines(text: str) -> int:
    return sum(1 for line in text.split("\n") if line.strip())
