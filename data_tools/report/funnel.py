"""The funnel of a preparation or curation: how many documents each stage received and kept, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.report.schemas import read_curation_report
from data_tools.tables import plain_table, shown

DOCUMENTS, REPORT = "documents", "report.json"
"""Names in the folder of a curation: the folder of its text, and its report."""
_SHOWN = 12
_NAMED = 1000  # files that a report names
_TYPICAL_DOCUMENT_BYTES = 2000  # of a file, where none could be read that would tell


@dataclass(kw_only=True, slots=True)
class Unread:
    """The files of the input that were not read, or only in part."""

    files: int = 0
    """Number of files."""
    documents: int = 0
    """Number of documents that are lost with them, as an estimate."""
    named: dict[str, str] = field(default_factory=dict)
    """Why each of the first thousand was not read. The reason continues a sentence that begins with the name."""

    def add(self, name: str, reason: str, documents: int) -> None:
        self.files += 1
        self.documents += documents
        if len(self.named) < _NAMED:
            about = f" (about {documents:,} documents)" if documents > 1 else ""
            self.named[name] = f"{reason}{about}"

    def lines(self) -> list[str]:
        """What was not read, as a few lines of text."""
        if not self.files:
            return []
        lost = f"with about {self.documents:,} documents" if self.documents else "which do not count"
        lines = [f"{self.files:>12,} files not read, or only in part, {lost}:"]
        shown_names = list(self.named.items())[:_SHOWN]
        lines += [f"{'':13}{shown(name)} {shown(reason)}" for name, reason in shown_names]
        if self.files > len(shown_names):
            lines.append(f"{'':13}and {self.files - len(shown_names):,} more")
        return lines


def estimated_documents(lost: int, lost_bytes: int, read_bytes: int, documents: int) -> int:
    """The number of documents that are lost: `lost`, or what `lost_bytes` hold, judged by all that was read."""
    document_bytes = read_bytes / documents if documents and read_bytes > 0 else _TYPICAL_DOCUMENT_BYTES
    return max(lost, round(lost_bytes / document_bytes))


@dataclass(kw_only=True, slots=True)
class Funnel:
    """How many documents came in, and what became of them."""

    read: int = 0
    """Documents that were read, bad ones included."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Dropped documents by reason: bad_record, too_short, too_long, duplicate; for dialogues, no_answer,
    special_token (a turn holds the name of one) and too_many_tokens."""
    kept: int = 0
    """Documents that were kept, held-out ones included."""
    kept_bytes: int = 0
    """UTF-8 bytes of the kept documents."""
    heldout: int = 0
    """Kept documents that are held out of training."""
    cut: int = 0
    """Kept dialogues that were cut to chat.max_tokens."""
    shortened: int = 0
    """Kept labeled documents that were cut to labels.max_tokens."""
    unread: Unread = field(default_factory=Unread)
    """Files that were not read. Their documents are not in the other counts."""

    @classmethod
    def of_dict(cls, counts: Mapping[str, Any]) -> Funnel:
        """The inverse of `as_dict`, also for reports of older programs, which did not count unread files."""
        return cls(**{**counts, "unread": Unread(**counts.get("unread", {}))})

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """The counts as a dictionary, for JSON. The last one is left out where it is 0, as in older reports."""
        counts = asdict(self)
        if not self.shortened:
            del counts["shortened"]
        return counts

    def lines(self) -> list[str]:
        """The funnel as a few lines of text."""
        lines = [f"{self.read:>12,} documents read"]
        lines += [
            f"{-count:>12,} {reason.replace('_', ' ')}" for reason, count in sorted(self.dropped.items())
        ]
        lines.append(
            f"{self.kept:>12,} kept ({self.kept_bytes / 1e6:.1f} MB), {self.heldout:,} of them held out"
        )
        if self.cut:
            lines.append(f"{self.cut:>12,} of them cut at the last turn within chat.max_tokens")
        if self.shortened:
            lines.append(f"{self.shortened:>12,} of them cut to their start within labels.max_tokens")
        return lines + self.unread.lines()


def curations_of(inputs: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """Paths and reports of those inputs of a preparation that are curated text."""
    found = []
    for entry in inputs:
        folder = Path(entry).expanduser().resolve()
        report = folder.parent / REPORT
        if folder.name == DOCUMENTS and report.is_file():
            found.append((folder.parent.name, read_curation_report(report)))
    return found


@dataclass(frozen=True, slots=True)
class StageCounts:
    """What a stage did with the documents that came to it."""

    stage: str
    """Name of the stage."""
    documents_in: int
    """Documents that it received."""
    documents_out: int
    """Documents that it kept."""
    bytes_in: int
    """UTF-8 bytes of the received documents, as they were read."""
    bytes_out: int
    """UTF-8 bytes of the kept documents, as they were read: stages may change the text."""
    dropped: dict[str, int]
    """Dropped documents by reason, the most frequent first."""


def stage_counts(report: Mapping[str, Any]) -> list[StageCounts]:
    """Counts from the report of a curation: reading, then each stage in order, and `dedup` last."""
    tally = report["tally"]
    left, left_bytes = sum(tally["read"].values()), sum(tally["read_bytes"].values())
    bad = dict(_of_stage(tally["dropped"], "read"))
    found = [StageCounts("read", left + sum(bad.values()), left, left_bytes, left_bytes, bad)]
    for stage in (*report["stages"], "dedup"):
        reasons = dict(sorted(_of_stage(tally["dropped"], stage), key=lambda item: (-item[1], item[0])))
        after = left - sum(reasons.values())
        after_bytes = left_bytes - sum(count for _, count in _of_stage(tally["dropped_bytes"], stage))
        found.append(StageCounts(stage, left, after, left_bytes, after_bytes, reasons))
        left, left_bytes = after, after_bytes
    return found


def _of_stage(counts: Mapping[str, int], stage: str) -> list[tuple[str, int]]:
    return [(name.partition("/")[2], n) for name, n in counts.items() if name.startswith(f"{stage}/")]


def funnel_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per stage, in order: documents that are left and were dropped, bytes, and reasons."""
    read, *stages = stage_counts(report)
    rows: list[tuple[str, ...]] = [("read", f"{read.documents_out:,}", "", f"{read.bytes_out / 1e6:.1f}", "")]
    for counts in stages:
        why = ", ".join(f"{reason} {count:,}" for reason, count in list(counts.dropped.items())[:5])
        dropped = counts.documents_out - counts.documents_in
        size = f"{counts.bytes_out / 1e6:.1f}"
        rows.append((counts.stage, f"{counts.documents_out:,}", f"{dropped:,}", size, why))
    return rows


