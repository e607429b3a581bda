"""What is recorded of a run: metrics and events in JSON lines, the sample ledger, W&B, and a line for a person.

The JSON-lines files are the record; W&B and the progress line stand on top of them. Nothing in here stops or slows
training: a file that cannot be written, a W&B server that does not answer and a closed terminal cost one warning.
docs/monitoring.md describes every field.
"""

from __future__ import annotations

import netrc
import os
import queue
import re
import resource
import secrets
import string
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from pretrain.config import ExitCode, LoggingConfig, Precision, TrainConfig, WandbMode, to_dict
from pretrain.journal import (
    EVENTS_FILE,
    HELDOUT_PREFIX,
    LEDGER_FOLDER,
    METRICS_FILE,
    JsonLines,
    jsonable,
    say,
)
from pretrain.journal import read_ledger as read_ledger
from pretrain.journal import read_metrics as read_metrics

WANDB_INIT_TIMEOUT_S = 30.0
WANDB_FINISH_TIMEOUT_S = 30.0  # below srun's --wait, so that a slow upload never looks like a hung rank
WANDB_QUEUE_RECORDS = 10_000
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # machines of `wandb login` in netrc, old and new


class PeakFlops(NamedTuple):
    """The denominator of MFU: what one rank's device can do at most."""

    per_second: float
    source: str
    """Where the figure is from, shown beside every MFU: `configured peak`, `H100 SXM peak`, `measured peak`."""


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """What the trainer knows of one completed optimizer update."""

    step: int
    tokens_seen: int
    samples_seen: int
    loss: float
    """Mean nats per predicted token over the global batch, without z-loss."""
    z_loss: float | None
    """Mean squared log-partition; None where the model has no z-loss."""
    grad_norm: float | None
    """Global L2 norm before clipping; None where the engine has none."""
    lr: float
    step_time_s: float
    """Wall time since the step before, the wait for data included."""
    data_wait_s: float
    skipped: bool
    """Whether the gradient was not finite and the update was left out."""


def new_run_id() -> str:
    """A random id of a run, of the form W&B uses (8 letters or digits)."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


# ---- W&B -------------------------------------------------------------------------------------------------------------


def wandb_mode(config: LoggingConfig) -> WandbMode:
    """The mode that is meant: `auto` and `online` need an API key, from WANDB_API_KEY or netrc, else offline."""
    if config.wandb in (WandbMode.auto, WandbMode.online):
        return WandbMode.online if _has_wandb_key() else WandbMode.offline
    return config.wandb


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    base_url = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(base_url).netloc,) if base_url else WANDB_HOSTS
    try:
        known = netrc.netrc(os.environ.get("NETRC") or str(Path("~/.netrc").expanduser()))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) for host in hosts)


class _WandbWriter:
    """Sends records to W&B from a thread of its own, so that no call of W&B can block training.

    An online run that cannot be opened goes on offline (`wandb sync` uploads it later); any other failure ends W&B
    for this attempt. `on_failure` gets one sentence, once.
    """

    def __init__(self, arguments: dict[str, Any], on_failure: Callable[[str], None]) -> None:
        self._arguments = arguments
        self._on_failure = on_failure
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | int] = queue.Queue(WANDB_QUEUE_RECORDS)
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Queue one record; dropped when W&B is so far behind that the queue is full."""
        self._put((step, values))

    def close(self, exit_code: int) -> None:
        """Finish the W&B run; waits for it a bounded time."""
        self._put(exit_code)
        if not self._ended:
            self._thread.join(WANDB_INIT_TIMEOUT_S + WANDB_FINISH_TIMEOUT_S)

    def _put(self, item: tuple[int, dict[str, Any]] | int) -> None:
        if self._ended:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._fail("W&B does not keep up")

    def _fail(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._on_failure(reason)

    def _work(self) -> None:
        try:
            import wandb  # here, since it takes seconds and only rank 0 needs it

            run = self._open()
            while isinstance(item := self._queue.get(), tuple):
                step, values = item
                run.log(values, step=step)
            if item == ExitCode.STOPPED:
                run.mark_preempting()  # shown as preempted, not as failed: the next attempt goes on
            run.finish(exit_code=item)
            wandb.teardown(item)  # ends W&B's own process; only then are the last records in the run's file
        except Exception as error:
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _open(self) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=WANDB_INIT_TIMEOUT_S,
            finish_timeout=WANDB_FINISH_TIMEOUT_S,
            console="off",  # else W&B takes over stdout and stderr
            silent=True,
            disable_git=True,  # a remote's URL may hold a password
            save_code=False,
        )
        try:
            return wandb.init(settings=settings, **self._arguments)
        except Exception as error:
            if self._arguments["mode"] != WandbMode.online.name:
                raise
            self._on_failure(f"{type(error).__name__}; this attempt is recorded offline")
            wandb.teardown()  # its process still holds the run that could not be opened
            return wandb.init(settings=settings, **(self._arguments | {"mode": WandbMode.offline.name}))


