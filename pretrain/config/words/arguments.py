"""Takes the words of a command line apart: choices of files in conf/, and the values of keys."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config.texts import Mark, expanded_path
from pretrain.config.words.kinds import find_kind
from pretrain.config.words.names import OF_OTHERS, known_key, plain_name, unknown_key
from pretrain.config.words.values import read_value, unquoted
from pretrain.errors import ConfigError

GROUPS_ELSEWHERE = {
    "cluster": "launch/submit.py and launch/plan.py",
    "bench": "launch/bench.py",
    "dry_run": "launch/submit.py",
}
"""Groups and keys that people give to another command than the one that has them."""


class Arguments(NamedTuple):
    """What a command line says."""

    choices: dict[str, str]
    """The chosen file of each group of conf/, as `model: 1b`."""
    values: list[tuple[str, Any]]
    """The values of keys in the order in which they were given; a later one replaces an earlier one."""
    verbatim: dict[str, list[str]]
    """The texts of verbatim keys, which nothing may interpret."""


def parse_arguments(schema: type, words: list[str], conf: Path | None = None) -> Arguments:
    """The words of a command line as choices and values of `schema`. Raises ConfigError for a word that is neither.

    `conf` is the folder with the files of groups; None where the command has no groups.
    """
    found = Arguments({}, [], {})
    for at, word in enumerate(words):
        key, text = _key_and_text(schema, word, words[at + 1 : at + 2], conf)
        group = conf / key if conf is not None else None
        if group is not None and _is_group(schema, key, group) and not text.lstrip().startswith("{"):
            found.choices[key] = _choice(key, unquoted(text), group)
            continue
        kind = find_kind(schema, key)
        if kind is None:
            raise ConfigError(_unknown(schema, key))
        if kind.mark is Mark.verbatim:
            texts = found.verbatim.setdefault(key, [])
            texts[:] = [*texts, text] if kind.is_list else [text]
            continue
        if kind.mark is not None and not kind.is_list and not text:
            raise ConfigError(f"{key}= is empty; give a path")
        found.values.append((key, read_value(key, text, kind)))
    return found


def _key_and_text(schema: type, word: str, following: list[str], conf: Path | None) -> tuple[str, str]:
    """The key and the text of `KEY=TEXT`. Raises ConfigError, which says what was probably meant."""
    if word.startswith("-"):
        raise ConfigError(_option(schema, word, following, conf))
    if word.startswith("~"):
        raise ConfigError(f"{word}: a key cannot be taken away; give it another value, or KEY=null")
    key, equals, text = word.partition("=")
    key = key.lstrip("+")
    if not key:
        raise ConfigError(f"{word!r} is not KEY=VALUE; write it without blanks around the equals sign")
    if key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(
            f"{word}: Hydra's own settings have no effect here; --help lists the keys of this command, and run_dir=DIR "
            "or output=DIR names the folder that it writes"
        )
    if not equals:
        raise ConfigError(_without_value(schema, word, following, conf))
    return key, text


def _option(schema: type, word: str, following: list[str], conf: Path | None) -> str:
    """The sentence for an option in the spelling of other programs, such as `--learning-rate 1e-3`."""
    name, equals, text = word.partition("=")
    key = _meant(schema, name.lstrip("-"), conf)
    if key is None:
        return f"{word} is no option here; options are KEY=VALUE, and --help lists the keys"
    if not equals and following and "=" not in following[0] and not following[0].startswith("--"):
        text = following[0]
    kind = find_kind(schema, key)
    default = "true" if kind and kind.type is bool else "VALUE"
    return f"options are KEY=VALUE; did you mean {key}={text or default}?"


def _without_value(schema: type, word: str, following: list[str], conf: Path | None) -> str:
    key = _meant(schema, word, conf)
    if key is None:
        return f"{word} is not KEY=VALUE; --help lists the keys, and a path needs its key before it"
    if following[:1] == ["="]:
        return f"{key} has blanks around its equals sign; write {key}=VALUE without them"
    return f"{word} has no value; write {key}=VALUE"


def _meant(schema: type, name: str, conf: Path | None) -> str | None:
    """The key that a name stands for: itself, the name of another program for it, or one that is spelled alike."""
    key = name.replace("-", "_")
    if find_kind(schema, key) is not None or (conf is not None and _is_group(schema, key, conf / key)):
        return key
    found = known_key(schema, key)
    if found is not None:
        return found
    close = difflib.get_close_matches(plain_name(key), [n for n in OF_OTHERS if known_key(schema, n)], n=1)
    return known_key(schema, close[0]) if close else None


def _is_group(schema: type, key: str, folder: Path) -> bool:
    """Whether a key names a group of files in conf/ that this command has."""
    if "/" in key or "." in key or not folder.is_dir():
        return False
    return key in ("experiment", "recompute") or find_kind(schema, key) is not None


def _choice(key: str, name: str, folder: Path) -> str:
    """The name of a file of a group, or the path of one elsewhere. Raises ConfigError where there is none."""
    known = presets(folder)
    if name in known:
        return name
    if is_own_file(name):
        return expanded_path(key, name)
    raise ConfigError(
        f"{key}={name} does not name a file of conf/{folder.name}; known are {', '.join(known)}, or give PATH.yaml"
    )


def is_own_file(name: str) -> bool:
    """Whether the choice of a group is the path of a file outside conf/."""
    return name.endswith((".yaml", ".yml"))


def presets(folder: Path) -> list[str]:
    """The names of a group's files, with the folder of each that lies in one: by folder, and by model size."""

    def order(name: str) -> tuple[str, float, str]:
        parent, _, own = name.rpartition("/")
        size = re.match(r"([\d.]+)([mb])(?![a-z])", own)
        return (parent, float(size[1]) * {"m": 1e6, "b": 1e9}[size[2]] if size else 0, own)

    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    return sorted((name.removesuffix(".yaml") for name in found), key=order)


def _unknown(schema: type, key: str) -> str:
    for name, owner in GROUPS_ELSEWHERE.items():
        if key.split(".")[0] == name and find_kind(schema, name) is None:
            return f"{key} is a key of {owner}, not of this command"
    return unknown_key(schema, key)


def path_in(word: str) -> str:
    """The path in a word `KEY=PATH`, read as `load_config` reads it. Raises ConfigError where it is not known yet."""
    key, _, text = word.partition("=")
    path = unquoted(text)
    if not path or "${" in path:
        raise ConfigError(f"{word}: {key} must be the path of a folder, without ${{...}}")
    return expanded_path(key, path)
