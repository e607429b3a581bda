"""The training loop: one optimizer step after another, and what happens between them.

`_stretch` is the outline: get batches, update the weights, agree with the other ranks, record, save. All decisions
that change training (stop, skip, roll back) use only sums over the ranks, so that all ranks decide the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from pretrain.arithmetic import advised_interval_s, between_failures_s
from pretrain.batch import Batch, Counts
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import Saved
from pretrain.checkpoint.tensors import CheckpointError
from pretrain.config.records import metric_of
from pretrain.data.inputs import Inputs
from pretrain.data.state import Substitution
from pretrain.distributed import World, gather_objects, on_main, sum_over_ranks
from pretrain.engine.bit_sums import REPLICA_MODULUS, check_bit_sums
from pretrain.engine.engine import StepResult
from pretrain.engine.optim import learning_rate
from pretrain.errors import ConfigError, ExitCode
from pretrain.evaluate.heldout import HeldOutResult, evaluate_loss
from pretrain.evaluate.tasks.in_loop import evaluate_tasks
from pretrain.monitor.monitor import StepRecord
from pretrain.printing import say
from pretrain.reliability.events import Event
from pretrain.reliability.heartbeat import LAUNCHER_LOST, mark
from pretrain.reliability.run_lock import lock_run
from pretrain.reliability.watchdog import Watchdog
from pretrain.remote import as_path, is_url
from pretrain.train.adapters import check_adapters
from pretrain.train.loss_guard import GuardDecision, LossGuard
from pretrain.train.run import Run, assemble, heldout_corpora, restore, state_of


def train(inputs: Inputs, world: World, watchdog: Watchdog, clean: Callable[[str], str]) -> ExitCode:
    """Train until the last step or a request to stop. All ranks call this together.

    `clean` brings the text of tasks into the form that the training text has.
    Raises ConfigError where the configuration cannot start or continue the run, or where the run diverges too often,
    and RunError where a disk, a checkpoint, data or a rank fails.
    """
    config = inputs.config
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    target = config.checkpoint.target
    folder = None if target is None or is_url(target) else Path(as_path(target))
    on_main(lambda: lock_run(run_dir, folder), world)
    run = assemble(inputs, world, run_dir, watchdog, clean)
    if run.step >= run.loader.n_steps:
        code = ExitCode.FINISHED
        if world.is_main:
            say(
                f"already finished at step {run.step}; to train on, give a larger total_steps or total_tokens"
            )
    else:
        code = _loop(run)
    if code is ExitCode.STOPPED:
        run.monitor.event(Event.STOPPED, step=run.step, reason=_reason(run))
    else:
        if run.base is not None:
            facts = check_adapters(config, run.engine.state, run.root, run.step, world)
            run.monitor.event(Event.ADAPTERS_CHECKED, step=run.step, **facts)
        run.monitor.event(Event.FINISHED, step=run.step, reason=run.early_stop.reason)
    run.monitor.close(int(code))
    run.engine.close()
    return code


def _reason(run: Run) -> str:
    """Why the run stops, as far as any rank knows. A lost launcher is the reason only if no stop was requested."""
    known = [reason for reason in gather_objects(run.stop.reason, run.world) if reason is not None]
    return min(known, key=lambda reason: reason == LAUNCHER_LOST, default=f"stop_at_step={run.step}")


def _loop(run: Run) -> ExitCode:
    """Train from the current state, and after each rollback again from the older checkpoint."""
    if run.stop_vote.now():  # a stop was requested during startup: there is nothing to save
        return ExitCode.STOPPED
    while True:
        _evaluate_if_missed(run)
        if run.early_stop.reason is not None:
            return ExitCode.FINISHED
        code = _stretch(run)
        if code is not None:
            return code


def _stretch(run: Run) -> ExitCode | None:
    """Train until the run ends or stops, and return its exit code, or until it rolls back, and return None."""
    timer = StepTimer()
    n_substituted = len(run.loader.state.substitutions)
    for batches in run.loader.steps(run.step + 1, partial(_of_all_ranks, world=run.world)):
        timer.data_arrived()
        n_substituted = _report_substitutions(run, n_substituted)
        update = _update_weights(run, batches)
        if update is None:  # a stop was requested during this step: drop it and keep the previous one
            return _stop(run)
        sums = _agree(run, update, batches)
        done = _complete(run, update, sums)
        _write_ledger(run, batches)
        timer.step_done()
        run.monitor.step(_record_of(run, done, timer))
        if done.loss is not None:  # a step that computed nothing says nothing about the speed of the others
            run.pace.note(timer.step_time_s, timer.data_wait_s)
        if _roll_back_if_needed(run, done):
            return None
        code = _after_step(run, sums)
        if code is not None:
            return code
        timer.restart()
    return ExitCode.FINISHED


class StepTimer:
    """Measures the current step in seconds on the monotonic clock: `restart`, then `data_arrived`, then `step_done`."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.data_wait_s = 0.0
        """Seconds from the beginning of the step until its batches arrived."""
        self.step_time_s = 0.0
        """Seconds from the beginning of the step until it was done, including the wait for data."""

    def data_arrived(self) -> None:
        """Record that the loader has returned the batches of the step."""
        self.data_wait_s = time.monotonic() - self._began

    def step_done(self) -> None:
        """Record that the step is completed. Work after it, such as a save, does not count toward any step."""
        self.step_time_s = time.monotonic() - self._began

    def restart(self) -> None:
        """Begin the next step, which first waits for its data."""
        self._began = time.monotonic()
        mark("data")


