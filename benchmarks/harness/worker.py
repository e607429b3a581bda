"""One process of a benchmark run: its job, the tokens that it trains on, and its report.

This module imports only torch and `collectives`, so that other programs can be measured in environments of their own. A
runner (benchmarks/runners/, benchmarks/peers/) builds a model, passes `Meter.measure` a function that does one
optimizer step, and calls `Meter.report`.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.collectives import Traffic, counted, watch
from pretrain.device import device_type
from pretrain.files import write_atomically
from pretrain.reliability.processes import own_memory_bytes

PARTS = ("data", "forward", "backward", "communication", "optimizer", "rest")
"""The parts of a step, in the order of the table. Runners mark them, except communication, which is measured by the
wrapped collectives, and rest, which is the remaining time."""
TURNS_PORT = "BENCH_TURNS_PORT"
"""Environment variable with the port at which a process asks for each step, if several runs take turns."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one variant. All values are plain JSON values."""

    runner: str
    ranks: int
    threads: int
    """Number of threads per rank."""
    warmup_steps: int
    """Number of steps before the timed ones, in which code is compiled and memory allocated."""
    steps: int
    """Number of timed steps."""
    counted_steps: int
    """Number of instrumented steps after the timed ones, which measure the parts of a step and the bytes moved."""
    model: dict[str, Any]
    """The keys n_layers, d_model, n_heads, n_kv_heads, d_head, d_ff, vocab_size, rope_theta, norm_eps and init_std."""
    optim: dict[str, Any]
    """The keys lr, beta1, beta2, eps, weight_decay and max_grad_norm."""
    compile: str
    """Whether to compile the model: auto (only on a GPU), always or never."""
    sequence_length: int
    global_batch_sequences: int
    micro_batch_sequences: int
    grad_accum_steps: int
    seed: int
    in_turns: bool
    """Whether the runs of all variants take turns, one step each."""
    config: dict[str, Any]
    """The whole configuration, for runners that build a TrainConfig."""

    @property
    def all_steps(self) -> int:
        """Number of optimizer updates in the run."""
        return self.warmup_steps + self.steps + self.counted_steps


def read_job() -> tuple[Job, Path]:
    """The job from the file in the first argument, and the folder for this rank's report. Also calls `watch`."""
    watch()
    path = Path(sys.argv[1])
    return Job(**json.loads(path.read_text())), path.parent


def launched() -> tuple[int, int]:
    """Rank and number of ranks."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_compiled(job: Job) -> bool:
    """Whether this variant compiles its model on this device."""
    return job.compile == "always" or (job.compile == "auto" and device_type() == "cuda")


def own_tokens(job: Job, step: int, rank: int) -> torch.Tensor:
    """This rank's sequences of update `step`, counted from 0, with one token more than their length: int64 [B, T + 1].

    All variants see the same tokens, on any number of ranks. Token k has a probability proportional to 1 / (k + 1),
    like words in a language (Zipf, 1935), so that there is something to learn and the loss falls.
    """
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step)
    share = 1.0 / torch.arange(1, job.model["vocab_size"] + 1, dtype=torch.float64)
    size = (job.global_batch_sequences, job.sequence_length + 1)
    drawn = torch.multinomial(share, size[0] * size[1], replacement=True, generator=generator).view(size)
    per_rank = job.global_batch_sequences // job.ranks
    return drawn[rank * per_rank : (rank + 1) * per_rank]


class Meter:
    """Times the steps of one process, then instruments a few more."""

    def __init__(self, job: Job, folder: Path, device: torch.device) -> None:
        self.job, self._folder, self._device = job, folder, device
        self._rank, self._size = launched()
        self._step = 0
        self._started = 0.0
        self._seconds: list[float] = []
        self._losses: list[Any] = []
        self._memory_bytes = 0
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._traffic = Traffic(device)
        self._counting = ExitStack()
        self._within = False
        port = os.environ.get(TURNS_PORT)
        self._turns = socket.create_connection(("127.0.0.1", int(port))) if port else None

    def measure(self, train_step: Callable[[int], torch.Tensor | float]) -> None:
        """Do all steps. `train_step(n)`, with n counted from 0, returns the mean loss over this rank's tokens."""
        for step in range(self.job.all_steps):
            self.begin()
            self.end(train_step(step))

    def begin(self) -> None:
        """Start a step, after waiting for this run's turn."""
        if self._turns is not None:
            self._turns.sendall(b"?")
            self._turns.recv(1)
        first_timed = self.job.warmup_steps
        if self._step == first_timed:
            if self._size > 1 and dist.is_initialized():
                dist.barrier()
            reset_peak_memory(self._device)
        elif self._step == first_timed + self.job.steps:
            self._memory_bytes = peak_memory_bytes(self._device)
            self._counting.enter_context(counted(self._traffic))
        self._started = self._now()

    def end(self, loss: torch.Tensor | float) -> None:
        """End a step with this mean loss."""
        self._seconds.append(self._now() - self._started)
        self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        self._step += 1
        if self._step == self.job.all_steps:
            self._counting.close()
            if self._turns is not None:
                self._turns.close()

    @property
    def _is_counting(self) -> bool:
        return self._step >= self.job.warmup_steps + self.job.steps

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls `call` and adds its time, except for time in collectives, to the part `name` of a step.

        Only instrumented steps are counted, and of nested parts only the outer one.
        """

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._is_counting or self._within:
                return call(*args, **kwargs)
            self._within, self._traffic.phase = True, name
            started, waited = self._now(), self._traffic.seconds
            try:
                return call(*args, **kwargs)
            finally:
                self._parts[name] += self._now() - started - (self._traffic.seconds - waited)
                self._within, self._traffic.phase = False, ""

        return timed

    def report(self, n_parameters: int, **versions: str) -> None:
        """Write the report. The times of parts and the bytes moved are means per instrumented step."""
        n = self.job.counted_steps
        traffic, timed = self._traffic, slice(self.job.warmup_steps, self.job.warmup_steps + self.job.steps)
        parts = {name: seconds / n for name, seconds in self._parts.items()}
        if parts:
            parts["communication"] = traffic.seconds / n
            parts["rest"] = sum(self._seconds[timed.stop :]) / n - sum(parts.values())
        result = {
            "n_parameters": n_parameters,
            "step_s": self._seconds[timed],
            "losses": [float(loss) for loss in self._losses[timed]],
            "peak_memory_bytes": self._memory_bytes,
            "parts_s": parts,
            "calls": {kind: count / n for kind, count in traffic.by_kind(traffic.calls).items()},
            "bytes": {kind: count / n for kind, count in traffic.by_kind(traffic.bytes).items()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
            "device": device_name(self._device),
        }
        write_atomically(self._folder / f"rank-{self._rank}.json", json.dumps(result).encode(), durable=False)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of peak memory, so that it excludes compilation and the initial weights."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # On Linux this resets the high-water mark of resident memory.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a container may forbid this; the peak is then that of the whole process
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory that was allocated on the GPU, or resident in this process where the device is a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return own_memory_bytes("VmHWM")
