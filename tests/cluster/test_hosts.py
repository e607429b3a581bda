"""The hosts themselves: apart from each other and from this machine, and gone without a trace."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from support import ROOT
from support.cluster.hosts import Cluster, wait_until


def processes_with(text: str) -> list[str]:
    """Command lines of this machine's processes that contain a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in words:
            found.append(words)
    return found


def test_hosts_are_apart(cluster: Cluster) -> None:
    first, second = cluster.nodes
    assert first.run("hostname").stdout == "node1\n"
    assert first.run("ssh", "node2", "hostname").stdout == "node2\n"
    assert "default" not in first.run("ip", "route").stdout
    first.run("touch", "/dev/shm/mine", "/run/mine")
    assert second.run("ls", "/dev/shm/mine", "/run/mine", check=False).returncode != 0
    assert not Path("/run/mine").exists()
    sleeper = second.start("sleep", "1234", log=cluster.folder / "log" / "sleep")
    assert "1234" not in first.run("ps", "-ef").stdout
    assert sorted(cluster.head.run("srun", "--nodes=2", "hostname").stdout.split()) == ["node1", "node2"]
    second.power_off()
    assert sleeper.wait(10) != 0


def test_power_off_loud_and_silent(cluster: Cluster) -> None:
    """A peer sees the connection close at once, or hears nothing at all; after a reboot the node is there again."""
    first, second = cluster.nodes
    for silent in (False, True):
        log = cluster.folder / "log" / f"connection-{silent}"
        connection = first.start(
            "ssh", "-o", "ServerAliveInterval=0", "node2", "echo there; sleep 1234", log=log
        )
        wait_until(lambda log=log: log.read_text() == "there\n", "a connection", 20)
        second.power_off(silent=silent)
        if silent:
            time.sleep(3)
            assert connection.poll() is None
            connection.kill()
            connection.wait()
        else:
            assert connection.wait(20) == 255
        second.boot()
        assert first.run("ssh", "node2", "hostname").stdout == "node2\n"


def test_nothing_is_left_even_where_the_owner_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from support.cluster.hosts import Cluster
with Cluster(Path({str(folder)!r}), n_nodes=1):
    Path({str(tmp_path / "up")!r}).touch()
    time.sleep(600)
"""
    mounts, links = Path("/proc/mounts").read_text(), Path("/proc/net/dev").read_text().count("\n")
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        wait_until((tmp_path / "up").exists, "hosts", 60)
        assert len(processes_with(str(folder))) > 2
        assert Path("/proc/mounts").read_text() == mounts
        assert Path("/proc/net/dev").read_text().count("\n") == links
    finally:
        owner.kill()
        owner.wait()
    wait_until(lambda: not processes_with(str(folder)), "the hosts are gone", 20)
    assert not Path("/etc/netns").exists()
