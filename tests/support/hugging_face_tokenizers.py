"""Small tokenizers of Hugging Face, in the folders that `transformers` saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_tools.building.import_tokenizer import import_tokenizer
from data_tools.config import TokenizerConfig
from pretrain.corpus.tokenizer import CHECK_TEXT, Tokenizer
from support import ROOT

SAMPLE = [
    CHECK_TEXT,
    *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:4]),
]


def byte_level(special: list[str], vocab_size: int = 600) -> Theirs:
    """As GPT-2 and most since."""
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(SAMPLE, trainer)
    return theirs


def save(theirs: Theirs, folder: Path, **roles: Any) -> Path:
    """The folder as `transformers` saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save(str(folder / "tokenizer.json"))
    if roles:
        (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def imported(folder: Path, **options: Any) -> Tokenizer:
    return import_tokenizer(TokenizerConfig(path=str(folder), **options))
