"""Take documents out of a prepared corpus: python -m data_tools.remove DIR --ids FILE

FILE names documents, one id per line. The corpus, its held-out part, manifest and card are written anew without them
and then replaced; shards before the first such document keep their bytes. A run that was trained on the corpus goes on
only with the corpus as it was: its root hash is another now. Exit code 0: done; 2: wrong input; 1: a shard is damaged.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.card import card
from data_tools.fertility import fit_lines
from data_tools.gather import Funnel
from data_tools.pack import HeldoutText
from data_tools.progress import stage
from data_tools.workspace import (
    CARD_NAME,
    HELDOUT_FOLDER,
    HELDOUT_TEXT,
    REPORT_NAME,
    WORK_FOLDER,
    publish,
)
from pretrain.config import ConfigError, ExitCode
from pretrain.corpus_writer import CorpusWriter
from pretrain.manifest import MANIFEST_NAME, CorpusSource, CorruptShardError, Manifest, write_atomically
from pretrain.shards import Corpus
from pretrain.tokenizer import tokenizer_in


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as a corpus holds it."""

    tokens: np.ndarray
    source: str
    id: str
    text_bytes: int


def documents_of(corpus: Corpus) -> Iterator[StoredDocument]:
    """Every document in its place, put together from its pieces. Raises CorruptShardError."""
    parts: list[np.ndarray] = []
    head: tuple[str, str, int] | None = None
    for chunk in range(corpus.n_chunks):
        pieces = corpus.documents(chunk)
        tokens = np.split(corpus.read(chunk, 0, corpus.chunk_tokens), pieces.starts[1:])
        rows = zip(tokens, pieces.source, pieces.ids, pieces.offsets, pieces.text_bytes, strict=True)
        for piece, source, document_id, offset, text_bytes in rows:
            if offset == 0:
                if head is not None:
                    yield StoredDocument(np.concatenate(parts), *head)
                parts, head = [], (corpus.manifest.sources[source].name, document_id, int(text_bytes))
            parts.append(piece)
    if head is not None:
        yield StoredDocument(np.concatenate(parts), *head)


def remove(folder: Path, ids: set[str]) -> Counter[str]:
    """Write the corpus without the documents of these ids; how many there were of each.

    Raises ConfigError where there is no corpus or nothing would be left, CorruptShardError for a damaged shard.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"{folder} holds no {MANIFEST_NAME}; give the folder of a prepared corpus")
    report: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    work = folder / WORK_FOLDER / "remove"
    shutil.rmtree(work, ignore_errors=True)  # of a call that was interrupted: it had changed nothing
    work.mkdir(parents=True)
    tokenizer = tokenizer_in(folder)
    shutil.copyfile(tokenizer, work / tokenizer.name)
    has_heldout = (folder / HELDOUT_FOLDER).exists()
    shard_bytes = report["recipe"]["options"]["shard_bytes"]
    heldout, found = None, Counter[str]()
    if has_heldout:
        heldout = _rewrite(
            folder / HELDOUT_FOLDER, work / HELDOUT_FOLDER, [HELDOUT_TEXT], shard_bytes, ids, found
        )
    files = [tokenizer.name] + [f"{HELDOUT_FOLDER}/{MANIFEST_NAME}"] * has_heldout
    manifest = _rewrite(folder, work, files, shard_bytes, ids, found)
    if not found:
        shutil.rmtree(folder / WORK_FOLDER)
        return found
    _describe(report, manifest, heldout, work, found.total())
    publish(work, folder)
    return found


def _rewrite(
    old: Path, new: Path, files: list[str], shard_bytes: int, ids: set[str], found: Counter[str]
) -> Manifest:
    corpus = Corpus(old / MANIFEST_NAME)
    was = corpus.manifest
    writer = CorpusWriter(
        new,
        tokenizer_sha256=was.tokenizer_sha256,
        vocab_size=was.vocab_size,
        bos_id=was.bos_id,
        eos_id=was.eos_id,
        chunk_tokens=was.chunk_tokens,
        sources=[CorpusSource(name=source.name, license=source.license) for source in was.sources],
        shard_bytes=shard_bytes,
        files=files,
    )
    n_left = 0
    with stage(f"rewriting {old}", 2 * was.n_tokens) as progress:
        for document in documents_of(corpus):
            progress.advance(2 * len(document.tokens))
            if document.id in ids:
                found[document.id] += 1
                continue
            n_left += 1
            writer.add_document(
                document.tokens,
                source=document.source,
                document_id=document.id,
                text_bytes=document.text_bytes,
            )
    if not n_left:
        raise ConfigError(f"{old} would be left without a document; remove the whole corpus instead")
    if (old / HELDOUT_TEXT).exists():
        _rewrite_text(old / HELDOUT_TEXT, new / HELDOUT_TEXT, ids)
    return writer.finish()


def _rewrite_text(old: Path, new: Path, ids: set[str]) -> None:
    text = HeldoutText(new)
    with gzip.open(old, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["id"] not in ids:
                text.add(record["id"], record["source"], record["text"], record.get("language", ""))
    text.close()


def _describe(
    report: dict[str, Any], manifest: Manifest, heldout: Manifest | None, work: Path, n_removed: int
) -> None:
    """Card and report of the new corpus."""
    funnel = Funnel(**report["funnel"])
    funnel.dropped["removed_later"] = funnel.dropped.get("removed_later", 0) + n_removed
    funnel.kept -= n_removed
    funnel.kept_bytes = sum(s.text_bytes for m in (manifest, heldout) if m for s in m.sources)
    funnel.heldout = heldout.n_documents if heldout else 0
    tokenizer = report["tokenizer"]
    kind = tokenizer.get("kind", "sentencepiece")
    fits = fit_lines(tokenizer.get("heldout_fit", {}), tokenizer.get("heldout_fit_by_language", {}))
    text = card(manifest, heldout, funnel, kind, fits, report.get("curation_funnels", []))
    write_atomically(work / CARD_NAME, text.encode())
    names = ("read", "dropped", "kept", "kept_bytes", "heldout")
    report |= {"root_sha256": manifest.root_sha256, "funnel": {name: getattr(funnel, name) for name in names}}
    report["summary"] = funnel.lines()
    write_atomically(work / REPORT_NAME, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def read_ids(path: Path) -> set[str]:
    """The ids of a file, one per line. Raises ConfigError."""
    try:
        ids = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--ids {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not ids:
        raise ConfigError(f"--ids {path} names no document; give one id per line")
    return ids


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.remove", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a prepared corpus")
    parser.add_argument(
        "--ids", type=Path, required=True, metavar="FILE", help="ids of documents, one per line"
    )
    arguments = parser.parse_args()
    try:
        ids = read_ids(arguments.ids)
        removed = remove(arguments.folder, ids)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CONFIG_ERROR
    except CorruptShardError as error:
        print(f"corrupt: {error}", file=sys.stderr)
        return 1
    missing = (
        f"; {len(ids) - len(removed)} of the ids are not in the corpus" if len(removed) < len(ids) else ""
    )
    print(f"{arguments.folder}: {removed.total()} documents removed{missing}")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
