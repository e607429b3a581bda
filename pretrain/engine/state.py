"""The weights and moments that DeepSpeed holds in partitions, as whole, named tensors, for checkpoints and checks.

This file knows how the ZeRO stages lay out their partitions, and imports no deepspeed. A snapshot holds fp32 master
weights and the optimizer's moments in a form that depends on neither the number of ranks nor the ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import OptimConfig
from pretrain.distributed import Partition, World, gather_objects, share
from pretrain.engine.bit_sums import StateSums, bit_sum
from pretrain.engine.optim import Muon, Placement, moments_of
from pretrain.errors import RunError

Spans = tuple[tuple[int, int], ...]


def gathered(values: torch.Tensor, shape: tuple[int, ...], world: World) -> torch.Tensor:
    """The whole tensor in host memory, from the shares of all ranks, as `share` cuts it."""
    numel = torch.Size(shape).numel()
    per_rank = -(-numel // world.size)
    padded = torch.zeros(per_rank)
    padded[: values.numel()].copy_(values)
    if world.size == 1:
        return padded.view(shape)
    parts = [torch.empty(per_rank) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:numel].view(shape)


def same_rounded(exact: torch.Tensor, working: torch.Tensor) -> bool:
    """Whether `working` is `exact`, rounded to its type."""
    return torch.equal(exact.to(working), working)


class EngineState:
    """Weights and moments of a model under DeepSpeed, on every rank of the world."""

    def __init__(
        self,
        zero: Any,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, torch.nn.Parameter],
        config: OptimConfig,
        zero_stage: int,
        world: World,
        frozen: dict[str, torch.nn.Parameter] | None = None,
        *,
        ema: bool = False,
    ) -> None:
        """Allocate the moments, all zero. `zero` is DeepSpeed's optimizer wrapper, or in stage 0 the optimizer.

        `parameters` are those that are trained, and `frozen` all others. Only the former are in snapshots. With `ema`,
        a moving average of the weights is kept beside the moments, and starts as the weights.
        """
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        """The full shape of every parameter, by name."""
        self.weight_keys = [f"weight.{name}" for name in parameters]
        self.moment_keys = [f"{kind}.{name}" for name in parameters for kind in moments_of(name, config)]
        """`exp_avg.<name>` and `exp_avg_sq.<name>`, or `momentum_buffer.<name>` for a matrix that Muon trains."""
        self.ema_keys = [f"ema.{name}" for name in parameters] if ema else []
        """`ema.<name>`; empty if no moving average is kept."""
        self._zero, self._optimizer, self._parameters = zero, optimizer, parameters
        self._frozen = frozen or {}
        self.n_trained = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        """Number of trained values."""
        self.n_frozen = sum(getattr(p, "ds_numel", p.numel()) for p in self._frozen.values())
        """Number of values that are not trained."""
        self._config, self._zero_stage, self._world = config, zero_stage, world
        self._host: dict[str, torch.Tensor] = {}
        self._ema: dict[torch.Tensor, torch.Tensor] = {}
        """The average of each tensor that the optimizer updates, as far as this rank keeps it."""
        self._placements = self._find_placements()
        if isinstance(optimizer, Muon):
            optimizer.placements, optimizer.rank, optimizer.device = (
                self._placements,
                world.rank,
                world.device,
            )
        self._allocate_moments()
        self._start_ema()
        self.sums = StateSums(self._partitioned_state, self._replicated_state)
        """Sums over all bits of the state, which reveal changes that no update made."""
        self._frozen_sum = self._sum_of_frozen()

    @property
    def optimizer_step(self) -> int:
        """Number of updates that Adam has applied; skipped steps do not count."""
        return next(int(state["step"]) for state in self._optimizer.state.values() if "step" in state)

    @torch.no_grad()
    def snapshot(self) -> dict[str, Partition]:
        """Copy this rank's share of all weights and moments to host memory. Returns it by key.

        All ranks call this together. The next snapshot reuses the memory of this one, which is page-locked if there is
        a GPU. Raises RunError on all ranks where a frozen weight has changed since this object was made.
        """
        self._check_frozen()
        partitions: dict[str, Partition] = {}
        for index, (flat, placements) in enumerate(self._placements.items()):
            with self._in_memory(index):
                for placement in placements:
                    for kind in ("weight", *moments_of(placement.name, self._config)):
                        key = f"{kind}.{placement.name}"
                        partitions[key] = self._copied(
                            key, self._share_of(self._part(flat, placement, kind), placement)
                        )
                    if self.ema_keys:
                        key = f"ema.{placement.name}"
                        partitions[key] = self._copied(key, self._ema_share(flat, placement))
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return partitions

    @torch.no_grad()
    def restore(self, partitions: dict[str, torch.Tensor], optimizer_step: int) -> None:
        """Load a snapshot that was taken on any number of ranks and with any ZeRO stage. All ranks call this together.

        `partitions` holds, by key, this rank's share of each flattened tensor, as `share` cuts it. A moving average
        that it does not hold starts as the weights.
        """
        self.sums.forget()
        if self._zero_stage == 3:
            self._zero.checkpoint_event_prologue()  # releases gathered parameters
        for index, (flat, placements) in enumerate(self._placements.items()):
            with self._in_memory(index, changed=True):
                for placement in placements:
                    for kind in ("weight", *moments_of(placement.name, self._config)):
                        self._put_back(flat, placement, kind, partitions[f"{kind}.{placement.name}"])
                if "step" in self._optimizer.state[flat]:
                    self._optimizer.state[flat]["step"].fill_(optimizer_step)
                if self._zero_stage == 3:  # copies the master weights to the working partitions
                    self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if self._zero_stage == 3:
            self._zero.checkpoint_event_epilogue()  # and to the parameters that are kept whole, or twice (hpZ)
        self._start_ema()
        for flat, placements in self._placements.items() if self.ema_keys else ():
            for placement in placements:
                if (key := f"ema.{placement.name}") in partitions:
                    self._put_back_ema(flat, placement, partitions[key])

    @torch.no_grad()
    def restore_weights(self, partitions: dict[str, torch.Tensor]) -> None:
        """Load only the weights (`weight.<name>`) and set the moments to zero, to start a new run from old weights.

        A weight that `partitions` lacks stays as it is.
        """
        if len(partitions) < len(self.weight_keys):
            initial = {key: part.values.clone() for key, part in self.snapshot().items()}
            partitions = {**{key: initial[key] for key in self.weight_keys}, **partitions}
        zeros = {
            key: torch.zeros_like(partitions[f"weight.{key.split('.', 1)[1]}"]) for key in self.moment_keys
        }
        self.restore({**zeros, **partitions}, optimizer_step=0)

    @torch.no_grad()
    def working_share(self, name: str) -> torch.Tensor:
        """This rank's even share of a parameter, trained or frozen, as forward passes use it, in their precision."""
        parameter: Any = self._parameters.get(name, self._frozen.get(name))
        start, stop = share(getattr(parameter, "ds_numel", parameter.numel()), self._world)
        if self._zero_stage == 3:
            return parameter.ds_tensor.flatten()[: stop - start]
        return parameter.flatten()[start:stop]

    def check_base(self, base: dict[str, torch.Tensor]) -> None:
        """Raise RunError on all ranks unless the frozen weights are those of `base`, this rank's share of each."""
        wrong = [
            name
            for name in self._frozen
            if not same_rounded(base[f"weight.{name}"], self.working_share(name))
        ]
        if found := sorted({name for names in gather_objects(wrong, self._world) for name in names}):
            raise RunError(
                f"{len(found)} of {len(self._frozen)} frozen weights are not those of the base ({found[0]} is the "
                "first), so the adapters would be trained on another model; start again"
            )

    # ---- the moving average of the weights ---------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self, stays: float) -> None:
        """Move the average towards the weights; the share `stays` of it stays. `sums` must not hold sums meanwhile."""
        weights = [self._averaged(flat) for flat in self._ema]
        torch._foreach_lerp_(list(self._ema.values()), weights, 1 - stays)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the averaged weights, for evaluation, until the block ends. All ranks call this together.

        Weights and average change places, so it takes no memory, and afterwards all bits are as before. If the block
        fails, they are not put back, because the run ends.
        """
        self._exchange_ema()
        yield
        self._exchange_ema()

    @torch.no_grad()
    def _exchange_ema(self) -> None:
        self.sums.forget()
        if self._zero_stage == 3:
            self._zero.checkpoint_event_prologue()
        for index, (flat, placements) in enumerate(self._placements.items()):
            ema, before = self._ema[flat], self._averaged(flat).clone()
            match self._zero_stage:
                case 0:
                    flat.copy_(gathered(ema, placements[0].shape, self._world))
                case 3:
                    flat.copy_(ema)
                    self._zero._reassign_or_swap_out_partitioned_parameters(index)
                case _:
                    flat.copy_(ema)
                    for placement in placements:
                        whole = self._whole(self._part(flat, placement, "weight"), placement)
                        self._parameters[placement.name].copy_(whole.view(placement.shape))
            ema.copy_(before)
        if self._zero_stage == 3:
            self._zero.checkpoint_event_epilogue()

    def _start_ema(self) -> None:
        """Set the average to the weights, if one is kept."""
        if self.ema_keys:
            self._ema = {flat: self._averaged(flat).clone() for flat in self._placements}

    def _averaged(self, flat: torch.Tensor) -> torch.Tensor:
        """The weights whose average this rank keeps: its partition, or in stage 0 its even share of the parameter."""
        values = flat.detach().view(-1)
        if self._zero_stage > 0:
            return values
        start, stop = share(values.numel(), self._world)
        return values[start:stop]

    def _ema_part(self, flat: torch.Tensor, placement: Placement) -> torch.Tensor:
        """A view of this rank's part of a parameter's average."""
        if self._zero_stage == 0:
            return self._ema[flat]
        start, stop = self._span(placement)
        return self._ema[flat][placement.offset : placement.offset + stop - start]

    def _ema_share(self, flat: torch.Tensor, placement: Placement) -> torch.Tensor:
        """This rank's even share of a parameter's average."""
        part = self._ema_part(flat, placement)
        return part if self._zero_stage == 0 else self._share_of(part, placement)

    def _put_back_ema(self, flat: torch.Tensor, placement: Placement, values: torch.Tensor) -> None:
        if self._zero_stage in (1, 2):
            start, stop = self._span(placement)
            values = gathered(values, placement.shape, self._world).flatten()[start:stop]
        self._ema_part(flat, placement).copy_(values)

    # ---- where the values are --------------------------------------------------------------------------------------

    def _find_placements(self) -> dict[torch.Tensor, list[Placement]]:
        """The tensors that the optimizer updates on this rank (fp32; flat from stage 1 on), with their parameters."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}

        def placement(parameter: Any, offset: int, spans: Spans) -> Placement:
            name = names[id(parameter)]
            return Placement(name=name, shape=self.shapes[name], offset=offset, spans=spans)

        zero, found = self._zero, {}
        match self._zero_stage:
            case 0:
                for parameter in (p for group in self._optimizer.param_groups for p in group["params"]):
                    found[parameter] = [placement(parameter, 0, ((0, parameter.numel()),))]
            case 3:
                for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                    offsets = accumulate((p.partition_numel() for p in group), initial=0)
                    found[flat] = [
                        placement(p, at, self._even(p.ds_numel))
                        for p, at in zip(group, offsets, strict=False)
                    ]
            case _:
                for index, flat in enumerate(zero.single_partition_of_fp32_groups):
                    group, size = zero.round_robin_bit16_groups[index], zero.partition_size[index]
                    found[flat] = [
                        placement(p, max(0, at - self._world.rank * size), self._cut(at, p.numel(), size))
                        for p, at in zip(group, zero.round_robin_bit16_offsets[index], strict=True)
                    ]
        return found

    def _even(self, numel: int) -> Spans:
        """The spans of ZeRO stage 3 and of checkpoints, which cut a tensor evenly over the ranks."""
        return tuple(share(numel, replace(self._world, rank=rank)) for rank in range(self._world.size))

    def _cut(self, first: int, numel: int, size: int) -> Spans:
        """The spans of ZeRO stages 1 and 2 for a tensor at element `first` of partitions of `size` elements."""
        borders = [min(max(rank * size - first, 0), numel) for rank in range(self._world.size + 1)]
        return tuple(pairwise(borders))

    @contextmanager
    def _in_memory(self, index: int, *, changed: bool = False) -> Iterator[None]:
        """Keep the master weights and moments of a partition in memory; NVMe offload otherwise keeps them in files."""
        swapped = self._zero_stage == 3 and self._zero._swappable_optimizer_subgroup(index)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if swapped and changed:
            self._zero._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            self._zero._release_swap_buffers(index)

    def _part(self, flat: torch.Tensor, placement: Placement, kind: str) -> torch.Tensor:
        """A view of this rank's part of a parameter's master weights or moment."""
        tensor = flat if kind == "weight" else self._optimizer.state[flat][kind]
        start, stop = self._span(placement)
        return tensor.detach().view(-1)[placement.offset : placement.offset + stop - start]

    def _span(self, placement: Placement) -> tuple[int, int]:
        return placement.spans[self._world.rank if len(placement.spans) > 1 else 0]

    def _share_of(self, part: torch.Tensor, placement: Placement) -> torch.Tensor:
        """This rank's even share of a tensor, assembled from the parts that the ranks hold."""
        numel = torch.Size(placement.shape).numel()
        if placement.spans == self._even(numel):
            return part
        start, stop = share(numel, self._world)
        if len(placement.spans) == 1:
            return part[start:stop]
        return self._whole(part, placement)[start:stop]

    def _whole(self, part: torch.Tensor, placement: Placement) -> torch.Tensor:
        """A tensor of stages 1 and 2, flat, assembled from the parts that the ranks hold."""
        # The bits are added as integers, because 0.0 + -0.0 is 0.0.
        whole = torch.zeros(torch.Size(placement.shape).numel(), dtype=torch.int32, device=self._world.device)
        start, stop = self._span(placement)
        whole[start:stop] = part.view(torch.int32)
        if self._world.size > 1:
            dist.all_reduce(whole)
        return whole.view(torch.float32)

    def _copied(self, key: str, values: torch.Tensor) -> Partition:
        host = self._host.get(key)
        if host is None:
            pinned = self._world.device.type == "cuda"
            host = torch.empty(values.numel(), dtype=torch.float32, pin_memory=pinned)
            self._host[key] = host
        numel = torch.Size(self.shapes[key.split(".", 1)[1]]).numel()
        return Partition(host.copy_(values, non_blocking=True), numel)

    def _put_back(self, flat: torch.Tensor, placement: Placement, kind: str, values: torch.Tensor) -> None:
        part = self._part(flat, placement, kind)
        if self._zero_stage == 3:
            part.copy_(values)
            return
        whole = gathered(values, placement.shape, self._world)
        start, stop = self._span(placement)
        part.copy_(whole.flatten()[start:stop])
        if kind == "weight":
            self._parameters[placement.name].copy_(whole)  # the working weight

    # ---- all of it -------------------------------------------------------------------------------------------------

    def _partitioned_state(self) -> list[torch.Tensor]:
        """The tensors that only this rank holds, except those that are in files between two updates."""
        masters = list(self._placements)
        found = [t for state in self._optimizer.state.values() for kind, t in state.items() if kind != "step"]
        found += self._ema.values()
        if self._zero_stage > 0:
            found += masters
        if self._zero_stage == 3:
            working = self._zero.fp16_partitioned_groups_flat
            found += [w for w, m in zip(working, masters, strict=True) if w.data_ptr() != m.data_ptr()]
            found += self._own_frozen()
        return found

    def _replicated_state(self) -> list[torch.Tensor]:
        """The parameters that every rank holds whole: all, or under ZeRO stage 3 those too small to be partitioned."""
        held: list[Any] = [*self._parameters.values(), *self._frozen.values()]
        return held if self._zero_stage < 3 else [p for p in held if p.ds_persist]

    def _own_frozen(self) -> list[torch.Tensor]:
        """The frozen weights on this rank: all, or under ZeRO stage 3 its partitions."""
        held: list[Any] = list(self._frozen.values())
        return held if self._zero_stage < 3 else [p.ds_tensor for p in held]

    def _sum_of_frozen(self) -> int:
        return int(bit_sum(self._own_frozen()))

    def _check_frozen(self) -> None:
        """Raise RunError on all ranks where a frozen weight of one has changed."""
        if not self._frozen:
            return
        changed = gather_objects(self._sum_of_frozen() != self._frozen_sum, self._world)
        if any(changed):
            ranks = ", ".join(str(rank) for rank, one in enumerate(changed) if one)
            raise RunError(
                f"frozen weights changed during training (on rank {ranks}), although only adapters are trained; "
                "nothing is saved, start again from the last checkpoint"
            )

    def _allocate_moments(self) -> None:
        """Create the moments. torch would create them at the first step, which is too late for loading a checkpoint.

        Each flat partition gets its own `step`, because a shared one would count each update several times.
        """
        for index, (flat, placements) in enumerate(self._placements.items()):
            with self._in_memory(index, changed=True):
                state = self._optimizer.state[flat]
                for kind in moments_of(placements[0].name, self._config):
                    state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
                if "exp_avg" in state:
                    state["step"] = torch.zeros((), device=flat.device)
