"""Chooses the kernels and the precision of a run: the requested ones, or the best that all devices support.

`KernelsConfig` rejects requests that cannot work on any device; `resolve` rejects those that cannot work on the devices
of this run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from pretrain.config import AttentionKernel, KernelsConfig, Precision, Switch, TrainConfig
from pretrain.errors import ConfigError
from pretrain.model.precision import host_cpu_has_bf16, resolve_precision

PLAIN = KernelsConfig(attention=AttentionKernel.sdpa, compile=Switch.never)
"""The kernels that work on every device."""


DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}
"""The torch dtype of each precision."""


class Capability(NamedTuple):
    """Properties of a device and of the installation that determine the choice of kernels and precision."""

    device: str
    """`cpu` or `cuda`."""
    compute: int = 0
    """Compute capability of a CUDA device times 10: 80 is A100, 89 is L40S, 90 is H100."""
    triton: bool = False
    """Whether the package triton is installed."""
    liger: bool = False
    """Whether the package liger-kernel is installed."""
    bf16: bool = True
    """Whether the device computes bf16 matrix products in hardware."""
    host: str = ""
    """Name of the device's host."""


def capability_of(device: torch.device) -> Capability:
    """The capability of this process's device and installation."""
    host = os.uname().nodename
    if device.type == "cpu":
        return Capability("cpu", bf16=host_cpu_has_bf16(), host=host)
    major, minor = torch.cuda.get_device_capability(device)
    return Capability(
        device.type,
        10 * major + minor,
        importlib.util.find_spec("triton") is not None,
        importlib.util.find_spec("liger_kernel") is not None,
        bf16=major >= 8,
        host=host,
    )


def least_capable(capabilities: Sequence[Capability]) -> Capability:
    """The capability that the devices of all ranks share. `host` is the host whose device limits the precision."""
    return Capability(
        device=capabilities[0].device,
        compute=min(c.compute for c in capabilities),
        triton=all(c.triton for c in capabilities),
        liger=all(c.liger for c in capabilities),
        bf16=all(c.bf16 for c in capabilities),
        host=min(capabilities, key=lambda c: (c.bf16, c.compute)).host,
    )


def resolve(config: TrainConfig, capability: Capability) -> TrainConfig:
    """The configuration with `auto` replaced by the precision and kernels that suit the devices of all ranks.

    Raises ConfigError where a requested precision or kernel cannot work on them.
    """
    precision = resolve_precision(config.engine.precision, capability.bf16)
    try:
        config = replace(config, engine=replace(config.engine, precision=precision))
    except ConfigError as error:  # a key that requires a particular precision
        raise ConfigError(
            f"{error} (engine.precision=auto is {precision.value} on {capability.host})"
        ) from error
    return replace(config, kernels=_resolve_kernels(config, capability))


def _resolve_kernels(config: TrainConfig, capability: Capability) -> KernelsConfig:
    """The kernels with `auto` replaced. The precision in `config` must already be resolved."""
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
    if config.engine.precision is Precision.fp32:
        return "computes in bf16 or fp16 on a GPU, not in engine.precision=fp32"
    if capability.compute < 80:
        return f"needs a GPU of compute capability 8.0 or newer, and this one has {capability.compute / 10}"
    # The backward pass for wider heads needs as much shared memory as A100, H100 and B200 have.
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
