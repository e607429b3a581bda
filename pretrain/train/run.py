"""Assembles the parts of a run, and converts its state to the content of a checkpoint and back."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pretrain import __version__
from pretrain.arithmetic import flops_per_token
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.folder import root_of
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.state import BaseReference, RunState
from pretrain.checkpoint.tensors import CheckpointError, FoundCheckpoint, Verified
from pretrain.config import AUTO, Precision, TrainConfig, to_dict
from pretrain.corpus.manifest import Manifest
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.data.inputs import Inputs, tokenizer_path
from pretrain.data.loader import TrainLoader
from pretrain.data.masking import Masking
from pretrain.data.state import OrderState
from pretrain.distributed import Vote, World, on_main
from pretrain.engine import micro_batch as batch_search
from pretrain.engine.engine import Engine
from pretrain.engine.loss_scale import LossScale
from pretrain.engine.peak import emulation_warning, rank_peak_flops
from pretrain.errors import ConfigError
from pretrain.evaluate.heldout import check_heldout
from pretrain.evaluate.tasks.in_loop import LoopTask, prepare
from pretrain.model.lora import n_adapters
from pretrain.model.precision import precision_of
from pretrain.monitor.monitor import Monitor
from pretrain.printing import say
from pretrain.reliability.events import Event
from pretrain.reliability.heartbeat import mark
from pretrain.reliability.journal import heldout_losses_of
from pretrain.reliability.stop import StopRequest
from pretrain.reliability.watchdog import Watchdog
from pretrain.remote import ReadOptions
from pretrain.train.base import base_of, new_weights, source_of
from pretrain.train.early_stop import EarlyStop
from pretrain.train.loss_guard import LossGuard
from pretrain.train.run_folder import check_resumable, write_run_files
from pretrain.train.stragglers import Pace


@dataclass
class Run:
    """A run at one moment: everything the loop needs, on one rank."""

    config: TrainConfig
    """The configuration. If the micro batch was `auto`, this has the size that was found."""
    manifests: dict[str, Manifest]
    """The manifest of each corpus that the configuration names, by its path or URL there."""
    masking: Masking | None
    """What hides tokens where the objective is mlm."""
    world: World
    """The ranks of the run, and this process's place among them."""
    run_dir: Path
    """The run folder."""
    root: Path
    """The folder or URL that holds `checkpoints/`."""
    identity: dict[str, Any]
    """The content of run.json: run_id, wandb_run_id and attempt."""
    loader: TrainLoader
    """The batches of this rank, and the order state."""
    engine: Engine
    """The model and its optimizer."""
    monitor: Monitor
    """The records of the run."""
    pace: Pace
    """Notices slow steps and finds the ranks that cause them."""
    stop: StopRequest
    """Whether this rank was asked to stop."""
    stop_vote: Vote
    """Whether any rank was asked to stop, on which all ranks agree."""
    guard: LossGuard
    """Decides whether the loss of a step is acceptable."""
    early_stop: EarlyStop
    """Decides whether the held-out loss still falls."""
    saver: Saver
    """Writes checkpoints in the background."""
    heldout_losses: dict[int, float]
    """Held-out loss of each evaluation, by step: that of the set that decides."""
    watchdog: Watchdog
    """This rank's watcher process."""
    tasks: list[LoopTask]
    """The tasks that are scored at each evaluation."""
    step: int
    """Number of completed optimizer updates."""
    searched: bool
    """Whether the configuration asks for micro_batch_sequences=auto."""
    base: BaseReference | None = None
    """The frozen weights under the adapters; None if all weights are trained."""
    saved_step: int = 0
    """The newest step whose checkpoint this process has published or loaded; 0 if there is none."""
    advised: bool = False
    """Whether the advice on the interval between saves has been given."""
    saved_at: float = field(default_factory=time.monotonic)
    """Time at which the last save began, in seconds on the monotonic clock."""


