"""Whether a CPU computes bf16 in hardware, and the precision that a run uses as a result. Imports no torch.

A CPU without bf16 instructions emulates a bf16 matrix product, which is many times slower than one in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pretrain.checkpoint.state import RunState
from pretrain.config import Precision
from pretrain.errors import ConfigError

_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags in /proc/cpuinfo for bf16: those of Intel and AMD since 2020, Intel since Sapphire Rapids, and Arm since
Neoverse V1, in this order."""
_ISAS_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of the environment variable ONEDNN_MAX_CPU_ISA that keep oneDNN from using bf16 instructions."""


def resolve_precision(asked: Precision, has_bf16: bool) -> Precision:
    """The precision to compute in: `asked`, with auto resolved. `has_bf16`: whether all devices have bf16 hardware."""
    if asked is not Precision.auto:
        return asked
    return Precision.bf16 if has_bf16 else Precision.fp32


def precision_of(state: RunState) -> Precision:
    """The precision of the run that wrote a state.json. Raises ConfigError where the file does not state it."""
    # State files older than `engine.precision=auto` have the precision only in their configuration.
    try:
        return Precision(state.get("precision") or state["config"]["engine"]["precision"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("state.json does not say in which precision the run computed") from error


def host_cpu_has_bf16() -> bool:
    """Whether this host's CPU computes bf16 in hardware, and oneDNN is allowed to use it."""
    return cpu_has_bf16(Path("/proc/cpuinfo").read_text(encoding="utf-8"), os.environ)


def cpu_has_bf16(cpuinfo: str, environment: Mapping[str, str]) -> bool:
    """`host_cpu_has_bf16` for a given /proc/cpuinfo and given environment variables."""
    isa = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", ""))
    if isa.upper() in _ISAS_WITHOUT_BF16:
        return False
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((words for name, _, words in lines if name.strip() in ("flags", "Features")), "")
    return not _CPU_FLAGS.isdisjoint(flags.split())