class Update(NamedTuple):
    """One optimizer update as this rank has made it, before the ranks exchange their sums."""

    step: int
    """Number of the step, which is completed by this update."""
    lr: float
    """Learning rate."""
    loss_limit: float
    """Loss in nats above which the engine skips the update."""
    result: StepResult
    """The engine's result of the step."""


def _update_weights(run: Run, batches: list[Batch]) -> Update | None:
    """Forward and backward passes and the update of the weights; None if a stop was requested meanwhile."""
    step, limit = run.step + 1, run.guard.limit()
    lr = learning_rate(run.config.schedule, run.config.optim.lr, step, run.loader.n_steps)
    result = run.engine.train_step(batches, step, lr, limit, run.stop_vote.last)
    if result is None:
        return None
    mark("update done", step)
    return Update(step, lr, limit, result)


class CompletedStep(NamedTuple):
    """A step on which all ranks agree."""

    update: Update
    """The update as made by this rank."""
    sums: Sums
    """The sums over all ranks."""
    loss: float | None
    """Mean nats per predicted token over the global batch; None if it has no token to predict."""
    loss_scale: float | None
    """Factor by which the loss was multiplied; None if the precision is not fp16."""
    rescaled: bool
    """Whether the update was skipped only because the loss scale was too large, which says nothing about the loss."""


def _complete(run: Run, update: Update, sums: Sums) -> CompletedStep:
    """Count the step as completed, and adjust the loss scale of the next one."""
    n_predicted = update.result.n_predicted
    loss = sums.nll / n_predicted if n_predicted else None
    scale, used, rescaled = run.engine.loss_scale, None, False
    if scale is not None and loss is not None:
        used = scale.value
        rescaled = scale.update(applied=not update.result.skipped, loss=loss, limit=update.loss_limit)
    run.step = update.step
    if loss is not None:  # the first step that computes something takes longer, wherever it is
        run.watchdog.started()
    return CompletedStep(update, sums, loss, used, rescaled)


def _record_of(run: Run, done: CompletedStep, timer: StepTimer) -> StepRecord:
    """The record of a completed step for metrics.jsonl, W&B and the progress line."""
    (step, lr, _, result), sums = done.update, done.sums
    plan = run.loader.plan[step]
    return StepRecord(
        step=step,
        tokens_seen=plan.tokens_seen,
        samples_seen=plan.samples_seen,
        step_tokens=(plan.end_sample - plan.first_sample) * plan.sequence_length,
        sequence_length=plan.sequence_length,
        cut_documents_frac=sums.cut / max(1, sums.pieces),
        padding_tokens=int(sums.padding),
        substituted_chunks=len(run.loader.state.substitutions),
        predicted_tokens=result.n_predicted,
        loss=done.loss,
        z_loss=sums.z / result.n_predicted if run.config.model.z_loss and result.n_predicted else None,
        grad_norm=result.grad_norm,
        loss_scale=done.loss_scale,
        lr=lr,
        step_time_s=timer.step_time_s,
        data_wait_s=timer.data_wait_s,
        skipped=result.skipped,
        epochs=run.loader.epochs(step) if step % run.config.logging.every_steps == 0 else {},
    )


