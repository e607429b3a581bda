"""Events as lines for people. events.jsonl keeps the same facts with all digits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pretrain.reliability.events import Event
from pretrain.reliability.json_lines import jsonable

_PREFIXES = ("", "k", "M", "G", "T", "P")


def event_line(event: Event, facts: dict[str, Any]) -> str:
    """The event and its facts on one line, with units. Facts without a value are left out.

    What has changed in a configuration is left out too, since the run prints it as a list of its own.
    """
    given = {
        key: value for key, value in facts.items() if value not in (None, [], {}) and key != "config_changed"
    }
    if event is Event.CHECKPOINT_SAVED:
        size, rate = (
            quantity("bytes", given["bytes"]),
            quantity("bytes_per_second", given["bytes_per_second"]),
        )
        return (
            f"checkpoint {given['step']}: {size} in {quantity('write_s', given['write_s'])} ({rate}), training paused "
            f"{quantity('stall_s', given['stall_s'])}"
        )
    return "  ".join(
        [event.replace("_", " "), *(f"{name(key)} {quantity(key, v)}" for key, v in given.items())]
    )


def name(key: str) -> str:
    """The name of a fact without its unit, in words."""
    for suffix in ("_per_second", "_bytes", "_frac", "_s"):
        key = key.removesuffix(suffix)
    return key.replace("_", " ")


def quantity(key: str, value: Any) -> str:
    """A value in a unit that suits its size; the unit follows from the end of its key."""
    if isinstance(value, dict):
        return ", ".join(f"{inner} {quantity(inner, item)}" for inner, item in value.items())
    if isinstance(value, list):
        return "; ".join(quantity("", item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(jsonable(value))
    if key.endswith("bytes_per_second"):
        return scaled(value, "B/s")
    if key.endswith("flops_per_second"):
        return scaled(value, "FLOP/s")
    if key.endswith("flops_per_token"):
        return scaled(value, "FLOP")
    if key.endswith("bytes"):
        return scaled(value, "B")
    if key.endswith("_frac"):
        return f"{value:.1%}"
    if key.endswith("_s"):
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def scaled(value: float, unit: str) -> str:
    """A number with a decimal prefix, such as 13.6 MB."""
    power = 0
    while abs(value) >= 999.95 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = 1 if power else 0
    return f"{value:.{digits}f} {_PREFIXES[power]}{unit}"


def duration(seconds: float) -> str:
    """A time, such as 6 ms, 2.5 s or 1:30:00."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))
