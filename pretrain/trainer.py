"""Assembly of a run, and the loop."""

from __future__ import annotations

import json
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from pretrain import __version__, checkpoint
from pretrain.checkpoint import CheckpointError
from pretrain.config import ConfigError, ExitCode, RunError, TrainConfig, to_dict
from pretrain.distributed import World, on_main, sum_over_ranks
from pretrain.engine import MOMENTS, Engine
from pretrain.evaluate import evaluate_loss
from pretrain.inputs import tokenizer_path
from pretrain.loader import Batch, TrainLoader
from pretrain.model import flops_per_token
from pretrain.monitor import Monitor, StepRecord, new_run_id, rank_peak_flops
from pretrain.optim import learning_rate
from pretrain.order import OrderState
from pretrain.resilience import StopRequest, lock_run
from pretrain.shards import Corpus, load_manifest, write_atomically
from pretrain.tokenizer import Tokenizer

MAX_SKIPPED_STEPS = 10
"""Steps in a row without a finite gradient after which a run ends: it will not recover by itself."""


@dataclass
class Run:
    """A run at one moment: everything the loop needs, on one rank."""

    config: TrainConfig
    world: World
    run_dir: Path
    identity: dict[str, Any]
    """run.json: run_id, wandb_run_id, attempt."""
    loader: TrainLoader
    engine: Engine
    monitor: Monitor
    stop: StopRequest
    step: int
    """Completed optimizer updates."""


def train(config: TrainConfig, world: World) -> ExitCode:
    """Train until the last step or a request to stop. `config` is resolved; all ranks call this together."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    on_main(lambda: lock_run(run_dir), world)
    run = _assemble(config, world, run_dir)
    code = ExitCode.FINISHED if run.step >= config.n_steps else _loop(run)
    run.monitor.event(
        "stopped" if code is ExitCode.STOPPED else "finished", step=run.step, reason=run.stop.reason
    )
    run.monitor.close(int(code))
    return code


def _loop(run: Run) -> ExitCode:
    config, world, monitor = run.config, run.world, run.monitor
    skipped_in_a_row = 0
    before = time.monotonic()
    for batches in run.loader.steps(run.step * config.global_batch_sequences):
        data_wait_s = time.monotonic() - before
        step = run.step + 1
        lr = learning_rate(config.schedule, config.optim.lr, step, config.n_steps)
        result = run.engine.train_step(batches, step, lr)
        local = [float(result.nll_sum), float(result.z_sum), float(run.stop.asked())]
        nll_sum, z_sum, n_asked = sum_over_ranks(local, world)
        run.step = step
        if config.logging.sample_ledger:
            monitor.ledger(step, *_ledger_entry(batches))
        now = time.monotonic()
        monitor.step(
            StepRecord(
                step=step,
                tokens_seen=step * config.tokens_per_step,
                samples_seen=step * config.global_batch_sequences,
                loss=nll_sum / max(1, result.n_predicted),
                z_loss=z_sum / max(1, result.n_predicted) if config.model.z_loss else None,
                grad_norm=result.grad_norm,
                lr=lr,
                step_time_s=now - before,
                data_wait_s=data_wait_s,
                skipped=result.skipped,
            )
        )
        skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
        if skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise RunError(
                f"the gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row up to step {step}; "
                "lower optim.lr or lengthen schedule.warmup_steps, and start again from the last checkpoint"
            )
        last = step == config.n_steps
        stopping = not last and (n_asked > 0 or step == config.stop_at_step)
        if last or stopping or step % config.checkpoint.every_steps == 0:
            _save(run, must_succeed=last or stopping)
        # After saving, so that damaged held-out text costs no step.
        if last or step % config.evaluation.every_steps == 0:
            _evaluate(run)
        if stopping:
            return ExitCode.STOPPED
        before = time.monotonic()
    return ExitCode.FINISHED


def _ledger_entry(batches: list[Batch]) -> tuple[list[int], str]:
    """This rank's sample indices of one step, and the xxh3-64 of their tokens in the same order."""
    digest = xxhash.xxh3_64()
    samples: list[int] = []
    for batch in batches:
        samples += [int(sample) for sample in batch.samples]
        digest.update(batch.tokens.numpy().tobytes())
    return samples, digest.hexdigest()


