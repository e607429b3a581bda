"""Removes lines that belong to a page but not to its text: navigation, share buttons, counters.

The rules are conservative. A line is removed only where hardly anything else looks like it. Single words such as
`Next` or `News`, which may be headings or verse, are removed only where several stand together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.record import Record
from data_tools.stages.code_text import is_code

_LONGEST_LINE = 300
_FEWEST_WORDS_OF_A_MENU = 3

# Signs that may surround the words of a line of a menu.
_EDGES = " \t\u3000\xa0[]【】()（）<>«»‹›←→↑|·•*#-–—.:：…"
_SEPARATOR = re.compile(r"\s*[|›»>·•/←→｜]\s*|\s{2,}|\u3000+")

_MENU = frozenset(
    """
    next|previous|prev|next page|previous page|next topic|previous topic|next article|previous article
    next post|previous post|next chapter|previous chapter|older posts|newer posts|index|contents
    table of contents|home|homepage|up|top|search|menu|main menu|navigation|login|log in|log out|sign in
    sign up|register|my account|about|about us|contact|contact us|help|faq|faqs|sitemap|site map|news
    blog|products|services|modules|archive|archives|categories|tags|rss|feed|privacy|privacy policy
    cookie policy|terms|terms of use|terms of service|disclaimer|legal|careers|jobs|press|advertise
    print|email|e-mail|share|tweet|facebook|twitter|linkedin|pinterest|whatsapp|reddit|instagram|youtube
    tumblr|telegram|wechat|weibo|like|follow|subscribe|download|report|reply|edit|history|talk
    首页|首頁|主页|上一页|上一頁|下一页|下一頁|上一篇|下一篇|上一章|下一章|末页|尾页|目录|返回目录|返回|登录|登入
    注册|註冊|搜索|搜尋|网站地图|網站地圖|关于我们|關於我們|联系我们|聯繫我們|帮助|免责声明|隐私政策|服务条款|打印
    收藏|加入收藏|设为首页|分享|转发|评论|点赞|举报|回复|微信|微博|新浪微博|腾讯微博|qq空间|人人网|豆瓣|关闭|关闭窗口
    """.replace("\n", "|")
    .replace("    ", "")
    .strip("|")
    .split("|")
)

_ALONE = re.compile(
    r"""(?:
     (?:skip|jump)\ to\ (?:main\ |page\ )?(?:content|navigation|search)
    |(?:back|return|go)\ to\ (?:the\ )?(?:top|home\ ?page)
    |toggle\ (?:navigation|menu|search|sidebar|table\ of\ contents.{0,20})
    |(?:click\ here\ to\ )?(?:log|sign)\ in\ (?:or|to)\ (?:register|sign\ up|(?:post|leave|add)\ (?:a\ )?comments?)
    |(?:share|save|print|e-?mail|tweet|bookmark)\ this(?:\ (?:article|post|page|story|entry))?
    |(?:share|follow|find|like)\ (?:us\ |this\ |it\ )?on
       \ (?:facebook|twitter|x|linkedin|pinterest|whatsapp|reddit|instagram)
    |(?:leave|post|add|write)\ a\ (?:reply|comment)(?:\ cancel\ reply)?
    |(?:show|hide|view|read|see)\ (?:all\ )?(?:\d+\ )?(?:more\ )?comments
    |(?:read|load|show|view)\ more(?:\ (?:posts|articles|stories|news))?|continue\ reading
    |advertisements?|sponsored\ (?:content|links)|related\ (?:posts|articles|stories)
    |(?:accept|allow|manage|reject)\ (?:all\ )?cookies|cookie\ (?:settings|preferences|consent)
    |.{0,120}\b(?:this|our)\ (?:web)?site\ uses\ cookies\b.*|we\ use\ cookies\ (?:to|on|and|for)\b.*
    |by\ continuing\ to\ (?:use|browse)\ (?:this|our|the)\ (?:web)?site\b.*
    |(?:please\ )?(?:subscribe|sign\ up)\ (?:to|for)\ (?:our|my|the|this)\b.{0,60}
       \b(?:newsletter|mailing\ list|updates|channel|feed|blog)\b.{0,60}
    |enter\ your\ e-?mail\ address\b.{0,80}
    |(?:copyright\s*)?©.{0,150}|(?:copyright\s*)?\(c\)\s*(?:19|20)\d\d\b.{0,150}
    |copyright\s+(?:(?:19|20)\d\d\b|by\b).{0,120}
    |.{0,120}\ball\ rights\ reserved|powered\ by\ \w+(?:\ \w+){0,2}
    |\d[\d,.]*\s?[km]?\s+(?:comments?|views?|likes?|shares?|retweets?|replies|followers)
    |(?:comments?|views?|likes?|shares?|replies)\s*[:(]\s*\d[\d,.]*\s?[km]?
    |page\ \d+\ (?:of|/)\ \d+
    |第?\s*\d+\s*[页頁]?\s*[/／,，]?\s*共\s*\d+\s*[页頁]
    |[上下]一[篇页頁章](?:文章|新闻|新聞)?\s*[:：].{0,80}
    |返回(?:首页|首頁|顶部|頂部|列表|上一页|上一頁|网站首页)|回到(?:顶部|頂部|首页|首頁)
    |(?:当前|當前|您(?:现在|現在)?的?)(?:所在)?(?:位置|的位置)\s*[:：].{0,100}
    |(?:首[页頁]|主[页頁])\s*[>›»＞].{0,100}
    |home\s*[>›»].{0,100}
    |分享(?:到|至)\s*[:：]?.{0,60}
    |(?:扫描|掃描|扫一扫|长按识别)(?:下方|上方|左侧|右侧)?.{0,10}二[维維][码碼].{0,40}
    |(?:欢迎|歡迎)?(?:关注|關注|订阅|訂閱)(?:我们|我們|本站)?(?:的)?.{0,8}(?:微信|公众号|公眾號|微博|电子报|電子報).{0,40}
    |.{0,60}(?:本|此)(?:网站|網站|站)使用\s*cookie.{0,120}
    |(?:版权|版權)(?:所有|归).{0,100}|.{0,80}icp[备備证證]\s*(?:字第)?\s*\d+.{0,40}
    |(?:点击|點擊|阅读|閱讀|浏览|瀏覽|评论|評論|访问|訪問)(?:次数|次數|量|数|數)?\s*[:：(（]\s*\d[\d,]*\s*[次)）]?
    |(?:展开|展開|阅读|閱讀|查看|显示)(?:全文|更多)
    )""",
    re.X | re.I,
)
_PAGE_NUMBER = re.compile(r"\s*[-–—]\s*\d{1,4}\s*[-–—]\s*")


@dataclass(kw_only=True, slots=True)
class BoilerplateConfig:
    """Removal of navigation, notices, share buttons and counters, line by line. It has no options."""


class BoilerplateStage:
    """Removes lines of boilerplate, and counts them as `boilerplate.lines`. Code and chosen sources are not changed."""

    name = "boilerplate"

    def __init__(
        self, config: BoilerplateConfig, is_curated: Callable[[str], bool] = lambda source: False
    ) -> None:
        """`is_curated` tells the sources that people chose, which are no pages of the web."""
        self._config, self._is_curated = config, is_curated

    def process(self, record: Record) -> str | None:
        """Returns `only_boilerplate` where nothing is left after the removal of lines."""
        if self._is_curated(record.source) or is_code(record):
            return None
        record.text, removed = without_boilerplate(record.text)
        record.count("boilerplate.lines", removed)
        return "only_boilerplate" if removed and not record.text.strip() else None


def without_boilerplate(text: str) -> tuple[str, int]:
    """The text without its lines of boilerplate, and their number. A second call removes nothing more."""
    lines = text.split("\n")
    goes = _boilerplate(lines)
    if not goes:
        return text, 0
    kept: list[str] = []
    after_removed = False
    for number, line in enumerate(lines):
        if number in goes:
            after_removed = True
        elif line.strip() or not (after_removed and (not kept or not kept[-1].strip())):
            kept.append(line)  # blank lines before a removed line stay, those after it go
            after_removed = after_removed and not line.strip()
    return "\n".join(kept).strip("\n"), len(goes)


def _boilerplate(lines: list[str]) -> set[int]:
    """Numbers of the lines to remove: lines that are boilerplate by themselves, and groups of menu words."""
    goes: set[int] = set()
    words: list[
        int
    ] = []  # lines that are one menu word each, with only blank lines and boilerplate between them
    for number, line in enumerate(lines):
        if not line or len(line) > _LONGEST_LINE:
            is_alone = is_word = False
        else:
            bare = line.strip(_EDGES)
            is_alone = (
                bool(_ALONE.fullmatch(bare)) or bool(_PAGE_NUMBER.fullmatch(line)) or _is_menu_row(line)
            )
            is_word = bare.lower() in _MENU
        if is_alone:
            goes.add(number)
        elif is_word:
            words.append(number)
        elif line.strip():
            if len(words) >= _FEWEST_WORDS_OF_A_MENU:
                goes.update(words)
            words = []
    if len(words) >= _FEWEST_WORDS_OF_A_MENU:
        goes.update(words)
    return goes


def _is_menu_row(line: str) -> bool:
    """Whether at least two, and at least half, of the parts between separators are menu words. Table rows are not."""
    if len(line) > 200 or line.lstrip().startswith("|"):
        return False
    parts = [part for part in (part.strip(_EDGES).lower() for part in _SEPARATOR.split(line)) if part]
    if len(parts) < 2:
        parts = [part.strip(_EDGES) for part in line.split()]  # Chinese menus separate words by one blank
        return len(parts) > 1 and all(part in _MENU and not part.isascii() for part in parts)
    menu = sum(part in _MENU for part in parts)
    return menu >= 2 and menu >= len(parts) / 2
