"""Real sentences in many languages, code of several languages, prose on code, and a model file of the user."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import ROOT
from support.short_programs import PROGRAMS, TEXTS

pytest.importorskip("py3langid")
from py3langid.langid import MODEL_FILE, LanguageIdentifier, visit_counts

from data_tools.record import Record
from data_tools.stages import language
from data_tools.stages.language import (
    LanguageConfig,
    LanguageStage,
    _features_by,
    is_traditional,
)
from pretrain.errors import ConfigError

SIMPLIFIED = "为了保护专利权人的合法权益，鼓励发明创造，推动发明创造的应用，提高创新能力，制定本法。"
TRADITIONAL = "為了保護專利權人的合法權益，鼓勵發明創造，推動發明創造的應用，提高創新能力，制定本法。"
VERSE = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate;
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
"""


@pytest.fixture(scope="module")
def stage() -> LanguageStage:
    return LanguageStage(LanguageConfig())


def told(stage: LanguageStage, text: str, id: str = "1") -> str:
    record = Record(id=id, text=text, source="s")
    assert stage.process(record) is None
    assert 0 <= record.signals["language.score"] <= 1
    return record.language


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (SIMPLIFIED, "zh"),
        (TRADITIONAL, "zh-hant"),
        ("台北捷運今天發生誤點，許多乘客改搭公車。", "zh-hant"),
        ("好看", "zh"),
        ("这本书我在 Amazon 上买的，包装很好，物流 two days 就到了。", "zh"),
        ("今日はとても良い天気ですね。散歩に行きましょう。", "ja"),
        ("오늘은 날씨가 좋네요. 산책하러 갑시다.", "ko"),
        ("The jury further said that the committee deserves the praise of the city.", "en"),
        ("Hello!", "en"),
        ("Der Hund läuft schnell durch den Wald.", "de"),
        ("Le chat dort sur le canapé.", "fr"),
        ("El perro corre por el parque todas las mañanas.", "es"),
        ("Сегодня хорошая погода.", "ru"),
        ("Mae'r tywydd yn braf heddiw.", "cy"),
        ("วันนี้อากาศดี", "th"),
        ("123 + 45 !!", "und"),
        ("http://example.org/downloads/1118/article_1117706.html", "und"),
        (VERSE, "en"),
        (TEXTS["manual"], "en"),
        ("日本国憲法第九条の条文", "ja"),
        ("No.", "en"),
        ("Да", "ru"),
    ],
)
def test_languages(stage: LanguageStage, text: str, code: str) -> None:
    assert told(stage, text) == code


def test_an_untranslated_page_among_chinese_ones_is_seen() -> None:
    stage = LanguageStage(LanguageConfig(keep=["zh"]))
    english = Record(id="zh:1", text="This page has not been translated yet. Please help us.", source="zh")
    chinese = Record(id="zh:2", text=SIMPLIFIED, source="zh")
    assert (stage.process(english), stage.process(chinese)) == ("other_language", None)
    assert english.language == "en"


def test_traditional_needs_a_majority() -> None:
    assert not is_traditional("书里引用了一句：學而時習之。作者认为这说明读书应当复习，并且应该实践。")
    assert not is_traditional("")


def test_programs_are_code_whatever_their_comments_say(stage: LanguageStage) -> None:
    assert [told(stage, PROGRAMS[name]) for name in ("python_docstring", "python_chinese")] == ["code"] * 2


def test_a_host_name_or_title_as_id_makes_no_page_code(stage: LanguageStage) -> None:
    polish = "Wczoraj w naszym mieście otwarto nową bibliotekę, w której można znaleźć wiele książek."
    english = "Node.js is a program that runs scripts on a server. It was begun in 2009."
    assert told(stage, polish, id="www.biblioteka.pl") == "pl"
    assert [told(stage, english, id=id) for id in ("Node.js", "node/about.rs:17")] == ["en", "en"]


def test_a_letter_without_kana_decides_what_a_japanese_title_is(stage: LanguageStage) -> None:
    assert told(stage, "我们在日本看到的の字招牌，这是很常见的装饰。") == "zh"


def test_below_the_least_score_is_unsure() -> None:
    record = Record(id="1", text="Hello!", source="s")
    assert LanguageStage(LanguageConfig(min_score=0.95)).process(record) == "unsure"


