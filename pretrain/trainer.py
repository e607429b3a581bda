"""Assembly of a run, and the loop."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from pretrain import __version__, checkpoint
from pretrain.checkpoint import CheckpointError, Found
from pretrain.config import ConfigError, ExitCode, TrainConfig, to_dict
from pretrain.device_peak import rank_peak_flops
from pretrain.distributed import Vote, World, on_main, sum_over_ranks
from pretrain.engine import MOMENTS, Engine
from pretrain.evaluate import evaluate_loss
from pretrain.heartbeat import mark
from pretrain.loader import Batch, TrainLoader
from pretrain.model import flops_per_token
from pretrain.monitor import Monitor, StepRecord
from pretrain.optim import learning_rate
from pretrain.order import OrderState, step_start
from pretrain.resilience import LossGuard, StopRequest, Verdict, lock_run
from pretrain.run_folder import check_resumable, heldout_losses_of, write_run_files
from pretrain.saving import Saved, Saver, advised_interval_s
from pretrain.shards import Corpus
from pretrain.watchdog import Watchdog


@dataclass
class Run:
    """A run at one moment: everything the loop needs, on one rank."""

    config: TrainConfig
    world: World
    run_dir: Path
    root: Path
    """Where its checkpoints are."""
    identity: dict[str, Any]
    """run.json: run_id, wandb_run_id, attempt."""
    loader: TrainLoader
    engine: Engine
    monitor: Monitor
    stop: StopRequest
    stop_vote: Vote
    guard: LossGuard
    saver: Saver
    heldout_losses: dict[int, float]
    """By step."""
    watchdog: Watchdog
    step: int
    """Completed optimizer updates."""
    next_sample: int
    """First sample of the next step, before what was passed over is left out."""
    saved_step: int = 0
    """The newest step whose checkpoint this process has seen published or has loaded; 0: none."""
    advised: bool = False
    """Whether the advice on the interval of saves was given."""
    saved_at: float = field(default_factory=time.monotonic)
    """When the last save began (monotonic clock, s)."""


def train(config: TrainConfig, world: World, watchdog: Watchdog) -> ExitCode:
    """Train until the last step or a request to stop. `config` is resolved; all ranks call this together."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    on_main(lambda: lock_run(run_dir), world)
    run = _assemble(config, world, run_dir, watchdog)
    code = ExitCode.FINISHED if run.step >= config.n_steps else _loop(run)
    run.monitor.event(
        "stopped" if code is ExitCode.STOPPED else "finished", step=run.step, reason=run.stop.reason
    )
    run.monitor.close(int(code))
    return code


def _loop(run: Run) -> ExitCode:
    """Stretches of training, each from a checkpoint (or the start) to the end, a stop or a rollback."""
    if run.stop_vote.now():  # asked while it was starting: nothing is lost
        return ExitCode.STOPPED
    while True:
        code = _stretch(run)
        if code is not None:
            return code


def _stretch(run: Run) -> ExitCode | None:
    """Train on; None after a rollback."""
    config, per_step = run.config, run.config.global_batch_sequences
    before = time.monotonic()
    for batches in run.loader.steps(run.next_sample):
        data_wait_s = time.monotonic() - before
        step, limit = run.step + 1, run.guard.limit()
        lr = learning_rate(config.schedule, config.optim.lr, step, config.n_steps)
        result = run.engine.train_step(batches, step, lr, limit, run.stop_vote.last)
        if result is None:  # asked within the step: back to its beginning, which is the step before
            return _stop(run)
        mark("update done", step)
        local = [
            float(result.nll_sum),
            float(result.z_sum),
            float(run.stop.asked()),
            float(run.saver.busy),
            float(run.world.is_main and _minutes_are_over(run)),
        ]
        nll_sum, z_sum, n_asked, n_busy, minutes_are_over = sum_over_ranks(local, run.world)
        loss = nll_sum / max(1, result.n_predicted)
        run.step = step
        run.next_sample = step_start(run.next_sample, per_step, run.loader.state.passed_over) + per_step
        run.watchdog.started()
        if config.logging.sample_ledger:
            run.monitor.ledger(step, *_ledger_entry(batches))
        now = time.monotonic()
        run.monitor.step(
            StepRecord(
                step=step,
                tokens_seen=step * config.tokens_per_step,
                samples_seen=step * per_step,
                loss=loss,
                z_loss=z_sum / max(1, result.n_predicted) if config.model.z_loss else None,
                grad_norm=result.grad_norm,
                lr=lr,
                step_time_s=now - before,
                data_wait_s=data_wait_s,
                skipped=result.skipped,
            )
        )
        if _goes_wrong(run, loss, limit, result.skipped):
            return None
        code = _after_step(run, asked=n_asked > 0, busy=n_busy > 0, due=minutes_are_over > 0)
        if code is not None:
            return code
        before = time.monotonic()
        mark("data")
    return ExitCode.FINISHED


