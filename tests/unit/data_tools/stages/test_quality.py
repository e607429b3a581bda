"""data_tools/stages/words.py and data_tools/stages/quality.py: the split, the figures, the decisions."""

from __future__ import annotations

import inspect
import json
import os
import string
import struct
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_tools.record import Record
from data_tools.stages import words as text_of
from data_tools.stages.quality import (
    RULES,
    QualityConfig,
    QualityMode,
    QualityStage,
    ThresholdsConfig,
    curated_thresholds,
    measure,
    reasons,
)
from pretrain.errors import ConfigError
from support import ROOT

# Lincoln at Gettysburg, 1863.
ENGLISH = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal.

Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, \
can long endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, \
as a final resting place for those who here gave their lives that that nation might live. It is altogether fitting \
and proper that we should do this.

But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave \
men, living and dead, who struggled here, have consecrated it, far above our poor power to add or detract. The \
world will little note, nor long remember what we say here, but it can never forget what they did here."""

# Lu Xun, My Old Home, 1921, in both scripts; Regulations on the Ranks of the People's Police, 1992.
CHINESE = """我冒了严寒，回到相隔二千余里，别了二十余年的故乡去。时候既然是深冬；渐近故乡时，天气又阴晦了，\
冷风吹进船舱中，呜呜的响，从篷隙向外一望，苍黄的天底下，远近横着几个萧索的荒村，没有一些活气。我的心禁不住悲凉起来了。

阿！这不是我二十年来时时记得的故乡？我所记得的故乡全不如此。我的故乡好得多了。"""
TRADITIONAL = """我冒了嚴寒，回到相隔二千餘里，別了二十餘年的故鄉去。時候既然是深冬；漸近故鄉時，天氣又陰晦了，\
冷風吹進船艙中，嗚嗚的響，從篷隙向外一望，蒼黃的天底下，遠近橫著幾個蕭索的荒村，沒有一些活氣。我的心禁不住悲涼起來了。

