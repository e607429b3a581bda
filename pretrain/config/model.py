"""The configuration groups `model` and `kernels`: the shape of the decoder, and the kernels that compute it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from pretrain.config.checks import check_at_most, check_fraction, check_positive, missing
from pretrain.errors import ConfigError


class Precision(Enum):
    """Precision of weights and activations in computation; master weights and moments are always fp32."""

    auto = "auto"  # bf16 where every device computes it in hardware, otherwise fp32
    bf16 = "bf16"
    fp16 = "fp16"  # with dynamic loss scaling, for GPUs without bf16 (V100, T4, RTX 20)
    fp32 = "fp32"


class Recompute(Enum):
    """Activation checkpointing: what the backward pass recomputes instead of keeping it in memory."""

    none = "none"  # keep everything that the backward pass needs
    selective = "selective"  # keep the results of matrix products and attention; recompute what is cheap
    full = "full"  # keep only the input of each block


class RopeType(Enum):
    """How rotary positions are scaled for a context longer than the original one."""

    default = "default"  # not at all
    linear = "linear"  # positions are divided by the factor
    llama3 = "llama3"  # low frequencies only, as in Llama 3.1
    yarn = "yarn"  # YaRN, as in Qwen2.5


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Scaled rotary positions. The keys are those of `rope_scaling` (now `rope_parameters`) in a config.json of Hugging
    Face."""

    rope_type: RopeType = RopeType.default
    """Which scaling to use; default means none."""
    factor: float = 1.0
    """Factor by which the context is longer than the original one."""
    original_max_position_embeddings: int | None = None
    """llama3 and yarn: length in tokens of the original context."""
    low_freq_factor: float = 1.0
    """llama3: dimensions that turn less often than this over the original context are scaled."""
    high_freq_factor: float = 4.0
    """llama3: dimensions that turn more often than this over the original context are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this over the original context are scaled."""
    attention_factor: float | None = None
    """yarn: factor of cosines and sines; null means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the borders between scaled and kept dimensions to whole dimensions."""

    def __post_init__(self) -> None:
        prefix, kind = "model.rope_scaling", self.rope_type
        check_positive(
            self, prefix, "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"
        )
        if self.factor < 1:
            raise ConfigError(f"{prefix}.factor={self.factor} shortens the context; allowed: 1 or more")
        if kind is RopeType.default and self.factor != 1:
            raise ConfigError(
                f"{prefix}.factor={self.factor} does nothing with {prefix}.rope_type=default; choose another type"
            )
        if kind in (RopeType.llama3, RopeType.yarn):
            if self.original_max_position_embeddings is None:
                raise ConfigError(
                    f"{prefix}.rope_type={kind.value} needs {prefix}.original_max_position_embeddings, the length of "
                    "the context before it was extended"
                )
            check_positive(self, prefix, "original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"{prefix}.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )
        if self.beta_fast <= self.beta_slow:
            raise ConfigError(f"{prefix}.beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}")
        if self.attention_factor is not None:
            check_positive(self, prefix, "attention_factor")


class Pooling(Enum):
    """What the head of a classifier reads of a document."""

    last = "last"  # the state after its last token, eos, which has seen all others
    mean = "mean"  # the mean of the states of all its tokens


