"""The types of a schema's keys, taken apart: what is optional, what is a list, and which text is a path."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from pretrain.config.texts import Mark


class Kind(NamedTuple):
    """The type of a key."""

    type: Any
    """The type without `| None` and without marks: int, str, an Enum, a dataclass, `list[...]`, `dict[...]`, `Any`."""
    optional: bool
    """Whether null is allowed."""
    mark: Mark | None
    """What the text means, for a key that holds text."""

    @property
    def item(self) -> Kind:
        """The type of a list's items or of a map's values."""
        return kind_of(get_args(self.type)[-1])

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list

    @property
    def is_map(self) -> bool:
        return get_origin(self.type) is dict

    @property
    def is_group(self) -> bool:
        return is_dataclass(self.type)

    @property
    def holds_text(self) -> bool:
        """Whether a value is text, or a list of texts."""
        return self.type is str or (self.is_list and self.item.type is str)

    def expected(self) -> str:
        """What a value must be, as a part of a sentence."""
        if isinstance(self.type, type) and issubclass(self.type, Enum):
            return f"one of {', '.join(self.type.__members__)}"
        if self.is_group or self.is_map:
            return "a map, such as {NAME: VALUE}"
        if self.is_list:
            return "a list, such as [A, B]"
        if self.type == int | str:
            return "a whole number or a word"
        named = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return named.get(self.type, "a value")


@cache
def kind_of(hint: Any) -> Kind:
    """The kind of a type hint."""
    mark = None
    optional = False
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in members:
        optional = True
        members = tuple(member for member in members if member is not NoneType)
    found = members[0] if len(members) == 1 else Union[members]  # noqa: UP007 (the members are not known here)
    if get_origin(found) is Annotated:
        found, mark = get_args(found)[:2]
    elif get_origin(found) in (list, dict):
        mark = kind_of(get_args(found)[-1]).mark
    return Kind(found, optional, mark)


def kinds_of(schema: type) -> dict[str, Kind]:
    """The kind of each key of a dataclass, in order."""
    return _kinds_of(schema)


@cache
def _kinds_of(schema: Any) -> dict[str, Kind]:
    hints = get_type_hints(schema, include_extras=True)
    return {f.name: kind_of(hints[f.name]) for f in fields(schema)}


def find_kind(schema: type, key: str) -> Kind | None:
    """The kind of a dotted key; None where the schema has no such key."""
    kind = Kind(schema, optional=False, mark=None)
    for part in key.split("."):
        if kind.is_group:
            if part not in kinds_of(kind.type):
                return None
            kind = kinds_of(kind.type)[part]
        elif kind.is_map:
            kind = kind.item
        elif kind.type is not Any:
            return None
    return kind


def leaf_keys(schema: type, prefix: str = "") -> dict[str, Kind]:
    """Every dotted key of a schema that is not a group, with its kind."""
    found: dict[str, Kind] = {}
    for name, kind in kinds_of(schema).items():
        found |= leaf_keys(kind.type, f"{prefix}{name}.") if kind.is_group else {f"{prefix}{name}": kind}
    return found