class Sums(NamedTuple):
    """Values of a step, summed over all ranks. Every rank has the same sums."""

    nll: float
    """Sum of the negative log-likelihoods of the predicted tokens, in nats."""
    z: float
    """Sum of the squared log-partitions."""
    asked: float
    """Number of ranks that were asked to stop."""
    busy: float
    """Number of ranks that are still writing the previous checkpoint."""
    due: float
    """1 if `checkpoint.every_minutes` have passed since the last save, as rank 0 decides; otherwise 0."""
    compare: float
    """1 if the speeds of the ranks should be compared, as rank 0 decides; otherwise 0."""
    changed: float
    """Number of ranks whose memory has changed between two updates."""
    replica: float
    """Sum over the ranks of the bit sum, modulo REPLICA_MODULUS, of what every rank holds."""
    pieces: float
    """Number of documents, and parts of documents, in the sequences of the step."""
    cut: float
    """Number of those pieces that are not a whole document."""
    padding: float
    """Number of padding tokens."""


def _agree(run: Run, update: Update, batches: list[Batch]) -> Sums:
    """Exchange all values on which the ranks must agree, in one collective call per step.

    Raises RunError on all ranks if the memory of one has changed between two updates.
    """
    result = update.result
    counts = Counts(*map(sum, zip(*(batch.counts for batch in batches), strict=True)))
    if not run.world.is_first_reader:
        counts = Counts()
    mine: dict[str, float | torch.Tensor] = {
        "nll": result.nll_sum,
        "z": result.z_sum,
        "asked": run.stop.asked(),
        "busy": run.saver.busy,
        "due": run.world.is_main and _minutes_are_over(run),
        "compare": run.pace.wants_comparison(),
        "changed": result.memory_changed,
        "replica": run.engine.replica_sum % REPLICA_MODULUS,
        **counts._asdict(),
    }
    sums = Sums(*sum_over_ranks([mine[name] for name in Sums._fields], run.world))
    check_bit_sums(
        changed=bool(mine["changed"]),
        replica=float(mine["replica"]),
        n_changed=sums.changed,
        replica_total=sums.replica,
        step=update.step,
        world=run.world,
    )
    return sums


def _after_step(run: Run, sums: Sums) -> ExitCode | None:
    """Stop, save or evaluate, on all ranks alike. Returns the exit code if the run ends with this step."""
    config, step = run.config, run.step
    _collect(run)
    if step == config.schedule.moment_warmup_steps:
        run.monitor.event(Event.MOMENTS_FILLED, step=step)
    if sums.compare:
        _compare_ranks(run)
    last = step == run.loader.n_steps
    if not last and (sums.asked or step == config.stop_at_step):
        return _stop(run)
    permanent = config.checkpoint.keep_every_steps and step % config.checkpoint.keep_every_steps == 0
    if last:
        _save_now(run)
    elif sums.due or step % config.checkpoint.every_steps == 0:
        if sums.busy and not permanent:
            run.monitor.event(
                Event.CHECKPOINT_SKIPPED, step=step, reason="the one before is still being written"
            )
        else:
            _collect(run, wait=True)
            _begin_save(run)
            if not config.checkpoint.background:
                _collect(run, wait=True)
    # Evaluate after saving: if held-out text turns out to be damaged, no step is lost.
    if last or step % config.evaluation.every_steps == 0:
        _evaluate(run)
    if not last and run.early_stop.reason is not None:
        _save_unless_saved(run)
        return ExitCode.FINISHED
    return ExitCode.FINISHED if last else None


def _of_all_ranks(proposed: list[Substitution], world: World) -> list[Substitution]:
    """The substitutions that all ranks propose, in the order of the ranks. All ranks call this together."""
    (n_proposed,) = sum_over_ranks([len(proposed)], world)
    if not n_proposed:
        return []
    rows = gather_objects([asdict(entry) for entry in proposed], world)
    return [Substitution(**values) for row in rows for values in row]


def _report_substitutions(run: Run, n_reported: int) -> int:
    """Record the substitutions after the first `n_reported` ones. Returns the number of all."""
    made = run.loader.state.substitutions
    for entry in made[n_reported:]:
        facts = asdict(entry) | {"source": run.loader.names[entry.source]}
        run.monitor.event(Event.CHUNK_SUBSTITUTED, step=run.step + 1, **facts)
    return len(made)


def _compare_ranks(run: Run) -> None:
    """Report the ranks that slow down the others. If steps are slow but no rank is the cause, report that."""
    mark("comparison")
    stragglers = run.pace.find_stragglers(run.world)
    for straggler in stragglers:
        run.monitor.event(Event.STRAGGLER, step=run.step, **vars(straggler))
    if run.pace.slow and not stragglers:
        run.monitor.event(Event.SLOW_STEPS, step=run.step, reason="no rank is slower than the others")


