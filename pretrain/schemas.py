"""The configuration groups: one dataclass per folder of `conf/`, with units and checks. Imports no torch.

A value that a user can get wrong raises `ConfigError`, whose text is one sentence that names the key, the value and
what is allowed. `pretrain.config` puts the groups together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import MISSING

from pretrain.errors import ConfigError


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"  # for the matrices of the blocks; adamw for the rest


class ScheduleName(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Precision(Enum):
    """Of weights and activations in computing; master weights and moments are always fp32."""

    auto = "auto"  # bf16 where every device computes it in hardware, else fp32
    bf16 = "bf16"
    fp16 = "fp16"  # with dynamic loss scaling, for GPUs that have no bf16 (V100, T4, RTX 20)
    fp32 = "fp32"


class WandbMode(Enum):
    auto = "auto"  # online when an API key is known, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Recompute(Enum):
    none = "none"  # all that the backward pass needs is kept
    selective = (
        "selective"  # results of matrix products and attention are kept, what is cheap is computed again
    )
    full = "full"  # of each block only the input is kept


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Shape of the decoder (Llama family)."""

    n_layers: int = MISSING
    """Number of transformer blocks."""
    d_model: int = MISSING
    """Width of the residual stream."""
    n_heads: int = MISSING
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); null: n_heads."""
    d_head: int | None = None
    """Width of one head, even; null: d_model / n_heads."""
    d_ff: int = MISSING
    """Inner width of the SwiGLU feed-forward layer."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus's vocabulary rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Epsilon inside RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotary positions (as Qwen3)."""
    tie_embeddings: bool = False
    """One matrix for the token embedding and the output head."""
    dropout: float = 0.0
    """Probability of dropping an element of each residual branch's output."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition added to the training loss (PaLM, 2022)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; residual outputs get init_std / sqrt(2 n_layers)."""
    loss_chunk_tokens: int = 8192
    """The output head and the loss run on at most this many tokens at a time."""
    activation_checkpointing: Recompute = Recompute.none
    """What of each block the backward pass computes again: less memory; full: about a third more compute."""

    def __post_init__(self) -> None:
        check_positive(
            self, "model", "n_layers", "d_model", "n_heads", "d_ff", "loss_chunk_tokens", "rope_theta"
        )
        if missing(self):
            return
        widths = ("d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size")
        check_at_most(self, "model", {"n_layers": 10_000} | dict.fromkeys(widths, 1 << 24))
        if self.vocab_size is not None:
            check_positive(self, "model", "vocab_size")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}; "
                "change one of them or set model.d_head"
            )
        if self.head_width % 2:
            raise ConfigError(
                f"model.d_head={self.head_width} is odd; rotary positions need an even head width"
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ConfigError(
                f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads} "
                "so that every key head serves the same number of query heads"
            )
        check_fraction(self, "model", "dropout")
        if self.dropout >= 1:
            raise ConfigError(f"model.dropout={self.dropout} drops everything; allowed: 0 up to below 1")

    @property
    def head_width(self) -> int:
        """K: width of one attention head."""
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default applied."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads


class AttentionKernel(Enum):
    auto = "auto"  # the best of the others that this device, precision and installation can do
    sdpa = "sdpa"  # torch's scaled_dot_product_attention, with a mask where documents need one
    flex = "flex"  # torch's FlexAttention, which leaves out blocks that no token may see
    flash = "flash"  # torch's FlashAttention, each document by itself: nothing is masked


