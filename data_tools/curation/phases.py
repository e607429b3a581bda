"""The first and the last phase of a curation, and the stages that they run.

The first phase has one task per unit of input. It reads documents and runs the stages in their order. Dropped
documents go to `rejected/<stage>/NNNNN.jsonl.gz` with their reasons; kept ones go to the work folder, with the hashes
that find duplicates.
The last phase has one task per unit again. It removes duplicates and repeated lines from the kept documents.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.curation.choice import CurationConfig, StagesOf
from data_tools.curation.collection import SIGNATURES, Collection, EarlierPart, rows_name
from data_tools.curation.dedup import (
    NO_DOCUMENT,
    Signatures,
    line_hashes,
    load_array,
    write_tables,
)
from data_tools.curation.executors import TaskProgress
from data_tools.curation.parquet import ParquetRows
from data_tools.gzipped import Gzipped
from data_tools.reading.units import Bad, ReadConfig, Unit, read_unit
from data_tools.record import CurationStage, Record
from data_tools.report.schemas import MAX_REPORT_BYTES, MAX_REPORT_VALUES
from pretrain.files import read_capped, written_atomically
from pretrain.stored import parse

READ, DECONTAMINATE, DEDUP = "read", "decontaminate", "dedup"


# ---- what a task writes ----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of documents and UTF-8 bytes, of one task or of all."""

    read: Counter[str] = field(default_factory=Counter)
    """Documents that were read, by source."""
    read_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes that were read, by source."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Dropped documents, by `stage/reason`."""
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of dropped documents as they were read, by `stage/reason`."""
    dropped_of: Counter[str] = field(default_factory=Counter)
    """Dropped documents, by `source/stage`."""
    kept: Counter[str] = field(default_factory=Counter)
    """Kept documents, by source."""
    kept_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of kept documents, by source."""
    languages: Counter[str] = field(default_factory=Counter)
    """Kept documents, by language."""
    language_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of kept documents, by language."""
    lengths: Counter[str] = field(default_factory=Counter)
    """Kept documents, by the number of bits (4 to 24) of their length in characters."""
    counts: Counter[str] = field(default_factory=Counter)
    """Changes that stages made to texts, by `stage.what`."""
    changed: Counter[str] = field(default_factory=Counter)
    """Documents whose text was changed, by `stage.what`."""
    contaminated: Counter[str] = field(default_factory=Counter)
    """Documents that share text with an evaluation set, dropped or not, by set."""
    licenses: Counter[str] = field(default_factory=Counter)
    """Kept documents, by `source/license`."""

    def drop(self, record: Record, stage: str, reason: str, n_bytes: int) -> None:
        self.dropped[f"{stage}/{reason}"] += 1
        self.dropped_bytes[f"{stage}/{reason}"] += n_bytes
        self.dropped_of[f"{record.source}/{stage}"] += 1

    def change(self, record: Record) -> None:
        """Add the changes to the text of a document."""
        self.counts.update(record.counts)
        self.changed.update(record.counts.keys())

    def keep(self, record: Record, n_bytes: int) -> None:
        self.kept[record.source] += 1
        self.kept_bytes[record.source] += n_bytes
        self.languages[record.language] += 1
        self.language_bytes[record.language] += n_bytes
        self.lengths[str(max(4, min(24, len(record.text).bit_length())))] += 1
        self.licenses[f"{record.source}/{record.license or ''}"] += 1

    def add(self, other: Tally) -> None:
        for name, counter in vars(self).items():
            counter.update(getattr(other, name))

    def to_json(self) -> dict[str, dict[str, int]]:
        return {name: dict(sorted(counter.items())) for name, counter in vars(self).items()}

    @classmethod
    def of_file(cls, path: Path) -> Tally:
        """Read what `to_json` returned from a file. Raises ConfigError."""
        return parse(cls, read_capped(path, MAX_REPORT_BYTES), str(path), "a tally", MAX_REPORT_VALUES)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO | Gzipped]:
    """Write a file atomically, compressed where its name ends with .gz; the same content gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path, durable=True) as raw:
        if path.suffix == ".gz":
            packed = Gzipped(raw, level=4)
            yield packed
            packed.finish()
        else:
            yield raw


