"""A run's whole configuration, and how a command line becomes one. Imports no torch.

Hydra composes (`conf/`), dataclasses validate: those of the groups in `pretrain.schemas`, which are all to be
imported from here, and `TrainConfig` over them. `run_command` turns `ConfigError` into exit code 2.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.cluster_schemas import ClusterConfig, PreflightConfig
from pretrain.data_schemas import (
    MAX_BATCH_SEQUENCES,
    BadChunk,
    DataConfig,
    Packing,
    SourceConfig,
    StageConfig,
)
from pretrain.engine_schemas import EngineConfig
from pretrain.errors import ConfigError, ExitCode, RunError
from pretrain.printing import print_error
from pretrain.schemas import (
    AttentionKernel,
    CheckpointConfig,
    EvaluationConfig,
    KernelsConfig,
    LoggingConfig,
    LossGuardConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    Precision,
    Recompute,
    ScheduleConfig,
    ScheduleName,
    SpikeAction,
    Switch,
    WandbMode,
    WatchdogConfig,
    check_at_most,
    check_positive,
    missing,
)
from pretrain.stages import Stage, micro_batch_of, n_steps_of, plan_stages

__all__ = [
    "AUTO",
    "AttentionKernel",
    "BadChunk",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExitCode",
    "KernelsConfig",
    "LoggingConfig",
    "LossGuardConfig",
    "ModelConfig",
    "OptimConfig",
    "OptimizerName",
    "Packing",
    "Precision",
    "PreflightConfig",
    "Recompute",
    "RunError",
    "ScheduleConfig",
    "ScheduleName",
    "SourceConfig",
    "SpikeAction",
    "StageConfig",
    "SubmitConfig",
    "Switch",
    "TrainConfig",
    "WandbMode",
    "WatchdogConfig",
    "load_config",
    "run_command",
    "stored_config",
    "to_dict",
    "validate",
]

AUTO = "auto"
"""Of micro_batch_sequences: to be found before the first step."""

_HERE = Path(__file__).resolve().parent
# An installed program has it in its package, the folder of the sources beside it.
CONF_DIR = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A training run. The same config gives the same run on any number of ranks."""

    run_dir: str = MISSING
    """Folder of the run: config, metrics, events, checkpoints. An existing run goes on where it stopped."""
    seed: int = 1234
    """Of the initial weights, the sample order and dropout."""
    total_steps: int | None = None
    """Length of the run in optimizer updates. Give this or total_tokens."""
    total_tokens: int | None = None
    """Length of the run in tokens, rounded up to whole steps."""
    stop_at_step: int | None = None
    """Save after this step and exit 75, as if asked to stop; a later start goes on."""
    stop_after_s: float | None = None
    """The same so many seconds after the start, for a known end of allocation; leave room for one step and a save."""
    global_batch_sequences: int = 32
    """Sequences per optimizer update, over all ranks."""
    micro_batch_sequences: int | str = 4
    """Sequences per rank and forward pass; accumulation steps follow from it. auto: the most that fit, found before
    the first step."""
    init_from: str | None = None
    """Run folder whose newest checkpoint gives the initial weights (weights only)."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    engine: EngineConfig = MISSING
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    logging: LoggingConfig = MISSING
    loss_guard: LossGuardConfig = field(default_factory=LossGuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        if missing(self):
            return
        check_positive(self, "", "global_batch_sequences")
        check_at_most(self, "", {"global_batch_sequences": MAX_BATCH_SEQUENCES})
        if self.micro_batch_sequences != AUTO:
            if not isinstance(self.micro_batch_sequences, int):
                raise ConfigError(
                    f"micro_batch_sequences={self.micro_batch_sequences} is not a whole number; give one, or auto"
                )
            check_positive(self, "", "micro_batch_sequences")
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ConfigError(
                f"total_steps={self.total_steps} and total_tokens={self.total_tokens}: give exactly one of them"
            )
        for name in ("total_steps", "total_tokens", "stop_at_step", "stop_after_s"):
            if getattr(self, name) is not None:
                check_positive(self, "", name)
        if self.global_batch_sequences % self.micro_batch:
            raise ConfigError(
                f"global_batch_sequences={self.global_batch_sequences} is not a multiple of "
                f"micro_batch_sequences={self.micro_batch_sequences}"
            )
        if self.optim.name is OptimizerName.muon and self.engine.precision is Precision.fp16:
            raise ConfigError(
                "optim.name=muon orthogonalizes its updates in bf16, so it cannot be used with engine.precision=fp16; "
                "use optim=adamw, or engine.precision=fp32"
            )
        _check_sequence_parallel(self)
        if self.data.manifest is None and not self.data.sources:
            raise ConfigError("data.manifest is missing; give the manifest.json of a prepared corpus")
        self.kernels.check(
            self.model, self.engine.precision, {stage.sequence_length for stage in self.stages}
        )
        warmup, total = self.schedule.warmup_steps, self.n_steps
        if warmup >= total and self.schedule.name is not ScheduleName.constant:
            raise ConfigError(
                f"schedule.warmup_steps={warmup} leaves nothing of the run's {total} steps; give less"
            )

    @property
    def stages(self) -> list[Stage]:
        """The stages of a run that begins with this configuration."""
        return plan_stages(self.data, self.global_batch_sequences)

    @property
    def n_steps(self) -> int:
        """Optimizer updates of a whole run that begins with this configuration."""
        return n_steps_of(self.stages, self.total_steps, self.total_tokens)

    @property
    def micro_batch(self) -> int:
        """Sequences per rank and forward pass; 1, which divides every batch, as long as `auto` is not yet found."""
        return 1 if self.micro_batch_sequences == AUTO else int(self.micro_batch_sequences)

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens of one forward pass."""
        return self.micro_batch * self.data.sequence_length

    def reader_ranks(self, world_size: int) -> int:
        """Ranks, or groups of ranks that share sequences, each with sequences of its own. ConfigError."""
        shared_by = self.engine.sequence_parallel_ranks
        if world_size % shared_by:
            raise ConfigError(
                f"engine.sequence_parallel_ranks={shared_by} does not divide the {world_size} ranks; change either"
            )
        return world_size // shared_by

    def grad_accum_steps(self, world_size: int) -> int:
        """Most forward passes per rank and update of all stages. ConfigError where a batch does not divide."""
        world_size = self.reader_ranks(world_size)
        per_forward = self.micro_batch * world_size
        if self.global_batch_sequences % per_forward:
            raise ConfigError(
                f"global_batch_sequences={self.global_batch_sequences} is not a multiple of "
                f"micro_batch_sequences={self.micro_batch} x {world_size} ranks = {per_forward}"
            )
        for stage in self.data.stages:
            if (stage.global_batch_sequences or world_size) % world_size:
                raise ConfigError(
                    f"data.stages: global_batch_sequences={stage.global_batch_sequences} is not a multiple of "
                    f"{world_size} ranks"
                )
        return max(
            stage.batch_sequences
            // world_size
            // micro_batch_of(
                stage.batch_sequences, stage.sequence_length, world_size, self.micro_batch_tokens
            )
            for stage in self.stages
        )


