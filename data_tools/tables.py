"""Tables as aligned text and as Markdown, with untrusted names made safe to print in both."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.printing import code_block as code_block
from pretrain.printing import code_span as code_span
from pretrain.printing import markdown as markdown
from pretrain.printing import markdown_table as markdown_table
from pretrain.printing import shown as shown


def plain_table(rows: Sequence[tuple[str, ...]], headers: Sequence[str]) -> str:
    """A table as text with aligned columns."""
    from rich.cells import cell_len, set_cell_size  # a Chinese character is two columns wide

    table = [tuple(headers), *(tuple(map(shown, row)) for row in rows)]
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(headers))]
    return "\n".join(
        "  ".join(set_cell_size(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
