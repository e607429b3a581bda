"""What is put right in real text of both languages, what stays as it is, and that doing it again changes nothing."""

from __future__ import annotations

import inspect
import textwrap
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("ftfy")

from data_tools.record import CODE, ENGLISH, Record
from data_tools.stages.normalize import (
    NormalizeConfig,
    NormalizeStage,
    is_on_markup,
    repair_mojibake,
    undo_html,
)
from pretrain.errors import ConfigError
from support.short_programs import PROGRAMS

LAW = "中华人民共和国专利法\n\n第一章　总则\n第一条　为了保护专利权人的合法权益，鼓励发明创造，制定本法。"
POEM = "　　静夜思\n床前明月光，　疑是地上霜。\n举头望明月，　低头思故乡。"
QUOTES = "他说：“这本书（第２版）很好——‘真的’！”ＡＢＣ１２３；…… ﬁne «ok» “curly” ‘it’s’"
ENGLISH_TEXT = "The jury said it did find that many of Georgia's laws “are outmoded” – or worse.\n\nThe end."
SOURCE = inspect.getsource(textwrap)


def normalized(text: str, language: str = "und", **options: object) -> Record:
    record = Record(id="1", text=text, source="s", language=language)
    assert NormalizeStage(NormalizeConfig(**options)).process(record) is None
    return record


@pytest.mark.parametrize(
    "text", [LAW, POEM, QUOTES, ENGLISH_TEXT, SOURCE.strip("\n"), "a\tb  c", "    indented"]
)
def test_good_text_stays(text: str) -> None:
    record = normalized(text)
    assert (record.text, record.counts) == (text, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e\u0301 \u1100\u1161", "é 가"),
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
        ("\ufeffa\ufeffb", "ab"),
        ("a\x00b\x07c\x1b[31md\x1b[0m", "abcd"),
        ("a  \nb\t\n\u3000\nc\u3000", "a\nb\n\nc"),
        ("\n\n a\n\n\n\n\nb\n\n", " a\n\n\nb"),
        ("a\u00a0b\u2009c\u202fd", "a b c d"),
        ("some\u3000words", "some words"),
        ("soft\u00adhyphen\u200e zero\u200bwidth\u200d", "softhyphen zerowidth"),
        ("\u4e2d\u200b\u6587\u2060", "中文"),
        ("half \ud83d pair", "half  pair"),
    ],
)
def test_characters(text: str, expected: str) -> None:
    assert normalized(text).text == expected


@pytest.mark.parametrize(
    "text", ["نمی\u200cخواهم", "क्\u200dष", "👨\u200d👩\u200d👧", "❤️\u200d🔥", "ภาษา\u200bไทย"]
)
def test_joiners_that_scripts_need_stay(text: str) -> None:
    assert normalized(text).text == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251", "cp1250", "mac_roman", "cp437"])
@pytest.mark.parametrize(
    "text", ["Voilà l’été à l’école", "Größe und Maß", "“quoted” – dash", "中国专利法规定"]
)
def test_mojibake_is_repaired(encoding: str, text: str) -> None:
    try:
        wrong = text.encode().decode(encoding)
    except UnicodeDecodeError:
        pytest.skip("the encoding lacks a byte")
    if repair_mojibake(wrong)[0] != text:
        pytest.skip("ftfy does not know this encoding, or is not sure")
    record = normalized(f"{LAW}\n{wrong}\n{ENGLISH_TEXT}")
    assert record.text == f"{LAW}\n{text}\n{ENGLISH_TEXT}"
    assert record.counts == {"normalize.mojibake": 1}
    assert text not in normalized(wrong, mojibake=False).text


def test_signs_of_windows_are_not_deleted() -> None:
    assert (
        normalized("COTE D\u0092IVOIRE, \u0093good\u0094 \u0097 5\u0080\u0081").text
        == "COTE D’IVOIRE, “good” — 5€"
    )
    assert normalized("COTE D\u0092IVOIRE").counts == {"normalize.windows_signs": 1}


@pytest.mark.parametrize("sign", ["\u2028", "\u00a0", "\u00ad", "\u200b", "\u3000", "\u202e"])
def test_code_keeps_special_characters_within_strings(sign: str) -> None:
    text = f"import re\n\n\ndef pieces(text):\n    return re.split('[{sign}]', text)\n"
    assert normalized(text) == Record("1", text.rstrip(), "s")
    assert sign not in normalized(f"one{sign}two").text


@pytest.mark.parametrize("style", ["html", "diff", "makefile", "python_docstring", "perl"])
def test_a_program_is_not_changed(style: str) -> None:
    assert normalized(PROGRAMS[style]).text == PROGRAMS[style].rstrip("\n")


