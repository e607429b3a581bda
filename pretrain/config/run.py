"""The configuration of a whole run: all groups together, and the checks that span several groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from pretrain.config.checks import check_at_most, check_positive, missing
from pretrain.config.cluster import ClusterConfig
from pretrain.config.data import MAX_BATCH_SEQUENCES, DataConfig
from pretrain.config.data_stages import MAX_EPOCHS, DataStage, micro_batch_of, n_steps_of, plan_stages
from pretrain.config.engine import EngineConfig
from pretrain.config.model import KernelsConfig, ModelConfig, Pooling, Precision
from pretrain.config.objective import LoraConfig, MlmConfig, Objective
from pretrain.config.optimizer import EmaConfig, OptimConfig, OptimizerName, ScheduleConfig, ScheduleName
from pretrain.config.records import EvaluationConfig, LoggingConfig
from pretrain.config.texts import PathText
from pretrain.config.upkeep import CheckpointConfig, LossGuardConfig, WatchdogConfig
from pretrain.errors import ConfigError

AUTO = "auto"
"""With this value of micro_batch_sequences, the run searches for the largest micro-batch that fits in memory."""


class _Planned:
    """Values computed once from a configuration. They are not fields of TrainConfig, where each field is a key."""

    __slots__ = ("epochs_steps", "stages")
    stages: list[DataStage]
    """The data stages of a new run with this configuration; with `total_epochs`, without its last one."""
    epochs_steps: int | None
    """Number of steps of `total_epochs`, once `plan_epochs` has been called."""


@dataclass(kw_only=True, slots=True)
class TrainConfig(_Planned):
    """A training run. The same config gives the same run on any number of ranks."""

    run_dir: PathText = MISSING
    """Folder of the run's configuration, metrics, events and checkpoints. An existing run resumes from its newest good
    checkpoint."""
    seed: int = 1234
    """Seed of the initial weights, the sample order and dropout."""
    total_steps: int | None = None
    """Length of the run in optimizer updates. Give this, total_tokens or total_epochs."""
    total_tokens: int | None = None
    """Length of the run in tokens, rounded up to whole steps."""
    total_epochs: int | None = None
    """Length of the run in epochs: it reads every sequence of every source exactly this number of times. Sources are
    drawn in proportion to their sizes."""
    stop_at_step: int | None = None
    """Save a checkpoint after this step and exit with code 75, as for a requested stop. The same command resumes."""
    stop_after_s: float | None = None
    """Save a checkpoint this many seconds after the start and exit with code 75, for an allocation with a known end.
    Leave time for one more step and the save."""
    global_batch_sequences: int = 32
    """Sequences per optimizer update, over all ranks."""
    micro_batch_sequences: int | str = 4
    """Sequences per rank and forward pass; the number of gradient accumulation steps follows from it. auto finds the
    largest number that fits before the first step."""
    init_from: PathText | None = None
    """Run folder whose newest good checkpoint gives the initial weights; nothing else is taken from it."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: Objective = Objective.causal
    """What the model learns to predict."""
    mlm: MlmConfig = field(default_factory=MlmConfig)
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    ema: EmaConfig = field(default_factory=EmaConfig)
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
                    f"micro_batch_sequences={self.micro_batch_sequences} is not a whole number; give one or auto"
                )
            check_positive(self, "", "micro_batch_sequences")
        if [self.total_steps, self.total_tokens, self.total_epochs].count(None) != 2:
            raise ConfigError(
                f"total_steps={self.total_steps}, total_tokens={self.total_tokens} and total_epochs="
                f"{self.total_epochs}: give exactly one of them"
            )
        for name in ("total_steps", "total_tokens", "total_epochs", "stop_at_step", "stop_after_s"):
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
                "use optim=adamw or engine.precision=fp32"
            )
        if self.ema.decay is not None and self.engine.nvme_path is not None:
            raise ConfigError(
                f"ema.decay={self.ema.decay} cannot be combined with engine.nvme_path={self.engine.nvme_path}, since "
                "every update of the average would read all weights from the disk; leave one of them out"
            )
        if self.lora.r and self.init_from is None:
            raise ConfigError(
                f"lora.r={self.lora.r} trains adapters on the weights of another run; give init_from=RUN_DIR"
            )
        if self.evaluation.tasks and self.objective is not Objective.causal:
            raise ConfigError(
                f"evaluation.tasks={self.evaluation.tasks} needs objective=causal: another model answers no "
                "questions"
            )
        _check_sequence_parallel(self)
        _check_classifier(self)
        if self.data.manifest is None and not self.data.sources:
            raise ConfigError("data.manifest is missing; give the manifest.json of a prepared corpus")
        # mypy does not see the slots that a dataclass inherits.
        self.stages = plan_stages(self.data, self.global_batch_sequences)  # type: ignore[misc]
        self.epochs_steps = None  # type: ignore[misc]
        if self.total_epochs is not None:
            check_at_most(self, "", {"total_epochs": MAX_EPOCHS})
            _check_mixture_of_epochs(self)
        self.kernels.check(
            self.model, self.engine.precision, {stage.sequence_length for stage in self.stages}
        )
        if self.total_epochs is None:
            self._check_warmup()

    def plan_epochs(self, n_steps: int) -> None:
        """Set the number of steps of `total_epochs`, which depends on the corpora."""
        self.epochs_steps = n_steps  # type: ignore[misc]
        self._check_warmup()

    def _check_warmup(self) -> None:
        total = self.n_steps - self.schedule.moment_warmup_steps
        if total < 1:
            raise ConfigError(
                f"schedule.moment_warmup_steps={self.schedule.moment_warmup_steps} leaves none of the run's "
                f"{self.n_steps} steps for training; use fewer"
            )
        warmup = self.schedule.warmup_in(total)
        if warmup >= total and self.schedule.name is not ScheduleName.constant:
            raise ConfigError(
                f"schedule.warmup_steps={warmup} leaves none of the run's {total} steps for the decay; use fewer"
                if self.schedule.warmup_frac is None
                else f"schedule.warmup_frac={self.schedule.warmup_frac} leaves no step for the decay; use a smaller one"
            )

    @property
    def n_steps(self) -> int:
        """Number of optimizer updates in a whole run that starts with this configuration.

        With `total_epochs` it is known only after `plan_epochs`.
        """
        if self.total_epochs is not None:
            if self.epochs_steps is None:
                raise ConfigError(
                    f"total_epochs={self.total_epochs}: the number of steps depends on the corpora, which have not "
                    "been read; give total_steps or total_tokens"
                )
            return self.epochs_steps
        return n_steps_of(self.stages, self.total_steps, self.total_tokens)

    @property
    def causal(self) -> bool:
        """Whether a token attends to earlier tokens only."""
        return self.objective is not Objective.mlm

    @property
    def micro_batch(self) -> int:
        """Sequences per rank and forward pass. Until `auto` is resolved it is 1, which divides every batch."""
        return 1 if self.micro_batch_sequences == AUTO else int(self.micro_batch_sequences)

    @property
    def micro_batch_tokens(self) -> int:
        """Upper limit of the number of tokens in one forward pass of a rank."""
        return self.micro_batch * self.data.sequence_length

    def reader_ranks(self, world_size: int) -> int:
        """Number of ranks, or of groups of ranks under sequence parallelism, that each read their own sequences.

        Raises ConfigError where `engine.sequence_parallel_ranks` does not divide `world_size`.
        """
        shared_by = self.engine.sequence_parallel_ranks
        if world_size % shared_by:
            raise ConfigError(
                f"engine.sequence_parallel_ranks={shared_by} does not divide the {world_size} ranks; change one of them"
            )
        return world_size // shared_by

    def grad_accum_steps(self, world_size: int) -> int:
        """Forward passes per rank and update: the largest number over all data stages.

        Raises ConfigError where a stage's batch does not divide evenly over the ranks and micro-batches.
        """
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


