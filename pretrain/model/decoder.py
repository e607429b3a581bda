"""The decoder: a Llama-style transformer and its initial weights (`pretrain.arithmetic` counts its parameters).

Three rules hold throughout, because under ZeRO stage 3 a parameter is whole only while the module that
owns it runs, and because `deepspeed.zero.Init` partitions a module's parameters right after its `__init__`:

- a module initializes its own weights inside its own `__init__`, and no other module touches them;
- no module creates a floating-point buffer in `__init__` (it would become bf16);
- only methods of the module that owns a weight use it, so the head computes the loss.

Shapes: B batch, T sequence, D model width, H query heads, G key/value heads, K head width, V vocabulary,
S key positions (T, or what the cache holds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import IGNORED_LABEL
from pretrain.config import KernelsConfig, ModelConfig, Pooling
from pretrain.model import float8, liger
from pretrain.model.attention import Documents, Visibility, attend, visibility
from pretrain.model.kernels import PLAIN
from pretrain.model.linear import linear
from pretrain.model.pooling import document_means
from pretrain.model.recompute import recomputed
from pretrain.model.rotary import rotary_tables, rotate
from pretrain.model.sequence_parallel import SequenceGroup


class LossSums(NamedTuple):
    """Sums over the predicted positions of a batch, or of each of its sequences. Those of all parts add up."""

    nll_sum: Tensor
    """Sum of the negative log-likelihoods of the labels in nats: fp32 scalar, or [B] by sequence."""
    z_sum: Tensor
    """Sum of the squared log-partitions (logsumexp of the logits): fp32 scalar; has a gradient if config.z_loss > 0."""
    n_predicted: Tensor
    """Number of positions whose label is not -100: int64 scalar."""
    confusion: Tensor | None = None
    """Of a classifier that is evaluated, the number of documents by class [C] and predicted class [C]: int64 [C, C]."""


class KVCache:
    """Keys and values of past tokens, one slot per position: token p of a row is in slot p of that row.

    Rows may have different lengths. A prefill pads short prompts on the right. The entries that padding leaves in later
    slots are masked until the row's own tokens overwrite them.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_rows: int,
        max_tokens: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.n_layers, n_rows, config.kv_heads, max_tokens, config.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self._rows = torch.arange(n_rows, device=device)[:, None]
        self._positions = self._rows
        self._n_slots = 0

    def advance(self, positions: Tensor) -> Tensor:
        """Announce the positions [B, T] of the next tokens. Returns which slots each one sees, bool [B, 1, T, S]."""
        self._positions = positions
        self._n_slots = int(positions.max()) + 1
        slots = torch.arange(self._n_slots, device=positions.device)
        return slots <= positions[:, None, :, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, G, T, K] of the announced tokens. Returns all slots in use, [B, G, S, K]."""
        self.k[layer][self._rows, :, self._positions] = k.transpose(1, 2)
        self.v[layer][self._rows, :, self._positions] = v.transpose(1, 2)
        return self.k[layer, :, :, : self._n_slots], self.v[layer, :, :, : self._n_slots]


class Linear(nn.Linear):
    """Matrix product; weights from a normal distribution. A bias, if any, begins at 0.

    It is torch's class, so that peft adapts it.
    """

    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(linear)

    def __init__(
        self, n_in: int, n_out: int, std: float, generator: torch.Generator, bias: bool = False
    ) -> None:
        nn.Module.__init__(self)  # torch's own would draw other weights
        self.in_features, self.out_features = n_in, n_out
        self.weight = _normal_parameter(n_out, n_in, std, generator)
        self.register_parameter("bias", nn.Parameter(torch.zeros(n_out)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Looks up rows of a matrix by token id."""

    def __init__(self, n_rows: int, width: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = _normal_parameter(n_rows, width, std, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # On CUDA this is one fused kernel. Elsewhere PyTorch decomposes it, with the statistics in fp32.
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 (Zhang and Sennrich, 2019)."""

    norm: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(_rms_norm)

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, config: ModelConfig, layer: int, generator: torch.Generator, causal: bool = True
    ) -> None:
        super().__init__()
        width, std = config.d_model, config.init_std
        q_width, kv_width = config.n_heads * config.head_width, config.kv_heads * config.head_width
        self.layer, self.causal = layer, causal
        self.d_head = config.head_width
        self.sequences: SequenceGroup | None = None
        """The ranks that share sequences with this one; None without sequence parallelism."""
        self.q = Linear(width, q_width, std, generator, bias=config.attention_bias)
        self.k = Linear(width, kv_width, std, generator, bias=config.attention_bias)
        self.v = Linear(width, kv_width, std, generator, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.d_head, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.d_head, config.norm_eps) if config.qk_norm else None
        self.output = Linear(q_width, width, _residual_std(config), generator)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visibility, cache: KVCache | None
    ) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.d_head))  # [B, T, H, K]
        k = self.k(x).unflatten(-1, (-1, self.d_head))  # [B, T, G, K]
        v = self.v(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # [B, G, T, K]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if self.sequences is not None:
            q, k, v = self.sequences.to_heads(q, k, v)
        y = attend(q, k, v, visible, self.causal)
        if self.sequences is not None:
            y = self.sequences.to_tokens(y)
        return self.output(y.transpose(1, 2).flatten(2))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    swiglu: Callable[[Tensor, Tensor], Tensor] = staticmethod(_swiglu)

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, config.init_std, generator)
        self.up = Linear(config.d_model, config.d_ff, config.init_std, generator)
        self.down = Linear(config.d_ff, config.d_model, _residual_std(config), generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each normalized first and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, generator: torch.Generator, causal: bool = True
    ) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.recompute = config.activation_checkpointing
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer, generator, causal)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config, generator)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visibility, cache: KVCache | None
    ) -> Tensor:
        # Recomputation is inside the block, so that the compiled block and ZeRO's gathering of parameters include it.
        return recomputed(self.recompute, self._forward, x, cos, sin, visible, cache)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visibility, cache: KVCache | None
    ) -> Tensor:
        y = self.attention(self.attention_norm(x), cos, sin, visible, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + F.dropout(y, self.dropout, self.training)


class Head(nn.Module):
    """Output projection and, given labels, the loss: logits of at most `loss_chunk_tokens` exist at a time.

    `weight` is the embedding's parameter when the two are tied.
    """

    def __init__(
        self, config: ModelConfig, n_rows: int, weight: nn.Parameter | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.chunk_tokens = config.loss_chunk_tokens
        self.with_z_gradient = config.z_loss > 0
        self.fused = False
        self.weight = (
            weight
            if weight is not None
            else _normal_parameter(n_rows, config.d_model, config.init_std, generator)
        )

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, by_sequence: bool = False
    ) -> tuple[Tensor, ...]:
        """For hidden [B, T, D]: (logits [B, T, V],) without labels, (nll_sum, z_sum) with labels [B, T].

        With `by_sequence` these are the sums [B] of each sequence.
        """
        if labels is None:
            return (linear(hidden, self.weight),)
        if by_sequence:
            rows = [self.forward(h[None], y[None]) for h, y in zip(hidden, labels, strict=True)]
            return tuple(torch.stack(sums) for sums in zip(*rows, strict=True))
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        if self.fused:  # z_sum is omitted, because nothing uses it when its weight is 0
            nll_sum = liger.nll_sum(hidden, self.weight, labels, IGNORED_LABEL)
            return nll_sum, torch.zeros_like(nll_sum)
        if len(labels) <= self.chunk_tokens:
            return self.sums(hidden, labels)
        sums = [
            checkpoint(self.sums, h, y, use_reentrant=False, preserve_rng_state=False)
            for h, y in zip(hidden.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True)
        ]
        return torch.stack([nll for nll, _ in sums]).sum(), torch.stack([z for _, z in sums]).sum()

    def sums(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(nll_sum, z_sum) of one chunk of positions: hidden [N, D], labels [N]."""
        logits = linear(hidden, self.weight).float()  # [N, V]
        nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)  # [N]
        # log Z = logit of the label + its nll. Its gradient needs another [N, V], so it is computed only if it is used.
        with torch.set_grad_enabled(self.with_z_gradient and torch.is_grad_enabled()):
            label_logits = logits.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
            log_z = (label_logits + nll).masked_fill(labels == IGNORED_LABEL, 0.0)
        return nll.sum(), log_z.square().sum()


class ClassHead(Head):
    """The head of a classifier: its labels are classes, at the last token of each document."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, by_sequence: bool = False
    ) -> tuple[Tensor, ...]:
        """As `Head.forward`; in evaluation there is a third result with labels, the `LossSums.confusion`."""
        found = super().forward(hidden, labels, by_sequence)
        if labels is None or self.training or by_sequence:  # which has called this method for each sequence
            return found
        n_classes, is_labeled = len(self.weight), labels != IGNORED_LABEL
        predicted = linear(hidden, self.weight)[is_labeled].argmax(-1)
        pairs = labels[is_labeled] * n_classes + predicted
        return *found, torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


class Decoder(nn.Module):
    """A decoder-only transformer. Without `causal`, tokens also attend to later ones, for masked language modeling.

    The initial weights are a pure function of (config, seed): they are drawn in fp32 on the CPU in the order of
    construction, and are the same on any device and any number of ranks. `config.vocab_size` must be set. `kernels`
    is what `pretrain.model.kernels.resolve` returned.
    """

    def __init__(
        self, config: ModelConfig, seed: int, kernels: KernelsConfig = PLAIN, causal: bool = True
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "model.vocab_size is resolved before the model is built"
        generator = torch.Generator("cpu").manual_seed(seed)
        self.config, self.kernels, self.causal = config, kernels, causal
        self._compiled = False
        self.embed = Embedding(config.vocab_size, config.d_model, config.init_std, generator)
        self.blocks = nn.ModuleList(
            Block(config, layer, generator, causal) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if config.classes:
            self.head: Head = ClassHead(config, len(config.classes), None, generator)
        else:
            tied = self.embed.weight if config.tie_embeddings else None
            self.head = Head(config, config.vocab_size, tied, generator)
        self._replace_parts(kernels)

    def _replace_parts(self, kernels: KernelsConfig) -> None:
        """Use the chosen kernels in all modules."""
        for part in self.modules():
            if isinstance(part, Linear) and kernels.fp8:
                part.product = float8.product
            elif isinstance(part, RMSNorm) and kernels.liger:
                part.norm = liger.rms_norm
            elif isinstance(part, FeedForward) and kernels.liger:
                part.swiglu = liger.swiglu
        self.head.fused = (
            kernels.liger and not self.config.classes
        )  # the logits of a few classes need no fusion

    def share_sequences(self, ranks: SequenceGroup) -> None:
        """Share sequences with these ranks: from now on a forward pass gets only this rank's part of each sequence."""
        for block in self.blocks:
            block.attention.sequences = ranks  # type: ignore[union-attr]

    def compile_parts(self, fall_back: bool = False) -> None:
        """Compile the computation of each block and the loss, at first use and again for each new shape.

        With `fall_back`, code that cannot be compiled runs uncompiled, and torch warns; without it, torch raises.

        The functions are compiled, not the modules. So the hooks with which ZeRO gathers parameters stay outside, each
        block is one graph, and blocks of the same shape share a graph.
        """
        self._compiled = True
        torch._dynamo.config.suppress_errors = fall_back
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        self.head.sums = torch.compile(self.head.sums, dynamic=False)  # type: ignore[method-assign]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        by_sequence: bool = False,
    ) -> LossSums:
        """The loss sums of a batch, or with `by_sequence` of each of its sequences. All tensors are int64 [B, T].

        A token attends to itself and, within its own document, to earlier tokens (all tokens if not causal); without
        `document_ids` a sequence is one document. If ranks share sequences, T is this rank's part, except in
        `document_ids`, which cover all tokens.
        `positions` are the rotary positions (0, 1, ... by default); labels of -100 are not predicted.
        """
        hidden = self.hidden(tokens, positions, document_ids)
        predicted = labels != IGNORED_LABEL
        if self.config.pooling is Pooling.mean:
            hidden = document_means(hidden, positions, predicted)
        nll_sum, z_sum, *confusion = self.head(hidden, labels, by_sequence)
        return LossSums(nll_sum, z_sum, predicted.sum(-1) if by_sequence else predicted.sum(), *confusion)

    def logits(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V], in the model's dtype, for the token after each of `tokens` [B, T], or at it if not causal.

        With a cache, `positions` are the slots for the tokens of each row, and earlier tokens are read from the cache.
        """
        return self.head(self.hidden(tokens, positions, document_ids, cache))[0]

    def class_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """A classifier's logits in fp32: [B, C] for whole documents [B, T] of `lengths` [B], padded on the right."""
        hidden, last = self.hidden(tokens), (lengths - 1)[:, None]
        if self.config.pooling is Pooling.mean:
            is_last = torch.arange(tokens.shape[1], device=tokens.device) == last
            hidden = document_means(hidden, None, is_last)
        return self.head(hidden.take_along_dim(last[..., None], 1))[0][:, 0].float()

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The input of the head: the normalized residual stream [B, T, D]. The arguments are those of `logits`."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        cos, sin = rotary_tables(positions, self.config)
        if cache is not None:
            visible: Visibility = cache.advance(positions)
        else:
            visible = visibility(document_ids, self.kernels.attention, self.causal)
        if self._compiled and isinstance(visible, Documents):
            # Otherwise a block would be compiled again for each number of documents.
            torch._dynamo.mark_dynamic(visible.starts, 0)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, visible, cache)
        return self.norm(x)


