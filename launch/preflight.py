"""Check that every node of a job is fit to train. The batch script of launch/submit.py runs this before each start.

One process per node checks the node and its links, and writes folder/start/NODE.json. Every check has a time limit, so
nothing can hang:

    srun --ntasks-per-node=1 python launch/preflight.py folder=DIR start=1 run_dir=DIR nodes="node1 node2" ...

A single process with `judge=true` then reads the reports of this start and of earlier starts (the other folders),
reports on stderr what is wrong, and prints the names of the nodes to exclude. Exit codes: 0 every node is fit; 10 some
nodes are unfit and are named; 1 something is wrong, but no single node is to blame. PreflightConfig in
pretrain/config/cluster.py has the checks and their limits.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__)

from omegaconf import MISSING

from pretrain.config import PreflightConfig, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.files import write_atomically

MIB, GIB = 2**20, 2**30
PROBE_BYTES = 64 * MIB
PROBE_S = 3.0
"""Limits of measuring a disk or a link: it ends after PROBE_BYTES of data or PROBE_S seconds, whichever comes first."""
NAMED = 10
SIOCGIFADDR = 0x8915


@dataclass(kw_only=True, slots=True)
class Preflight(PreflightConfig):
    """One start of a job, as one of its nodes sees it."""

    folder: PathText = MISSING
    """Folder for the reports of the submission. It has one folder per start of a job."""
    start: str = MISSING
    """Name of this start's folder."""
    run_dir: PathText = MISSING
    """Folder of the run."""
    nodes: str = MISSING
    """Names of all nodes of the job in the order of their ranks, separated by spaces."""
    gpus_per_node: int = 0
    """Number of GPUs that each node must have."""
    network_interface: str | None = None
    """Network interface over which the nodes communicate; null means the one that leads to the first node."""
    judge: bool = False
    """Read the reports of all nodes instead of writing one."""

    @property
    def reports(self) -> Path:
        """Folder of this start's reports."""
        return Path(self.folder) / self.start


class Unfit(Exception):
    """A node failed a check; the text says why in one sentence."""


class Report:
    """The results of this node's checks so far. It is written after every check, so it shows where a node died."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.checks: dict[str, dict[str, Any]] = {}
        self.links: dict[str, str] = {}
        """Maps another node to what is wrong with the link to it."""

    def write(self, running: str | None) -> None:
        """Replace the report on disk. `running` is the check that starts next."""
        content = {"checks": self.checks, "links": self.links, "running": running}
        write_atomically(self._path, (json.dumps(content, indent=1) + "\n").encode())

    def run(self, name: str, check: Callable[[], dict[str, Any]], timeout_s: float) -> None:
        """Run one check in a thread, which is abandoned when it takes too long, and record the result."""
        self.write(running=name)
        result: dict[str, Any] = {}

        def body() -> None:
            try:
                result.update(ok=True, **check())
            except Exception as error:  # any error means that the node is not fit
                kind = "" if isinstance(error, Unfit | OSError) else f"{type(error).__name__}: "
                result.update(ok=False, reason=" ".join(f"{kind}{error}".split()))

        started = time.monotonic()
        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(timeout_s)
        hung = {"ok": False, "reason": f"no answer within {timeout_s:g} s"}
        self.checks[name] = (dict(result) or hung) | {"time_s": round(time.monotonic() - started, 3)}

    @property
    def fit(self) -> bool:
        return all(check["ok"] for check in self.checks.values())


# ---- this node alone -------------------------------------------------------------------------------------------------


def at_least(value: float, limit: float, what: str, unit: str) -> dict[str, Any]:
    """The result of a check that measured `value`. Raises Unfit where it is below `limit`."""
    if value < limit:
        raise Unfit(f"{what} is {value:.1f} {unit}, less than {limit:g} {unit}")
    return {"value": round(value, 1), "unit": unit}


def check_memory(job: Preflight) -> dict[str, Any]:
    """Check the host memory that is available to a new process."""
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.M)
    assert available is not None
    return at_least(int(available[1]) * 1024 / GIB, job.min_memory_gib, "available memory", "GiB")


def check_space(folder: Path, limit_gib: float) -> dict[str, Any]:
    """Check the free space of a folder's file system."""
    return at_least(shutil.disk_usage(folder).free / GIB, limit_gib, f"free space in {folder}", "GiB")


