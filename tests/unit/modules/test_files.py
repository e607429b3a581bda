"""Links, pipes, devices and huge files in the place of what is read or written."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.curation.dedup import save_array
from pretrain.errors import ConfigError
from pretrain.files import (
    create_file,
    hold_lock,
    is_inside,
    open_for_append,
    open_regular,
    read_capped,
    write_atomically,
    written_atomically,
)

WHOLE_WRITES = {
    "durable": "from pretrain.files import write_atomically as w; w(path, b'new')",
    "plain": "from pretrain.files import write_atomically as w; w(path, b'new', durable=False)",
    "array": "import numpy; from data_tools.curation.dedup import save_array as w; w(path, numpy.arange(3))",
}
"""Programs that write the file `path` as a whole."""


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


# ---- whole or not at all ----


def steps_of(program: str, path: Path) -> list[str]:
    """What a program does to a file, its temporary name and its folder: the system calls, in their order."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (tests/install_system.sh does)")
    log = path.with_name("calls")
    calls = "trace=write,ftruncate,fsync,fdatasync,sync_file_range,rename,renameat,renameat2"
    code = f"import sys; from pathlib import Path; path = Path(sys.argv[1]); {program}"
    command = [sys.executable, "-c", code, str(path)]
    subprocess.run(["strace", "-f", "-y", "-e", calls, "-o", str(log), *command], check=True)
    steps = []
    for line in log.read_text().splitlines():
        name, _, rest = line.partition(" ")[2].strip().partition("(")
        if re.search(rf"<{re.escape(str(path.parent))}>", rest):
            name += " of the folder"
        elif str(path.with_name(f".{path.name}.tmp")) not in rest:
            continue
        steps.append(re.sub("rename.*", "rename", name))
    return steps


@pytest.mark.parametrize("kind", ["durable", "array"])
def test_a_durable_write_is_on_the_disk_before_it_has_its_name(tmp_path: Path, kind: str) -> None:
    steps = steps_of(WHOLE_WRITES[kind], tmp_path / "f")
    assert set(steps[:-3]) == {"write"}
    assert steps[-3:] == ["fsync", "rename", "fsync of the folder"]


def test_a_plain_write_waits_for_no_disk(tmp_path: Path) -> None:
    assert steps_of(WHOLE_WRITES["plain"], tmp_path / "f") == ["write", "rename"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, "no bytes"),
        lambda path: save_array(path, np.array([{}])),  # which takes pickle
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises((TypeError, ValueError)):
        write(tmp_path / "f")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"old")]


def test_until_its_block_ends_a_file_is_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with written_atomically(tmp_path / "f", durable=False) as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "f").read_bytes() == b"old"
    assert (tmp_path / "f").read_bytes() == b"new"


# ---- locks ----


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    code = "import sys; from pretrain.files import hold_lock\n"
    code += "lock = hold_lock(sys.argv[1], '', ''); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"folder=x is held \(process {holder.pid} on .+\); wait"):
            hold_lock(tmp_path / "lock", "folder=x is held", "wait")
        holder.kill()
    hold_lock(tmp_path / "lock", "", "").close()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()} on {os.uname().nodename}\n"