def assemble(
    inputs: Inputs, world: World, run_dir: Path, watchdog: Watchdog, clean: Callable[[str], str]
) -> Run:
    """Find the newest checkpoint, build the parts of the run, and load the state. All ranks call this together. Raises
    ConfigError where the configuration does not fit, and CheckpointError where there are only damaged checkpoints."""
    config, manifests, masking = inputs
    root = root_of(run_dir, config.checkpoint.target)
    found = _newest_checkpoint(root, world)
    state = found.verified.state if found.verified else None
    changed = check_resumable(config, state) if state else []
    searched = config.micro_batch_sequences == AUTO
    if searched and state and (known := batch_search.earlier_result(state, changed, world)) is not None:
        config = replace(config, micro_batch_sequences=known)
    loader = _loader(config, world, state, inputs)
    tasks = on_main(lambda: _check_evaluation(inputs, config, loader.tokenizer_sha256, clean), world)
    identity = on_main(
        lambda: write_run_files(config, run_dir, state, loader.tokenizer_sha256, manifests), world
    )
    watchdog.attempt(identity["attempt"])
    stop = StopRequest(run_dir, watch_file=world.is_main, stop_after_s=config.stop_after_s)
    base = base_of(config, root, state, loader.tokenizer_sha256, world)
    mark("engine")
    engine = Engine(config, world, base.shares if base else None)
    warning = emulation_warning(engine.config.engine.precision, engine.capability, world.device)
    if warning and world.is_main:
        say(f"warning: {warning}")
    monitor = _monitor(
        engine, world, run_dir, identity, loader, first_step=(state["step"] if state else 0) + 1
    )
    if config.micro_batch_sequences == AUTO:
        config = _search_micro_batch(config, world, engine, loader, monitor)
    heldout_losses = (
        heldout_losses_of(run_dir, config.evaluation.deciding_metric) if world.is_main and state else {}
    )
    run = Run(
        config=config,
        manifests=manifests,
        masking=masking,
        world=world,
        run_dir=run_dir,
        root=root,
        identity=identity,
        loader=loader,
        engine=engine,
        monitor=monitor,
        pace=Pace(watch=world.is_main and world.size > 1),
        stop=stop,
        stop_vote=Vote(stop.asked, world),
        guard=LossGuard(config.loss_guard, state.get("loss_guard") if state else None),
        early_stop=EarlyStop(config.evaluation),
        saver=Saver(root, config.checkpoint, world, heldout_losses),
        heldout_losses=heldout_losses,
        watchdog=watchdog,
        tasks=tasks,
        step=0,
        searched=searched,
        base=base.reference if base else None,
    )
    _begin(run, found, changed)
    return run


def _loader(config: TrainConfig, world: World, state: RunState | None, inputs: Inputs) -> TrainLoader:
    return TrainLoader(
        config.data,
        config.seed,
        global_batch_sequences=config.global_batch_sequences,
        micro_batch_sequences=config.micro_batch,
        rank=world.reader,
        world_size=world.n_readers,
        total_steps=config.total_steps,
        total_tokens=config.total_tokens,
        total_epochs=config.total_epochs,
        state=OrderState.from_dict(state["order"]) if state else None,
        manifests=inputs.manifests,
        masking=inputs.masking,
    )


def heldout_corpora(config: TrainConfig, manifests: dict[str, Manifest]) -> dict[str, Corpus]:
    """The held-out corpora by the names of their sets."""
    options = ReadOptions.of(config.data)
    return {
        name: Corpus(path, config.data.verify_chunks, options=options, manifest=manifests[path])
        for name, path in config.evaluation.corpora.items()
    }


def _check_heldout(config: TrainConfig, manifests: dict[str, Manifest], masking: Masking | None) -> None:
    """Raise ConfigError if held-out text cannot be read or has no token to predict, before hours of training."""
    for name, corpus in heldout_corpora(config, manifests).items():
        check_heldout(
            corpus,
            sequence_length=config.data.sequence_length,
            max_sequences=config.evaluation.max_sequences,
            document_masking=config.data.document_masking,
            key=config.evaluation.key_of(name),
            masking=masking,
        )