def build_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    causal: bool = True,
) -> Decoder:
    """A decoder in evaluation mode with the given weights, whose keys are the names in `Decoder.named_parameters()`.

    Raises RuntimeError if names or shapes do not match the config.
    """
    with torch.device("meta"):  # so no initial weights are drawn
        model = Decoder(config, seed=0, causal=causal)
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
    is_tied = config.tie_embeddings and not config.classes
    if is_tied:
        weights["head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights, assign=True)
    if is_tied:
        model.head.weight = model.embed.weight
    return model.eval().requires_grad_(False)


def _residual_std(config: ModelConfig) -> float:
    # 2 n_layers branches are added to the residual stream; this keeps its variance independent of depth (GPT-2).
    return config.init_std / math.sqrt(2 * config.n_layers)


def _normal_parameter(n_rows: int, n_columns: int, std: float, generator: torch.Generator) -> nn.Parameter:
    weight = torch.empty(n_rows, n_columns)  # under zero.Init: bf16, on the rank's device
    if not weight.is_meta:
        # The values are drawn in fp32 on the CPU and then rounded, so every dtype and device gets the same numbers.
        weight.copy_(torch.normal(0.0, std, (n_rows, n_columns), generator=generator, dtype=torch.float32))
    return nn.Parameter(weight)
