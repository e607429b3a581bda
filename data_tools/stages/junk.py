"""Signs of text that no one wrote to be read: stock phrases, filler, garbled letters, word salad, noise of scanners.

Each sign is a figure of the quality stage and has a threshold there. One mention is no sign: an encyclopedia quotes
what it describes, so that every figure is a share.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np

from data_tools.stages.harm import entry_pattern, read_list
from data_tools.stages.words import Split

_PHRASES = Path(__file__).parent / "stock_phrases"
# Texts that quote some phrases are spared.
_SPARED_PHRASES = 3
# Longer texts are no notices, and the search would be most of their cost.
_MOST_WORDS = 1000

# Words of the usual filler, Cicero's and the invented ones, without those that are frequent in real Latin.
_FILLER = frozenset(
    "lorem ipsum dolor amet consectetur consectetuer adipiscing elit eiusmod tempor incididunt labore dolore magna "
    "aliqua veniam nostrud exercitation ullamco laboris aliquip commodo consequat duis aute irure reprehenderit "
    "voluptate velit cillum fugiat nulla pariatur excepteur sint occaecat occaecati cupidatat proident provident "
    "culpa officia deserunt mollit mollitia anim laborum dolorum pellentesque habitant morbi tristique senectus "
    "netus malesuada fames turpis egestas vestibulum tortor feugiat ultricies eget donec libero semper aenean "
    "mauris placerat eleifend quisque sapien ullamcorper pharetra wisi condimentum ornare fermentum sagittis tempus "
    "lacus vulputate vivamus suspendisse curabitur phasellus nunc lectus sodales porttitor molestie molestias "
    "praesent aliquam euismod bibendum lobortis posuere facilisis faucibus rhoncus sollicitudin pulvinar hendrerit "
    "venenatis interdum elementum dignissim dignissimos accusamus ducimus blanditiis praesentium voluptatum "
    "voluptatem deleniti corrupti quos excepturi cupiditate similique harum quidem rerum expedita distinctio soluta "
    "nobis eligendi optio cumque nihil impedit minus quod maxime placeat facere possimus assumenda repellendus "
    "perspiciatis accusantium doloremque totam rem aperiam inventore veritatis quasi architecto beatae explicabo "
    "nemo ipsam aspernatur odit fugit consequuntur nesciunt numquam eius quaerat iste natus unde omnis".split()
)

# A letter of UTF-8 read as Latin-1 or Windows-1252, once or twice; a letter that was lost; the signs that remain of
# Chinese that was converted twice, of uninitialized memory, and of UTF-8 read as GBK.
_GARBLED = re.compile(
    r"[ÂÃÄÅÎÏØÙ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘“•˜™š›œžŸ]|[ÐÑ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|[à-ï][\x80-\xbf]{2}"
    r"|â€|Ã[ÂÃ ]|ï¿½|\ufffd|锟斤拷|烫烫|屯屯|[锛銆鈥鐨鏄鍙鍦]"
)

# Words after which none of the second group follows: of 1.2 million pairs in books, news and encyclopedias, 1 in 1,000.
_LEFT = frozenset("the a an my your our their its every of with from at by to".split())
_RIGHT = frozenset(
    "of is are was were been has had because but than would he she they we who if and or to in from with for".split()
)
# The most frequent words of English. They are a third of the words of any prose, and at least a fifth.
_FUNCTION = _LEFT | frozenset(
    "in and is that for it was on are as with his they be this have or one had not but what all were when we there "
    "can which if will each about how up out them then she he so some her would other into has more who did no than "
    "been you i do me these could".split()
)
# Words that occur in too many texts to point to a phrase.
_FREQUENT = _FUNCTION | frozenset(
    "work found best back order important language home general human only process performance recent special "
    "today free real able again know support start act date problem feel right off complete per provide cannot "
    "money natural limited coming previous personal information available call page now time make could am "
    "actually let place places sorry nothing wait later large try friends looking started ask run soon exactly "
    "longer check amazing computer m answer fast don t experience join questions miss knowledge waiting choice "
    "team 100 step events consider necessary welcome buy sign save allow certainly get things here any need "
    "more".split()
)
_LEAST_PAIRS = 3

# Signs and digits inside words, as a scanner reads dirt and weak print. It begins with a sign, for speed.
_NOISE = re.compile(r"[,;:|!?.\d](?=[^\W\d_])(?:(?<=[^\W\d_A-Z][,;:|!?])|(?<=[^\W\d_A-Z]\d)|(?<=\s[,;:|.]))")
_USUAL_SIGNS = 0.2
_HOST = re.compile(
    r"[\w-]\.(?:com|net|org|info|biz|edu|gov|ru|cn|de|uk|fr|jp|io|co|us|in|br|tk|xyz|top|html?|php|aspx?)\b"
)


@functools.cache
def _latin() -> tuple[re.Pattern[str], frozenset[str]]:
    """The phrases of scripts with spaces, and a rare word of each that has one, as it may be written."""
    phrases = read_list(str(_PHRASES / "latin.txt"))
    rare = [[word for word in re.findall(r"\w+", phrase) if word not in _FREQUENT] for phrase in phrases]
    words = {max(found, key=len) for found in rare if found}
    pattern = entry_pattern(phrases)
    assert pattern is not None
    return pattern, frozenset(form for word in words for form in (word, word.capitalize(), word.upper()))


@functools.cache
def _chinese() -> re.Pattern[str]:
    pattern = entry_pattern(read_list(str(_PHRASES / "chinese.txt")))
    assert pattern is not None
    return pattern


# What a word is, as bits of one byte: it has a letter or digit, or a letter; it is among the words above; it is the
# name of a host or page; it is the rare word of a stock phrase.
WORD, ALPHA, LEFT, RIGHT, FUNCTION, FILLER, HOST, KEY = (1 << bit for bit in range(8))


@functools.cache
def _listed() -> dict[str, int]:
    """The kinds of the words of the lists above, as they may be written."""
    keys = _latin()[1]
    lists = ((_LEFT, LEFT), (_RIGHT, RIGHT), (_FUNCTION, FUNCTION), (_FILLER, FILLER))
    forms = {form for words, _ in lists for word in words for form in (word, word.capitalize())} | keys
    return {
        form: sum(bit for words, bit in lists if form.lower() in words)
        | _spelled(form)
        | KEY * (form in keys)
        for form in forms
    }


@functools.lru_cache(100_000)
def _spelled(word: str) -> int:
    """The kinds of a word that follow from its characters."""
    is_alpha = any(map(str.isalpha, word))
    is_host = "." in word and _HOST.search(word) is not None
    return WORD * (is_alpha or any(map(str.isalnum, word))) | ALPHA * is_alpha | HOST * is_host


def kinds_of(words: Split) -> np.ndarray:
    """The kinds of each distinct word."""
    listed, letters = _listed().get, WORD | ALPHA
    # most words are of letters alone, which is quick to see
    return np.frombuffer(
        bytes([listed(word) or (letters if word.isalpha() else _spelled(word)) for word in words.table]),
        np.uint8,
    )


def stock_phrases(lower: str, words: Split, distinct_kinds: np.ndarray, n_words: int) -> float:
    """Different stock phrases beyond the third, per 100 words (Chinese: characters); 0 where few are likely."""
    if n_words > _MOST_WORDS:
        return 0.0
    if words.unspaced:
        found = set(_chinese().findall(lower))
    elif np.count_nonzero(distinct_kinds & KEY) <= 1 + n_words // 100:
        return 0.0  # spares most texts the search
    else:
        found = set(_latin()[0].findall(lower.replace("’", "'")))
    return max(0, len(found) - _SPARED_PHRASES) * 100 / max(50, n_words)


def odd_pairs(kinds: np.ndarray, n_left: int) -> float:
    """Of the kinds of English words: fraction of articles and prepositions before a word that cannot follow them; 0
    below 3 pairs."""
    n_pairs = int(np.count_nonzero((kinds[:-1] << 1) & kinds[1:] & RIGHT))  # RIGHT is twice LEFT
    return n_pairs / n_left if n_pairs >= _LEAST_PAIRS else 0.0


def garbled(text: str) -> float:
    """Number of letters that an encoding has destroyed, per character."""
    return 0.0 if text.isascii() else len(_GARBLED.findall(text)) / max(1, len(text))


def noise_words(text: str, n_words: int, n_all: int) -> float:
    """Number of signs and digits inside words, per word; 0 where signs are no more frequent than in most texts."""
    if n_all - n_words <= _USUAL_SIGNS * n_all:
        return 0.0
    return len(_NOISE.findall(text)) / max(1, n_words)
