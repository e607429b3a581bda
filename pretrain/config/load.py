"""Turns a command line, or the configuration that a run has saved, into a validated configuration object."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from pretrain.config.run import TrainConfig
from pretrain.config.texts import Mark, expanded_path, manifest_in
from pretrain.config.words.arguments import Arguments, is_own_file, parse_arguments
from pretrain.config.words.build import build
from pretrain.config.words.kinds import Kind, kinds_of
from pretrain.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
# In an installed package conf/ lies inside the package; in a source checkout it lies beside it.
CONF_DIR = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
PACKAGES = {"experiment": "_global_", "recompute": "model"}
"""Where the keys of a group's files belong, for groups that are not named like it."""

T = TypeVar("T")


def load_config(schema: type[T], words: list[str], config_name: str | None = None) -> T:
    """The configuration that the words of a command line state, validated as `schema`.

    Hydra composes `conf/<config_name>.yaml` with the chosen files of groups; without `config_name` the schema's own
    defaults are the base. Raises ConfigError.
    """
    given = parse_arguments(schema, words, CONF_DIR if config_name else None)
    composed = compose_config(schema, given, config_name)
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_unresolved(composed, error)) from error
    config = validate(schema, values)
    _resolve_paths(config)
    for key, texts in given.verbatim.items():
        setattr(config, key, texts if kinds_of(schema)[key].is_list else texts[0])
    return config


def compose_config(schema: type, given: Arguments, config_name: str | None) -> DictConfig:
    """The configuration before validation: the schema's defaults, files of conf/, and the values that are given."""
    composed: Any = OmegaConf.create(_defaults_of(schema))
    if config_name is not None:
        composed = OmegaConf.merge(composed, _composed_files(config_name, tuple(given.choices.items())))
    for key, value in given.values:
        try:
            OmegaConf.update(composed, key, value)
        except OmegaConfBaseException as error:  # an interpolation that cannot be parsed
            raise ConfigError(_not_an_interpolation(key, value)) from error
    return composed  # type: ignore[no-any-return]


@cache
def _defaults_of(schema: Any) -> dict[str, Any]:
    """The schema's defaults as plain values; those of a group that files of conf/ fill are there too."""
    defaults = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    assert isinstance(defaults, dict)
    for name, kind in kinds_of(schema).items():
        if kind.is_group and not isinstance(defaults[name], dict):
            defaults[name] = _defaults_of(kind.type)
    return defaults  # type: ignore[return-value]


@cache
def _composed_files(config_name: str, choices: tuple[tuple[str, str], ...]) -> DictConfig:
    """What Hydra composes of the files in conf/, and of files elsewhere that are chosen by their path."""
    # Hydra takes 0.1 s to import, and many commands do not need it.
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    overrides = []
    for group, name in choices:
        if is_own_file(name):
            content = _own_file(group, name)
            ConfigStore.instance().store("own_file", content, group, PACKAGES.get(group, group))
        overrides.append(f"{group}={'own_file' if is_own_file(name) else name}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            files = compose(config_name=config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        named = ", ".join(f"{group}={name}" for group, name in choices)
        missing = re.search(r"Could not find '([^']+)'|Could not override '([^']+)'", str(error))
        what = f"{missing[1] or missing[2]} is not there" if missing else "a value or a name in them is wrong"
        raise ConfigError(
            f"the files of {named or 'conf/'} do not fit together: {what}; compare conf/experiment/1b_one_node.yaml"
        ) from error
    OmegaConf.set_struct(files, False)
    return files


def _own_file(group: str, path: str) -> dict[str, Any]:
    """The content of a file like those in conf/<group>/. Raises ConfigError where it is none."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"{group}={path} cannot be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{group}={path} is not YAML{where}; write KEY: VALUE, as in conf/{group}/"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{group}={path} holds no keys; write KEY: VALUE, as in conf/{group}/")
    return content  # type: ignore[return-value]


def validate(schema: type[T], values: Any) -> T:
    """Plain values as an object of `schema`, after all checks. Raises ConfigError."""
    return build(schema, values)


def _unresolved(composed: DictConfig, error: OmegaConfBaseException) -> str:
    """The sentence for an interpolation that names nothing."""
    key = str(error.full_key or "")
    raw = OmegaConf.to_container(composed, resolve=False)
    for part in key.split("."):
        raw = raw.get(part, raw) if isinstance(raw, dict) else raw
    return _not_an_interpolation(key, raw if isinstance(raw, str | list) else "${...}")


def _not_an_interpolation(key: str, value: Any) -> str:
    return (
        f"{key}={value} has an interpolation (${{...}}) that cannot be resolved; variables of the environment are "
        "replaced by the shell outside single quotes, or by ${oc.env:NAME}"
    )


def _resolve_paths(config: Any, prefix: str = "") -> None:
    """Expand `~` in every path of a configuration, and put manifest.json behind the folder of a corpus."""
    for name, kind in kinds_of(type(config)).items():
        key, value = f"{prefix}{name}", getattr(config, name)
        if kind.mark in (Mark.path, Mark.manifest) and value is not None:
            setattr(config, name, _resolved(key, kind, value))
        elif kind.is_group:
            _resolve_paths(value, f"{key}.")
        elif kind.is_list and kind.item.is_group:
            for item in value:
                _resolve_paths(item, f"{key}.")


def _resolved(key: str, kind: Kind, value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(key, kind, item) for item in value]
    if isinstance(value, dict):
        return {name: _resolved(f"{key}.{name}", kind, item) for name, item in value.items()}
    path = expanded_path(key, value)
    return manifest_in(path) if kind.mark is Mark.manifest else path


def stored_config(values: dict[str, Any], where: str) -> TrainConfig:
    """The configuration that a run has saved in the file `where`, validated but without resolving interpolations.

    A string with `${` is rejected: a run saves its configuration with all interpolations resolved, so someone else
    must have put the string there, and resolving it could reveal this process's environment. Raises ConfigError.
    """
    for key, value in _texts(values):
        if "${" in value:
            raise ConfigError(
                f"{where}: the stored configuration has {value[:80]!r} in {key or 'a key'}; "
                "interpolations in stored files are not resolved, since they can read this host's environment"
            )
    try:
        return validate(TrainConfig, values)
    except (ConfigError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{where}: the stored configuration is wrong: {error}") from error


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested values, keys included, each with the key that it belongs to."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _texts(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration object as plain values that JSON can hold."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)  # type: ignore
