"""Remove documents from a prepared corpus: python -m data_tools.remove DIR --ids FILE

FILE holds the ids of the documents, one per line. The corpus, its held-out part, manifest and card are rewritten
without them and then replaced; shards before the first removed document keep their bytes. The root hash changes, so a
run that was trained on the corpus can only continue with a copy of the old one. Exit code 0: done; 2: wrong input; 1: a
shard is damaged.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script, which works in every folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.command import begin

begin(__name__)

import argparse
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.building.lineage import removal_lineage
from data_tools.building.pack import HeldoutText
from data_tools.building.workspace import load_tokenizer, locked, publish, remove_work, write_report
from data_tools.names import HELDOUT_FOLDER, HELDOUT_TEXT, REPORT_NAME, STATISTICS_NAME, WORK_FOLDER
from data_tools.progress import stage
from data_tools.report.card import describe
from data_tools.report.fertility import heldout_records
from data_tools.report.funnel import Funnel
from data_tools.report.schemas import read_prepare_report, read_statistics
from data_tools.report.statistics import (
    DocumentCounts,
    corpus_figures,
    drop_figures,
    preparation_counts,
    to_text,
)
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME, read_template
from pretrain.corpus.manifest import (
    MANIFEST_NAME,
    CorpusSource,
    CorruptShardError,
    Manifest,
    describe_file,
    load_manifest,
)
from pretrain.corpus.shards import Corpus, documents_of
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.corpus.writer import CorpusWriter
from pretrain.errors import ConfigError, ExitCode
from pretrain.files import read_lines, refuse_links, write_atomically
from pretrain.printing import print_error, visible


def remove(folder: Path, ids: set[str]) -> Counter[str]:
    """Rewrite the corpus without the documents of these ids. Returns the number of removed documents by id.

    Raises ConfigError where there is no corpus or nothing would be left, CorruptShardError for a damaged shard.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"{folder} holds no {MANIFEST_NAME}; give the folder of a prepared corpus")
    refuse_links(folder / WORK_FOLDER, folder, "remove it")
    report = read_prepare_report(folder / REPORT_NAME)
    shard_bytes = report["recipe"]["options"].get("shard_bytes")
    if type(shard_bytes) is not int or not 0 < shard_bytes < 1 << 62:
        raise ConfigError(
            f"{folder / REPORT_NAME} does not say how large a shard is; prepare the corpus again"
        )
    tokenizer = load_tokenizer(folder, load_manifest(folder / MANIFEST_NAME))
    statistics = None
    if (folder / STATISTICS_NAME).exists():  # older programs wrote none
        statistics = read_statistics(folder / STATISTICS_NAME)
    removal = _Removal(ids, shard_bytes, tokenizer)
    with locked(folder / WORK_FOLDER, f"another process writes into {folder}"):
        try:
            _rewrite(folder, folder / WORK_FOLDER / "remove", removal, report, statistics)
        finally:
            remove_work(folder)
    return removal.found


def _rewrite(
    folder: Path, work: Path, removal: _Removal, report: dict[str, Any], statistics: dict[str, Any] | None
) -> None:
    """Write all files of the corpus into `work`, and move them into place if a document was found."""
    shutil.rmtree(work, ignore_errors=True)  # left by an interrupted call, which changed nothing else
    work.mkdir(parents=True)
    tokenizer = removal.tokenizer
    write_atomically(work / tokenizer.file_name, tokenizer.content)
    own_files = [tokenizer.file_name]
    if (folder / CHAT_TEMPLATE_NAME).is_file():
        write_atomically(work / CHAT_TEMPLATE_NAME, read_template(folder / CHAT_TEMPLATE_NAME).encode())
        own_files.append(CHAT_TEMPLATE_NAME)
    has_heldout = (folder / HELDOUT_FOLDER).exists()
    heldout = None
    if has_heldout:
        heldout, _ = removal.rewrite(folder / HELDOUT_FOLDER, work / HELDOUT_FOLDER, [HELDOUT_TEXT])
    files = own_files + [f"{HELDOUT_FOLDER}/{MANIFEST_NAME}"] * has_heldout
    manifest, counts = removal.rewrite(folder, work, files)
    if not removal.found:
        return
    report |= _without(removal.found, report, manifest, heldout)
    funnel = Funnel.of_dict(report["funnel"])
    statistics = statistics or drop_figures([], 0, funnel)
    statistics |= corpus_figures(manifest, heldout, counts)
    statistics["funnel"][-1] = preparation_counts(funnel)
    write_atomically(work / STATISTICS_NAME, to_text(statistics))
    describe(work, report)
    write_report(work, report)
    publish(work, folder)


