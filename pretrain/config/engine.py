"""The group of keys `engine`, validated. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.config.checks import check_positive
from pretrain.config.model import Precision
from pretrain.errors import ConfigError

NVME_SUB_GROUP_ELEMENTS = 100_000_000
"""Of a rank: what an optimizer on NVMe updates at a time. Four fp32 buffers of this size stay in host memory."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How DeepSpeed holds and moves the model."""

    zero_stage: int = 3
    """What is partitioned over the ranks: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters."""
    precision: Precision = Precision.auto
    """What the model computes in. `auto` is bf16 where every device of the run computes it in hardware, else fp32."""
    offload_optimizer: bool = False
    """Keep optimizer state and master weights in host memory (stages 1 to 3)."""
    offload_params: bool = False
    """Keep the parameter partitions that compute in host memory (stage 3)."""
    nvme_path: str | None = None
    """Folder on a fast disk of each host, to which an offloaded optimizer goes instead of host memory (stage 3)."""
    hpz_partition_ranks: int = 1
    """ZeRO++ hpZ: so many neighboring ranks, at most those of a node, hold one more copy of the parameters (stage 3);
    1: none."""
    quantized_weights: bool = False
    """ZeRO++ qwZ: parameters travel as 8-bit integers (stage 3, GPU)."""
    quantized_gradients: bool = False
    """ZeRO++ qgZ: gradients travel between nodes as 4-bit integers (stage 3, GPU)."""
    reduce_bucket_elements: int = 50_000_000
    """Gradients are reduced in buckets of this many elements."""
    prefetch_bucket_elements: int = 50_000_000
    """Stage 3: parameters gathered ahead of use."""
    persistence_threshold_elements: int = 100_000
    """Stage 3: smaller parameters stay whole on every rank."""
    max_live_elements: int = 1_000_000_000
    """Stage 3: gathered parameters kept at most."""
    sequence_parallel_ranks: int = 1
    """So many neighboring ranks share each sequence, for long ones (Ulysses); 1: each rank has sequences of its own."""
    timeout_s: int = 1800
    """A collective that takes longer ends the process."""
    deepspeed_overrides: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, merged last; for experts."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is unknown; allowed: 0, 1, 2, 3")
        if self.zero_stage == 0 and self.precision in (Precision.bf16, Precision.fp16):
            raise ConfigError(
                f"engine.precision={self.precision.value} with engine.zero_stage=0 is refused, since DeepSpeed's "
                "wrappers for 16 bits without ZeRO apply an optimizer step at the start or keep their state out of "
                "reach; use engine=zero1, or engine.precision=fp32"
            )
        if self.offload_params and self.zero_stage != 3:
            raise ConfigError(
                f"engine.offload_params=true needs engine.zero_stage=3, not {self.zero_stage}: "
                "the other stages do not partition parameters"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage 1, 2 or 3, not 0")
        if self.nvme_path is not None and not (self.offload_optimizer and self.zero_stage == 3):
            raise ConfigError(
                f"engine.nvme_path={self.nvme_path} needs engine.offload_optimizer=true (it is "
                f"{str(self.offload_optimizer).lower()}) and engine.zero_stage=3 (it is {self.zero_stage})"
            )
        self._check_zeropp()
        check_positive(self, "engine", "reduce_bucket_elements", "prefetch_bucket_elements", "timeout_s")

    def _check_zeropp(self) -> None:
        check_positive(self, "engine", "hpz_partition_ranks", "sequence_parallel_ranks")
        used = [f"engine.hpz_partition_ranks={self.hpz_partition_ranks}"] * (self.hpz_partition_ranks > 1)
        used += ["engine.quantized_weights=true"] * self.quantized_weights
        used += ["engine.quantized_gradients=true"] * self.quantized_gradients
        if used and self.zero_stage != 3:
            raise ConfigError(
                f"{used[0]} needs engine.zero_stage=3, not {self.zero_stage}: it is a part of ZeRO++"
            )
        if self.hpz_partition_ranks > 1 and self.offload_params:
            raise ConfigError(
                f"engine.hpz_partition_ranks={self.hpz_partition_ranks} keeps a second copy of what "
                "engine.offload_params=true takes off the device; set one of them back"
            )
        quantized = self.quantized_weights or self.quantized_gradients
        if quantized and self.precision not in (Precision.auto, Precision.bf16):
            raise ConfigError(
                f"{used[-1]} needs engine.precision=bf16, not {self.precision.value}, the only one it was checked with"
            )

    def check_ranks(self, world_size: int, local_size: int | None) -> None:
        """ConfigError where groups of neighbors do not fit the ranks of the job and of a host (None: unknown)."""
        for name in ("hpz_partition_ranks", "sequence_parallel_ranks"):
            group = getattr(self, name)
            for ranks, what in ((world_size, "ranks"), (local_size or world_size, "ranks of a node")):
                if ranks % group:
                    raise ConfigError(
                        f"engine.{name}={group} does not divide the {ranks} {what}; give a divisor of it"
                    )
