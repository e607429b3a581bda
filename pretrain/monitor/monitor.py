"""Records a run: metrics and events as JSON lines, the sample ledger, W&B, and progress lines.

The JSON-lines files are the record; W&B and the progress lines show the same data. Nothing here stops or slows down
training: a file that cannot be written, a W&B server that does not answer, or a closed terminal costs one warning.
docs/monitoring.md describes every field.
"""

from __future__ import annotations

import netrc
import os
import queue
import secrets
import string
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from pretrain.checkpoint.saver import Saved
from pretrain.config import LoggingConfig, TrainConfig, WandbMode, to_dict
from pretrain.errors import ExitCode
from pretrain.gpus import PeakFlops
from pretrain.monitor.event_lines import event_line
from pretrain.printing import say
from pretrain.reliability.events import Event, EventLog
from pretrain.reliability.journal import HELDOUT_PREFIX, LEDGER_FOLDER, METRICS_FILE, ROLLBACK, TASK_PREFIX
from pretrain.reliability.journal import read_ledger as read_ledger
from pretrain.reliability.journal import read_metrics as read_metrics
from pretrain.reliability.json_lines import JsonLines, utc_now
from pretrain.reliability.processes import own_memory_bytes

WANDB_INIT_TIMEOUT_S = 30.0
WANDB_FINISH_TIMEOUT_S = 30.0  # less than srun's --wait, so that a slow upload never looks like a hung rank
WANDB_QUEUE_RECORDS = 10_000
WANDB_PROJECT = "pretrain"
"""Project of a run where neither the configuration nor WANDB_PROJECT names one."""
# The old and the new host for which `wandb login` writes netrc.
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """The trainer's figures for one completed optimizer update."""

    step: int
    tokens_seen: int
    samples_seen: int
    step_tokens: int
    """Number of tokens in this step, over all ranks, including padding."""
    sequence_length: int
    """Tokens per sequence."""
    predicted_tokens: int
    """Number of tokens, over all ranks, whose prediction the loss counts. If it is 0, the step trained on nothing."""
    loss: float | None
    """Mean nats per predicted token over the global batch, without z-loss; None if there is no such token."""
    z_loss: float | None
    """Mean squared log-partition; None where the model has no z-loss, or there is no token to predict."""
    grad_norm: float | None
    """Global L2 norm of the gradient before clipping; None if there is no token to predict."""
    lr: float
    """Learning rate of this step."""
    step_time_s: float
    """Wall time in seconds since the previous step, including the wait for data."""
    data_wait_s: float
    """Seconds of `step_time_s` for which training waited for data."""
    cut_documents_frac: float
    """Fraction of the document pieces in the step's sequences that are not whole documents; 0 without document
    masking."""
    padding_tokens: int
    """Number of tokens among `step_tokens`, over all ranks, that belong to no document: padding and filler."""
    substituted_chunks: int
    """Number of chunks, in the run so far, that could not be read and were replaced by others."""
    skipped: bool
    """Whether no update was made: the gradient was not finite, the loss a spike, or no token was to predict."""
    loss_scale: float | None = None
    """Factor by which the loss was scaled in this step; None where the precision is not fp16."""
    epochs: dict[str, float] = field(default_factory=dict)
    """Number of times that each source has been read, by name. It is filled only every `logging.every_steps`."""


def new_run_id() -> str:
    """A random id for a run in W&B's format: 8 lowercase letters or digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


# ---- W&B -------------------------------------------------------------------------------------------------------------


def wandb_mode(config: LoggingConfig) -> WandbMode:
    """The effective mode. `auto` is what W&B's own variables say; `online` needs an API key, and is offline without."""
    mode = _mode_of_environment() if config.wandb is WandbMode.auto else config.wandb
    if mode is WandbMode.online and not _has_wandb_key():
        return WandbMode.offline
    return mode