def _after_step(run: Run, *, asked: bool, busy: bool, due: bool) -> ExitCode | None:
    """Save, evaluate, stop; the same on all ranks. The exit code where the run ends here."""
    config, step = run.config, run.step
    _collect(run)
    last = step == config.n_steps
    if not last and (asked or step == config.stop_at_step):
        return _stop(run)
    permanent = config.checkpoint.keep_every_steps and step % config.checkpoint.keep_every_steps == 0
    if last:
        _save_now(run)
    elif due or step % config.checkpoint.every_steps == 0:
        if busy and not permanent:
            run.monitor.event("checkpoint_skipped", step=step, reason="the one before is still being written")
        else:
            _collect(run, wait=True)
            _begin_save(run)
            if not config.checkpoint.background:
                _collect(run, wait=True)
    # After saving, so that damaged held-out text costs no step.
    if last or step % config.evaluation.every_steps == 0:
        _evaluate(run)
    return ExitCode.FINISHED if last else None


# ---- a loss that goes wrong ------------------------------------------------------------------------------------------


def _goes_wrong(run: Run, loss: float, limit: float, skipped: bool) -> bool:
    """Ask the guard; True after a rollback."""
    verdict = run.guard.judge(loss, limit, applied=not skipped)
    if loss > limit:
        run.monitor.event("loss_spike", step=run.step, loss=loss, limit=limit)
    if verdict is not Verdict.ROLL_BACK:
        return False
    reason = (
        f"loss {loss:.4g} above {limit:.4g}"
        if loss > limit
        else f"{run.guard.skips_in_a_row} updates left out in a row"
    )
    # Updates that were left out changed nothing: the state before the first of them is the one to go back to.
    _roll_back(run, first_bad_step=run.step - run.guard.skips_in_a_row + 1, reason=reason)
    return True


def _roll_back(run: Run, first_bad_step: int, reason: str) -> None:
    """Load the last checkpoint before `first_bad_step`; from that step on, leave out the samples of some steps."""
    config, guard = run.config, run.config.loss_guard
    advice = "lower optim.lr or lengthen schedule.warmup_steps, and look at the data"
    if len(run.loader.state.passed_over) == guard.max_rollbacks:
        raise ConfigError(
            f"the run diverges at step {first_bad_step} ({reason}) after loss_guard.max_rollbacks="
            f"{guard.max_rollbacks} rollbacks; {advice}"
        )
    _collect(run, wait=True)
    found = checkpoint.find_latest(run.root, run.world, before=first_bad_step)
    if found.path is None:
        raise ConfigError(
            f"the run diverges at step {first_bad_step} ({reason}) and no checkpoint is older; {advice}"
        )
    good = found.path
    for newer in on_main(lambda: _delete_after(run.root, good), run.world):
        run.monitor.event("checkpoint_deleted", step=run.step, path=newer)
    from_step, passed_over = run.step, run.loader.state.passed_over
    per_step = config.global_batch_sequences
    state = _restore(run, good)
    start = run.next_sample
    for _ in range(run.step + 1, first_bad_step):
        start = step_start(start, per_step, passed_over) + per_step
    start = step_start(start, per_step, passed_over)
    window = [start, start + guard.pass_over_steps * per_step]
    run.loader.state.passed_over = [*passed_over, window]
    run.guard = LossGuard(guard, state.get("loss_guard"))
    run.monitor.rolled_back(run.step, from_step=from_step, passed_over_samples=window, reason=reason)


def _delete_after(root: Path, path: Path) -> list[str]:
    """Rank 0: delete the checkpoints after `path`, which belong to what is undone."""
    newer = [p for p in checkpoint.list_checkpoints(root) if checkpoint.step_of(p) > checkpoint.step_of(path)]
    for one in newer:
        checkpoint.remove(one)
    return [str(one) for one in newer]


def _restore(run: Run, path: Path) -> dict[str, Any]:
    """Weights, moments, step and place in the data as a verified checkpoint has them; its state.json."""
    mark("load")
    state = checkpoint.read_state(path)
    partitions = checkpoint.load(path, ["weight", *MOMENTS], run.engine.shapes, run.world)
    run.engine.restore(partitions, state["optimizer_step"])
    run.step, run.next_sample = state["step"], state["order"]["consumed_samples"]
    run.saved_step = run.step
    for undone in [step for step in run.heldout_losses if step > run.step]:
        del run.heldout_losses[undone]
    return state


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
    run.heldout_losses[run.step] = result.overall.loss
    run.monitor.evaluation(run.step, {**result.overall.as_dict(), "time_s": time.monotonic() - started})


# ---- saving ----------------------------------------------------------------------------------------------------------


def _minutes_are_over(run: Run) -> bool:
    minutes = run.config.checkpoint.every_minutes
    return minutes is not None and time.monotonic() - run.saved_at >= 60 * minutes


def _begin_save(run: Run) -> None:
    mark("save")
    run.saved_at = time.monotonic()
    run.saver.start(run.step, run.engine.snapshot, _state(run))


def _collect(run: Run, *, wait: bool = False) -> Saved | None:
    """Report the save in flight once it is done; one that failed is reported and training goes on."""
    saved = run.saver.finished(wait=wait)
    if saved is not None:
        run.monitor.checkpoint(saved)
        if saved.problem is None:
            run.saved_step = saved.step
            _advise(run, saved)
    return saved


