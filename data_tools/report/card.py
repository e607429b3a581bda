"""Describes a finished corpus for people: its card, and a table of its sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.config import CARD_FIELDS
from data_tools.names import CARD_NAME, CROISSANT_NAME, HELDOUT_FOLDER, PLOTS_FOLDER, STATISTICS_NAME
from data_tools.report.croissant import croissant
from data_tools.report.fertility import fit_lines
from data_tools.report.plots import write_plots
from data_tools.report.schemas import read_statistics
from data_tools.tables import code_block, code_span, markdown, markdown_table
from pretrain.corpus.manifest import MANIFEST_NAME, CorpusSource, Manifest, load_manifest
from pretrain.files import write_atomically

_NOT_CURATED = " There was no other filter: personal data and unfit text were not looked for."
_MASKED = """
- documents are dialogues with a loss mask: only what the assistant says, and the eos after it, is to be predicted"""
HEADERS = ("source", "documents", "tokens", "text MB", "bytes per token", "license")


def packing_line(manifest: Manifest) -> str:
    """What the training sequences do to the dialogues or labeled documents of a corpus, in words."""
    packed = manifest.packed
    if packed is None:
        return (
            "dialogues are not packed: training cuts those that reach into the next sequence, unless they are prepared "
            "with chat.max_tokens, the length of the sequences"
        )
    what, longer = (
        "dialogues",
        f"{packed.dropped_documents:,} were dropped and {packed.cut_documents:,} cut at a turn",
    )
    if manifest.classes:
        what, longer = "documents", f"{packed.cut_documents:,} were cut to their start"
    return (
        f"whole {what} are packed into {manifest.n_tokens // packed.sequence_tokens:,} sequences of "
        f"{packed.sequence_tokens:,} tokens, {manifest.filler_tokens / manifest.n_tokens:.1%} of which is filler; of "
        f"longer {what}, {longer}"
    )


def _targets(manifest: Manifest) -> str:
    """What is to be predicted, where that is not every token."""
    if manifest.classes:
        names = ", ".join(map(markdown, manifest.classes))
        return f"\n- after its eos, a document has the number of its class, which alone is to be predicted: {names}"
    return _MASKED if manifest.loss_mask else ""


def source_rows(manifest: Manifest, limit: int | None = None) -> list[tuple[str, ...]]:
    """One row per source that has documents, largest first, and one row for all of them.

    With `limit`, further sources share one row.
    """
    sources = sorted((s for s in manifest.sources if s.documents), key=lambda s: (-s.tokens, s.name))
    shown, others = sources[:limit], sources[limit:] if limit is not None else []
    rows = [_row(source.name, [source], source.license) for source in shown]
    if others:
        rows.append(_row(f"{len(others)} others", others, "see the card"))
    return [*rows, _row("all", sources, "")]


def _row(name: str, sources: Sequence[CorpusSource], license: str) -> tuple[str, ...]:
    documents, tokens = sum(s.documents for s in sources), sum(s.tokens for s in sources)
    text_bytes = sum(s.text_bytes for s in sources)
    ratio = f"{text_bytes / tokens:.2f}" if tokens else ""
    return (name, f"{documents:,}", f"{tokens:,}", f"{text_bytes / 1e6:.2f}", ratio, license)


def describe(folder: Path, report: Mapping[str, Any]) -> None:
    """Write README.md, croissant.json and the plots of the corpus in `folder`, which holds its manifest and statistics.

    `report` is the content of prepare.json.
    """
    manifest = load_manifest(folder / MANIFEST_NAME)
    held = folder / HELDOUT_FOLDER / MANIFEST_NAME
    heldout = load_manifest(held) if held.exists() else None
    statistics = read_statistics(folder / STATISTICS_NAME)
    stated = report.get("card") or dict.fromkeys(CARD_FIELDS)
    name = stated["name"] or f"corpus-{manifest.root_sha256[:12]}"
    n_sources = sum(source.documents > 0 for source in manifest.sources)
    description = stated["description"] or (
        f"Text for training language models, as tokens: {manifest.n_documents:,} documents, "
        f"{manifest.document_tokens:,} tokens, sources: {n_sources:,}."
    )
    plots = write_plots(statistics, folder / PLOTS_FOLDER)
    text = _card(manifest, heldout, report, statistics, plots, (name, description))
    write_atomically(folder / CARD_NAME, text.encode())
    content = croissant(manifest, folder, stated, name, description)
    write_atomically(folder / CROISSANT_NAME, content)


def _statistics_lines(statistics: Mapping[str, Any]) -> list[str]:
    lengths = statistics["lengths"]
    lines = [
        f"- tokens per document: median {lengths['p50']:,}, 5% have at most {lengths['p5']:,} and 95% at most "
        f"{lengths['p95']:,}, the longest has {lengths['max']:,}"
    ]
    names = {"cjk": "Chinese, Japanese or Korean", "other": "in other scripts"}
    scripts = (
        f"{counts['documents']:,} {names.get(script, markdown(script))} ({counts['tokens']:,} tokens)"
        for script, counts in statistics["scripts"].items()
    )
    lines.append(f"- documents: {', '.join(scripts)}")
    for key, what in (
        ("personal_data", "personal data that curation replaced, before duplicates were dropped"),
        ("contamination", "documents that curation found to share text with evaluation sets"),
    ):
        if statistics[key] is not None:
            counts = ", ".join(f"{markdown(name)} {count:,}" for name, count in statistics[key].items())
            lines.append(f"- {what}: {counts or 'none'}")
        else:
            lines.append(f"- {what}: not counted")
    return lines


def _lineage_table(lineage: Sequence[Mapping[str, Any]]) -> str:
    def short(value: str | None) -> str:
        return code_span(value[:12]) if value else ""

    def pair(stage: Mapping[str, Any], unit: str) -> str:
        return " → ".join("" if n is None else f"{n:,}" for n in (stage[f"{unit}_in"], stage[f"{unit}_out"]))

    rows = [
        (
            markdown(stage["stage"]),
            *(short(stage[f"{what}_sha256"]) for what in ("options", "input", "output")),
            pair(stage, "documents").strip(" →"),
            pair(stage, "bytes").strip(" →"),
            ", ".join(f"{markdown(reason)} {n:,}" for reason, n in list(stage["dropped"].items())[:3]),
        )
        for stage in lineage
    ]
    return markdown_table(("stage", "options", "input", "output", "documents", "bytes", "dropped"), rows)


def _head(manifest: Manifest, heldout: Manifest | None, tokenizer: Mapping[str, Any]) -> str:
    held = "There is no held-out text."
    if heldout is not None:
        held = (
            f"Kept out of training, in `heldout/`: documents: {heldout.n_documents:,}, tokens: "
            f"{heldout.document_tokens:,}. It is a\ncorpus of the same form, with its text in "
            "`heldout/documents.jsonl.gz`."
        )
    packed = f"\n- {packing_line(manifest)}" if manifest.loss_mask else ""
    fits = fit_lines(tokenizer.get("heldout_fit", {}), tokenizer.get("heldout_fit_by_language", {}))
    return f"""Written by {markdown(manifest.created_by)}.

