"""Harmful text: the lists that are shipped, the rule that spares a mention, blocked addresses, a classifier."""

from __future__ import annotations

import base64
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.record import Record
from data_tools.stages.harm import HarmConfig, HarmMode, HarmStage, entry_pattern, host_of, read_list
from pretrain.errors import ConfigError
from support import ROOT

LISTS = ROOT / "data_tools/stages/word_lists"
# A fastText model (two dimensions, twelve words) that learned "cheap pills win cash now" as harmful and "the garden
# lies behind the house" as fine. Not trained here: training of fasttext-numpy2-wheel 0.9.2 often ends in NaN.
MODEL = (
    "eNrbJeavz8PAwMAExKxAbATEjFA2iGaGYmSQAsS6zjKvH5lJ2fMC2dxQ/e+YIPL/ocBGv9gOrBgMSjJSEZzkjNTEArBlYFCQmZNTjOCW"
    "Z+YhOMmJxRkIXl5+OYKTnliUkoqkNCczFcmUpNSMzLwUBD8jv7Q4FcGNj89JTErNiY/PSCzKTSvNgcswwmXSMvMQGhjB/mSA+hUE5Lex"
    "7dc4+ccut+Cuveah0/t5kqr2az5Lta94U4mXDsqPtTc+5L0fnQ6D0nALYLTdDZEDF95zODjeEHE48Z7jAAAaImIC"
)
SPAM = "XXX videos and live sex cams! Best online casino, no deposit bonus, free spins. Buy Viagra online."
SPAM_ZH = "真人荷官在线发牌，百家乐、时时彩每日返水；同城约炮，裸聊加微信，代开发票。"
ARTICLE = """Gambling on the Internet began in 1994, when Antigua and Barbuda passed an act that let it grant licenses
to organizations that applied to open an online casino. Microgaming wrote the first software for it, and CryptoLogic
made transfers safe. By 2001 eight million people had taken part, and several states had begun to make laws about
it. Research on what it does to those who play has been published since, in medicine as in economics."""
ARTICLE_ZH = """百家乐是一种扑克游戏，起源于意大利，十五世纪时传入法国，十九世纪时流行于英法两国。游戏使用三至八副
扑克牌，庄家与闲家各发两张，点数总和的个位数较大者为胜。各国法律对这类游戏的规定不同，多数地方只许持有牌照的场所经营，并限制
参加者的年龄。研究者用概率论计算过各种下注方式的期望，结果都是负数。"""


def judge(
    text: str, language: str = "en", url: str | None = None, **options: object
) -> tuple[str | None, Record]:
    record = Record(id="1", text=text, source="s", language=language, url=url)
    return HarmStage(HarmConfig(**options)).process(record), record


@pytest.mark.parametrize(("text", "language"), [(SPAM, "en"), (SPAM_ZH, "zh"), (SPAM_ZH, "zh-hant")])
def test_spam_is_dropped_and_says_for_what(text: str, language: str) -> None:
    reason, record = judge(text, language)
    assert reason == "word_list"
    entries = str(record.signals["harm.entries"]).split(", ")
    assert len(entries) >= 5 and all(entry in text.lower() for entry in entries)
    assert judge(text, "und")[0] == "word_list", "before languages are known, every list counts"


@pytest.mark.parametrize(("text", "language"), [(ARTICLE, "en"), (ARTICLE_ZH, "zh")])
def test_a_mention_drops_nothing(text: str, language: str) -> None:
    reason, record = judge(text, language)
    assert reason is None
    assert record.signals["harm.entries"] in ("online casino", "百家乐")
    assert judge("An online casino.")[0] is None, "one place is a mention, however short the document is"


def test_ordinary_text_has_no_matches() -> None:
    for text, language in [
        (
            "Chinks in the armour, a faggotting stitch, cocktails in Scunthorpe, sextet, analysis, Essex.",
            "en",
        ),
        ("禁区内射门得分；满足交通需求；一本道德经；窗口爆满；面包夜宵；尼哥底母；無碼頭可停", "zh"),
    ]:
        assert judge(text, language)[1].signals == {}


def test_share_counts_words_and_chinese_characters() -> None:
    text = "hentai one two three four hentai five six seven eight"  # 2 of 10 words
    assert judge(text, max_share=0.19)[0] == "word_list"
    assert judge(text, max_share=0.2)[0] is None
    text = "约炮一二三四 五六七八约炮"  # 4 of 12 characters
    assert judge(text, "zh", max_share=0.33)[0] == "word_list"
    assert judge(text, "zh", max_share=0.34)[0] is None


def test_number_of_different_entries_counts_in_a_long_text() -> None:
    filler = " the quick brown fox jumps over the lazy dog " * 300
    text = filler.join(["hentai", "kikes", "buy viagra", "xnxx", "porno"])
    assert judge(text, max_entries=4)[0] == "word_list"
    assert judge(text, max_entries=5)[0] is None
    assert judge(filler.join(["hentai"] * 5))[0] is None


def test_annotate_keeps_the_document() -> None:
    reason, record = judge(SPAM, mode=HarmMode.annotate)
    assert reason is None and record.signals["harm.reason"] == "word_list"
    assert "harm.reason" not in judge(ARTICLE, mode=HarmMode.annotate)[1].signals


def test_code_is_not_judged_by_words() -> None:
    assert judge(SPAM, "code")[0] is None


