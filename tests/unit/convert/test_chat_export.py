"""The chat template of an exported model: transformers gives the tokens of training, with ours and with others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.convert import hugging_face as export_module
from pretrain.convert.hugging_face import check_chat_template, export, write_tokenizer
from pretrain.corpus.chat import OWN_TEMPLATE
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import RunError
from pretrain.trained import TrainedModel, load_trained
from support.chat_templates import EOS, SPECIAL, TEMPLATES
from support.dialogues import dialogues
from support.hugging_face_tokenizers import byte_level, imported, save
from support.trained_run import make_run, train_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("chat") / "run"
    make_run(folder)
    (folder / "chat_template.jinja").write_text(OWN_TEMPLATE)
    return load_trained(folder)


def test_an_export_has_the_template_and_gives_the_tokens_of_training(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(trained, tmp_path / "hf", dtype=torch.float32)
    assert (tmp_path / "hf/chat_template.jinja").read_text() == OWN_TEMPLATE
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = trained.chat()
    for record in dialogues(30):
        messages = record["messages"]
        assert (
            theirs.apply_chat_template(messages, return_dict=False) == chat.encode_dialogue(messages).tokens
        )
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == chat.encode_prompt(messages[:-1])
    chat.close()
    monkeypatch.setattr(export_module, "CHAT_TEMPLATE_NAME", "other.jinja")
    monkeypatch.setattr(
        trained.tokenizer, "encode_rendered", lambda text: [1, *trained.tokenizer.encode(text)]
    )
    with pytest.raises(RunError, match="chat template differs"):
        check_chat_template(trained, tmp_path / "hf")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_our_template_with_our_tokenizers(trained: TrainedModel, tmp_path: Path, model_type: str) -> None:
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model", model_type)
    checked(replace(trained, tokenizer=tokenizer), tmp_path / "hf")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_others_stop_generation_where_an_answer_ends(
    trained: TrainedModel, tmp_path: Path, name: str
) -> None:
    eos = EOS.get(name, "</s>")
    roles = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<|pad|>"}
    tokenizer = imported(save(byte_level(SPECIAL), tmp_path / "given", **roles))
    model = replace(trained, tokenizer=tokenizer, chat_template=TEMPLATES[name])
    checked(model, tmp_path / "hf")
    expected = {tokenizer.eos_id} | ({SPECIAL.index("<|im_end|>")} if name == "generation" else set())
    assert set(export_module._end_ids(model)) == expected
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert written["chat_template"] == TEMPLATES[name]


def checked(model: TrainedModel, folder: Path) -> None:
    folder.mkdir()
    write_tokenizer(model.tokenizer, folder, 64, model.chat_template)
    check_chat_template(model, folder)


def test_a_model_without_dialogues_has_no_template(trained: TrainedModel, tmp_path: Path) -> None:
    write_tokenizer(trained.tokenizer, tmp_path, 64)
    assert not (tmp_path / "chat_template.jinja").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template is None
    assert 2 not in theirs.encode("</s>")
    assert Tokenizer.trusted(tmp_path / "tokenizer.model").sha256 == trained.tokenizer.sha256
