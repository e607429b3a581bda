"""Tokenizers of Hugging Face: taken over, used, exported; what could harm is taken out or refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.tokenizer import CHECK_TEXT, Tokenizer, frame
from pretrain.errors import ConfigError
from support import ROOT
from support.hugging_face_tokenizers import SAMPLE, byte_level, imported, save
from support.tiny import TinyCorpus, python_documents, run_arguments

END = "<|endoftext|>"
PARTS = st.lists(
    st.sampled_from([END, "<s>", "</s>", " ", "\n", "a", "the ", "道", "🎉", "<|", "|>"]), max_size=12
)


def unigram(special: list[str]) -> Theirs:
    """As T5: its special tokens are pieces of the model."""
    theirs = Theirs(models.Unigram())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator([line for text in SAMPLE for line in text.splitlines()], trainer)
    return theirs


def word_pieces() -> Theirs:
    """As BERT."""
    theirs = Theirs(models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer = normalizers.BertNormalizer(lowercase=True)
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    theirs.train_from_iterator(
        SAMPLE, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    return theirs


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level([END]), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("kinds")
    llama = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "<pad>",
    }
    bert = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    return {
        "gpt2": imported(gpt2),
        "llama": imported(save(byte_level(["<pad>", "<s>", "</s>"]), folder / "llama", **llama)),
        "t5": imported(save(unigram(["<s>", "</s>"]), folder / "t5", bos_token=None, eos_token="</s>")),
        "bert": imported(save(word_pieces(), folder / "bert", **bert)),
    }


# --- special tokens ---


def test_each_kind_knows_its_special_ids(kinds: dict[str, Tokenizer]) -> None:
    found = {name: (t.unk_id, t.bos_id, t.eos_id, t.pad_id) for name, t in kinds.items()}
    assert found == {
        "gpt2": (None, 0, 0, 0),  # one token ends and begins; eos serves as padding
        "llama": (None, 1, 2, 0),
        "t5": (0, 2, 2, 2),  # eos serves as bos
        "bert": (1, 2, 3, 0),
    }


def test_the_mask_token_is_its_own(tmp_path: Path, gpt2: Path) -> None:
    """By a usual name, by tokenizer_config.json, or by an option; the file in the corpus alone says which."""
    usual = imported(save(byte_level(["<s>", "</s>", "[MASK]"]), tmp_path / "a", eos_token="</s>"))
    named = save(byte_level(["<s>", "</s>", "<hide>"]), tmp_path / "b", eos_token="</s>", mask_token="<hide>")
    spare = save(byte_level(["</s>", "<spare_0>", "<spare_1>"]), tmp_path / "c", eos_token="</s>")
    for tokenizer, name in (
        (usual, "[MASK]"),
        (imported(named), "<hide>"),
        (imported(spare, mask_token="<spare_1>"), "<spare_1>"),
    ):
        assert tokenizer.mask_id is not None
        assert tokenizer.piece(tokenizer.mask_id) == name
        again = save(Theirs.from_str(tokenizer.content.decode()), tmp_path / f"again {name}")
        assert imported(again).mask_id == tokenizer.mask_id
        text = f"a {name} b</s>"
        assert not {tokenizer.mask_id, tokenizer.eos_id} & {*tokenizer.encode(text)}
        a, b = tokenizer.encode("a "), tokenizer.encode(" b</s>")
        assert tokenizer.encode_masked(text) == [*a, tokenizer.mask_id, *b]
        assert tokenizer.decode(tokenizer.encode_masked(text)) == "a  b</s>"
        special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
        assert not special & {*tokenizer.ordinary_ids().tolist()}
    assert imported(gpt2).mask_id is None
    assert len(imported(gpt2).ordinary_ids()) == imported(gpt2).vocab_size - 1
    with pytest.raises(ConfigError, match=r"tokenizer.mask_token=the is no special token"):
        imported(gpt2, mask_token="the")


@given(parts=PARTS)
def test_names_of_special_tokens_in_a_text_are_text(kinds: dict[str, Tokenizer], parts: list[str]) -> None:
    text = "".join(parts)
    for name, tokenizer in kinds.items():
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & {*ids}, name
        if name in ("gpt2", "llama"):
            assert tokenizer.decode(ids) == text


@given(text=st.text())
def test_byte_level_decoding_gives_the_text_back(kinds: dict[str, Tokenizer], text: str) -> None:
    assert kinds["gpt2"].decode(kinds["gpt2"].encode_document(text)) == text


def test_the_name_of_unknown_is_known_by_its_characters(kinds: dict[str, Tokenizer]) -> None:
    for name, text in (("t5", "a <unk> b"), ("bert", "a [UNK] b")):
        assert kinds[name].unk_id not in kinds[name].encode(text)
        assert kinds[name].unk_id in kinds[name].encode("Ж")


def test_options_say_what_no_file_says(tmp_path: Path) -> None:
    folder = save(byte_level(["<a>", "<b>", "<c>"]), tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"<a>, <b>, <c>.*tokenizer\.eos",
    ):
        imported(folder)
    assert (imported(folder, eos_token="<b>").bos_id, imported(folder, eos_token="<b>").eos_id) == (1, 1)
    both = imported(folder, bos_token="<c>", eos_token="<b>")
    assert (both.bos_id, both.eos_id) == (2, 1)
    for name in ("<d>", "Ġthe"):  # what was learned could come from a text
        with pytest.raises(ConfigError, match=f"'{name}' "):
            imported(folder, eos_token=name)


def test_a_special_token_that_the_model_finds_in_a_text_is_refused(tmp_path: Path) -> None:
    theirs = Theirs(models.WordLevel(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.train_from_iterator(
        SAMPLE, trainers.WordLevelTrainer(special_tokens=["[UNK]", END], show_progress=False)
    )
    with pytest.raises(ConfigError, match=r"'<\|endoftext\|>' "):
        imported(save(theirs, tmp_path), eos_token=END)


# --- the file in the corpus ---


def test_the_file_describes_itself(kinds: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Nothing beside it is needed, and to import it again changes nothing."""
    for name, tokenizer in kinds.items():
        path = tmp_path / name / "tokenizer.json"
        path.parent.mkdir()
        path.write_bytes(tokenizer.content)
        again = Tokenizer(path, tokenizer.sha256)
        assert again.encode_document(CHECK_TEXT) == tokenizer.encode_document(CHECK_TEXT)
        assert imported(path).content == imported(path.parent).content == tokenizer.content
        stock = Theirs.from_file(str(path))  # what it says is what the package itself does
        stock.encode_special_tokens = True
        assert stock.encode("the wife").ids == tokenizer.encode_document("the wife")


