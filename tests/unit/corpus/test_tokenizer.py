"""The tokenizer loses nothing, keeps its special ids, and refuses models that are not ours."""

from __future__ import annotations

import hashlib
import io
import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from data_tools.config import ModelType, PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare
from pretrain.corpus.tokenizer import _BETWEEN_SPACE_SYMBOLS, _UNITS, _WHOLE, SPACE_SYMBOL, Tokenizer
from pretrain.errors import ConfigError

CHINESE = (
    "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。\n"
    "天下皆知美之為美，斯惡已。皆知善之為善，斯不善已。故有無相生，難易相成，長短相較，高下相傾。\n"
    "不尚賢，使民不爭；不貴難得之貨，使民不為盜；不見可欲，使民心不亂。是以聖人之治，虛其心，實其腹。\n"
    "上善若水。水善利萬物而不爭，處眾人之所惡，故幾於道。居善地，心善淵，與善仁，言善信，正善治。\n"
)
CODE_LIKE = st.text(alphabet=st.sampled_from("ab1_:()#\"'\n\t .道善"), max_size=60)


def corpus_folder(folder: Path, model_type: ModelType) -> Path:
    """A tokenizer trained on a little English, Python and Chinese, by way of a whole preparation."""
    text = folder / "text"
    text.mkdir(parents=True)
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("textwrap.py", "string.py", "heapq.py"):
        (text / name).with_suffix(".txt").write_bytes((stdlib / name).read_bytes())
    for part in range(4):
        (text / f"zh{part}.txt").write_text(CHINESE + f"第{part}章\n", encoding="utf-8")
    tokenizer = TokenizerConfig(vocab_size=700, model_type=model_type, character_coverage=1.0)
    config = PrepareConfig(
        input=[str(text)], output=str(folder / "corpus"), tokenizer=tokenizer, heldout_frac=0, workers=1
    )
    assert prepare(config) == 0
    return folder / "corpus"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        kind.value: Tokenizer.trusted(corpus_folder(folder / kind.value, kind) / "tokenizer.model")
        for kind in ModelType
    }


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def train(path: Path, **options: object) -> Path:
    """A sentencepiece model with options that this project does not use."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([CHINESE + " the quick brown fox\n"] * 9),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_special_ids_and_fingerprint(tokenizer: Tokenizer) -> None:
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert [tokenizer.piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.vocab_size == 700
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


@given(text=st.one_of(st.text(), CODE_LIKE))
def test_decoding_gives_the_text_back(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)


def test_every_character_comes_back(tokenizer: Tokenizer) -> None:
    points = [*range(0xD800), *range(0xE000, 0x11000), 0x1F600, 0x20000, 0x10FFFF]
    for start in range(0, len(points), 1000):
        text = "".join(map(chr, points[start : start + 1000]))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "上善若水 and water",
        "  two  spaces\n\n\tand\ttabs \n",
        "def f(x):\n    return {'a': 1.50}\n",
        CHINESE,
    ],
)
def test_chinese_english_and_code_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_space_symbol_of_sentencepiece_is_a_character_like_any_other(tokenizer: Tokenizer) -> None:
    text = f"{SPACE_SYMBOL}a {SPACE_SYMBOL}{SPACE_SYMBOL} b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chinese_takes_less_than_its_bytes(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("上善若水")) <= 4


def test_names_of_special_ids_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    text = "<s>a</s> <pad><unk>"
    assert not {0, 1, 2, 3} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_mask_is_reserved_and_no_text_encodes_to_it(tokenizer: Tokenizer) -> None:
    assert (tokenizer.mask_id, tokenizer.piece(4)) == (4, "<mask>")
    text = "the <mask> water"
    assert 4 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("the"), 4]) == "the"
    assert tokenizer.ordinary_ids().tolist() == list(range(5, tokenizer.vocab_size))


def test_the_name_of_the_mask_stands_for_it_where_asked(tokenizer: Tokenizer) -> None:
    """With the space before it, which the piece of a hidden word would begin with."""
    the, water = tokenizer.encode("the"), tokenizer.encode(" water</s>")
    assert tokenizer.encode_masked("the <mask> water</s>") == [*the, 4, *water]
    assert tokenizer.encode_masked("the<mask><mask> water</s>") == [*the, 4, 4, *water]
    assert tokenizer.encode_masked("<mask>") == [4]
    assert tokenizer.encode_masked("the water") == tokenizer.encode("the water")


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("x = 2024")]
    assert pieces[-4:] == ["2", "0", "2", "4"]


def test_a_document_has_bos_and_eos_which_decoding_drops(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_document("water")
    assert ids == [1, *tokenizer.encode("water"), 2]
    assert tokenizer.decode([3, *ids, 0]) == "water"


@given(text=CODE_LIKE)
def test_unit_by_unit_gives_the_same_ids_as_the_whole(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers.values():
        processor = SentencePieceProcessor(model_file=str(tokenizer.path))
        assert tokenizer._model._units is _UNITS
        assert tokenizer.encode(text) == processor.encode(text)


@given(texts=st.lists(st.one_of(st.text(), CODE_LIKE), max_size=5))
def test_many_documents_give_what_each_gives(tokenizers: dict[str, Tokenizer], texts: list[str]) -> None:
    for tokenizer in tokenizers.values():
        tokens, starts = tokenizer.encode_documents(texts)
        assert (tokens.dtype, starts.dtype) == (np.uint16, np.int64)
        cut = [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert cut == [tokenizer.encode_document(text) for text in texts]
        assert len(tokens) == starts[-1]


def test_units_that_are_encoded_together_keep_their_ids(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.corpus.tokenizer._BLOCK_CHARS", 40)
    together = ["", "道可道，非常道。", "name\n\n  of 名\u2581可名", "x" * 100]
    texts = [*together, "a\0b", "\0", "\0 c\0", "e" * 50, "f"]  # a unit with NUL is encoded on its own
    for kind, tokenizer in tokenizers.items():
        assert (tokenizer._model._separator_id is None) is (kind == "unigram")
        processor = SentencePieceProcessor(model_file=str(tokenizer.path))
        tokens, starts = tokenizer.encode_documents(texts)
        cut = [tokens[a + 1 : b - 1].tolist() for a, b in itertools.pairwise(starts)]
        for text, ids in zip(texts, cut, strict=True):
            if "\u2581" not in text:
                assert ids == processor.encode(text)
            assert tokenizer.decode(ids) == text


def test_units_are_what_the_text_is_made_of() -> None:
    text = "def f(x):\n    return x\n\n\u2581 b  \n c  "
    units = _UNITS.findall(text)
    assert "".join(units) == text
    assert units == ["def", " f(x):\n", "    return", " x\n\n", "\u2581", " b", "  \n", " c", "  "]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"remove_extra_whitespaces": False}, "a space before every text"),
        ({"add_dummy_prefix": False}, "spaces that are taken out"),
        ({"remove_extra_whitespaces": False, "add_dummy_prefix": False, "byte_fallback": False}, "no bytes"),
    ],
)
def test_a_model_that_changes_text_is_given_it_whole(
    tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "pad_id": 3} | options
    path = train(tmp_path / "other.model", **options)
    tokenizer, text = Tokenizer.trusted(path), "the  fox\nthe fox \u2581 \n"
    assert tokenizer._model._units is _WHOLE, reason
    assert tokenizer.encode(text) == SentencePieceProcessor(model_file=str(path)).encode(text)
    assert tokenizer.encode_documents([text, SPACE_SYMBOL]).tokens.tolist() == [
        *tokenizer.encode_document(text),
        *tokenizer.encode_document(SPACE_SYMBOL),
    ]


def test_a_model_whose_pieces_hold_several_words_is_not_cut_at_spaces(tmp_path: Path) -> None:
    """And yet the character that stands for a space comes back."""
    options = {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "split_by_whitespace": False}
    path = train(tmp_path / "a.model", byte_fallback=True, normalization_rule_name="identity", **options)
    tokenizer, text = Tokenizer.trusted(path), "the quick brown fox\nthe quick"
    assert tokenizer._model._units is _BETWEEN_SPACE_SYMBOLS
    assert tokenizer.encode(text) == SentencePieceProcessor(model_file=str(path)).encode(text)
    assert any(" " in tokenizer.decode([i]).strip() for i in tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(f"{text}{SPACE_SYMBOL} the")) == f"{text}{SPACE_SYMBOL} the"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 1, 2, 2)),  # Llama 2: no padding, eos serves
        ({"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}, (3, 2, 1, 0)),  # Gemma
        ({"pad_id": 0, "eos_id": 1, "bos_id": -1, "unk_id": 2}, (2, 1, 1, 0)),  # T5: no bos, eos serves
    ],
)
def test_special_ids_are_those_of_the_model(
    tmp_path: Path, options: dict[str, int], expected: tuple[int, ...]
) -> None:
    tokenizer = Tokenizer.trusted(train(tmp_path / "other.model", byte_fallback=True, **options))
    unk, bos, eos, pad = expected
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected
    ids = tokenizer.encode_document("quick <s> </s> fox")
    assert (ids[0], ids[-1]) == (bos, eos)
    assert not {*expected} & {*ids[1:-1]}
    assert tokenizer.decode([pad, *ids, unk]) == "quick <s> </s> fox"


def test_a_model_without_bos_and_eos_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "other.model", bos_id=-1, eos_id=-1)
    with pytest.raises(ConfigError, match=r"other\.model .*bos.*eos"):
        Tokenizer.trusted(path)


def test_the_text_after_a_context_keeps_its_first_space(tmp_path: Path) -> None:
    """Which is lost where a model takes the first space of a text for its own."""
    tokenizer = Tokenizer.trusted(train(tmp_path / "other.model", byte_fallback=True))
    ids = tokenizer.encode("the quick brown fox")
    assert tokenizer.decode(ids[-1:]) == "fox"
    assert tokenizer.decode_after(ids[:-1], ids[-1:]) == " fox"


def test_bytes_of_characters_are_told_from_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("上🎉")
    assert [tokenizer.is_part_of_character(i) for i in ids] == [False, *[True] * 4]


@pytest.mark.parametrize("content", [b"", b"\n", b"this is no model", b"\x0a\xff\xff", bytes(64)])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.model"):
        Tokenizer.trusted(path)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.model .*: No such file"):
        Tokenizer.trusted(tmp_path / "none.model")