def _check_mixture_of_epochs(config: TrainConfig) -> None:
    """Raise ConfigError where the configuration says how often to draw a source, as `total_epochs` does already."""
    for source in config.data.sources:
        for key, value, usual in (("weight", source.weight, 1.0), ("max_epochs", source.max_epochs, None)):
            if value != usual:
                raise ConfigError(
                    f"data.sources: {key}={value} of {source.name!r} contradicts total_epochs={config.total_epochs}, "
                    f"which reads every source equally often; leave one of them out"
                )
    for stage in config.data.stages:
        if stage.weights is not None:
            raise ConfigError(
                f"data.stages: weights={dict(stage.weights)} contradicts total_epochs={config.total_epochs}, which "
                "reads every source equally often; leave one of them out"
            )


def _check_classifier(config: TrainConfig) -> None:
    """Raise ConfigError where the keys of a classifier lack its objective, or what it needs is switched off."""
    if config.objective is not Objective.classify:
        if config.model.classes or config.model.pooling is not Pooling.last:
            raise ConfigError(
                f"model.classes={config.model.classes} and model.pooling={config.model.pooling.value} are keys of a "
                f"classifier, and objective={config.objective.value}; give objective=classify, or leave them out"
            )
        return
    if not config.data.document_masking:
        raise ConfigError(
            "data.document_masking=false would show a document the labels of those before it, so objective=classify "
            "needs data.document_masking=true"
        )
    if config.engine.sequence_parallel_ranks > 1:
        raise ConfigError(
            f"engine.sequence_parallel_ranks={config.engine.sequence_parallel_ranks} divides documents over ranks, "
            "which objective=classify does not support; leave it out"
        )


def _check_sequence_parallel(config: TrainConfig) -> None:
    """Raise ConfigError unless the ranks that share a sequence can split its heads and its tokens evenly."""
    ranks, heads, length = (
        config.engine.sequence_parallel_ranks,
        config.model.kv_heads,  # these divide the query heads
        config.data.sequence_length,  # this divides the sequence lengths of later stages
    )
    if heads % ranks:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"engine.sequence_parallel_ranks={ranks} does not divide model.n_kv_heads={heads}, and each rank computes "
            f"attention for an equal share of the heads; allowed: {allowed}"
        )
    if length % ranks:
        raise ConfigError(
            f"engine.sequence_parallel_ranks={ranks} does not divide data.sequence_length={length}, and each rank "
            "holds an equal share of the tokens; change one of them"
        )


@dataclass(kw_only=True, slots=True)
class SubmitConfig(TrainConfig):
    """A training run and the cluster that it is submitted to."""

    cluster: ClusterConfig = MISSING
    dry_run: bool = False
    """Print the job script and write nothing."""