def _check_sequence_parallel(config: TrainConfig) -> None:
    """What must divide where ranks share sequences. ConfigError."""
    ranks, heads, length = (
        config.engine.sequence_parallel_ranks,
        config.model.kv_heads,  # which divide the query heads
        config.data.sequence_length,  # which divides those of later stages
    )
    if heads % ranks:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"engine.sequence_parallel_ranks={ranks} does not divide model.n_kv_heads={heads}, and each rank attends "
            f"with its part of the heads; allowed: {allowed}"
        )
    if length % ranks:
        raise ConfigError(
            f"engine.sequence_parallel_ranks={ranks} does not divide data.sequence_length={length}, and each rank "
            "holds its part of the tokens; change either"
        )


@dataclass(kw_only=True, slots=True)
class SubmitConfig(TrainConfig):
    """A training run and the cluster to send it to."""

    cluster: ClusterConfig = MISSING
    dry_run: bool = False
    """Print the script and write nothing."""


T = TypeVar("T")


def load_config(schema: type[T], overrides: list[str], config_name: str | None = None) -> T:
    """Compose `conf/<config_name>.yaml` with Hydra overrides and validate it as `schema`.

    Without `config_name` the schema's own defaults are the base. Raises ConfigError.
    """
    from hydra.errors import HydraException  # takes 0.1 s to import, and most processes compose nothing

    try:
        return validate(schema, _compose(schema, overrides, config_name))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, schema)) from error


