"""Files that others may have made are data: parsed by a schema that says every type and bound, before any use.

A schema is a dataclass whose fields are annotated with the types below or with plain ones. Nothing is converted ("3"
is no number, 3.0 is no whole one), nothing unknown is let through, and nothing in a text is resolved.

The number of values is bounded before they are parsed: a value of two bytes takes some 150 in memory.
"""

from __future__ import annotations

import json
import re
import reprlib
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, Predicate

from pretrain.errors import ConfigError

T = TypeVar("T")
MAX_VALUES = 1 << 16
"""A checkpoint of 16,384 ranks has some 50,000."""
_MAX_ERRORS = 1000
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxlist = _shown.maxdict = 3
_shown.maxlevel = 2


def is_sha256(text: str) -> bool:
    """64 hexadecimal digits."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def is_file_name(text: str) -> bool:
    """The name of a file, without a folder."""
    return 0 < len(text) < 256 and "/" not in text and "\0" not in text and text not in (".", "..")


def is_relative_path(text: str) -> bool:
    """A path below a folder, with none of its parts leading up."""
    parts = text.split("/")
    return len(text) < 4096 and all(is_file_name(part) for part in parts)


def is_printable_line(text: str) -> bool:
    """One line, without control characters."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text)


Count = Annotated[int, Ge(0), Lt(1 << 62)]
"""A size or number of things."""
Positive = Annotated[int, Ge(1), Lt(1 << 62)]
Seconds = Annotated[float, Ge(0), Le(1e12)]
Sha256 = Annotated[str, Predicate(is_sha256)]
FileName = Annotated[str, Predicate(is_file_name)]
RelativePath = Annotated[str, Predicate(is_relative_path)]
Line = Annotated[str, MaxLen(4096), Predicate(is_printable_line)]
"""A name or a sentence."""
Text = Annotated[str, MaxLen(1 << 20)]

__all__ = [
    "Annotated", "Count", "FileName", "Ge", "Gt", "Le", "Line", "Lt", "MaxLen", "MinLen", "Positive", "Predicate",
    "RelativePath", "Seconds", "Sha256", "Text", "parse", "parse_plain",
]  # fmt: skip


@lru_cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter  # a tenth of a second to import: for those that read such a file

    return TypeAdapter(schema)


def parse(schema: type[T], content: str | bytes, where: str, what: str, max_values: int = MAX_VALUES) -> T:
    """JSON as an object of `schema`, a dataclass. `where`: its path, `what`: what it should be, as in "a manifest".

    Raises ConfigError with one sentence that names the first value that is wrong. Bound the size of `content` before.
    """
    from pydantic import ValidationError

    _check_values(content, where, what, max_values)
    try:
        adapter: Any = _adapter(schema)  # type: ignore[arg-type]
        return adapter.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        raise ConfigError(f"{where} is not {what}: {_first_problem(error)}") from None


def parse_plain(content: bytes, where: str, what: str, max_values: int = MAX_VALUES) -> Any:
    """JSON without a schema, for what looks at a few of its values. Raises ConfigError where it is none."""
    _check_values(content, where, what, max_values)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not {what}: {error}") from None


def _check_values(content: str | bytes, where: str, what: str, max_values: int) -> None:
    content = content.encode() if isinstance(content, str) else content
    n_values = sum(content.count(sign) for sign in (b",", b"[", b"{"))
    if n_values > max_values:
        raise ConfigError(f"{where} is not {what}: it has some {n_values:,} values, more than {max_values:,}")


def _first_problem(error: Any) -> str:
    """Where the first error is, what is there, and what is wrong with it."""
    if error.error_count() > _MAX_ERRORS:  # to list them would take kilobytes for each
        return f"{error.error_count():,} of its values are wrong"
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "it"
    message = first["msg"][0].lower() + first["msg"][1:]
    match first["type"]:
        case "json_invalid":
            return message
        case "missing":
            return f"{place} is missing"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"{place} is unknown"
        case "predicate_failed":
            name = message.split("'")[1]
            message = f"it should be {name.removeprefix('is_').replace('_', ' ')}"
    return f"{place} is {_shown.repr(first['input'])}; {message}"