class Switch(Enum):
    auto = "auto"  # where it is known to pay
    always = "always"
    never = "never"


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """How the same model is computed: nothing here changes what is computed but by rounding."""

    attention: AttentionKernel = AttentionKernel.auto
    compile: Switch = Switch.auto
    """torch.compile of each block and of the loss; auto: on a GPU, where it works."""
    fp8: bool = False
    """Products with the weights of the blocks in 8 bits (not those of the head), on GPUs from L40S and H100 on."""
    liger: bool = False
    """Norms, SwiGLU and the loss by the package liger-kernel, instead of compiling them."""

    def check(self, model: ModelConfig, precision: Precision, sequence_lengths: set[int]) -> None:
        """Raises ConfigError where these kernels cannot compute the model on any device."""
        if self.liger and self.compile is not Switch.never:
            raise ConfigError(
                f"kernels.liger=true takes the place of compiling: set kernels.compile=never, not {self.compile.value}"
            )
        if self.liger and model.z_loss > 0:
            raise ConfigError(
                f"model.z_loss={model.z_loss} needs kernels.liger=false, since Liger's loss does not give it in fp32"
            )
        if not self.fp8:
            return
        if precision not in (Precision.auto, Precision.bf16):
            raise ConfigError(
                f"kernels.fp8=true rounds bf16 values, so it needs engine.precision=bf16, not {precision.value}"
            )
        sizes = {
            "model.d_model": {model.d_model},
            "model.d_ff": {model.d_ff},
            "heads x head width": {model.n_heads * model.head_width, model.kv_heads * model.head_width},
            "sequence length": sequence_lengths,
        }
        for name, found in sizes.items():
            odd = [size for size in sorted(found) if size % 16]
            if odd:
                raise ConfigError(
                    f"kernels.fp8=true needs multiples of 16, and {name} is {odd[0]}; use kernels.fp8=false"
                )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and gradient clipping."""

    name: OptimizerName = OptimizerName.adamw
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon: decay of the momentum of the blocks' matrices."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate at each step."""
    decay_norms: bool = False
    """Apply weight decay to the norm gains too."""
    decay_embeddings: bool = False
    """Apply weight decay to the token embedding too (a tied head counts as the embedding)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0: no clipping."""

    def __post_init__(self) -> None:
        check_positive(self, "optim", "lr", "eps")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} is outside 0 up to below 1")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} is negative; allowed: 0 or more")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: ScheduleName = ScheduleName.cosine
    warmup_steps: int = 0
    """Steps of linear increase from 0 to the peak."""
    decay_steps: int | None = None
    """Length of the decay; null: all steps after the warm-up (for wsd: the last tenth of the run)."""
    min_lr_frac: float = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps} is negative; allowed: 0 or more")
        if self.decay_steps is not None:
            check_positive(self, "schedule", "decay_steps")
        check_fraction(self, "schedule", "min_lr_frac")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Interval; the last step and a requested stop are always saved."""
    every_minutes: float | None = None
    """Saved too when so much time has passed since the last save began; null: by steps only."""
    background: bool = True
    """Write beside training, which stops for the copy to host memory only; false: training waits."""
    target: str | None = None
    """Folder or URL (s3://bucket/run) for the checkpoints; null: the run folder."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step are kept for good; null: none."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out losses that are kept too."""
    mtbf_hours: float | None = None
    """Mean time between failures of the whole job, for the advised interval; null: 50,000 h / ranks (Llama 3)."""

    def __post_init__(self) -> None:
        check_positive(self, "checkpoint", "every_steps", "keep_last")
        for name in ("keep_every_steps", "every_minutes", "mtbf_hours"):
            if getattr(self, name) is not None:
                check_positive(self, "checkpoint", name)
        if self.keep_best < 0:
            raise ConfigError(f"checkpoint.keep_best={self.keep_best} is negative; allowed: 0 or more")


class SpikeAction(Enum):
    skip = "skip"  # leave the update out
    rollback = "rollback"  # go back to the last checkpoint and pass over the samples


@dataclass(kw_only=True, slots=True)
class LossGuardConfig:
    """What happens when the loss or the gradient goes wrong. An update that is not finite is always left out."""

    spike_sigmas: float | None = None
    """A loss so many robust standard deviations above the recent median is a spike; null: none is."""
    window_steps: int = 128
    """The median and deviation are of so many recent updates; no spike is seen before so many."""
    on_spike: SpikeAction = SpikeAction.skip
    max_skips_in_a_row: int = 10
    """After so many updates left out in a row the run rolls back."""
    pass_over_steps: int = 50
    """A rollback passes over the samples of so many steps, from the first bad one on."""
    max_rollbacks: int = 3
    """One more ends the run with exit code 2."""

    def __post_init__(self) -> None:
        check_positive(self, "loss_guard", "window_steps", "max_skips_in_a_row", "pass_over_steps")
        if self.spike_sigmas is not None:
            check_positive(self, "loss_guard", "spike_sigmas")
        if self.max_rollbacks < 0:
            raise ConfigError(
                f"loss_guard.max_rollbacks={self.max_rollbacks} is negative; allowed: 0 or more"
            )


@dataclass(kw_only=True, slots=True)
class WatchdogConfig:
    """How long a rank may go without progress before all end, with the stacks of all in the run folder."""

    startup_s: float = 1800
    """Until the first step is done: imports, rendezvous, loading."""
    step_s: float = 600
    """Later: between two marks of progress (a micro batch, an update, a save, an evaluation batch)."""
    lost_s: float = 30
    """Without a sign of life from a rank's host."""

    def __post_init__(self) -> None:
        check_positive(self, "watchdog", "startup_s", "step_s", "lost_s")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out loss during training."""

    manifest: str | None = None
    """Corpus of held-out text, tokenized with the training corpus's tokenizer; null: no evaluation."""
    every_steps: int = 1000
    """Interval; the last step is always evaluated."""
    max_sequences: int | None = 512
    """Sequences read per evaluation, from the start of the corpus; null: all of them."""

    def __post_init__(self) -> None:
        check_positive(self, "evaluation", "every_steps")
        if self.max_sequences is not None:
            check_positive(self, "evaluation", "max_sequences")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is recorded of a run, beside metrics.jsonl and events.jsonl, which always are."""

    every_steps: int = 10
    """Interval of W&B records and progress lines; metrics.jsonl gets every step."""
    wandb: WandbMode = WandbMode.auto
    wandb_project: str = "pretrain"
    wandb_entity: str | None = None
    wandb_name: str | None = None
    """Name shown in W&B; null: the run folder's name."""
    wandb_tags: list[str] = field(default_factory=list)
    peak_flops_per_second: float | None = None
    """Peak of one rank's device for MFU; null: from the table of known GPUs, else measured."""
    sample_ledger: bool = False
    """Each rank records the sample indices of every step and a hash of their tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "logging", "every_steps")
        if self.peak_flops_per_second is not None:
            check_positive(self, "logging", "peak_flops_per_second")


def missing(config: Any) -> bool:
    return any(getattr(config, f.name) == MISSING for f in fields(config))


def check_positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value != MISSING and not (math.isfinite(value) and value > 0):
            key = f"{prefix}.{name}" if prefix else name
            raise ConfigError(f"{key}={value} must be greater than 0")


def check_at_most(config: Any, prefix: str, limits: dict[str, int]) -> None:
    """Raise ConfigError where a field is above its limit, which is far above what makes sense: so that nothing of
    absurd size is begun."""
    for name, limit in limits.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and value > limit:
            key = f"{prefix}.{name}" if prefix else name
            raise ConfigError(f"{key}={value} is more than {limit:,}")


def check_fraction(config: Any, prefix: str, name: str) -> None:
    value = getattr(config, name)
    if not 0 <= value <= 1:
        raise ConfigError(f"{prefix}.{name}={value} is outside 0 to 1")
