"""Curate text: python -m data_tools.curate input=[PATH,...] output=DIR [KEY=VALUE ...]

Reads text (JSONL, Parquet, text folders, tars of text, WARC, Hugging Face dataset folders; local or behind a URL),
normalizes it, detects its language, judges its quality, drops harmful text, replaces personal data, and removes
evaluation sets and duplicates. Writes DIR/documents/part-NNNNN.jsonl, which data_tools.prepare takes as its input,
what was dropped under DIR/rejected/<stage>/, and DIR/report.json. With corpus=DIR2 it then prepares the corpus there,
with the options prepare.*. Run again after an interruption, it continues where it stopped.
"""

from __future__ import annotations

from pretrain.command import begin

begin(__name__)

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from omegaconf import MISSING

from data_tools.building.workspace import locked
from data_tools.config import PrepareConfig
from data_tools.curation.compare import compare_task, decide
from data_tools.curation.executors import ExecutorConfig, run_phase
from data_tools.curation.phases import (
    DECONTAMINATE,
    STAGES,
    CleanTask,
    CurationConfig,
    FilterTask,
    Layout,
    Tally,
    write_json,
)
from data_tools.reading.evaluation_sets import evaluation_files
from data_tools.reading.units import ReadConfig, Unit, units_of
from data_tools.report.funnel import DOCUMENTS, REPORT, funnel_table
from data_tools.report.schemas import read_curation_report, read_digest
from data_tools.stages.decontaminate import build_index
from pretrain import __version__
from pretrain.config import run_command, to_dict
from pretrain.errors import ConfigError, RunError
from pretrain.files import sync_folder
from pretrain.printing import print_error
from pretrain.remote import open_file

CURATION_VERSION = 2
"""Raise this with every change of the program that gives different bytes for the same input."""
WORK = ".work"
_PRODUCTS = (DOCUMENTS, "rejected", REPORT)


@dataclass(kw_only=True, slots=True)
class CorpusConfig(PrepareConfig):
    """Options of data_tools.prepare, for the corpus that follows the curation."""

    input: list[str] = field(default_factory=lambda: [DOCUMENTS])
    """Always the curated text."""
    output: str = "corpus"
    """Always the folder `corpus=`."""


