"""Main text of pages, pages of archives, and those that are made to harm who reads them."""

from __future__ import annotations

import io

import pytest

from data_tools.pages import main_text
from data_tools.warc import pages

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
    [(number, url, text, problem)] = pages(io.BytesIO(b"no archive\n" * 9), 1000)
    assert (number, url, text) == (0, None, "")
    assert problem.startswith("cannot be read from here on: ")
