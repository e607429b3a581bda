"""Simulates several hosts on one machine, each in its own namespaces, with real sshd, munge, slurmctld and slurmd.

A host has its own network, host name, processes, shared memory and mounts. All hosts use the machine's disk, like a
shared file system. Their processes cannot see the machine's network: a bridge inside the head's namespace joins the
hosts and has no way out. Nothing has to be cleaned up by name. Namespaces, mounts and network cards disappear with a
host's first process, which is killed when the process that made the Cluster ends, for whatever reason.

    with Cluster(folder, n_nodes=2) as cluster:
        cluster.head.run("srun", "--nodes=2", "hostname")
        cluster.nodes[1].power_off(silent=True)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
NETWORK = "10.77.0"
PROGRAMS = "slurmctld slurmd sbatch munged sshd ssh ssh-keygen pdsh ip unshare nsenter setpriv".split()
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SSHD = """\
HostKey {folder}/etc/ssh/host_key
AuthorizedKeysFile {folder}/etc/ssh/id.pub
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
PidFile none
"""
SSH = """\
Host *
  IdentityFile {folder}/etc/ssh/id
  IdentitiesOnly yes
  StrictHostKeyChecking accept-new
  UserKnownHostsFile {folder}/known_hosts
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
SLURM = """\
ClusterName=tests
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as its credential lives; the default would be two minutes.
AuthInfo=cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# By parent process: cgroups would outlive a host.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
TmpFS={folder}/local
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
SlurmctldParameters={parameters}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={slurmd_timeout_s}
KillWait=10
MessageTimeout=5
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=node[1-{n_nodes}] CPUs=4 CoresPerSocket=4 RealMemory=4000 State=UNKNOWN
PartitionName=batch Nodes=node[1-{n_nodes}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node[1-{n_nodes}] PriorityTier=10 PreemptMode=OFF
"""


def unavailable() -> str | None:
    """The reason why this machine cannot run such hosts, or None if it can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; bash tests/install_system.sh installs them"
    probe = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--mount-proc", "mount"]
    tried = subprocess.run(
        [*probe, "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> float:
    """Wait until a condition is true. Returns the seconds it took. Raises TimeoutError, which names the condition."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - started