# ---- rollbacks -------------------------------------------------------------------------------------------------------


def _roll_back_if_needed(run: Run, done: CompletedStep) -> bool:
    """Let the loss guard judge the step, and roll back if it says so. Returns whether the run was rolled back."""
    if done.loss is None:
        run.guard.nothing_predicted()
        return False
    loss, limit, skipped = done.loss, done.update.loss_limit, done.update.result.skipped and not done.rescaled
    decision = run.guard.decide(loss, limit, applied=not skipped)
    if loss > limit:
        run.monitor.event(Event.LOSS_SPIKE, step=run.step, loss=loss, limit=limit)
    if decision is not GuardDecision.ROLL_BACK:
        return False
    reason = (
        f"loss {loss:.4g} above {limit:.4g}"
        if loss > limit
        else f"{run.guard.skips_in_a_row} updates left out in a row"
    )
    # Skipped updates changed nothing, so the state before the first of them is the one to return to.
    _roll_back(run, first_bad_step=run.step - run.guard.steps_since_good + 1, reason=reason)
    return True


def _roll_back(run: Run, first_bad_step: int, reason: str) -> None:
    """Load the newest checkpoint before `first_bad_step`, and skip the samples of that step and of some later ones.

    Raises ConfigError if no rollback is left or no checkpoint is old enough.
    """
    guard = run.config.loss_guard
    advice = "lower optim.lr or lengthen schedule.warmup_steps, and look at the data"
    if len(run.loader.state.passed_over) == guard.max_rollbacks:
        raise ConfigError(
            f"the run diverges at step {first_bad_step} ({reason}) after loss_guard.max_rollbacks="
            f"{guard.max_rollbacks} rollbacks; {advice}"
        )
    _collect(run, wait=True)
    found = checkpoint.find_latest(run.root, run.world, before=first_bad_step)
    if found.verified is None:
        raise ConfigError(
            f"the run diverges at step {first_bad_step} ({reason}) and no checkpoint is older; {advice}"
        )
    good = found.verified
    for newer in on_main(lambda: _delete_after(run.root, good.path), run.world):
        run.monitor.event(Event.CHECKPOINT_DELETED, step=run.step, path=newer)
    from_step = run.step
    restore(run, good)
    passed_over = run.loader.pass_over(first_bad_step, guard.pass_over_steps)
    run.guard = LossGuard(guard, good.state.get("loss_guard"))
    run.monitor.n_steps = run.loader.n_steps
    run.monitor.rolled_back(run.step, from_step=from_step, passed_over_samples=passed_over, reason=reason)


def _delete_after(root: Path, path: Path) -> list[str]:
    """Delete the checkpoints after `path`, which hold steps that the rollback undoes. Rank 0 calls this."""
    newer = [p for p in checkpoint.list_checkpoints(root) if checkpoint.step_of(p) > checkpoint.step_of(path)]
    for one in newer:
        checkpoint.remove(one)
    return [str(one) for one in newer]


def _write_ledger(run: Run, batches: list[Batch]) -> None:
    """Record this rank's sample indices of the step and the xxh3-64 of their tokens, in the same order, if asked to."""
    if not (run.config.logging.sample_ledger and run.world.is_first_reader):
        return
    digest = xxhash.xxh3_64()
    samples: list[int] = []
    end = run.loader.plan[run.step].end_sample
    for batch in batches:
        is_filled = batch.samples < end
        samples += batch.samples[is_filled].tolist()
        digest.update(batch.tokens[torch.from_numpy(is_filled)].numpy().tobytes())
    run.monitor.ledger(run.step, samples, digest.hexdigest())


def _evaluate(run: Run) -> None:
    """Compute and record the losses of all held-out sets and the scores of all tasks, and those of the averaged weights
    if the run keeps them."""
    started = time.monotonic()
    if not run.config.evaluation.corpora and not run.tasks:
        return
    figures = _heldout_figures(run)
    tasks = _task_figures(run)
    run.monitor.evaluation(run.step, figures | {"time_s": time.monotonic() - started}, tasks)