def _advise(run: Run, saved: Saved) -> None:
    """Once: the time between saves that would lose least."""
    if run.advised:
        return
    run.advised = True
    policy = run.config.checkpoint
    # Training stands still for the whole save where it waits for it.
    cost_s = saved.stall_s + (0.0 if policy.background else saved.write_s)
    run.monitor.event(
        "checkpoint_interval_advised",
        interval_s=advised_interval_s(cost_s, run.world.size, policy.mtbf_hours),
        cost_s=cost_s,
        mtbf="given" if policy.mtbf_hours is not None else "estimated: 50,000 h / ranks",
    )


def _save_now(run: Run) -> None:
    """Publish a checkpoint of this step; it is the last chance, so a failure ends the run."""
    _collect(run, wait=True)
    _begin_save(run)
    saved = _collect(run, wait=True)
    if saved is not None and saved.problem is not None:
        raise CheckpointError(saved.problem)


def _stop(run: Run) -> ExitCode:
    """Stopped on request, with the state saved."""
    _collect(run, wait=True)
    if run.step != run.saved_step:
        _save_now(run)
    return ExitCode.STOPPED


def _state(run: Run) -> dict[str, Any]:
    """state.json: all that a resumed run needs beside the tensors. Random state is a function of (seed, step, rank)."""
    config = run.config
    return {
        "step": run.step,
        "tokens_seen": run.step * config.tokens_per_step,
        "samples_seen": run.step * config.global_batch_sequences,
        "optimizer_step": run.engine.optimizer_step,
        "order": run.loader.state_at(run.next_sample).to_dict(),
        "loss_guard": run.guard.state(),
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


def _assemble(config: TrainConfig, world: World, run_dir: Path, watchdog: Watchdog) -> Run:
    root = checkpoint.root_of(run_dir, config.checkpoint.target)
    found = checkpoint.find_latest(root, world)
    if found.path is None and found.passed_over:
        raise CheckpointError(
            f"no checkpoint in {root / 'checkpoints'} can be trusted ({'; '.join(found.passed_over)}); "
            "restore one, or start afresh in another run_dir"
        )
    state = checkpoint.read_state(found.path) if found.path else None
    changed = check_resumable(config, state) if state else []
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
    identity = on_main(lambda: write_run_files(config, run_dir, state), world)
    watchdog.attempt(identity["attempt"])
    stop = StopRequest(run_dir, watch_file=world.is_main, stop_after_s=config.stop_after_s)
    mark("engine")
    engine = Engine(config, world)
    monitor = Monitor(
        config,
        rank=world.rank,
        world_size=world.size,
        run_dir=run_dir,
        attempt=identity["attempt"],
        wandb_run_id=identity["wandb_run_id"],
        flops_per_token=flops_per_token(config.model, config.data.sequence_length),
        peak_flops_per_second=rank_peak_flops(config, world.device),
        first_step=(state["step"] if state else 0) + 1,
        n_steps=config.n_steps,
    )
    heldout_losses = heldout_losses_of(run_dir) if world.is_main and state else {}
    run = Run(
        config=config,
        world=world,
        run_dir=run_dir,
        root=root,
        identity=identity,
        loader=loader,
        engine=engine,
        monitor=monitor,
        stop=stop,
        stop_vote=Vote(stop.asked, world),
        guard=LossGuard(config.loss_guard, state.get("loss_guard") if state else None),
        saver=Saver(root, config.checkpoint, world, heldout_losses),
        heldout_losses=heldout_losses,
        watchdog=watchdog,
        step=0,
        next_sample=0,
    )
    _begin(run, found, changed)
    return run


def _begin(run: Run, found: Found, changed: list[str]) -> None:
    """Put the state in place: of a checkpoint, of another run's weights, or fresh."""
    config, world = run.config, run.world
    for reason in found.passed_over:
        run.monitor.event("checkpoint_passed_over", reason=reason)
    if found.path is not None:
        _restore(run, found.path)
        run.monitor.event(
            "resumed", step=run.step, path=str(found.path), world_size=world.size, config_changed=changed
        )
        return
    if config.init_from is not None:
        _init_from(config.init_from, run.engine, world, run.loader.tokenizer_sha256)
    run.monitor.event("started", world_size=world.size, n_steps=config.n_steps, init_from=config.init_from)


def _init_from(run_dir: str, engine: Engine, world: World, tokenizer_sha256: str) -> None:
    """Initial weights from another run's newest good checkpoint."""
    found = checkpoint.find_latest(checkpoint.root_of_run(Path(run_dir)), world)
    if found.path is None:
        raise ConfigError(
            f"init_from={run_dir} holds no usable checkpoint ({'; '.join(found.passed_over) or 'none'})"
        )
    if checkpoint.read_state(found.path)["tokenizer_sha256"] != tokenizer_sha256:
        raise ConfigError(f"init_from={run_dir} was trained with another tokenizer than this corpus")
    engine.restore_weights(checkpoint.load(found.path, ["weight"], engine.shapes, world))