def _check_evaluation(
    inputs: Inputs, config: TrainConfig, tokenizer_sha256: str, clean: Callable[[str], str]
) -> list[LoopTask]:
    """Check the held-out text, and read the tasks of the run, of which it says what is scored. Raises ConfigError.

    Rank 0 alone reads the tasks, so all ranks have the same choices to score, whatever their disks hold.
    """
    _check_heldout(config, inputs.manifests, inputs.masking)
    evaluation = config.evaluation
    if not evaluation.tasks:
        return []
    tokenizer = Tokenizer(tokenizer_path(config.data.corpora()[0].manifest), tokenizer_sha256)
    found = prepare(
        evaluation.tasks,
        tokenizer,
        sequence_length=config.data.sequence_length,
        max_items=evaluation.task_items,
        clean=clean,
    )
    for task in found:
        say(task.note)
    return found


def _newest_checkpoint(root: Path, world: World) -> FoundCheckpoint:
    """The newest intact checkpoint, if any. Raises CheckpointError where there are checkpoints but none is intact."""
    found = checkpoint.find_latest(root, world)
    if found.path is None and found.passed_over:
        raise CheckpointError(
            f"no checkpoint in {root / 'checkpoints'} can be trusted ({'; '.join(found.passed_over)}); "
            "restore one, or start afresh in another run_dir"
        )
    if found.verified is not None and found.verified.state.get("weights_only"):
        raise ConfigError(
            f"{found.path} holds weights only, so a run cannot go on from it; put a newer whole checkpoint back, or "
            "start a new run from these weights with init_from= and another run_dir"
        )
    return found


def _monitor(
    engine: Engine,
    world: World,
    run_dir: Path,
    identity: dict[str, Any],
    loader: TrainLoader,
    first_step: int,
) -> Monitor:
    config = engine.config
    return Monitor(
        config,
        rank=world.rank,
        world_size=world.size,
        run_dir=run_dir,
        attempt=identity["attempt"],
        wandb_run_id=identity["wandb_run_id"],
        flops_per_token=lambda length: flops_per_token(config.model, length, config.lora),
        peak_flops_per_second=rank_peak_flops(config, world.device),
        first_step=first_step,
        n_steps=loader.n_steps,
    )


def _search_micro_batch(
    config: TrainConfig, world: World, engine: Engine, loader: TrainLoader, monitor: Monitor
) -> TrainConfig:
    """Find the largest micro batch that fits, and set it in engine and loader. Returns the new configuration."""
    found = batch_search.find_micro_batch(engine, config, world)
    config = replace(config, micro_batch_sequences=found.micro_batch_sequences)
    engine.set_micro_batch(config)
    loader.set_micro_batch(config.micro_batch)
    monitor.event(Event.MICRO_BATCH_FOUND, **found.facts())
    return config


