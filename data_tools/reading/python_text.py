"""Text that every machine has: the code and documentation of its Python installation.

This is the standard library and every installed package, each under the license that its metadata states. The machine
decides which files there are, but not their order.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from importlib.metadata import PackageMetadata

SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt"}
STDLIB_SOURCE = "python-stdlib"
STDLIB_LICENSE = "PSF-2.0"
_LONGEST_LICENSE_NAME = 100  # a longer field holds the whole text of the license


@dataclass(frozen=True, slots=True)
class PythonFile:
    """One file; `name` is the name of the package and the path inside it."""

    name: str
    path: Path
    source: str
    license: str
    size_bytes: int


def python_files(max_bytes: int | None, max_file_bytes: int) -> list[PythonFile]:
    """All files of at most `max_file_bytes`, ordered by name; with `max_bytes`, an even selection of that size."""
    found = [*_stdlib_files(), *_package_files()]
    found = [file for file in found if 0 < file.size_bytes <= max_file_bytes]
    if max_bytes is not None:
        chosen, total = [], 0
        for file in sorted(found, key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode()), file.name)):
            if total + file.size_bytes <= max_bytes:
                chosen.append(file)
                total += file.size_bytes
        found = chosen
    return sorted(found, key=lambda file: file.name)


def _stdlib_files() -> Iterator[PythonFile]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")
        ]
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES and path.is_file():
                relative = path.relative_to(root).as_posix()
                yield _file(STDLIB_SOURCE, relative, path, STDLIB_LICENSE)


def _package_files() -> Iterator[PythonFile]:
    from importlib.metadata import distributions  # 40 ms, which --help does without

    seen: set[str] = set()
    for distribution in distributions():
        source = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if not source or source in seen:
            continue
        seen.add(source)
        license = distribution_license(distribution.metadata)
        for entry in distribution.files or []:
            inside = ".." not in entry.parts and not entry.parts[0].endswith((".dist-info", ".egg-info"))
            if entry.suffix in SUFFIXES and inside and not entry.is_absolute():
                path = Path(str(distribution.locate_file(entry)))
                if path.is_file():
                    yield _file(source, entry.as_posix(), path, license)


def _file(source: str, relative: str, path: Path, license: str) -> PythonFile:
    name = f"{source}/{relative}".encode("utf-8", "replace").decode()
    return PythonFile(name, path, source, license, path.stat().st_size)


def distribution_license(metadata: PackageMetadata) -> str:
    """The license that a package's metadata states: License-Expression, else License, else its classifiers."""
    for field in ("License-Expression", "License"):
        license = (metadata.get_all(field) or [""])[0].strip()
        if (
            license
            and license.upper() != "UNKNOWN"
            and "\n" not in license
            and len(license) <= _LONGEST_LICENSE_NAME
        ):
            return license
    classifiers = metadata.get_all("Classifier") or []
    names = [c.split("::")[-1].strip() for c in classifiers if c.startswith("License ::")]
    return " AND ".join(names) or "unknown"