def _evaluate(run: Run) -> None:
    config = run.config
    if config.evaluation.manifest is None:
        return
    started = time.monotonic()
    result = evaluate_loss(
        run.engine.evaluate,
        Corpus(config.evaluation.manifest, config.data.verify_chunks),
        sequence_length=config.data.sequence_length,
        micro_batch_sequences=config.micro_batch_sequences,
        max_sequences=config.evaluation.max_sequences,
        world=run.world,
        document_masking=config.data.document_masking,
    )
    run.monitor.evaluation(run.step, {**result.overall.as_dict(), "time_s": time.monotonic() - started})


def _save(run: Run, *, must_succeed: bool) -> None:
    """Publish a checkpoint. A failed one is reported and training goes on, except where it was the last chance."""
    started = time.monotonic()
    try:
        path = checkpoint.save(run.run_dir, run.step, run.engine.snapshot(), _state(run), run.world)
    except CheckpointError as error:
        run.monitor.event("checkpoint_failed", step=run.step, reason=str(error))
        if must_succeed:
            raise
        return
    run.monitor.event("checkpoint_saved", step=run.step, path=str(path), time_s=time.monotonic() - started)
    for deleted in checkpoint.retain(run.run_dir, run.config.checkpoint, run.world):
        run.monitor.event("checkpoint_deleted", step=run.step, path=str(deleted))


def _state(run: Run) -> dict[str, Any]:
    """state.json: all that a resumed run needs beside the tensors. Random state is a function of (seed, step, rank)."""
    config = run.config
    consumed = run.step * config.global_batch_sequences
    return {
        "step": run.step,
        "tokens_seen": run.step * config.tokens_per_step,
        "samples_seen": consumed,
        "optimizer_step": run.engine.optimizer_step,
        "order": run.loader.state_at(consumed).to_dict(),
        "tokenizer_sha256": run.loader.tokenizer_sha256,
        "run_id": run.identity["run_id"],
        "wandb_run_id": run.identity["wandb_run_id"],
        "attempt": run.identity["attempt"],
        "world_size": run.world.size,
        "zero_stage": config.engine.zero_stage,
        "versions": {
            "pretrain": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
        "config": to_dict(config),
        "tensors": {name: list(shape) for name, shape in run.engine.shapes.items()},
    }


# ---- assembly --------------------------------------------------------------------------------------------------------


def _assemble(config: TrainConfig, world: World, run_dir: Path) -> Run:
    found = checkpoint.find_latest(run_dir, world)
    if found.path is None and found.passed_over:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'} can be trusted ({'; '.join(found.passed_over)}); "
            "restore one, or start afresh in another run_dir"
        )
    state = checkpoint.read_state(found.path) if found.path else None
    changed = _check_resumable(config, state) if state else []
    loader = TrainLoader(
        config.data,
        config.seed,
        global_batch_sequences=config.global_batch_sequences,
        micro_batch_sequences=config.micro_batch_sequences,
        rank=world.rank,
        world_size=world.size,
        total_samples=config.n_steps * config.global_batch_sequences,
        state=OrderState.from_dict(state["order"]) if state else None,
    )
    identity = on_main(lambda: _write_run_files(config, run_dir, state), world)
    stop = StopRequest(run_dir, watch_file=world.is_main)
    engine = Engine(config, world)
    start = state["step"] if state else 0
    monitor = Monitor(
        config,
        rank=world.rank,
        world_size=world.size,
        run_dir=run_dir,
        attempt=identity["attempt"],
        wandb_run_id=identity["wandb_run_id"],
        flops_per_token=flops_per_token(config.model, config.data.sequence_length),
        peak_flops_per_second=rank_peak_flops(config, world.device),
        first_step=start + 1,
        n_steps=config.n_steps,
    )
    for reason in found.passed_over:
        monitor.event("checkpoint_passed_over", reason=reason)
    if found.path and state:
        kinds = ["weight", *MOMENTS]
        engine.restore(checkpoint.load(found.path, kinds, engine.shapes, world), state["optimizer_step"])
        monitor.event(
            "resumed", step=start, path=str(found.path), world_size=world.size, config_changed=changed
        )
    else:
        if config.init_from is not None:
            _init_from(config.init_from, engine, world, loader.tokenizer_sha256)
        monitor.event("started", world_size=world.size, n_steps=config.n_steps, init_from=config.init_from)
    return Run(config, world, run_dir, identity, loader, engine, monitor, stop, step=start)


