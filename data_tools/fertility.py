"""How well a tokenizer fits text: bytes per token, tokens per word, and what it has no entry for."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.clean import count_cjk
from pretrain.tokenizer import Tokenizer

SAMPLE_BYTES = 4_000_000


@dataclass(slots=True)
class Fit:
    """Totals over the documents of one kind of script."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    """White space aside."""
    words: int = 0
    """Between white space; of no use for Chinese."""
    tokens: int = 0
    byte_tokens: int = 0
    """Tokens that stand for a single byte, since the characters have no entry."""

    def as_dict(self) -> dict[str, float]:
        """The totals, and their ratios."""
        tokens = max(1, self.tokens)
        return asdict(self) | {
            "bytes_per_token": self.bytes / tokens,
            "characters_per_token": self.characters / tokens,
            "tokens_per_word": self.tokens / max(1, self.words),
            "byte_token_frac": self.byte_tokens / tokens,
        }


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """By script (`cjk`: most characters are Chinese, Japanese or Korean; else `other`), of the first SAMPLE_BYTES."""
    bytes_ids = {i for i in range(tokenizer.vocab_size) if tokenizer.piece(i).startswith("<0x")}
    fits: dict[str, Fit] = {}
    left = SAMPLE_BYTES
    for text in texts:
        n_characters, n_cjk = count_cjk(text)
        fit = fits.setdefault("cjk" if 2 * n_cjk > n_characters else "other", Fit())
        ids = tokenizer.encode(text)
        n_bytes = len(text.encode())
        fit.documents += 1
        fit.bytes += n_bytes
        fit.characters += n_characters
        fit.words += len(text.split())
        fit.tokens += len(ids)
        fit.byte_tokens += sum(i in bytes_ids for i in ids)
        left -= n_bytes
        if left <= 0:
            break
    return {script: fit.as_dict() for script, fit in sorted(fits.items())}


def heldout_texts(path: Path) -> Iterator[str]:
    """The texts of heldout/documents.jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def fit_lines(fits: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences for the card."""
    names = {"cjk": "Chinese, Japanese, Korean", "other": "other scripts"}
    return [
        f"- {names[script]}: {fit['bytes_per_token']:.2f} bytes per token, "
        + (
            f"{fit['characters_per_token']:.2f} characters per token"
            if script == "cjk"
            else f"{fit['tokens_per_word']:.2f} tokens per word"
        )
        + f", {fit['byte_token_frac']:.2%} of the tokens are single bytes ({fit['documents']:,} documents)"
        for script, fit in fits.items()
    ]
