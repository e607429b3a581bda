"""Links, pipes, devices and huge files in the place of what is read or written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.files import (
    create_file,
    is_inside,
    open_for_append,
    open_regular,
    read_capped,
    write_atomically,
)


def test_a_pipe_a_device_and_a_folder_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="not a regular file"):
            open_regular(path)


def test_no_more_than_the_cap_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_capped(tmp_path / "f", 5) == b"12345"
    with pytest.raises(ConfigError, match="5 bytes, where at most 4 are expected"):
        read_capped(tmp_path / "f", 4)
    with pytest.raises(ConfigError, match="at most 10 are expected"):
        read_capped("/proc/self/maps", 10)  # says that it has no bytes
    assert read_capped(tmp_path / "f", 1 << 50) == b"12345"  # takes memory for what is there only


def test_what_a_link_leads_to_is_not_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("f", ".f.tmp", "g"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "f", b"new")
    with create_file(tmp_path / "g") as file:
        file.write(b"new")
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError):
        open_for_append(tmp_path / "log")
    assert victim.read_text() == "precious"
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes() == b"new"
    assert not (tmp_path / "f").is_symlink() and not (tmp_path / ".f.tmp").exists()


def test_a_hard_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.link(victim, tmp_path / ".f.tmp")
    write_atomically(tmp_path / "f", b"new")
    assert victim.read_text() == "precious"


def test_modes_are_what_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "open", b"")
        write_atomically(tmp_path / "secret", b"", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_appending_to_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        open_for_append(tmp_path / "pipe")


def test_inside_means_where_links_lead(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "out").symlink_to(tmp_path)
    assert is_inside(tmp_path / "folder" / "f", tmp_path / "folder")
    assert not is_inside(tmp_path / "folder" / "out" / "f", tmp_path / "folder")
