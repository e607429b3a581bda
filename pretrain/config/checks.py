"""Checks shared by the configuration groups. Their errors name the key, the value, and what is allowed."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from omegaconf import MISSING

from pretrain.errors import ConfigError


def missing(config: Any) -> bool:
    """Whether a required field has no value yet. That is normal while Hydra composes the groups one by one."""
    return any(getattr(config, f.name) == MISSING for f in fields(config))


def check_positive(config: Any, prefix: str, *names: str) -> None:
    """Raise ConfigError where a field is not a finite number above 0. `prefix` is the group's name, for the key."""
    for name in names:
        value = getattr(config, name)
        if value != MISSING and not (math.isfinite(value) and value > 0):
            key = f"{prefix}.{name}" if prefix else name
            raise ConfigError(f"{key}={value} must be greater than 0")


def check_at_most(config: Any, prefix: str, limits: dict[str, int]) -> None:
    """Raise ConfigError where a field exceeds its limit.

    The limits are far above any sensible value. They keep a typo from starting an allocation or a loop of absurd size.
    """
    for name, limit in limits.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and value > limit:
            key = f"{prefix}.{name}" if prefix else name
            raise ConfigError(f"{key}={value} is more than {limit:,}")


def check_fraction(config: Any, prefix: str, name: str) -> None:
    """Raise ConfigError where a field is not between 0 and 1, both included."""
    value = getattr(config, name)
    if not 0 <= value <= 1:
        raise ConfigError(f"{prefix}.{name}={value} is outside 0 to 1")
