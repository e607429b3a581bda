"""Contamination: the same answers as a plain search for shared n-grams, positions, policies, the index file."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_tools.reading.evaluation_sets import read_items
from data_tools.record import Record
from data_tools.stages import decontaminate
from data_tools.stages.decontaminate import (
    DecontaminateConfig,
    DecontaminateMode,
    DecontaminateStage,
    build_index,
    merge,
    tokenize,
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


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROSE_ZH,
        "",
        " ".join(QUESTION.split()[4:16]),  # twelve words
        "正确的是哪一项？绿色植物在阳光下吸收二氧",  # nineteen characters
        "Carbon dioxide, so. Why? A",
        QUESTION.replace("leaves", "roots").replace("while", "when"),
        "to be or not to be that is the",
        "床前明月光疑是地上",
        QUESTION.replace(" ", ""),
        QUESTION.replace("from the", "fromt he"),  # as many words, the same letters
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
    assert index.lengths == [[10, 13], [20]]


@pytest.mark.parametrize(("prose", "question"), [(PROSE, QUESTION), (PROSE_ZH, QUESTION_ZH)])
def test_cut_takes_the_shared_text_and_a_margin(files: list[str], prose: str, question: str) -> None:
    text = f"{prose}｟{question}｠{prose}"
    config = DecontaminateConfig(files=files, mode=DecontaminateMode.cut, margin_chars=50, min_piece_chars=60)
    stage = DecontaminateStage(config)
    ((start, end, _),) = stage.find(text)
    assert text[start:end] == question.rstrip("?。")
    reason, record = judge(stage, text)
    assert reason is None and sum(record.counts.values()) == 1
    assert record.text == f"{text[: start - 50].strip()}\n\n{text[end + 50 :].strip()}"
    assert judge(stage, question)[0] == "contaminated", "nothing is left"
    many = f" {prose} ".join([question] * 12)
    assert judge(stage, many)[0] == "contaminated", "in pieces"
    close = f"{prose}{question}{'x ' * 20}{question}{prose}"
    assert judge(stage, close)[1].text.count("\n\n") == 1


def test_annotate_only_counts(files: list[str]) -> None:
    stage = DecontaminateStage(DecontaminateConfig(files=files, mode=DecontaminateMode.annotate))
    text = QUESTION + PROSE + QUESTION + QUESTION_ZH
    assert judge(stage, text) == (
        None,
        Record(id="1", text=text, source="s", counts={"decontaminate.science": 2, "decontaminate.keju": 1}),
    )


def test_index_file_is_the_same_every_time_and_holds_what_is_needed(files: list[str], tmp_path: Path) -> None:
    config = DecontaminateConfig(files=files, index=str(tmp_path / "a.npz"))
    build_index(config, tmp_path / "a.npz")
    build_index(config, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".jsonl", ".npz", ".npz", ".txt"]
    for path in files:
        Path(path).unlink()
    assert judge(DecontaminateStage(config), PROSE + QUESTION)[0] == "contaminated"
    other = DecontaminateConfig(files=files, index=config.index, ngram_words=10)
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
        ("[1]", "cannot be read"),
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


# --- against a plain search ---


def plain_tokens(text: str) -> list[str]:
    """The same tokens, found slowly."""
    apart = unicodedata.normalize("NFKD", text)
    bare = "".join(c for c in apart if unicodedata.category(c) not in ("Mn", "Mc", "Me", "Cf"))
    folded = unicodedata.normalize("NFKC", bare).casefold()
    return re.findall("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+", folded)


def plain_runs(text: str, length: int) -> set[tuple[str, ...]]:
    tokens = plain_tokens(text)
    return {tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)}


ALPHABET = "ab Aé-ßﬁ１½…中文。国か゛が\u0301\u00ad\n𝔸🙂"
texts = st.text(ALPHABET, max_size=40)


@given(texts)
@example("İstanbul ﷺ ㎏ Ⅳ e\u0301 한국")
def test_tokens_are_those_of_a_plain_search(text: str) -> None:
    ((_, tokens),) = tokenize(text)
    found = [
        "".join(plain_tokens(text[begin:end]))
        for begin, end in zip(tokens.begins.tolist(), tokens.ends.tolist(), strict=True)
    ]
    # where one character becomes several tokens (½), each of them stands at that character
    expected = plain_tokens(text)
    assert len(found) == len(expected)
    assert all(token in piece for token, piece in zip(expected, found, strict=True))


@given(st.lists(texts, min_size=1, max_size=3), texts, st.integers(2, 5))
def test_runs_are_shared_where_a_plain_search_shares_them(pieces: list[str], item: str, length: int) -> None:
    text = " ".join([*pieces, item[5:20], *pieces])
    ((_, left),) = tokenize(text)
    ((_, right),) = tokenize(item)
    shared = np.intersect1d(left.runs(length), right.runs(length))
    assert len(shared) == len(plain_runs(text, length) & plain_runs(item, length))
    at = np.arange(0, max(0, len(left.begins) - length + 1), 2)
    assert (left.runs(length, at) == left.runs(length)[::2]).all()


def test_real_text_has_as_many_different_runs_as_a_plain_search_finds() -> None:
    text = Path(decontaminate.__file__).read_text() + Path(json.__file__).read_text() + PROSE_ZH + QUESTION_ZH
    ((_, tokens),) = tokenize(text)
    for length in (1, 2, 13, 20):
        assert len(np.unique(tokens.runs(length))) == len(plain_runs(text, length))


@pytest.mark.parametrize("filler", ["word and other ", "港口很安静。", "½ﷺ "])
def test_place_in_a_long_text_does_not_matter(files: list[str], filler: str) -> None:
    """Around the seams between pieces too."""
    stage = DecontaminateStage(DecontaminateConfig(files=files, mode=DecontaminateMode.annotate))
    size = decontaminate._PIECE_CHARS
    for place in (0, size - 40, size, size + decontaminate._OVERLAP_CHARS - 40, 2 * size):
        before = (filler * (place // len(filler) + 1))[:place]
        text = f"{before}\n{QUESTION}\n{filler * (size // len(filler))}"
        ((start, end, name),) = stage.find(text)
        assert (text[start:end], name) == (QUESTION[:-1], "science")


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


def test_lines_of_a_text_may_end_in_any_way(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n\n four ".encode())
    items = read_items(str(tmp_path / "a.txt"), ["text"])
    assert list(items) == [["one"], ["two"], ["three"], ["four"]]