def test_common_mojibake_is_repaired() -> None:
    """Not left to what ftfy says, as above."""
    for encoding in ("latin-1", "cp1252"):
        assert repair_mojibake("Voilà, l’été".encode().decode(encoding)) == ("Voilà, l’été", 1)
    assert normalized("ä¸\xadå›½ä¸“åˆ©æ³•").text == "中国专利法"


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("one<br>two<BR />three", "one\ntwo\nthree", 2),
        ("<p>one</p><p>two</p>", "one\n\ntwo", 4),
        ('<div class="a b" id=c>one</div>', "one", 2),
        ("<b>bold</b> and <em>more</em>", "bold and more", 4),
        ("彼得&#183;林奇&nbsp;写的&ldquo;书&rdquo;", "彼得·林奇 写的“书”", 4),
        ("<p>这本书<br/>很好</p>", "这本书\n很好", 3),
        ("x &lt; y &amp;&amp; y &gt; z", "x < y && y > z", 4),
        ("Q&amp;amp;A", "Q&A", 1),
        ("a&amp;lt;br&amp;gt;b", "a<br>b", 2),
        ("Write &lt;br&gt; to break.", "Write <br> to break.", 2),
        ("<p>Write &lt;br&gt; here.</p>", "Write <br> here.", 4),
        ("10<sup>6</sup> H<sub>2</sub>O", "10^6 H2O", 4),
        ("a<script type='x'>var a = '<p>';</script>b<!-- note\n -->c<style>p {}</style>", "abc", 3),
        ('<a href="http://u/?a=1&amp;b=2">link</a>', "link", 2),
        ("<source src=x>a<nav>b</nav>", "a\nb", 3),
    ],
)
def test_leftovers_of_html_go(text: str, expected: str, found: int) -> None:
    record = normalized(text)
    assert record.text == expected
    assert record.counts["normalize.html"] == found
    assert normalized(text, html=False).text == text


@pytest.mark.parametrize(
    "text",
    [
        "In HTML, <p> begins a paragraph and &lt;br&gt; breaks a line.",
        "Write `<br>` to break a line, or '<hr>' for a rule, &amp; so on.",
        "```\n<div>\n```",
        "An example::\n\n    <b>bold</b>\n",
        ">>> print('x')\n<b>x</b>",
        "copy <source> <a>",
        "Mount it with: mount -o loop <img> /mnt",
        "git show <object>:<path> and tar -xf <archive> <var>",
        "The value of a is <b> 3 </b> in this listing.",
        "A paragraph stands between <p> and </p>.",
        "if a<b and c>d: <3 <> <-- -->",
        "<meta path finder> and <strong reference>",
        "R&D, AT&T; &unknown; &copy=1 & more;",
        "<notatag> <pp> </x>",
        "<!-- never closed <p",
    ],
)
def test_what_is_no_leftover_stays(text: str) -> None:
    assert normalized(text).text == text.rstrip("\n")


def test_code_keeps_its_tags_and_indentation() -> None:
    text = 'def f():\n    return "<br>&nbsp;"\n\n\n\n\n    # caf\u00c3\u00a9\n\u00a0   x = 1  \n'
    expected = 'def f():\n    return "<br>&nbsp;"\n\n\n    # caf\u00c3\u00a9\n    x = 1'
    record = normalized(text, language=CODE)
    assert (record.text, record.counts) == (expected, {"normalize.blank_lines": 2})
    named = Record(id="a.py", text=text, source="s")
    NormalizeStage(NormalizeConfig()).process(named)
    assert named.text == expected
    assert SOURCE.count("<") == normalized(SOURCE).text.count("<")


def test_markup_named_only_in_a_tag_is_no_text_on_markup() -> None:
    assert not is_on_markup('<div class="HTML">text</div>')
    assert is_on_markup("the HTML of it")


@pytest.mark.parametrize("text", ["", " \n\t\u3000\n", "\ufeff\u200b\x00", "&nbsp;<br>", "<!-- nothing -->"])
def test_empty_text_is_dropped(text: str) -> None:
    record = Record(id="1", text=text, source="s")
    assert NormalizeStage(NormalizeConfig()).process(record) == "empty"


def test_blank_lines_are_bounded() -> None:
    assert normalized("a\n\n\n\nb", max_blank_lines=0).text == "a\nb"
    assert normalized("a\n\n\n\nb", max_blank_lines=3).text == "a\n\n\n\nb"
    with pytest.raises(ConfigError, match=r"curation\.normalize\.max_blank_lines=-1"):
        NormalizeConfig(max_blank_lines=-1)


_PIECES = st.sampled_from(
    [
        *"< > & ; br p b <br> </p> <b> </b> &amp; &lt; &gt; amp; lt; &#38; &nbsp; &#13; <!-- --> <script>".split(),
        *"&shy; </script> HTML ` x Ã© â€™ Â é e \u0301 中 ｆ क् \u200b \u200d \u00ad \u2060".split(" "),
        *[" ", "ä¸\xad", "\u3000", "\xa0", "\r", "\n", "\n\n\n\n", "\x1b[0m", "\x85", "\u2028"],
    ]
)


@settings(deadline=None, max_examples=400)
@given(st.lists(_PIECES | st.text(max_size=3), max_size=12).map("".join), st.sampled_from([ENGLISH, CODE]))
def test_again_changes_nothing(text: str, language: str) -> None:
    stage = NormalizeStage(NormalizeConfig())
    record = Record(id="1", text=text, source="s", language=language)
    again = Record(id="1", text="", source="s", language=language)
    reason = stage.process(record)
    again.text = record.text
    assume("&" not in text or "<" not in record.text)  # `&lt;p&gt;` becomes text that looks like a tag
    assert stage.process(again) == reason
    assert (again.text, again.counts) == (record.text, {})
    assert unicodedata.is_normalized("NFC", record.text)
    assert (reason == "empty") == (not record.text.strip())


@pytest.mark.parametrize("piece", ["<script>", "<!--", "&amp;", "<p ", "< ", "Ã", "<a href=", "\n \n"])
def test_hostile_text_takes_no_long_time(piece: str) -> None:
    import time

    began = time.process_time()
    NormalizeStage(NormalizeConfig()).process(Record(id="1", text=piece * 40_000, source="s"))
    assert time.process_time() - began < 10  # seconds; a second or less where the time grows with the length


def test_undoing_counts_what_it_undid() -> None:
    assert undo_html("&unknown; &copyx; plain") == ("&unknown; &copyx; plain", 0)
