"""Text of others: visible on a terminal, and in Markdown nothing but itself."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len

from data_tools.tables import code_block, code_span, markdown, plain_table
from pretrain.printing import ERROR_CHARS, print_error, visible

HOSTILE = [
    "a\x1b[2J\x1b]0;title\x07b",
    "a\x9b31mb",
    "a\r\ncorrupt: b",
    "a\u202eb\u2066c",
    "a\u2028b\x85c",
    "\ud800",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1)) ![y](http://z/)",
    "a | b \\| c \\",
    "`````",
    "# heading",
    "- list",
    "1. list",
    "===",
    "~~~",
    "&lt;b&gt; &#60;",
    "*a* _b_ **c** ~~d~~",
    "图书馆 naïve 👩‍👩‍👧",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from([*HOSTILE, "\n", " ", "`"])).map("".join))


def is_harmless(text: str) -> bool:
    return all(
        unicodedata.category(sign) not in ("Cc", "Zl", "Zp", "Cs")
        and not re.match("[\u202a-\u202e\u2066-\u2069]", sign)
        for sign in text
    )


@given(texts)
def test_what_is_visible_obeys_nothing(text: str) -> None:
    shown = visible(text)
    assert is_harmless(shown)
    shown.encode()
    assert visible(shown) == shown
    if is_harmless(text):
        assert shown == text


@given(texts)
def test_line_breaks_stay_where_they_are_wanted(text: str) -> None:
    assert visible(text, keep="\n").count("\n") == text.count("\n")


@given(st.recursive(texts, lambda inner: st.dictionaries(texts, inner)))
def test_json_stays_the_same_json(value: object) -> None:
    assert json.loads(visible(json.dumps(value, ensure_ascii=False))) == value


def test_escapes_can_be_read() -> None:
    assert visible("a\x1b[31m\n\t\x7f图\u202e") == "a\\u001b[31m\\n\\t\\u007f图\\u202e"
    assert visible("abc", limit=2) == "ab…"


def test_an_error_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("error", ValueError("x\n" * 100_000))
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert len(printed) < 2 * ERROR_CHARS


def rendered(source: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source)


def text_of(page: str) -> str:
    """The text of a page that has no tag but those given."""
    return re.sub("&(lt|gt|amp|quot);", lambda m: {"lt": "<", "gt": ">", "amp": "&", "quot": '"'}[m[1]], page)


@given(texts)
def test_markdown_shows_what_it_is_given(text: str) -> None:
    shown = visible(" ".join(text.split()))
    page = rendered(f"| a | b |\n|---|---|\n| x | {markdown(text)} |\n| y | z |\n")
    cells = re.findall("<td>(.*)</td>", page)
    assert cells[::2] == ["x", "y"]
    assert [text_of(cell) for cell in cells[1::2]] == [shown, "z"]
    assert text_of(rendered(f"# {markdown(text)}\n").strip()) == f"<h1>{shown}</h1>"
    if shown:
        assert text_of(rendered(f"{markdown(text)}\n").strip()) == f"<p>{shown}</p>"
    assert set(re.findall("<[^>]*>", rendered(f"![{markdown(text)}](a.svg)"))) <= {
        "<p>",
        "</p>",
        *re.findall('<img src="a.svg" [^>]*>', rendered(f"![{markdown(text)}](a.svg)")),
    }


@given(texts)
def test_code_does_not_end_early(text: str) -> None:
    page = rendered(f"- {code_span(text)} b\n")
    assert re.fullmatch(r"<ul>\n<li>(<code>[^<]*</code>|``) b</li>\n</ul>\n", page)
    page = rendered(f"{code_block(text)}\n\nb\n")
    assert re.fullmatch(r"<pre><code>[^<]*</code></pre>\n<p>b</p>\n", page)


def test_a_table_has_one_line_per_row_of_bounded_width() -> None:
    table = plain_table([("a\nb\x1b", "1"), ("c" * 100_000, "2")], ("name", "n"))
    assert len(table.splitlines()) == 3
    assert is_harmless(table.replace("\n", ""))
    assert max(map(len, table.splitlines())) < 300


def test_columns_of_wide_characters_stay_aligned() -> None:
    """A Chinese character takes two columns of a terminal, a combining mark none."""
    table = plain_table([("维基百科", "1"), ("cafe\u0301s", "2"), ("wiki", "3")], ("source", "n"))
    assert {cell_len(line) for line in table.splitlines()} == {len("维基百科") * 2 + 3}
