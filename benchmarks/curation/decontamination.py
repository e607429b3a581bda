"""What decontamination finds of evaluation items that were edited before they were copied into a document.

Items are cut out of texts whose sources give no documents here: passages, short questions and programs in English,
passages in Chinese. Each item is edited in one way and put into the middle of a document. False hits are counted over
documents of other sources, which hold no item.
"""

from __future__ import annotations

import ast
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.curation.figures import Figure, sample
from data_tools.record import Record
from data_tools.stages.decontamination.decontaminate import (
    DecontaminateConfig,
    DecontaminateStage,
    build_index,
)

Edit = Callable[[str, random.Random], str]

_ITEMS = 300
_PASSAGES = ("wiki_vital", "brown", "python_doc")
_PASSAGES_ZH = ("zh_law", "zh_peoplesdaily98")
_CARRIERS = ("chitchat", "linux_doc", "git_doc", "fortunes", "postgres_doc", "news20_lower", "reuters_lower")
_CARRIERS += (
    "factbook",
    "friends_grimm_tweets",
    "spam_mail",
    "code_go",
    "code_js",
    "manpages_en",
    "dict_misc",
)
_CARRIERS_ZH = ("zh_reviews_raw", "zh_linux_doc", "zh_sanguo", "zh_manpages", "zh_fortunes", "zh_poetry")
_CLEAN_DOCUMENTS = 1000  # of each source

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SENTENCE_ZH = re.compile(r"(?<=[。！？])")
_LOOK_ALIKES = str.maketrans("aceopxyABCEHKMOPTXijs", "асеорхуАВСЕНКМОРТХіјѕ")
_ACCENTS = dict(zip("aeiouncy", "áèîöúñçý", strict=True))
_OTHER_WORDS = "otter granite velvet thirteen sandal meadow whisper copper lantern orchard".split()
_OTHER_CHARACTERS = "鳄砾绒橘灯坞铜檐帆芦"


