"""Check every file of a prepared corpus against its manifest: python -m data_tools.verify DIR

Exit code 0: the corpus is whole; 1: it has problems, which are listed; 2: there is no corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script, which works in every folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.command import begin

begin(__name__)

import argparse

from data_tools.names import HELDOUT_FOLDER
from data_tools.progress import stage
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.manifest import MANIFEST_NAME, load_manifest
from pretrain.errors import ConfigError, ExitCode
from pretrain.printing import ERROR_CHARS, print_error, visible


def verify(folder: Path) -> list[str]:
    """Every problem of the corpus in `folder` and of its held-out part. Raises ConfigError for a missing one."""
    manifests = [folder / MANIFEST_NAME]
    if not manifests[0].exists():
        raise ConfigError(f"{folder} holds no {MANIFEST_NAME}; give the folder of a prepared corpus")
    if (folder / HELDOUT_FOLDER).exists():
        manifests.append(folder / HELDOUT_FOLDER / MANIFEST_NAME)
    problems = []
    for path in manifests:
        with stage(f"verifying {path}", _n_bytes(path)) as progress:
            done = 0

            def advance(done_bytes: int, _total: int) -> None:
                nonlocal done
                progress.advance(done_bytes - done)
                done = done_bytes

            problems += verify_corpus(path, advance)
    return problems


def _n_bytes(manifest_path: Path) -> int:
    try:
        manifest = load_manifest(manifest_path)
    except ConfigError:
        return 0  # verify_corpus reports what is wrong with it
    return sum(shard.bytes for shard in manifest.shards) + sum(file.bytes for file in manifest.files)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.verify", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a prepared corpus")
    folder: Path = parser.parse_args().folder
    try:
        problems = verify(folder)
    except ConfigError as error:
        print_error("error", error)
        return ExitCode.CONFIG_ERROR
    for problem in problems:
        print(f"corrupt: {visible(problem, limit=ERROR_CHARS)}")
    if problems:
        return 1
    manifest = load_manifest(folder / MANIFEST_NAME)
    print(
        f"{visible(str(folder))} is whole: {manifest.document_tokens:,} tokens, root hash {manifest.root_sha256}"
    )
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
