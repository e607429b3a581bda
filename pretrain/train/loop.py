"""The loop: one optimizer step after another, with what happens between them."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from pretrain.batch import Batch, Counts
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import Saved, advised_interval_s
from pretrain.checkpoint.tensors import CheckpointError
from pretrain.config import TrainConfig
from pretrain.corpus.shards import Corpus
from pretrain.data.state import Substitution
from pretrain.distributed import World, gather_objects, on_main, sum_over_ranks
from pretrain.engine.bit_sums import REPLICA_MODULUS, check_memory
from pretrain.engine.engine import StepResult
from pretrain.engine.optim import learning_rate
from pretrain.errors import ConfigError, ExitCode
from pretrain.evaluate.heldout import evaluate_loss
from pretrain.monitor.monitor import StepRecord
from pretrain.reliability.events import Event
from pretrain.reliability.heartbeat import LAUNCHER_LOST, mark
from pretrain.reliability.run_lock import lock_run
from pretrain.reliability.watchdog import Watchdog
from pretrain.remote import ReadOptions, as_path, is_remote
from pretrain.train.loss_guard import LossGuard, Verdict
from pretrain.train.run import Run, assemble, restore, state_of


def train(config: TrainConfig, world: World, watchdog: Watchdog) -> ExitCode:
    """Train until the last step or a request to stop. `config` is resolved; all ranks call this together."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    target = config.checkpoint.target
    folder = None if target is None or is_remote(target) else Path(as_path(target))
    on_main(lambda: lock_run(run_dir, folder), world)
    run = assemble(config, world, run_dir, watchdog)
    code = ExitCode.FINISHED if run.step >= run.loader.n_steps else _loop(run)
    if code is ExitCode.STOPPED:
        run.monitor.event(Event.STOPPED, step=run.step, reason=_reason(run))
    else:
        run.monitor.event(Event.FINISHED, step=run.step)
    run.monitor.close(int(code))
    run.engine.close()
    return code


def _reason(run: Run) -> str:
    """Why the run stops, as any rank knows; that it has lost its launcher only where nobody asked for a stop."""
    known = [reason for reason in gather_objects(run.stop.reason, run.world) if reason is not None]
    return min(known, key=lambda reason: reason == LAUNCHER_LOST, default=f"stop_at_step={run.step}")


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
    config = run.config
    before = time.monotonic()
    for batches in run.loader.steps(run.step + 1):
        data_wait_s = time.monotonic() - before
        step, limit = run.step + 1, run.guard.limit()
        lr = learning_rate(config.schedule, config.optim.lr, step, run.loader.n_steps)
        result = run.engine.train_step(batches, step, lr, limit, run.stop_vote.last)
        if result is None:  # asked within the step: back to its beginning, which is the step before
            return _stop(run)
        mark("update done", step)
        sums = _agree(run, result, batches, step)
        plan = run.loader.plan[step]
        if sums.substitutions:
            _note_substitutions(run, batches, step)
        loss = sums.nll / max(1, result.n_predicted)
        rescaled, loss_scale = _adjust_loss_scale(run, result, loss, limit)
        run.step = step
        run.watchdog.started()
        if config.logging.sample_ledger and run.world.is_first_reader:
            run.monitor.ledger(step, *_ledger_entry(batches))
        now = time.monotonic()
        run.monitor.step(
            StepRecord(
                step=step,
                tokens_seen=plan.tokens_seen,
                samples_seen=plan.samples_seen,
                step_tokens=(plan.end_sample - plan.first_sample) * plan.sequence_length,
                sequence_length=plan.sequence_length,
                cut_documents_frac=sums.cut / max(1, sums.pieces),
                padding_tokens=int(sums.padding),
                substituted_chunks=len(run.loader.state.substitutions),
                loss=loss,
                z_loss=sums.z / max(1, result.n_predicted) if config.model.z_loss else None,
                grad_norm=result.grad_norm,
                loss_scale=loss_scale,
                lr=lr,
                step_time_s=now - before,
                data_wait_s=data_wait_s,
                skipped=result.skipped,
                epochs=run.loader.epochs(step) if step % config.logging.every_steps == 0 else {},
            )
        )
        run.pace.note(now - before, data_wait_s)
        if _goes_wrong(run, loss, limit, result.skipped and not rescaled):
            return None
        code = _after_step(run, sums)
        if code is not None:
            return code
        before = time.monotonic()
        mark("data")
    return ExitCode.FINISHED


