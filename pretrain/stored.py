"""Parses JSON files from untrusted sources with schemas that state the type and the bounds of every value.

A schema is a dataclass whose fields are annotated with the types below or with plain ones. Parsing is strict: it
converts nothing ("3" is not a number, 3.0 is not an integer), rejects unknown keys, and resolves nothing in a string.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, Predicate

from pretrain.errors import ConfigError
from pretrain.printing import visible

T = TypeVar("T")
MAX_VALUES = 1 << 16
"""Largest number of values in a file, unless its reader allows more. A checkpoint of 16,384 ranks has about 50,000."""
_SHOWN_CHARS = 60  # number of characters of a wrong value that an error quotes
# Errors quote wrong values only of files up to this size, because a quotation may copy the whole file.
_SHOWN_BYTES = 1 << 20
_TOLD_ERRORS = 1000
_WHOLE_BYTES = 4 << 20  # a larger content is validated in slices
_WHOLE_VALUES = 1 << 16
_SLICE = 2000  # number of list items that are validated at a time
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.S)
_VALUE_SIGNS = (b"[", b"{", b",")


def is_sha256(text: str) -> bool:
    """Whether a text is 64 lowercase hexadecimal digits."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


def is_file_name(text: str) -> bool:
    """Whether a text is the name of a file, without a folder."""
    return 0 < len(text) < 256 and "/" not in text and "\0" not in text and text not in (".", "..")


def is_relative_path(text: str) -> bool:
    """Whether a text is a relative path that cannot leave its folder: it has no part `..`."""
    parts = text.split("/")
    return len(text) < 4096 and all(is_file_name(part) for part in parts)


def is_printable_line(text: str) -> bool:
    """Whether a text is one line without control characters."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text)


Count = Annotated[int, Ge(0), Lt(1 << 62)]
"""A size or a number of things."""
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
    "RelativePath", "Seconds", "Sha256", "Text", "has_more_values", "parse", "parse_plain",
]  # fmt: skip


@lru_cache
def _adapter(schema: Any) -> Any:
    # This import takes 0.1 s, which only processes that parse a file should pay.
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def has_more_values(content: bytes, limit: int) -> bool:
    """Whether JSON text has more than about `limit` values. It is not parsed.

    An empty object takes 3 bytes in a file and 70 in memory, so a limit on the bytes does not limit the memory. The
    function counts brackets and commas outside of strings.
    """
    if _count_signs(content, 0, len(content)) <= limit:
        return False
    found = at = 0
    for string in _STRING.finditer(content):
        found += _count_signs(content, at, string.start())
        at = string.end()
        if found > limit:
            return True
    return found + _count_signs(content, at, len(content)) > limit


def _count_signs(content: bytes, start: int, stop: int) -> int:
    return sum(content.count(sign, start, stop) for sign in _VALUE_SIGNS)


def parse(schema: type[T], content: str | bytes, where: str, what: str, max_values: int = MAX_VALUES) -> T:
    """Parse JSON into an object of the dataclass `schema`.

    `where` is the file's path, and `what` says what it should be, such as "a manifest"; errors name both. Raises
    ConfigError for the first wrong value, or where there are more than `max_values` values. The caller must have
    limited the size of `content`.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    try:
        if has_more_values(content, max_values):
            raise _Wrong(f"it has more than the {max_values:,} values that are allowed")
        return _validated(schema, content) if _is_small(content) else _in_slices(schema, content)
    except _Wrong as wrong:
        problem = str(wrong)
    raise ConfigError(f"{where} is not {what}: {problem}")


def parse_plain(content: bytes, where: str, what: str, max_values: int = MAX_VALUES) -> Any:
    """Parse JSON without a schema, for callers that need only a few of its values. Raises ConfigError."""
    if has_more_values(content, max_values):
        raise ConfigError(
            f"{where} is not {what}: it has more than the {max_values:,} values that are allowed"
        )
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not {what}: {error}") from None


class _Wrong(Exception):
    """Carries the description of what is wrong with a file's content."""


def _is_small(content: bytes) -> bool:
    """Whether a content may be validated as a whole.

    For each missing value, pydantic's error copies the whole enclosing object, so large content could exhaust memory.
    """
    return len(content) <= _WHOLE_BYTES and not has_more_values(content, _WHOLE_VALUES)


def _validated(schema: type[T], content: bytes) -> T:
    from pydantic import ValidationError

    try:
        adapter: Any = _adapter(schema)  # type: ignore[arg-type]
        return adapter.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        problem = _first_problem(error, with_value=len(content) <= _SHOWN_BYTES)
    raise _Wrong(problem)


def _in_slices(schema: type[T], content: bytes) -> T:
    """Validate a large content, with its long lists a slice at a time."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"invalid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise _Wrong("it should be an object")
    lists = {name: value for name, value in raw.items() if isinstance(value, list) and len(value) > _SLICE}
    first = raw | {name: values[:_SLICE] for name, values in lists.items()}
    found = _validated(schema, _small_json(first))
    types = get_type_hints(schema, include_extras=True)
    for name, values in lists.items():
        for start in range(_SLICE, len(values), _SLICE):
            try:
                part = _validated(types[name], _small_json(values[start : start + _SLICE]))
                getattr(found, name).extend(part)
            except _Wrong as wrong:
                raise _Wrong(f"{name}, from number {start:,} on: {wrong}") from None
    return found


def _small_json(value: Any) -> bytes:
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if not _is_small(content):
        raise _Wrong("it has values that are too long, or too many values outside of its lists")
    return content


def _first_problem(error: Any, with_value: bool) -> str:
    """Describe the first error: the key, the value found there, and what is wrong with the value."""
    if error.error_count() > _TOLD_ERRORS:  # pydantic can only build the descriptions of all errors at once
        return f"{error.error_count():,} of its values are wrong or unknown"
    first = error.errors(include_url=False, include_context=False, include_input=with_value)[0]
    place = ".".join(map(_shortened, map(str, first["loc"]))) or "it"
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
    if not with_value:
        return f"{place} is wrong; {message}"
    return f"{place} is {_shortened(repr(first['input']))}; {message}"


def _shortened(text: str) -> str:
    return visible(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")
