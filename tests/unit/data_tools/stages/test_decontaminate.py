"""Contamination: what edits leave it found, what is no hit, positions, policies, the index file, the letters."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_tools.reading.evaluation_sets import read_items
from data_tools.record import Record
from data_tools.stages.decontamination import canonical, decontaminate, evaluation_index
from data_tools.stages.decontamination.canonical import Stream, streams_of
from data_tools.stages.decontamination.decontaminate import (
    DecontaminateConfig,
    DecontaminateMode,
    DecontaminateStage,
    build_index,
    merge,
)
from pretrain.errors import ConfigError

QUESTION = "Which gas do the leaves of green plants take up from the air while the sun is shining on them?"
QUESTION_ZH = "下列关于光合作用的说法中，正确的是哪一项？绿色植物在阳光下吸收二氧化碳，释放氧气。"
PROSE = "It was a bright cold day in the harbour, and the fishermen mended what the storm had torn. " * 8
PROSE_ZH = "清晨的港口很安静，渔民们坐在石阶上修补昨夜被风浪撕破的渔网，远处传来汽笛声。" * 12


def write_sets(folder: Path, **sets: list[dict[str, object]] | str) -> list[str]:
    paths = []
    for name, items in sets.items():
        path = folder / f"{name}.{'txt' if isinstance(items, str) else 'jsonl'}"
        lines = items if isinstance(items, str) else "\n".join(json.dumps(item) for item in items)
        path.write_text(lines, encoding="utf-8")
        paths.append(str(path))
    return paths


def judge(stage: DecontaminateStage, text: str) -> tuple[str | None, Record]:
    record = Record(id="1", text=text, source="s")
    return stage.process(record), record


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return write_sets(
        tmp_path,
        science=[{"question": QUESTION, "answer": "Carbon dioxide"}, {"question": "Why?", "answer": "So."}],
        keju=[{"question": QUESTION_ZH, "answer": "A"}],
        lines="To be, or not to be, that is the question.\n\n床前明月光，疑是地上霜。举头望明月，低头思故乡。\n",
    )


@pytest.mark.parametrize(
    ("text", "set_name"),
    [
        (PROSE + QUESTION + PROSE, "science"),
        (PROSE + QUESTION.upper().replace(" ", "\n  ").replace("?", " ?!"), "science"),
        ("".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in QUESTION), "science"),
        (" ".join(QUESTION.split()[4:17]), "science"),
        (PROSE_ZH + QUESTION_ZH + PROSE_ZH, "keju"),
        ("问：" + QUESTION_ZH.replace("，", "\n").replace("。", "") + "答", "keju"),
        (PROSE + "正确的是哪一项？绿色植物在阳光下吸收二氧化" + PROSE, "keju"),
        ("He said: to be or not to be -- that is the question", "lines"),
        ("李白写道床前明月光疑是地上霜举头望明月低头思故乡", "lines"),
    ],
)
def test_what_is_shared_is_found(files: list[str], text: str, set_name: str) -> None:
    reason, record = judge(DecontaminateStage(DecontaminateConfig(files=files)), text)
    assert reason == "contaminated"
    assert record.counts == {f"decontaminate.{set_name}": 1}


LONG = (
    "The granary was built in 1640, when the well-known mill owner's heirs had quarrelled over the river meadow; its "
    "beams came from two wrecked herring boats, and its clock has shown a quarter past nine since the great flood."
)
LONG_ZH = (
    "船员们在出发之前仔细检查了缆绳和风帆，因为老船长相信："
    "只有准备充分，才能平安穿过那片布满暗礁的海峡，把货物送到北方的港口。"
)
PROGRAM = '''def ripest(baskets, limit):
    """Return the ripest melons of all baskets that a cart of the given limit can carry home at once."""
    melons = sorted((melon for basket in baskets for melon in basket), key=lambda melon: -melon.ripeness)
    load = []
    while melons and limit >= melons[0].weight:
        limit -= melons[0].weight
        load.append(melons.pop(0))
    return load
'''
SHORT = "Which lighthouse keeper painted the harbor walls yellow?"
SHORT_JOINED = "Did the mill owner's well-known cousin sell the copper kettles?"
SHORT_COMMON = "Who was the first to see the old men there?"


def every(n: int, change: Callable[[str], str], parts: list[str], joint: str = " ") -> str:
    return joint.join(change(part) if number % n == n - 1 else part for number, part in enumerate(parts))


WORDS, CHARACTERS = LONG.split(), list(LONG_ZH)
EDITS = {
    "every 12th word": every(12, lambda word: "otter", WORDS),
    "first third": " ".join(WORDS[: len(WORDS) // 3]),
    "last third": " ".join(WORDS[-len(WORDS) // 3 :]),
    "punctuation": re.sub(r"[^\w\s]", "", LONG),
    "links": every(2, lambda word: f"[{word}](https://en.example.org/wiki/Some_Page_Of_Some_Book)", WORDS),
    "addresses": every(3, lambda word: f"{word} https://en.example.org/wiki/Some_Page_Of_Some_Book", WORDS),
    "tags": every(2, lambda word: f'<a href="/some/page/of/some/book.html" class="x">{word}</a>', WORDS),
    "footnotes": every(6, lambda word: f"{word}[12]", WORDS),
    "raised footnotes": every(5, lambda word: f"{word}¹²", WORDS),
    "Cyrillic": LONG.translate(str.maketrans("aceopxyTHB", "асеорхуТНВ")),
    "Greek": LONG.translate(str.maketrans("oapTHB", "οαρΤΗΒ")),
    "divided words": re.sub(r"(.{30}\w\w)(\w\w)", r"\1-\n\2", LONG),
    "every 19th character": every(19, lambda _: "鳄", CHARACTERS, ""),
    "pinyin": every(1, lambda char: f"{char}(zhōng)", CHARACTERS, ""),
    "pinyin of some": every(4, lambda char: f"{char}（shuǐ）", CHARACTERS, ""),
    "blanks": " ".join(CHARACTERS),
    "second half": "".join(CHARACTERS[len(CHARACTERS) // 2 :]),
    "no docstring": re.sub('(?s)    """.*?"""\n', "", PROGRAM),
    "short: a word": SHORT.replace("painted", "whitewashed"),
    "short: first word": SHORT.replace("Which", "Whose"),
    "short: punctuation": re.sub(r"[^\w\s]", "", SHORT_JOINED),
    "short: a common word": SHORT_COMMON.replace("see", "meet"),
    "short: footnotes": every(3, lambda word: f"{word}[3]", SHORT.split()),
}


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> DecontaminateStage:
    items = [{"text": text} for text in (LONG, LONG_ZH, PROGRAM, SHORT, SHORT_JOINED, SHORT_COMMON)]
    return DecontaminateStage(
        DecontaminateConfig(files=write_sets(tmp_path_factory.mktemp("sets"), quiz=items))
    )


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_item_is_found(edited: DecontaminateStage, edit: str) -> None:
    for before, after in ((PROSE, PROSE), (PROSE_ZH, PROSE_ZH), ("", "")):
        assert judge(edited, f"{before}\n{EDITS[edit]}\n{after}")[0] == "contaminated"


def test_words_that_became_one_count_as_shared(edited: DecontaminateStage) -> None:
    _, record = judge(edited, PROSE + EDITS["punctuation"])
    assert record.signals["decontaminate.quiz.share"] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROSE_ZH,
        "",
        "The granary was built in 1640, when the heirs had sold the mill.",
        "its clock has shown the wrong time since the great war",
        "因为老船长相信：今年的风浪会更大。",
        "for melon in basket: melons.append(melon)",
        "Which lighthouse keeper painted the boat?",
        "Which harbor had the first lighthouse with yellow walls?",
        " ".join(random.Random(0).sample(LONG.split(), len(LONG.split()))),
    ],
)
def test_little_or_shuffled_text_is_no_hit(edited: DecontaminateStage, text: str) -> None:
    assert judge(edited, text) == (None, Record(id="1", text=text, source="s"))


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROSE_ZH,
        "",
        " ".join(QUESTION.split()[4:10]),
        "正确的是哪一项？绿色",
        "Carbon dioxide, so. Why? A",
        "to be or not to be",
        "床前明月光疑是地上",
    ],
)
def test_what_is_not_shared_stays(files: list[str], text: str) -> None:
    assert judge(DecontaminateStage(DecontaminateConfig(files=files)), text) == (
        None,
        Record(id="1", text=text, source="s"),
    )


def test_items_are_counted(files: list[str]) -> None:
    index = decontaminate.collect(DecontaminateConfig(files=files))
    assert index.names == ["science", "keju", "lines"]
    assert (index.items, index.too_short) == ([2, 1, 2], [1, 0, 0])
    assert index.units.tolist() == [[0, 1, 0], [1, 1, 1], [2, 1, 0], [2, 2, 1]]
    assert np.diff(index.starts).tolist() == [20, 37, 10, 20]


def test_short_texts_of_an_item_are_looked_for_together(tmp_path: Path) -> None:
    item = {"question": "Who wrote the ballad of Tenby?", "answer": "An unknown cooper from Swansea."}
    stage = DecontaminateStage(DecontaminateConfig(files=write_sets(tmp_path, trivia=[item])))
    assert judge(stage, f"{PROSE} {item['question']} {item['answer']}")[0] == "contaminated"
    assert judge(stage, f"{PROSE} {item['question']} A poet.")[0] is None


@pytest.mark.parametrize(("prose", "question"), [(PROSE, QUESTION), (PROSE_ZH, QUESTION_ZH)])
def test_cut_takes_the_shared_text_and_a_margin(files: list[str], prose: str, question: str) -> None:
    text = f"{prose}｟{question}｠{prose}"
    config = DecontaminateConfig(files=files, mode=DecontaminateMode.cut, margin_chars=50, min_piece_chars=60)
    stage = DecontaminateStage(config)
    ((start, end, *_),) = stage.find(text)
    assert text[start:end] == question.rstrip("?。")
    reason, record = judge(stage, text)
    assert reason is None and sum(record.counts.values()) == 1
    assert record.text == f"{text[: start - 50].strip()}\n\n{text[end + 50 :].strip()}"
    assert judge(stage, question)[0] == "contaminated", "nothing is left"
    many = f" {prose} ".join([question] * 12)
    assert judge(stage, many)[0] == "contaminated", "in pieces"
    close = f"{prose}{question}{'x ' * 20}{question}{prose}"
    assert judge(stage, close)[1].text.count("\n\n") == 1


def test_annotate_counts_and_describes(files: list[str]) -> None:
    stage = DecontaminateStage(DecontaminateConfig(files=files, mode=DecontaminateMode.annotate))
    text = QUESTION + PROSE + QUESTION.replace("leaves", "roots") + QUESTION_ZH
    reason, record = judge(stage, text)
    assert (reason, record.text) == (None, text)
    assert record.counts == {"decontaminate.science": 2, "decontaminate.keju": 1}
    assert record.signals == {
        "decontaminate.science.item": 1,
        "decontaminate.science.share": 1.0,
        "decontaminate.keju.item": 1,
        "decontaminate.keju.share": 1.0,
    }
    _, record = judge(stage, PROSE + "床前明月光，疑是地上霜。举头望明月，低头思母校。")
    assert record.signals == {"decontaminate.lines.item": 2, "decontaminate.lines.share": 0.9}


def test_index_file_is_the_same_every_time_and_holds_what_is_needed(files: list[str], tmp_path: Path) -> None:
    config = DecontaminateConfig(files=files, index=str(tmp_path / "a.npz"))
    build_index(config, tmp_path / "a.npz")
    build_index(config, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".jsonl", ".npz", ".npz", ".txt"]
    for path in files:
        Path(path).unlink()
    assert judge(DecontaminateStage(config), PROSE + QUESTION)[0] == "contaminated"
    other = DecontaminateConfig(files=files, index=config.index, min_words=10)
    with pytest.raises(ConfigError, match="was built with"):
        judge(DecontaminateStage(other), PROSE)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    torn = DecontaminateConfig(files=files, index=str(tmp_path / "b.npz"))
    with pytest.raises(ConfigError, match="cannot be read"):
        judge(DecontaminateStage(torn), PROSE)


def test_files_and_fields(tmp_path: Path) -> None:
    item = {"stem": {"en": "short"}, "choices": [{"text": QUESTION}, {"text": "B"}], "question": PROSE}
    with gzip.open(tmp_path / "exam.v1.jsonl.gz", "wt") as file:
        file.write(json.dumps(item) + "\n\n")
    config = DecontaminateConfig(files=[str(tmp_path / "exam.v1.jsonl.gz")], fields=["stem", "choices"])
    stage = DecontaminateStage(config)
    assert judge(stage, QUESTION)[1].counts == {"decontaminate.exam": 1}
    assert judge(stage, PROSE)[0] is None
    for content, message in [
        ('{"a": 1}', "none of the fields"),
        ("{", "cannot be read"),
        ("[1]", "JSON list"),
    ]:
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=message):
            decontaminate.collect(DecontaminateConfig(files=[str(tmp_path / "bad.jsonl")]))
    with pytest.raises(ConfigError, match="cannot be read"):
        decontaminate.collect(DecontaminateConfig(files=[str(tmp_path / "missing.txt")]))


def test_without_files_nothing_is_found() -> None:
    assert judge(DecontaminateStage(DecontaminateConfig()), QUESTION)[0] is None


@pytest.mark.parametrize(
    "options",
    [{"ngram_words": 7}, {"min_chars": 1}, {"margin_chars": -1}, {"files": ["a/x.jsonl", "b/x.txt"]}],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        DecontaminateConfig(**options)


# --- letters and tokens, against a plain search ---


def plain_letters(text: str) -> str:
    """The same letters, found slowly; a blank stands for what separates words."""
    apart = unicodedata.normalize("NFKD", text)
    bare = "".join(c for c in apart if unicodedata.category(c) not in ("Mn", "Mc", "Me", "Cf"))
    folded = unicodedata.normalize("NFKC", bare).casefold().translate(canonical.LOOK_ALIKES)
    return "".join(c if c.isalpha() else " " for c in folded)


def test_every_character_is_folded_as_by_itself() -> None:
    """Most characters are left out when the tables are built, because they stay as they are."""
    tables = canonical._tables()
    kinds = tables.kinds.tolist()
    codes = [*range(0x3000), *range(0xA000, 0xAC10), *range(0xF900, 0x10000), *range(0x10000, 0x32400, 7)]
    for code in codes:
        begin, end = tables.starts[code : code + 2].tolist()
        folded = "".join(map(chr, tables.folded[begin:end].tolist()))
        character = chr(code)
        assert folded == canonical._fold(character)
        is_mark = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
        assert (kinds[code] == canonical._IGNORED) is is_mark
        assert (kinds[code] > canonical._IGNORED) is character.isalpha()


UNSPACED = "[\u3040-\u30ff\u3400-\u9fff]"


def plain_tokens(text: str) -> tuple[list[str], list[str]]:
    letters = plain_letters(text)
    return re.findall(f"(?:(?!{UNSPACED})\\S)+", letters), re.findall(UNSPACED, letters)


ALPHABET = "ab Aé-ßﬁ１½…中文。国か゛が\u0301\u00ad\n𝔸🙂вН[("
texts = st.text(ALPHABET, max_size=40)


@given(texts)
@example("İstanbul ﷺ ㎏ Ⅳ e\u0301 한국")
def test_tokens_are_those_of_a_plain_search(text: str) -> None:
    ((_, streams),) = streams_of(text)
    for stream, expected in zip(streams, plain_tokens(text), strict=True):
        spans = [] if stream is None else zip(stream.begins.tolist(), stream.ends.tolist(), strict=True)
        found = ["".join(plain_tokens(text[begin:end])[stream is not streams.spaced]) for begin, end in spans]
        # where one character becomes several tokens, each of them stands at that character
        assert len(found) == len(expected)
        assert all(token in piece for token, piece in zip(expected, found, strict=True))


def stream_of(text: str) -> Stream:
    ((_, streams),) = streams_of(text)
    return streams.spaced


@given(st.lists(texts, min_size=1, max_size=3), texts, st.integers(2, 5))
def test_grams_and_tokens_are_equal_where_their_letters_are(
    pieces: list[str], item: str, length: int
) -> None:
    text = " ".join([*pieces, item[5:20], *pieces])
    grams, tokens = set[int](), set[int]()
    plain_grams, plain = set[str](), set[str]()
    for part in (text, item):
        words = plain_tokens(part)[0]
        letters, starts = "".join(words), list(itertools.accumulate(map(len, words), initial=0))[:-1]
        grams.update(stream_of(part).grams(length).tolist())
        tokens.update(stream_of(part).tokens().tolist())
        plain_grams.update(letters[at : at + length] for at in starts if at + length <= len(letters))
        plain.update(words)
    assert (len(grams), len(tokens)) == (len(plain_grams), len(plain))


def test_joined_words_have_the_hash_of_the_one_word(tmp_path: Path) -> None:
    index = decontaminate.collect(DecontaminateConfig(files=write_sets(tmp_path, a=[{"text": LONG}])))
    words = plain_tokens(LONG)[0]
    at = words.index("well")
    assert evaluation_index.joined_hash(index, at, at + 3) == stream_of("wellknownmill").joined(0, 1)
    assert evaluation_index.joined_hash(index, at, at + 3) != stream_of("wellknownmall").joined(0, 1)


def test_common_words_say_little_and_long_ones_much(tmp_path: Path) -> None:
    items = [
        {"text": "the and of which number photosynthesis quern 1234 on it"},
        {"text": "的一是在缆绳风帆暗礁海峡"},
    ]
    index = decontaminate.collect(DecontaminateConfig(files=write_sets(tmp_path, a=items)))
    assert index.bits[0] < index.bits[3] < index.bits[4] < index.bits[5] == 120
    assert index.bits[9] == 18 and index.bits[9] < index.bits[13] == 55


@pytest.mark.parametrize("filler", ["word and other ", "港口很安静。", "½ﷺ "])
def test_place_in_a_long_text_does_not_matter(files: list[str], filler: str) -> None:
    """Around the seams between pieces too."""
    stage = DecontaminateStage(DecontaminateConfig(files=files, mode=DecontaminateMode.annotate))
    size = canonical.PIECE_CHARS
    for place in (0, size - 40, size, size + canonical.OVERLAP_CHARS - 40, 2 * size):
        before = (filler * (place // len(filler) + 1))[:place]
        text = f"{before}\n{QUESTION}\n{filler * (size // len(filler))}"
        ((start, end, name, item, share),) = stage.find(text)
        assert (text[start:end], name, item, share) == (QUESTION[:-1], "science", 1, 1.0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)).map(lambda pair: (pair[0], sum(pair)))))
def test_merged_spans_cover_the_same_and_are_apart(spans: list[tuple[int, int]]) -> None:
    merged = merge(spans)
    assert {at for span in merged for at in range(*span)} == {at for span in spans for at in range(*span)}
    assert all(one[1] < two[0] for one, two in itertools.pairwise(merged))


# --- files of strangers ---


def test_an_evaluation_file_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "', 9) + gzip.compress(b"a" * (16 << 20), 9) * 8)
    with pytest.raises(ConfigError, match=r"bomb\.jsonl\.gz cannot be read: unpacks to more than 200 times"):
        build_index(DecontaminateConfig(files=[str(path)]), tmp_path / "index.npz")


def test_an_index_that_is_packed_is_refused(tmp_path: Path, files: list[str]) -> None:
    """A million zeros have a kilobyte there, and build_index packs nothing."""
    config = DecontaminateConfig(files=files, index=str(tmp_path / "index.npz"))
    build_index(config, tmp_path / "index.npz")
    assert judge(DecontaminateStage(config), PROSE + QUESTION)[0] == "contaminated"
    with np.load(tmp_path / "index.npz", allow_pickle=False) as arrays:
        np.savez_compressed(tmp_path / "index.npz", **dict(arrays))
    with pytest.raises(ConfigError, match="is compressed"):
        judge(DecontaminateStage(config), PROSE)


def test_an_index_of_an_earlier_form_is_refused_and_so_is_one_that_does_not_fit(
    tmp_path: Path, files: list[str]
) -> None:
    config = DecontaminateConfig(files=files, index=str(tmp_path / "index.npz"))
    build_index(config, tmp_path / "index.npz")
    with np.load(tmp_path / "index.npz", allow_pickle=False) as arrays:
        good = dict(arrays)
    parameters, *rest = json.loads(str(good["head"]))
    earlier = [parameters.replace('"format": 2', '"format": 1'), *rest]
    changes: list[tuple[dict[str, object], str]] = [
        ({"head": np.array(json.dumps(earlier))}, "was built with .*build it again"),
        ({"places": good["places"] + np.uint32(1000)}, "do not fit each other"),
        ({"starts": good["starts"][::-1].copy()}, "do not fit each other"),
        ({"units": good["units"] + np.uint32(9)}, "do not fit each other"),
        ({"tokens": good["tokens"].astype(np.uint64)}, "do not fit each other"),
        ({"head": np.array("[1]")}, "cannot be read|was built with"),
    ]
    for change, message in changes:
        np.savez(tmp_path / "index.npz", **(good | change))
        with pytest.raises(ConfigError, match=message):
            judge(DecontaminateStage(config), PROSE)


def test_lines_of_a_text_may_end_in_any_way(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n\n four ".encode())
    items = read_items(str(tmp_path / "a.txt"), ["text"])
    assert list(items) == [["one"], ["two"], ["three"], ["four"]]