阿！這不是我二十年來時時記得的故鄉？我所記得的故鄉全不如此。我的故鄉好得多了。"""
LAW = """第一条　为了加强人民警察队伍的革命化、现代化、正规化建设，增强人民警察的责任心、荣誉感和组织纪律性，有利于\
人民警察的指挥、管理和执行职务，根据宪法，制定本条例。
第二条　人民警察实行警衔制度。
第三条　警衔是区分人民警察等级、表明人民警察身份的称号、标志和国家给予人民警察的荣誉。
第四条　人民警察实行警察职务等级编制警衔。"""

DEFAULT = QualityConfig()


def decide(text: str, language: str = "en", config: QualityConfig = DEFAULT) -> list[str]:
    figures = measure(text, language, config)[0]
    return reasons(figures, config.thresholds(language, figures=figures))


def figure(name: str, text: str, language: str = "en") -> float:
    return measure(text, language, DEFAULT)[0][f"quality.{name}"]


# --- words, lines, sentences ---


def test_english_words() -> None:
    text = "Don't pay $1,000.50 for the well-known e-book... (example.com)!"
    expected = "Don't pay $ 1,000.50 for the well - known e - book ... ( example.com )!".split()
    assert text_of.words_of(text, "en") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी की किताबें।", "हिन्दी की किताबें ।"),
        ("தமிழ் மொழி", "தமிழ் மொழி"),
        ("می‌خواهم بروم", "می‌خواهم بروم"),
        ("בְּרֵאשִׁית בָּרָא", "בְּרֵאשִׁית בָּרָא"),
        ("ที่นี่", "ที่ นี่"),
        ("ភាសាខ្មែរ។", "ភា សា ខ្ មែ រ ។"),
        ("东京は首都です。", "东 京 は 首 都 で す 。"),
        ("한국어 책 3권", "한국어 책 3권"),
    ],
)
def test_words_in_scripts_with_marks_and_without_spaces(text: str, words: str) -> None:
    assert text_of.words_of(text, "und") == words.split()


def test_chinese_words_are_characters_and_latin_words() -> None:
    assert text_of.words_of("他用GPT-4写了2,000字……", "zh") == "他 用 GPT - 4 写 了 2,000 字 ……".split()
    assert text_of.words_of("這是𠮷", "zh-hant") == ["這", "是", "𠮷"]


@given(st.text(), st.sampled_from(["en", "zh"]))
def test_no_character_is_lost_between_words(text: str, language: str) -> None:
    assert "".join(text_of.words_of(text, language)) == "".join(text.split())


def test_lines_and_paragraphs() -> None:
    text = "\n one \n\n\n two\nthree\n \n\tfour"
    assert text_of.lines_of(text) == ["one", "two", "three", "four"]
    assert text_of.paragraphs_of(text) == ["one", "two\nthree", "four"]
    assert text_of.paragraphs_of(" \n") == text_of.lines_of(" \n") == []


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (ENGLISH, "en", 8),
        ("It cost 3.5 (approx. five) euros. “Really?” She said: “Yes.” Then", "en", 4),
        ("a heading\nOne. Two.", "en", 3),
        (CHINESE, "zh", 7),
        ("“好吗？”他问。她说：“好！！”……\n标题", "zh", 4),
        ("", "en", 0),
    ],
)
def test_sentences(text: str, language: str, expected: int) -> None:
    assert text_of.count_sentences(text_of.lines_of(text), language == "zh") == expected


def test_a_long_run_of_signs_takes_no_longer() -> None:
    """A pattern that gives back what it took would need hours for this."""
    for sign in ("！", "。”", "?", ". ", "\n", " \n"):
        for text, language in (("这很好", "zh"), ("It is so", "en")):
            long = text + sign * 200_000 + "\n"
            assert text_of.count_sentences(text_of.lines_of(long), language == "zh") >= 1
            assert figure("top_2gram", long, language) >= 0


@pytest.mark.parametrize("line", ["Yes.", "Yes!", "“Yes.”", "(Yes.)", "好。", "“好！”", "好……"])
def test_a_line_that_ends_a_sentence(line: str) -> None:
    assert text_of.ends_sentence(line)


@pytest.mark.parametrize("line", ["", "Yes", "Yes,", "(Yes)", "”", "第一章 总则", "好，"])
def test_a_line_that_ends_no_sentence(line: str) -> None:
    assert not text_of.ends_sentence(line)


# --- runs of words that repeat, against the plain way to count them ---


def plain_grams(words: list[str], unit: int) -> dict[str, int]:
    figures = {}
    for n in range(2, 11):
        runs = [tuple(words[i : i + n * unit]) for i in range(len(words) - n * unit + 1)]
        if n < 5:
            top, times = Counter(runs).most_common(1)[0] if runs else ((), 0)
            chars = sum(map(len, top)) + (n - 1 if unit == 1 else 0)
            figures[f"top_{n}gram"] = times * chars if times > 1 else 0
            continue
        seen, chars, place = set(), 0, 0
        while place < len(runs):
            if runs[place] in seen:
                chars += sum(map(len, runs[place]))
                place += n * unit
            else:
                seen.add(runs[place])
                place += 1
        figures[f"duplicate_{n}gram"] = chars
    return figures


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=80))
def test_runs_of_english_words(words: list[str]) -> None:
    assert text_of.gram_chars(text_of.split(" ".join(words), "en")) == plain_grams(words, 1)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["我", "的", "，"]), max_size=120))
def test_runs_of_chinese_characters(words: list[str]) -> None:
    split = text_of.split(" ".join(words), "zh")
    assert text_of.gram_chars(split) == plain_grams(words, 2)


@pytest.mark.parametrize("text", [ENGLISH * 3, CHINESE * 3, inspect.getsource(json.decoder)])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_runs_of_real_text(text: str, language: str) -> None:
    split = text_of.split(text, language)
    unit = 2 if language == "zh" or text.startswith(CHINESE) else 1
    assert text_of.gram_chars(split) == plain_grams(text_of.words_of(text, language), unit)


# --- figures ---


def test_figures_of_words() -> None:
    text = "The cat -- 42 of them -- sat ...\n# to #"
    signals = {
        name.removeprefix("quality."): value for name, value in measure(text, "en", DEFAULT)[0].items()
    }
    # The cat -- 42 of them -- sat ... # to #: 7 words in 12, 6 with letters; "The" is no stop word for its capital
    assert signals["words"] == 7
    assert signals["mean_word_length"] == round(19 / 7, 5)
    assert signals["alpha_words"] == round(6 / 7, 5)
    assert signals["stop_words"] == 2
    assert (signals["hash_ratio"], signals["ellipsis_ratio"], signals["newline_ratio"]) == (
        round(2 / 12, 5),
        round(1 / 12, 5),
        round(1 / 12, 5),
    )


def test_figures_of_lines() -> None:
    lines = ["- one", "• two", "- one", "Three ...", "Four 。", "X" * 31, "Home"]
    text = "\n".join(lines)
    assert figure("bullet_lines", text) == round(3 / 7, 5)
    assert figure("formed_lines", text) == round(3 / 7, 5)
    assert figure("ellipsis_lines", text) == round(1 / 7, 5)
    assert figure("terminal_lines", text) == round(5 / 7, 5)
    assert figure("short_lines", text) == round(1 / 7, 5)
    assert figure("duplicate_lines", text) == round(1 / 7, 5)
    assert figure("duplicate_line_chars", text) == round(5 / 65, 5)


def test_paragraphs_that_stood_before() -> None:
    assert figure("duplicate_paragraphs", "one two\n\none two\n\nthree\n\n one two") == 0.5
    assert figure("duplicate_paragraph_chars", "aaa\n\naaa\n\nb") == round(3 / 11, 5)


def test_lines_are_short_by_language() -> None:
    assert figure("short_lines", "我" * 6 + "\n" + "我" * 7, "zh") == 0.5
    assert figure("short_lines", "X" * 30 + "\n" + "X" * 31, "en") == 0.5
    assert figure("short_lines", "One two three\nOne two three four", "en") == 0.5


def test_a_chinese_ellipsis_is_one() -> None:
    assert figure("ellipsis_ratio", "好……好", "zh") == round(1 / 3, 5)
    assert figure("ellipsis_lines", "好……\n好。。。\n好", "zh") == round(2 / 3, 5)


# --- decisions ---


def test_good_text_breaks_no_rule() -> None:
    assert decide(ENGLISH) == []
    assert decide(CHINESE, "zh") == []
    assert decide(LAW, "zh") == []
    assert decide(TRADITIONAL, "zh-hant") == []


BAD_ENGLISH = {
    "low_words": ENGLISH[:200],
    "high_words": ENGLISH * 800,
    "low_mean_word_length": " ".join(w[:2] for w in ENGLISH.split()),
    "high_mean_word_length": " ".join("internationalization" + w for w in ENGLISH.split()),
    "high_hash_ratio": ENGLISH.replace("e", "#"),
    "high_ellipsis_ratio": ENGLISH.replace(" ", "... "),
    "high_bullet_lines": "\n".join(f"- {w}" for w in ENGLISH.split()),
    "high_ellipsis_lines": ENGLISH.replace(".\n", "...\n"),
    "low_alpha_words": ENGLISH.replace(" ", " 7 "),
    "low_stop_words": "Quisquam dolorem neque porro est qui ipsum quia dolor sit amet. " * 9,
    "high_duplicate_lines": ENGLISH + "\nDo read on.\nYes." * 4,
    "high_duplicate_paragraphs": ENGLISH + "\n\nRead on." * 4,
    "high_duplicate_paragraph_chars": ENGLISH + "\n\n" + ENGLISH,
    "high_top_2gram": ENGLISH + " buy now" * 40,
    "high_top_3gram": ENGLISH + " click here to buy" * 20,
    "high_top_4gram": ENGLISH + " click here to buy" * 20,
    **{f"high_duplicate_{n}gram": ENGLISH + ENGLISH[-300:] for n in range(5, 11)},
    "high_lorem_ipsum": "Lorem ipsum dolor sit amet, consectetur adipiscing elit. " * 9,
    "high_curly_brackets": ENGLISH.replace(" the ", " {the} ")
    .replace(" a ", " {a} ")
    .replace(" that ", " {that} "),
    "low_terminal_lines": ENGLISH.replace(".\n", "\n").replace("here.", "here").replace(". ", "\n"),
    "high_short_lines": "\n".join(w.capitalize() for w in ENGLISH.replace(",", "").split()),
    "high_duplicate_line_chars": ENGLISH + "\nRead more of it." * 9,
    "high_newline_ratio": "\n".join(w.capitalize() for w in ENGLISH.replace(",", "").split()),
    "high_template_line_chars": "\n".join(f"Mar 3 10:00:{n} host sshd: closed {n * 7}" for n in range(40)),
    "low_function_words": "Apple chair river window green bottle happy mountain yellow music stone paper. "
    * 5,
    "high_stock_phrases": "Buy now! Click here to order today. Free shipping, satisfied customers. Act now. "
    + ENGLISH[:200],
    "high_garbled": ENGLISH.replace("o", "Ã¶"),
    "high_odd_pairs": ENGLISH.replace(" the ", " the of ").replace(" a ", " a is "),
    "high_noise_words": ENGLISH.replace("er", ";r").replace("ea", "e1").replace("at", "a|"),
    "high_address_words": ENGLISH.replace(" a", " example.com a").replace(" th", " b.org/x.html th"),
}


@pytest.mark.parametrize("reason", BAD_ENGLISH)
def test_a_bad_english_document(reason: str) -> None:
    figures = measure(BAD_ENGLISH[reason], "en", DEFAULT)[0]
    assert reason in reasons(figures, DEFAULT.english)


def test_every_rule_has_a_bad_document() -> None:
    off = {"low_classifier_score", "high_perplexity", "low_sentences"}
    assert {rule.reason for rule in RULES} - off == set(BAD_ENGLISH)


def test_c4_rule_on_sentences_where_asked_for() -> None:
    config = QualityConfig(english=ThresholdsConfig(min_sentences=5))
    assert decide(ENGLISH, config=config) == []
    assert decide(ENGLISH.replace(". ", ", "), config=config) == ["low_sentences"]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("low_words", CHINESE[:60]),
        ("high_mean_word_length", ENGLISH),
        ("high_ellipsis_ratio", CHINESE.replace("，", "……").replace("的", "……")),
        ("low_alpha_words", "。".join(f"{n} 的 {n} 了 {n} {n * 7} {n * 13}" for n in range(100, 130))),
        ("low_stop_words", "红橙黄绿青蓝紫黑白灰。" * 10),
        ("high_duplicate_lines", CHINESE + "\n上一页\n下一页" * 4),
        ("high_top_2gram", CHINESE + "点击下载" * 20),
        ("high_duplicate_5gram", CHINESE + CHINESE[-50:]),
        ("low_terminal_lines", CHINESE.replace("。", "\n").replace("？", "\n").replace("！", "\n")),
        ("high_short_lines", "关于我们\n联系我们\n新闻中心\n在线留言\n产品展示\n公司简介\n" + CHINESE[:10]),
        ("high_newline_ratio", "\n".join(CHINESE)),
        (
            "high_stock_phrases",
            "正品保证，全国包邮，七天无理由退货，加微信领取优惠券，先到先得！" + CHINESE[:40],
        ),
        ("high_garbled", "锟斤拷" * 9 + CHINESE),
    ],
)
def test_a_bad_chinese_document(reason: str, text: str) -> None:
    figures = measure(text, "zh", DEFAULT)[0]
    assert reason in reasons(figures, DEFAULT.chinese)


def test_english_rules_would_drop_chinese() -> None:
    """Why there is a set of its own."""
    broken = reasons(measure(CHINESE, "zh", DEFAULT)[0], ThresholdsConfig())
    assert {"low_mean_word_length"} <= set(broken)


@pytest.mark.parametrize("module", [textwrap, string, json.decoder, inspect])
def test_programs_are_kept_by_their_own_bounds(module: object) -> None:
    source = inspect.getsource(module)
    assert decide(source, "code") == []


def test_a_table_is_no_program() -> None:
    table = "values = [\n" + "    0x00, 0x00, 0x00, 0x00,\n" * 200 + "]\n"
    assert decide(table, "code")


def test_other_languages_have_no_stop_words() -> None:
    german = (
        "Vor siebenundachtzig Jahren gründeten unsere Väter auf diesem Erdteil eine neue Nation, in Freiheit gezeugt. "
        "Jetzt stehen wir in einem großen Krieg. Er prüft, ob diese Nation oder eine andere so gezeugte lange bestehen "
        "kann. Wir sind auf einem Schlachtfeld dieses Krieges versammelt. Wir sind gekommen, einen Teil davon jenen "
        "als letzte Ruhestätte zu weihen. Das ist recht und billig."
    )
    assert decide(german, "de") == []
    assert "low_stop_words" in decide(german, "en")


@pytest.mark.parametrize("language", ["en", "zh", "code", "und", "de"])
@pytest.mark.parametrize("text", ["", " \n", "。", "a", "\n\n\n"])
def test_hardly_any_text(text: str, language: str) -> None:
    assert all(value >= 0 for value in measure(text, language, DEFAULT)[0].values())
    if language != "code":
        assert "low_words" in decide(text, language)


# --- the stage ---


def test_dropping_names_the_first_reason_and_keeps_the_text() -> None:
    record = Record(id="1", text=ENGLISH[:200], source="s", language="en")
    assert QualityStage(DEFAULT).process(record) == "low_words"
    assert (record.text, record.counts) == (ENGLISH[:200], {})
    assert reasons(record.signals, DEFAULT.english)[0] == "low_words", (
        "its figures let other thresholds be tried"
    )


@given(
    st.lists(st.sampled_from([ENGLISH, CHINESE, LAW, "a b\n", "{", "JavaScript is off."]), max_size=5),
    st.sampled_from(["en", "zh", "code", "und"]),
)
def test_annotating_allows_the_same_decision_later(parts: list[str], language: str) -> None:
    text = "\n".join(parts)
    noted = Record(id="1", text=text, source="s", language=language)
    assert QualityStage(QualityConfig(mode=QualityMode.annotate)).process(noted) is None
    assert (noted.text, noted.counts) == (text, {})
    figures = json.loads(json.dumps(noted.signals))
    judged = reasons(figures, DEFAULT.thresholds(language, figures=figures))
    decided = QualityStage(DEFAULT).process(Record(id="1", text=text, source="s", language=language))
    assert decided == (judged[0] if judged else None)


def test_thresholds_can_be_retuned_from_signals() -> None:
    noted = Record(id="1", text=ENGLISH, source="s", language="en")
    QualityStage(QualityConfig(mode=QualityMode.annotate)).process(noted)
    strict = replace(ThresholdsConfig(), min_words=500, max_mean_word_length=0.0)
    assert reasons(noted.signals, strict) == ["low_words", "high_mean_word_length"]
    assert reasons(noted.signals, replace(strict, min_words=None, max_mean_word_length=None)) == []


def test_a_figure_at_its_bound_breaks_no_rule() -> None:
    thresholds = ThresholdsConfig(min_words=50, max_top_2gram=0.2)
    assert reasons({"quality.words": 50, "quality.top_2gram": 0.2}, thresholds) == []
    assert reasons({"quality.words": 49, "quality.top_2gram": 0.20001}, thresholds) == [
        "low_words",
        "high_top_2gram",
    ]


def test_lines_that_c4_drops_are_removed() -> None:
    noise = "Home\n\n\nPlease enable JavaScript to go on.\n{text}\n\nRead our Privacy Policy here.\nUse JavaScript"
    text = ENGLISH.replace("\n\n", "\n\nNext page\n\n", 1)
    record = Record(id="1", text=noise.replace("{text}", text), source="s", language="en")
    assert QualityStage(DEFAULT).process(record) is None
    assert record.text == ENGLISH
    assert record.counts == {"quality.lines": 5}
    kept = Record(id="1", text="Home\n" + ENGLISH, source="s", language="en")
    assert QualityStage(QualityConfig(remove_lines=False)).process(kept) is None
    assert kept.text == "Home\n" + ENGLISH


# Edward Lear, 1846; Li Bai; a page of a reference work, and text that is broken.
LIMERICK = """There was an Old Man with a beard,
Who said, "It is just as I feared!--
Two Owls and a Hen,
Four Larks and a Wren,
Have all built their nests in my beard!\""""
POEM = "静夜思\n\n床前明月光,\n疑是地上霜。\n举头望明月,\n低头思故乡。"
FACTS = "Area:\ntotal: 446,550 sq km\nland: 446,300 sq km\nwater: 250 sq km\n\nBorders:\nAlgeria 1,559 km\nSpain 6.3 km"


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH[:200], "en"), (POEM[:12], "zh"), (CHINESE[:50], "zh"), ("很好,推荐!", "zh")],
)
def test_chosen_sources_keep_what_is_short_or_not_prose(text: str, language: str) -> None:
    stage = QualityStage(QualityConfig(curated_sources=["zh_*", "books"]))
    for source, is_chosen in (("books", True), ("zh_poems", True), ("web", False), ("books2", False)):
        record = Record(id="1", text=text, source=source, language=language)
        reason = stage.process(record)
        assert (reason is None) == is_chosen
        assert record.text == text  # short lines too


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("还成,不错还成,不错还成,不错还成,不错,物有所值", "zh", "high_top_2gram"),
        ("hello? " * 12, "en", "high_top_2gram"),
        ("\n".join(f"{n} {n * 7} {n * 13}.5" for n in range(100, 160)), "en", "low_alpha_words"),
    ],
)
def test_chosen_sources_lose_what_is_broken(text: str, language: str, reason: str) -> None:
    stage = QualityStage(QualityConfig(curated_sources=["*"]))
    assert stage.process(Record(id="1", text=text, source="any", language=language)) == reason


def test_programs_of_chosen_sources_are_judged_as_programs() -> None:
    config = QualityConfig(curated_sources=["*"])
    assert config.thresholds("code", "any") is config.code
    assert config.thresholds("fr", "any") is config.curated


# Poems, plays, recipes, lists, tables, formulas, manuals, laws and prose in 30 languages, and pages nobody wants.
TEXTS = json.loads((ROOT / "benchmarks/curation/quality_texts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", TEXTS["good"])
def test_good_text_of_any_form_and_script_is_kept_whole(kind: str) -> None:
    text, language = TEXTS["good"][kind]["text"], TEXTS["good"][kind]["language"]
    assert decide(text, language) == []


@pytest.mark.parametrize("kind", TEXTS["junk"])
def test_junk_is_dropped(kind: str) -> None:
    assert decide(TEXTS["junk"][kind]["text"], TEXTS["junk"][kind]["language"])


@pytest.mark.parametrize(
    "kind", ["play", "recipe_plain", "plain_table", "zh_modern_poem", "th_poem", "th_prose"]
)
def test_no_line_of_verse_or_a_table_is_removed(kind: str) -> None:
    """C4 removes lines of fewer than three words, such as names of speakers, and a Thai line is one word to it."""
    text = TEXTS["good"][kind]["text"]
    record = Record(id="1", text=text, source="web", language=TEXTS["good"][kind]["language"])
    assert QualityStage(DEFAULT).process(record) is None
    assert record.text == text


def test_a_paragraph_that_mentions_a_notice_stays() -> None:
    text = ENGLISH + "\n\n" + "The book on JavaScript explains at length how the language came about. " * 3
    record = Record(id="1", text=text.strip(), source="web", language="en")
    config = QualityConfig(
        english=replace(
            ThresholdsConfig(),
            max_duplicate_5gram=None,
            max_duplicate_6gram=None,
            max_duplicate_7gram=None,
            max_duplicate_8gram=None,
            max_duplicate_9gram=None,
            max_duplicate_10gram=None,
        )
    )
    assert QualityStage(config).process(record) is None
    assert record.text == text.strip()


def test_thresholds_follow_source_form_script_and_language() -> None:
    config = QualityConfig(curated_sources=["books"])
    formed, unspaced = {"quality.formed_lines": 0.5}, {"quality.unspaced": 1}
    assert config.thresholds("en", "web") is config.english
    assert config.thresholds("fi", "web") is config.other
    assert config.thresholds("zh", "web") is config.chinese
    assert config.thresholds("und", "web", unspaced) is config.chinese  # Burmese, which no model detects
    assert config.thresholds("zh", "web", formed | unspaced) is config.formed
    assert config.thresholds("en", "books", formed) is config.curated
    assert config.thresholds("code", "books", formed) is config.code


def test_lines_without_terminal_punctuation_where_asked_for() -> None:
    record = Record(
        id="1", text="A line that ends in nothing\nRead more of it ...\n" + ENGLISH, source="s", language="en"
    )
    assert QualityStage(QualityConfig(require_terminal_punctuation=True)).process(record) is None
    assert record.text == ENGLISH


def test_lines_of_chinese() -> None:
    record = Record(id="1", text=CHINESE + "\n首页\n请阅读我们的隐私政策。", source="s", language="zh")
    assert QualityStage(DEFAULT).process(record) is None
    assert record.text == CHINESE


def test_a_line_with_a_very_long_word() -> None:
    record = Record(id="1", text=ENGLISH + "\nsee this " + "x" * 1001 + ".", source="s", language="en")
    config = QualityConfig(english=replace(ThresholdsConfig(), max_mean_word_length=None))
    assert QualityStage(config).process(record) is None
    assert record.text == ENGLISH


def test_programs_keep_their_lines() -> None:
    source = inspect.getsource(textwrap)
    record = Record(id="1", text=source, source="s", language="code")
    assert QualityStage(DEFAULT).process(record) is None
    assert record.text == source


def test_the_figures_are_the_same_in_every_process() -> None:
    code = (
        "import json, sys; from data_tools.stages.quality import *; "
        "print(json.dumps(measure(sys.stdin.read(), 'en', QualityConfig())[0]))"
    )
    texts = ENGLISH + ENGLISH[100:700] + "\nHome\nNext"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=texts,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# --- configuration and models ---


def test_configuration_composes_in_omegaconf() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(QualityConfig),
        {"mode": "annotate", "chinese": {"min_words": 10}, "english": {"max_words": None}},
    )
    config = OmegaConf.to_object(merged)
    assert (config.mode, config.chinese.min_words, config.english.max_words) == (
        QualityMode.annotate,
        10,
        None,
    )
    assert config.chinese.max_mean_word_length == 4
    assert config.code.min_words is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"english": ThresholdsConfig(min_alpha_words=1.5)}, "curation.quality.english.min_alpha_words=1.5"),
        ({"chinese": ThresholdsConfig(min_words=-1)}, "curation.quality.chinese.min_words=-1"),
        ({"code": ThresholdsConfig(max_top_2gram=float("nan"))}, "curation.quality.code.max_top_2gram=nan"),
        ({"min_line_words": 0}, "curation.quality.min_line_words=0"),
        ({"english": ThresholdsConfig(max_perplexity=300)}, "curation.quality.perplexity_path=PATH"),
        ({"english": ThresholdsConfig(min_classifier_score=0.5)}, "curation.quality.classifier_path=PATH"),
    ],
)
def test_a_wrong_option_is_named(options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        QualityConfig(**options)


def test_each_rule_has_a_threshold_and_a_figure() -> None:
    assert [rule.field for rule in RULES] == [threshold.name for threshold in fields(ThresholdsConfig)]
    of_models = {"quality.classifier_score", "quality.perplexity"}
    chooses = {"quality.formed_lines", "quality.unspaced"}
    assert {rule.signal for rule in RULES} - of_models == set(measure(ENGLISH, "en", DEFAULT)[0]) - chooses


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A fastText model, written by hand for training is random: `nation` speaks for __label__hq, `buy` against it."""
    words, labels = ["nation", "buy"], ["__label__hq", "__label__lq"]
    # dim, ws, epoch, minCount, neg, wordNgrams, loss (softmax), model (supervised), bucket, minn, maxn, rate; t
    model = struct.pack("<ii12id", 793712314, 12, 2, 5, 5, 1, 5, 1, 3, 3, 0, 0, 0, 100, 1e-4)
    model += struct.pack("<iiiqq", 4, 2, 2, 100, -1)
    for entry, kind in [(word, 0) for word in words] + [(label, 1) for label in labels]:
        model += entry.encode() + b"\0" + struct.pack("<qb", 10, kind)
    for _ in ("input", "output"):
        model += struct.pack("<?qq4f", False, 2, 2, 2, 0, 0, 2)
    path = tmp_path / "model.bin"
    path.write_bytes(model)
    return path