class Host:
    """One host, which can be switched on and off."""

    def __init__(self, cluster: Cluster, name: str, number: int, daemon: str) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self._cluster = cluster
        self._number = number
        self._daemon = daemon
        self._holder: subprocess.Popen[bytes] | None = None  # `unshare`, parent of the host's first process
        self._init = 0  # id of the first process in the machine's namespace

    def boot(self) -> None:
        """Switch the host on. Returns when it answers ssh from the head."""
        folder = self._cluster.folder
        namespaces = "--net --uts --ipc --pid --mount --fork --kill-child --mount-proc".split()
        with (folder / "log" / f"{self.name}.log").open("ab") as log:
            self._holder = subprocess.Popen(
                # setpriv makes the kernel kill the host when this process dies, for whatever reason.
                ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, *self._first_process()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH},
                start_new_session=True,
            )
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        wait_until(lambda: bool(children.read_text().split()), f"{self.name} has a first process", 10)
        self._init = int(children.read_text().split()[0])
        # Until the first process has left the machine's namespaces, changing its network would change the machine's.
        ours = os.readlink("/proc/self/ns/net")
        wait_until(
            lambda: os.readlink(f"/proc/{self._init}/ns/net") != ours, f"{self.name} has a network", 10
        )
        self._plug_in()
        wait_until(self._answers, f"{self.name} answers to ssh; see {folder}/log", 30)

    def _first_process(self) -> list[str]:
        return [str(HERE / "host_init.sh"), str(self._cluster.folder), self.name, self._daemon]

    def _plug_in(self) -> None:
        head = self._cluster.head
        self._ip("link set lo up")
        if self is head:
            self._ip("link add eth0 type bridge")
        else:
            port = f"port{self._number}"
            if head._has_port(port):  # left from an earlier boot, and perhaps still being removed
                head._ip(f"link delete {port}", check=False)
                wait_until(lambda: not head._has_port(port), f"{port} is free", 20)
            # The hardware address is the same after every boot, because peers remember it.
            card = f"address 02:00:00:00:77:{self._number:02x}"
            head._ip(f"link add {port} type veth peer name eth0 {card} netns {self._init}")
            head._ip(f"link set {port} master eth0 up")
        self._ip(f"address add {self.address}/24 dev eth0")
        self._ip("link set eth0 up")

    def _has_port(self, name: str) -> bool:
        return self._ip(f"link show {name}", check=False).returncode == 0

    def _ip(self, words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `ip` on this host's network from outside, so that it also works while the host starts."""
        command = ["nsenter", "--target", str(self._init), "--net", "ip", *words.split()]
        return subprocess.run(command, check=check, capture_output=True, text=True)

    def _answers(self) -> bool:
        assert self._holder is not None
        assert self._holder.poll() is None, f"{self.name} did not start; see {self._cluster.folder}/log"
        return self._cluster.head.run("ssh", self.name, "true", check=False).returncode == 0

    @property
    def is_on(self) -> bool:
        return self._holder is not None and self._holder.poll() is None

    def unplug(self) -> None:
        """Pull the network cable: the host can neither send nor receive."""
        self._cluster.head._ip(f"link set port{self._number} down")

    def plug(self) -> None:
        """Put the cable back."""
        self._cluster.head._ip(f"link set port{self._number} up")

    def limit_network(self, megabits_per_second: int | None) -> None:
        """Limit the rate at which the host sends; None means no limit. A limit prolongs a run without changing it."""
        subprocess.run(self._tc("del", "dev", "eth0", "root"), check=False, capture_output=True)
        if megabits_per_second is not None:
            rate = f"tbf rate {megabits_per_second}mbit burst 64kb latency 400ms"
            subprocess.run(self._tc("add", "dev", "eth0", "root", *rate.split()), check=True)

    def _tc(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--net", "tc", "qdisc", *words]

    def power_off(self, *, silent: bool = False) -> None:
        """Kill every process at once. With `silent`, pull the cable first, so that peers see no closed connection."""
        if silent:
            self.unplug()
        if self._holder is not None:
            self._kill()
            self._holder.wait()
            wait_until(lambda: not Path(f"/proc/{self._init}").exists(), f"{self.name} is off", 20)
            self._holder = None

    def _kill(self) -> None:
        if self._holder is not None:
            self._holder.kill()  # --kill-child then kills the first process, and with it all others

    def reboot(self) -> None:
        """Switch the host off and on again."""
        self.power_off()
        self.boot()

    def command(self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> list[str]:
        """The command line that runs `words` on this host with exactly this environment."""
        enter = ["nsenter", "--target", str(self._init), "--mount", "--uts", "--ipc", "--net", "--pid"]
        variables = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", **(env or {})}
        settings = [f"{name}={value}" for name, value in variables.items()]
        return [*enter, "env", "-i", "-C", str(cwd or self._cluster.folder), *settings, *words]

    def run(
        self,
        *words: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and wait for its end. `stdout` of the result has the output of both streams."""
        done = subprocess.run(
            self.command(*words, cwd=cwd, env=env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{self.name}: {words} gave {done.returncode}: {done.stdout}"
        )
        return done

    def start(
        self, *words: str, log: Path, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command whose output of both streams goes to a file."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(*words, cwd=cwd, env=env), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )


class Cluster:
    """A head, which runs slurmctld and accepts logins, and nodes, which run slurmd."""

    def __init__(
        self, folder: Path, *, n_nodes: int, warn_of_preemption: bool = True, slurmd_timeout_s: int = 15
    ) -> None:
        self.folder = folder
        self.head = Host(self, "head", 1, "slurmctld")
        self.nodes = [Host(self, f"node{i}", 10 + i, "slurmd") for i in range(1, n_nodes + 1)]
        for name in ("etc/slurm", "etc/ssh", "log", "state", "spool", "local"):
            (folder / name).mkdir(parents=True)
        self._configure(warn_of_preemption, slurmd_timeout_s)

    def _configure(self, warn_of_preemption: bool, slurmd_timeout_s: int) -> None:
        etc = self.folder / "etc"
        lines = ["127.0.0.1 localhost"] + [f"{host.address} {host.name}" for host in [self.head, *self.nodes]]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        for key in ("id", "host_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / "ssh" / key)]
            subprocess.run(make, check=True)
        (etc / "ssh" / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (etc / "ssh" / "ssh_config").write_text(SSH.format(folder=self.folder))
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(256))
        (self.folder / "munge.key").chmod(0o400)
        parameters = "preempt_send_user_signal" if warn_of_preemption else "idle_on_node_suspend"
        text = SLURM.format(
            folder=self.folder,
            n_nodes=len(self.nodes),
            parameters=parameters,
            slurmd_timeout_s=slurmd_timeout_s,
        )
        (etc / "slurm" / "slurm.conf").write_text(text)
        (etc / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def __enter__(self) -> Cluster:
        try:
            self.head.boot()
            for node in self.nodes:
                node.boot()
            self.wait_idle(len(self.nodes))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Switch off all hosts."""
        hosts = [*self.nodes, self.head]
        for host in hosts:
            host._kill()
        for host in hosts:
            with contextlib.suppress(TimeoutError):
                host.power_off()

    def idle_nodes(self) -> list[str]:
        """Names of the nodes that Slurm could give to a job now."""
        listed = self.head.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%n", check=False)
        return sorted(set(listed.stdout.split())) if listed.returncode == 0 else []

    def wait_idle(self, n_nodes: int, timeout_s: float = 60) -> None:
        """Wait until this number of nodes is idle."""
        wait_until(lambda: len(self.idle_nodes()) >= n_nodes, f"{n_nodes} idle nodes", timeout_s)

    def job(self, job_id: str) -> dict[str, str]:
        """Slurm's description of a job: JobState, ExitCode, NodeList, Restarts, Reason, ExcNodeList and so on."""
        shown = self.head.run("scontrol", "--oneliner", "show", "job", job_id, check=False).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def restart_slurmctld(self, down_s: float = 0) -> None:
        """Kill the controller, as a crash would, and start it again after `down_s` seconds."""
        self.head.run("bash", "-c", "kill -9 $(cat /run/slurm/slurmctld.pid)")
        time.sleep(down_s)
        self.head.run("slurmctld")
        wait_until(lambda: self.head.run("sinfo", check=False).returncode == 0, "slurmctld answers", 30)
