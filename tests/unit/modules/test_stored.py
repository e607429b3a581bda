"""Files of others are parsed by a schema: nothing is converted, unknown or unbounded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.stored import Count, FileName, Line, RelativePath, Sha256, has_more_values, parse, parse_plain


@dataclass(kw_only=True, slots=True)
class Part:
    name: FileName
    bytes: Count = 0


@dataclass(kw_only=True, slots=True)
class Whole:
    sha256: Sha256
    parts: list[Part]
    where: RelativePath = "a/b"
    title: Line = ""
    ratio: float = 0.5
    by_name: dict[str, Count] = field(default_factory=dict)


GOOD: dict[str, Any] = {"sha256": "a" * 64, "parts": [{"name": "x", "bytes": 3}]}


def whole(**changes: Any) -> Whole:
    return parse(Whole, json.dumps(GOOD | changes), "f.json", "a whole")


def test_what_fits_is_an_object() -> None:
    found = whole(ratio=1, by_name={"a": 1})
    assert found.parts == [Part(name="x", bytes=3)]
    assert (found.ratio, found.by_name, found.where) == (1.0, {"a": 1}, "a/b")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"sha256": None}, "sha256"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"sha256": "a" * 63}, "sha256"),
        ({"sha256": "a" * 64 + "\n"}, "sha256"),
        ({"parts": {}}, "parts"),
        ({"parts": [{"name": "x", "bytes": -1}]}, "parts.0.bytes"),
        ({"parts": [{"name": "x", "bytes": 1 << 62}]}, "parts.0.bytes"),
        ({"parts": [{"name": "x", "bytes": 3.0}]}, "parts.0.bytes"),
        ({"parts": [{"name": "x", "bytes": "3"}]}, "parts.0.bytes"),
        ({"parts": [{"name": "x", "bytes": True}]}, "parts.0.bytes"),
        ({"parts": [{"name": "../x"}]}, "parts.0.name"),
        ({"parts": [{"name": ".."}]}, "parts.0.name"),
        ({"parts": [{"name": "a\0"}]}, "parts.0.name"),
        ({"parts": [{"bytes": 3}]}, "parts.0.name"),
        ({"where": "/etc/passwd"}, "where"),
        ({"where": "a/../../b"}, "where"),
        ({"where": "a//b"}, "where"),
        ({"title": "a\x1b[31m"}, "title"),
        ({"title": "a\nb"}, "title"),
        ({"title": "a\u2028b"}, "title"),
        ({"more": 1}, "more"),
        ({"by_name": {"a": -1}}, "by_name.a"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=r"^f.json is not a whole: ") as caught:
        whole(**changes)
    assert str(caught.value).startswith(f"f.json is not a whole: {place} is ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"null", b"{}", b'{"sha256": NaN'])
def test_what_is_no_such_json_is_one_sentence(content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^f.json is not a whole: ") as caught:
        parse(Whole, content, "f.json", "a whole")
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(content: bytes) -> None:
    with pytest.raises(ConfigError):
        parse(Whole, content, "f.json", "a whole")


def test_many_small_values_are_not_parsed() -> None:
    content = b'{"sha256": ' + b"[" + b"[]," * 200_000 + b"[]]}"
    with pytest.raises(ConfigError, match="more than the 65,536 values"):
        parse(Whole, content, "f.json", "a whole")
    with pytest.raises(ConfigError, match="more than the 65,536 values"):
        parse_plain(content, "f.json", "a whole")
    assert parse_plain(b'{"a": [1]}', "f.json", "a whole") == {"a": [1]}
    with pytest.raises(ConfigError, match="is not a whole: maximum recursion"):
        parse_plain(b"[" * 50_000, "f.json", "a whole")


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"[" * 70_000 + b"]" * 70_000, 70_000),
        (b'{"a":' * 70_000, 70_000),
        (b'["' + b'[{,\\"' * 70_000 + b'"]', 1),
        (b'["a","' + b"[" * 9, 2),
        (b"1," * 70_000, 70_000),
    ],
)
def test_brackets_and_commas_outside_of_texts_count_as_values(content: bytes, values: int) -> None:
    assert has_more_values(content, values - 1)
    assert not has_more_values(content, values)


def test_of_many_wrong_values_the_number_is_said() -> None:
    by_name = {str(number): -1 for number in range(2000)}
    with pytest.raises(ConfigError, match="2,000 of its values are wrong"):
        whole(by_name=by_name)


# ---- large files -----------------------------------------------------------------------------------------------------


def many(**changes: Any) -> bytes:
    """A whole of many parts, one of which is changed."""
    parts: list[dict[str, Any]] = [{"name": f"文{n}", "bytes": n} for n in range(60_000)]
    parts[45_000] |= changes
    return json.dumps({**GOOD, "parts": parts, "title": "t"}, ensure_ascii=False).encode()


def test_a_large_file_is_read_in_slices() -> None:
    found = parse(Whole, many(), "f.json", "a whole", max_values=1 << 20)
    assert found.title == "t"
    assert found.parts == [Part(name=f"文{n}", bytes=n) for n in range(60_000)]


@pytest.mark.parametrize("changes", [{"bytes": -1}, {"name": "a/b"}, {"x\x1b" * 100: 1}])
def test_a_wrong_value_of_a_large_file_is_found(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"^f\.json is not a whole: parts, from number 44,000 on: 1000\."
    ) as caught:
        parse(Whole, many(**changes), "f.json", "a whole", max_values=1 << 20)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_more_values_than_are_allowed_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than the 65,536 values"):
        parse(Whole, b"[" + b"1," * 70_000 + b"1]", "f.json", "a whole")
    with pytest.raises(ConfigError, match="its values are wrong or unknown"):
        parse(Whole, json.dumps({f"{n}": 1 for n in range(20_000)}), "f.json", "a whole")