def _init_from(run_dir: str, engine: Engine, world: World, tokenizer_sha256: str) -> None:
    """Initial weights from another run's newest good checkpoint."""
    found = checkpoint.find_latest(Path(run_dir), world)
    if found.path is None:
        raise ConfigError(
            f"init_from={run_dir} holds no usable checkpoint ({'; '.join(found.passed_over) or 'none'})"
        )
    if checkpoint.read_state(found.path)["tokenizer_sha256"] != tokenizer_sha256:
        raise ConfigError(f"init_from={run_dir} was trained with another tokenizer than this corpus")
    engine.restore_weights(checkpoint.load(found.path, ["weight"], engine.shapes, world))


def _check_resumable(config: TrainConfig, state: dict[str, Any]) -> list[str]:
    """Changed keys that a resumed run may have. Raises ConfigError for those that make it another run."""
    old, new = _flat(state["config"]), _flat(to_dict(config))
    changed = [key for key in new if old.get(key) != new[key] and key not in ("run_dir", "stop_at_step")]
    fixed = [key for key in changed if key == "seed" or _shapes_the_run(key)]
    if fixed:
        what = ", ".join(f"{key}={new[key]} (was {old.get(key)})" for key in fixed)
        raise ConfigError(
            f"run_dir={config.run_dir} holds a run with another configuration: {what}; "
            "put these back, or use another run_dir (with init_from= to keep the weights)"
        )
    if state["samples_seen"] != state["step"] * config.global_batch_sequences:
        raise ConfigError(
            f"global_batch_sequences={config.global_batch_sequences} differs from the run's "
            f"{state['samples_seen'] // state['step']}; put it back"
        )
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in changed]


def _shapes_the_run(key: str) -> bool:
    free = ("model.activation_checkpointing", "model.loss_chunk_tokens", "model.dropout", "model.z_loss")
    return (key.startswith("model.") and key not in free) or key == "data.document_masking"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_run_files(config: TrainConfig, run_dir: Path, state: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0: config.json, run.json and the tokenizer, so that the folder explains itself. Returns run.json."""
    source = config.data.corpora()[0].manifest
    manifest = load_manifest(source)
    tokenizer = Tokenizer(tokenizer_path(source), manifest.tokenizer_sha256)
    path = run_dir / "run.json"
    identity: dict[str, Any] = {"run_id": new_run_id(), "attempt": 0}
    with suppress(FileNotFoundError, ValueError, TypeError):  # damaged: the checkpoint tells the same
        identity |= json.loads(path.read_text(encoding="utf-8"))
    if state:
        identity |= {key: state[key] for key in ("run_id", "wandb_run_id")}
    identity.setdefault("wandb_run_id", identity["run_id"])
    identity["attempt"] = max(identity["attempt"], state["attempt"] if state else 0) + 1
    write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
    write_atomically(run_dir / "config.json", (json.dumps(to_dict(config), indent=1) + "\n").encode())
    write_atomically(run_dir / "tokenizer.model", tokenizer.model)
    return identity
