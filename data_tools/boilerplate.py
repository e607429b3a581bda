"""What belongs to a page and not to its text: main text of HTML, and lines that navigate, share and count.

The rules on lines are conservative: a line goes only where nearly nothing else looks like it, and single
words such as `Next` or `News`, which may be headings or verse, only where several stand together.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_tools.language import is_code
from data_tools.record import Record
from pretrain.config import ConfigError

BROKEN = (OSError, EOFError, zlib.error)
"""What reading a file that ends too early, or is no archive, raises."""

_LONGEST_LINE = 300
_FEWEST_WORDS_OF_A_MENU = 3
_SKIP_BYTES = 1 << 20
_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset\s*=\s*[\"']?\s*([\w-]{3,20})", re.I)

# Before and after the words of a line of a menu.
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
    """Removal of navigation, notices, share buttons and counters, line by line. Nothing to set."""


class BoilerplateStage:
    """Removes lines, and counts them as `boilerplate.lines`. Code is left as it is."""

    name = "boilerplate"

    def __init__(self, config: BoilerplateConfig) -> None:
        self._config = config

    def process(self, record: Record) -> str | None:
        """`only_boilerplate` where lines were removed and nothing is left."""
        if is_code(record):
            return None
        record.text, removed = without_boilerplate(record.text)
        record.count("boilerplate.lines", removed)
        return "only_boilerplate" if removed and not record.text.strip() else None


def without_boilerplate(text: str) -> tuple[str, int]:
    """The text without its lines of boilerplate, and their number. Doing it again removes nothing more."""
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
            kept.append(line)  # of the blank lines around what was removed, those before it stay
            after_removed = after_removed and not line.strip()
    return "\n".join(kept).strip("\n"), len(goes)


def _boilerplate(lines: list[str]) -> set[int]:
    """Numbers of lines that go: those that are boilerplate by themselves, and words of menus in company."""
    goes: set[int] = set()
    words: list[int] = []  # of a menu, one a line, with nothing but blanks and boilerplate between them
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
    """Whether at least two and half of the parts between separators are words of menus. No table's row."""
    if len(line) > 200 or line.lstrip().startswith("|"):
        return False
    parts = [part for part in (part.strip(_EDGES).lower() for part in _SEPARATOR.split(line)) if part]
    if len(parts) < 2:
        parts = [part.strip(_EDGES) for part in line.split()]  # Chinese menus have one blank between words
        return len(parts) > 1 and all(part in _MENU and not part.isascii() for part in parts)
    menu = sum(part in _MENU for part in parts)
    return menu >= 2 and menu >= len(parts) / 2


def pages(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, str | None, str, str | None]]:
    """The HTML pages of a WARC file: record number, address, main text, and what is wrong with it, or None.

    Pages are answers to requests with the status 200. The text is empty where a page has none. Nothing more
    comes after a record at which the file cannot be read on.
    """
    try:
        import trafilatura  # noqa: F401 - a missing package is told at once, not at the first page
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise ConfigError(
            f"reading WARC files needs a package ({error}): pip install 'pretrain[data]'"
        ) from error

    number = -1
    try:
        for number, record in enumerate(ArchiveIterator(file)):
            if record.rec_type != "response" or not _is_page(record.http_headers):
                continue
            html = record.content_stream().read(max_bytes + 1)
            while record.raw_stream.read(_SKIP_BYTES):
                pass
            if record.raw_stream.limit:
                raise EOFError("the file ends within the record")
            url = record.rec_headers.get_header("WARC-Target-URI")
            problem = f"is a page of more than {max_bytes} bytes" if len(html) > max_bytes else None
            text = "" if problem else main_text(html, record.http_headers.get_header("Content-Type"))
            yield number, url, text, problem
    except (*BROKEN, ArchiveLoadFailed, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        yield max(number, 0), None, "", f"cannot be read from here on: {reason}"


def _is_page(headers: Any) -> bool:
    kind = (headers.get_header("Content-Type", "") if headers else "").split(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") and headers.get_statuscode() == "200"


def main_text(html: bytes, content_type: str | None) -> str:
    """Main text of a page; empty where it has none, or where it is beyond what the extractor can parse.

    Each page by itself: no removal of repetitions, which would depend on the pages before.
    """
    from trafilatura import extract

    try:
        text = extract(_decoded(html, content_type), include_comments=False, deduplicate=False)
    except Exception:  # pages of strangers make parsers fail in any way; one page is no reason to stop
        return ""
    return text or ""


def _decoded(html: bytes, content_type: str | None) -> str:
    """By the charset that the header or the page names, else UTF-8, else GB 18030, else Windows-1252.

    No statistical guess: those depend on what is installed.
    """
    header = re.search(r"charset\s*=\s*[\"']?([\w-]+)", content_type or "", re.I)
    meta = _META_CHARSET.search(html[:4096])
    named = [header[1]] if header else []
    named += [meta[1].decode("ascii", "ignore")] if meta else []
    for charset in [*named, "utf-8", "gb18030"]:
        try:
            return html.decode("gb18030" if charset.lower() in ("gb2312", "gbk") else charset)
        except (UnicodeDecodeError, LookupError):
            continue
    return html.decode("cp1252", "replace")
