"""What a device can do at most: the denominator of MFU, from makers' data sheets or measured."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

from pretrain.config import Precision, TrainConfig
from pretrain.journal import say
from pretrain.kernels import DTYPES, Capability


class PeakFlops(NamedTuple):
    """The denominator of MFU: what one rank's device can do at most."""

    per_second: float
    source: str
    """Where the figure is from, shown beside every MFU: `configured peak`, `H100 SXM peak`, `measured peak`."""


# Dense peaks of one device in FLOP/s with 16-bit inputs and fp32 accumulation, from the makers' data sheets and
# white papers; where a sheet gives the figure with sparsity, half of it. The name must match as a whole: variants
# (laptop, D, MIG slices) differ, and a wrong peak is worse than none.
_PEAKS_16_BIT: list[tuple[str, str, float]] = [
    (r"A100-SXM4-\d+GB|A100-PCIE-\d+GB|A100 80GB PCIe", "A100", 312e12),  # A100 data sheet
    (r"A800-SXM4-\d+GB|A800 80GB PCIe", "A800", 312e12),  # the A100's cores, slower NVLink
    (r"H100 80GB HBM3|H100 96GB HBM3", "H100 SXM", 989e12),  # H100 data sheet: 1,979 sparse
    (r"H100 PCIe", "H100 PCIe", 756e12),  # H100 data sheet: 1,513 sparse
    (r"H100 NVL", "H100 NVL", 835e12),  # H100 NVL data sheet: 1,671 sparse
    (r"H800", "H800 SXM", 989e12),  # the H100's cores, slower NVLink
    (r"H800 PCIe", "H800 PCIe", 756e12),
    (r"H200", "H200 SXM", 989e12),  # H200 data sheet: 1,979 sparse
    (r"H200 NVL", "H200 NVL", 835e12),  # H200 data sheet: 1,671 sparse
    (r"H20", "H20", 148e12),
    (r"GH200 \d+GB?.*", "GH200", 989e12),  # GH200 data sheet: 1,979 sparse
    (r"B200", "B200", 2250e12),  # DGX B200 data sheet: 36 PFLOP/s sparse for 8
    (r"L40S", "L40S", 362e12),  # L40S data sheet: 362.05 dense, 733 sparse
    (r"L40", "L40", 181e12),  # L40 data sheet
    (r"L4", "L4", 121e12),  # L4 data sheet: 242 sparse
    (r"A40", "A40", 149.7e12),  # A40 data sheet
    (r"A30", "A30", 165e12),  # A30 data sheet
    (r"A10", "A10", 125e12),  # A10 data sheet
    (r"GeForce RTX 4090", "RTX 4090", 165.2e12),  # Ada white paper, fp32 accumulation
    (r"GeForce RTX 3090", "RTX 3090", 71e12),  # GA102 white paper, fp32 accumulation
]
_PEAKS_FP16_ONLY: list[tuple[str, str, float]] = [
    (r"V100-SXM2-\d+GB(-LS)?", "V100 SXM2", 125e12),  # V100 data sheet; no bf16
    (r"V100-PCIE-\d+GB", "V100 PCIe", 112e12),
    (r"T4", "T4", 65e12),  # T4 data sheet; no bf16
]


def known_peak(name: str, dtype: torch.dtype) -> PeakFlops | None:
    """The peak of a GPU by the name that CUDA reports; None where the table does not have exactly this one."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    table: list[tuple[str, str, float]] = []
    if dtype in (torch.bfloat16, torch.float16):
        table += _PEAKS_16_BIT
    if dtype is torch.float16:
        table += _PEAKS_FP16_ONLY
    for pattern, label, per_second in table:
        if re.fullmatch(pattern, name):
            return PeakFlops(per_second, f"{label} peak")
    return None


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, seconds: float = 1.0, width: int = 1024
) -> float:
    """The best rate of several matrix products on this device in about `seconds`, in FLOP/s.

    `width` is the size of the smallest side of the larger products, times 8 on a GPU. A single product of the default
    size takes seconds where its precision is emulated.

    Ranks that share a host must measure at the same time: what one of them gets alone is not what it gets in training.
    """
    w = width * (8 if device.type == "cuda" else 1)
    shapes = [(w, w, w), (2 * w, w, w), (w // 2, 4 * w, w), (w, w, 4 * w)]
    best = 0.0
    for m, k, n in shapes:
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)  # as a linear layer holds it
        torch.nn.functional.linear(x, weight)
        end = time.perf_counter() + seconds / len(shapes)
        while (started := _synchronized(device)) < end:
            torch.nn.functional.linear(x, weight)
            best = max(best, 2.0 * m * k * n / (_synchronized(device) - started))
    return best


def _synchronized(device: torch.device) -> float:
    """The time when everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rank_peak_flops(config: TrainConfig, device: torch.device) -> PeakFlops:
    """The peak of this rank's device: configured, from the table, else measured. All ranks call it together.

    `config` has its precision chosen.
    """
    if config.logging.peak_flops_per_second is not None:
        return PeakFlops(config.logging.peak_flops_per_second, "configured peak")
    dtype = DTYPES[config.engine.precision]
    if device.type == "cuda" and dtype is not torch.float32:
        name = torch.cuda.get_device_name(device)
        peak = known_peak(name, dtype)
        if peak is not None:
            return peak
        if device.index in (None, 0):  # once per host
            say(f"warning: the peak of {name} is not known; MFU is relative to a measured matrix product")
    return PeakFlops(measure_matmul_flops(device, dtype), "measured peak")


def emulation_warning(precision: Precision, capability: Capability, device: torch.device) -> str | None:
    """A sentence where matrix products in this precision are slower than in fp32; ranks of a host call it together.

    Only precisions that the device may have to emulate are measured, which takes about half a second.
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