@dataclass(kw_only=True, slots=True)
class CurateConfig:
    """Options of a curation. The same input and options give the same bytes, wherever it runs."""

    input: list[str] = MISSING
    """Files, folders of them, or URLs; `a-{000..099}.tar` stands for 100 files."""
    output: str = MISSING
    """Folder for the result."""
    overwrite: bool = False
    """Replace a result in `output` that was curated from other input or with other options."""
    unit_bytes: int = 64 << 20
    """Bytes of input per task; an interruption loses at most this much work per task."""
    max_bad_frac: float = 0.001
    """Fraction of bad records (0 to 1) above which the curation gives up."""
    read: ReadConfig = field(default_factory=ReadConfig)
    """Fields of records, and bounds on reading."""
    curation: CurationConfig = field(default_factory=CurationConfig)
    """Stages and their rules."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """Where the tasks run."""
    corpus: str | None = None
    """Folder of a corpus to prepare from the curated text; null: none."""
    prepare: CorpusConfig = field(default_factory=CorpusConfig)
    """Options of that preparation."""

    def __post_init__(self) -> None:
        if self.unit_bytes < 1:
            raise ConfigError(f"unit_bytes={self.unit_bytes} must be 1 or more")
        if not 0 <= self.max_bad_frac <= 1:
            raise ConfigError(f"max_bad_frac={self.max_bad_frac} is outside 0 to 1")


def curate(config: CurateConfig) -> int:
    """Curate the text, then prepare a corpus where one is wanted. Returns the exit code."""
    code = _curate(config)
    if code or config.corpus is None:
        return code
    print()
    documents = str(Path(config.output) / DOCUMENTS)
    from data_tools.prepare import prepare

    return prepare(replace(config.prepare, input=[documents], output=config.corpus))


def _curate(config: CurateConfig) -> int:
    output = Path(config.output).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={config.output} is a file; give a folder")
    units = units_of(config.input, config.unit_bytes)
    recipe = _recipe(config, units)
    if _is_finished(output, recipe, config.overwrite):
        print(f"already curated: {output / REPORT} was made from this input with these options")
        return 0
    try:
        with _work(output, recipe) as layout:
            report = _run(config, units, layout)
            write_json(layout.work / REPORT, report | {"recipe": recipe})
            _publish(layout.work, output)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from here", file=sys.stderr)
        return 130
    except RunError as error:
        print_error("error", error)
        return 1
    print(funnel_table(read_curation_report(output / REPORT)))
    return 0


def _run(config: CurateConfig, units: list[Unit], layout: Layout) -> dict[str, Any]:
    """Run all phases. Returns the report."""
    n_units, curation, executor = len(units), config.curation, config.executor
    if "decontaminate" in curation.stages and not layout.index.exists():
        build_index(curation.decontaminate, layout.index)
    clean = CleanTask(units, config.read, curation, layout)
    total_bytes = sum(unit.size_bytes for unit in units)
    run_phase("cleaning", clean, n_units, layout.work / "phases" / "clean", executor, total_bytes)
    cleaned = _summed(layout, "clean", n_units)
    _check_bad(config, cleaned, layout)
    compare, n_bytes = compare_task(curation.dedup, layout, n_units)
    run_phase("comparing", compare, len(compare.jobs), layout.work / "phases" / "compare", executor, n_bytes)
    clusters = decide(compare)
    kept_bytes = sum(layout.kept(rank).stat().st_size for rank in range(n_units))
    last = FilterTask(curation, layout)
    run_phase("filtering", last, n_units, layout.work / "phases" / "filter", executor, kept_bytes)
    filtered = _summed(layout, "filter", n_units)
    if not filtered.kept:
        dropped = ", ".join(
            f"{n} {reason}" for reason, n in sorted((cleaned.dropped + filtered.dropped).items())
        )
        raise ConfigError(f"input={','.join(config.input)} leaves no document; dropped: {dropped or 'none'}")
    cleaned.add(filtered)
    return {
        "created_by": f"pretrain {__version__}",
        "tally": cleaned.to_json(),
        "clusters": clusters,
        "stages": [name for name in STAGES if name in curation.stages],
        "units": n_units,
        "texts_read": _digest(layout, "clean", n_units),
        "output": _digest(layout, "filter", n_units),
    }


def _digest(layout: Layout, phase: str, n_units: int) -> dict[str, Any]:
    """Total bytes of the texts that were read or the files that were written, and a hash over their hashes."""
    digests = [read_digest(layout.digest(phase, rank)) for rank in range(n_units)]
    joined = "".join(digest.sha256 for digest in digests)
    return {
        "bytes": sum(digest.bytes for digest in digests),
        "sha256": hashlib.sha256(joined.encode()).hexdigest(),
    }


def _summed(layout: Layout, phase: str, n_units: int) -> Tally:
    total = Tally()
    for rank in range(n_units):
        total.add(Tally.of_file(layout.tally(phase, rank)))
    return total


def _check_bad(config: CurateConfig, tally: Tally, layout: Layout) -> None:
    bad = tally.dropped["read/bad_record"]
    n_records = bad + sum(tally.read.values())
    if n_records == 0:
        raise ConfigError(f"input={','.join(config.input)} holds no record")
    if bad > config.max_bad_frac * n_records:
        raise ConfigError(
            f"{bad} of {n_records} records cannot be read, more than max_bad_frac={config.max_bad_frac} allows; "
            f"{layout.rejected}/read/*.jsonl.gz names each with the reason"
        )


# ---- the output folder -----------------------------------------------------------------------------------------------


def _recipe(config: CurateConfig, units: list[Unit]) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    options = to_dict(config)
    for name in ("input", "output", "overwrite", "executor", "max_bad_frac", "corpus", "prepare"):
        del options[name]
    # Everything that decides the content of the input, but not its location.
    facts = [(u.name, u.source, u.kind, u.start, u.stop, u.version) for u in units]
    listing = json.dumps(facts, ensure_ascii=False)
    return {
        "version": CURATION_VERSION,
        "options": options,
        "files": _hashes_of_files(config.curation),
        "input": {"units": len(units), "sha256": hashlib.sha256(listing.encode()).hexdigest()},
        # Versions of these packages decide the text.
        "packages": {name: _version(name) for name in ("ftfy", "py3langid", "trafilatura")},
    }


def _hashes_of_files(curation: CurationConfig) -> dict[str, str]:
    """Hashes of every file that the options name, local or by URL: models, word lists, evaluation sets."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from strings(inner)

    hashes = {}
    for name in curation.stages:
        paths = list(strings(to_dict(getattr(curation, name))))
        if name == DECONTAMINATE:
            for entry in curation.decontaminate.files:  # a folder or a task stands for other files
                paths += [file.path for file in evaluation_files(entry, curation.decontaminate.fields)]
        for path in paths:
            if "://" in path or (path and Path(path).expanduser().is_file()):
                with open_file(f"curation.{name}", path) as file:
                    hashes[path] = _sha256(file)
    return hashes


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # 40 ms, which --help does without

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _key(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _is_finished(output: Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds the result of this recipe. Raises ConfigError where it holds anything else."""
    report = output / REPORT
    if not report.exists():
        if output.is_dir() and any(path.name not in (WORK, *_PRODUCTS) for path in output.iterdir()):
            raise ConfigError(
                f"output={output} is not empty and holds no curated text; choose another output"
            )
        return False
    before = read_curation_report(report)["recipe"]
    if _key(before) == _key(recipe):
        return True
    if overwrite:
        return False
    changed = [name for name in recipe if before.get(name) != recipe[name]]
    raise ConfigError(
        f"output={output} was curated from another recipe ({', '.join(changed)} differ); choose another output or "
        "overwrite=true"
    )


@contextmanager
def _work(output: Path, recipe: dict[str, Any]) -> Iterator[Layout]:
    """The locked work folder of a recipe. Work folders of other recipes are removed."""
    work = output / WORK
    with locked(work, f"another process is curating into output={output}"):
        for other in work.iterdir():
            if other.is_dir() and other.name != _key(recipe):
                shutil.rmtree(other)
        folder = work / _key(recipe)
        folder.mkdir(exist_ok=True)
        yield Layout(folder)


def _publish(work: Path, output: Path) -> None:
    """Move the result into place, the report last, and remove the work folder."""
    (output / REPORT).unlink(missing_ok=True)
    for name in _PRODUCTS:
        if (output / name).is_symlink():
            (output / name).unlink()
        elif (output / name).is_dir() and (work / name).exists():
            shutil.rmtree(output / name)
        if (work / name).exists():
            os.replace(work / name, output / name)
    sync_folder(output)
    shutil.rmtree(output / WORK)


if __name__ == "__main__":
    run_command(CurateConfig, curate, doc=__doc__)
