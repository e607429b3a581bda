"""Curate text: python -m data_tools.curate input=[PATH,...] output=DIR [KEY=VALUE ...]

Reads text (JSONL, Parquet, text folders, tars of text, WARC, Hugging Face dataset folders; local or behind a URL),
normalizes it, detects its language, judges its quality, drops harmful text, replaces personal data, and removes
evaluation sets and duplicates. Writes DIR/documents/part-NNNNN.jsonl, which data_tools.prepare takes as its input,
what was dropped under DIR/rejected/<stage>/, and DIR/report.json. With corpus=DIR2 it then prepares the corpus
there, with the options prepare.*. sample=N shows what the stages do to N documents, in DIR/sample.txt, and curates
nothing. Run again after an interruption, it continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script, which works in every folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.command import begin

begin(__name__)

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from omegaconf import MISSING

from data_tools.building.workspace import locked, write_problem
from data_tools.config import PrepareConfig
from data_tools.curation.choice import CurationConfig, stage_names
from data_tools.curation.collection import (
    INDEX,
    SIGNATURES,
    Collection,
    PartFacts,
    earlier_parts,
    index_of,
    read_index,
)
from data_tools.curation.compare import compare_task, decide, settle
from data_tools.curation.executors import ExecutorConfig, run_phase
from data_tools.curation.phases import (
    DECONTAMINATE,
    CleanTask,
    FilterTask,
    Layout,
    OutputFormat,
    Tally,
    write_json,
)
from data_tools.curation.sample import shown, summary, try_stages
from data_tools.reading.encodings import UTF_8
from data_tools.reading.evaluation_sets import evaluation_files
from data_tools.reading.listing import LeftOut, print_left_out
from data_tools.reading.units import ReadConfig, Unit, units_of
from data_tools.report.funnel import DOCUMENTS, REPORT, Unread, estimated_documents, funnel_table
from data_tools.report.schemas import read_curation_report, read_digest
from data_tools.stages.decontamination.decontaminate import build_index
from data_tools.stages.own import pinned
from pretrain import __version__
from pretrain.config import run_command, to_dict
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError, RunError
from pretrain.files import sync_folder, written_atomically
from pretrain.printing import print_error, visible
from pretrain.remote import open_file

CURATION_VERSION = 4
"""Raise this with every change of the program that gives different bytes for the same input."""
WORK = ".work"
_PRODUCTS = (DOCUMENTS, SIGNATURES, "rejected", REPORT)
SAMPLE = "sample.txt"
_SOURCES_SHOWN = 12
_SAMPLE_LINES = 40  # number of lines of a change that are printed; the file has all


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

    input: list[PathText] = MISSING
    """Files, folders of them, or URLs; `a-{000..099}.tar` stands for 100 files."""
    output: PathText = MISSING
    """Folder for the result."""
    overwrite: bool = False
    """Replace a result in `output` that was curated from other input or with other options."""
    output_format: OutputFormat = OutputFormat.jsonl
    """Format of the curated text: jsonl, or parquet (zstd), which a later curation cannot name in dedup.against."""
    unit_bytes: int = 64 << 20
    """Bytes of input per task; an interruption loses at most this much work per task."""
    max_bad_frac: float = 0.001
    """Fraction of bad records (0 to 1) above which the curation gives up. A file that cannot be read, or only in part,
    counts by an estimate of the documents that are lost."""
    read: ReadConfig = field(default_factory=ReadConfig)
    """Fields of records, and bounds on reading."""
    curation: CurationConfig = field(default_factory=CurationConfig)
    """Stages and their rules."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """Where the tasks run."""
    sample: int | None = None
    """Curate nothing, but run the stages over this number of documents, spread over the input, and show in
    `output`/sample.txt what each stage changed or dropped; null: curate."""
    corpus: PathText | None = None
    """Folder of a corpus to prepare from the curated text; null: none."""
    prepare: CorpusConfig = field(default_factory=CorpusConfig)
    """Options of that preparation."""

    def __post_init__(self) -> None:
        if self.unit_bytes < 1:
            raise ConfigError(f"unit_bytes={self.unit_bytes} must be 1 or more")
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"sample={self.sample} must be 1 or more")
        if not 0 <= self.max_bad_frac <= 1:
            raise ConfigError(f"max_bad_frac={self.max_bad_frac} is outside 0 to 1")


def curate(config: CurateConfig) -> int:
    """Curate the text, then prepare a corpus where one is wanted. Returns the exit code."""
    own = [pinned(stage) for stage in config.curation.own_stages]
    config = replace(config, curation=replace(config.curation, own_stages=own))
    if config.sample is not None:
        return _try(config, config.sample)
    code = _curate(config)
    if code or config.corpus is None:
        return code
    print()
    documents = str(Path(config.output) / DOCUMENTS)
    from data_tools.prepare import prepare

    return prepare(replace(config.prepare, input=[documents], output=config.corpus))


def _try(config: CurateConfig, n: int) -> int:
    """Show what the stages do to a few documents."""
    path = _output(config) / SAMPLE
    trials = []
    for trial in try_stages(config.input, config.read, config.curation, n):
        trials.append(trial)
        if trial.steps:
            print(shown(trial, _SAMPLE_LINES), flush=True)
    if not trials:
        raise ConfigError(f"input={','.join(config.input)} holds no record")
    parts = [summary(trials) + "\n", *(shown(trial) for trial in trials if trial.steps)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path, durable=False) as file:
        file.write("\n".join(parts).encode())
    print(parts[0])
    print(f"all of it: {path}; nothing was curated")
    return 0


def _output(config: CurateConfig) -> Path:
    output = Path(config.output).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={config.output} is a file; give a folder")
    return output


def _curate(config: CurateConfig) -> int:
    output = _output(config)
    left_out: list[LeftOut] = []
    units = units_of(config.input, config.unit_bytes, config.read, left_out.extend)
    print_left_out(left_out)
    earlier = earlier_parts(config.curation.dedup, output)
    recipe = _recipe(config, units)
    if _is_finished(output, recipe, config.overwrite):
        print(f"already curated: {output / REPORT} was made from this input with these options")
        return 0
    try:
        with _work(output, recipe, config.output_format) as layout:
            collection = Collection(config.curation.dedup, layout.work, len(units), earlier)
            report = _run(config, units, left_out, collection, layout)
            write_json(layout.work / REPORT, report | {"recipe": recipe})
            _publish(layout.work, output)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from here", file=sys.stderr)
        return 130
    except RunError as error:
        print_error("error", error)
        return 1
    except OSError as error:
        print_error("error", write_problem(config.output, error))
        return 1
    print(funnel_table(read_curation_report(output / REPORT)))
    return 0


def _run(
    config: CurateConfig, units: list[Unit], left_out: list[LeftOut], collection: Collection, layout: Layout
) -> dict[str, Any]:
    """Run all phases. Returns the report."""
    n_units, curation, executor = len(units), config.curation, config.executor
    if any("decontaminate" in one.stages for one in curation.configs()) and not layout.index.exists():
        build_index(curation.decontaminate, layout.index)
    clean = CleanTask(units, config.read, curation, layout, collection.earlier)
    total_bytes = sum(part.size_bytes for part in (*units, *collection.earlier))
    run_phase("cleaning", clean, collection.n_ranks, layout.work / "phases" / "clean", executor, total_bytes)
    cleaned = _summed(layout, "clean", n_units)
    _check_sources(curation, cleaned)
    unread = _check_bad(config, cleaned, left_out, sum(unit.size_bytes for unit in units), layout)
    settle(collection, layout)
    compare, n_bytes = compare_task(collection, layout)
    run_phase("comparing", compare, len(compare.jobs), layout.work / "phases" / "compare", executor, n_bytes)
    clusters = decide(compare)
    kept_bytes = sum(layout.kept(rank).stat().st_size for rank in range(n_units))
    last = FilterTask(curation, layout, collection)
    run_phase("filtering", last, n_units, layout.work / "phases" / "filter", executor, kept_bytes)
    filtered = _summed(layout, "filter", n_units)
    if not filtered.kept:
        dropped = ", ".join(
            f"{n} {reason}" for reason, n in sorted((cleaned.dropped + filtered.dropped).items())
        )
        raise ConfigError(f"input={','.join(config.input)} leaves no document; dropped: {dropped or 'none'}")
    cleaned.add(filtered)
    digest = _digest(layout, "filter", n_units)
    if layout.format is OutputFormat.jsonl:
        _write_index(config, layout, n_units, digest["sha256"])
    else:
        (layout.work / SIGNATURES).mkdir(
            exist_ok=True
        )  # published empty, in the place of those of an earlier output
    return {
        "created_by": f"pretrain {__version__}",
        "tally": cleaned.to_json(),
        "clusters": clusters,
        "stages": stage_names(curation),
        "units": n_units,
        "unread": asdict(unread),
        "texts_read": _digest(layout, "clean", n_units),
        "output": digest,
    }


def _write_index(config: CurateConfig, layout: Layout, n_units: int, output_sha256: str) -> None:
    """Describe the signatures of the output, so that later curations can be compared with it."""
    parts = []
    for rank in range(n_units):
        path, kept = layout.documents(rank), Tally.of_file(layout.tally("filter", rank)).kept
        parts.append(PartFacts(name=path.name, bytes=path.stat().st_size, documents=sum(kept.values())))
    index = index_of(config.curation.dedup, parts, output_sha256, f"pretrain {__version__}")
    write_json(layout.work / SIGNATURES / INDEX, index)


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


def _check_bad(
    config: CurateConfig, tally: Tally, left_out: list[LeftOut], total_bytes: int, layout: Layout
) -> Unread:
    """The files that were not read, or only in part. Raises ConfigError where too much is lost."""
    n_read, n_bad = sum(tally.read.values()), tally.dropped["read/bad_record"]
    files = [(file, *_lost(file)) for file in _bad_records(layout) if "read.lost" in file["signals"]]
    lost_bytes = sum(n_bytes for _, _, n_bytes in files)
    unread = Unread()
    for file, lost, n_bytes in files:
        documents = estimated_documents(lost, n_bytes, total_bytes - lost_bytes, n_read)
        unread.add(file["id"], file["text"], documents)
    n_bad += unread.documents - len(files)
    for one in left_out:
        lost, n_bytes = (1, one.size_bytes) if one.holds_documents else (0, 0)
        documents = estimated_documents(lost, n_bytes, total_bytes - lost_bytes, n_read)
        unread.add(one.name, one.reason, documents)
        n_bad += documents
    first = next((f"{bad['id']} {bad['text']}" for bad in _bad_records(layout)), None)
    first = first or next((f"{one.name} {one.reason}" for one in left_out if one.holds_documents), "none")
    if n_read + n_bad == 0:
        raise ConfigError(f"input={','.join(config.input)} holds no record")
    if n_bad > config.max_bad_frac * (n_read + n_bad):
        raise ConfigError(
            f"{n_bad} of {n_read + n_bad} records cannot be read, more than max_bad_frac={config.max_bad_frac} allows; "
            f"the first: {first}; {layout.rejected}/read/*.jsonl.gz names each with the reason, and "
            "read.ignore=['NAME'] leaves a file out"
        )
    return unread


def _bad_records(layout: Layout) -> Iterator[dict[str, Any]]:
    """What the first phase could not read, in order."""
    for path in sorted((layout.rejected / "read").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _lost(file: dict[str, Any]) -> tuple[int, int]:
    """The number of documents that are lost with a file, as far as it is known, and of bytes where it is not."""
    return file["signals"]["read.lost"], file["signals"]["read.lost_bytes"]


def _check_sources(curation: CurationConfig, tally: Tally) -> None:
    """Raise ConfigError where options are given for a source that the input does not have."""
    for source in (curation.per_source or {}).keys() - tally.read.keys():
        known = ", ".join(visible(name) for name in sorted(tally.read)[:_SOURCES_SHOWN])
        raise ConfigError(
            f"curation.per_source names {source!r}, which is no source of the input; it has {known}"
        )


# ---- the output folder -----------------------------------------------------------------------------------------------


def _recipe(config: CurateConfig, units: list[Unit]) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    options = to_dict(config)
    for name in ("input", "output", "overwrite", "executor", "max_bad_frac", "sample", "corpus", "prepare"):
        del options[name]
    del options["read"]["ignore"]  # the files that are left say it
    if options["read"]["encoding"] == UTF_8:  # once the only one
        del options["read"]["encoding"]
    if config.output_format is OutputFormat.jsonl:  # likewise
        del options["output_format"]
    # Everything that decides the content of the input, but not its location.
    facts = [(u.name, u.source, u.kind, u.start, u.stop, u.version) for u in units]
    listing = json.dumps(facts, ensure_ascii=False)
    return {
        "version": CURATION_VERSION,
        "options": options,
        "files": _hashes_of_files(config.curation),
        "input": {"units": len(units), "sha256": hashlib.sha256(listing.encode()).hexdigest()},
        # Versions of these packages decide the text.
        "packages": {name: _version(name) for name in ("courlan", "ftfy", "py3langid", "trafilatura")},
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
    for one in curation.configs():
        for name in one.stages:
            paths = list(strings(to_dict(getattr(one, name))))
            if name == DECONTAMINATE:
                for entry in one.decontaminate.files:  # a folder or a task stands for other files
                    paths += [file.path for file in evaluation_files(entry, one.decontaminate.fields)]
            for path in paths:
                if path not in hashes and ("://" in path or (path and Path(path).expanduser().is_file())):
                    with open_file(f"curation.{name}", path) as file:
                        hashes[path] = _sha256(file)
    for path in curation.dedup.against:
        folder = Path(path).expanduser().resolve()
        hashes[path] = read_index(folder, f"curation.dedup.against={path}").output_sha256
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
        if output.is_dir() and any(path.name not in (WORK, SAMPLE, *_PRODUCTS) for path in output.iterdir()):
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
def _work(output: Path, recipe: dict[str, Any], output_format: OutputFormat) -> Iterator[Layout]:
    """The locked work folder of a recipe. Work folders of other recipes are removed."""
    work = output / WORK
    with locked(work, f"another process is curating into output={output}"):
        for other in work.iterdir():
            if other.is_dir() and other.name != _key(recipe):
                shutil.rmtree(other)
        folder = work / _key(recipe)
        folder.mkdir(exist_ok=True)
        yield Layout(folder, output_format)


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
