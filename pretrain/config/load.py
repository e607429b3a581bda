"""Turns a command line, or the configuration that a run has saved, into a validated configuration object."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.run import TrainConfig
from pretrain.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
# In an installed package conf/ lies inside the package; in a source checkout it lies beside it.
CONF_DIR = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())


T = TypeVar("T")


def load_config(schema: type[T], overrides: list[str], config_name: str | None = None) -> T:
    """Compose `conf/<config_name>.yaml` with Hydra overrides and validate it as `schema`.

    Without `config_name` the schema's own defaults are the base. Raises ConfigError.
    """
    from hydra.errors import HydraException  # takes 0.1 s to import, and most processes do not need Hydra

    try:
        _check_group_choices(overrides)
        return validate(schema, compose_config(schema, overrides, config_name))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, schema)) from error


def _check_group_choices(overrides: list[str]) -> None:
    """Raise ConfigError for overrides such as `model=1`, because Hydra fails with a traceback on them.

    That happens where a file in conf/ is chosen by a number, null or a list.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(overrides):
        folder = CONF_DIR / override.key_or_group
        if folder.is_dir() and not override.is_delete() and not isinstance(override.value(), str | dict):
            known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise ConfigError(
                f"{override.input_line} does not name a file of conf/{folder.name}; known are {known}"
            )


def compose_config(schema: type, overrides: list[str], config_name: str | None) -> DictConfig:
    """The configuration as composed by Hydra, before validation."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    name = f"{schema.__name__}_schema"
    ConfigStore.instance().store(name=name, node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        return compose(config_name=config_name or name, overrides=overrides)


def validate(schema: type[T], composed: DictConfig | dict[str, Any]) -> T:
    """The composed configuration as an object of `schema`, after all checks. Raises ConfigError."""
    try:
        plain = (
            OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
        )
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{key} is missing; give {key}=VALUE")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error


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


def _explain(error: Exception, schema: type) -> str:
    """A Hydra or OmegaConf error as one sentence with the key, the value, and what is allowed."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and isinstance(cause, OmegaConfBaseException):
        text, error = " ".join(str(cause).split()), cause
    text = re.split(r"full_key:|Config search path:|See https://", text)[0].strip()
    key = getattr(error, "full_key", None) or ""
    match = re.search(r"Key '([^']+)' (?:is )?not in", text) or re.search(
        r"Could not override '([^']+)'", text
    )
    if match:
        wrong = match.group(1).split(".")[-1]
        full = key if key.endswith(wrong) and key else match.group(1)
        owner: Any = getattr(error, "object_type", None)  # the dataclass in which the key was looked up
        allowed = [f.name for f in fields(owner)] if is_dataclass(owner) else _keys_beside(schema, full)
        close = difflib.get_close_matches(wrong, allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        return f"{full} is not a key of the configuration; {hint}"
    return f"{key}: {text}" if key and key not in text else text


def _keys_beside(schema: type, full_key: str) -> list[str]:
    """The keys that are allowed in the group to which `full_key` belongs."""
    here: Any = OmegaConf.structured(schema)
    for part in full_key.split(".")[:-1]:
        kind: Any = OmegaConf.get_type(here)
        target = get_type_hints(kind).get(part) if is_dataclass(kind) else None
        if not is_dataclass(target):
            return [f.name for f in fields(schema)]  # type: ignore[arg-type]
        here = OmegaConf.structured(target)
    return [f.name for f in fields(OmegaConf.get_type(here))]  # type: ignore[arg-type]