def _begin(run: Run, found: FoundCheckpoint, changed: list[str]) -> None:
    """Load the state of a checkpoint or the weights of another run, or keep the initial weights. Records which."""
    config, world = run.config, run.world
    chosen = run.engine.config
    facts: dict[str, Any] = {"world_size": world.size, "precision": chosen.engine.precision.value}
    if config.engine.precision is Precision.auto:
        facts["precision_decided_by"] = run.engine.capability.host
    facts["kernels"] = to_dict(chosen.kernels)
    state = run.engine.state
    facts |= {"trained_parameters": state.n_trained, "parameters": state.n_trained + state.n_frozen}
    corpora = {source.name: run.manifests[source.manifest] for source in config.data.corpora()}
    if packed := {name: _packing_of(manifest) for name, manifest in corpora.items() if manifest.packed}:
        facts["packed"] = packed
    if run.base is not None:
        facts |= {"adapters": n_adapters(list(state.shapes)), "base": run.base}
    for reason in found.passed_over:
        run.monitor.event(Event.CHECKPOINT_PASSED_OVER, reason=reason)
    if found.verified is not None:
        restore(run, found.verified)
        before = precision_of(found.verified.state)
        if before is not chosen.engine.precision:
            facts["precision_before"] = before.value
        run.monitor.event(Event.RESUMED, step=run.step, path=str(found.path), config_changed=changed, **facts)
        if changed and world.is_main:
            say("the configuration has changed since this checkpoint:")
            for change in changed:
                say(f"  {change}")
        return
    if config.init_from is not None and run.base is None:
        _init_from(config.init_from, run.engine, world, run.loader.tokenizer_sha256)
    run.monitor.event(Event.STARTED, n_steps=run.loader.n_steps, init_from=config.init_from, **facts)


def _packing_of(manifest: Manifest) -> dict[str, Any]:
    """How a corpus of whole dialogues was packed, and the share of its tokens that is filler."""
    assert manifest.packed is not None
    return asdict(manifest.packed) | {"filler_frac": manifest.filler_tokens / manifest.n_tokens}


def _init_from(run_dir: str, engine: Engine, world: World, tokenizer_sha256: str) -> None:
    """Load initial weights from the newest good checkpoint of another run, given by its folder or its URL."""
    source, state = source_of(run_dir, world, tokenizer_sha256), engine.state
    without = new_weights(source, engine.config)
    state.restore_weights(checkpoint.load(source, state.weight_keys, state.shapes, world, without=without))


# ---- state ----


def restore(run: Run, verified: Verified) -> None:
    """Set weights, moments, loss scale and step to those of a checkpoint; the data position follows from the step.

    Held-out losses of later steps are dropped, because these steps are undone.
    """
    mark("load")
    state, held = verified.state, run.engine.state
    keys = held.weight_keys + held.moment_keys + (held.ema_keys if state.get("ema") else [])
    held.restore(checkpoint.load(verified, keys, held.shapes, run.world), state["optimizer_step"])
    if run.engine.loss_scale is not None:
        run.engine.loss_scale = LossScale(state.get("loss_scale"))
    run.early_stop = EarlyStop(run.config.evaluation, state.get("early_stop"))
    run.step = state["step"]
    run.saved_step = run.step
    for undone in [step for step in run.heldout_losses if step > run.step]:
        del run.heldout_losses[undone]


def state_of(run: Run) -> dict[str, Any]:
    """The content of state.json: everything that a resumed run needs, except the tensors.

    It contains no random state, because that is a function of (seed, step, rank).
    """
    config, plan = run.config, run.loader.plan[run.step]
    return {
        "step": run.step,
        "tokens_seen": plan.tokens_seen,
        "samples_seen": plan.samples_seen,
        "sequence_length": plan.sequence_length,
        "optimizer_step": run.engine.state.optimizer_step,
        "ema": bool(run.engine.state.ema_keys),
        "order": run.loader.state_at(run.step).to_dict(),
        "loss_guard": run.guard.state(),
        "early_stop": run.early_stop.state(),
        "tokenizer_sha256": run.loader.tokenizer_sha256,
        "run_id": run.identity["run_id"],
        "wandb_run_id": run.identity["wandb_run_id"],
        "attempt": run.identity["attempt"],
        "world_size": run.world.size,
        "zero_stage": config.engine.zero_stage,
        "precision": run.engine.config.engine.precision.value,
        "loss_scale": run.engine.loss_scale.state() if run.engine.loss_scale else None,
        "versions": {
            "pretrain": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
        "config": to_dict(config),
        "micro_batch_found": run.searched,
        "tensors": {name: list(shape) for name, shape in run.engine.state.shapes.items()},
        **({"base": run.base} if run.base else {}),
    }