def check_write(folder: Path, limit: float) -> dict[str, Any]:
    """Check how fast a file is written to the run folder, including fsync."""
    path = folder / f".preflight-{os.uname().nodename}-{os.getpid()}"
    block, written, started = os.urandom(MIB), 0, time.monotonic()
    try:
        with path.open("xb", buffering=0) as file:
            while written < PROBE_BYTES and time.monotonic() - started < PROBE_S:
                written += file.write(block)
            os.fsync(file.fileno())
        rate = written / MIB / (time.monotonic() - started)
    finally:
        path.unlink(missing_ok=True)
    return at_least(rate, limit, f"writing to {folder}", "MiB/s")


def check_gpus(job: Preflight) -> dict[str, Any]:
    """Check the number of GPUs, their uncorrected memory errors, and that each multiplies matrices exactly."""
    query = "--query-gpu=index,name,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise Unfit(f"{job.gpus_per_node} GPUs are expected, but there is no nvidia-smi") from error
    if listed.returncode != 0:
        raise Unfit(f"nvidia-smi: {listed.stdout.strip() or listed.stderr.strip()}")
    for line in listed.stdout.splitlines():
        index, name, errors = (field.strip() for field in line.split(","))
        if errors.isdigit() and int(errors) > 0:
            raise Unfit(f"GPU {index} ({name}) has {errors} uncorrected memory errors")
    import torch

    found = torch.cuda.device_count()
    if found != job.gpus_per_node:
        raise Unfit(f"{found} GPUs are usable, {job.gpus_per_node} are expected")
    # The numbers are small integers, so every product and sum is exact in all of the GPU's formats.
    a = torch.randint(-2, 3, (2048, 2048), generator=torch.Generator().manual_seed(0)).float()
    right = a @ a.T
    for index in range(found):
        on_gpu = a.to(f"cuda:{index}")
        if not torch.equal((on_gpu @ on_gpu.T).cpu(), right):
            raise Unfit(f"GPU {index} multiplies wrongly")
    return {"value": found, "unit": "GPUs"}


def check_alone(job: Preflight, report: Report) -> None:
    """Run all checks that need no other node."""
    run_dir, temporary = Path(job.run_dir), Path(tempfile.gettempdir())
    limit_s = job.check_timeout_s
    report.run("memory", lambda: check_memory(job), limit_s)
    report.run("run_dir_space", lambda: check_space(run_dir, job.min_run_dir_gib), limit_s)
    report.run("tmpdir_space", lambda: check_space(temporary, job.min_tmpdir_gib), limit_s)
    report.run("write", lambda: check_write(run_dir, job.min_write_mib_per_second), limit_s)
    if job.gpus_per_node:
        report.run("gpus", lambda: check_gpus(job), limit_s)


# ---- between nodes ---------------------------------------------------------------------------------------------------


def own_address(interface: str | None) -> str:
    """The address at which other nodes reach this one: that of `interface`, or of the one that leads to the first
    node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface is None:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # connecting a UDP socket sends nothing
            address = probe.getsockname()[0]
            return os.environ["MASTER_ADDR"] if address.startswith("127.") else address
        packed = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, packed)[20:24])
        except OSError as error:
            raise Unfit(f"network interface {interface}: {error.strerror}") from error


def answer(listener: socket.socket) -> None:
    """Serve one call of `measure_link`: send the time whenever asked, then receive data until it ends."""
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1) == b"t":
            connection.sendall(struct.pack("!d", time.time()))
        while connection.recv(MIB):
            pass
        connection.sendall(b"e")


def measure_link(address: str, timeout_s: float) -> tuple[float, float]:
    """Seconds by which another node's clock is ahead of this one's, and the speed of sending to it in MiB/s."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        samples = []
        for _ in range(9):
            asked = time.time()
            connection.sendall(b"t")
            theirs = struct.unpack("!d", connection.recv(8, socket.MSG_WAITALL))[0]
            now = time.time()
            samples.append((now - asked, theirs - (asked + now) / 2))
        connection.sendall(b"d")
        block, sent, started = bytes(MIB), 0, time.monotonic()
        while sent < PROBE_BYTES and time.monotonic() - started < PROBE_S:
            sent += connection.send(block)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        rate = sent / MIB / (time.monotonic() - started)
    return min(samples)[1], rate


