"""The accelerators that `pretrain.plan.planner` knows, with figures from their makers. Imports no torch.

Every figure comes from a data sheet or is marked as assumed. Prices are the list prices of one vendor on one day; set
your own with `cluster.usd_per_gpu_hour`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import ConfigError
from pretrain.gpus import PEAK_OF

GB = 1e9
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of accelerator and the system that it is usually part of."""

    name: str
    """Its name in `cluster.gpu`."""
    label: str
    """Its name in `pretrain.gpus`, which lists its peak FLOP/s in 16-bit precisions."""
    fp32_flops: float
    """Peak in FLOP/s of fp32 products without tensor cores, which is what torch uses by default."""
    memory_bytes: float
    """Device memory in decimal bytes, as sold."""
    hbm_bytes_per_s: float
    """Bandwidth of the device memory, in bytes per second."""
    link_bytes_per_s: float
    """Bytes per second in one direction to the node's other devices: half of the sheet's NVLink figure, or PCIe."""
    pcie_bytes_per_s: float
    """Bytes per second to the host, in one direction."""
    nic_bits_per_s: float
    """Network rate per device in the maker's own system, in bits per second and in one direction."""
    host_bytes: float
    """Host memory per device in the maker's own system, in bytes."""
    usd_per_hour: float | None
    """On-demand list price in USD per device and hour, in a node of 8; None if no price was found."""
    calibrated_as: str
    """The device whose fitted constants are used: `a100` or `h100`, the only two with published runs."""

    @property
    def fp16_flops(self) -> float:
        """The dense peak in FLOP/s with fp16 inputs and fp32 accumulation."""
        return PEAK_OF[self.label].flops

    @property
    def bf16_flops(self) -> float | None:
        """The same with bf16 inputs; None if the device has no bf16."""
        return self.fp16_flops if PEAK_OF[self.label].has_bf16 else None