def _mode_of_environment() -> WandbMode:
    """The mode that WANDB_DISABLED or WANDB_MODE states; online without them."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return WandbMode.disabled
    match os.environ.get("WANDB_MODE", "").lower():
        case "disabled":
            return WandbMode.disabled
        case "" | "online" | "run" | "shared":
            return WandbMode.online
        case _:  # offline, dryrun, or a word that W&B does not know: nothing leaves the machine
            return WandbMode.offline


def wandb_arguments(config: TrainConfig, run_dir: Path, run_id: str, mode: WandbMode) -> dict[str, Any]:
    """The arguments of wandb.init. What the configuration does not state is left out, so that W&B's variables count."""
    logging, environment = config.logging, os.environ
    stated: dict[str, Any] = {
        "project": logging.wandb_project or (None if environment.get("WANDB_PROJECT") else WANDB_PROJECT),
        "entity": logging.wandb_entity,
        "name": logging.wandb_name or (None if environment.get("WANDB_NAME") else run_dir.resolve().name),
        "tags": logging.wandb_tags or None,
    }
    arguments = {"id": run_id, "resume": "allow", "mode": mode.name, "dir": str(run_dir)}
    arguments |= {name: value for name, value in stated.items() if value is not None}
    return arguments | {"config": to_dict(config)}


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
    """Sends records to W&B from a separate thread, so that no call of W&B can block training.

    An online run that cannot be opened is recorded offline instead (`wandb sync` uploads it later). Any other failure
    ends W&B for this attempt. Each failure is reported by calling `on_failure` with one sentence.
    """

    def __init__(self, arguments: dict[str, Any], on_failure: Callable[[str], None]) -> None:
        self._arguments = arguments
        self._on_failure = on_failure
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | int] = queue.Queue(WANDB_QUEUE_RECORDS)
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Queue one record. If the queue is full because W&B is too slow, W&B ends for this attempt."""
        self._put((step, values))

    def close(self, exit_code: int) -> None:
        """Finish the W&B run. Waits for at most WANDB_INIT_TIMEOUT_S + WANDB_FINISH_TIMEOUT_S."""
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
            import wandb  # imported here because it takes seconds and only rank 0 needs it

            run = self._open()
            while isinstance(item := self._queue.get(), tuple):
                step, values = item
                run.log(values, step=step)
            if item == ExitCode.STOPPED:
                run.mark_preempting()  # W&B then shows it as preempted, not as failed; the next attempt resumes it
            run.finish(exit_code=item)
            # This ends W&B's own process, which first writes the remaining records to the run's file.
            wandb.teardown(item)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _open(self) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=WANDB_INIT_TIMEOUT_S,
            finish_timeout=WANDB_FINISH_TIMEOUT_S,
            console="off",  # otherwise W&B redirects stdout and stderr
            silent=True,
            disable_git=True,  # the URL of a git remote may contain a password
            save_code=False,
        )
        try:
            return wandb.init(settings=settings, **self._arguments)
        except Exception as error:
            if self._arguments["mode"] != WandbMode.online.name:
                raise
            self._on_failure(f"{type(error).__name__}; this attempt is recorded offline")
            wandb.teardown()  # W&B's process still holds the run that could not be opened
            return wandb.init(settings=settings, **(self._arguments | {"mode": WandbMode.offline.name}))


# ---- the monitor -----------------------------------------------------------------------------------------------------


class Monitor:
    """Records a run. Only rank 0 writes; on other ranks only the ledger is written.

    `first_step` is the first step that this attempt completes: 1, or the checkpoint's step + 1. `flops_per_token` gives
    the FLOPs per token at a sequence length. The caller reports `event(Event.STARTED)` or
    `event(Event.RESUMED, step=...)` once the state is loaded; for later steps `read_metrics` then uses the records of
    this attempt.
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
        flops_per_token: Callable[[int], float],
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
        self.n_steps = n_steps
        """Number of steps of the whole run; a rollback may change it."""
        self._started: float | None = None
        self._since_line = (0, 0.0)  # tokens, seconds
        self._newest_step = first_step - 1
        self._ledger: JsonLines | None = None
        if config.logging.sample_ledger:
            self._ledger = JsonLines(run_dir / LEDGER_FOLDER / f"rank-{rank:05d}.jsonl")
        if rank != 0:
            return
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._events = EventLog(run_dir)
        self._wandb: _WandbWriter | None = None
        mode = wandb_mode(config.logging)
        self.event(
            Event.MONITORING,
            flops_per_token=flops_per_token(config.data.sequence_length),
            peak_flops_per_second=self._peak.per_second if self._peak else None,
            peak_source=self._peak.source if self._peak else None,
            wandb=mode,
            wandb_run_id=wandb_run_id,
        )
        if mode is not WandbMode.disabled:
            arguments = wandb_arguments(config, run_dir, wandb_run_id, mode)
            self._wandb = _WandbWriter(arguments, self._on_wandb_failure)

    def step(self, record: StepRecord) -> None:
        """Record one completed update, and every `logging.every_steps` steps also send it to W&B and print a line."""
        if self._rank != 0:
            return
        self._newest_step = record.step
        time_s = max(record.step_time_s, 1e-9)
        # A step that predicts nothing computes nothing, so its speed is not a training speed.
        n_tokens = record.step_tokens - record.padding_tokens
        rate = n_tokens / time_s if record.predicted_tokens else None
        epochs = {f"epochs/{name}": value for name, value in record.epochs.items()}
        line = {key: value for key, value in asdict(record).items() if key != "epochs"} | epochs
        line |= {
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": None if rate is None else rate / self._world_size,
            "mfu_frac": None if rate is None else self._mfu_frac(rate, record.sequence_length),
            "eta_s": self._eta_s(record),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        self._metrics.append({"kind": "step", "attempt": self._attempt, "time": utc_now()} | line)
        if rate is not None:
            tokens, seconds = self._since_line
            self._since_line = (tokens + n_tokens, seconds + time_s)
        if record.step % self._config.logging.every_steps == 0 or record.step in (
            self._first_step,
            self.n_steps,
        ):
            self._log_wandb(record.step, line)
            self._progress(record, line["eta_s"])
            self._since_line = (0, 0.0)

    def evaluation(self, step: int, result: dict[str, float], tasks: dict[str, float] | None = None) -> None:
        """Record held-out results, each under the name heldout/<name>, and those of tasks, under task/<name>.

        The progress line has the losses only, unless there is a single set, and the tasks' scores without their errors.
        """
        if self._rank != 0:
            return
        named = {HELDOUT_PREFIX + name.removeprefix(HELDOUT_PREFIX): value for name, value in result.items()}
        of_tasks = {TASK_PREFIX + name: value for name, value in (tasks or {}).items()}
        self._metrics.append(
            {"kind": "evaluation", "attempt": self._attempt, "time": utc_now(), "step": step}
            | named
            | of_tasks
        )
        self._log_wandb(step, named | of_tasks)
        losses = {key: v for key, v in named.items() if key.endswith("loss") and "/source/" not in key}
        time_s = named.get(f"{HELDOUT_PREFIX}time_s")
        self._events.append(
            Event.EVALUATED,
            self._attempt,
            step=step,
            losses={key.removeprefix(HELDOUT_PREFIX): v for key, v in losses.items()},
            time_s=time_s,
        )
        plain = all("/" not in key.removeprefix(HELDOUT_PREFIX) for key in named)
        shown = named if plain else losses | {f"{HELDOUT_PREFIX}time_s": time_s or 0.0}
        shown |= {key: v for key, v in of_tasks.items() if not key.endswith("_standard_error")}
        say(f"step {step}/{self.n_steps}  " + "  ".join(f"{k} {v:,.4g}" for k, v in shown.items()))

    def checkpoint(self, saved: Saved) -> None:
        """Record the result of a save. W&B gets its figures under the names checkpoint/<name>."""
        if saved.problem is not None:
            self.event(Event.CHECKPOINT_FAILED, step=saved.step, reason=saved.problem)
            return
        figures = {
            "stall_s": saved.stall_s,
            "write_s": saved.write_s,
            "bytes": saved.bytes,
            "bytes_per_second": saved.bytes / max(saved.write_s, 1e-9),
        }
        self.event(Event.CHECKPOINT_SAVED, step=saved.step, path=str(saved.path), **figures)
        for path in saved.deleted:
            self.event(Event.CHECKPOINT_DELETED, step=saved.step, path=str(path))
        if self._rank == 0:
            # W&B accepts only increasing steps, so these go to the newest one.
            self._log_wandb(
                self._newest_step, {f"checkpoint/{name}": value for name, value in figures.items()}
            )

    def rolled_back(self, step: int, **facts: Any) -> None:
        """Record that the run returned to its state after `step`.

        Metrics and ledger lines of later steps that are already written then no longer count.
        """
        undone = {"kind": ROLLBACK, "attempt": self._attempt, "step": step + 1}
        if self._ledger is not None:
            self._ledger.append(undone)
        if self._rank == 0:
            self._metrics.append(undone | {"time": utc_now()})
        self.event(Event.ROLLED_BACK, step=step, **facts)

    def event(self, event: Event, **facts: Any) -> None:
        """Record that something happened, in events.jsonl and as a line on stderr."""
        if self._rank != 0:
            return
        self._events.append(event, self._attempt, **facts)
        say(event_line(event, facts))

    def _on_wandb_failure(self, reason: str) -> None:
        self.event(Event.WANDB_FAILED, reason=reason)

    def ledger(self, step: int, samples: Sequence[int], tokens_hash: str) -> None:
        """Record which samples this rank trained on in a step, and the xxh3-64 of their tokens in hexadecimal."""
        if self._ledger is not None:
            samples = [int(sample) for sample in samples]
            self._ledger.append(
                {"step": step, "attempt": self._attempt, "samples": samples, "tokens_xxh3": tokens_hash}
            )

    def close(self, exit_code: int) -> None:
        """Finish W&B, within a limited time, and close the files."""
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

    def _mfu_frac(self, tokens_per_second: float, sequence_length: int) -> float | None:
        """Model FLOPs utilization (PaLM, 2022, appendix B): the model's FLOP/s divided by the peak FLOP/s of all
        ranks."""
        if self._peak is None:
            return None
        flops = tokens_per_second * self._flops_per_token(sequence_length)
        return flops / (self._peak.per_second * self._world_size)

    def _eta_s(self, record: StepRecord) -> float:
        """Seconds until the last step at this attempt's average pace, including its evaluations and checkpoints."""
        now = time.monotonic()
        if self._started is None:
            self._started = now - record.step_time_s
        done = max(1, record.step - self._first_step + 1)
        return (now - self._started) / done * (self.n_steps - record.step)

    def _progress(self, record: StepRecord, eta_s: float) -> None:
        tokens, seconds = self._since_line
        loss = "no token to predict" if record.loss is None else f"loss {record.loss:.4f}"
        parts = [f"step {record.step}/{self.n_steps}", loss, f"lr {record.lr:.1e}"]
        if record.grad_norm is not None:
            parts.append(f"grad {record.grad_norm:.2f}")
        if tokens:
            mfu = self._mfu_frac(tokens / seconds, record.sequence_length)
            parts.append(f"{tokens / seconds:,.0f} tok/s in {self._config.engine.precision.value}")
            parts.append(
                f"MFU {mfu:.1%} ({self._peak.source})" if mfu is not None and self._peak else "MFU unknown"
            )
        parts.append(f"ETA {timedelta(seconds=round(eta_s))}")
        if record.skipped and record.loss is not None:
            why = "" if record.loss_scale is None else f" at a loss scale of {record.loss_scale:,.0f}"
            parts.append(f"SKIPPED: gradient not finite{why}")
        say("  ".join(parts))


def _peak_memory_bytes() -> int:
    """Largest memory that this rank has used so far: allocated on its GPU, or resident on the host without a GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return own_memory_bytes("VmHWM")
