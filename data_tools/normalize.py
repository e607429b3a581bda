"""The same text in one form: composed characters, one kind of line end and blank, no left-overs of encodings and HTML."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from data_tools.clean import clean
from data_tools.language import is_code
from data_tools.record import Record
from pretrain.config import ConfigError

# What is undone can bring up what was beneath it (&amp;lt;br&amp;gt;); deeper nesting than this is no accident.
_MOST_ROUNDS = 8

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[@-~]")
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\u2028\u2029]")
# Soft hyphens, marks and overrides of direction, word joiners and byte-order marks wherever they are.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
# Zero-width (non-)joiners shape Arabic and Indic letters and join emoji; zero-width spaces part the words of
# Thai, Lao, Burmese and Khmer. After any other character they are left over from a page's layout.
_JOINED = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1a20-\u1aaf\u1b00-\u1c4f\ua840-\uabff\ufb1d-\ufdff\ufe0f\ufe70-\ufefc\u2190-\u2bff\U00010a00-\U00011fff\U0001f000-\U0001faff"
_STRAY_JOINER = re.compile(f"(?<![{_JOINED}])[\u200c\u200d]")
_STRAY_SPACE = re.compile("(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf])\u200b")
_ZERO_WIDTH = re.compile("[\u200b-\u200d]")

_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_TRAILING = re.compile("[ \t\u3000]+(?=\n|$)")
# Ideographic spaces indent Chinese paragraphs and part the halves of verses; among Latin words they are blanks.
_EAST_ASIAN = re.compile(
    "[\u2e80-\u2fdf\u3001-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)

_ENTITY = re.compile(r"&(?:amp;|#38;|#x26;)*(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_BLOCKS = (
    "address article aside blockquote body br caption center dd details div dl dt fieldset figcaption figure footer "
    "form frame frameset h1 h2 h3 h4 h5 h6 head header hr html iframe legend li main nav noscript ol optgroup option "
    "p pre section select summary table tbody td textarea tfoot th thead title tr ul"
)
_WITHIN_LINES = (
    "abbr acronym area audio base basefont big button canvas cite code col colgroup del dfn em embed font img "
    "input ins kbd label link map mark meta nobr object param picture small source span strike strong sub sup "
    "svg tt var video wbr"
)
# One letter may be a placeholder, as in `copy <a> <b>`: these go where they are closed.
_LETTERS = "a b i q s u"
_ATTRIBUTES = r"(?:\s+[\w:@.-]+(?:\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>=]+))?){0,20}\s*/?"
_TAG = re.compile(
    rf"<(/?)({'|'.join([*_BLOCKS.split(), *_WITHIN_LINES.split(), *_LETTERS.split()])})({_ATTRIBUTES})>", re.I
)
_UNSEEN = re.compile(
    r"<(script|style)\b[^<>]{0,500}>.{0,100000}?</\1\s*>|<!--.{0,10000}?-->|<!doctype[^<>]{0,200}>",
    re.I | re.S,
)
_BLOCK = frozenset(_BLOCKS.split())
# A text on markup names it, shows it in code, or in quotation marks.
_ON_MARKUP = re.compile(
    r"\b(?:X?HTML5?|XML|XHTML|SVG|CSS|DOM|JSX|BeautifulSoup|markup|Markdown)\b|标签|標籤|```|<\?xml|"
    r"[`\"'“‘「『]<[/!]?[A-Za-z][^<>]{0,80}>[`\"'”’」』]"
)


@dataclass(kw_only=True, slots=True)
class NormalizeConfig:
    """What is put right, beyond what is always done (NFC, control and invisible characters, line ends, blanks)."""

    mojibake: bool = True
    """Repair text that was decoded by the wrong encoding, where ftfy is sure of it."""
    html: bool = True
    """Undo entities and take out tags, except in code and in texts on markup."""
    max_blank_lines: int = 2
    """Blank lines in a row that are kept."""

    def __post_init__(self) -> None:
        if self.max_blank_lines < 0:
            raise ConfigError(
                f"curation.normalize.max_blank_lines={self.max_blank_lines} is negative; allowed: 0 or more"
            )


class NormalizeStage:
    """Normalizes the text. Again gives the same. Counts:

    `normalize.mojibake` repaired lines, `normalize.html` entities and tags, `normalize.invisible` characters
    that nobody sees, `normalize.blank_lines` lines taken out of long runs.
    """

    name = "normalize"

    def __init__(self, config: NormalizeConfig) -> None:
        self._config = config

    def process(self, record: Record) -> str | None:
        """`empty` where nothing but blanks is left."""
        text = self._plain(record.text, record)
        if not text.strip():
            record.text = ""
            return "empty"
        may_repair = _ENTITY.search(text) or "<" in text or not text.isascii()
        if may_repair and not is_code(record):
            for _ in range(_MOST_ROUNDS):
                repaired = self._repaired(text, record)
                if repaired == text:
                    break
                text = self._plain(repaired, record)
        record.text = text
        return None if text.strip() else "empty"

    def _plain(self, text: str, record: Record) -> str:
        """What is done to all text, code included."""
        text = _LINE_END.sub("\n", _TERMINAL.sub("", text))
        if not text.isascii():
            length = len(text)
            text = _INVISIBLE.sub("", text)
            if _ZERO_WIDTH.search(text):
                text = _STRAY_JOINER.sub("", _STRAY_SPACE.sub("", text))
            record.count("normalize.invisible", length - len(text))
        text = clean(text)
        if not text.isascii():
            text = _SPACE.sub(" ", text)
            if "\u3000" in text:
                text = "\n".join(map(_without_ideographic_spaces, text.split("\n")))
        text = _TRAILING.sub("", text).strip("\n")
        most = self._config.max_blank_lines + 1
        if "\n" * (most + 1) in text:
            lines = text.count("\n")
            text = re.sub(rf"\n{{{most + 1},}}", "\n" * most, text)
            record.count("normalize.blank_lines", lines - text.count("\n"))
        return text

    def _repaired(self, text: str, record: Record) -> str:
        if self._config.mojibake and not text.isascii():
            text, lines = repair_mojibake(text)
            record.count("normalize.mojibake", lines)
        if self._config.html and ("<" in text or "&" in text) and not is_on_markup(text):
            text, found = undo_html(text)
            record.count("normalize.html", found)
        return text


def _without_ideographic_spaces(line: str) -> str:
    return line if _EAST_ASIAN.search(line) else line.replace("\u3000", " ")


def repair_mojibake(text: str) -> tuple[str, int]:
    """Text whose lines were decoded by the wrong encoding, repaired by ftfy; and the number of such lines.

    ftfy's own test for unlikely sequences goes over the whole text first, since it is fast and most texts have
    none. Only encodings are put right: not the width of characters, quotation marks or ligatures.
    """
    is_bad, fix = _ftfy()
    if not is_bad(text):
        return text, 0
    lines = text.split("\n")
    repaired = [fix(line) if is_bad(line) else line for line in lines]
    return "\n".join(repaired), sum(old != new for old, new in zip(lines, repaired, strict=True))


@cache
def _ftfy() -> tuple[Any, Any]:
    import ftfy
    from ftfy.badness import is_bad

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return is_bad, lambda line: ftfy.fix_encoding(line, config)


def is_on_markup(text: str) -> bool:
    """Whether a text is on HTML or its like, so that tags and entities in it are what it is about.

    It is where it names a markup language outside of its tags, or shows a tag in quotation marks or as code.
    """
    return bool(_ON_MARKUP.search(_TAG.sub(" ", _UNSEEN.sub(" ", text)) if "<" in text else text)) or bool(
        "<" in text
        and _ON_MARKUP.search(text)
        and re.search(r"[`\"'“‘「『]<[/!]?[A-Za-z][^<>]{0,80}>[`\"'”’」』]", text)
    )


def undo_html(text: str) -> tuple[str, int]:
    """Text with entities as their characters and without known tags, and the number of both.

    Tags of blocks become line ends, others vanish; scripts, styles and comments go with what is in them.
    """
    found = 0
    if "<" in text:
        text, unseen = _UNSEEN.subn("", text)
        closed = {letter for letter in _LETTERS.split() if f"</{letter}>" in text.lower()}

        def replaced(tag: re.Match[str]) -> str:
            nonlocal found
            name = tag[2].lower()
            if len(name) == 1 and name != "p" and name not in closed:
                return tag[0]
            found += 1
            if name in _BLOCK:
                return "\n"
            return "^" if name == "sup" and not tag[1] else ""

        text = _TAG.sub(replaced, text)
        found += unseen
    text, entities = _ENTITY.subn(lambda entity: html.unescape(f"&{entity[1]};"), text)
    return text, found + entities
