"""data_tools/text.py: what a word consists of, in scripts with combining marks."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.text import MARKS, UNSPACED, WORD, WORD_END, WORD_START, clean, clean_all, has_marks

# One sentence in scripts with marks: Hindi, Bengali, Tamil, Telugu, pointed Hebrew, pointed Arabic, Persian, Yoruba.
MARKED = [
    "हिन्दी विश्व की एक प्रमुख भाषा है",
    "বাংলা ভাষা দক্ষিণ এশিয়ার একটি ভাষা",
    "தமிழ் மொழி ஒரு செம்மொழி ஆகும்",
    "తెలుగు భాష ఒక ద్రావిడ భాష",
    "בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "بِسْمِ اللَّهِ الرَّحْمَنِ",
    "می‌خواهم کتاب‌ها را بخوانم",
    "ẹ̀kọ́ jẹ́ ọ̀nà",
]


@pytest.mark.parametrize("text", MARKED)
def test_marks_and_joiners_belong_to_their_word(text: str) -> None:
    assert re.findall(rf"\w[{WORD}]*", text) == text.split()
    assert re.findall(rf"{WORD_START}\w.*?{WORD_END}", text) == text.split()
    assert has_marks(text)


def test_every_mark_and_nothing_else() -> None:
    everything = "".join(map(chr, range(0x110000)))
    found = set(re.findall(f"[{MARKS}]", everything))
    assert found == {character for character in everything if unicodedata.category(character)[0] == "M"}


@given(st.text())
def test_a_text_without_marks_has_the_same_words_either_way(text: str) -> None:
    if not has_marks(text):
        assert re.findall(rf"\w[{WORD}]*", text) == re.findall(r"\w+", text)


def test_scripts_without_spaces() -> None:
    assert re.fullmatch(f"[{UNSPACED}]+", "ภาษาไทยພາສາမြန်မာភាសាひらカタﾊﾝ漢𠮷")
    assert not re.search(f"[{UNSPACED}]", "한국어 हिन्दी አማርኛ ქართული Tiếng Việt")


@given(
    st.lists(
        st.text(st.sampled_from("ab \n\r\t\0\x85\ufeff\ud800e\u0301\u0344\u1100\u1161道"), max_size=6),
        max_size=6,
    )
)
def test_texts_are_cleaned_together_as_alone(texts: list[str]) -> None:
    assert list(clean_all(texts)) == [clean(text) for text in texts]
