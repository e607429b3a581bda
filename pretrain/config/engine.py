"""The configuration group `engine`: how DeepSpeed partitions, moves and communicates the model's state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.config.checks import check_positive
from pretrain.config.model import Precision
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

NVME_SUB_GROUP_ELEMENTS = 100_000_000
"""Number of elements per rank that an optimizer on NVMe updates at a time.

Four fp32 buffers of this size stay in host memory (1.6 GB).
"""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How DeepSpeed holds and moves the model."""

    zero_stage: int = 3
    """ZeRO stage: what is partitioned over the ranks. 0: nothing; 1: the optimizer state; 2: also the gradients; 3:
    also the parameters."""
    precision: Precision = Precision.auto
    """Precision of the forward and backward pass. `auto` chooses bf16 where every device of the run has bf16 hardware,
    and fp32 otherwise."""
    offload_optimizer: bool = False
    """Keep the optimizer state and the master weights in host memory (ZeRO stages 1 to 3)."""
    offload_params: bool = False
    """Keep the partitioned compute parameters in host memory (ZeRO stage 3)."""
    nvme_path: PathText | None = None
    """Folder on a fast local disk of each host that holds the offloaded optimizer state, instead of host memory (ZeRO
    stage 3)."""
    hpz_partition_ranks: int = 1
    """ZeRO++ hpZ: number of neighboring ranks, all on one node, that together hold a second copy of the parameters. The
    backward pass then gathers parameters within this group (ZeRO stage 3); 1 keeps no second copy."""
    quantized_weights: bool = False
    """ZeRO++ qwZ: send parameters as 8-bit integers (ZeRO stage 3, GPU)."""
    quantized_gradients: bool = False
    """ZeRO++ qgZ: send gradients between nodes as 4-bit integers (ZeRO stage 3, GPU)."""
    reduce_bucket_elements: int = 50_000_000
    """Number of gradient elements that are reduced together."""
    prefetch_bucket_elements: int = 50_000_000
    """Number of parameter elements that are gathered ahead of use (ZeRO stage 3)."""
    persistence_threshold_elements: int = 100_000
    """Parameters with fewer elements than this stay whole on every rank (ZeRO stage 3)."""
    max_live_elements: int = 1_000_000_000
    """Upper limit of the number of gathered parameter elements that a rank keeps (ZeRO stage 3)."""
    sequence_parallel_ranks: int = 1
    """Number of neighboring ranks that share each sequence, for long sequences (DeepSpeed-Ulysses); with 1, every rank
    reads its own sequences."""
    timeout_s: int = 1800
    """Seconds after which a collective that has not finished ends the process."""
    deepspeed_overrides: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, merged into the generated DeepSpeed configuration last; for experts."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is unknown; allowed: 0, 1, 2, 3")
        if self.zero_stage == 0 and self.precision in (Precision.bf16, Precision.fp16):
            raise ConfigError(
                f"engine.precision={self.precision.value} with engine.zero_stage=0 is not supported: without ZeRO, "
                "DeepSpeed's 16-bit optimizer wrappers either take an optimizer step while they start or hide the "
                "state "
                "that a checkpoint needs; use engine=zero1, or engine.precision=fp32"
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
                f"engine.hpz_partition_ranks={self.hpz_partition_ranks} keeps a second copy of the parameters on the "
                "device, and engine.offload_params=true moves them off it; use only one of the two"
            )
        quantized = self.quantized_weights or self.quantized_gradients
        if quantized and self.precision not in (Precision.auto, Precision.bf16):
            raise ConfigError(
                f"{used[-1]} needs engine.precision=bf16, not {self.precision.value}: it has been tested with bf16 only"
            )

    def check_ranks(self, world_size: int, local_size: int | None) -> None:
        """Raise ConfigError where a group of neighboring ranks does not divide the ranks of the job or of a host.

        `local_size` is the number of ranks per host; None means that the launcher did not set it.
        """
        for name in ("hpz_partition_ranks", "sequence_parallel_ranks"):
            group = getattr(self, name)
            for ranks, what in ((world_size, "ranks"), (local_size or world_size, "ranks of a node")):
                if ranks % group:
                    raise ConfigError(
                        f"engine.{name}={group} does not divide the {ranks} {what}; use a divisor of {ranks}"
                    )
