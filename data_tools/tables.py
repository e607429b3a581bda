"""Rows as aligned text."""

from __future__ import annotations

from collections.abc import Sequence


def plain_table(rows: Sequence[tuple[str, ...]], headers: Sequence[str]) -> str:
    """Rows as aligned text."""
    table = [tuple(headers), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
    )
