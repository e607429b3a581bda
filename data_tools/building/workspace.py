"""The output folder of a preparation: its recipe, resuming, refusing, and publishing.

During a preparation, all files are in OUTPUT/.work/<key>, where the key is a hash of the options and the input files.
The finished corpus is moved into OUTPUT, manifest.json last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.config import DocumentFormat, PrepareConfig
from data_tools.names import (
    CARD_NAME,
    CORPUS_FOLDER,
    CROISSANT_NAME,
    HELDOUT_FOLDER,
    PLOTS_FOLDER,
    RECORD_BYTES,
    REPORT_NAME,
    STATISTICS_NAME,
    WORK_FOLDER,
)
from data_tools.reading.listing import expand_ranges
from data_tools.reading.sources import PYTHON, InputFile
from data_tools.report.schemas import read_recipe
from pretrain.config import to_dict
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.corpus.manifest import MANIFEST_NAME, Manifest, load_manifest
from pretrain.corpus.shards import SHARDS_FOLDER
from pretrain.corpus.tokenizer import TOKENIZER_NAMES, Tokenizer, tokenizer_in
from pretrain.errors import ConfigError
from pretrain.files import hold_lock, refuse_links, sync_folder, write_atomically

PRODUCTS = (
    REPORT_NAME,
    CARD_NAME,
    PLOTS_FOLDER,
    STATISTICS_NAME,
    CROISSANT_NAME,
    *TOKENIZER_NAMES,
    CHAT_TEMPLATE_NAME,
    HELDOUT_FOLDER,
    SHARDS_FOLDER,
    MANIFEST_NAME,
)  # published in this order, so the manifest must stay last

# Raise this with every change of the program that gives different bytes for the same input.
PIPELINE_VERSION = 3

# Raise this with every change of the files of an interrupted preparation: those of an older program are removed.
WORK_VERSION = 3

# Options that do not change the corpus. The input is represented by its files.
_NOT_IN_KEY = ("input", "output", "overwrite", "workers", "max_bad_records", "card", "ignore")

_CANNOT_WRITE = {
    errno.ENOSPC: "no space is left on its disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than allowed there",
    errno.EROFS: "it is read-only",
    errno.EACCES: "permission is denied",
}


def write_problem(output: str, error: OSError) -> str:
    """The sentence on an error while an output folder is written. Raises the error again if it has another cause."""
    if error.errno not in _CANNOT_WRITE:
        raise error
    return (
        f"output={output} cannot be written: {_CANNOT_WRITE[error.errno]}; once that is fixed, run the same command "
        "again to continue from here"
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of a corpus."""

    options: dict[str, Any]
    """Options by their full names, such as `tokenizer.vocab_size`."""
    input: dict[str, Any]
    """Number of input files, their total size, and a hash of their names, sizes and times."""

    @property
    def key(self) -> str:
        content = {
            "pipeline": PIPELINE_VERSION,
            "work": WORK_VERSION,
            "options": self.options,
            "input": self.input,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Recipe) -> list[str]:
        """The differences between this recipe and `other`, in words."""
        found = [
            f"{name} was {self.options.get(name)} and is {other.options.get(name)}"
            for name in sorted({*self.options, *other.options})
            if self.options.get(name) != other.options.get(name)
        ]
        if self.input != other.input:
            before, after = (f"{r.input['files']} files, {r.input['bytes']} bytes" for r in (self, other))
            found.append(f"the input files changed ({before}; now {after})")
        return found or ["the program gives other bytes than before"]


def make_recipe(
    config: PrepareConfig,
    files: list[InputFile],
    tokenizer_sha256: str | None,
    chat_template: str | None = None,
) -> Recipe:
    """The recipe of a configuration and its input files."""
    options: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if name in _NOT_IN_KEY:
            continue
        if isinstance(value, dict):
            options.update({f"{name}.{inner}": inner_value for inner, inner_value in value.items()})
        else:
            options[name] = value
    # The content of the tokenizer counts, not its path or where its special tokens were stated.
    options["tokenizer.path"] = tokenizer_sha256
    for role in ("bos_token", "eos_token", "mask_token"):
        del options[f"tokenizer.{role}"]
    if chat_template is None:
        options = {name: value for name, value in options.items() if not name.startswith("chat.")}
    else:
        options["chat.template"] = hashlib.sha256(chat_template.encode()).hexdigest()
    if config.format is not DocumentFormat.labeled:
        options = {name: value for name, value in options.items() if not name.startswith("label")}
    # Defaults that were once the only choice are left out, so that older recipes stay the same.
    if config.format is DocumentFormat.text:
        del options["format"]
    if config.max_record_bytes == RECORD_BYTES:
        del options["max_record_bytes"]
    if config.packed_tokens is None:
        options.pop("chat.pack", None)
    if config.encoding == "utf-8":
        del options["encoding"]
    listing = [(file.name, file.source, file.license, file.size_bytes, file.version) for file in files]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    total = sum(file.size_bytes for file in files)
    return Recipe(options, {"files": len(files), "bytes": total, "sha256": digest})


