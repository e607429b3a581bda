"""Brings text into one form: composed characters, one kind of line end, no remains of wrong encodings and HTML."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html.entities import html5

from data_tools.record import UNKNOWN, Record
from data_tools.stages.code_text import is_code, is_code_text
from data_tools.text import clean
from pretrain.errors import ConfigError

# Where the bytes of UTF-8 were decoded one by one, two neighboring characters come from single bytes. This test rules
# out nearly all texts before ftfy's own test, which is slower. (0xA0 after a letter may have become a blank.)
_ENCODED_TWICE = re.compile("[\x80-\u06ff\u1ea0-\u1eff\u2010-\u25ff\uf8ff\ufb01\ufb02]{2}|[ÂÃÅàáâãå] ")
# Undoing an entity can reveal another one (&amp;amp;); deeper nesting than this is no accident.
_MOST_ROUNDS = 8

# Bytes of Windows-1252, such as quotation marks and dashes, that were decoded as if they were Latin-1.
_WINDOWS_SIGN = re.compile("[\x80-\x9f]")
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[@-~]")
# In code, line separators, invisible characters and special spaces stand within strings, which must not change.
_LINE_END = re.compile(r"[\x0b\x0c\u2028\u2029]")
# Soft hyphens, direction marks and overrides, word joiners and byte-order marks are removed from prose.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
# Zero-width (non-)joiners shape Arabic and Indic letters and join emoji; zero-width spaces separate the words of Thai,
# Lao, Burmese and Khmer. After any other character they are remains of a page's layout.
_JOINED = (
    "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1a20-\u1aaf\u1b00-\u1c4f\ua840-\uabff"
    "\ufb1d-\ufdff\ufe0f\ufe70-\ufefc\u2190-\u2bff\U00010a00-\U00011fff\U0001f000-\U0001faff"
)
_STRAY_JOINER = re.compile(f"(?<![{_JOINED}])[\u200c\u200d]")
_STRAY_SPACE = re.compile("(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf])\u200b")
_ZERO_WIDTH = re.compile("[\u200b-\u200d]")

_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_INDENTATION = re.compile(r"^[\s\xa0]+", re.M)
_BLANKS = " \t\u3000"
# Ideographic spaces indent Chinese paragraphs and separate halves of verses; among Latin words they are blanks.
_EAST_ASIAN = re.compile(
    "[\u2e80-\u2fdf\u3001-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)

_SPECIAL = re.compile(
    "["
    + "".join(p.pattern[1:-1] for p in (_LINE_END, _WINDOWS_SIGN, _INVISIBLE, _ZERO_WIDTH, _SPACE))
    + "\u3000]"
)

_ENTITY = re.compile(r"&(?:amp;|#38;|#x26;)*(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
# Tags that become line ends, and other tags. A name may be a placeholder, as in `copy <source> <var>`: a tag is removed
# only where it has attributes, or its name is closed somewhere in the text, or is one that pages leave unclosed.
_BLOCKS = frozenset(
    "blockquote br dd div dl dt fieldset figcaption h1 h2 h3 h4 h5 h6 hr iframe li noscript ol p tbody td tfoot th "
    "thead tr ul".split()
)
_INLINE = "abbr acronym basefont big col colgroup dfn em font img kbd nobr span strike strong svg tt var wbr".split()
_BLOCK_WORDS = frozenset(
    "address article aside body caption center details figure footer form frame head header html legend main nav "
    "option pre section select summary table textarea title".split()
)
_INLINE_WORDS = (
    "a area audio b base button canvas cite code del embed i input ins label link map mark meta object param "
    "picture q s small source sub sup u video".split()
)
_UNCLOSED = frozenset("br dd dt hr li p td th tr wbr".split())
# The first attribute must have a value, because `<meta path finder>` is not a tag.
_VALUE = r"\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>=]+)"
_ATTRIBUTES = rf"(?:\s+[\w:@.-]+{_VALUE}(?:\s+[\w:@.-]+(?:{_VALUE})?){{0,20}})?"
_TAG = re.compile(
    rf"<(/?)({'|'.join(sorted({*_BLOCKS, *_INLINE, *_BLOCK_WORDS, *_INLINE_WORDS}))})({_ATTRIBUTES})\s*/?>",
    re.I,
)
_CLOSING = re.compile(r"</([a-z]{1,10})\s*>", re.I)
# A text has remains of HTML where a tag has attributes, touches a word, stands alone on its line, or occurs three times
# without attributes. In `mount -o loop <img> /mnt` and `between <p> and </p>`, tags stand like words: they are words.
_FEWEST_LOOSE = 3
_AROUND = frozenset(("", *" \t\n([{"))
_FEWEST_TAG_LINES = 3
# Parts of a page that are invisible to readers.
_UNSEEN = re.compile(r"<(script|style)\b[^<>]{0,500}>|<(!)--", re.I)
_UNSEEN_END = {
    "script": re.compile(r"</script\s*>", re.I),
    "style": re.compile(r"</style\s*>", re.I),
    "!": re.compile("-->"),
}
_LONGEST_UNSEEN = 20_000
# A text about markup names it, or shows a tag as code or in quotation marks; one about programming has code blocks.
_MARKUP_NAME = re.compile(r"\b(?:X?HTML5?|XML|CSS|JSX|[Mm]arkup)\b|<\?xml|```|^[ \t]*>>> |::\n\n[ \t]", re.M)
_SHOWN_TAG = re.compile(r"[`\"'“‘「『]<[/!]?[A-Za-z][^<>]{0,80}>[`\"'”’」』]")


@dataclass(kw_only=True, slots=True)
class NormalizeConfig:
    """Optional repairs, besides those always made (NFC, control and invisible characters, line ends, blanks)."""

    mojibake: bool = True
    """Repair text that was decoded with the wrong encoding, where ftfy is sure of it."""
    html: bool = True
    """Replace entities and remove tags, except in code, in texts about markup, and where tags stand like words."""
    max_blank_lines: int = 2
    """Largest number of consecutive blank lines; further ones are removed."""

    def __post_init__(self) -> None:
        if self.max_blank_lines < 0:
            raise ConfigError(
                f"curation.normalize.max_blank_lines={self.max_blank_lines} is negative; allowed: 0 or more"
            )


class NormalizeStage:
    """Normalizes the text; doing it twice changes nothing more, unless the text has escaped tags.

    Counts: `normalize.mojibake` repaired lines, `normalize.windows_signs` signs that were control characters,
    `normalize.html` entities and tags, `normalize.invisible` invisible characters, `normalize.blank_lines` lines
    removed from long runs. Code keeps its tags, entities and special characters.
    """

    name = "normalize"

    def __init__(self, config: NormalizeConfig) -> None:
        self._config = config

    def process(self, record: Record) -> str | None:
        """Returns `empty` where only white space is left."""
        text = _TERMINAL.sub("", record.text)
        # Most texts have nothing to repair, and need not be told from code.
        if (_SPECIAL.search(text) or self._is_suspicious(text)) and not _is_source(record):
            text = self._repaired(text, record)
        else:
            text = self._plain(_in_indentation(text))
        record.text = self._bounded(text, record)
        return None if record.text.strip() else "empty"

    def _repaired(self, text: str, record: Record) -> str:
        """Make the repairs that are for prose alone."""
        found = 0
        for number in range(_MOST_ROUNDS):
            before = text
            if self._config.mojibake and _may_be_mojibake(text):
                text, lines = repair_mojibake(text)
                record.count("normalize.mojibake", lines)
            if self._config.mojibake:
                text, n_signs = _WINDOWS_SIGN.subn(_windows_sign, text)
                record.count("normalize.windows_signs", n_signs)
            text = self._plain(_visible(_LINE_END.sub("\n", text), record))
            if self._config.html and not is_on_markup(text):
                # What an entity stands for is text: `&lt;p&gt;` names a tag, and does not become one.
                text, undone = undo_entities(text) if number else undo_html(text)
                found += undone
            if text == before:
                break
        record.count("normalize.html", found)
        return text

    def _is_suspicious(self, text: str) -> bool:
        """A fast test that rules out most texts, which have nothing to repair."""
        if self._config.mojibake and _may_be_mojibake(text):
            return True
        in_tags = self._config.html and "<" in text and (_TAG.search(text) or _UNSEEN.search(text))
        return bool(in_tags or (self._config.html and "&" in text and _ENTITY.search(text)))

    def _plain(self, text: str) -> str:
        """Make the repairs that apply to all text, also to code."""
        text = clean(text)
        if any(f"{blank}\n" in text for blank in _BLANKS):
            text = "\n".join([line.rstrip(_BLANKS) for line in text.split("\n")])
        return text.rstrip(_BLANKS + "\n").lstrip("\n")

    def _bounded(self, text: str, record: Record) -> str:
        most = self._config.max_blank_lines + 1
        if "\n" * (most + 1) in text:
            lines = text.count("\n")
            text = re.sub(rf"\n{{{most + 1},}}", "\n" * most, text)
            record.count("normalize.blank_lines", lines - text.count("\n"))
        return text


def _in_indentation(text: str) -> str:
    """Code with its no-break spaces replaced by blanks in indentation; elsewhere they stand in strings."""
    return text if text.isascii() else _INDENTATION.sub(lambda found: _SPACE.sub(" ", found[0]), text)


def _visible(text: str, record: Record) -> str:
    """Prose without invisible characters, and with one kind of blank."""
    if text.isascii():
        return text
    length = len(text)
    text = _INVISIBLE.sub("", text)
    if _ZERO_WIDTH.search(text):
        text = _STRAY_JOINER.sub("", _STRAY_SPACE.sub("", text))
    record.count("normalize.invisible", length - len(text))
    text = _SPACE.sub(" ", text)
    return "\n".join(map(_without_ideographic_spaces, text.split("\n"))) if "\u3000" in text else text


def _without_ideographic_spaces(line: str) -> str:
    return line if _EAST_ASIAN.search(line) else line.replace("\u3000", " ")


def _windows_sign(control: re.Match[str]) -> str:
    return control[0].encode("latin-1").decode("cp1252", "ignore")


def _may_be_mojibake(text: str) -> bool:
    return not text.isascii() and bool(_ENCODED_TWICE.search(text)) and bool(_ftfy()[0](text))


def repair_mojibake(text: str) -> tuple[str, int]:
    """Let ftfy repair lines that were decoded with the wrong encoding. Returns the text and their number.

    Lines are repaired separately, because a page often has text of several origins.
    """
    is_bad, fix = _ftfy()
    lines = text.split("\n")
    repaired = [fix(line) if is_bad(line) else line for line in lines]
    return "\n".join(repaired), sum(old != new for old, new in zip(lines, repaired, strict=True))


@cache
def _ftfy() -> tuple[Callable[[str], bool], Callable[[str], str]]:
    """The test of ftfy, and its repair of encodings alone, which changes no width, quotation mark or ligature."""
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    return is_bad, fix_encoding


def _is_source(record: Record) -> bool:
    """Whether a text is code. Tags in it make it code only where most lines, and at least three, begin with one."""
    if not is_code(record) or record.language != UNKNOWN:
        return is_code(record)
    lines = [line for line in record.text.split("\n") if line.strip()]
    n_tags = sum(line.lstrip().startswith("<") for line in lines)
    if n_tags >= max(_FEWEST_TAG_LINES, len(lines) / 2):
        return True
    return is_code_text(_ENTITY.sub(" ", _TAG.sub("", _without_unseen(record.text)[0])), record.id)


def is_on_markup(text: str) -> bool:
    """Whether a text is about HTML or other markup, so that its tags and entities belong to its content.

    Such a text names a markup language outside of its tags, shows a tag in quotation marks or as code, or has blocks
    of code (Markdown fences, Python prompts, double colons of reStructuredText).
    """
    seen, _ = _without_unseen(text)
    return bool(_SHOWN_TAG.search(seen) or _MARKUP_NAME.search(_TAG.sub(" ", seen)))


def undo_html(text: str) -> tuple[str, int]:
    """Remove known tags and replace entities by their characters. Returns the text and the number of both.

    Tags of blocks become line ends. Scripts, styles and comments are removed with their content.
    """
    text, found = _without_unseen(text)
    for _ in range(_MOST_ROUNDS):  # the parts around a tag may join to another one
        text, removed = _without_tags(text)
        found += removed
        if not removed:
            break
    text, undone = undo_entities(text)
    return text, found + undone


def _without_tags(text: str) -> tuple[str, int]:
    tags = list(_TAG.finditer(text)) if "<" in text else []
    if not _are_remains(text, tags):
        return text, 0
    closed = {name.lower() for name in _CLOSING.findall(text)} | _UNCLOSED
    parts, at, found = [], 0, 0
    for tag in tags:
        name = tag[2].lower()
        if name in closed or tag[3]:
            is_block = name in _BLOCKS or name in _BLOCK_WORDS
            parts += [
                text[at : tag.start()],
                "\n" if is_block else "^" if name == "sup" and not tag[1] else "",
            ]
            at = tag.end()
            found += 1
    return "".join(parts) + text[at:], found


def _are_remains(text: str, tags: list[re.Match[str]]) -> bool:
    """Whether tags are remains of a page, and not what the text is about."""
    loose: Counter[str] = Counter()
    for tag in tags:
        before, after = text[tag.start() - 1 : tag.start()], text[tag.end() : tag.end() + 1]
        is_alone = before in ("", "\n") and after in ("", "\n")
        if tag[3] or is_alone or not (before in _AROUND and (after in _AROUND or not after.isalnum())):
            return True
        loose[tag[2].lower()] += not tag[1]
    return any(name in _UNCLOSED and n >= _FEWEST_LOOSE for name, n in loose.items())


def undo_entities(text: str) -> tuple[str, int]:
    """Replace entities by their characters. Returns the text and their number."""
    found = 0

    def character(entity: re.Match[str]) -> str:
        nonlocal found
        is_number = entity[1].startswith("#")
        undone = html.unescape(f"&{entity[1]};") if is_number else html5.get(f"{entity[1]};", entity[0])
        found += undone != entity[0]
        return undone

    return _ENTITY.sub(character, text), found


def _without_unseen(text: str) -> tuple[str, int]:
    """The text without scripts, styles and comments, and their number."""
    parts, at = [], 0
    for opening in _UNSEEN.finditer(text):
        end = _UNSEEN_END[(opening[1] or opening[2]).lower()]
        start = opening.end()
        if opening.start() >= at and (closing := end.search(text, start, start + _LONGEST_UNSEEN)):
            parts.append(text[at : opening.start()])
            at = closing.end()
    return "".join(parts) + text[at:], len(parts)