class _Rejects:
    """Files of dropped documents, one per stage, each created with its first document."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._files: dict[str, BinaryIO | Gzipped] = {}
        self._open = ExitStack()

    def __enter__(self) -> _Rejects:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    def add(self, stage: str, reason: str, record: Record, kept: dict[str, Any] | None = None) -> None:
        """Add a dropped document; `kept` describes the document that stands for a duplicate."""
        line: dict[str, Any] = {
            "reason": reason,
            "id": record.id,
            "source": record.source,
            "language": record.language,
        }
        if kept is not None:
            line["kept"] = kept
        line |= {"signals": record.signals, "text": record.text}
        if stage not in self._files:
            path = self._folder / stage / f"{self._rank:05d}.jsonl.gz"
            self._files[stage] = self._open.enter_context(_written(path))
        self._files[stage].write(_line(line))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def to_line(record: Record) -> bytes:
    """A kept document as a line of JSON."""
    value: dict[str, Any] = {"id": record.id, "text": record.text, "source": record.source}
    value["language"] = record.language
    for name in ("license", "url"):
        if getattr(record, name) is not None:
            value[name] = getattr(record, name)
    if record.signals:
        value["signals"] = record.signals
    return _line(value)


def from_line(line: bytes) -> Record:
    """The inverse of `to_line`."""
    value = json.loads(line)
    return Record(**value)


class OutputFormat(Enum):
    """How curated text is stored."""

    jsonl = "jsonl"
    parquet = "parquet"


# ---- first phase -----------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Paths of the files of a curation in its work folder."""

    work: Path
    format: OutputFormat = OutputFormat.jsonl
    """Format of the curated text."""

    def kept(self, rank: int) -> Path:
        return self.work / "kept" / f"{rank:05d}.jsonl"

    def tally(self, phase: str, rank: int) -> Path:
        return self.work / "tally" / phase / f"{rank:05d}.json"

    def removed(self, rank: int) -> Path:
        return self.work / "removed" / f"{rank:05d}.npy"

    def documents(self, rank: int) -> Path:
        return self.work / "documents" / f"part-{rank:05d}.{self.format.value}"

    def signatures(self, rank: int) -> Path:
        return self.work / SIGNATURES / rows_name(self.documents(rank).name)

    def digest(self, phase: str, rank: int) -> Path:
        """File with bytes and sha256 of the texts that the first phase read, or of the file that the last one wrote."""
        return self.work / "digest" / phase / f"{rank:05d}.json"

    @property
    def rejected(self) -> Path:
        return self.work / "rejected"

    @property
    def index(self) -> Path:
        return self.work / "evaluation-index.npz"

    @property
    def settled(self) -> Path:
        """Which documents the rules of equal hashes remove."""
        return self.work / "settled.npy"

    @property
    def lines(self) -> Path:
        return self.work / "lines.npy"


