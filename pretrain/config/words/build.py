"""Builds an object of a schema from plain values, and says in one sentence which key and value do not fit."""

from __future__ import annotations

import difflib
import re
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any, TypeVar, cast

from omegaconf import MISSING

from pretrain.config.words.kinds import Kind, kinds_of
from pretrain.config.words.names import unknown_key
from pretrain.errors import ConfigError

T = TypeVar("T")
_UNITS = {"": 0, "m": 6, "b": 9, "t": 12}
"""Powers of ten by the letter behind a number. There is no k, because 8k is 8,192 to some and 8,000 to others."""
_MAX_EXPONENT = 30


def build(schema: type[T], values: Any) -> T:
    """An object of `schema` with these values; keys that are not given keep their defaults.

    Raises ConfigError for a key that the schema does not have, a required key that is not given, and a value of the
    wrong kind.
    """
    return cast(T, _group(schema, schema, values, ""))


def _group(schema: type, root: type, values: Any, prefix: str) -> Any:
    """An object of the dataclass `schema`, which is the group `prefix` of the whole schema `root`."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{prefix}={values} is a group of keys; give them one by one, as {prefix}.KEY=VALUE"
        )
    kinds = kinds_of(schema)
    for name in values:
        if name not in kinds:
            full = f"{prefix}.{name}" if prefix else str(name)
            raise ConfigError(unknown_key(root, full, schema))
    arguments = {}
    for name, kind in kinds.items():
        key = f"{prefix}.{name}" if prefix else name
        if name in values and not _is_missing(values[name]):
            arguments[name] = _value(kind, root, values[name], key)
        elif name in values or _has_no_default(schema, name):
            raise ConfigError(f"{key} is missing; give {key}=VALUE")
    return schema(**arguments)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _has_no_default(schema: type, name: str) -> bool:
    return _is_missing(schema.__dataclass_fields__[name].default)  # type: ignore[attr-defined]


def _value(kind: Kind, root: type, value: Any, key: str) -> Any:
    """`value` as `kind` wants it."""
    if kind.type is Any or (value is None and kind.optional):
        return value
    if kind.is_group:
        return _group(kind.type, root, value, key)
    if kind.is_list and isinstance(value, list | tuple):
        return [_value(kind.item, root, item, f"{key}") for item in value]
    if kind.is_map and isinstance(value, dict):
        return {str(name): _value(kind.item, root, item, f"{key}.{name}") for name, item in value.items()}
    found = _scalar(kind.type, value)
    if found is None:
        close = difflib.get_close_matches(str(value), getattr(kind.type, "__members__", ()), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        shown = "null" if value is None else value
        raise ConfigError(f"{key}={shown} is not {kind.expected()}{hint}")
    return found


def _scalar(wanted: Any, value: Any) -> Any:
    """A single value of the type `wanted`; None where `value` is none."""
    if isinstance(value, dict | list | tuple | None):
        return None
    if wanted is str:
        return value.value if isinstance(value, Enum) else str(value)
    if wanted is bool:
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        return words.get(str(value).lower())
    if wanted is int:
        return whole_number(value)
    if wanted is float:
        return _number(value)
    if wanted == int | str:
        number = whole_number(value)
        return number if number is not None else str(value)
    if not isinstance(wanted, type) or not issubclass(wanted, Enum):  # a list or a map
        return None
    if isinstance(value, wanted):
        return value
    return wanted.__members__.get(str(value)) or wanted.__members__.get(str(value).lower())


def whole_number(value: Any) -> int | None:
    """A whole number in one of the forms in which people write it: 1000, 1_000, 1,000, 1e6, 2.5e9, 20B, 300M."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    text = str(value).strip()
    match = re.fullmatch(r"([+-]?[\d._,]*\d(?:[eE][+-]?\d+)?)\s*([mMbBtT]?)", text)
    if match is None or ("," in text and not re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+[mMbBtT]?", text)):
        return None
    try:
        number = Decimal(match[1].replace("_", "").replace(",", ""))
    except InvalidOperation:
        return None
    if number.adjusted() > _MAX_EXPONENT:  # so that a typo does not make an integer of a gigabyte
        return None
    number *= 10 ** _UNITS[match[2].lower()]
    return int(number) if number == number.to_integral_value() else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except ValueError:
        return None
