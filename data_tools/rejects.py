"""Look at what a curation dropped: python -m data_tools.rejects curated=DIR [stage=quality] [reason=low_words] [show=3]

Counts the dropped documents by stage and reason, and shows some of each, chosen by the hash of their ids. With other
thresholds of the stage quality, it says how many documents they would keep, without running the curation again:

    python -m data_tools.rejects curated=DIR 'quality={english: {min_words: 30}}'

Exit codes: 0 done, 2 the folder or an option is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script, which works in every folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.command import begin

begin(__name__)

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash
from omegaconf import MISSING, OmegaConf

from data_tools.progress import stage as progress_of
from data_tools.reading.bounded import Bounds
from data_tools.reading.reader import Span, entries
from data_tools.report.funnel import REPORT
from data_tools.report.schemas import read_curation_report
from data_tools.stages.quality import QualityConfig, reasons
from data_tools.tables import plain_table
from pretrain.config import run_command
from pretrain.config.load import validate
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.files import open_regular
from pretrain.printing import visible

QUALITY = "quality"
_TEXT_CHARS = 400


@dataclass(kw_only=True, slots=True)
class RejectsConfig:
    """What to look at."""

    curated: PathText = MISSING
    """The output folder of a curation."""
    stage: str | None = None
    """The stage whose dropped documents are looked at; null: all stages."""
    reason: str | None = None
    """The reason for which they were dropped; null: all reasons."""
    show: int = 0
    """Number of documents to show for each reason."""
    quality: Any = None  # dict: Hydra adds no key to a map with that type
    """Options of the stage quality to try instead of those of the curation, as {english: {min_words: 30}}."""

    def __post_init__(self) -> None:
        if self.show < 0:
            raise ConfigError(f"show={self.show} must be 0 or more")
        if not isinstance(self.quality, dict | None):
            raise ConfigError(
                f"quality={self.quality} is no map; give one like {{english: {{min_words: 30}}}}"
            )


@dataclass
class Found:
    """The dropped documents of one stage and reason."""

    count: int = 0
    shown: list[tuple[int, str]] = field(default_factory=list)
    """A heap of the documents with the smallest hashes, as (-hash, text for people)."""
    kept: int = 0
    """Number of these that other thresholds would keep."""
    still: Counter[str] = field(default_factory=Counter)
    """The first rule that each of the others breaks under other thresholds."""


def main(config: RejectsConfig) -> None:
    """Read the dropped documents, and print the tables and the documents."""
    folder = Path(config.curated)
    report = read_curation_report(folder / REPORT)
    other = _other_thresholds(config, report)
    found: dict[tuple[str, str], Found] = {}
    for stage, record in _records(folder, config, other is not None):
        one = found.setdefault((stage, str(record.get("reason"))), Found())
        one.count += 1
        if config.show:
            digest = xxhash.xxh3_64_intdigest(str(record.get("id")).encode("utf-8", "replace"))
            keep = heapq.heappush if len(one.shown) < config.show else heapq.heappushpop
            keep(one.shown, (-digest, _for_people(stage, record)))
        if other is not None:
            _try(one, record, other)
    if not found:
        raise ConfigError(
            f"curated={config.curated} has no document that stage={config.stage} reason={config.reason} dropped"
        )
    _print(found, other is not None)


def _other_thresholds(config: RejectsConfig, report: dict[str, Any]) -> QualityConfig | None:
    """The options of the curation's quality stage with those to try over them; None where there are none."""
    if config.quality is None:
        return None
    if config.stage not in (None, QUALITY):
        raise ConfigError(
            f"quality= is about the stage quality, and stage={config.stage} was given; leave one out"
        )
    curated = report["recipe"]["options"]["curation"].get(QUALITY, {})
    merged = OmegaConf.to_container(OmegaConf.merge(curated, config.quality))
    try:
        return validate(QualityConfig, merged)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"quality={config.quality}: {error}") from error


def _records(folder: Path, config: RejectsConfig, is_quality: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stage and the fields of every dropped document that is asked for."""
    rejected = folder / "rejected"
    stages = sorted(path.name for path in rejected.iterdir()) if rejected.is_dir() else []
    wanted = QUALITY if is_quality else config.stage
    if wanted is not None and wanted not in stages:
        raise ConfigError(
            f"curated={config.curated}: the stage {wanted} dropped nothing; those that did: {', '.join(stages)}"
        )
    files = [
        path for stage in stages if wanted in (None, stage) for path in sorted((rejected / stage).iterdir())
    ]
    with progress_of("reading", sum(path.stat().st_size for path in files)) as progress:
        for path in files:
            with open_regular(path, inside=rejected) as raw:
                for entry in entries(raw, Span(str(path), "jsonl", Bounds(), lambda schema: [])):
                    if entry.problem:
                        raise ConfigError(f"{path}:{entry.number} {entry.problem}; curate again")
                    if config.reason in (None, entry.fields.get("reason")):
                        yield path.parent.name, entry.fields
            progress.advance(path.stat().st_size)


def _try(one: Found, record: dict[str, Any], other: QualityConfig) -> None:
    figures = {
        name: value for name, value in (record.get("signals") or {}).items() if isinstance(value, int | float)
    }
    if "quality.words" not in figures:
        raise ConfigError("these documents have no figures; curate again with this version of the program")
    broken = reasons(
        figures, other.thresholds(str(record.get("language")), str(record.get("source")), figures)
    )
    if broken:
        one.still[broken[0]] += 1
    else:
        one.kept += 1


def _for_people(stage: str, record: dict[str, Any]) -> str:
    head = ", ".join(f"{name} {record.get(name)}" for name in ("id", "source", "language"))
    signals = record.get("signals") or {}
    figure = f"{QUALITY}.{str(record.get('reason')).partition('_')[2]}"
    measured = f", {figure} {signals[figure]}" if stage == QUALITY and figure in signals else ""
    text = str(record.get("text"))
    cut = text[:_TEXT_CHARS] + (" ..." if len(text) > _TEXT_CHARS else "")
    body = "\n".join(f"  | {line}" for line in visible(cut, keep="\n\t").split("\n"))
    return f"{visible(head + measured)}\n{body}"


def _print(found: dict[tuple[str, str], Found], is_try: bool) -> None:
    total = sum(one.count for one in found.values())
    ordered = sorted(found.items(), key=lambda item: (-item[1].count, item[0]))
    headers = ["stage", "reason", "documents", "share"] + ["would be kept", "then dropped by"] * is_try
    rows = []
    for (stage, reason), one in ordered:
        row = [stage, reason, f"{one.count:,}", f"{one.count / total:.1%}"]
        if is_try:
            row += [f"{one.kept:,}", ", ".join(f"{name} {n:,}" for name, n in one.still.most_common(3))]
        rows.append(tuple(row))
    print(plain_table(rows, headers))
    if is_try:
        print(f"\n{sum(one.kept for _, one in ordered):,} of {total:,} documents would be kept")
    for (stage, reason), one in ordered:
        for _, text in sorted(one.shown, reverse=True):
            print(f"\n{stage} {reason}: {text}")


if __name__ == "__main__":
    run_command(RejectsConfig, main, doc=__doc__)
