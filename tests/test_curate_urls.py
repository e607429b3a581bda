"""Text on a real S3 server and behind HTTP is curated to the same bytes as text on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from data_tools.curate import curate
from support.curating import config, write_text
from support.faulty_server import FaultyServer
from support.object_store import s3_server
from support.preparing import content

pytestmark = pytest.mark.integration
FEW = ("executor.workers=2", "curation.stages=[normalize,language]")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("input") / "text.jsonl")


@pytest.fixture(scope="module")
def documents(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("local") / "out"
    assert curate(config(text, output, *FEW)) == 0
    return content(output / "documents")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


@pytest.mark.parametrize("where", ["text/text.jsonl", "text"])
def test_text_on_s3_gives_the_same_bytes(
    text: Path, documents: dict[str, str], s3: str, tmp_path: Path, where: str
) -> None:
    """Named as a file or as a folder; cut into units that are read by ranges."""
    s3fs.S3FileSystem().put(str(text), f"{s3}/text/text.jsonl")
    given = config(text, tmp_path / "out", *FEW)
    given.input = [f"{s3}/{where}"]
    assert curate(given) == 0
    found = content(tmp_path / "out" / "documents")
    assert len(found) == len(documents) > 1
    assert found == documents


def test_text_behind_http_gives_the_same_bytes(text: Path, documents: dict[str, str], tmp_path: Path) -> None:
    with FaultyServer(text.parent) as server:
        given = config(text, tmp_path / "out", *FEW)
        given.input = [f"{server.url}/text.jsonl"]
        assert curate(given) == 0
    assert content(tmp_path / "out" / "documents") == documents
