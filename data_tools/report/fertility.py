"""Measures how well a tokenizer fits text: bytes per token, tokens per word, missing entries, lost text."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.tables import code_span, markdown
from data_tools.text import count_cjk
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.files import open_regular

SAMPLE_BYTES = 4_000_000
MAX_RECORD_BYTES = 64 << 20
CJK, OTHER = "cjk", "other"
_NAMES = {CJK: "Chinese, Japanese, Korean", OTHER: "other scripts"}


@dataclass(slots=True)
class Fit:
    """Totals over documents."""

    documents: int = 0
    """Number of documents."""
    bytes: int = 0
    """UTF-8 bytes of their text."""
    characters: int = 0
    """Characters without white space."""
    cjk_characters: int = 0
    """Chinese, Japanese or Korean characters."""
    words: int = 0
    """Words between white space, which mean nothing for Chinese."""
    tokens: int = 0
    """Number of tokens."""
    byte_tokens: int = 0
    """Tokens that stand for single bytes of characters that have no entry of their own."""
    unk_tokens: int = 0
    """Unknown tokens, whose text is lost."""
    returned: int = 0
    """Documents whose text is the same after encoding and decoding."""

    def add(self, other: Fit) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, float]:
        """The totals, and their ratios."""
        tokens = max(1, self.tokens)
        return asdict(self) | {
            "bytes_per_token": self.bytes / tokens,
            "characters_per_token": self.characters / tokens,
            "tokens_per_word": self.tokens / max(1, self.words),
            "byte_token_frac": self.byte_tokens / tokens,
            "unk_frac": self.unk_tokens / tokens,
        }


def measure(
    tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Fit by script (`cjk`: most characters are Chinese, Japanese or Korean; else `other`), and by language.

    `documents` yields (text, language); the language is empty where it is not known. Only the first SAMPLE_BYTES are
    measured.
    """
    scripts: dict[str, Fit] = {}
    languages: dict[str, Fit] = {}
    is_byte: dict[int, bool] = {}
    for text, language, ids in _encoded(tokenizer, documents):
        counts = Counter(ids)
        is_byte |= {i: tokenizer.is_part_of_character(i) for i in counts if i not in is_byte}
        n_characters, n_cjk = count_cjk(text)
        fit = Fit(
            documents=1,
            bytes=len(text.encode()),
            characters=n_characters,
            cjk_characters=n_cjk,
            words=len(text.split()),
            tokens=len(ids),
            byte_tokens=sum(count for i, count in counts.items() if is_byte[i]),
            unk_tokens=0 if tokenizer.unk_id is None else counts[tokenizer.unk_id],
            returned=int(tokenizer.decode(ids) == text),
        )
        scripts.setdefault(CJK if 2 * n_cjk > n_characters else OTHER, Fit()).add(fit)
        if language:
            languages.setdefault(language, Fit()).add(fit)
    by_script, by_language = (
        {name: fit.as_dict() for name, fit in sorted(fits.items())} for fits in (scripts, languages)
    )
    return by_script, by_language


def _encoded(
    tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str, list[int]]]:
    """The documents that are measured, with their tokens."""
    chosen, left = list[tuple[str, str]](), SAMPLE_BYTES
    for text, language in documents:
        chosen.append((text, language))
        left -= len(text.encode())
        if left <= 0:
            break
    tokens, starts = tokenizer.encode_documents([text for text, _ in chosen])
    for (text, language), (start, end) in zip(chosen, pairwise(starts.tolist()), strict=True):
        yield text, language, tokens[start + 1 : end - 1].tolist()


def heldout_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Text and language of the documents in heldout/documents.jsonl.gz."""
    for record in heldout_records(path):
        yield record["text"], record.get("language", "")


def heldout_records(path: Path) -> Iterator[dict[str, Any]]:
    """The documents in heldout/documents.jsonl.gz. Raises ConfigError where the file is broken."""
    try:
        with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) as lines:
            while line := lines.readline(MAX_RECORD_BYTES + 1):
                if len(line) > MAX_RECORD_BYTES:
                    raise ConfigError(f"{path} has a line of more than {MAX_RECORD_BYTES:,} bytes")
                record = json.loads(line.decode())
                types = {"id": str, "source": str, "text": str, "language": str, "label": str}
                types |= {"messages": list, "tools": list}
                given = record.items() if isinstance(record, dict) else ()
                if not {"id", "text"} <= dict(given).keys() or any(
                    not isinstance(value, types.get(name, type(None))) for name, value in given
                ):
                    raise ConfigError(f"{path} has a line that is no held-out document")
                yield record
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no gzipped JSON lines: {error}") from error


def fit_lines(by_script: dict[str, dict[str, Any]], by_language: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences for the card."""
    lines = [
        f"- {_NAMES.get(name, markdown(name))}: {_sentence(fit, name == CJK)}"
        for name, fit in by_script.items()
    ]
    for name, fit in by_language.items():
        lines.append(
            f"- language {code_span(name)}: {_sentence(fit, 2 * fit.get('cjk_characters', 0) > fit['characters'])}"
        )
    return lines


def _sentence(fit: dict[str, Any], is_cjk: bool) -> str:
    ratio = (
        f"{fit['characters_per_token']:.2f} characters per token"
        if is_cjk
        else f"{fit['tokens_per_word']:.2f} tokens per word"
    )
    parts = [
        f"{fit['bytes_per_token']:.2f} bytes per token",
        ratio,
        f"{fit['byte_token_frac']:.2%} of the tokens are bytes of characters",
        f"{fit.get('unk_frac', 0):.2%} unknown",
    ]
    lost = fit["documents"] - fit.get("returned", fit["documents"])  # not recorded by earlier versions
    if lost:
        parts.append(f"{lost:,} documents do not come back from their tokens as they were")
    return ", ".join(parts) + f" ({fit['documents']:,} documents)"
