"""The text of `--help`: the keys with their defaults and meanings, which are the docstrings in the schema's source."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.config.words.arguments import presets
from pretrain.config.words.kinds import find_kind, kind_of, kinds_of
from pretrain.config.words.names import unknown_key
from pretrain.errors import ConfigError

MOST_USED = (
    "run_dir",
    "data.manifest",
    "model",
    "experiment",
    "total_tokens",
    "global_batch_sequences",
    "micro_batch_sequences",
    "data.sequence_length",
    "optim.lr",
    "schedule.warmup_steps",
    "engine",
)
"""The keys of training that matter first, in the order in which people decide them."""
_WIDTH = 118


class Help:
    """The help of one command.

    `defaults` is its configuration where nothing is given, and `conf` the folder with the files of its groups.
    """

    def __init__(self, schema: type, defaults: dict[str, Any], conf: Path | None) -> None:
        self._schema = schema
        self._defaults = defaults
        self._conf = conf

    def all_keys(self) -> str:
        """Every key with its default and the first sentence of its meaning; in training, the most used ones first."""
        parts = []
        if self._conf is not None:
            parts += ["The keys that matter first:", "\n".join(self._most_used())]
        parts += [
            "All keys with their defaults (??? must be given); --help NAME says more about a key or a group:"
        ]
        parts += ["\n".join(self._lines(self._schema, "", first_sentence=True))]
        if self._conf is not None:
            groups = [name for name in kinds_of(self._schema) if self._presets(name)] + [
                "recompute",
                "experiment",
            ]
            listed = [f"  {name}={' | '.join(self._presets(name))}" for name in groups]
            parts += [
                "Files in conf/ that set a whole group of keys; --help GROUP=NAME shows one:",
                "\n".join(listed),
            ]
        return "\n\n".join(parts)

    def one_name(self, name: str) -> str:
        """What is known of a key, a group, or a file `GROUP=NAME`. Raises ConfigError for any other name."""
        key, _, preset = name.partition("=")
        if self._conf is not None and preset in self._presets(key):
            text = (self._conf / key / f"{preset}.yaml").read_text(encoding="utf-8")
            return f"conf/{key}/{preset}.yaml\n\n{text.strip()}"
        kind, files = find_kind(self._schema, key), self._presets(key)
        parts = []
        if kind is None and not files:
            raise ConfigError(unknown_key(self._schema, key))
        if kind is not None and kind.is_group:
            parts += [
                f"{key}: {inspect.getdoc(kind.type) or ''}",
                "\n".join(self._lines(kind.type, f"{key}.")),
            ]
        elif kind is not None:
            parts += ["\n".join(self._lines_of_key(key)) or f"  {key}: {kind.expected()}"]
        if files:
            parts += [f"  {key}={' | '.join(files)}"]
        return "\n\n".join(parts)

    def _most_used(self) -> list[str]:
        lines: list[str] = []
        for name in MOST_USED:
            if self._presets(name):
                lines.append(f"  {name}={' | '.join(self._presets(name))}")
            elif find_kind(self._schema, name) is not None:
                lines += self._lines_of_key(name)
        return lines

    def _presets(self, name: str) -> list[str]:
        if self._conf is None or "." in name or "/" in name or not (self._conf / name).is_dir():
            return []
        return presets(self._conf / name)

    def _lines_of_key(self, key: str) -> list[str]:
        group, _, name = key.rpartition(".")
        owner = find_kind(self._schema, group) if group else kind_of(self._schema)
        if owner is None or not owner.is_group:
            return []
        return self._lines_of(owner.type, f"{group}." if group else "", name, first_sentence=False)

    def _lines(self, schema: type, prefix: str, *, first_sentence: bool = False) -> list[str]:
        """The keys of a group and of the groups in it, each with its meaning."""
        lines: list[str] = []
        for name, kind in kinds_of(schema).items():
            if kind.is_group:
                lines += self._lines(kind.type, f"{prefix}{name}.", first_sentence=first_sentence)
            else:
                lines += self._lines_of(schema, prefix, name, first_sentence=first_sentence)
        return lines

    def _lines_of(self, schema: type, prefix: str, name: str, *, first_sentence: bool) -> list[str]:
        """One key: its default, and its meaning with its unit and what is allowed."""
        meaning, kind = meanings_of(schema).get(name, ""), kinds_of(schema)[name]
        if first_sentence and ". " in meaning:
            meaning = meaning[: meaning.find(". ") + 1]
        if isinstance(kind.type, type) and issubclass(kind.type, Enum):
            meaning += f" Allowed: {', '.join(kind.type.__members__)}."
        text = textwrap.wrap(meaning.strip(), _WIDTH, initial_indent="      ", subsequent_indent="      ")
        return [f"  {prefix}{name}={self._default(f'{prefix}{name}')}", *text]

    def _default(self, key: str) -> str:
        """The default of a key, as one would type it."""
        value: Any = self._defaults
        for part in key.split("."):
            value = value.get(part, "???") if isinstance(value, dict) else "???"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@cache
def meanings_of(schema: type) -> dict[str, str]:
    """The docstring of each key of a dataclass, which stands below it in the source, with its units."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        module = sys.modules[base.__module__]
        tree = _tree(module.__file__) if "__dataclass_fields__" in vars(base) and module.__file__ else None
        for node in tree.body if tree else ():
            if isinstance(node, ast.ClassDef) and node.name == base.__name__:
                found |= _meanings_in(node)
    return found


@cache
def _tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _meanings_in(node: ast.ClassDef) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, below in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[key.target.id] = " ".join(str(below.value.value).split())
    return found