def check_places(config: PrepareConfig) -> None:
    """Refuse an output inside an input, or an input inside the output. Raises ConfigError."""
    output = Path(config.output).expanduser().resolve()
    for entry in (entry for entry in expand_ranges(config.input) if entry != PYTHON):
        source = Path(entry).expanduser().resolve()
        if output == source or source in output.parents or (output in source.parents and source.exists()):
            raise ConfigError(
                f"output={config.output} and input={entry}: one lies inside the other; choose another output"
            )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={config.output} is a file; give a folder")


def is_finished(output: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Whether `output` already holds the corpus of this recipe.

    Raises ConfigError where it holds another corpus and `overwrite` is not set. Raises it also where it holds
    anything else, which is never overwritten.
    """
    finished = _recipe_in(output / REPORT_NAME, finished=True)
    work = output / WORK_FOLDER
    reports = [path for path in sorted(work.glob(f"*/{REPORT_NAME}")) if _has_results(path.parent)]
    begun = [found for path in reports if (found := _recipe_in(path, finished=False))]
    if finished is None and not begun:
        if output.is_dir() and any(path.name != WORK_FOLDER for path in output.iterdir()):
            raise ConfigError(f"output={output} is not empty and holds no corpus; choose another output")
        return False
    if overwrite:
        return False
    if finished is not None and (output / MANIFEST_NAME).exists():
        _refuse_another(finished, recipe, f"output={output} holds a corpus")
        _check_complete(output)
        return True
    for found in begun:
        _refuse_another(found, recipe, f"output={output} holds an interrupted preparation")
    return False


def _has_results(folder: Path) -> bool:
    """Whether a work folder holds results that are worth keeping."""
    return any(folder.glob("*.npz")) or (folder / CORPUS_FOLDER).exists()


def _recipe_in(path: Path, *, finished: bool) -> Recipe | None:
    """The recipe in a prepare.json; None where the file does not exist or holds no recipe."""
    try:
        found = read_recipe(path, finished=finished)
    except ConfigError:
        return None
    return Recipe(found.options, asdict(found.input))


def _refuse_another(before: Recipe, recipe: Recipe, what: str) -> None:
    if before.key != recipe.key:
        differences = "; ".join(before.differences(recipe))
        raise ConfigError(f"{what} of another recipe: {differences}; choose another output or overwrite=true")


def _check_complete(output: Path) -> None:
    for folder in (output, output / HELDOUT_FOLDER):
        if folder is output or folder.exists():
            for shard in load_manifest(folder / MANIFEST_NAME).shards:
                path = folder / SHARDS_FOLDER / shard.name
                if not path.exists() or path.stat().st_size != shard.bytes:
                    raise ConfigError(
                        f"output={output} was prepared, but {path} is missing or cut off; set overwrite=true "
                        "to prepare it again"
                    )


@contextmanager
def locked(work: Path, busy: str) -> Iterator[None]:
    """Lock a work folder for this process, and create it where it is missing. `busy` is the error of other processes.

    Raises ConfigError, also for a link that leads out of the folder: its target would be written to and removed.
    """
    if work.is_symlink():
        raise ConfigError(f"{work} is a link; remove it")
    refuse_links(work, work.parent, "remove it")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = hold_lock(work / "lock", busy, "wait for it")
    except OSError as error:
        raise ConfigError(f"{work / 'lock'} cannot be used ({error.strerror or error})") from error
    with lock:
        yield


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer in a folder. Raises ConfigError where it is not the tokenizer of the corpus."""
    tokenizer = Tokenizer(tokenizer_in(folder), manifest.tokenizer_sha256)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} entries, the manifest of its corpus says "
            f"{manifest.vocab_size}; prepare the corpus again"
        )
    return tokenizer


@contextmanager
def open_work(output: Path, recipe: Recipe) -> Iterator[Path]:
    """The locked work folder of a recipe. Work folders of other recipes are removed.

    Raises ConfigError where another process prepares into the same output.
    """
    work = output / WORK_FOLDER
    with locked(work, f"another process is preparing output={output}"):
        for other in work.iterdir():
            if other.is_dir() and other.name != recipe.key:
                shutil.rmtree(other)
        folder = work / recipe.key
        folder.mkdir(exist_ok=True)
        content = {"recipe": {"options": recipe.options, "input": recipe.input}}
        write_atomically(folder / REPORT_NAME, json.dumps(content).encode())
        try:
            yield folder
        except ConfigError:
            # The recipe failed, so another one may take its place. Results are kept, because the same recipe may be
            # tried again with more bad records allowed.
            (folder / REPORT_NAME).unlink()
            if not _has_results(folder):
                remove_work(output)
                with suppress(OSError):
                    output.rmdir()
            raise


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write prepare.json."""
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / REPORT_NAME, content.encode())


def publish(corpus: Path, output: Path) -> None:
    """Move a finished corpus into place and remove the work folder. May be repeated after an interruption."""
    if (corpus / REPORT_NAME).exists():  # it moves first, so nothing of this corpus is in place yet
        for name in reversed(PRODUCTS):
            _remove(output / name)
    for name in PRODUCTS:
        if (corpus / name).exists():
            os.replace(corpus / name, output / name)
    sync_folder(output)
    remove_work(output)


def remove_work(output: Path) -> None:
    """Remove the work folder of a finished preparation."""
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