# These sheets were compared with a second source: H200 and B200 (memory, NVLink, PCIe, network; system descriptions in
#   https://github.com/mlcommons/inference_results_v4.1 and _v6.0), L40S (a reseller's copy), H100 (bandwidth, NVLink).
#   V100, A100, RTX 4090, PCIe rates and DGX networks have only the named sheet as source; check before a purchase.
# Host memory: DGX-1 512 GB (2017), DGX A100 1 TB and 2 TB (2020, 2021), DGX H100, H200 and B200 2 TB, each for 8 GPUs;
#   L40S and RTX 4090: assumed.
# V100: "NVIDIA V100 Tensor Core GPU" data sheet (2020): 125 TFLOP/s tensor (fp16 only), 15.7 fp32, 32 GB, 900 GB/s,
#   NVLink 300 GB/s both ways; PCIe 3.0 x16: 15.75 GB/s. Network: DGX-1 data sheet (2017): 4 x 100 Gb/s for 8 GPUs.
# A100: "NVIDIA A100 Tensor Core GPU" data sheet (2021): 312 TFLOP/s dense bf16, 19.5 fp32, 40 GB at 1,555 GB/s and
#   80 GB at 2,039 GB/s, NVLink 600 GB/s both ways; PCIe 4.0 x16: 31.5 GB/s. DGX A100 (2020): 8 x 200 Gb/s.
# H100 SXM: "NVIDIA H100 Tensor Core GPU" data sheet (2023): 1,979 TFLOP/s sparse bf16, half dense; 67 fp32, 80 GB,
#   3.35 TB/s, NVLink 900 GB/s both ways; PCIe 5.0 x16: 63 GB/s. DGX H100 (2023): 8 x 400 Gb/s.
# H200 SXM: "NVIDIA H200 Tensor Core GPU" data sheet (2024): as H100, 141 GB, 4.8 TB/s. DGX H200: 8 x 400 Gb/s.
# B200: "NVIDIA DGX B200" data sheet (2024): for 8 GPUs 36 PFLOP/s sparse bf16, 1,440 GB, 64 TB/s, NVLink 14.4 TB/s
#   both ways; 8 x 400 Gb/s. fp32: assumed 75 TFLOP/s, without a sheet. A driver reported 7.67 TB/s:
#   https://github.com/pytorch/ao/pull/4002
# L40S: "NVIDIA L40S" data sheet (2023): 362.05 TFLOP/s dense bf16, 91.6 fp32, 48 GB, 864 GB/s, PCIe 4.0 x16, no
#   NVLink. Network: assumed, 100 Gb/s.
# RTX 4090: "NVIDIA Ada GPU architecture" white paper (2022): 165.2 TFLOP/s bf16 with fp32 accumulation, 82.6 fp32,
#   24 GB, 1,008 GB/s, PCIe 4.0 x16, no NVLink. Network: assumed, 25 Gb/s.
# Prices: lambda.ai/instances, 8 GPUs on demand, as read on 2026-09-20 by
#   https://github.com/api-evangelist/lambda-labs (plans/lambda-labs-plans-pricing.yml): B200 6.69, H100 SXM 3.99,
#   A100 80 GB 2.79, A100 40 GB 1.99. Elsewhere an H100 cost 2.69 (RunPod), 6.88 (AWS) and 12.29 USD (Azure):
#   https://github.com/datareceipts/data-receipts (109-gpu-pricing, 2026-11-09).
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in [
        Gpu(
            name="v100",
            label="V100 SXM2",
            fp32_flops=15.7e12,
            memory_bytes=32 * GB,
            hbm_bytes_per_s=900 * GB,
            link_bytes_per_s=150 * GB,
            pcie_bytes_per_s=15.75 * GB,
            nic_bits_per_s=50e9,
            host_bytes=64 * GB,
            usd_per_hour=None,
            calibrated_as="a100",
        ),
        Gpu(
            name="a100_40",
            label="A100",
            fp32_flops=19.5e12,
            memory_bytes=40 * GB,
            hbm_bytes_per_s=1555 * GB,
            link_bytes_per_s=300 * GB,
            pcie_bytes_per_s=31.5 * GB,
            nic_bits_per_s=200e9,
            host_bytes=128 * GB,
            usd_per_hour=1.99,
            calibrated_as="a100",
        ),
        Gpu(
            name="a100",
            label="A100",
            fp32_flops=19.5e12,
            memory_bytes=80 * GB,
            hbm_bytes_per_s=2039 * GB,
            link_bytes_per_s=300 * GB,
            pcie_bytes_per_s=31.5 * GB,
            nic_bits_per_s=200e9,
            host_bytes=256 * GB,
            usd_per_hour=2.79,
            calibrated_as="a100",
        ),
        Gpu(
            name="h100",
            label="H100 SXM",
            fp32_flops=67e12,
            memory_bytes=80 * GB,
            hbm_bytes_per_s=3350 * GB,
            link_bytes_per_s=450 * GB,
            pcie_bytes_per_s=63 * GB,
            nic_bits_per_s=400e9,
            host_bytes=256 * GB,
            usd_per_hour=3.99,
            calibrated_as="h100",
        ),
        Gpu(
            name="h200",
            label="H200 SXM",
            fp32_flops=67e12,
            memory_bytes=141 * GB,
            hbm_bytes_per_s=4800 * GB,
            link_bytes_per_s=450 * GB,
            pcie_bytes_per_s=63 * GB,
            nic_bits_per_s=400e9,
            host_bytes=256 * GB,
            usd_per_hour=None,
            calibrated_as="h100",
        ),
        Gpu(
            name="b200",
            label="B200",
            fp32_flops=75e12,
            memory_bytes=180 * GB,
            hbm_bytes_per_s=8000 * GB,
            link_bytes_per_s=900 * GB,
            pcie_bytes_per_s=63 * GB,
            nic_bits_per_s=400e9,
            host_bytes=256 * GB,
            usd_per_hour=6.69,
            calibrated_as="h100",
        ),
        Gpu(
            name="l40s",
            label="L40S",
            fp32_flops=91.6e12,
            memory_bytes=48 * GB,
            hbm_bytes_per_s=864 * GB,
            link_bytes_per_s=31.5 * GB,
            pcie_bytes_per_s=31.5 * GB,
            nic_bits_per_s=100e9,
            host_bytes=128 * GB,
            usd_per_hour=None,
            calibrated_as="a100",
        ),
        Gpu(
            name="rtx4090",
            label="RTX 4090",
            fp32_flops=82.6e12,
            memory_bytes=24 * GB,
            hbm_bytes_per_s=1008 * GB,
            link_bytes_per_s=31.5 * GB,
            pcie_bytes_per_s=31.5 * GB,
            nic_bits_per_s=25e9,
            host_bytes=64 * GB,
            usd_per_hour=None,
            calibrated_as="a100",
        ),
    ]
}


def known_gpu(name: str) -> Gpu:
    """The device with this name. Raises ConfigError if the table has none."""
    if name not in GPUS:
        raise ConfigError(f"cluster.gpu={name} is not in the table; allowed: {', '.join(GPUS)}")
    return GPUS[name]