MAX_CLASSES = 256
"""Largest number of classes; a field with more values is no label of a class."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Shape of the decoder (Llama family)."""

    n_layers: int = MISSING
    """Number of transformer blocks."""
    d_model: int = MISSING
    """Width of the residual stream."""
    n_heads: int = MISSING
    """Number of query heads."""
    n_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention); null means n_heads."""
    d_head: int | None = None
    """Width of one attention head, an even number; null means d_model / n_heads."""
    d_ff: int = MISSING
    """Inner width of the SwiGLU feed-forward layer."""
    vocab_size: int | None = None
    """Number of rows of the embedding; null means the corpus's vocabulary rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies (RoPE)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5
    """Epsilon inside RMSNorm."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head before the rotary position embedding, as Qwen3 does."""
    attention_bias: bool = False
    """Add biases to queries, keys and values, as Qwen2 does."""
    tie_embeddings: bool = False
    """Use one matrix for both the token embedding and the output head. The head of a classifier is never tied."""
    classes: list[str] = field(default_factory=list)
    """Classes in the order of the head's outputs, instead of the vocabulary; filled in from the corpus with
    objective=classify."""
    pooling: Pooling = Pooling.last
    """What the head of a classifier reads: the state of each document's last token, or the mean over its tokens."""
    dropout: float = 0.0
    """Probability of dropping an element of each residual branch's output."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition added to the training loss (PaLM, 2022)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get
    init_std / sqrt(2 n_layers)."""
    loss_chunk_tokens: int = 8192
    """Number of tokens for which the output head and the loss are computed at once. It limits the memory that logits
    take."""
    activation_checkpointing: Recompute = Recompute.none
    """What the backward pass recomputes in each block to save memory; full costs about a third more compute."""

    def __post_init__(self) -> None:
        check_positive(
            self, "model", "n_layers", "d_model", "n_heads", "d_ff", "loss_chunk_tokens", "rope_theta"
        )
        if missing(self):
            return
        widths = ("d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size")
        check_at_most(self, "model", {"n_layers": 10_000} | dict.fromkeys(widths, 1 << 24))
        n_classes = len(set(self.classes))
        if n_classes < len(self.classes) or n_classes > MAX_CLASSES:
            raise ConfigError(
                f"model.classes has {len(self.classes)} names, {n_classes} of them different; allowed: up to "
                f"{MAX_CLASSES} different ones"
            )
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
        if self.attention_bias and self.qk_norm:
            raise ConfigError(
                "model.attention_bias=true with model.qk_norm=true is a model that no Hugging Face class has, so it "
                "could not be exported; set one of them to false"
            )
        if self.rope_scaling.rope_type is RopeType.yarn and self.rope_theta <= 1:
            raise ConfigError(
                f"model.rope_theta={self.rope_theta} must be above 1 with rope_scaling.rope_type=yarn"
            )
        check_fraction(self, "model", "dropout")
        if self.dropout >= 1:
            raise ConfigError(
                f"model.dropout={self.dropout} drops everything; allowed: at least 0 and below 1"
            )

    @property
    def head_width(self) -> int:
        """K: width of one attention head."""
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default applied."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads


class AttentionKernel(Enum):
    """Implementations of attention."""

    auto = "auto"  # the best of the others that this device, precision and installation support
    sdpa = "sdpa"  # torch's scaled_dot_product_attention, with a mask where documents need one
    flex = "flex"  # torch's FlexAttention, which skips blocks that are masked entirely
    flash = "flash"  # torch's FlashAttention on each document separately, without a mask


class Switch(Enum):
    """Whether to use a feature."""

    auto = "auto"  # only where it is known to be faster
    always = "always"
    never = "never"


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """The kernels that compute the model. Results differ only by rounding, substantially for fp8."""

    attention: AttentionKernel = AttentionKernel.auto
    """Implementation of attention."""
    compile: Switch = Switch.auto
    """Whether to apply torch.compile to each block and to the loss; auto compiles on a GPU."""
    fp8: bool = False
    """Compute the matrix products of the blocks, but not of the output head, in 8-bit floating point. This needs an
    L40S, an H100 or a newer GPU."""
    liger: bool = False
    """Compute the norms, SwiGLU and the loss with the package liger-kernel instead of compiling them."""

    def check(self, model: ModelConfig, precision: Precision, sequence_lengths: set[int]) -> None:
        """Raise ConfigError where no device can compute the model with these kernels."""
        if self.liger and self.compile is not Switch.never:
            raise ConfigError(
                f"kernels.liger=true replaces compilation; set kernels.compile=never, not {self.compile.value}"
            )
        if self.liger and model.z_loss > 0:
            raise ConfigError(
                f"model.z_loss={model.z_loss} needs kernels.liger=false: Liger's loss has no z-loss in fp32"
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