def test_cutting_padding_and_chance_are_taken_out(tmp_path: Path) -> None:
    theirs = byte_level([END])
    theirs.enable_truncation(5)
    theirs.enable_padding(length=4000, pad_id=0, pad_token=END)
    theirs.post_processor = processors.ByteLevel()
    theirs.model.dropout = 0.5
    tokenizer = imported(save(theirs, tmp_path))
    written = json.loads(tokenizer.content)
    assert written["truncation"] is written["padding"] is None
    written["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    written["padding"] = json.loads((tmp_path / "tokenizer.json").read_text())["padding"]
    by_hand = Tokenizer.from_content(
        json.dumps(written).encode(), tmp_path
    )  # and if somebody had put them in
    ids = tokenizer.encode(CHECK_TEXT)
    assert by_hand.encode(CHECK_TEXT) == ids
    assert len(ids) > 100
    assert tokenizer.decode(ids) == CHECK_TEXT
    assert all(tokenizer.encode(CHECK_TEXT) == ids for _ in range(5))


def test_many_documents_give_what_each_gives(kinds: dict[str, Tokenizer]) -> None:
    texts = ["", CHECK_TEXT, END, " a\n"]
    for tokenizer in kinds.values():
        tokens, starts = tokenizer.encode_documents(texts)
        assert tokens.dtype == np.uint16
        assert [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)] == [
            tokenizer.encode_document(text) for text in texts
        ]
        assert tokenizer.encode_documents([]).starts.tolist() == [0]


def test_ids_with_gaps_count_up_to_the_largest(gpt2: Path, tmp_path: Path) -> None:
    description = json.loads((gpt2 / "tokenizer.json").read_text())
    description["model"]["vocab"]["zzz"] = 69_999
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = imported(tmp_path)
    assert tokenizer.vocab_size == 70_000
    assert tokenizer.encode_documents(["a"]).tokens.dtype == np.uint32
    assert (tokenizer.piece(69_999), tokenizer.piece(69_998), tokenizer.decode([69_998])) == ("zzz", "", "")
    with pytest.raises(IndexError):
        tokenizer.decode([70_000])


