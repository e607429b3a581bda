"""The plots of a corpus's card, as SVG, from its statistics: bars with their values.

The files are written without a plotting library, which takes longer to load and to draw them than a small corpus takes
to prepare. Text is stored as text, so that the reader's fonts can show names in any script.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from pretrain.files import write_atomically
from pretrain.printing import visible

_SHOWN, _ALT_BARS, _LABEL_CHARS = 20, 6, 60
_FONT = 12
_BAR, _STEP = 18, 26  # thickness of a horizontal bar, and distance from one to the next
_LONGEST = 360  # length of the longest bar
_COLUMN = 64  # width of a vertical bar with its margin
_TALLEST = 180  # height of the tallest bar
_MARGIN, _TOP = 12, 44
_NOT_XML = dict.fromkeys((0xFFFE, 0xFFFF), "\ufffd")

Bars = list[tuple[str, int]]


def write_plots(statistics: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw the plots into `folder`. Returns alternative text for each file name."""
    alternatives = {}
    if folder.is_symlink():  # plots are written only inside the corpus
        folder.unlink()
    folder.mkdir(exist_ok=True)
    for name, describe in _PLOTS.items():
        bars, title, unit, upright = describe(statistics)
        bars = [(visible(label, limit=_LABEL_CHARS), value) for label, value in bars]
        heading = f"{title} ({unit})"
        write_atomically(folder / f"{name}.svg", (_upright if upright else _lying)(bars, heading).encode())
        shown = ", ".join(f"{label}: {value:,}" for label, value in bars[:_ALT_BARS])
        more = f" and {len(bars) - _ALT_BARS} more" if len(bars) > _ALT_BARS else ""
        alternatives[f"{name}.svg"] = f"{heading}. {shown}{more}."
    return alternatives


def _lying(bars: Bars, heading: str) -> str:
    """A chart of horizontal bars, which leave room for names."""
    begin = _MARGIN + max((_width(label) for label, _ in bars), default=0) + 8
    longest = max([1, *(value for _, value in bars)])
    parts = []
    for row, (label, value) in enumerate(bars):
        top, length = _TOP + row * _STEP, _LONGEST * value / longest
        middle = top + _BAR - 5
        parts.append(_text(begin - 6, middle, label, "end"))
        parts.append(_bar(begin, top, length, _BAR))
        parts.append(_text(begin + length + 4, middle, f"{value:,}"))
    width = begin + _LONGEST + max((_width(f"{value:,}") for _, value in bars), default=0) + _MARGIN
    return _chart(heading, width, _TOP + len(bars) * _STEP + _MARGIN, parts)


def _upright(bars: Bars, heading: str) -> str:
    """A chart of vertical bars, for sizes in ascending order."""
    widths = [_width(text) for label, value in bars for text in (label, f"{value:,}")]
    column = max([_COLUMN, *(width + 8 for width in widths)])
    tallest = max([1, *(value for _, value in bars)])
    bottom = _TOP + _FONT + _TALLEST
    parts = []
    for row, (label, value) in enumerate(bars):
        middle, height = _MARGIN + (row + 0.5) * column, _TALLEST * value / tallest
        parts.append(_bar(middle - 0.4 * column, bottom - height, 0.8 * column, height))
        parts.append(_text(middle, bottom - height - 4, f"{value:,}", "middle"))
        parts.append(_text(middle, bottom + _FONT + 4, label, "middle"))
    return _chart(heading, 2 * _MARGIN + len(bars) * column, bottom + 2 * _FONT + _MARGIN, parts)


def _chart(heading: str, width: float, height: float, parts: list[str]) -> str:
    size = f'{max(width, 2 * _MARGIN + _width(heading)):.0f}" height="{height:.0f}"'
    style = f'font-family="sans-serif" font-size="{_FONT}"'
    head = f'<rect width="100%" height="100%" fill="white"/>\n{_text(_MARGIN, 24, heading)}'
    body = "\n".join([head, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{size} {style}>\n{body}\n</svg>\n'


def _bar(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#4477aa"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    text = escape(text.translate(_NOT_XML))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _width(text: str) -> float:
    """About the width of a text in the reader's font."""
    return sum(_FONT if unicodedata.east_asian_width(sign) in "WF" else 0.6 * _FONT for sign in text)


def _largest(counts: Sequence[tuple[str, int]], others: str) -> Bars:
    """The largest counts, and all others as one bar."""
    ordered = sorted(counts, key=lambda item: (-item[1], item[0]))
    shown, rest = ordered[:_SHOWN], ordered[_SHOWN:]
    return [*shown, (f"{len(rest)} other {others}", sum(n for _, n in rest))] if rest else shown


def _lengths(statistics: Mapping[str, Any]) -> tuple[Bars, str, str, bool]:
    histogram = {int(size): count for size, count in statistics["lengths"]["histogram"].items()}
    size, bars = min(histogram), []
    while size <= max(histogram):
        bars.append((f"{size:,}+", histogram.get(size, 0)))
        size *= 2
    return bars, "Length of the documents, in tokens", "documents", True


def _sources(statistics: Mapping[str, Any]) -> tuple[Bars, str, str, bool]:
    counts = [(source["name"], source["tokens"]) for source in statistics["sources"]]
    return _largest(counts, "sources"), "Tokens by source", "tokens", False


def _languages(statistics: Mapping[str, Any]) -> tuple[Bars, str, str, bool]:
    if statistics["languages"] is None:
        scripts = {"cjk": "Chinese, Japanese, Korean", "other": "other scripts"}
        counts = [(scripts[name], found["text_bytes"]) for name, found in statistics["scripts"].items()]
        return _largest(counts, "scripts"), "Text by script", "bytes", False
    counts = [(name, found["text_bytes"]) for name, found in statistics["languages"].items()]
    return _largest(counts, "languages"), "Text by language, as curated", "bytes", False


def _funnel(statistics: Mapping[str, Any]) -> tuple[Bars, str, str, bool]:
    rows = statistics["funnel"]
    first = [("input", rows[0]["documents_in"])]
    bars = first + [(f"after {row['stage']}", row["documents_out"]) for row in rows]
    return bars, "Documents left after each stage", "documents", False


def _duplicates(statistics: Mapping[str, Any]) -> tuple[Bars, str, str, bool]:
    found = statistics["duplicates"]
    if found.get("cluster_sizes"):
        sizes: dict[int, int] = {}
        for size, count in found["cluster_sizes"].items():
            power = 1 << (int(size).bit_length() - 1)
            sizes[power] = sizes.get(power, 0) + count
        bars = [(f"{size:,} to {2 * size - 1:,}", count) for size, count in sorted(sizes.items())]
        return bars, "Groups of duplicates, by their number of documents", "groups", True
    bars = [("documents read", statistics["funnel"][-1]["documents_in"])]
    bars.append(("exact duplicates", found["exact_in_preparation"]))
    return bars, "Duplicates that were dropped", "documents", False


_PLOTS: dict[str, Callable[[Mapping[str, Any]], tuple[Bars, str, str, bool]]] = {
    "lengths": _lengths,
    "sources": _sources,
    "languages": _languages,
    "funnel": _funnel,
    "duplicates": _duplicates,
}
