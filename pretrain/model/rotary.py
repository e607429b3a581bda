"""Rotary positions (Su et al., 2021), and the scalings with which models are extended to longer contexts.

The scalings are computed as `transformers` does (modeling_rope_utils.py), operation by operation in fp32, so that a
model is the same there and here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.config import ModelConfig, RopeScalingConfig, RopeType


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, K] in fp32 of the positions [B, T]."""
    frequencies, factor = rotary_frequencies(config, positions.device)
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, K/2]
    angles = torch.cat((angles, angles), dim=-1)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [B, heads, T, K]. Dimension i pairs with i + K/2, as in Hugging Face's Llama."""
    first, second = x.float().chunk(2, dim=-1)  # fp32: in bf16 the products would lose the angle's precision
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device | str) -> tuple[Tensor, float]:
    """The angle per position of each pair of dimensions [K/2], and the factor of cosines and sines."""
    scaling = config.rope_scaling
    even = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32)
    wavelengths = config.rope_theta ** (even / config.head_width)  # in radians
    match scaling.rope_type:
        case RopeType.default:
            return 1.0 / wavelengths, 1.0
        case RopeType.linear:
            return 1.0 / wavelengths / scaling.factor, 1.0
        case RopeType.llama3:
            return _llama3(1.0 / wavelengths, scaling), 1.0
        case RopeType.yarn:
            factor = scaling.attention_factor
            return _yarn(wavelengths, config), factor if factor is not None else yarn_factor(scaling.factor)


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """The factor of cosines and sines that YaRN derives from the factor of the context's length."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, and those between them interpolated."""
    length = scaling.original_max_position_embeddings
    assert length is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / scaling.factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelengths < length / high) & ~(wavelengths > length / low)
    return torch.where(is_between, between, scaled)


def _yarn(wavelengths: Tensor, config: ModelConfig) -> Tensor:
    """YaRN (Peng et al., 2023): dimensions that turn seldom are interpolated, and those that turn often are kept."""
    scaling, width = config.rope_scaling, config.head_width
    length = scaling.original_max_position_embeddings
    assert length is not None

    def dimension(turns: float) -> float:
        """The dimension that turns this number of times over the original length."""
        return (width * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    order = torch.arange(width // 2, dtype=torch.float32, device=wavelengths.device)
    kept = 1 - torch.clamp((order - first) / (last - first), 0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
