"""A dry run on documents spread over the input: what each stage changed or dropped, and the text before and after.

Only the stages run. Duplicates and repeated lines are found among all documents, so a sample cannot show them.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from data_tools.curation.choice import CurationConfig, StagesOf
from data_tools.curation.phases import DECONTAMINATE
from data_tools.reading.units import ReadConfig, Unit, read_unit, units_of
from data_tools.record import CurationStage, Record
from data_tools.stages.decontamination.decontaminate import build_index
from pretrain.printing import visible

CONTEXT_LINES = 2
# Smaller input is read as a whole. Of a file that cannot be entered in the middle, this much is read.
_MOST_READ_BYTES = 16 << 20
_FINENESS = 16
_DROPPED_CHARS = 2000
_SENTENCE_END = re.compile(r"(?<=[.!?。！？；;])(?=[ \u3000]|[^\x00-\x7f])")
_LONG_LINE = 160


@dataclass(slots=True)
class Step:
    """What one stage did to a document."""

    stage: str
    before: str
    """The text that the stage received."""
    after: str | None
    """The text that it passed on; None where it dropped the document."""
    what: str
    """The reason for dropping the document, or the changes that the stage counted."""


@dataclass(slots=True)
class Trial:
    """One document of a sample, and what was done to it; without steps, it passed unchanged."""

    record: Record
    steps: list[Step]


def try_stages(inputs: list[str], read: ReadConfig, curation: CurationConfig, n: int) -> Iterator[Trial]:
    """Run the stages over about `n` documents, and say what each did. Writes nothing but a temporary index."""
    with TemporaryDirectory() as folder:
        index = Path(folder) / "index.npz"
        if any(DECONTAMINATE in config.stages for config in curation.configs()):
            build_index(curation.decontaminate, index)
        stages_of = StagesOf(curation, index)
        for record in spread(inputs, read, n):
            yield Trial(record, list(_steps(record, stages_of(record.source))))


def _steps(record: Record, stages: list[CurationStage]) -> Iterator[Step]:
    for stage in stages:
        before, counts = record.text, dict(record.counts)
        reason = stage.process(record)
        if reason is not None:
            yield Step(stage.name, before, None, reason)
            return
        if record.text != before:
            made = {name: count - counts.get(name, 0) for name, count in record.counts.items()}
            what = ", ".join(f"{name} {count}" for name, count in sorted(made.items()) if count)
            yield Step(stage.name, before, record.text, what or "characters and white space")


def spread(inputs: list[str], read: ReadConfig, n: int) -> Iterator[Record]:
    """About `n` records at even distances in the bytes of the input; records that cannot be read are passed over."""
    units = units_of(inputs, 1 << 62, read)
    total = sum(unit.size_bytes for unit in units)
    if total <= _MOST_READ_BYTES:
        yield from _thinned(chain.from_iterable(_records(unit, read) for unit in units), n)
        return
    seen = taken = 0
    for unit in units_of(inputs, max(1, total // n), read, lambda left_out: None):  # named above
        seen += unit.size_bytes
        due = -(-n * seen // total) - taken
        # The first of a part of a file, or some of the beginning of a file that has no parts.
        records = _records(unit, read)
        for record in (
            (islice(records, due) if unit.stop is not None else _thinned(records, due)) if due else ()
        ):
            taken += 1
            yield record


def _records(unit: Unit, read: ReadConfig) -> Iterator[Record]:
    return read_unit(unit, read, lambda where, why: None)


def _thinned(records: Iterator[Record], n: int) -> list[Record]:
    """`n` records at even distances, or all if there are fewer."""
    kept: list[Record] = []
    step, n_chars = 1, 0
    for number, record in enumerate(records):
        if number % step == 0:
            kept.append(record)
        if len(kept) > _FINENESS * n:
            kept, step = kept[::2], 2 * step
        n_chars += len(record.text)
        if n_chars > _MOST_READ_BYTES:
            break
    return [kept[place * len(kept) // n] for place in range(n)] if len(kept) > n else kept


def shown(trial: Trial, most_lines: int | None = None) -> str:
    """A trial as text; each change is shown by at most `most_lines` lines."""
    record = trial.record
    parts = [f"document {visible(record.id)} (source {visible(record.source)}, language {record.language})"]
    for step in trial.steps:
        verb = "dropped" if step.after is None else "changed"
        parts.append(f"  {step.stage} {verb} it: {step.what}")
        if step.after is None:
            cut = step.before[:_DROPPED_CHARS]
            lines = [*cut.split("\n"), *(["..."] if len(cut) < len(step.before) else [])]
        else:
            lines = difference(step.before, step.after)
        if most_lines is not None and len(lines) > most_lines:
            lines = [*lines[:most_lines], f"... and {len(lines) - most_lines} more lines"]
        parts += [f"    {visible(line, keep=chr(9))}".rstrip() for line in lines]
    return "\n".join(parts) + "\n"


def difference(before: str, after: str) -> list[str]:
    """Lines that were removed (-) and added (+), with two lines around; long lines are cut into sentences.

    White space at the ends of lines is not compared.
    """
    lines = difflib.unified_diff(_cut(before), _cut(after), n=CONTEXT_LINES, lineterm="")
    return [line for line in lines if not line.startswith(("--- ", "+++ "))]


def _cut(text: str) -> list[str]:
    found: list[str] = []
    for line in text.split("\n"):
        found += [line] if len(line) <= _LONG_LINE else _SENTENCE_END.split(line)
    return [part.rstrip() for part in found]


def summary(trials: list[Trial]) -> str:
    """One line per stage that did something: how many documents it changed, and dropped for which reasons."""
    changed: Counter[str] = Counter()
    dropped: Counter[tuple[str, str]] = Counter()
    for trial in trials:
        for step in trial.steps:
            if step.after is None:
                dropped[step.stage, step.what] += 1
            else:
                changed[step.stage] += 1
    untouched = sum(not trial.steps for trial in trials)
    lines = [f"{len(trials)} documents: {untouched} unchanged, {dropped.total()} dropped"]
    for stage in dict.fromkeys([*changed, *(stage for stage, _ in dropped)]):
        reasons = [f"{reason} {n}" for (name, reason), n in dropped.most_common() if name == stage]
        lines.append(
            f"  {stage}: changed {changed[stage]}" + (f", dropped {', '.join(reasons)}" if reasons else "")
        )
    lines.append(
        "Duplicates and repeated lines are found among all documents, so they are not part of a sample."
    )
    return "\n".join(lines)