def test_lists_of_the_user(tmp_path: Path) -> None:
    own = tmp_path / "fr.txt"
    own.write_text("\ufeff# un commentaire\nGros  Mot # en bas de casse\n\nêtre vil\n", encoding="utf-8")
    assert read_list(str(own)) == ["gros mot", "être vil"]
    text = "Un GROS\nmot, deux gros mots, Être vil."
    _, record = judge(text, "fr", word_lists={"fr": str(own)})
    assert record.signals["harm.entries"] == "gros\nmot, être vil"
    assert judge(SPAM, word_lists={"en": ""})[0] is None
    assert judge(SPAM_ZH, "zh", word_lists={"en": ""})[0] == "word_list"
    with pytest.raises(ConfigError, match="missing"):
        judge("a", word_lists={"en": str(tmp_path / "missing")})


def test_shipped_lists_are_clean() -> None:
    for path in LISTS.glob("*.txt"):
        entries = read_list(str(path))
        assert len(entries) == len(set(entries)) and 30 < len(entries) < 120
    # an entry within another one would never be counted for itself
    chinese = read_list(str(LISTS / "zh.txt"))
    assert all(len(entry) > 1 for entry in chinese)


@pytest.mark.parametrize(
    ("url", "blocked"),
    [
        ("https://bad.example/page", True),
        ("http://www.cdn.bad.example:8080/", True),
        ("BAD.example", True),
        ("https://notbad.example/", False),
        ("https://bad.example.org/?u=bad.example", False),
        ("https://user@bad.example./x", True),
        ("https://例子.测试/路", True),
        ("https://fine.example/a/Live-CAMS/1", True),
        ("https://fine.example/alive-camp", False),
        ("http://[::1", False),
        ("", False),
        (None, False),
    ],
)
def test_blocked_addresses(tmp_path: Path, url: str | None, blocked: bool) -> None:
    (tmp_path / "domains").write_text(
        "# blocked\nbad.example\nwww.other.example\n例子.测试\n", encoding="utf-8"
    )
    (tmp_path / "parts").write_text("live-cams\n")
    reason, _ = judge(
        "fine",
        url=url,
        blocked_domains=[str(tmp_path / "domains")],
        blocked_url_parts=[str(tmp_path / "parts")],
    )
    assert reason == ("blocked_url" if blocked else None)


def test_classifier_of_the_user(tmp_path: Path) -> None:
    pytest.importorskip("fasttext")
    (tmp_path / "m.bin").write_bytes(zlib.decompress(base64.b64decode(MODEL)))
    options = {"classifier": str(tmp_path / "m.bin")}
    reason, record = judge("win cash\nnow cheap pills", **options)
    assert reason == "classifier" and 0.9 < float(record.signals["harm.classifier"]) <= 1
    reason, record = judge("the house\nbehind the garden", **options)
    assert reason is None and float(record.signals["harm.classifier"]) < 0.1
    with pytest.raises(ConfigError, match="__label__other is no label"):
        judge("a", classifier_label="__label__other", **options)
    with pytest.raises(ConfigError, match="is no file"):
        judge("a", classifier=str(tmp_path / "missing.bin"))


@pytest.mark.parametrize("options", [{"max_share": 0.0}, {"classifier_threshold": 1.5}, {"max_entries": 0}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"curation.harm.{next(iter(options))}="):
        HarmConfig(**options)


words = st.text("abc", min_size=1, max_size=4)


@given(st.lists(words, min_size=1, max_size=30), st.lists(words, max_size=60))
def test_the_pattern_finds_the_listed_words_and_no_other(entries: list[str], text: list[str]) -> None:
    pattern = entry_pattern(entries)
    assert pattern is not None
    assert pattern.findall(" ".join(text)) == [word for word in text if word in entries]


@given(
    st.lists(st.text("一二三. +", min_size=1, max_size=4).map(str.strip).filter(bool), min_size=1),
    st.text("一二三. +"),
)
def test_without_word_ends_the_pattern_is_a_search_for_the_longest(entries: list[str], text: str) -> None:
    pattern = entry_pattern(entries, whole_words=False)
    plain = "|".join(
        r"\s+".join(map(re.escape, e.split(" "))) for e in sorted(set(entries), key=len, reverse=True)
    )
    assert pattern is not None
    assert pattern.findall(text) == re.findall(plain, text)


def test_hosts() -> None:
    assert host_of("HTTPS://User:pw@WWW.Example.COM:443/x") == "www.example.com"
    assert host_of("例子.测试") == "xn--fsqu00a.xn--0zwm56d"
    assert host_of("http://" + "a" * 70 + ".example/") == ""


def test_an_entry_is_no_part_of_a_word_with_marks(tmp_path: Path) -> None:
    r"""`\b` lies between a letter and its vowel sign, so an entry was found inside a longer word of Hindi or Tamil."""
    own = tmp_path / "hi.txt"
    own.write_text("गध\nகல\nकुत्ता\n", encoding="utf-8")
    inside = "गधा गधे கலை கால कुत्तापन कुत्ताों"
    assert judge(inside, "hi", word_lists={"hi": str(own)})[1].signals == {}
    _, record = judge("वह कुत्ता, गध और கல।", "hi", word_lists={"hi": str(own)})
    assert record.signals["harm.entries"] == "कुत्ता, गध, கல"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a \u0441asino here", ["casino"]),  # with a Cyrillic first letter
        ("a ca\u0455ino here", ["casino"]),
        ("a c\u03b1sino here", ["casino"]),
        ("\u0441\u0430\u0441", []),  # a word of one script is left as it is
    ],
)
def test_entries_are_found_with_letters_of_another_script(
    tmp_path: Path, text: str, found: list[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("casino\ncac\n", encoding="utf-8")
    stage = HarmStage(HarmConfig(word_lists={"en": str(words), "zh": ""}))
    assert stage.matches(Record(id="1", text=text, source="s", language="en")) == found
