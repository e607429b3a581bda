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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.curation.dedup import DedupConfig, Signatures, line_hashes, load_array, save_array
from data_tools.curation.executors import TaskProgress
from data_tools.gzipped import Gzipped
from data_tools.reading.units import Bad, ReadConfig, Unit, read_unit
from data_tools.record import CurationStage, Record
from data_tools.report.schemas import MAX_REPORT_BYTES, MAX_REPORT_VALUES
from data_tools.stages.boilerplate import BoilerplateConfig, BoilerplateStage
from data_tools.stages.decontaminate import DecontaminateConfig, DecontaminateStage
from data_tools.stages.harm import HarmConfig, HarmStage
from data_tools.stages.language import LanguageConfig, LanguageStage
from data_tools.stages.normalize import NormalizeConfig, NormalizeStage
from data_tools.stages.pii import PiiConfig, PiiStage
from data_tools.stages.quality import QualityConfig, QualityStage
from pretrain.errors import ConfigError
from pretrain.files import read_capped, written_atomically
from pretrain.stored import parse

# pii comes last: its placeholders would hide text that is shared with an evaluation set.
STAGES = ("normalize", "language", "boilerplate", "quality", "harm", "decontaminate", "pii")
READ, DECONTAMINATE, DEDUP = "read", "decontaminate", "dedup"


@dataclass(kw_only=True, slots=True)
class CurationConfig:
    """The stages to run, and the rules of each."""

    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Stages to run: normalize, language, boilerplate, quality, harm, decontaminate, pii, always in this order."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    boilerplate: BoilerplateConfig = field(default_factory=BoilerplateConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    harm: HarmConfig = field(default_factory=HarmConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Removal of duplicates, which runs last, over all documents."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or len(set(self.stages)) != len(self.stages):
            raise ConfigError(
                f"curation.stages={self.stages} must name each stage once; known are {', '.join(STAGES)}"
            )


def build_stages(config: CurationConfig, index: Path) -> list[CurationStage]:
    """The configured stages in their order. `index` is the path of the index of the evaluation sets."""
    builders: dict[str, Callable[[], CurationStage]] = {
        "normalize": lambda: NormalizeStage(config.normalize),
        "language": lambda: LanguageStage(config.language),
        "boilerplate": lambda: BoilerplateStage(config.boilerplate),
        "quality": lambda: QualityStage(config.quality),
        "harm": lambda: HarmStage(config.harm),
        "decontaminate": lambda: DecontaminateStage(replace(config.decontaminate, index=str(index))),
        "pii": lambda: PiiStage(config.pii),
    }
    return [builders[name]() for name in STAGES if name in config.stages]


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

    def add(self, stage: str, reason: str, record: Record) -> None:
        line = {"reason": reason, "id": record.id, "source": record.source, "language": record.language}
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


# ---- first phase -----------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Paths of the files of a curation in its work folder."""

    work: Path

    def kept(self, rank: int) -> Path:
        return self.work / "kept" / f"{rank:05d}.jsonl"

    def ranks(self, rank: int) -> Path:
        return self.work / "ranks" / f"{rank:05d}.npy"

    def tally(self, phase: str, rank: int) -> Path:
        return self.work / "tally" / phase / f"{rank:05d}.json"

    def removed(self, rank: int) -> Path:
        return self.work / "removed" / f"{rank:05d}.npy"

    def documents(self, rank: int) -> Path:
        return self.work / "documents" / f"part-{rank:05d}.jsonl"

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
    def lines(self) -> Path:
        return self.work / "lines.npy"


@dataclass
class CleanTask:
    """First phase: run the stages over one unit of input."""

    units: list[Unit]
    read: ReadConfig
    curation: CurationConfig
    layout: Layout

    def run(self, rank: int, progress: TaskProgress) -> None:
        stages = build_stages(self.curation, self.layout.index)
        signatures, tally = Signatures(self.curation.dedup), Tally()
        rejects = _Rejects(
            self.layout.rejected, rank
        )  # written to disk immediately, because most of the documents may be dropped
        order = {name: place for place, name in enumerate(self.curation.dedup.priority)}
        source_ranks: list[int] = []
        texts = hashlib.sha256()

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
                if self._dropped(record, stages, tally, rejects, n_bytes):
                    continue
                signatures.add(len(source_ranks), record)
                source_ranks.append(order.get(record.source, len(order)))
                file.write(to_line(record))
        signatures.write(self.layout.work, rank)
        save_array(self.layout.ranks(rank), np.array(source_ranks, dtype=np.uint32))
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

REASONS = ("exact_duplicate", "near_duplicate", "only_repeated_lines")


@dataclass
class FilterTask:
    """Last phase: write the documents of one unit without duplicates and repeated lines."""

    curation: CurationConfig
    layout: Layout

    def run(self, rank: int, progress: TaskProgress) -> None:
        removed = dict(load_array(self.layout.removed(rank)).tolist())
        lines = load_array(self.layout.lines, mapped=True)
        tally, rejects = Tally(), _Rejects(self.layout.rejected, rank)
        written, n_written = hashlib.sha256(), 0
        documents = self.layout.documents(rank)
        with self.layout.kept(rank).open("rb") as kept, _written(documents) as file, rejects:
            for number, line in enumerate(kept):
                progress.advance(len(line))
                record = from_line(line)
                n_bytes = len(record.text.encode("utf-8", "replace"))
                reason = REASONS[removed[number]] if number in removed else None
                if reason is None and self._without_lines(record, lines, rank << 32 | number):
                    reason = REASONS[2]
                if reason is not None:
                    tally.drop(record, DEDUP, reason, n_bytes)
                    rejects.add(DEDUP, reason, record)
                    continue
                tally.change(record)
                tally.keep(record, len(record.text.encode("utf-8", "replace")))
                out = to_line(record)
                file.write(out)
                written.update(out)
                n_written += len(out)
        digest = {"bytes": n_written, "sha256": written.hexdigest()}
        write_json(self.layout.digest("filter", rank), digest)
        write_json(self.layout.tally("filter", rank), tally.to_json())

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
