"""data_tools/stages/junk.py: the kinds of words, and signs that stay silent on one mention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.stages import junk
from data_tools.stages.harm import read_list
from data_tools.stages.words import split

LISTS = Path(junk.__file__).parent / "stock_phrases"


def kinds(word: str) -> int:
    return int(junk.kinds_of(split(word, "en"))[0])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("river", junk.WORD | junk.ALPHA),
        ("हिन्दी", junk.WORD | junk.ALPHA),
        ("1987", junk.WORD),
        ("...", 0),
        ("of", junk.WORD | junk.ALPHA | junk.LEFT | junk.RIGHT | junk.FUNCTION),
        ("The", junk.WORD | junk.ALPHA | junk.LEFT | junk.FUNCTION),
        ("consectetur", junk.WORD | junk.ALPHA | junk.FILLER),
        ("example.com", junk.WORD | junk.ALPHA | junk.HOST),
        ("3.14", junk.WORD),
    ],
)
def test_kinds_of_words(word: str, expected: int) -> None:
    assert kinds(word) & ~junk.KEY == expected


@given(st.text(min_size=1))
def test_a_word_has_a_letter_if_and_only_if_its_kind_says_so(text: str) -> None:
    words = split(text, "en")
    for word, kind in zip(words.table, junk.kinds_of(words).tolist(), strict=True):
        assert bool(kind & junk.ALPHA) == any(map(str.isalpha, word))
        assert bool(kind & junk.WORD) == any(map(str.isalnum, word))


def phrases(text: str, language: str = "en") -> float:
    words = split(text, language)
    return junk.stock_phrases(text.lower(), words, junk.kinds_of(words), len(words.numbers))


def test_three_phrases_are_spared() -> None:
    filler = "The painter came to the village in the spring of that year. " * 4
    some = filler + 'Signs said "buy now", "money back guarantee" and "limited time only".'
    assert phrases(some) == 0
    assert phrases(some + " Click here, add to cart, free shipping, don’t miss out.") > 1
    assert phrases("加微信，正品保证，先到先得。", "zh") == 0
    assert phrases("加微信，正品保证，先到先得，全国包邮，厂家直销。", "zh") == 4


def test_every_phrase_is_found_by_its_own_list() -> None:
    for phrase in read_list(str(LISTS / "latin.txt")):
        assert junk._latin()[0].search(phrase), phrase
    for phrase in read_list(str(LISTS / "chinese.txt")):
        assert len(phrase) > 2
        assert junk._chinese().search(phrase), phrase


def test_garbled_letters() -> None:
    assert junk.garbled("Der Fluß fließt über Köln, «voilà», l’été, São João, NÃO, 5 × 2") == 0
    assert junk.garbled("USÄ “Å” – Ñandú") == 0
    assert junk.garbled("横浜港は東京の南にある。") == 0
    for good in ("Größe für Bücher", "été à l’hôtel", "Привет мир"):
        for encoding in ("latin-1", "cp1252"):
            assert junk.garbled(good.encode().decode(encoding, "replace")) > 0.1


def test_odd_pairs_need_three() -> None:
    def pairs(text: str) -> float:
        words = split(text, "en")
        found = junk.kinds_of(words)[words.numbers]
        return junk.odd_pairs(found, int(np.count_nonzero(found & junk.LEFT)))

    assert pairs("the of a is") == 0
    assert pairs("the of a is with and the house") == 0.6  # three of five: the, of, a, with, the
    assert pairs("the house of the man is by the river and at the end") == 0


def test_noise_is_looked_for_where_signs_are_many() -> None:
    assert junk.noise_words("r,d ba:e inv1ls ;etal", 4, 9) == 1
    assert junk.noise_words("r,d ba:e inv1ls ;etal", 9, 9) == 0
    assert junk.noise_words("At 10:30 he said: yes, H2O and e.g. 3,000 (see p.5).", 10, 20) <= 0.1
