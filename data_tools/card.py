"""What a person reads of a finished corpus: its card, and its sources as a table."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.gather import Funnel
from pretrain.manifest import CorpusSource, Manifest

_NOT_CURATED = " There was no other filter: personal data and unfit text were not looked for."
HEADERS = ("source", "documents", "tokens", "text MB", "bytes per token", "license")


def source_rows(manifest: Manifest, limit: int | None = None) -> list[tuple[str, ...]]:
    """One row per source that has documents, largest first, and one for all of them.

    With `limit`, sources beyond it share one row.
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


def _markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    return "\n".join(
        [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]
    )


def card(
    manifest: Manifest,
    heldout: Manifest | None,
    funnel: Funnel,
    tokenizer: str,
    fits: list[str],
    curations: list[str],
) -> str:
    """README.md of the corpus. `fits`: how the tokenizer fits held-out text, in sentences. `curations`: the
    funnels of what the input went through before, as text."""
    held = "There is no held-out text."
    if heldout is not None:
        held = (
            f"Kept out of training, in `heldout/`: documents: {heldout.n_documents:,}, tokens: "
            f"{heldout.n_tokens:,}. It is a\ncorpus of the same form, with its text in "
            "`heldout/documents.jsonl.gz`."
        )
    return f"""# Corpus

Text for training language models, as tokens. Written by {manifest.created_by}.

- documents: {manifest.n_documents:,}
- tokens: {manifest.n_tokens:,}
- chunks: {manifest.n_chunks:,} of {manifest.chunk_tokens:,} tokens, in shards: {len(manifest.shards):,}
- root hash: `{manifest.root_sha256}`
- tokenizer: {tokenizer}, {manifest.vocab_size:,} entries, sha256 `{manifest.tokenizer_sha256}`
- tokens are {manifest.dtype}, little-endian; a document begins with bos = {manifest.bos_id} and ends with
  eos = {manifest.eos_id}

{held}

{chr(10).join(["The tokenizer on held-out text:", "", *fits]) if fits else ""}

## Sources and licenses

Each document stays under the license of its source.

{_markdown_table(source_rows(manifest))}

## From the input to here

```
{chr(10).join(funnel.lines())}
```

{"".join(f"Before that, by curation:{chr(10) * 2}```{chr(10)}{text}{chr(10)}```{chr(10) * 2}" for text in curations)}\
Text was brought to Unicode NFC and freed of control characters; documents that are too short or too long and
exact duplicates were dropped.{"" if curations else _NOT_CURATED}

## Reading it

`python -m data_tools.show DIR` and `python -m data_tools.verify DIR`, or any webdataset reader: in
`shards/shard-*.tar`, `NNNNNN.tok` holds the tokens of a chunk and `NNNNNN.doc` says, as JSON, which documents
they come from.
"""
