"""Main text of pages, pages of archives, and those that are made to harm who reads them."""

from __future__ import annotations

import io

import pytest

from data_tools.reading.web.pages import PageReader, main_text
from data_tools.reading.web.warc import pages
from support import bombs

PROSE = "The committee met on Friday and agreed on the report, which is to be published next month."
CHINESE = "中国专利法规定，发明是指对产品、方法或者其改进所提出的新的技术方案。"


def page(body: str, head: str = "") -> str:
    links = "".join(f'<li><a href="/{i}">Section {i}</a></li>' for i in range(20))
    return (
        f"<!DOCTYPE html><html><head><title>T</title>{head}</head><body><nav><ul>{links}</ul></nav>"
        f"<article><h1>Report</h1>{body}</article><footer><p>Copyright 2024 Example. All rights reserved.</p></footer>"
        "<script>var x = 1;</script></body></html>"
    )


ENGLISH_BODY = "".join(f"<p>{PROSE} Paragraph {i} has its own number.</p>" for i in range(6))
CHINESE_BODY = "".join(f"<p>{CHINESE}这是第{i}段。</p>" for i in range(6))


@pytest.mark.parametrize(
    ("html", "content_type", "expected"),
    [
        (page(ENGLISH_BODY).encode(), "text/html", PROSE),
        (page(CHINESE_BODY).encode(), "text/html", CHINESE),
        (page(CHINESE_BODY).encode("gbk"), "text/html; charset=GB2312", CHINESE),
        (page(CHINESE_BODY, '<meta charset="gbk">').encode("gbk"), "text/html", CHINESE),
        (page(CHINESE_BODY).encode("gbk"), None, CHINESE),
        (page(CHINESE_BODY).encode("big5", "replace"), "text/html; charset=big5", "利法"),
        (page(ENGLISH_BODY).encode(), "text/html; charset=nonsense", PROSE),
    ],
)
def test_main_text(html: bytes, content_type: str | None, expected: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    text = main_text(html, content_type)
    assert expected in text
    assert "Section 7" not in text
    assert "var x" not in text
    assert main_text(html, content_type) == text


@pytest.mark.parametrize("html", [b"", b"\x00\xff", b"<html></html>", b"<div>" * 5000])
def test_pages_without_text(html: bytes) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    assert main_text(html, "text/html") == ""


def test_a_file_that_is_no_archive_is_one_problem() -> None:
    pytest.importorskip("warcio")
    pytest.importorskip("trafilatura", exc_type=ImportError)
    [(number, url, text, problem, _)] = pages(io.BytesIO(b"no archive\n" * 9), 1000)
    assert (number, url, text) == (0, None, "")
    assert problem.startswith("cannot be read from here on: ")


# --- archives ---


def found_in(archive: bytes, max_bytes: int = 1 << 20) -> list[tuple[int, bool, str | None]]:
    """Number, whether there is text, and what is wrong, of each page."""
    pytest.importorskip("trafilatura", exc_type=ImportError)
    return [(page.number, bool(page.text), page.problem) for page in pages(io.BytesIO(archive), max_bytes)]


RECORD = bombs.warc_record(bombs.answer(bombs.page()))


def test_pages_of_an_archive_are_numbered_by_record() -> None:
    other = bombs.warc_record(b"anything").replace(b"response", b"resource")
    assert found_in(other + RECORD + other + RECORD) == [(1, True, None), (3, True, None)]


@pytest.mark.parametrize("length", [20, 60, 110, 130, 200])
def test_an_archive_that_ends_within_a_record_is_told(length: int) -> None:
    *whole, (number, _, problem) = found_in(RECORD + RECORD[:length])
    assert whole == [(0, True, None)]
    assert number == 1
    assert problem is not None and problem.startswith("cannot be read from here on: the file ends within")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"Content-Length: ", b"Content-Length: -", "Content-Length '-"),
        (b"Content-Length: ", b"Content-Length: 9", "ends within the record"),
        (b"Content-Length", b"X-Length", "no Content-Length"),
        (b"WARC-Type", b"X: " + b"y" * 70_000 + b"\r\nWARC-Type", "more than 65536 bytes"),
        (
            b"WARC-Type",
            b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 40_000 + b"WARC-Type",
            "more than 1048576 bytes",
        ),
        (b"WARC/1.0", b"HELLO", "no WARC file"),
    ],
)
def test_a_header_that_lies_is_one_problem(old: bytes, new: bytes, why: str) -> None:
    [(number, has_text, problem)] = found_in(RECORD.replace(old, new, 1))
    assert (number, has_text) == (0, False)
    assert problem is not None and why in problem


