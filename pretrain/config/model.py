"""The configuration groups `model` and `kernels`: the shape of the decoder, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from pretrain.config.checks import check_at_most, check_fraction, check_positive, missing
from pretrain.errors import ConfigError


class Precision(Enum):
    """Of weights and activations in computing; master weights and moments are always fp32."""

    auto = "auto"  # bf16 where every device computes it in hardware, else fp32
    bf16 = "bf16"
    fp16 = "fp16"  # with dynamic loss scaling, for GPUs that have no bf16 (V100, T4, RTX 20)
    fp32 = "fp32"


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
