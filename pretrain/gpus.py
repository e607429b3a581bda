"""Peak FLOP/s of GPUs from NVIDIA's data sheets, for MFU and for planning. Imports no torch."""

from __future__ import annotations

import re
from typing import NamedTuple

from pretrain.config import Precision


class PeakFlops(NamedTuple):
    """Peak FLOP/s of one rank's device: the denominator of MFU."""

    per_second: float
    source: str
    """Where the figure comes from, shown beside every MFU: `configured peak`, `H100 SXM peak` or `measured peak`."""


class GpuPeak(NamedTuple):
    """The peak FLOP/s of one GPU model, and how to recognize that model."""

    label: str
    pattern: str
    """Regular expression for the whole name that CUDA reports, without "NVIDIA" or "Tesla". It must match the whole
    name because variants (laptop, D, MIG slices) have different peaks, and a wrong peak is worse than none."""
    flops: float
    """Dense peak in FLOP/s with 16-bit inputs and fp32 accumulation."""
    has_bf16: bool = True
    """Whether the peak holds for bf16 as well as fp16."""


# The figures are from data sheets and white papers. Where a sheet gives the figure with sparsity, half of it is used.
PEAKS = [
    GpuPeak("A100", r"A100-SXM4-\d+GB|A100-PCIE-\d+GB|A100 80GB PCIe", 312e12),  # A100 data sheet
    GpuPeak("A800", r"A800-SXM4-\d+GB|A800 80GB PCIe", 312e12),  # the A100's cores, slower NVLink
    GpuPeak("H100 SXM", r"H100 80GB HBM3|H100 96GB HBM3", 989e12),  # H100 data sheet: 1,979 sparse
    GpuPeak("H100 PCIe", r"H100 PCIe", 756e12),  # H100 data sheet: 1,513 sparse
    GpuPeak("H100 NVL", r"H100 NVL", 835e12),  # H100 NVL data sheet: 1,671 sparse
    GpuPeak("H800 SXM", r"H800", 989e12),  # the H100's cores, slower NVLink
    GpuPeak("H800 PCIe", r"H800 PCIe", 756e12),
    GpuPeak("H200 SXM", r"H200", 989e12),  # H200 data sheet: 1,979 sparse
    GpuPeak("H200 NVL", r"H200 NVL", 835e12),  # H200 data sheet: 1,671 sparse
    GpuPeak("H20", r"H20", 148e12),
    GpuPeak("GH200", r"GH200 \d+GB?.*", 989e12),  # GH200 data sheet: 1,979 sparse
    GpuPeak("B200", r"B200", 2250e12),  # DGX B200 data sheet: 36 PFLOP/s sparse for 8
    GpuPeak("L40S", r"L40S", 362e12),  # L40S data sheet: 362.05 dense, 733 sparse
    GpuPeak("L40", r"L40", 181e12),  # L40 data sheet
    GpuPeak("L4", r"L4", 121e12),  # L4 data sheet: 242 sparse
    GpuPeak("A40", r"A40", 149.7e12),  # A40 data sheet
    GpuPeak("A30", r"A30", 165e12),  # A30 data sheet
    GpuPeak("A10", r"A10", 125e12),  # A10 data sheet
    GpuPeak("RTX 4090", r"GeForce RTX 4090", 165.2e12),  # Ada white paper, fp32 accumulation
    GpuPeak("RTX 3090", r"GeForce RTX 3090", 71e12),  # GA102 white paper, fp32 accumulation
    GpuPeak("V100 SXM2", r"V100-SXM2-\d+GB(-LS)?", 125e12, has_bf16=False),  # V100 data sheet; no bf16
    GpuPeak("V100 PCIe", r"V100-PCIE-\d+GB", 112e12, has_bf16=False),
    GpuPeak("T4", r"T4", 65e12, has_bf16=False),  # T4 data sheet; no bf16
]
PEAK_OF = {peak.label: peak for peak in PEAKS}
MAX_WATTS = {
    "A100": 400,
    "A800": 400,
    "H100 SXM": 700,
    "H100 PCIe": 350,
    "H100 NVL": 400,
    "H800 SXM": 700,
    "H800 PCIe": 350,
    "H200 SXM": 700,
    "H200 NVL": 600,
    "H20": 400,
    "GH200": 1000,
    "B200": 1000,
    "L40S": 350,
    "L40": 300,
    "L4": 72,
    "A40": 300,
    "A30": 165,
    "A10": 150,
    "RTX 4090": 450,
    "RTX 3090": 350,
    "V100 SXM2": 300,
    "V100 PCIe": 250,
    "T4": 70,
}
"""The largest power in watts of each model in the same data sheets; of variants with one label, the largest."""


def known_peak(name: str, precision: Precision) -> PeakFlops | None:
    """The peak of a GPU by the name that CUDA reports; None where the table does not have exactly this GPU."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    for peak in PEAKS:
        if re.fullmatch(peak.pattern, name):
            known = precision is Precision.fp16 or (precision is Precision.bf16 and peak.has_bf16)
            return PeakFlops(peak.flops, f"{peak.label} peak") if known else None
    return None