def test_classifier(classifier: Path) -> None:
    pytest.importorskip("fasttext")
    config = QualityConfig(
        classifier_path=str(classifier), english=replace(ThresholdsConfig(), min_classifier_score=0.5)
    )
    stage = QualityStage(config)
    assert stage.process(Record(id="1", text=ENGLISH, source="s", language="en")) is None
    bad = ENGLISH.replace("nation", "buy\nbuy")
    assert stage.process(Record(id="1", text=bad, source="s", language="en")) == "low_classifier_score"
    noted = Record(id="1", text="nation", source="s", language="en")
    QualityStage(replace(config, mode=QualityMode.annotate)).process(noted)
    assert noted.signals["quality.classifier_score"] == pytest.approx(0.98201, abs=1e-4)  # 1 / (1 + e^-4)


@pytest.mark.parametrize("label", ["__label__hq", "__label__none"])
def test_a_classifier_that_cannot_serve_is_named(classifier: Path, label: str) -> None:
    pytest.importorskip("fasttext")
    if label == "__label__hq":
        classifier.write_text("no model")
        problem = "cannot be read by fasttext"
    else:
        problem = "__label__none is no label of"
    stage = QualityStage(QualityConfig(classifier_path=str(classifier), classifier_label=label))
    with pytest.raises(ConfigError, match=problem):
        stage.process(Record(id="1", text=ENGLISH, source="s", language="en"))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    for key in ("classifier_path", "perplexity_path"):
        stage = QualityStage(QualityConfig(**{key: str(tmp_path / "none")}))
        with pytest.raises(ConfigError, match=f"curation.quality.{key}=.*none is no file"):
            stage.process(Record(id="1", text=ENGLISH, source="s", language="en"))


