"""Text on a real S3 server and behind HTTP is curated to the same bytes as text on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3fs

from data_tools.curate import curate
from support.curating import config
from support.faulty_server import FaultyServer
from support.preparing import content

pytestmark = pytest.mark.integration
FEW = ("executor.workers=2", "curation.stages=[normalize,language]")


@pytest.fixture(scope="module")
def documents(raw_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("local") / "out"
    assert curate(config(raw_text, output, *FEW)) == 0
    return content(output / "documents")


@pytest.mark.parametrize("where", ["text/text.jsonl", "text"])
def test_text_on_s3_gives_the_same_bytes(
    raw_text: Path, documents: dict[str, str], s3: str, tmp_path: Path, where: str
) -> None:
    """Named as a file or as a folder; cut into units that are read by ranges."""
    s3fs.S3FileSystem().put(str(raw_text), f"{s3}/text/text.jsonl")
    given = config(raw_text, tmp_path / "out", *FEW)
    given.input = [f"{s3}/{where}"]
    assert curate(given) == 0
    found = content(tmp_path / "out" / "documents")
    assert len(found) == len(documents) > 1
    assert found == documents


def test_text_behind_http_gives_the_same_bytes(
    raw_text: Path, documents: dict[str, str], tmp_path: Path
) -> None:
    with FaultyServer(raw_text.parent) as server:
        given = config(raw_text, tmp_path / "out", *FEW)
        given.input = [f"{server.url}/text.jsonl"]
        assert curate(given) == 0
    assert content(tmp_path / "out" / "documents") == documents
