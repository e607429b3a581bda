"""The process group of a run: this process's rank, decisions that all ranks share, and the random state.

There is one process per rank. The launcher (`deepspeed`, `torchrun`, `srun`) sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; without them the process is the only rank.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.config.launched import launched_local_size, launched_rank, launched_world_size
from pretrain.device import Place, joint_problem, rank_place
from pretrain.errors import ConfigError, RunError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Process group for `gather_objects` and for checkpoints; None means the default process group."""
    sequence_ranks: int = 1
    """Number of neighboring ranks that share each sequence (`sequence_parallel.py`)."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the run's files."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Index of the reader to which this rank belongs. A reader is a group of ranks that share sequences."""
        return self.rank // self.sequence_ranks

    @property
    def n_readers(self) -> int:
        """Number of readers, each of which reads its own sequences."""
        return self.size // self.sequence_ranks

    @property
    def is_first_reader(self) -> bool:
        """Whether this is the first rank of its reader, the only one whose tokens are counted."""
        return self.rank % self.sequence_ranks == 0


def init_world(timeout_s: int, sequence_ranks: int = 1) -> World:
    """Join the process group of the run. A collective fails when it takes longer than `timeout_s` seconds.

    `sequence_ranks` is the number of ranks, all on one host, that share each sequence.

    Raises ConfigError where the ranks' devices or the settings do not fit together, and RunError where the ranks cannot
    meet at MASTER_ADDR:MASTER_PORT.
    """
    rank, size = launched_rank(), launched_world_size()
    if (launched_local_size() or sequence_ranks) % sequence_ranks:
        raise ConfigError(
            f"engine.sequence_parallel_ranks={sequence_ranks} does not divide the {launched_local_size()} ranks of a "
            "host, and ranks that share sequences must be on one host; change one of the two"
        )
    timeout, place = timedelta(seconds=timeout_s), rank_place()
    store = _store(rank, size, timeout) if size > 1 else dist.HashStore()
    _check_places(place, rank, size, store)
    local_rank, device = int(os.environ.get("LOCAL_RANK", "0")), torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed chooses its GPU by this variable
        backend = "cpu:gloo,cuda:nccl"  # gloo carries checkpoints and decisions, which are in host memory
    else:
        backend = "gloo"
        _tune_cpu()
    if size == 1:
        # DeepSpeed reads these variables even with a single rank.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank=rank, size=size, local_rank=local_rank, device=device, sequence_ranks=sequence_ranks)


def _check_places(mine: Place, rank: int, size: int, store: dist.Store) -> None:
    """Raise the same ConfigError on every rank where the ranks cannot train together on their devices."""
    store.set(f"place/{rank}", json.dumps(mine))
    if rank == 0:
        places = [Place(*json.loads(store.get(f"place/{other}"))) for other in range(size)]
        store.set("places", joint_problem(places) or "fit")
    verdict = store.get("places").decode()
    if verdict == "fit":
        return
    deadline = time.monotonic() + 10
    store.add("told", 1)
    while rank == 0 and store.add("told", 0) < size and time.monotonic() < deadline:
        # The store disappears with this process, and other ranks may not have read the verdict yet.
        time.sleep(0.05)
    raise ConfigError(verdict)


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store in which the ranks meet. Rank 0 listens on MASTER_ADDR:MASTER_PORT only; torch would listen everywhere.

    torch.distributed does not authenticate who connects, so its sockets must not be reachable from outside: they use
    the loopback interface on a single host, and the interface of MASTER_ADDR otherwise. GLOO_SOCKET_IFNAME and
    NCCL_SOCKET_IFNAME are left as they are where they are set. Raises ConfigError and RunError.
    """
    one_host = launched_local_size() == size
    host = "127.0.0.1" if one_host else os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RunError(f"this host cannot resolve MASTER_ADDR={host} ({error.strerror})") from error
    interface = "lo" if one_host else _interface_towards(family, address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens itself
        return dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
    if (
        host != address[0]
        and ipaddress.ip_address(address[0]).is_loopback
        and launched_local_size() not in (None, size)
    ):
        raise ConfigError(
            f"MASTER_ADDR={host} resolves to {address[0]} on its own host, which other hosts cannot reach; give an "
            "address that they can reach, or correct /etc/hosts"
        )
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        raise RunError(
            f"rank 0 cannot listen on {address[0]} port {port} ({error.strerror}); MASTER_ADDR must be an address "
            "of its host and MASTER_PORT a free port"
        ) from error
    return dist.TCPStore(
        host, port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
    )


def _interface_towards(family: int, address: tuple[Any, ...]) -> str | None:
    """Name of the network interface by which this host reaches an address; None where it cannot be found."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a UDP socket sends nothing
        try:
            probe.connect(address)
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex() if family == socket.AF_INET else []:
            try:
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                return name
    return None


