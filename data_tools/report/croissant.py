"""Writes croissant.json, which describes the corpus to dataset search engines and loaders (MLCommons Croissant 1.0).

Format: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.0.html. Files are named relative to croissant.json,
since a corpus has no address of its own. Facts that nobody stated (a creator, a date) are left out. There is no record
set of the training documents, because mlcroissant 1.1 reads only the last archive of a file set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.names import HELDOUT_FOLDER, HELDOUT_TEXT
from pretrain.corpus.manifest import MANIFEST_NAME, Manifest, describe_file
from pretrain.corpus.shards import SHARDS_FOLDER
from pretrain.printing import visible

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
# The terms of version 1.0, copied from its specification, because validators compare them literally.
_TERMS = (
    "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset "
    "jsonPath key md5 parentField path recordSet references regex repeated replace separator source subField "
    "transform samplingRate"
).split()
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}
_TEXT_ID = "heldout-text"
_SHARD_FIELDS = (
    ("name", "sc:Text", "file name"),
    ("sha256", "sc:Text", "hash of the file"),
    ("chunks", "sc:Integer", "chunks in it"),
    ("documents", "sc:Integer", "documents that begin in it"),
    ("tokens", "sc:Integer", "tokens in it"),
)
_TEXT_FIELDS = (("id", "id of the document"), ("source", "where it comes from"), ("text", "its text"))


def croissant(
    manifest: Manifest, folder: Path, stated: Mapping[str, str | None], name: str, description: str
) -> bytes:
    """The content of croissant.json for the corpus in `folder`. `stated` has creator and date_published, or None."""
    licenses = sorted({source.license for source in manifest.sources if source.documents})
    value: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": name,
        "description": description,
        "license": licenses,
        "citeAs": _citation(manifest, stated, name),
    }
    if stated["creator"] is not None:
        value["creator"] = {"@type": "sc:Organization", "name": stated["creator"]}
    if stated["date_published"] is not None:
        value["datePublished"] = stated["date_published"]
    has_text = (folder / HELDOUT_FOLDER / HELDOUT_TEXT).exists()
    value["distribution"] = _distribution(manifest, folder, has_text)
    value["recordSet"] = [_shards(), *([_texts()] if has_text else [])]
    text = visible(json.dumps(value, indent=1, ensure_ascii=False) + "\n", keep="\n")
    # Catalogs embed this file in web pages, where these signs could end the script; in JSON, escapes mean the same.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode()


def _citation(manifest: Manifest, stated: Mapping[str, str | None], name: str) -> str:
    """A citation in BibTeX, which identifies the corpus by its root hash."""
    fields = [f"title={{{_bibtex(name)}}}"]
    if stated["creator"] is not None:
        fields.append(f"author={{{{{_bibtex(stated['creator'])}}}}}")
    if stated["date_published"] is not None:
        fields.append(f"year={{{stated['date_published'][:4]}}}")
    fields.append(f"note={{root hash {manifest.root_sha256}}}")
    return f"@misc{{corpus-{manifest.root_sha256[:12]}, {', '.join(fields)}}}"


def _bibtex(text: str) -> str:
    """Text for use inside braces, without signs that would end them or begin a TeX command."""
    return re.sub(r"[{}\\]", "", " ".join(text.split()))


def _distribution(manifest: Manifest, folder: Path, has_text: bool) -> list[dict[str, Any]]:
    files = [
        _file(
            folder, "manifest", MANIFEST_NAME, "application/json", "what is there, and hashes over all of it"
        )
    ]
    for file in manifest.files:
        if "/" not in file.name:
            files.append(
                _file_object(file.name, file.name, file.bytes, file.sha256, "application/octet-stream", "")
            )
    for shard in manifest.shards:
        path = f"{SHARDS_FOLDER}/{shard.name}"
        description = f"{shard.chunks:,} chunks of tokens, readable by webdataset"
        files.append(
            _file_object(shard.name, path, shard.bytes, shard.sha256, "application/x-tar", description)
        )
    if has_text:
        path = f"{HELDOUT_FOLDER}/{HELDOUT_TEXT}"
        files.append(_file(folder, _TEXT_ID, path, "application/jsonlines", "held-out documents, gzipped"))
    shards = [{"@id": shard.name} for shard in manifest.shards]
    return [
        *files,
        _file_set(
            "tokens", shards, "*.tok", "application/octet-stream", f"chunks: {manifest.dtype}, little-endian"
        ),
        _file_set("documents", shards, "*.doc", "application/json", "which documents a chunk holds"),
    ]


def _file(folder: Path, name: str, path: str, encoding: str, description: str) -> dict[str, Any]:
    info = describe_file(folder, path)
    return _file_object(name, path, info.bytes, info.sha256, encoding, description)


def _file_object(
    name: str, path: str, n_bytes: int, sha256: str, encoding: str, description: str
) -> dict[str, Any]:
    value = {"@type": "cr:FileObject", "@id": name, "name": name}
    if description:
        value["description"] = description
    return value | {
        "contentUrl": path,
        "contentSize": f"{n_bytes} B",
        "encodingFormat": encoding,
        "sha256": sha256,
    }


def _file_set(
    name: str, inside: Sequence[Mapping[str, str]], includes: str, encoding: str, description: str
) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": description,
        "containedIn": list(inside),
        "encodingFormat": encoding,
        "includes": includes,
    }


def _field(
    record_set: str,
    name: str,
    kind: str,
    description: str,
    origin: Mapping[str, str],
    extract: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "name": name,
        "description": description,
        "dataType": kind,
        "source": {**{key: {"@id": value} for key, value in origin.items()}, "extract": dict(extract)},
    }


def _record_set(name: str, description: str, fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": list(fields),
    }


def _shards() -> dict[str, Any]:
    origin = {"fileObject": "manifest"}
    fields = [
        _field("shards", name, kind, text, origin, {"jsonPath": f"$.shards[*].{name}"})
        for name, kind, text in _SHARD_FIELDS
    ]
    return _record_set("shards", "The files that hold the tokens.", fields)


def _texts() -> dict[str, Any]:
    origin = {"fileObject": _TEXT_ID}
    fields = [
        _field("heldout", name, "sc:Text", text, origin, {"column": name}) for name, text in _TEXT_FIELDS
    ]
    return _record_set("heldout", "The documents that were kept out of training.", fields)