def _heldout_figures(run: Run) -> dict[str, float]:
    """The losses of all held-out sets. The loss that decides is noted."""
    config = run.config.evaluation
    if config.decides is None:
        return {}
    results = _heldout_results(run)
    figures = {
        metric_of(name, figure): value
        for name, result in results.items()
        for figure, value in result.figures().items()
    }
    if run.engine.state.ema_keys:
        with run.engine.state.averaged():
            for name, result in _heldout_results(run).items():
                figures |= {metric_of(name, f"ema/{key}"): v for key, v in result.figures().items()}
    loss = results[config.decides].overall.loss
    run.heldout_losses[run.step] = loss
    run.early_stop.note(run.step, loss)
    return figures


def _task_figures(run: Run) -> dict[str, float]:
    """The scores of all tasks, and the seconds that they took."""
    if not run.tasks:
        return {}
    started = time.monotonic()

    def scores() -> dict[str, float]:
        forward = partial(run.engine.evaluate, by_sequence=True)
        return evaluate_tasks(
            forward, run.tasks, micro_batch_sequences=run.config.micro_batch, world=run.world
        )

    figures = scores()
    if run.engine.state.ema_keys:
        with run.engine.state.averaged():
            figures |= {f"ema/{name}": value for name, value in scores().items()}
    return figures | {"time_s": time.monotonic() - started}


def _heldout_results(run: Run) -> dict[str, HeldOutResult]:
    """The losses of the weights that the engine holds now, by held-out set."""
    config = run.config
    return {
        name: evaluate_loss(
            run.engine.evaluate,
            corpus,
            sequence_length=config.data.sequence_length,
            micro_batch_sequences=config.micro_batch,
            max_sequences=config.evaluation.max_sequences,
            world=run.world,
            document_masking=config.data.document_masking,
            key=config.evaluation.key_of(name),
            masking=run.masking,
        )
        for name, corpus in heldout_corpora(config, run.manifests).items()
    }


def _evaluate_if_missed(run: Run) -> None:
    """Evaluate the step that was loaded, if early stopping has not counted its evaluation.

    A step is saved before it is evaluated, so the checkpoint does not have the result.
    """
    config = run.config.evaluation
    if config.patience is None or run.step == 0 or run.step % config.every_steps:
        return
    if run.early_stop.step < run.step:
        _evaluate(run)


# ---- saving ----------------------------------------------------------------------------------------------------------


def _minutes_are_over(run: Run) -> bool:
    """Whether `checkpoint.every_minutes` have passed since the last save began."""
    minutes = run.config.checkpoint.every_minutes
    return minutes is not None and time.monotonic() - run.saved_at >= 60 * minutes


def _begin_save(run: Run) -> None:
    """Copy the state to host memory, and let the saver write it while training continues."""
    mark("save")
    run.saved_at = time.monotonic()
    run.saver.start(run.step, run.engine.state.snapshot, state_of(run))


def _collect(run: Run, *, wait: bool = False) -> Saved | None:
    """Report the save in flight once it is done. A failed save is also only reported, and training continues."""
    saved = run.saver.finished(wait=wait)
    if saved is not None:
        run.monitor.checkpoint(saved)
        if saved.problem is None:
            run.saved_step = saved.step
            _advise(run, saved)
    return saved


def _advise(run: Run, saved: Saved) -> None:
    """After the first save, report the time between saves that would lose the least training time."""
    if run.advised:
        return
    run.advised = True
    policy = run.config.checkpoint
    # A save costs the time that training pauses: for the copy and, without a background save, also for the write.
    cost_s = saved.stall_s + (0.0 if policy.background else saved.write_s)
    run.monitor.event(
        Event.CHECKPOINT_INTERVAL_ADVISED,
        interval_s=advised_interval_s(cost_s, between_failures_s(run.world.size, policy.mtbf_hours)),
        cost_s=cost_s,
        mtbf="given" if policy.mtbf_hours is not None else "estimated: 50,000 h / ranks",
    )


def _save_now(run: Run) -> None:
    """Publish a checkpoint of this step and wait for it. It is the last one of this start: a failure ends the run."""
    _collect(run, wait=True)
    _begin_save(run)
    saved = _collect(run, wait=True)
    if saved is not None and saved.problem is not None:
        raise CheckpointError(saved.problem)


def _stop(run: Run) -> ExitCode:
    """End the run on request, with the state of the last completed step saved."""
    _save_unless_saved(run)
    return ExitCode.STOPPED


def _save_unless_saved(run: Run) -> None:
    _collect(run, wait=True)
    if run.step != run.saved_step:
        _save_now(run)