def test_bytes_of_characters_are_told_from_characters(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["gpt2"]
    for text, expected in (("the", False), ("\n", False), ("🎉", True)):
        assert {tokenizer.is_part_of_character(i) for i in tokenizer.encode(text)} == {expected}


def test_what_is_lost_is_told(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(gpt2)
    assert capsys.readouterr().err == ""
    lossy = byte_level([END])
    lossy.normalizer = normalizers.Lowercase()
    imported(save(lossy, tmp_path))
    assert "'It ' becomes 'it '" in capsys.readouterr().err


# --- what is refused ---


def edited(gpt2: Path, edit: Callable[[dict[str, Any]], None]) -> bytes:
    description = json.loads((gpt2 / "tokenizer.json").read_text())
    edit(description)
    return json.dumps(description).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"{}",
        b'{"model": 3}',
        b'{"a": ' * 10_000,
        b"{\xff}",
        b'{"version":"1.0","added_tokens":[],"model":{}}',
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for read in (Tokenizer.trusted, imported):
        with pytest.raises(ConfigError, match=r"tokenizer\.json ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_what_makes_the_parser_panic_is_refused(gpt2: Path, tmp_path: Path) -> None:
    def edit(description: dict[str, Any]) -> None:
        description["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}

    path = tmp_path / "tokenizer.json"
    path.write_bytes(edited(gpt2, edit))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: Precompiled"):
        Tokenizer.trusted(path)


def test_an_enormous_id_is_refused(gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(edited(gpt2, lambda description: description["model"]["vocab"].update(zzz=2**31)))
    with pytest.raises(ConfigError, match=r"id 2,147,483,648.* 4,194,304"):
        imported(path)


def test_one_that_was_not_imported_is_refused_where_a_corpus_should_have_it(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match=r"data_tools\.prepare tokenizer\.path="):
        Tokenizer.trusted(gpt2 / "tokenizer.json")


def test_a_folder_without_a_tokenizer_and_a_wrong_config_are_one_sentence(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.model .*tokenizer\.json"):
        imported(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((gpt2 / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not JSON"):
        imported(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('["auto_map"]')  # no roles: the file itself is asked
    assert imported(tmp_path).eos_id == 0


def test_a_text_that_the_package_cannot_encode_is_one_sentence(gpt2: Path, tmp_path: Path) -> None:
    """A tokenizer that passes its trial may still fail at another text: here it has no entry for what is unknown."""
    description = json.loads((gpt2 / "tokenizer.json").read_text())
    description["model"] = {"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": "none"}
    description["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    description["post_processor"] = frame((END, 0), (END, 0))
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer.trusted(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a a") == [1, 1]
    with pytest.raises(ConfigError, match=r"tokenizer\.json .*WordLevel"):
        tokenizer.encode("a b")


# --- the whole line ---


def script(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *name.split(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.integration
def test_from_text_to_a_trained_and_exported_model(tmp_path: Path) -> None:
    """Real text with a byte-level tokenizer that has several special tokens; every command that reads its corpus."""
    source, corpus, run = tmp_path / "pretrain", tmp_path / "corpus", tmp_path / "run"
    source.mkdir()
    for name, text in python_documents().items():
        (source / name).with_suffix(".txt").write_text(text)
    theirs = byte_level([END, "<|pad|>", "<|bos|>"], vocab_size=800)
    roles = {"bos_token": "<|bos|>", "eos_token": END, "pad_token": "<|pad|>"}
    given = save(theirs, tmp_path / "given", **roles)
    tokenizer = imported(given)
    places = [f"input=[{source}]", f"output={corpus}", f"tokenizer.path={given}", "heldout_frac=0.1"]
    script("-m data_tools.prepare", *places, "chunk_tokens=1024", "workers=2")
    manifest = load_manifest(corpus / "manifest.json")
    assert (manifest.bos_id, manifest.eos_id, manifest.vocab_size) == (2, 0, 800)
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    names = ["tokenizer.json", "heldout/manifest.json", "shards/ids.npy"]
    assert [file.name for file in manifest.files] == names
    assert "already prepared" in script("-m data_tools.prepare", *places, "chunk_tokens=1024")
    assert "| " in script("-m data_tools.show", str(corpus / "heldout"), "--chunk", "0")

    (tmp_path / "ids").write_text("pretrain/config.txt\n")
    script("-m data_tools.remove", str(corpus), "--ids", str(tmp_path / "ids"))
    script("-m data_tools.verify", str(corpus))
    assert (corpus / "tokenizer.json").read_bytes() == tokenizer.content
    assert load_manifest(corpus / "manifest.json").n_documents == manifest.n_documents - 1

    script("launch/train.py", *run_arguments(TinyCorpus(corpus), run, "total_steps=4"))
    assert (run / "tokenizer.json").read_bytes() == tokenizer.content
    for text in (corpus / "heldout", source / "engine.txt"):
        last = script("launch/eval.py", f"run_dir={run}", f"input=[{text}]", "json=true").splitlines()[-1]
        assert 3 < json.loads(last)["loss"] < 8
    (sample,) = json.loads(
        script(
            "launch/generate.py",
            f"run_dir={run}",
            "prompt=import ",
            "max_new_tokens=8",
            "temperature=0",
            "precision=fp32",  # as the export, whose tokens have to be the same
            "--json",
        ).splitlines()[-1]
    )["samples"]
    script("launch/export.py", f"run_dir={run}", f"output={tmp_path / 'hf'}", "dtype=fp32")

    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (CHECK_TEXT, f"a {END} b <|bos|>", ""):
        assert exported.encode(text) == [2, *tokenizer.encode(text)]
        assert exported.decode(exported.encode(text), skip_special_tokens=True) == text
    assert exported(["a", "a b"], padding=True).input_ids[0][0] == tokenizer.pad_id == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = exported("import ", return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    assert exported.decode(continued, skip_special_tokens=True) == "import " + sample["text"]
    assert imported(tmp_path / "hf").sha256 == tokenizer.sha256  # the export can be the next run's tokenizer
