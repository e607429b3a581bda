"""data_tools/stages/layout.py: lines of verse, lists, tables and programs are told from lines of menus."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.stages.layout import layout
from data_tools.stages.words import lines_of

FORMED = [
    "Rough winds do shake the darling buds of May,",
    "- a map of the area",
    "12. Fold the paper",
    "(b) any ditch or drain",
    "§ 12 Definitions",
    "ROMEO: I take thee at thy word",
    "Capital: Reykjavik",
    "| Mars | 6,792 |",
    "January      78 mm",
    "Paris\tFrance",
    "Pea soup ...... 4.80",
    "Surname: ________",
    r"\begin{proof}",
    "queue.push(3)",
    "Johann Christian (1735-1782)",
    "## Usage",
    "第十二条 警衔",
]
MENU = ["Home", "About us", "Terms of use", "$20.99", "Add to cart", "Next page"]


@pytest.mark.parametrize("line", FORMED)
def test_a_line_with_a_form(line: str) -> None:
    assert layout([line] * 3, False).formed == 1


@pytest.mark.parametrize(
    "line", [*MENU, "Man bites dog in Texas town", "000000d0  8f 00 1b 2c", "He came home."]
)
def test_a_line_without_a_form(line: str) -> None:
    assert layout([line] * 3, False).formed == 0


def test_a_menu() -> None:
    found = layout(MENU, False)
    assert (found.menu, found.terminal, found.loose) == (1, 0, len(MENU))


def test_a_line_goes_on_where_the_next_begins_small() -> None:
    long = "A line of a book that was wrapped at about seventy characters, as mails were"
    found = layout([long, "written before windows had widths", "The end"], False)
    assert found.terminal == pytest.approx(1 / 3)
    assert found.formed == 0, "wrapped prose is longer than verse"
    keywords = ["how to buy phones in Austin.", "where to have rings in Dallas.", "what to do in Reno."]
    assert layout(keywords, False).formed == 0, "a sentence does not go on"


def test_verse_without_signs_in_a_script_without_capitals() -> None:
    verse = ["که عشق آسان نمود اول ولی", "به بوی نافه‌ای کاخر صبا", "ز تاب جعد مشکینش چه خون"] * 2
    assert layout(verse, False).formed == 1
    assert layout(["سلام", "خانه", "تماس با ما"] * 2, False).formed == 0
    assert layout(["Man bites dog in Texas"] * 6, False).formed == 0


def test_many_lines_are_sampled() -> None:
    lines = ["- one of them", "Plain words without any sign here"] * 50_000
    assert layout(lines, False).formed in (0, 0.5, 1)  # evenly spaced lines
    assert layout(lines[:100], False).formed == 0.5


@given(st.text("aA1 .,|-·\n我，。的", max_size=200), st.booleans())
def test_fractions_are_fractions(text: str, unspaced: bool) -> None:
    lines = lines_of(text)
    found = layout(lines, unspaced)
    assert all(0 <= value <= 1 for value in found[:-1])
    assert 0 <= found.loose <= len(lines)
    assert found.menu + found.terminal <= 1 + 1e-9