- documents: {manifest.n_documents:,}
- tokens: {manifest.document_tokens:,}
- chunks: {manifest.n_chunks:,} of {manifest.chunk_tokens:,} tokens, in shards: {len(manifest.shards):,}
- root hash: `{manifest.root_sha256}`
- tokenizer: {markdown(tokenizer.get("kind", "sentencepiece"))}, {manifest.vocab_size:,} entries, sha256 \
`{manifest.tokenizer_sha256}`
- tokens are {manifest.dtype}, little-endian; a document begins with bos = {manifest.bos_id} and ends with
  eos = {manifest.eos_id}{_targets(manifest)}{packed}

{held}

{chr(10).join(["The tokenizer on held-out text:", "", *fits]) if fits else ""}
"""


def _card(
    manifest: Manifest,
    heldout: Manifest | None,
    report: Mapping[str, Any],
    statistics: Mapping[str, Any],
    plots: Mapping[str, str],
    title: tuple[str, str],
) -> str:
    def plot(name: str) -> str:
        file = f"{name}.svg"
        return f"![{markdown(plots[file])}]({PLOTS_FOLDER}/{file})\n\n" if file in plots else ""

    curations = report.get("curation_funnels", [])
    before = "".join(f"Before that, by curation:\n\n{code_block(text)}\n\n" for text in curations)
    return f"""# {markdown(title[0])}

{markdown(title[1])}

{_head(manifest, heldout, report["tokenizer"])}
## Sources and licenses

Each document stays under the license of its source.

{markdown_table(HEADERS, [tuple(map(markdown, row)) for row in source_rows(manifest)])}

{plot("sources")}\
## Statistics

All of them, and more, are in `{STATISTICS_NAME}`.

{chr(10).join(_statistics_lines(statistics))}

{plot("lengths")}{plot("languages")}\
## From the input to here

{code_block(chr(10).join(report["summary"]))}

{before}{plot("funnel")}{plot("duplicates")}\
Text was brought to Unicode NFC and freed of control characters; documents that are too short or too long and
exact duplicates were dropped.{"" if curations else _NOT_CURATED}

## Lineage

Beginnings of sha256 hashes; the whole ones, with versions of program and libraries, are in `prepare.json`.

{_lineage_table(report.get("lineage", []))}

## Reading it

`python -m data_tools.show DIR` and `python -m data_tools.verify DIR`, or any webdataset reader: in
`shards/shard-*.tar`, `NNNNNN.tok` holds the tokens of a chunk and `NNNNNN.doc` says, as JSON, which documents
they come from. `{CROISSANT_NAME}` describes the same files to programs that read Croissant.
"""