def test_results_depend_on_no_order_and_no_process(stage: LanguageStage) -> None:
    texts = ["Hello!", "Le chat dort.", VERSE, SIMPLIFIED, "Vandaag regent het.", TEXTS["manual"]]

    def all_told(order: list[str]) -> dict[str, tuple]:
        found = {}
        for text in order:
            record = Record(id="1", text=text, source="s")
            stage.process(record)
            found[text] = (record.language, record.signals["language.score"])
        return found

    here = all_told(texts)
    assert all_told(texts[::-1]) == here
    code = (
        "import json, sys\n"
        "from data_tools.stages.language import *\nfrom data_tools.record import Record\n"
        "stage = LanguageStage(LanguageConfig())\n"
        "for text in json.load(sys.stdin):\n"
        "    r = Record(id='1', text=text, source='s'); stage.process(r)\n"
        "    print(json.dumps([r.language, r.signals['language.score']]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [tuple(json.loads(line)) for line in done.stdout.splitlines()] == [here[text] for text in texts]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=300))
def test_any_text_has_an_answer(text: str) -> None:
    record = Record(id="1", text=text, source="s")
    stage = LanguageStage(LanguageConfig())
    stage._identify = _shared()
    stage.process(record)
    assert record.language == "zh-hant" or record.language.isalpha()


@language.cache
def _shared():  # loading the model for each example would take most of the test
    return language._packaged()


def write_fasttext_model(path: Path, words: dict[str, list[str]]) -> None:
    """A fastText model file in which each word speaks for one label (format 12, as fastText 0.9 reads it).

    Written by hand because training is not repeatable, and often fails, on so little text.
    """
    labels, supervised, softmax = list(words), 3, 3
    vocabulary = [(word, label) for label in labels for word in words[label]]
    entries = [(word, 0) for word, _ in vocabulary] + [(f"__label__{label}", 1) for label in labels]
    size = len(labels)
    data = struct.pack("<2i", 793712314, 12)
    data += struct.pack("<12id", size, 5, 1, 1, 5, 1, softmax, supervised, 0, 0, 0, 100, 1e-4)
    data += struct.pack("<3i2q", len(entries), len(vocabulary), size, len(entries), -1)
    for word, kind in entries:
        data += word.encode() + b"\0" + struct.pack("<qb", 1, kind)
    one_hot = {label: [8.0 * (other == label) for other in labels] for label in labels}
    for rows in ([one_hot[label] for _, label in vocabulary], [one_hot[label] for label in labels]):
        data += struct.pack("<?2q", False, len(rows), size)
        data += b"".join(struct.pack(f"<{size}f", *row) for row in rows)
    path.write_bytes(data)


def test_a_model_of_the_users(tmp_path: Path) -> None:
    pytest.importorskip("fasttext")
    words = {"eng_Latn": ["the", "cat"], "cmn_Hani": ["我", "们", "這", "國"], "nl": ["de", "kat"]}
    write_fasttext_model(tmp_path / "model.bin", words)
    stage = LanguageStage(LanguageConfig(model_path=str(tmp_path / "model.bin")))
    found = [told(stage, text) for text in ("the cat\nsat", "我 们", "這 個 國", "kat zat op", "12")]
    assert found == ["en", "zh", "zh-hant", "nl", "und"]


def test_a_bad_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"curation\.language\.model_path=.* is no file"):
        LanguageStage(LanguageConfig(model_path=str(tmp_path / "none.bin")))
    pytest.importorskip("fasttext")
    (tmp_path / "text.bin").write_text("not a model")
    stage = LanguageStage(LanguageConfig(model_path=str(tmp_path / "text.bin")))
    with pytest.raises(ConfigError, match="is no fastText model"):
        stage.process(Record(id="1", text="text", source="s"))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"keep": ["English"]}, "keep"),
        ({"keep": ["zh-cn"]}, "keep"),
        ({"min_score": 1.5}, "min_score"),
        ({"min_score": -0.1}, "min_score"),
    ],
)
def test_a_wrong_option_is_named(options: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"curation\.language\.{key}"):
        LanguageConfig(**options)


@settings(max_examples=30, deadline=None)
@given(text=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
@example(text=b"")
@example(text=f"{VERSE} {TRADITIONAL}".encode())
def test_all_places_at_once_give_the_features_of_the_automaton(text: bytes) -> None:
    model, features_of = automaton()
    rows = [row << 8 for row in model.tk_row]
    counts = visit_counts(model.tk_nextmove, rows, model.tk_output, text) or {}
    assert list(Counter(features_of(text)).items()) == list(counts.items())


@cache
def automaton() -> tuple[Any, Callable[[bytes], list[int]]]:
    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    return model, _features_by(model)


def test_the_model_is_loaded_for_the_first_text_that_its_script_does_not_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []

    def load() -> Callable[[str], tuple[str, float]]:
        loaded.append("model")
        return lambda text: ("en", 1.0)

    monkeypatch.setattr(language, "_naive_bayes", load)
    identify = language._packaged()
    assert [identify(text)[0] for text in ("道可道，非常道。", "안녕하세요", "12:30", "")] == [
        "zh",
        "ko",
        "und",
        "und",
    ]
    assert not loaded
    assert [identify(text)[0] for text in ("A truth", "Une vérité")] == ["en", "en"]
    assert loaded == ["model"]