def _compose(schema: type, overrides: list[str], config_name: str | None) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    name = f"{schema.__name__}_schema"
    ConfigStore.instance().store(name=name, node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        return compose(config_name=config_name or name, overrides=overrides)


def validate(schema: type[T], composed: DictConfig | dict[str, Any]) -> T:
    """The config as an object of `schema`, checked as a whole. Raises ConfigError."""
    try:
        plain = (
            OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
        )
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{key} is missing; give {key}=VALUE")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error


def stored_config(values: dict[str, Any], where: str) -> TrainConfig:
    """A configuration that a run has left in a file, which `where` names. Nothing in it is resolved.

    A text with `${`, which OmegaConf would fill in from the environment or elsewhere, is refused: what a run stores has
    been resolved before. Raises ConfigError.
    """
    for key, value in _texts(values):
        if "${" in value:
            raise ConfigError(
                f"{where}: the stored configuration has {value[:80]!r} in {key or 'a key'}, which is to be filled in "
                "from elsewhere; that is not done for what a file says"
            )
    try:
        return validate(TrainConfig, values)
    except (ConfigError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{where}: the stored configuration is wrong: {error}") from error


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested values, the keys included, with where it is."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _texts(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


def to_dict(config: Any) -> dict[str, Any]:
    """A config object as plain JSON-ready values."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)  # type: ignore


def run_command(
    schema: type[T],
    command: Callable[[T], int | None],
    config_name: str | None = None,
    doc: str | None = None,
) -> None:
    """Entry point of every script: parse `sys.argv`, run, exit with the right code.

    `--cfg job` prints the composed config, `--help` the script's docstring and its keys.
    """
    overrides = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    rank = launched_rank()
    show = "--cfg" in overrides
    if "--help" in overrides or "-h" in overrides:
        if rank == 0:
            print((doc or command.__doc__ or "").strip())
            print(_keys_and_defaults(schema, config_name), end="")
        sys.exit(ExitCode.FINISHED)
    if show:
        at = overrides.index("--cfg")
        del overrides[at : at + 2]
    try:
        config = load_config(schema, overrides, config_name)
        if show:
            if rank == 0:
                print(OmegaConf.to_yaml(to_dict(config)), end="")
            sys.exit(ExitCode.FINISHED)
        code = command(config)
    except ConfigError as error:  # alike on all ranks: one says it
        if rank == 0:
            print_error("error", error)
        else:
            time.sleep(2)  # the launcher ends all ranks at the first exit
        sys.exit(ExitCode.CONFIG_ERROR)
    except (RunError, OSError) as error:  # perhaps this rank's alone
        print_error(f"error: rank {rank}" if rank else "error", error)
        sys.exit(ExitCode.CRASHED)
    sys.exit(code or ExitCode.FINISHED)


def _keys_and_defaults(schema: type, config_name: str | None) -> str:
    """What `--help` says after the script's own words."""
    text = (
        f"\nKeys and defaults (??? must be given):\n\n{OmegaConf.to_yaml(_compose(schema, [], config_name))}"
    )
    if config_name is None:
        return text
    groups = {f.name: CONF_DIR / f.name for f in fields(schema)} | {"experiment": CONF_DIR / "experiment"}
    options = {name: sorted(path.stem for path in folder.glob("*.yaml")) for name, folder in groups.items()}
    lines = [f"  {name}={' | '.join(names)}" for name, names in options.items() if names]
    return text + "\nWhole groups of keys at once:\n\n" + "\n".join(lines) + "\n"


def launched_rank() -> int:
    """The rank that the launcher gave this process, before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_size() -> int | None:
    """The number of ranks that the launcher started on this host, where it says so."""
    given = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(given) if given else None


def _explain(error: Exception, schema: type) -> str:
    """One sentence for a Hydra or OmegaConf error: the key, the value, what is allowed."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and isinstance(cause, OmegaConfBaseException):
        text, error = " ".join(str(cause).split()), cause
    text = re.split(r"full_key:|Config search path:|See https://", text)[0].strip()
    key = getattr(error, "full_key", None) or ""
    match = re.search(r"Key '([^']+)' (?:is )?not in", text) or re.search(
        r"Could not override '([^']+)'", text
    )
    if match:
        wrong = match.group(1).split(".")[-1]
        full = key if key.endswith(wrong) and key else match.group(1)
        owner: Any = getattr(error, "object_type", None)  # the dataclass that has no such key
        allowed = [f.name for f in fields(owner)] if is_dataclass(owner) else _keys_beside(schema, full)
        close = difflib.get_close_matches(wrong, allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        return f"{full} is not a key of the configuration; {hint}"
    return f"{key}: {text}" if key and key not in text else text


def _keys_beside(schema: type, full_key: str) -> list[str]:
    """The keys allowed where `full_key` stands."""
    here: Any = OmegaConf.structured(schema)
    for part in full_key.split(".")[:-1]:
        kind: Any = OmegaConf.get_type(here)
        types = {f.name: f.type for f in fields(kind)} if is_dataclass(kind) else {}
        target = types.get(part)
        target = globals().get(target) if isinstance(target, str) else target
        if not is_dataclass(target):
            return [f.name for f in fields(schema)]  # type: ignore[arg-type]
        here = OmegaConf.structured(target)
    return [f.name for f in fields(OmegaConf.get_type(here))]  # type: ignore[arg-type]
