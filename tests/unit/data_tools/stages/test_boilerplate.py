"""Lines that go, and lines that look like them and stay."""

from __future__ import annotations

import codecs
import inspect
import io
import json
import this

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.record import Record
from data_tools.stages.boilerplate import (
    BoilerplateConfig,
    BoilerplateStage,
    without_boilerplate,
)
from support import ROOT

PROSE = "The committee met on Friday and agreed on the report, which is to be published next month."
CHINESE = "中国专利法规定，发明是指对产品、方法或者其改进所提出的新的技术方案。"


@pytest.mark.parametrize(
    "line",
    [
        "Skip to content",
        "[Skip to main content]",
        "Back to top ↑",
        "Home > News > Local",
        "Home | About us | Contact",
        "« Previous   Next »",
        "Previous | Index | Next",
        "Share this article",
        "Share on Facebook",
        "Facebook  Twitter  LinkedIn  Email",
        "Leave a Reply",
        "12 comments",
        "1,234 views",
        "Page 3 of 10",
        "- 12 -",
        "This website uses cookies to improve your experience. Accept all cookies?",
        "Please subscribe to our weekly newsletter!",
        "© 2024 Example Ltd.",
        "Copyright (c) 1998 The Example Project.  All rights reserved.",
        "Powered by WordPress",
        "Read more…",
        "上一页 下一页",
        "首页 > 新闻 > 国内",
        "首页 | 新闻 | 关于我们 | 联系我们",
        "您的位置：首页 > 正文",
        "上一篇：明天下雨",
        "返回顶部",
        "第 3 页 共 10 页",
        "分享到：微信 微博 QQ空间",
        "扫描下方二维码关注我们",
        "欢迎关注我们的微信公众号",
        "版权所有 © 某某公司",
        "京ICP备12345678号-1",
        "阅读(1234)",
        "本网站使用cookie来改善您的体验。",
        "返回首頁",
        "版權所有",
    ],
)
@pytest.mark.parametrize("body", [PROSE, CHINESE])
def test_boilerplate_goes(line: str, body: str) -> None:
    assert without_boilerplate(f"{line}\n\n{body}\n\n{line}\n{body}") == (f"{body}\n\n{body}", 2)


@pytest.mark.parametrize(
    "text",
    [
        "Next\nThe next morning we left.",  # a heading
        "Index\n\n" + PROSE,
        "News from home came late;\nNext spring, no more.",
        "A: Share this with me?\nB: Home, contact, about: which one?",
        "A: Hello\nB: Hi\nA: Next?\nB: Home",
        "| Home | News |\n|------|------|\n| 1 | 2 |",
        "- apples\n- pears\n- plums",
        "News | The Observer\n" + PROSE,
        "name | age | city\nAnn | 31 | Rome\nBob | 27 | Home",
        "Copyright law was changed by Congress in 1976.",
        "(c) The tenant shall keep the premises clean.",
        "The states kept all rights reserved to them by the constitution.",
        "He said the site uses cookies.",
        "We had 12 comments on the draft, and all were kind.",
        "See page 3 of 10 pages that follow.",
        "In 1999 -12- was the answer.",
        "1\n2\n3\n4",
        "Return to the top of the hill",
        "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。",
        "　　首页是一本书的第一页，下一页才是目录。",
        "问：首页在哪里？\n答：在这里。",
        "第三页写着他的名字，共十页。",
        "版权是作者的权利，法律予以保护。",
        "阅读是一种习惯。",
        "第一章　总则\n第一条　为了保护专利权人的合法权益，制定本法。",
        "关注微信支付安全的人越来越多，这是好事，也说明大家对个人信息的保护意识正在提高，值得肯定，需要继续努力推动下去才行。",
        "\n".join(["x = 1", "def f():", "    return x"]),
        codecs.decode(this.s, "rot13"),
        inspect.getdoc(io),
        inspect.getdoc(json),
    ],
)
def test_text_stays(text: str) -> None:
    assert without_boilerplate(text) == (text, 0)


def test_words_of_a_menu_go_in_company_only() -> None:
    menu = "Home\nNews\n\nContact"
    assert without_boilerplate(f"{menu}\n{PROSE}") == (PROSE, 3)
    assert without_boilerplate(f"Home\nNews\n{PROSE}\nContact") == (f"Home\nNews\n{PROSE}\nContact", 0)


def test_the_stage_counts_and_says_where_nothing_is_left() -> None:
    stage = BoilerplateStage(BoilerplateConfig())
    record = Record(id="1", text=f"Skip to content\n{PROSE}\n© 2020 Us", source="s")
    assert stage.process(record) is None
    assert (record.text, record.counts) == (PROSE, {"boilerplate.lines": 2})
    record = Record(id="1", text="Home | News | About\n\n© 2020 Us\n", source="s")
    assert stage.process(record) == "only_boilerplate"
    clean = Record(id="1", text=PROSE, source="s")
    assert stage.process(clean) is None
    assert (clean.text, clean.counts) == (PROSE, {})


def test_code_keeps_its_lines() -> None:
    text = "# Copyright (c) 2001 Us. All rights reserved.\n© 2001\n"
    code = Record(id="a.py", text=text, source="s")
    assert BoilerplateStage(BoilerplateConfig()).process(code) is None
    assert code.text == text


_LINES = st.sampled_from(
    ["Home", "News", "Next", "", " ", "© 2020", PROSE, CHINESE, "12 comments", "a | b", "Home | Next", "x"]
)


@given(st.lists(_LINES | st.text(max_size=20), max_size=14).map("\n".join))
def test_again_removes_nothing_more(text: str) -> None:
    once, removed = without_boilerplate(text)
    assert without_boilerplate(once) == (once, 0)
    assert removed or once == text


@given(st.lists(_LINES, max_size=14))
def test_what_stays_is_in_order(lines: list[str]) -> None:
    kept = iter(lines)
    assert all(line in kept for line in without_boilerplate("\n".join(lines))[0].split("\n") if line)


def test_this_repository_has_no_boilerplate_in_its_guide() -> None:
    readme = (ROOT / "README.md").read_text()
    assert without_boilerplate(readme) == (readme, 0)


def test_sources_that_people_chose_keep_their_lines() -> None:
    text = f"{PROSE}\nSkip to content\nPage 3 of 12"
    stage = BoilerplateStage(BoilerplateConfig(), lambda source: source == "poems")
    records = {source: Record(id="1", text=text, source=source) for source in ("poems", "web")}
    assert not any(map(stage.process, records.values()))
    assert records["poems"].text == text
    assert records["web"].text == PROSE