def _tune_cpu() -> None:
    """Divide the cores among this host's ranks, and let the allocator keep freed memory.

    By default, glibc maps and unmaps memory for every large tensor, and the page faults slow down each step.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (launched_local_size() or 1)))
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping per allocation
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: freed memory is kept


def shutdown_world() -> None:
    """Leave the process group together with all other ranks, so that the launcher sees every rank's own exit code."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float | torch.Tensor], world: World) -> list[float]:
    """Element-wise sums over all ranks in fp64, the same on every rank. Waits for the device only once."""
    given = [0.0 if isinstance(value, torch.Tensor) else value for value in values]
    tensor = torch.tensor(given, dtype=torch.float64, device=world.device)
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            tensor[place] = value
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


class Vote:
    """Finds out whether any rank says yes, without making the ranks wait for each other.

    `last` starts a vote and returns the result of the previous one. All ranks must call it at the same points. The
    votes have their own process group on the hosts, so they never wait for a device.
    """

    def __init__(self, mine: Callable[[], bool], world: World) -> None:
        self._mine, self._world = mine, world
        self._group = with_own_group(world).group
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def last(self) -> bool:
        """Start a vote, and return whether any rank said yes in the vote before it."""
        if self._world.size == 1:
            return self._mine()
        answer = self._collect()
        votes = torch.tensor([int(self._mine())])
        self._pending = (dist.all_reduce(votes, group=self._group, async_op=True), votes)
        return answer

    def now(self) -> bool:
        """Whether any rank says yes now. Waits for all ranks."""
        self.last()
        return self._collect() if self._world.size > 1 else self._mine()

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        work, votes = self._pending
        self._pending = None
        work.wait()
        return int(votes) > 0


def gather_objects(value: Any, world: World) -> list[Any]:
    """The values of all ranks in rank order, returned on every rank. The values should be small, and are pickled."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value, group=world.group)
    return gathered


def with_own_group(world: World) -> World:
    """The same ranks with a new process group, for a thread that communicates while training does.

    All ranks must call this together.
    """
    return replace(world, group=dist.new_group(backend="gloo"))


def on_main(action: Callable[[], T], world: World) -> T:
    """Run `action` on rank 0 only, and return its result, or raise its ConfigError, on every rank."""
    value, problem = None, None
    if world.is_main:
        try:
            value = action()
        except ConfigError as error:
            problem = str(error)
    value, problem = gather_objects((value, problem), world)[0]
    if problem is not None:
        raise ConfigError(problem)
    return value


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch with a function of (seed, step, rank), so that a checkpoint need not store random state."""
    # Distinct odd multipliers (the constants of splitmix64) give neighboring steps and ranks unrelated seeds.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)


@dataclass(frozen=True)
class Partition:
    """This rank's part of one flattened fp32 tensor: elements [rank c, rank c + len) with c = ceil(numel / ranks)."""

    values: torch.Tensor
    """A 1-D copy in host memory. It is shorter, or empty, on the last ranks."""
    numel: int
    """Number of elements of the whole tensor."""


def share(numel: int, world: World) -> tuple[int, int]:
    """The elements [start, stop) of a flattened tensor with `numel` elements that ZeRO-3 assigns to this rank."""
    per_rank = -(-numel // world.size)
    start = min(world.rank * per_rank, numel)
    return start, min(start + per_rank, numel)