class Meeting:
    """All nodes of the job, which exchange data through a store on the first node."""

    def __init__(self, job: Preflight, rank: int, names: list[str], timeout_s: float) -> None:
        from torch.distributed import TCPStore

        self.rank, self.names, self.timeout_s = rank, names, timeout_s
        limit = timedelta(seconds=timeout_s)
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(*where, is_master=rank == 0, timeout=limit, wait_for_workers=False)

    def gather(self, key: str, value: str) -> dict[str, str]:
        """Publish `value` under `key`, and return the values of all nodes by name, without those that are too late."""
        self.store.set(f"{key}/{self.rank}", value)
        deadline = time.monotonic() + self.timeout_s
        said = {}
        for rank, name in enumerate(self.names):
            left = max(0.1, deadline - time.monotonic())
            try:
                self.store.wait([f"{key}/{rank}"], timedelta(seconds=left))
                said[name] = self.store.get(f"{key}/{rank}").decode()
            except RuntimeError:  # a DistStoreError: the value did not arrive in time
                continue
        return said

    def leave(self) -> None:
        """End the meeting. The first node holds the store, so it waits until all others are done."""
        if self.rank == 0:
            self.gather("end", "")
        else:
            self.store.set(f"end/{self.rank}", "")


def check_links(job: Preflight, report: Report, meeting: Meeting, listener: socket.socket) -> dict[str, Any]:
    """Check the clock offset and the bandwidth between this node and the next one in the ring of nodes."""
    port = listener.getsockname()[1]
    threading.Thread(target=answer, args=(listener,), daemon=True).start()
    addresses = meeting.gather("address", f"{own_address(job.network_interface)}:{port}")
    absent = [name for name in meeting.names if name not in addresses]
    if absent:
        report.links.update(dict.fromkeys(absent, f"it did not come within {meeting.timeout_s:g} s"))
        return {"absent": absent}
    following = meeting.names[(meeting.rank + 1) % len(meeting.names)]
    figures: dict[str, Any] = {"to": following}
    problem = None
    try:
        ahead_s, rate = measure_link(addresses[following], meeting.timeout_s)
        figures |= {"clock_ahead_s": round(ahead_s, 4), "mib_per_second": round(rate, 1)}
        if abs(ahead_s) > job.max_clock_offset_s:
            problem = f"the clocks differ by {abs(ahead_s):.1f} s, more than {job.max_clock_offset_s:g} s"
        elif rate < job.min_network_mib_per_second:
            problem = (
                f"the network gives {rate:.1f} MiB/s, less than {job.min_network_mib_per_second:g} MiB/s"
            )
    except OSError as error:
        problem = f"no connection to {addresses[following]} ({error})"
    if problem is not None:
        report.links[following] = problem
    meeting.gather("links", "done")  # wait until all nodes have measured
    return figures


