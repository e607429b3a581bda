"""A full disk ends a curation with one sentence that names the output."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest

from data_tools import curate as command
from data_tools.curation.dedup import load_array, save_array
from support.curating import config


def test_an_array_that_does_not_fit_names_the_cause(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the end of the disk. numpy's own error has no cause."""
    array, before = np.arange(10_000, dtype=np.uint64), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_array(tmp_path / "a.npy", array)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    save_array(tmp_path / "a.npy", array)
    assert (load_array(tmp_path / "a.npy") == array).all()


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT])
def test_the_output_is_named(
    tmp_path: Path, cause: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(cause, "anything")

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(command, "run_phase", fail)
    given = config(tmp_path / "a.jsonl", tmp_path / "out", "curation.stages=[]")
    assert command.curate(given) == 1
    assert f"error: output={tmp_path}/out cannot be written: " in capsys.readouterr().err


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(command, "run_phase", fail)
    with pytest.raises(OSError, match="Input/output error"):
        command.curate(config(tmp_path / "a.jsonl", tmp_path / "out", "curation.stages=[]"))