# ---- the monitor -----------------------------------------------------------------------------------------------------


class Monitor:
    """Records a run. Rank 0 writes; on other ranks every method but `ledger` does nothing.

    `first_step` is the first step that this attempt completes: 1, or the checkpoint's step + 1. The caller reports
    `event("started")` or `event("resumed", step=...)` once the state is in place; from then on `read_metrics` takes
    the steps after it from this attempt.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        rank: int,
        world_size: int,
        run_dir: Path,
        attempt: int,
        wandb_run_id: str,
        flops_per_token: float,
        peak_flops_per_second: PeakFlops | None,
        first_step: int,
        n_steps: int,
    ) -> None:
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._attempt = attempt
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second
        self._first_step = first_step
        self._n_steps = n_steps
        self._started: float | None = None
        self._since_line = (0, 0.0)  # steps, seconds
        self._ledger: JsonLines | None = None
        if config.logging.sample_ledger:
            self._ledger = JsonLines(run_dir / LEDGER_FOLDER / f"rank-{rank:05d}.jsonl")
        if rank != 0:
            return
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._events = JsonLines(run_dir / EVENTS_FILE)
        self._wandb: _WandbWriter | None = None
        mode = wandb_mode(config.logging)
        self.event(
            "monitoring",
            flops_per_token=flops_per_token,
            peak_flops_per_second=self._peak.per_second if self._peak else None,
            peak_source=self._peak.source if self._peak else None,
            wandb=mode,
            wandb_run_id=wandb_run_id,
        )
        if mode is not WandbMode.disabled:
            arguments = {
                "id": wandb_run_id,
                "resume": "allow",
                "mode": mode.name,
                "dir": str(run_dir),
                "project": config.logging.wandb_project,
                "entity": config.logging.wandb_entity,
                "name": config.logging.wandb_name or run_dir.resolve().name,
                "tags": config.logging.wandb_tags,
                "config": to_dict(config),
            }
            self._wandb = _WandbWriter(arguments, lambda reason: self.event("wandb_failed", reason=reason))

    def step(self, record: StepRecord) -> None:
        """Record one completed update; every `logging.every_steps` also to W&B and as a line."""
        if self._rank != 0:
            return
        time_s = max(record.step_time_s, 1e-9)
        rate = self._config.tokens_per_step / time_s
        line = asdict(record) | {
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self._world_size,
            "mfu_frac": self._mfu_frac(rate),
            "eta_s": self._eta_s(record),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        self._metrics.append({"kind": "step", "attempt": self._attempt, "time": _now()} | line)
        steps, seconds = self._since_line
        self._since_line = (steps + 1, seconds + time_s)
        if record.step % self._config.logging.every_steps == 0 or record.step in (
            self._first_step,
            self._n_steps,
        ):
            self._log_wandb(record.step, line)
            self._progress(record, line["eta_s"])
            self._since_line = (0, 0.0)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Record held-out results, each under heldout/<name>."""
        if self._rank != 0:
            return
        named = {HELDOUT_PREFIX + name.removeprefix(HELDOUT_PREFIX): value for name, value in result.items()}
        self._metrics.append(
            {"kind": "evaluation", "attempt": self._attempt, "time": _now(), "step": step} | named
        )
        self._log_wandb(step, named)
        say(f"step {step}/{self._n_steps}  " + "  ".join(f"{k} {v:,.4g}" for k, v in named.items()))

    def event(self, name: str, **facts: Any) -> None:
        """Record that something happened, in events.jsonl and as a line on stderr."""
        if self._rank != 0:
            return
        self._events.append({"event": name, "attempt": self._attempt, "time": _now()} | facts)
        shown = (f"{key}={jsonable(value)}" for key, value in facts.items() if value not in (None, []))
        say("  ".join((name, *shown)))

    def ledger(self, step: int, samples: Sequence[int], tokens_hash: str) -> None:
        """Record which samples this rank trained on in a step, and the xxh3-64 of their tokens (hex)."""
        if self._ledger is not None:
            samples = [int(sample) for sample in samples]
            self._ledger.append(
                {"step": step, "attempt": self._attempt, "samples": samples, "tokens_xxh3": tokens_hash}
            )

    def close(self, exit_code: int) -> None:
        """Finish W&B (within a bounded time) and close the files."""
        if self._ledger is not None:
            self._ledger.close()
        if self._rank == 0:
            if self._wandb is not None:
                self._wandb.close(exit_code)
            self._metrics.close()
            self._events.close()

    def _log_wandb(self, step: int, values: dict[str, Any]) -> None:
        if self._wandb is not None:
            self._wandb.log(step, {k: v for k, v in values.items() if v is not None and k != "step"})

    def _mfu_frac(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization (PaLM, 2022, appendix B): useful FLOPs per second over the ranks' peak."""
        if self._peak is None:
            return None
        return tokens_per_second * self._flops_per_token / (self._peak.per_second * self._world_size)

    def _eta_s(self, record: StepRecord) -> float:
        """Seconds to the last step at this attempt's pace; evaluations and checkpoints count as they came."""
        now = time.monotonic()
        if self._started is None:
            self._started = now - record.step_time_s
        done = max(1, record.step - self._first_step + 1)
        return (now - self._started) / done * (self._n_steps - record.step)

    def _progress(self, record: StepRecord, eta_s: float) -> None:
        steps, seconds = self._since_line
        rate = steps * self._config.tokens_per_step / seconds
        mfu = self._mfu_frac(rate)
        parts = [f"step {record.step}/{self._n_steps}", f"loss {record.loss:.4f}", f"lr {record.lr:.1e}"]
        if record.grad_norm is not None:
            parts.append(f"grad {record.grad_norm:.2f}")
        parts.append(f"{rate:,.0f} tok/s")
        parts.append(
            f"MFU {mfu:.1%} ({self._peak.source})" if mfu is not None and self._peak else "MFU unknown"
        )
        parts.append(f"ETA {timedelta(seconds=round(eta_s))}")
        say("  ".join(parts + (["SKIPPED: gradient not finite"] if record.skipped else [])))


def _now() -> str:
    """UTC, for people; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _peak_memory_bytes() -> int:
    """Most memory this rank has held so far: on the GPU where it has one, else resident in the host."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- the peak of a device --------------------------------------------------------------------------------------------

# Dense peaks of one device in FLOP/s with 16-bit inputs and fp32 accumulation, from the makers' data sheets and
# white papers; where a sheet gives the figure with sparsity, half of it. The name must match as a whole: variants
# (laptop, D, MIG slices) differ, and a wrong peak is worse than none.
_PEAKS_16_BIT: list[tuple[str, str, float]] = [
    (r"A100-SXM4-\d+GB|A100-PCIE-\d+GB|A100 80GB PCIe", "A100", 312e12),  # A100 data sheet
    (r"A800-SXM4-\d+GB|A800 80GB PCIe", "A800", 312e12),  # the A100's cores, slower NVLink
    (r"H100 80GB HBM3|H100 96GB HBM3", "H100 SXM", 989e12),  # H100 data sheet: 1,979 sparse
    (r"H100 PCIe", "H100 PCIe", 756e12),  # H100 data sheet: 1,513 sparse
    (r"H100 NVL", "H100 NVL", 835e12),  # H100 NVL data sheet: 1,671 sparse
    (r"H800", "H800 SXM", 989e12),  # the H100's cores, slower NVLink
    (r"H800 PCIe", "H800 PCIe", 756e12),
    (r"H200", "H200 SXM", 989e12),  # H200 data sheet: 1,979 sparse
    (r"H200 NVL", "H200 NVL", 835e12),  # H200 data sheet: 1,671 sparse
    (r"H20", "H20", 148e12),
    (r"GH200 \d+GB?.*", "GH200", 989e12),  # GH200 data sheet: 1,979 sparse
    (r"B200", "B200", 2250e12),  # DGX B200 data sheet: 36 PFLOP/s sparse for 8
    (r"L40S", "L40S", 362e12),  # L40S data sheet: 362.05 dense, 733 sparse
    (r"L40", "L40", 181e12),  # L40 data sheet
    (r"L4", "L4", 121e12),  # L4 data sheet: 242 sparse
    (r"A40", "A40", 149.7e12),  # A40 data sheet
    (r"A30", "A30", 165e12),  # A30 data sheet
    (r"A10", "A10", 125e12),  # A10 data sheet
    (r"GeForce RTX 4090", "RTX 4090", 165.2e12),  # Ada white paper, fp32 accumulation
    (r"GeForce RTX 3090", "RTX 3090", 71e12),  # GA102 white paper, fp32 accumulation
]
_PEAKS_FP16_ONLY: list[tuple[str, str, float]] = [
    (r"V100-SXM2-\d+GB(-LS)?", "V100 SXM2", 125e12),  # V100 data sheet; no bf16
    (r"V100-PCIE-\d+GB", "V100 PCIe", 112e12),
]


def known_peak(name: str, dtype: torch.dtype) -> PeakFlops | None:
    """The peak of a GPU by the name that CUDA reports; None where the table does not have exactly this one."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    table: list[tuple[str, str, float]] = []
    if dtype in (torch.bfloat16, torch.float16):
        table += _PEAKS_16_BIT
    if dtype is torch.float16:
        table += _PEAKS_FP16_ONLY
    for pattern, label, per_second in table:
        if re.fullmatch(pattern, name):
            return PeakFlops(per_second, f"{label} peak")
    return None


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The best rate of several matrix products on this device in about `seconds`, in FLOP/s.

    Ranks that share a host must measure at the same time: what one of them gets alone is not what it gets in training.
    """
    scale = 8 if device.type == "cuda" else 1
    shapes = [(1024, 1024, 1024), (2048, 1024, 1024), (512, 4096, 1024), (1024, 1024, 4096)]
    best = 0.0
    for m, k, n in ((scale * m, scale * k, scale * n) for m, k, n in shapes):
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)  # as a linear layer holds it
        torch.nn.functional.linear(x, weight)
        end = time.perf_counter() + seconds / len(shapes)
        while (started := _synchronized(device)) < end:
            torch.nn.functional.linear(x, weight)
            best = max(best, 2.0 * m * k * n / (_synchronized(device) - started))
    return best


def _synchronized(device: torch.device) -> float:
    """The time when everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rank_peak_flops(config: TrainConfig, device: torch.device) -> PeakFlops:
    """The peak of this rank's device: configured, from the table, else measured. All ranks call it together."""
    if config.logging.peak_flops_per_second is not None:
        return PeakFlops(config.logging.peak_flops_per_second, "configured peak")
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        peak = known_peak(name, dtype)
        if peak is not None:
            return peak
        if device.index in (None, 0):  # once per host
            say(f"warning: the peak of {name} is not known; MFU is relative to a measured matrix product")
    return PeakFlops(measure_matmul_flops(device, dtype), "measured peak")