@pytest.mark.parametrize("status", [b"HTTP/1.1 404 Not Found", b"garbage", b""])
def test_what_is_no_answer_of_http_is_no_page(status: bytes) -> None:
    answer = bombs.answer(bombs.page()).replace(b"HTTP/1.1 200 OK", status)
    assert found_in(bombs.warc_record(answer) + RECORD) == [(1, True, None)]


def test_an_answer_of_another_version_of_http_is_a_page() -> None:
    answer = bombs.answer(bombs.page()).replace(b"HTTP/1.1 200 OK", b"HTTP/2 200")
    assert found_in(bombs.warc_record(answer)) == [(0, True, None)]


def test_an_answer_without_an_address_is_passed_over() -> None:
    without = RECORD.replace(b"WARC-Target-URI: http://u/1\r\n", b"")
    assert found_in(without + RECORD) == [(1, True, None)]


# --- pages that are made to harm ---


def test_a_page_that_takes_too_long_ends_its_process_alone() -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    reader = PageReader(page_cpu_s=1)
    try:
        slow = bombs.answer(bombs.page(bombs.attributes(1_900) * 600))
        assert reader.read(slow, 64 << 20) == ("", "is a page that takes more than 1 s to read")
        text, problem = reader.read(bombs.answer(bombs.page()), 64 << 20)
        assert problem is None
        assert bombs.SENTENCE.strip() in text
    finally:
        reader.close()


@pytest.mark.parametrize(
    "tag",
    [
        bombs.attributes(2_100),
        bombs.attributes(2_100).replace("=1", "='>'"),
        bombs.attributes(2_100).replace("=1", ""),
        "<!-- ' --><p title='<x>' " + bombs.attributes(2_100)[2:],
        "<p" + '""' * 30_000 + bombs.attributes(2_100)[2:],
    ],
)
def test_a_tag_of_very_many_attributes_is_not_parsed(tag: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    with pytest.raises(ValueError, match="tag of more than 2,000 attributes"):
        main_text(bombs.page(tag), "text/html")


@pytest.mark.parametrize(
    "honest",
    [
        f'<img src="data:image/png;base64,{"A b" * 9000}">',
        "<script>for (i=0; i<n; i++) {" + "a b c " * 3000 + "}</script>",
        "<style>p<q {" + "color: red; " * 3000 + "}</style>",
        "<!-- a<b " + "word " * 3000 + "-->",
        "<p>1<2 and 3>2</p>" + "<p class='x' id=\"y\">words</p>" * 3000,
        bombs.attributes(1_900),
        "<p data-text='" + '{"a": "b"}' * 9000 + "'>",
    ],
)
def test_honest_pages_with_long_tags_and_scripts_are_parsed(honest: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    assert bombs.SENTENCE.strip() in main_text(bombs.page(honest), "text/html")


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "unicode_escape", "utf-7", "zip", "hex", "undefined", "mbcs"]
)
def test_a_charset_that_no_page_has_is_passed_over(charset: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    html = page(CHINESE_BODY).encode()
    assert main_text(html, f"text/html; charset={charset}") == main_text(html, "text/html; charset=utf-8")


def test_a_page_at_which_the_extractor_fails_is_a_problem_and_no_empty_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trafilatura = pytest.importorskip("trafilatura", exc_type=ImportError)

    def fails(*args: object, **options: object) -> str:
        raise RecursionError

    monkeypatch.setattr(trafilatura, "extract", fails)
    with pytest.raises(ValueError, match="RecursionError"):
        main_text(b"<html><body><p>Text</p></body></html>", None)
