"""What a curation did, as a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_tools.tables import plain_table

DOCUMENTS, REPORT = "documents", "report.json"
"""In the folder of a curation: the text, and what was done."""
_SHOWN = 12


def curations_of(inputs: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """Those of a preparation's inputs that are curated text: where, and their reports."""
    found = []
    for entry in inputs:
        folder = Path(entry).expanduser().resolve()
        report = folder.parent / REPORT
        if folder.name == DOCUMENTS and report.is_file():
            found.append((folder.parent.name, json.loads(report.read_text(encoding="utf-8"))))
    return found


def funnel_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per stage in its order: documents that came in, were dropped and why, and are left."""
    tally = report["tally"]
    left = sum(tally["read"].values())
    left_bytes = sum(tally["read_bytes"].values())
    rows: list[tuple[str, ...]] = [("read", f"{left:,}", "", f"{left_bytes / 1e6:.1f}", "")]
    for stage in (*report["stages"], "dedup"):
        reasons = {
            name.partition("/")[2]: count
            for name, count in tally["dropped"].items()
            if name.startswith(f"{stage}/")
        }
        left -= sum(reasons.values())
        left_bytes -= sum(
            count for name, count in tally["dropped_bytes"].items() if name.startswith(f"{stage}/")
        )
        largest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        why = ", ".join(f"{reason} {count:,}" for reason, count in largest[:5])
        rows.append((stage, f"{left:,}", f"{-sum(reasons.values()):,}", f"{left_bytes / 1e6:.1f}", why))
    return rows


def funnel_table(report: Mapping[str, Any]) -> str:
    """Funnel, languages and sources, as aligned text."""
    tally = report["tally"]
    parts = [plain_table(funnel_rows(report), ("stage", "documents", "dropped", "MB of input", "why"))]
    bad = tally["dropped"].get("read/bad_record", 0)
    if bad:
        parts.append(f"{bad:,} records could not be read: rejected/read")
    kept = sum(tally["kept"].values())
    rows = []
    for source, n_read in sorted(tally["read"].items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]:
        n_kept = tally["kept"].get(source, 0)
        size = tally["kept_bytes"].get(source, 0)
        rows.append((source, f"{n_read:,}", f"{n_kept:,}", f"{n_kept / n_read:.1%}", f"{size / 1e6:.1f}"))
    if len(tally["read"]) > _SHOWN:
        rows.append((f"{len(tally['read']) - _SHOWN} others", "", "", "", ""))
    parts.append(plain_table(rows, ("source", "read", "kept", "share", "MB kept")))
    languages = sorted(tally["language_bytes"].items(), key=lambda item: (-item[1], item[0]))
    parts.append(
        "languages: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in languages[:_SHOWN])
    )
    parts.append(f"kept: {kept:,} documents, {sum(tally['kept_bytes'].values()) / 1e6:.1f} MB")
    return "\n\n".join(parts)
