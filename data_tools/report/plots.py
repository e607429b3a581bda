"""The plots of a corpus's card, as SVG, from its statistics.

Only this module imports matplotlib, and only to draw. One version of matplotlib gives the same bytes on every machine,
because its own font is used, and neither the user's settings nor a date. Text is stored as text, so that the reader's
fonts can show names in any script.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.files import write_atomically
from pretrain.printing import visible

_SHOWN, _ALT_BARS, _LABEL_CHARS = 20, 6, 60
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pretrain",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Bars = list[tuple[str, int]]


def write_plots(statistics: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw the plots into `folder`. Returns alternative text for each file name.

    There are no plots where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        print("the card has no plots: matplotlib is not installed", file=sys.stderr)
        return {}
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    alternatives = {}
    if folder.is_symlink():  # plots are written only inside the corpus
        folder.unlink()
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The font that measures Chinese names lacks their characters, but readers see their own font.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        for name, describe in _PLOTS.items():
            bars, title, unit, upright = describe(statistics)
            write_atomically(folder / f"{name}.svg", _draw(bars, title, unit, upright))
            shown = ", ".join(
                f"{visible(label, limit=_LABEL_CHARS)}: {value:,}" for label, value in bars[:_ALT_BARS]
            )
            more = f" and {len(bars) - _ALT_BARS} more" if len(bars) > _ALT_BARS else ""
            alternatives[f"{name}.svg"] = f"{title} ({unit}). {shown}{more}."
    return alternatives


def _draw(bars: Bars, title: str, unit: str, upright: bool) -> bytes:
    """Draw a bar chart, with vertical bars for sizes and horizontal ones for names."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    labels = [
        visible(label, limit=_LABEL_CHARS).replace("$", r"\$") for label, _ in bars
    ]  # else matplotlib would read it as mathematics
    values = [value for _, value in bars]
    places = range(len(bars))
    height = 3.2 if upright else 0.9 + 0.26 * len(bars)
    figure = Figure(figsize=(7, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    if upright:
        drawn = axes.bar(places, values, color="#4477aa")
        axes.set_xticks(places, labels, rotation=45 if len(bars) > 8 else 0)
        axes.set_xlim(-0.6, max(len(bars), 6) - 0.4)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylabel(unit)
    else:
        drawn = axes.barh(places, values, color="#4477aa")
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit)
    axes.bar_label(drawn, [f"{value:,}" for value in values], padding=2, fontsize=7)
    axes.margins(**{"y" if upright else "x": 0.12})
    axes.set_title(title, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


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
