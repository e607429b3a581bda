"""The peak rate of this rank's device, in FLOP/s: from the configuration, the table of GPUs, or a measurement."""

from __future__ import annotations

import time

import torch

from pretrain.config import Precision, TrainConfig
from pretrain.gpus import PeakFlops, known_peak
from pretrain.model.kernels import DTYPES, Capability
from pretrain.printing import say


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, seconds: float = 1.0, width: int = 1024
) -> float:
    """The best rate of several matrix products on this device in about `seconds`, in FLOP/s.

    `width` is the smallest side of the larger products; on a GPU it is multiplied by 8. Choose a smaller `width` where
    the precision may be emulated: a single product of the default size then takes seconds.

    Ranks that share a host must measure at the same time, because each would be faster alone than during training.
    """
    w = width * (8 if device.type == "cuda" else 1)
    shapes = [(w, w, w), (2 * w, w, w), (w // 2, 4 * w, w), (w, w, 4 * w)]
    best = 0.0
    for m, k, n in shapes:
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)  # stored transposed, as in a linear layer
        torch.nn.functional.linear(x, weight)
        end = time.perf_counter() + seconds / len(shapes)
        while (started := _synchronized(device)) < end:
            torch.nn.functional.linear(x, weight)
            best = max(best, 2.0 * m * k * n / (_synchronized(device) - started))
    return best


def _synchronized(device: torch.device) -> float:
    """Wait for all work queued on the device, and return the current time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rank_peak_flops(config: TrainConfig, device: torch.device) -> PeakFlops:
    """The configured peak of this rank's device, or the one in the table, or a measured one.

    All ranks call this together. The precision in `config` must have been chosen.
    """
    if config.logging.peak_flops_per_second is not None:
        return PeakFlops(config.logging.peak_flops_per_second, "configured peak")
    dtype = DTYPES[config.engine.precision]
    if device.type == "cuda" and dtype is not torch.float32:
        name = torch.cuda.get_device_name(device)
        peak = known_peak(name, config.engine.precision)
        if peak is not None:
            return peak
        if device.index in (None, 0):  # once per host
            say(f"warning: the peak of {name} is not known; MFU is relative to a measured matrix product")
    return PeakFlops(measure_matmul_flops(device, dtype), "measured peak")


def emulation_warning(precision: Precision, capability: Capability, device: torch.device) -> str | None:
    """A warning if matrix products in this precision are slower than in fp32, otherwise None.

    All ranks of a host call this together. It measures only precisions that the device may have to emulate, which
    takes about half a second.
    """
    in_hardware = {
        Precision.fp32: True,
        Precision.bf16: capability.bf16,
        Precision.fp16: device.type == "cuda",  # every GPU that torch still supports
    }
    if in_hardware[precision]:
        return None
    asked, plain = (
        measure_matmul_flops(device, DTYPES[p], seconds=0.2, width=256) for p in (precision, Precision.fp32)
    )
    if asked >= plain:
        return None
    return (
        f"engine.precision={precision.value} is emulated on {capability.host}: a matrix product runs at "
        f"{asked / 1e9:,.1f} GFLOP/s per rank, and at {plain / 1e9:,.1f} in fp32; engine.precision=auto takes the "
        "faster one"
    )
