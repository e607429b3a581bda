"""Text for tests of data_tools.prepare, and functions that read the resulting corpus."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.config import PrepareConfig
from data_tools.reading.sources import InputFile, Rejected, read_documents
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from support import ROOT

ENGLISH = "It is a truth universally acknowledged, that document number {} must be in want of a corpus."


def config(output: Path, *inputs: Path | str, **options: object) -> PrepareConfig:
    options.setdefault("workers", 1)
    return PrepareConfig(input=[str(entry) for entry in inputs], output=str(output), **options)


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def numbered(count: int, text: str = ENGLISH) -> list[dict[str, object]]:
    return [{"id": f"doc-{number}", "text": text.format(number)} for number in range(count)]


def documents_of(manifest_path: Path, tokenizer: Path) -> dict[str, tuple[str, str, str]]:
    """Source, license and text of every document in a corpus, by id. The text is decoded from the tokens."""
    corpus, model = Corpus(manifest_path), Tokenizer.trusted(tokenizer)
    found: dict[str, list[int]] = {}
    origin: dict[str, tuple[str, str]] = {}
    for chunk in range(corpus.n_chunks):
        pieces = corpus.documents(chunk)
        cut = np.split(corpus.read(chunk, 0, corpus.chunk_tokens), pieces.starts[1:])
        for tokens, source, document_id in zip(cut, pieces.source, pieces.ids, strict=True):
            found.setdefault(document_id, []).extend(tokens.tolist())
            info = corpus.manifest.sources[source]
            origin[document_id] = (info.name, info.license)
    for tokens in found.values():
        assert tokens[0] == model.bos_id
        assert tokens[-1] == model.eos_id
    return {name: (*origin[name], model.decode(tokens)) for name, tokens in found.items()}


def all_documents(output: Path) -> dict[str, tuple[str, str, str]]:
    documents = documents_of(output / "manifest.json", output / "tokenizer.model")
    if (output / "heldout").exists():
        documents |= documents_of(output / "heldout/manifest.json", output / "tokenizer.model")
    return documents


def content(folder: Path, *without: str) -> dict[str, str]:
    """Hash of every file in a folder, by its path, except for the files in `without`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def run(*arguments: str, module: str = "prepare", **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"data_tools.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)  # type: ignore


class Document(NamedTuple):
    """One of the documents that are read together."""

    id: str
    source: str
    license: str
    text: str
    language: str


def read_one_by_one(file: InputFile, config: PrepareConfig) -> Iterator[Document | Rejected]:
    """What `read_documents` gives, without groups."""
    for item in read_documents(file, config):
        if isinstance(item, Rejected):
            yield item
        else:
            rows = zip(item.ids, item.sources, item.texts, item.languages, strict=True)
            yield from (Document(name, *source, text, language) for name, source, text, language in rows)
