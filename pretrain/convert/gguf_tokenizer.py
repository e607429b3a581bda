"""A tokenizer in the words of GGUF, which llama.cpp and its relatives read.

GGUF has a few kinds of vocabulary, and a program that reads one has the code for its kind. A tokenizer that is of none
of them is refused by name: it would be read, and would give other tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.corpus.tokenizer import CHECK_TEXT, SPACE_SYMBOL, Tokenizer
from pretrain.errors import ConfigError, RunError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF. sentencepiece has the same numbers."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], tuple[str | None, ...], bool]] = {
    "gpt-2": ([_WORDS], (None,), False),
    "smollm": ([_DIGITS, _WORDS], (None,), False),
    "qwen2": ([_split(_QWEN2), _BYTES], (None, "NFC"), False),
    "llama-bpe": ([_split(_LLAMA3), _BYTES], (None,), True),
}
"""Name in GGUF: the steps of the pre-tokenizer in a tokenizer.json, its possible normalizers, and `ignore_merges`.
llama.cpp normalizes nothing. Text that is prepared with this program is in NFC already."""


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """What GGUF says of a tokenizer."""

    model: str
    """Kind of vocabulary: `llama` (sentencepiece) or `gpt2` (byte-level BPE)."""
    pre: str
    """Kind of pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool = False

    def padded(self, n_rows: int) -> GgufVocabulary:
        """With unused tokens up to the number of rows of the embedding, as llama.cpp's own converter adds them."""
        more = range(len(self.tokens), n_rows)
        return GgufVocabulary(
            model=self.model,
            pre=self.pre,
            tokens=[*self.tokens, *(f"[PAD{number}]" for number in more)],
            types=[*self.types, *(_UNUSED for _ in more)],
            scores=None if self.scores is None else [*self.scores, *(-1000.0 for _ in more)],
            merges=self.merges,
            add_space_prefix=self.add_space_prefix,
        )


def gguf_vocabulary(tokenizer: Tokenizer) -> GgufVocabulary:
    """The vocabulary of a tokenizer. Raises ConfigError, naming what GGUF has no word for."""
    return _sentencepiece(tokenizer) if tokenizer.is_sentencepiece else _byte_level(tokenizer)


def _sentencepiece(tokenizer: Tokenizer) -> GgufVocabulary:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString(tokenizer.content)
    spec = model.normalizer_spec
    problem = None
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE:
        problem = "is a unigram model, which GGUF has only without bytes for unknown characters"
    elif not model.trainer_spec.byte_fallback:
        problem = "has no bytes for unknown characters, which GGUF's sentencepiece vocabulary needs"
    elif spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        problem = "changes text before it encodes it (normalization), which readers of GGUF do not"
    if problem is not None:
        raise ConfigError(f"the tokenizer {tokenizer.path} {problem}; use format=hugging_face")
    tokens = [
        piece.piece.replace(SPACE_SYMBOL, " ") if piece.type == _USER_DEFINED else piece.piece
        for piece in model.pieces
    ]
    return GgufVocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=[int(piece.type) for piece in model.pieces],
        scores=[float(piece.score) for piece in model.pieces],
        add_space_prefix=bool(spec.add_dummy_prefix),
    )


def _byte_level(tokenizer: Tokenizer) -> GgufVocabulary:
    description = json.loads(tokenizer.content)
    model = description["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            f"the tokenizer {tokenizer.path} has a model of type {model.get('type')}; of a tokenizer.json, GGUF can "
            "hold byte-level BPE only; use format=hugging_face"
        )
    pre = _pre_tokenizer(tokenizer, description)
    entries = {number: (token, _NORMAL) for token, number in model["vocab"].items()}
    for added in description["added_tokens"]:
        entries[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    found = [entries.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(tokenizer.vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GgufVocabulary(
        model="gpt2",
        pre=pre,
        tokens=[token for token, _ in found],
        types=[kind for _, kind in found],
        merges=merges,
    )


def _pre_tokenizer(tokenizer: Tokenizer, description: dict[str, Any]) -> str:
    """GGUF's name of the pre-tokenizer. Raises ConfigError where it has none."""
    given = description.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    normalizer = description.get("normalizer")
    if (
        normalizer is not None
        and normalizer.get("type") == "Sequence"
        and len(normalizer["normalizers"]) == 1
    ):
        (normalizer,) = normalizer["normalizers"]
    normalizes = None if normalizer is None else normalizer.get("type")
    ignores = bool(description["model"].get("ignore_merges"))
    for name, (known, normalizers, ignores_merges) in _PRE_TOKENIZERS.items():
        same = len(steps) == len(known) and all(
            step.get(key) == value
            for step, wanted in zip(steps, known, strict=True)
            for key, value in wanted.items()
        )
        if same and normalizes in normalizers and ignores == ignores_merges:
            return name
    kinds = " and ".join(str(step.get("type")) for step in steps)
    raise ConfigError(
        f"the tokenizer {tokenizer.path} has a pre-tokenizer that GGUF has no name for (steps: {kinds}; normalizer: "
        f"{normalizes}; ignore_merges: {ignores}); known are {', '.join(_PRE_TOKENIZERS)}; use format=hugging_face"
    )


def check_gguf_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Raise RunError where `transformers` gets other tokens of `CHECK_TEXT` from a GGUF file than the run's tokenizer.

    The vocabulary, its scores and merges are what is checked. Where `transformers` does not heed what the file says of
    spaces and digits, the steps before them are set here as the file says. U+2581 stands for a space in a GGUF file,
    so it is left out.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    vocabulary = gguf_vocabulary(tokenizer)
    exported = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, split_special_tokens=True
    )
    if vocabulary.model == "llama":
        scheme = "first" if vocabulary.add_space_prefix else "never"
        exported.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=False
        )
    elif vocabulary.pre == "smollm":
        exported.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    text = CHECK_TEXT.replace(SPACE_SYMBOL, "")
    expected, found = tokenizer.encode(text), exported.encode(text, add_special_tokens=False, verbose=False)
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        raise RunError(
            f"the tokenizer in the GGUF file differs from {tokenizer.path}: token {at} of the check text is "
            f"{found[at : at + 1]} instead of {expected[at : at + 1]}"
        )