@dataclass(slots=True)
class _Removal:
    """Which documents to remove, and which of them were found."""

    ids: set[str]
    shard_bytes: int
    tokenizer: Tokenizer
    found: Counter[str] = field(default_factory=Counter)

    def rewrite(self, old: Path, new: Path, files: list[str]) -> tuple[Manifest, DocumentCounts]:
        """Write a corpus, or its held-out part, without them. Returns its manifest and counts of what is left."""
        corpus = Corpus(old / MANIFEST_NAME)
        was = corpus.manifest
        if (was.tokenizer_sha256, was.vocab_size) != (self.tokenizer.sha256, self.tokenizer.vocab_size):
            raise ConfigError(f"{old} was made with another tokenizer than the corpus around it")
        writer = CorpusWriter(
            new,
            tokenizer_sha256=was.tokenizer_sha256,
            vocab_size=was.vocab_size,
            bos_id=was.bos_id,
            eos_id=was.eos_id,
            chunk_tokens=was.chunk_tokens,
            sources=[CorpusSource(name=source.name, license=source.license) for source in was.sources],
            shard_bytes=self.shard_bytes,
            files=files,
            loss_mask=was.loss_mask,
            packed=was.packed,
            classes=was.classes,
        )
        counts = DocumentCounts(self.tokenizer)
        n_left = 0
        with stage(f"rewriting {old}", 2 * was.n_tokens) as progress:
            for document in documents_of(corpus):
                progress.advance(2 * len(document.tokens))
                if document.id in self.ids:
                    self.found[document.id] += 1
                    continue
                n_left += 1
                counts.add(document.tokens, document.text_bytes)
                writer.add_document(
                    document.tokens,
                    source=document.source,
                    document_id=document.id,
                    text_bytes=document.text_bytes,
                    targets=None if document.is_target is None else _spans(document.is_target),
                    target_bytes=document.target_bytes,
                )
        if not n_left:
            raise ConfigError(f"{old} would be left without a document; remove the whole corpus instead")
        for text in (file for file in was.files if file.name == HELDOUT_TEXT):
            if describe_file(old, HELDOUT_TEXT) != text:
                raise CorruptShardError(
                    f"{old / HELDOUT_TEXT} is not what its manifest says; restore the file"
                )
            _rewrite_text(old / HELDOUT_TEXT, new / HELDOUT_TEXT, self.ids)
        return writer.finish(), counts


def _spans(is_target: np.ndarray) -> list[int]:
    """Start and stop offsets of the runs of true values: [start, stop, start, stop, ...]."""
    return np.flatnonzero(np.diff(is_target, prepend=False, append=False)).tolist()


def _rewrite_text(old: Path, new: Path, ids: set[str]) -> None:
    text = HeldoutText(new)
    for record in heldout_records(old):
        if record["id"] not in ids:
            text.add(record)
    text.close()


def _without(
    found: Counter[str], report: dict[str, Any], manifest: Manifest, heldout: Manifest | None
) -> dict[str, Any]:
    """The parts of the report that differ for the new corpus."""
    funnel = Funnel.of_dict(report["funnel"])
    n_removed, bytes_before = found.total(), funnel.kept_bytes
    funnel.dropped["removed_later"] = funnel.dropped.get("removed_later", 0) + n_removed
    funnel.kept -= n_removed
    manifests = [manifest, heldout] if heldout is not None else [manifest]
    funnel.kept_bytes = sum(source.text_bytes for m in manifests for source in m.sources)
    funnel.heldout = heldout.n_documents if heldout else 0
    removed = removal_lineage(
        found, report["root_sha256"], manifests, n_removed, (bytes_before, funnel.kept_bytes)
    )
    return {
        "root_sha256": manifest.root_sha256,
        "funnel": funnel.as_dict(),
        "lineage": [*report.get("lineage", []), removed],
        "summary": funnel.lines(),
    }


def read_ids(path: Path) -> set[str]:
    """The ids of a file, one per line. Raises ConfigError."""
    try:
        ids = {line.strip() for line in read_lines(path)} - {""}
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
        print_error("error", error)
        return ExitCode.CONFIG_ERROR
    except CorruptShardError as error:
        print_error("corrupt", error)
        return 1
    missing = (
        f"; {len(ids) - len(removed)} of the ids are not in the corpus" if len(removed) < len(ids) else ""
    )
    print(f"{visible(str(arguments.folder))}: {removed.total()} documents removed{missing}")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