@dataclass
class CleanTask:
    """First phase: run the stages over one unit of input, or make the tables of one part of an earlier curation."""

    units: list[Unit]
    read: ReadConfig
    curation: CurationConfig
    layout: Layout
    earlier: list[EarlierPart] = field(default_factory=list)

    def run(self, rank: int, progress: TaskProgress) -> None:
        if rank >= len(self.units):
            part, dedup = self.earlier[rank - len(self.units)], self.curation.dedup
            write_tables(self.layout.work, rank, part.rows(dedup), dedup)
            progress.finish(part.size_bytes)
            return
        stages_of = StagesOf(self.curation, self.layout.index)
        signatures, tally = Signatures(self.curation.dedup), Tally()
        rejects = _Rejects(
            self.layout.rejected, rank
        )  # written to disk immediately, because most of the documents may be dropped
        texts, n_written = hashlib.sha256(), 0

        def on_bad(bad: Bad) -> None:
            record = Record(id=bad.where, text=bad.why, source=READ)
            if not bad.is_record:
                record.signals = {"read.lost": bad.lost, "read.lost_bytes": bad.lost_bytes}
            tally.drop(record, READ, "bad_record", 0)
            rejects.add(READ, "bad_record", record)

        with _written(self.layout.kept(rank)) as file, rejects:
            for record in read_unit(self.units[rank], self.read, on_bad):
                encoded = record.text.encode("utf-8", "replace")
                n_bytes = len(encoded)
                texts.update(b"%d " % n_bytes + encoded)
                progress.advance(n_bytes)
                tally.read[record.source] += 1
                tally.read_bytes[record.source] += n_bytes
                if self._dropped(record, stages_of(record.source), tally, rejects, n_bytes):
                    continue
                signatures.add(record, n_written)
                line = to_line(record)
                file.write(line)
                n_written += len(line)
        signatures.write(self.layout.work, rank)
        write_json(self.layout.tally("clean", rank), tally.to_json())
        digest = {"bytes": sum(tally.read_bytes.values()), "sha256": texts.hexdigest()}
        write_json(self.layout.digest("clean", rank), digest)
        progress.finish(self.units[rank].size_bytes)

    def _dropped(
        self, record: Record, stages: list[CurationStage], tally: Tally, rejects: _Rejects, n_bytes: int
    ) -> bool:
        for stage in stages:
            reason = stage.process(record)
            if stage.name == DECONTAMINATE:
                prefix = f"{DECONTAMINATE}."
                tally.contaminated.update(
                    name.removeprefix(prefix) for name in record.counts if name.startswith(prefix)
                )
            if reason is not None:
                tally.drop(record, stage.name, reason, n_bytes)
                rejects.add(stage.name, reason, record)
                return True
        tally.change(record)
        return False


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with _written(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n")


# ---- last phase ------------------------------------------------------------------------------------------------------

REASONS = ("exact_duplicate", "near_duplicate", "only_repeated_lines", "same_url", "domain_limit")


@dataclass
class FilterTask:
    """Last phase: write the documents of one unit without duplicates and repeated lines."""

    curation: CurationConfig
    layout: Layout
    collection: Collection

    def run(self, rank: int, progress: TaskProgress) -> None:
        removals = load_array(self.layout.removed(rank))
        removed = dict(
            zip((removals["document"] & np.uint64(0xFFFFFFFF)).tolist(), removals.tolist(), strict=True)
        )
        described = self._described(removals["kept"])
        lines = load_array(self.layout.lines, mapped=True)
        tally, rejects = Tally(), _Rejects(self.layout.rejected, rank)
        places: list[tuple[int, int]] = []
        n_written = 0
        documents = self.layout.documents(rank)
        is_parquet = self.layout.format is OutputFormat.parquet
        with self.layout.kept(rank).open("rb") as kept, _written(documents) as file, rejects:
            rows = ParquetRows(file) if is_parquet else None
            for number, line in enumerate(kept):
                progress.advance(len(line))
                record = from_line(line)
                n_bytes = len(record.text.encode("utf-8", "replace"))
                reason, stands = None, None
                if number in removed:
                    _, document, similarity, place = removed[number]
                    reason = REASONS[place]
                    stands = _standing(described.get(document), similarity)
                elif self._without_lines(record, lines, rank << 32 | number):
                    reason = REASONS[2]
                if reason is not None:
                    tally.drop(record, DEDUP, reason, n_bytes)
                    rejects.add(DEDUP, reason, record, stands)
                    continue
                tally.change(record)
                tally.keep(record, len(record.text.encode("utf-8", "replace")))
                if rows is not None:
                    rows.add(record)
                    continue
                out = to_line(record)
                file.write(out)
                places.append((number, n_written))
                n_written += len(out)
            if rows is not None:
                rows.finish()
        if not is_parquet:  # rows address documents by their place in a file of JSON lines
            self._write_signatures(rank, places)
        write_json(self.layout.digest("filter", rank), _digest_of(documents))
        write_json(self.layout.tally("filter", rank), tally.to_json())

    def _described(self, documents: np.ndarray) -> dict[int, dict[str, Any]]:
        """Where the kept documents are found that stand for this unit's duplicates."""
        wanted = np.unique(documents)
        return {
            document: {"id": content["id"], "source": content["source"]} | self.collection.where(document)
            for document, content in self.collection.lines(wanted[wanted != np.uint64(NO_DOCUMENT)])
        }

    def _write_signatures(self, rank: int, places: list[tuple[int, int]]) -> None:
        """Write the rows of what was kept, with which a later curation is compared (`collection.py`)."""
        numbers, line_bytes = np.array(places, dtype=np.uint64).reshape(-1, 2).T
        rows = self.collection.rows(rank)[numbers]
        rows["line_bytes"], rows["preference"] = line_bytes, 0
        with _written(self.layout.signatures(rank)) as file:
            file.write(rows.tobytes())

    def _without_lines(self, record: Record, repeated: np.ndarray, document: int) -> bool:
        """Remove repeated lines, unless this document is the first that has them. Returns whether nothing is left.

        Documents of sources that people chose keep all lines.
        """
        if not len(repeated) or self.curation.quality.is_curated(record.source):
            return False
        found = line_hashes(record, self.curation.dedup)
        hashes = np.array([value for value, _ in found], dtype=np.uint64)
        places = np.minimum(np.searchsorted(repeated[:, 0], hashes), len(repeated) - 1)
        rows = repeated[places]
        taken = (rows[:, 0] == hashes) & (rows[:, 1] != document)
        if not taken.any():
            return False
        out = {line for (_, line), out in zip(found, taken.tolist(), strict=True) if out}
        left = [line for line in record.text.split("\n") if line not in out]
        record.count("dedup.repeated_lines", int(taken.sum()))
        if not any(line.strip() for line in left):
            return True
        record.text = "\n".join(left).strip("\n")
        return False


def _digest_of(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _standing(kept: dict[str, Any] | None, similarity: float) -> dict[str, Any] | None:
    """What a dropped document's record says of the one that stands for it; none where a domain has too many."""
    if kept is None or not similarity:  # of the same address, whatever its text
        return kept
    return kept | {"similarity": round(similarity, 4)}
