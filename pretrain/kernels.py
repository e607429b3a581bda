"""Which kernels compute the model: those asked for, or the best that the device and the installation can do.

What cannot work anywhere is refused by the configuration (`pretrain.schemas`); what cannot work here, by `resolve`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import NamedTuple

import torch

from pretrain.config import AttentionKernel, ConfigError, KernelsConfig, Precision, Switch, TrainConfig

PLAIN = KernelsConfig(attention=AttentionKernel.sdpa, compile=Switch.never)
"""What works everywhere."""


class Capability(NamedTuple):
    """What decides between kernels."""

    device: str
    """cpu or cuda."""
    compute: int = 0
    """Of a CUDA device, its compute capability: 80 is A100, 89 L40S, 90 H100."""
    varlen: bool = False
    """torch has FlashAttention for sequences of varying length with grouped queries (2.13)."""
    triton: bool = False
    liger: bool = False
    """The package liger-kernel."""


def capability_of(device: torch.device) -> Capability:
    """Of this process's device and installation."""
    if device.type == "cpu":
        return Capability("cpu")
    from torch.nn.attention import varlen

    major, minor = torch.cuda.get_device_capability(device)
    return Capability(
        device.type,
        10 * major + minor,
        "enable_gqa" in varlen.varlen_attn.__annotations__,
        importlib.util.find_spec("triton") is not None,
        importlib.util.find_spec("liger_kernel") is not None,
    )


def resolve(config: TrainConfig, capability: Capability) -> KernelsConfig:
    """The run's kernels with nothing left to choose. ConfigError where one that is asked for cannot work here."""
    asked = config.kernels.attention
    problems = {
        AttentionKernel.flash: _flash_problem(config, capability),
        AttentionKernel.flex: _flex_problem(config, capability),
        AttentionKernel.sdpa: None,
    }
    if asked is AttentionKernel.auto:
        asked = next(kernel for kernel, problem in problems.items() if problem is None)
    if problems[asked]:
        raise ConfigError(f"kernels.attention={asked.value} {problems[asked]}; use kernels.attention=auto")
    if config.kernels.fp8 and capability.compute < 89:
        raise ConfigError(
            "kernels.fp8=true needs a GPU of compute capability 8.9 or newer (L40S, H100); use kernels.fp8=false"
        )
    if config.kernels.liger and not (capability.device == "cuda" and capability.triton and capability.liger):
        raise ConfigError(
            "kernels.liger=true needs a GPU and the packages triton and liger-kernel (the extra liger); "
            "use kernels.liger=false"
        )
    compile = config.kernels.compile
    if compile is Switch.auto:
        compile = Switch.always if capability.device == "cuda" else Switch.never
    return replace(config.kernels, attention=asked, compile=compile)


def _flash_problem(config: TrainConfig, capability: Capability) -> str | None:
    width = config.model.head_width
    if capability.device == "cpu":
        return None
    if config.engine.precision is not Precision.bf16:
        return f"computes in bf16 on a GPU, not in engine.precision={config.engine.precision.value}"
    if capability.compute < 80:
        return f"needs a GPU of compute capability 8.0 or newer, and this one has {capability.compute / 10}"
    if not capability.varlen:
        return f"needs a newer torch than {torch.__version__}"
    # The backward pass of wider heads needs the shared memory of A100, H100 or B200.
    widest = 256 if capability.compute in (80, 90, 100) else 192
    if width % 8 or width > widest:
        return f"needs a head width that is a multiple of 8 and at most {widest}, not model.d_head={width}"
    return None


def _flex_problem(config: TrainConfig, capability: Capability) -> str | None:
    if capability.device == "cpu":
        return "cannot train on a CPU, where FlexAttention has no backward pass"
    if not capability.triton:
        return "needs the package triton, which is not installed"
    if config.model.head_width < 16:
        return f"needs a head width of at least 16, not model.d_head={config.model.head_width}"
    return None
