"""Runs a private Docker engine for tests, Debian's dockerd on its own socket, and builds the project's CPU image in it.

Needs root and the Debian packages docker.io, debootstrap and docker-compose. No image is pulled: debootstrap makes the
base image here, and the Dockerfile gets it as CPU_BASE. So these tests use Debian bookworm with its python3.11 in place
of `python:3.11-slim`; everything after FROM is as in the product.

Images and build layers stay in $XDG_CACHE_HOME/pretrain-tests, or /var/cache/pretrain-tests, for the next test run.
Docker detects what has changed, and the base image is made again when its recipe changes. Delete the folder to start
without a cache.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from support import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
DOCKER = "/usr/bin/docker"  # Debian's client, because another one may come first on the path
IMAGE = "pretrain:cpu"
BASE = "pretrain-base:debian"  # replaces the base that the Dockerfile names by digest
TOOLS = {"dockerd": "docker.io", "debootstrap": "debootstrap", "docker-compose": "docker-compose"}
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = "etc/ssl/certs/of-the-host.crt"


class Unavailable(Exception):
    """This machine cannot run an engine; the message says why."""


@dataclass(kw_only=True, frozen=True)
class Engine:
    """A running engine, which the method `docker` talks to."""

    socket: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"}

    def docker(self, *arguments: str | Path, timeout_s: float = 240) -> str:
        """Run one docker command, which must succeed. Returns its output, including stderr."""
        done = subprocess.run(
            [DOCKER, *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"docker {' '.join(map(str, arguments))}\n{done.stdout}"
        return done.stdout.strip()

    def inspect(self, name: str, template: str) -> str:
        """One value from the description of a container or image, selected by a Go template."""
        return self.docker("inspect", "-f", template, name)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "/var/cache")) / "pretrain-tests" / "docker"


# --- the engine ---


def require_tools() -> None:
    if os.geteuid() != 0:
        raise Unavailable("a Docker engine needs root")
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed (Debian: apt-get install {package})")


@contextmanager
def running_engine() -> Iterator[Engine]:
    """An engine without containers, which leaves no process, mount or network behind. Raises Unavailable."""
    require_tools()
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = Path(tempfile.mkdtemp(prefix="pretrain-docker-"))  # the path of a socket has a length limit
    with (cache / "lock").open("w") as lock, (state / "dockerd.log").open("w") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of another checkout wait here
        command = ["dockerd", "-H", f"unix://{state}/docker.sock", "--data-root", cache / "data"]
        command += ["--exec-root", state / "exec", "-p", state / "pid"]
        # The engine adds no bridge and no firewall rule to the host. A test makes and removes the one network it needs.
        command += ["--bridge=none", *(f"--{name}=false" for name in ("iptables", "ip6tables", "ip-masq"))]
        daemon = subprocess.Popen(
            [*map(str, command), "--ip-forward=false"], stdout=log, stderr=log, start_new_session=True
        )
        try:
            engine = Engine(socket=state / "docker.sock")
            wait_until_up(engine, daemon, state / "dockerd.log")
            remove_containers(engine)  # left by a test run that was killed
            try:
                yield engine
            finally:
                remove_containers(engine)
        finally:
            stop_daemon(daemon, cache, state)
    assert_nothing_left(cache, state)
    shutil.rmtree(state)


def wait_until_up(engine: Engine, daemon: subprocess.Popen, log: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while subprocess.run([DOCKER, "version"], env=engine.environment, capture_output=True).returncode != 0:
        if daemon.poll() is not None or time.monotonic() > deadline:
            last = (log.read_text().splitlines() or ["it said nothing"])[-1]
            raise Unavailable(f"dockerd does not start: {last}")
        time.sleep(0.1)


def remove_containers(engine: Engine) -> None:
    if containers := engine.docker("ps", "-aq").split():
        engine.docker("rm", "-f", *containers)
    engine.docker("network", "prune", "-f")


def stop_daemon(daemon: subprocess.Popen, *folders: Path) -> None:
    """Stop dockerd, which stops containerd and unmounts. Clean up the rest, so that a failed test leaves nothing."""
    daemon.terminate()
    try:
        daemon.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
        for mount in mounts_below(*folders):
            subprocess.run(["umount", "-l", mount], check=True)


def mounts_below(*folders: Path) -> list[str]:
    """Mount points in the folders, innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted(
        (point for point in points if any(Path(point).is_relative_to(f) for f in folders)), reverse=True
    )


