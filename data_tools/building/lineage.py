"""The lineage of a corpus: for each stage, hashes of options, input and output, counts of documents and bytes, drops.

It is the list `lineage` of prepare.json. No stage draws random numbers, so there are no seeds to record. Text between
two stages of a curation is never written to disk, so its hash is null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.building.gather import Gathered, part_path, read_digests
from data_tools.building.workspace import Recipe
from data_tools.report.funnel import stage_counts
from pretrain import __version__
from pretrain.corpus.manifest import Manifest

_LIBRARIES = ("numpy", "pyarrow", "sentencepiece", "xxhash")
_OF_SHARDS = ("chunk_tokens", "shard_bytes", "heldout_frac")
_OF_WORK = "part_bytes"
"""This option divides the work; it changes only the order of a corpus of many parts, and so the root hash."""


def hash_of(value: Any) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _stage(
    name: str,
    *,
    options: Any,
    inputs: str | None,
    output: str | None,
    documents: tuple[int | None, int | None],
    n_bytes: tuple[int | None, int | None],
    dropped: Mapping[str, int],
    program: str | None = None,
    libraries: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "stage": name,
        "options_sha256": hash_of(options),
        "input_sha256": inputs,
        "output_sha256": output,
        "documents_in": documents[0],
        "documents_out": documents[1],
        "bytes_in": n_bytes[0],
        "bytes_out": n_bytes[1],
        "dropped": dict(dropped),
        "program": program or f"pretrain {__version__}",
        "libraries": dict(_versions(_LIBRARIES) if libraries is None else libraries),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # 40 ms, which --help does without

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def curation_lineage(name: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a curation. Reports of older programs have no hashes of the text."""
    recipe = report["recipe"]
    options, files = recipe["options"], recipe["files"]
    libraries = {package: found for package, found in recipe["packages"].items() if found}
    counts = stage_counts(report)
    stages = []
    for number, stage in enumerate(counts):
        own = options["read"] if stage.stage == "read" else options["curation"][stage.stage]
        named = {path: digest for path, digest in files.items() if json.dumps(path) in json.dumps(own)}
        last = number == len(counts) - 1
        stages.append(
            _stage(
                f"{name}: {stage.stage}",
                options={"options": own, "files": named},
                inputs=report.get("texts_read", {}).get("sha256") if number == 0 else None,
                output=report.get("output", {}).get("sha256") if last else None,
                documents=(stage.documents_in, stage.documents_out),
                n_bytes=(
                    stage.bytes_in,
                    sum(report["tally"]["kept_bytes"].values()) if last else stage.bytes_out,
                ),
                dropped=stage.dropped,
                program=report.get("created_by", "unknown"),
                libraries=libraries,
            )
        )
    return stages


def texts_sha256(work: Path, n_parts: int) -> str:
    """sha256 over the hash and size of every text that was gathered, in the order of reading."""
    total = hashlib.sha256()
    for number in range(n_parts):
        total.update(read_digests(part_path(work, number)).astype("<u8").tobytes())
    return total.hexdigest()


def preparation_lineage(
    recipe: Recipe, gathered: Gathered, work: Path, manifest: Manifest, heldout: Manifest | None
) -> list[dict[str, Any]]:
    """The stages of a preparation: reading and cleaning, the tokenizer, and the shards."""
    options, funnel = recipe.options, gathered.funnel
    tokenizer = {key: value for key, value in options.items() if key.startswith("tokenizer.")}
    shards = {key: options[key] for key in _OF_SHARDS}
    rest = {key: value for key, value in options.items() if key not in {*tokenizer, *shards, _OF_WORK}}
    texts = texts_sha256(work, len(gathered.parts))
    manifests = [manifest, heldout] if heldout is not None else [manifest]
    return [
        _stage(
            "gather",
            options=rest,
            inputs=gathered.read_sha256 or None,
            output=texts,
            documents=(funnel.read, funnel.kept),
            n_bytes=(recipe.input["bytes"], funnel.kept_bytes),
            dropped=funnel.dropped,
        ),
        _stage(
            "tokenizer",
            options=tokenizer,
            inputs=texts,
            output=manifest.tokenizer_sha256,
            documents=(None, None),
            n_bytes=(gathered.sample_bytes if options["tokenizer.path"] is None else None, None),
            dropped={},
        ),
        _stage(
            "shards",
            options=shards,
            inputs=hash_of([texts, manifest.tokenizer_sha256]),
            output=manifest.root_sha256,
            documents=(funnel.kept, sum(m.n_documents for m in manifests)),
            n_bytes=(funnel.kept_bytes, sum(shard.bytes for m in manifests for shard in m.shards)),
            dropped={},
        ),
    ]


def removal_lineage(
    ids: Iterable[str],
    before: str,
    manifests: Sequence[Manifest],
    n_removed: int,
    text_bytes: tuple[int, int],
) -> dict[str, Any]:
    """The removal of documents: `before` is the root hash before it, `manifests` are the new ones."""
    left = sum(manifest.n_documents for manifest in manifests)
    return _stage(
        "remove",
        options=sorted(ids),
        inputs=before,
        output=manifests[0].root_sha256,
        documents=(left + n_removed, left),
        n_bytes=text_bytes,
        dropped={"removed_later": n_removed},
    )
