"""What DeepSpeed holds in partitions, as whole, named tensors: the state of a run, for checkpoints and checks.

The part of the engine that reads and writes partitions through deepspeed; `engine.py` prepares that import. A snapshot
holds fp32 master weights and Adam moments in a form that no number of ranks or ZeRO stage appears in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from pretrain.distributed import Partition, World, share
from pretrain.health import StateSums

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state per parameter, in fp32."""


class EngineState:
    """Weights and moments of a model under DeepSpeed, on every rank of the world."""

    def __init__(
        self,
        zero: Any,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, torch.nn.Parameter],
        stage: int,
        world: World,
    ) -> None:
        """`zero`: DeepSpeed's wrapper of the optimizer (stage 0: the optimizer). Makes the moments, all zero."""
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        """Full shape of every parameter."""
        self._zero, self._optimizer, self._parameters = zero, optimizer, parameters
        self._stage, self._world = stage, world
        self._host: dict[str, torch.Tensor] = {}
        self._allocate_moments()
        self.sums = StateSums(self._partitioned_state, self._replicated_state)
        """Over all bits of the state, to see that nothing but an update changes it."""

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has applied; skipped steps do not count."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @torch.no_grad()
    def snapshot(self) -> dict[str, Partition]:
        """`weight.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>` -> this rank's share, copied to the host.

        All ranks call this together. The next snapshot overwrites this one's memory, which is kept for it, and is
        page-locked where there is a GPU.
        """
        partitions = {f"{kind}.{name}": self._partition(kind, name) for kind, name in self._state_keys()}
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return partitions

    @torch.no_grad()
    def restore(self, partitions: dict[str, torch.Tensor], optimizer_step: int) -> None:
        """Put back what `snapshot` gave, by any number of ranks and any stage.

        `partitions`: key -> this rank's share of the flattened tensor, as `share` cuts it. All ranks together.
        """
        self.sums.forget()
        for kind, name in self._state_keys():
            parameter, values = self._parameters[name], partitions[f"{kind}.{name}"]
            if self._stage == 3:
                self._restore_partition(parameter, kind, values)
            else:
                self._restore_whole(parameter, kind, self._gather(values, self.shapes[name]))
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(optimizer_step), device=state["exp_avg"].device)
        if self._stage == 3:
            self._refresh_working_weights()

    @torch.no_grad()
    def restore_weights(self, partitions: dict[str, torch.Tensor]) -> None:
        """Put back `weight.<name>` only; moments stay at zero (a new run from old weights)."""
        zeros = {
            f"{kind}.{name}": torch.zeros_like(partitions[f"weight.{name}"])
            for kind in MOMENTS
            for name in self.shapes
        }
        self.restore({**zeros, **partitions}, optimizer_step=0)

    def _state_keys(self) -> Iterator[tuple[str, str]]:
        for kind in ("weight", *MOMENTS):
            for name in self._parameters:
                yield kind, name

    def _partition(self, kind: str, name: str) -> Partition:
        parameter, shape = self._parameters[name], self.shapes[name]
        numel = torch.Size(shape).numel()
        if self._stage == 3:
            if kind == "weight":
                local = safe_get_local_fp32_param(parameter)
            else:
                local = safe_get_local_optimizer_state(parameter, kind)
            start, stop = share(numel, self._world)
            values = local.flatten()[: stop - start]  # DeepSpeed pads the last rank's partition
        else:
            start, stop = share(numel, self._world)
            values = self._whole(parameter, kind).flatten()[start:stop]
        host = self._host.get(f"{kind}.{name}")
        if host is None:
            pinned = self._world.device.type == "cuda"
            host = torch.empty(values.numel(), dtype=torch.float32, pin_memory=pinned)
            self._host[f"{kind}.{name}"] = host
        return Partition(host.copy_(values.detach(), non_blocking=True), numel)

    def _whole(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if self._stage == 0:
            return parameter if kind == "weight" else self._optimizer.state[parameter][kind]
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _restore_whole(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        value = value.to(parameter.device)
        if self._stage == 0:
            (parameter if kind == "weight" else self._optimizer.state[parameter][kind]).copy_(value)
        elif kind == "weight":
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)  # the bf16 weight that computes
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _restore_partition(self, parameter: torch.nn.Parameter, kind: str, values: torch.Tensor) -> None:
        size = -(-torch.Size(parameter.ds_shape).numel() // self._world.size)  # type: ignore[attr-defined]
        padded = torch.zeros(size, device=self._world.device)
        padded[: values.numel()].copy_(values)
        if kind == "weight":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    def _refresh_working_weights(self) -> None:
        """Stage 3: the bf16 partitions, and the small parameters kept whole, follow the fp32 masters."""
        zero = self._zero
        zero.checkpoint_event_prologue()
        for sub_group, masters in enumerate(zero.fp32_partitioned_groups_flat):
            working = zero.fp16_partitioned_groups_flat[sub_group]
            if working.data_ptr() != masters.data_ptr():
                working.copy_(masters)
            views = zero.unflatten(working, zero.fp16_partitioned_groups[sub_group])
            for partition, view in zip(zero.fp16_partitioned_groups[sub_group], views, strict=True):
                partition.data = view.data
        zero.checkpoint_event_epilogue()

    def _gather(self, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor from every rank's share."""
        numel = torch.Size(shape).numel()
        per_rank = -(-numel // self._world.size)
        padded = torch.zeros(per_rank)
        padded[: values.numel()].copy_(values)
        if self._world.size == 1:
            return padded.view(shape)
        gathered = [torch.empty(per_rank) for _ in range(self._world.size)]
        dist.all_gather(gathered, padded)
        return torch.cat(gathered)[:numel].view(shape)

    def _flat_masters(self) -> list[torch.Tensor]:
        """What the optimizer updates: fp32, flat from stage 1 on, this rank's part."""
        zero = self._zero
        match self._stage:
            case 0:
                return [p for group in self._optimizer.param_groups for p in group["params"]]
            case 3:
                return list(zero.fp32_partitioned_groups_flat)
            case _:
                return list(zero.single_partition_of_fp32_groups)

    def _partitioned_state(self) -> list[torch.Tensor]:
        masters = self._flat_masters()
        found = [state[kind] for state in self._optimizer.state.values() for kind in MOMENTS]
        if self._stage > 0:
            found += masters
        if self._stage == 3:
            working = self._zero.fp16_partitioned_groups_flat
            found += [w for w, m in zip(working, masters, strict=True) if w.data_ptr() != m.data_ptr()]
        return found

    def _replicated_state(self) -> list[torch.Tensor]:
        """Whole parameters on every rank: all of them, or under stage 3 those too small to be cut."""
        if self._stage < 3:
            return list(self._parameters.values())
        return [p for p in self._parameters.values() if p.ds_persist]  # type: ignore[attr-defined]

    def _allocate_moments(self) -> None:
        """Create Adam's state, which torch makes at the first step only: a checkpoint is loaded in place before it.

        Each flat partition gets a `step` of its own: one shared by several would count each update several times.
        """
        for tensor in self._flat_masters():
            state = self._optimizer.state[tensor]
            if not state:
                state["step"] = torch.zeros((), device=tensor.device)
                for kind in MOMENTS:
                    state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()