def assert_nothing_left(*folders: Path) -> None:
    assert not mounts_below(*folders)
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(str(folder) in words for folder in folders):
            left.append(words.replace("\0", " "))
    assert not left


# --- the base image ---


def pip_settings() -> dict[str, str]:
    """The settings by which pip finds packages on this machine, from its configuration and the environment."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"^\S+\.([a-z-]+)='(.*)'$", listed, flags=re.M))
    return {
        name: found[name] for name in ("index-url", "trusted-host", "cert", "find-links") if name in found
    }


def local_wheels(settings: dict[str, str]) -> list[Path]:
    """The torch wheels on this machine. All other packages must be in its package index."""
    folders = [
        Path(urlsplit(word).path) for word in settings.get("find-links", "").split() if "http" not in word
    ]
    return sorted(wheel for folder in folders for wheel in folder.glob("torch-*.whl"))


def make_base(engine: Engine) -> None:
    """Make the base image of the tests, unless it exists already for this recipe."""
    settings = pip_settings()
    wheels = local_wheels(settings)
    certificates = Path(settings.get("cert") or os.environ.get("SSL_CERT_FILE") or "/nonexistent")
    authorities = certificates.read_bytes() if certificates.is_file() else b""
    options = ["--variant=minbase", "--include=ca-certificates,python3,python3-venv"]
    recipe = repr(
        [settings, options, SUITE, MIRROR, authorities, [(w.name, w.stat().st_size) for w in wheels]]
    )
    label = hashlib.sha256(recipe.encode()).hexdigest()
    known = ["images", "-q", "-f", f"reference={BASE}", "-f", f"label=pretrain.base={label}"]
    if engine.docker(*known):
        return

    with tempfile.TemporaryDirectory(prefix="pretrain-base-") as folder:
        root = Path(folder) / "root"
        made = subprocess.run(
            ["debootstrap", *options, SUITE, str(root), MIRROR], capture_output=True, text=True, timeout=400
        )
        if made.returncode != 0:
            raise Unavailable(f"debootstrap failed: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
        pip = configparser.RawConfigParser()
        pip["global"] = {**settings, "timeout": "180"}
        if authorities:
            (root / CERTIFICATES).write_bytes(authorities)
            pip["global"]["cert"] = f"/{CERTIFICATES}"
        pip["global"]["find-links"] = "/opt/wheels"
        (root / "opt/wheels").mkdir(parents=True)
        for wheel in wheels:
            shutil.copy(wheel, root / "opt/wheels")
        with (root / "etc/pip.conf").open("w") as file:
            pip.write(file)
        archive = Path(folder) / "base.tar"
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
        engine.docker("import", "--change", f"LABEL pretrain.base={label}", archive, BASE)


def build_image(engine: Engine) -> None:
    """Build the CPU target with `docker build` as documented, but on the host network, because there is no bridge."""
    make_base(engine)
    proxies = [
        f"--build-arg={name}" for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") if name in os.environ
    ]
    build = ["build", "--progress=plain", "--network=host", f"--build-arg=CPU_BASE={BASE}", *proxies]
    engine.docker(*build, "-f", DOCKERFILE, "--target", "cpu", "-t", IMAGE, ROOT, timeout_s=900)
    engine.docker("image", "prune", "-f")
    engine.docker("builder", "prune", "-f", "--keep-storage", "8gb")
