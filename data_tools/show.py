"""Show what a prepared corpus holds: python -m data_tools.show DIR [--chunk N]

Prints its size, sources and licenses, and the beginning of a chunk, which is chosen at random unless it is given. Where
the corpus has a loss mask, ⟦ ⟧ enclose the tokens to be predicted, and a line ends at each eos.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script, which works in every folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.command import begin

begin(__name__)

import argparse
import random
from collections.abc import Sequence

import numpy as np

from data_tools.building.workspace import load_tokenizer
from data_tools.names import HELDOUT_FOLDER
from data_tools.report.card import HEADERS, packing_line, source_rows
from data_tools.tables import plain_table, shown
from pretrain.corpus.manifest import MANIFEST_NAME, CorruptShardError, Manifest, load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_in
from pretrain.errors import ConfigError, ExitCode
from pretrain.printing import print_error, visible

_TEXT_LINES, _LINE_CHARS = 12, 110
_TOKENS_SHOWN = 2048


def describe(manifest: Manifest, folder: Path) -> str:
    """The size of a corpus and a table of its sources."""
    tar_bytes = sum(shard.bytes for shard in manifest.shards)
    lines = [
        shown(str(folder)),
        f"{manifest.document_tokens:,} tokens ({manifest.dtype}) of {manifest.n_documents:,} documents",
        f"{manifest.n_chunks:,} chunks of {manifest.chunk_tokens:,} tokens; shards: {len(manifest.shards):,} "
        f"({tar_bytes / 1e6:.1f} MB)",
        *([packing_line(manifest)] if manifest.loss_mask else []),
        f"tokenizer: {manifest.vocab_size:,} entries, sha256 {manifest.tokenizer_sha256}",
        f"root hash: {manifest.root_sha256}",
        *[f"classes: {shown(', '.join(manifest.classes))}"] * bool(manifest.classes),
        "",
        plain_table(source_rows(manifest), HEADERS),
    ]
    heldout = folder / HELDOUT_FOLDER / MANIFEST_NAME
    if heldout.exists():
        held = load_manifest(heldout)
        lines += ["", f"held out: {held.document_tokens:,} tokens of {held.n_documents:,} documents"]
    return "\n".join(lines)


def describe_chunk(corpus: Corpus, tokenizer: Tokenizer, chunk: int) -> str:
    """Where a chunk comes from, and its first lines. Raises CorruptShardError."""
    documents = corpus.documents(chunk)
    tokens = corpus.read(chunk, 0, _TOKENS_SHOWN)
    places = np.arange(len(tokens))
    is_filler = places >= documents.ends[documents.starts.searchsorted(places, side="right") - 1]
    text = tokenizer.decode(tokens[~is_filler].tolist())
    if corpus.manifest.loss_mask:
        is_target = corpus.is_target(chunk, 0, len(tokens))
        text = marked_text(tokens[~is_filler], is_target[~is_filler], tokenizer, corpus.manifest.classes)
    source = corpus.manifest.sources[int(documents.source[0])].name
    offset = int(documents.offsets[0])
    begins = f"begins at token {offset:,} of" if offset else "begins with"
    head = (
        f"chunk {chunk}: {corpus.tokens_in(chunk):,} tokens, pieces of documents: {len(documents.ids):,}; it "
        f"{begins} {shown(documents.ids[0])} ({shown(source)})"
    )
    if corpus.manifest.loss_mask:
        n_targets = int(corpus.is_target(chunk, 0, corpus.tokens_in(chunk)).sum())
        head += f"\nto be predicted, in ⟦ ⟧: {n_targets:,} of its tokens"
    lines = (visible(line[:_LINE_CHARS], keep="\t") for line in text.split("\n")[:_TEXT_LINES])
    return "\n".join([head, *(f"| {line}" for line in lines)])


def marked_text(
    tokens: np.ndarray, is_target: np.ndarray, tokenizer: Tokenizer, classes: Sequence[str] = ()
) -> str:
    """The text of tokens, with targets in brackets and a line break after each eos.

    With `classes`, a target is the number of one.
    """
    borders = np.flatnonzero(np.diff(is_target)) + 1
    turns = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    text = ""
    cuts = np.union1d(borders, turns)
    for piece, mask in zip(np.split(tokens, cuts), np.split(is_target, cuts), strict=True):
        if len(piece):
            words = classes[piece[0]] if classes and mask[0] else tokenizer.decode(piece.tolist())
            text += f"⟦{words}⟧" if mask[0] else words
            text += "\n" if piece[-1] == tokenizer.eos_id else ""
    return text


def show(folder: Path, chunk: int | None) -> None:
    """Print the description. Raises ConfigError, and CorruptShardError for a damaged chunk."""
    corpus = Corpus(folder / MANIFEST_NAME)
    chosen = random.randrange(corpus.n_chunks) if chunk is None else chunk
    if not 0 <= chosen < corpus.n_chunks:
        raise ConfigError(
            f"--chunk {chosen} does not exist; the corpus has chunks 0 to {corpus.n_chunks - 1}"
        )
    # The held-out part uses the tokenizer of the corpus around it.
    place = folder if tokenizer_in(folder).exists() else folder.parent
    tokenizer = load_tokenizer(place, corpus.manifest)
    print(describe(corpus.manifest, folder))
    print()
    print(describe_chunk(corpus, tokenizer, chosen))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.show", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a prepared corpus")
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="chunk to show; a random one where it is not given"
    )
    arguments = parser.parse_args()
    try:
        show(arguments.folder, arguments.chunk)
    except ConfigError as error:
        print_error("error", error)
        return ExitCode.CONFIG_ERROR
    except CorruptShardError as error:
        print_error("corrupt", error)
        return 1
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