class Sums(NamedTuple):
    """The sums over all ranks of what each says after a step."""

    nll: float
    """Negative log-likelihoods, nats."""
    z: float
    """Squared log-partitions."""
    asked: float
    """To stop."""
    busy: float
    """With the save before."""
    due: float
    """A save, by the clock."""
    probe: float
    """The ranks' speeds should be compared."""
    changed: float
    """Memory, between two updates."""
    replica: float
    """Sum over the bits of what every rank holds."""
    pieces: float
    """Documents and parts of them in the sequences,"""
    cut: float
    """those of them that are not whole,"""
    padding: float
    """and tokens of padding."""
    substitutions: float
    """Chunks found bad while these sequences were read."""


def _agree(run: Run, result: StepResult, batches: list[Batch], step: int) -> Sums:
    """One exchange after each step. Raises RunError, alike on all ranks, where a rank's memory has changed."""
    counts = Counts(*map(sum, zip(*(batch.counts for batch in batches), strict=True)))
    if not run.world.is_first_reader:
        counts = Counts()
    mine: dict[str, float | torch.Tensor] = {
        "nll": result.nll_sum,
        "z": result.z_sum,
        "asked": run.stop.asked(),
        "busy": run.saver.busy,
        "due": run.world.is_main and _minutes_are_over(run),
        "probe": run.pace.wants_probe(),
        "changed": result.memory_changed,
        "replica": run.engine.replica_sum % REPLICA_MODULUS,
        **counts._asdict(),
        "substitutions": sum(len(batch.substitutions) for batch in batches),
    }
    sums = Sums(*sum_over_ranks([mine[name] for name in Sums._fields], run.world))
    check_memory(
        changed=bool(mine["changed"]),
        replica=float(mine["replica"]),
        n_changed=sums.changed,
        replica_total=sums.replica,
        step=step,
        world=run.world,
    )
    return sums


def _after_step(run: Run, sums: Sums) -> ExitCode | None:
    """Save, evaluate, stop; the same on all ranks. The exit code where the run ends here."""
    config, step = run.config, run.step
    _collect(run)
    if sums.probe:
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
    # After saving, so that damaged held-out text costs no step.
    if last or step % config.evaluation.every_steps == 0:
        _evaluate(run)
    return ExitCode.FINISHED if last else None


def _note_substitutions(run: Run, batches: list[Batch], step: int) -> None:
    """Into the state of all ranks, and so into the next checkpoint: what another chunk was read for."""
    mine = [asdict(entry) for batch in batches for entry in batch.substitutions]
    found = [Substitution(**values) for values in sum(gather_objects(mine, run.world), [])]
    for entry in run.loader.substituted(found):
        facts = asdict(entry) | {"source": run.loader.names[entry.source]}
        run.monitor.event(Event.CHUNK_SUBSTITUTED, step=step, **facts)


def _compare_ranks(run: Run) -> None:
    """Name the ranks that hold up the others; that none does is worth a word where steps are slow."""
    mark("comparison")
    stragglers = run.pace.find_stragglers(run.world)
    for straggler in stragglers:
        run.monitor.event(Event.STRAGGLER, step=run.step, **vars(straggler))
    if run.pace.slow and not stragglers:
        run.monitor.event(Event.SLOW_STEPS, step=run.step, reason="no rank is slower than the others")


# ---- a loss that goes wrong ------------------------------------------------------------------------------------------


def _adjust_loss_scale(run: Run, result: StepResult, loss: float, limit: float) -> tuple[bool, float | None]:
    """Whether the update was left out to find a smaller loss scale, which is no fault; and the step's scale, if any."""
    scale = run.engine.loss_scale
    if scale is None:
        return False, None
    used = scale.value
    return scale.update(applied=not result.skipped, loss=loss, limit=limit), used


def _goes_wrong(run: Run, loss: float, limit: float, skipped: bool) -> bool:
    """Ask the guard; True after a rollback."""
    verdict = run.guard.judge(loss, limit, applied=not skipped)
    if loss > limit:
        run.monitor.event(Event.LOSS_SPIKE, step=run.step, loss=loss, limit=limit)
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
    window = run.loader.pass_over(first_bad_step, guard.pass_over_steps)
    run.guard = LossGuard(guard, good.state.get("loss_guard"))
    run.monitor.rolled_back(run.step, from_step=from_step, passed_over_samples=window, reason=reason)


def _delete_after(root: Path, path: Path) -> list[str]:
    """Rank 0: delete the checkpoints after `path`, which belong to what is undone."""
    newer = [p for p in checkpoint.list_checkpoints(root) if checkpoint.step_of(p) > checkpoint.step_of(path)]
    for one in newer:
        checkpoint.remove(one)
    return [str(one) for one in newer]


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
        Corpus(config.evaluation.manifest, config.data.verify_chunks, options=ReadOptions.of(config.data)),
        sequence_length=config.data.sequence_length,
        micro_batch_sequences=config.micro_batch,
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
    run.saver.start(run.step, run.engine.state.snapshot, state_of(run))


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
        Event.CHECKPOINT_INTERVAL_ADVISED,
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