def test_perplexity(tmp_path: Path) -> None:
    pytest.importorskip("kenlm")
    arpa = tmp_path / "model.arpa"
    arpa.write_text(
        "\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n-1\t<unk>\t0\n-99\t<s>\t0\n-1\t</s>\t0\n-0.5\tthe\t0\n"
        "-1\triver\t0\n\n\\2-grams:\n-0.1\tthe river\n\n\\end\\\n"
    )
    noted = Record(id="1", text="The river\n\nsea", source="s", language="en")
    QualityStage(QualityConfig(mode=QualityMode.annotate, perplexity_path=str(arpa))).process(noted)
    # the -0.5, river -0.1, </s> -1; unknown -1, </s> -1: 3.6 over 5
    assert noted.signals["quality.perplexity"] == round(10 ** (3.6 / 5), 2)


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        (f"Article 1\nThe state.\n{ENGLISH}\nArticle 2\nThe people\n{ENGLISH}\nArticle 3\nThe courts", True),
        (f"Ann: {ENGLISH}\nOn\nBen: No, why?\nAnn: I said so.\nBen: So\nAnn: Yes.\nBen: Well", True),
        (f"{ENGLISH}\nShare this\nThe end\n{ENGLISH}", False),
    ],
)
def test_short_lines_of_laws_and_dialogues_stay(text: str, keeps: bool) -> None:
    record = Record(id="1", text=text, source="web", language="en")
    QualityStage(QualityConfig(english=curated_thresholds(), formed=curated_thresholds())).process(record)
    assert (record.text == text) == keeps


def test_a_name_that_a_short_article_mentions_again_is_no_repetition() -> None:
    name = "the Northern Society for the History of Stars"
    text = f"{ENGLISH} It was founded by {name}. Today {name} has a library."
    figures = measure(text, "en", QualityConfig())[0]
    assert figures["quality.duplicate_5gram"] == 0
    repeated = measure(f"{name}. " * 9, "en", QualityConfig())[0]
    assert repeated["quality.duplicate_5gram"] > 0.5
