"""A user's own stages: classes in their Python files, which run only if the command line allows it.

    class NoRecipes:                                # my_stages.py
        name = "no_recipes"

        def process(self, record):                  # a data_tools.record.Record, which may be changed
            return "recipe" if "tablespoon" in record.text else None

The file's hash is fixed before the first document. A process that finds other bytes later does not run them.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import ModuleType

from data_tools.record import CurationStage, Record
from pretrain.errors import ConfigError
from pretrain.files import read_capped

_MAX_CODE_BYTES = 1 << 20
_SEPARATOR = "#sha256="
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def pinned(stage: str) -> str:
    """`PATH.py:CLASS` with the absolute path and the hash of the file, for `load_stage`. Raises ConfigError."""
    path, class_name = _parts(stage)
    return f"{path}:{class_name}{_SEPARATOR}{hashlib.sha256(_read(path)).hexdigest()}"


def load_stage(stage: str) -> CurationStage:
    """Run the file of a pinned stage, and build an object of its class. Raises ConfigError."""
    stage, _, sha256 = stage.partition(_SEPARATOR)
    path, class_name = _parts(stage)
    code = _read(path)
    if hashlib.sha256(code).hexdigest() != sha256:
        raise ConfigError(
            f"{path} changed while the curation was running; start it again, with overwrite=true"
        )
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)  # noqa: S102  the command line has allowed it
        built = getattr(module, class_name)()
        if not callable(built.process) or not _NAME.fullmatch(built.name):
            raise ConfigError(f"{stage}: name={built.name!r} must be lower-case letters, digits and _")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{stage} cannot be used as a stage: {type(error).__name__}: {error}") from error
    return _OwnStage(stage, built)


class _OwnStage:
    """A user's stage, whose errors name it and the document."""

    def __init__(self, stage: str, built: CurationStage) -> None:
        self.name, self._stage, self._built = built.name, stage, built

    def process(self, record: Record) -> str | None:
        try:
            reason = self._built.process(record)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{self._stage} failed on document {record.id!r}: {what}") from error
        if reason is not None and (not isinstance(reason, str) or not _NAME.fullmatch(reason)):
            raise ConfigError(
                f"{self._stage} returned {reason!r} for document {record.id!r}; return None to keep a document, or the "
                "reason for dropping it in lower-case letters, digits and _"
            )
        return reason


def _parts(stage: str) -> tuple[Path, str]:
    path, separator, class_name = stage.rpartition(":")
    if not separator or not class_name.isidentifier() or not path.endswith(".py"):
        raise ConfigError(f"curation.own_stages={stage} must be PATH.py:CLASS")
    return Path(path).expanduser().absolute(), class_name


def _read(path: Path) -> bytes:
    try:
        return read_capped(path, _MAX_CODE_BYTES)
    except OSError as error:
        raise ConfigError(f"curation.own_stages: {path} cannot be read: {error.strerror}") from error