def measure(corpora: Path) -> list[Figure]:
    """Share of edited items that are found, for each kind of edit, and of documents that are hit falsely."""
    kinds = {
        "": (_passages(corpora, 26, 60), _EDITS, _CARRIERS),
        "short: ": (_passages(corpora, 8, 12), _SHORT_EDITS, _CARRIERS),
        "Chinese: ": (_passages_zh(corpora, 24, 90), _EDITS_ZH, _CARRIERS_ZH),
        "Chinese, short: ": (_passages_zh(corpora, 12, 20), _SHORT_EDITS_ZH, _CARRIERS_ZH),
        "program: ": (_programs(corpora), _EDITS_OF_PROGRAMS, _CARRIERS),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        path.write_text("".join(_line(item) for items, _, _ in kinds.values() for item in items))
        config = DecontaminateConfig(files=[str(path)], index=str(Path(folder) / "index.npz"))
        assert config.index is not None
        build_index(config, config.index)
        stage = DecontaminateStage(config)
        figures = [
            _found(stage, prefix + name, edit, items, _carriers(corpora, carriers))
            for prefix, (items, edits, carriers) in kinds.items()
            for name, edit in edits.items()
        ]
        return [*figures, _false_hits(stage, corpora)]


def _line(item: str) -> str:
    return json.dumps({"text": item}) + "\n"


def _is_hit(stage: DecontaminateStage, text: str) -> bool:
    return stage.process(Record(id="1", text=text, source="s")) is not None


def _found(stage: DecontaminateStage, name: str, edit: Edit, items: list[str], carriers: list[str]) -> Figure:
    chance = random.Random(0)
    n_found = 0
    for item in items:
        carrier = chance.choice(carriers)
        middle = carrier.find(" ", len(carrier) // 2)
        text = f"{carrier[:middle]}\n{edit(item, chance)}\n{carrier[middle:]}"
        n_found += _is_hit(stage, text)
    return Figure(name, n_found / len(items), f"{n_found} of {len(items)}", ">= 0.9")


def _false_hits(stage: DecontaminateStage, corpora: Path) -> Figure:
    n_hit = n_documents = 0
    for source in (*_CARRIERS, *_CARRIERS_ZH):
        for record in sample(corpora / "train" / f"{source}.jsonl", _CLEAN_DOCUMENTS):
            n_hit += _is_hit(stage, record["text"])
            n_documents += 1
    return Figure("documents hit falsely", n_hit / n_documents, f"{n_hit} of {n_documents}", "<= 0.0002")


# ---- items and documents ---------------------------------------------------------------------------------------------


def _carriers(corpora: Path, sources: tuple[str, ...]) -> list[str]:
    """Documents of moderate length to put items into."""
    texts = (
        record["text"]
        for source in sources
        for record in sample(corpora / "train" / f"{source}.jsonl", 40, seed=1)
    )
    return [text[:4000] for text in texts]


def _passages(corpora: Path, fewest_words: int, most_words: int) -> list[str]:
    """English passages of whole sentences, at most two of each text."""
    chance, found = random.Random(fewest_words), list[str]()
    for source in _PASSAGES:
        own = list[str]()
        for record in sample(corpora / "train" / f"{source}.jsonl", 10_000, seed=fewest_words):
            prose = [part for part in record["text"].split("\n") if len(part) > 40 and part[-1] in ".!?"]
            own += list(_runs(prose, chance, fewest_words, most_words))[:2]
            if len(own) >= _ITEMS // len(_PASSAGES):
                break
        found += own[: _ITEMS // len(_PASSAGES)]
    return found


def _runs(paragraphs: list[str], chance: random.Random, fewest: int, most: int) -> Iterator[str]:
    chance.shuffle(paragraphs)
    for paragraph in paragraphs:
        sentences = _SENTENCE.split(paragraph)
        first = chance.randrange(len(sentences))
        text, goal = "", chance.randint(fewest, most)
        for sentence in sentences[first:]:
            text = f"{text} {sentence}".strip()
            if len(_words(text)) >= goal:
                break
        if fewest <= len(_words(text)) <= most:
            yield text


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def _passages_zh(corpora: Path, fewest: int, most: int) -> list[str]:
    """Chinese sentences, one of each text."""
    found = list[str]()
    for source in _PASSAGES_ZH:
        own = list[str]()
        for record in sample(corpora / "train" / f"{source}.jsonl", 2000):
            sentences = _SENTENCE_ZH.split(record["text"].split("\n")[-1])
            fitting = [s for s in sentences if fewest <= len(_han_places(s)) <= most]
            own += fitting[:1]
        found += own[: _ITEMS // len(_PASSAGES_ZH)]
    return found


def _programs(corpora: Path) -> list[str]:
    """Functions with a docstring, of 6 to 40 lines."""
    found = list[str]()
    for record in sample(corpora / "train" / "code_python.jsonl", 2000):
        try:
            tree = ast.parse(record["text"])
        except (SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 2 and ast.get_docstring(node):
                source = ast.get_source_segment(record["text"], node) or ""
                if 6 <= source.count("\n") <= 40:
                    found.append(source)
                    break
    return found[:_ITEMS]


# ---- edits -----------------------------------------------------------------------------------------------------------


def _every_nth_word(n: int, change: Edit) -> Edit:
    def edit(text: str, chance: random.Random) -> str:
        words = text.split(" ")
        for at in range(n - 1, len(words), n):
            words[at] = change(words[at], chance)
        return " ".join(words)

    return edit


def _other_word(_: str, chance: random.Random) -> str:
    return chance.choice(_OTHER_WORDS)


def _one_word(text: str, chance: random.Random) -> str:
    words = text.split(" ")
    words[chance.randrange(len(words))] = chance.choice(_OTHER_WORDS)
    return " ".join(words)


def _part(first: float, last: float) -> Edit:
    def edit(text: str, _: random.Random) -> str:
        words = text.split(" ")
        return " ".join(words[round(first * len(words)) : round(last * len(words))])

    return edit


def _accented(text: str, _: random.Random) -> str:
    return "".join(_ACCENTS.get(char, char) for char in text)


def _full_width(text: str, _: random.Random) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def _footnote(word: str, chance: random.Random) -> str:
    return f"{word}[{chance.randint(1, 99)}]"


def _raised_footnote(word: str, chance: random.Random) -> str:
    return word + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(chance.randint(1, 99)))


def _link(word: str, chance: random.Random) -> str:
    path = "_".join(chance.sample(_OTHER_WORDS, 2))
    return f"[{word}](https://en.example.org/wiki/{path})"


def _wrapped(text: str, _: random.Random) -> str:
    """Lines of 40 characters; long words are divided at the end of a line."""
    return re.sub(r"(.{40}\w{3})(\w{3})", r"\1-\n\2", text)


def _verbatim(text: str, _: random.Random) -> str:
    return text


_EDITS: dict[str, Edit] = {
    "verbatim": _verbatim,
    "case": lambda text, _: text.upper(),
    "line breaks": lambda text, _: text.replace(" ", "\n"),
    "words divided at line ends": _wrapped,
    "punctuation to blank": lambda text, _: re.sub(r"[^\w\s]", " ", text),
    "punctuation deleted": lambda text, _: re.sub(r"[^\w\s]", "", text),
    "accents": _accented,
    "full width": _full_width,
    "one word changed": _one_word,
    "every 12th word changed": _every_nth_word(12, _other_word),
    "first half": _part(0, 0.5),
    "second half": _part(0.5, 1),
    "first third": _part(0, 1 / 3),
    "last third": _part(2 / 3, 1),
    "Markdown links": _every_nth_word(6, _link),
    "emphasis": _every_nth_word(5, lambda word, _: f"**{word}**"),
    "HTML tags": _every_nth_word(5, lambda word, _: f'<a href="/x">{word}</a>'),
    "footnote marks": _every_nth_word(6, _footnote),
    "raised footnote marks": _every_nth_word(6, _raised_footnote),
    "Cyrillic look-alikes": lambda text, _: text.translate(_LOOK_ALIKES),
    "zero-width spaces": lambda text, _: re.sub(r"(\w\w)(\w)", "\\1\u200b\\2", text),
}
_SHORT_EDITS: dict[str, Edit] = {
    "verbatim": _verbatim,
    "one word changed": _one_word,
    "punctuation deleted": _EDITS["punctuation deleted"],
    "footnote marks": _EDITS["footnote marks"],
    "Cyrillic look-alikes": _EDITS["Cyrillic look-alikes"],
}


def _han_places(text: str) -> list[int]:
    return [place for place, char in enumerate(text) if "\u4e00" <= char <= "\u9fff"]


def _every_nth_character(n: int, change: Edit) -> Edit:
    def edit(text: str, chance: random.Random) -> str:
        chars = list(text)
        for place in _han_places(text)[n - 1 :: n]:
            chars[place] = change(chars[place], chance)
        return "".join(chars)

    return edit


def _one_character(text: str, chance: random.Random) -> str:
    place = chance.choice(_han_places(text))
    return text[:place] + chance.choice(_OTHER_CHARACTERS) + text[place + 1 :]


def _other_character(_: str, chance: random.Random) -> str:
    return chance.choice(_OTHER_CHARACTERS)


def _with_sound(char: str, chance: random.Random) -> str:
    return f"{char}({chance.choice(['zhōng', 'guó', 'rén', 'mín', 'fǎ', 'lǜ'])})"


_EDITS_ZH: dict[str, Edit] = {
    "verbatim": _verbatim,
    "one character changed": _one_character,
    "every 19th character changed": _every_nth_character(19, _other_character),
    "pinyin in brackets": _every_nth_character(1, _with_sound),
    "pinyin in brackets, every 5th": _every_nth_character(5, _with_sound),
    "first half": lambda text, _: text[: len(text) // 2],
    "second half": lambda text, _: text[len(text) // 2 :],
    "punctuation deleted": lambda text, _: re.sub(r"[^\w\s]", "", text),
    "blanks between characters": lambda text, _: " ".join(text),
    "footnote marks": _every_nth_character(8, _footnote),
    "full width": _full_width,
}


_SHORT_EDITS_ZH = {
    name: _EDITS_ZH[name] for name in ("verbatim", "one character changed", "pinyin in brackets")
}


def _without_docstring(text: str, _: random.Random) -> str:
    tree = ast.parse(text)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    del function.body[0]
    return ast.unparse(tree)


_EDITS_OF_PROGRAMS: dict[str, Edit] = {
    "verbatim": _verbatim,
    "docstring removed": _without_docstring,
    "comments removed": lambda text, _: re.sub(r"(?m)\s*#.*$", "", text),
    "indented": lambda text, _: re.sub("(?m)^", "    ", text),
}