def check_collective(job: Preflight, meeting: Meeting) -> dict[str, Any]:
    """Check sums over all nodes with gloo, and with NCCL where there are GPUs. Every element must be right."""
    import torch
    import torch.distributed as dist

    size, limit = len(meeting.names), timedelta(seconds=meeting.timeout_s)
    dist.init_process_group("gloo", store=meeting.store, rank=meeting.rank, world_size=size, timeout=limit)
    groups = [("gloo", "cpu", dist.group.WORLD)]
    if job.gpus_per_node:
        groups.append(("nccl", "cuda:0", dist.new_group(backend="nccl", timeout=limit)))
    figures = {}
    for backend, device, group in groups:
        started = time.monotonic()
        for factor in range(1, 4):
            ours = torch.arange(MIB, device=device, dtype=torch.float64) * factor * (meeting.rank + 1)
            dist.all_reduce(ours, group=group)
            right = torch.arange(MIB, dtype=torch.float64) * factor * (size * (size + 1) // 2)
            if not torch.equal(ours.cpu(), right):
                raise Unfit(f"an all_reduce by {backend} gave a wrong sum")
        figures[f"{backend}_s"] = round(time.monotonic() - started, 3)
    return figures


def check_together(job: Preflight, report: Report, rank: int, names: list[str]) -> None:
    """Run all checks between nodes. The collective is skipped when a node is unfit, since then nobody will train."""
    limit_s = job.check_timeout_s
    met: list[Meeting] = []

    def meet() -> dict[str, Any]:
        met.append(Meeting(job, rank, names, limit_s))
        return {}

    report.run("meeting", meet, 2 * limit_s)
    if not report.checks["meeting"]["ok"]:
        reason = report.checks.pop("meeting")["reason"]
        report.links[names[0]] = f"{os.environ['MASTER_ADDR']} cannot be reached ({reason})"
        return
    [meeting] = met
    listener = socket.create_server(("", 0))
    report.run("links", lambda: check_links(job, report, meeting, listener), 3 * limit_s)
    absent = report.checks["links"].get("absent")
    fit = {} if absent else meeting.gather("fit", str(int(report.fit and not report.links)))
    if set(fit.values()) == {"1"} and len(fit) == len(names):
        report.run("collective", lambda: check_collective(job, meeting), limit_s)
    report.write(running=None)
    meeting.leave()


# ---- the verdict -----------------------------------------------------------------------------------------------------


def unfit_nodes(names: list[str], starts: list[dict[str, Any]], refused: list[str]) -> dict[str, str]:
    """The nodes that the job must do without, each with the reason.

    `starts` are the reports of all starts by node, the last being those of this start. `refused` are the nodes on which
    Slurm could not start a task; it then also ended the tasks of the other nodes.

    A failed link has two ends. The end with more failed links, including those of earlier starts, is blamed. Of equal
    ends the later one in `names` is blamed, so that a wrong guess shows at the next start.
    """
    if refused:
        return dict.fromkeys(refused, "Slurm could not start a task there")
    now = starts[-1]
    unfit: dict[str, str] = {}
    for name in names:
        report = now.get(name)
        if report is None:
            unfit[name] = "no report"
        elif report["running"] is not None:
            unfit[name] = f"died or hung while checking {report['running']}"
        else:
            failed = {
                k: c["reason"] for k, c in report["checks"].items() if not c["ok"] and k != "collective"
            }
            if failed:
                unfit[name] = "; ".join(f"{check}: {reason}" for check, reason in failed.items())
    past = Counter(
        node for start in starts for end, r in start.items() for other in r["links"] for node in (end, other)
    )
    links = [(end, other, why) for end, r in now.items() for other, why in r["links"].items()]
    links = [link for link in links if not {link[0], link[1]} & set(unfit)]
    while links:
        ends = Counter(node for link in links for node in link[:2])
        worst = max(ends, key=lambda node: (ends[node] + past[node], names.index(node)))
        unfit[worst] = "; ".join(f"{a} to {b}: {why}" for a, b, why in links if worst in (a, b))
        links = [link for link in links if worst not in link[:2]]
    return unfit


def report_unfit_nodes(job: Preflight) -> int:
    """Report what is wrong with the nodes, and return the exit code that the module's docstring describes."""
    names, here = job.nodes.split(), job.reports
    here.mkdir(parents=True, exist_ok=True)  # it does not exist if no node has written a report
    folders = sorted((p for p in here.parent.iterdir() if p != here), key=lambda p: p.stat().st_mtime)
    starts = [
        {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        for folder in [*folders, here]
    ]
    log = here / "srun.log"
    refused = re.findall(r"failed on node (\S+): ", log.read_text(errors="replace")) if log.exists() else []
    unfit = unfit_nodes(names, starts, refused)
    for name, reason in unfit.items():
        print(f"preflight: {name} is not fit: {reason}", file=sys.stderr)
    if unfit and (len(unfit) < len(names) or len(names) == 1):
        print(" ".join(unfit))
        return NAMED
    sums = {name: report["checks"].get("collective", {"ok": True}) for name, report in starts[-1].items()}
    failed = {name: check["reason"] for name, check in sums.items() if not check["ok"]}
    for name, reason in failed.items():
        print(f"preflight: the collective failed on {name}: {reason}", file=sys.stderr)
    if unfit:
        print(
            "preflight: no node is fit, so the cause must be the limits or the network, not the nodes",
            file=sys.stderr,
        )
    if not unfit and not failed:
        print(f"preflight: {len(names)} nodes are fit ({_figures(starts[-1])})", file=sys.stderr)
    return 1 if unfit or failed else 0


def _figures(reports: dict[str, Any]) -> str:
    """A summary of the measurements, for the log."""
    text = f"writing at least {min(report['checks']['write']['value'] for report in reports.values())} MiB/s"
    links = [report["checks"]["links"] for report in reports.values() if "links" in report["checks"]]
    if links:
        text += f", network at least {min(link['mib_per_second'] for link in links)} MiB/s"
        text += f", clocks within {max(abs(link['clock_ahead_s']) for link in links)} s"
    return text


def preflight(job: Preflight) -> int:
    """Check this node or, with `judge`, read the reports of all nodes."""
    if job.judge:
        return report_unfit_nodes(job)
    names, name = job.nodes.split(), os.environ["SLURMD_NODENAME"]
    if name not in names:
        raise ConfigError(f"nodes={job.nodes} does not name this node, {name}")
    job.reports.mkdir(parents=True, exist_ok=True)
    report = Report(job.reports / f"{name}.json")
    check_alone(job, report)
    if len(names) > 1:
        check_together(job, report, names.index(name), names)
    report.write(running=None)
    os._exit(0)  # end even if the thread of a check still hangs


if __name__ == "__main__":
    run_command(Preflight, preflight, doc=__doc__)
