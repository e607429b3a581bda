"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.config import OptimConfig, OptimizerName, ScheduleConfig, ScheduleName

_GAINS = ("norm.weight", "lora_magnitude_vector.weight")
"""Ends of the names of parameters that are vectors of factors: the norms' gains and DoRA's lengths of rows."""


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, n_steps: int) -> float:
    """Learning rate of update `step` (1 to n_steps).

    It is 0 while moments are filled (`moment_warmup_steps`), and rises linearly over the warm-up. Then it is constant,
    or decays to `min_lr_frac` of the peak: linearly, along half a cosine (Loshchilov and Hutter, 2017), or linearly
    after a constant phase (WSD: Hu et al., 2024).
    """
    step, n_steps = step - schedule.moment_warmup_steps, n_steps - schedule.moment_warmup_steps
    if step <= 0:
        return 0.0
    warmup = schedule.warmup_in(n_steps)
    if step <= warmup:
        return peak * step / warmup
    floor = peak * schedule.min_lr_frac
    match schedule.name:
        case ScheduleName.constant:
            return peak
        case ScheduleName.wsd:
            decay = schedule.decay_steps or max(1, n_steps // 10)
            start = schedule.decay_start_in(n_steps)
        case ScheduleName.linear | ScheduleName.cosine:
            decay = schedule.decay_steps or max(1, n_steps - warmup)
            start = warmup
    done = min(1.0, max(0.0, (step - start) / decay))
    if schedule.name is ScheduleName.cosine:
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return peak + (floor - peak) * done


def is_matrix_of_block(name: str) -> bool:
    """Whether a parameter of the decoder is a matrix inside a block. Muon is meant for these."""
    return name.startswith("blocks.") and not name.endswith((*_GAINS, ".bias"))


def moments_of(name: str, config: OptimConfig) -> tuple[str, ...]:
    """The names of the moments that the optimizer keeps for a parameter. Each is fp32 and has the parameter's size."""
    if config.name is OptimizerName.muon and is_matrix_of_block(name):
        return ("momentum_buffer",)
    return ("exp_avg", "exp_avg_sq")


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> list[dict]:
    """Groups of trained parameters: with weight decay, without, and Muon's (`muon`: True). Empty groups are omitted.

    Gains (of norms, and of DoRA) and the token embedding are decayed only if so configured, and biases never.
    Parameters are grouped by name and not by shape, because under ZeRO-3 every local parameter is flat.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    matrices: list[torch.nn.Parameter] = []
    for name, parameter in named_parameters:
        if name.endswith(_GAINS):
            decay = config.decay_norms
        elif name == "embed.weight":
            decay = config.decay_embeddings
        else:
            decay = not name.endswith(".bias")
        if config.name is OptimizerName.muon and is_matrix_of_block(name):
            matrices.append(parameter)
        else:
            (decayed if decay else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "muon": False},
        {"params": plain, "weight_decay": 0.0, "muon": False},
        {"params": matrices, "weight_decay": config.weight_decay, "muon": True},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer for these groups. The engine sets its learning rate at each step."""
    if config.name is OptimizerName.muon:
        return Muon(groups, config)
    # `fused` runs one kernel for all tensors, which is four times faster than the default on the CPU.
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


@dataclass(frozen=True)
class Placement:
    """Where the values of one parameter are in the flat partitions of all ranks."""

    name: str
    """Name of the parameter in the model."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    offset: int
    """Index in this rank's flat partition at which its part of the parameter starts."""
    spans: tuple[tuple[int, int], ...]
    """Elements [start, stop) of the flattened parameter that each rank holds; one entry if every rank holds all."""


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for groups with `muon`: True, AdamW for the others.

    The momentum of a matrix, with Nesterov's look-ahead, is replaced by the nearest matrix with orthogonal rows or
    columns and scaled by 0.2 sqrt(longer side). That gives it the size of AdamW's update, so the same learning rate and
    weight decay suit both (Liu et al., Muon is Scalable for LLM Training, 2025).

    Under ZeRO a rank holds flat parts of matrices. So each matrix is assembled on one rank, which orthogonalizes it and
    sends the parts back. A rank sends and receives its share of the values twice, at 2 bytes each, and
    orthogonalizes its share of the matrices.
    """

    def __init__(self, groups: list[dict], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self.momentum = config.momentum
        self.placements: dict[torch.Tensor, list[Placement]] = {}
        """The placements of the model's parameters in each flat parameter of this optimizer. The engine sets this."""
        self.rank, self.device = 0, torch.device("cpu")
        """Rank and device of this process; the engine sets them."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update. All ranks call this together, with their parameters in the same order."""
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else []:
                self._update(parameter, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups

    def _update(self, parameter: torch.Tensor, lr: float, weight_decay: float) -> None:
        gradient, momentum = parameter.grad, self.state[parameter]["momentum_buffer"]
        assert gradient is not None
        momentum.lerp_(gradient, 1 - self.momentum)
        direction = gradient.lerp(momentum, self.momentum).flatten()
        parameter.mul_(1 - lr * weight_decay)
        values = parameter.view(-1)
        placements = sorted(
            self.placements[parameter], key=lambda placement: placement.shape
        )  # equal shapes are adjacent, so that the ranks have equal work
        n_ranks = len(placements[0].spans)
        for first in range(0, len(placements), n_ranks):
            wave = placements[first : first + n_ranks]
            for placement, update in zip(wave, self._orthogonalized(direction, wave), strict=True):
                scale = 0.2 * math.sqrt(max(placement.shape))
                part = values[placement.offset : placement.offset + update.numel()]
                part.add_(update.to(part), alpha=-lr * scale)

    def _orthogonalized(self, direction: torch.Tensor, wave: list[Placement]) -> list[torch.Tensor]:
        """Orthogonalize a wave of matrices, of which rank i computes the i-th. Returns this rank's parts of them."""
        parts = []
        for placement in wave:
            start, stop = placement.spans[self.rank if len(placement.spans) > 1 else 0]
            part = direction[placement.offset : placement.offset + stop - start]
            parts.append(part.to(self.device, torch.bfloat16))
        n_ranks = len(wave[0].spans)
        if n_ranks == 1:
            return [newton_schulz(parts[0].view(wave[0].shape)).flatten()]
        here = [part.numel() for part in parts] + [0] * (n_ranks - len(wave))
        mine = wave[self.rank] if self.rank < len(wave) else None
        there = [stop - start for start, stop in mine.spans] if mine else [0] * n_ranks
        sent = torch.cat(parts)
        matrix = sent.new_empty(sum(there))
        dist.all_to_all_single(matrix, sent, there, here)
        if mine:
            matrix = newton_schulz(matrix.view(mine.shape)).flatten()
        back = torch.empty_like(sent)
        dist.all_to_all_single(back, matrix, here, there)
        return list(back.split(here))[: len(wave)]


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values near 1 (0.7 to 1.2) and keep the singular vectors, in five steps in the matrix's dtype.

    Each step applies the quintic polynomial of Jordan et al., 2024.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x.T.contiguous() if matrix.shape[0] > matrix.shape[1] else x