def _change_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per kind of change to texts that were kept, in the order of the stages.

    What decontamination counts are pieces that it found, whether it cut them out or not.
    """
    tally, order = report["tally"], [*report["stages"], "dedup"]
    names = [name for name in tally["counts"] if name.partition(".")[0] in {*order} - {"decontaminate"}]
    names.sort(key=lambda name: (order.index(name.partition(".")[0]), name))
    documents = tally.get("changed", {})
    return [
        (name, f"{tally['counts'][name]:,}", f"{documents[name]:,}" if name in documents else "")
        for name in names
    ]


def funnel_table(report: Mapping[str, Any]) -> str:
    """Funnel, languages and sources of a curation, as aligned text."""
    tally = report["tally"]
    parts = [plain_table(funnel_rows(report), ("stage", "documents", "dropped", "MB of input", "why"))]
    if changes := _change_rows(report):
        parts.append(plain_table(changes, ("changed text", "changes", "documents")))
    bad = tally["dropped"].get("read/bad_record", 0)
    if bad:
        parts.append(f"{bad:,} records or files could not be read: rejected/read")
    if unread := Unread(**(report.get("unread") or {})).lines():
        parts.append("\n".join(unread))
    kept = sum(tally["kept"].values())
    rows = []
    for source, n_read in sorted(tally["read"].items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]:
        n_kept = tally["kept"].get(source, 0)
        size = tally["kept_bytes"].get(source, 0)
        rows.append(
            (source, f"{n_read:,}", f"{n_kept:,}", f"{n_kept / max(n_read, 1):.1%}", f"{size / 1e6:.1f}")
        )
    if len(tally["read"]) > _SHOWN:
        rows.append((f"{len(tally['read']) - _SHOWN} others", "", "", "", ""))
    parts.append(plain_table(rows, ("source", "read", "kept", "share", "MB kept")))
    languages = sorted(tally["language_bytes"].items(), key=lambda item: (-item[1], item[0]))
    parts.append(
        "languages: " + ", ".join(f"{shown(name)} {size / 1e6:.1f} MB" for name, size in languages[:_SHOWN])
    )
    # Old reports have no such counts.
    if found := sorted(tally.get("contaminated", {}).items(), key=lambda item: (-item[1], item[0])):
        listed = ", ".join(f"{shown(name)} {n:,}" for name, n in found[:_SHOWN])
        parts.append(f"documents with text of evaluation sets: {listed}")
    parts.append(f"kept: {kept:,} documents, {sum(tally['kept_bytes'].values()) / 1e6:.1f} MB")
    return "\n\n".join(parts)
