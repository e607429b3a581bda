"""The tokenizer loses nothing, keeps its special ids, and refuses models that are not ours."""

from __future__ import annotations

import hashlib
import io
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from data_tools.config import ModelType, PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare
from pretrain.config import ConfigError
from pretrain.tokenizer import SPACE_SYMBOL, Tokenizer

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
        kind.value: Tokenizer(corpus_folder(folder / kind.value, kind) / "tokenizer.model")
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


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("x = 2024")]
    assert pieces[-4:] == ["2", "0", "2", "4"]


def test_a_document_has_bos_and_eos_which_decoding_drops(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_document("water")
    assert ids == [1, *tokenizer.encode("water"), 2]
    assert tokenizer.decode([3, *ids, 0]) == "water"


@given(text=CODE_LIKE)
def test_line_by_line_gives_the_same_ids_as_the_whole(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers.values():
        processor = SentencePieceProcessor(model_file=str(tokenizer.path))
        assert tokenizer._lines_are_independent
        assert tokenizer.encode(text) == processor.encode(text)


def test_a_model_where_lines_depend_on_each_other_is_not_cut(tmp_path: Path) -> None:
    """One that puts a space before every text would put one before every line."""
    path = train(tmp_path / "prefix.model", byte_fallback=True, pad_id=3, normalization_rule_name="identity")
    tokenizer, text = Tokenizer(path), "the fox\nthe fox\n"
    assert not tokenizer._lines_are_independent
    assert tokenizer.encode(text) == SentencePieceProcessor(model_file=str(path)).encode(text)


def test_other_special_ids_are_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "other.model")  # sentencepiece's own default has no padding
    with pytest.raises(ConfigError, match=r"other\.model.*\(0, 1, 2, -1\).*\(0, 1, 2, 3\)"):
        Tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"this is no model", b"\x0a\xff\xff", bytes(64)])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.model"):
        Tokenizer(path)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.model cannot be read: No such file"):
        Tokenizer(tmp_path / "none.model")
