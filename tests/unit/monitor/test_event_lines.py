"""Events as people read them: units that suit the value, nothing without a value."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.monitor.event_lines import duration, event_line, scaled
from pretrain.reliability.events import Event


def test_a_saved_checkpoint_is_a_sentence() -> None:
    facts = {"step": 4, "path": "r/checkpoints/step-00000004", "stall_s": 0.005509073999746761}
    facts |= {"write_s": 0.1, "bytes": 13_584_890, "bytes_per_second": 135848905.02740782}
    assert event_line(Event.CHECKPOINT_SAVED, facts) == (
        "checkpoint 4: 13.6 MB in 100 ms (135.8 MB/s), training paused 6 ms"
    )


def test_other_events_name_their_facts_with_units() -> None:
    facts = {
        "step": 7,
        "path": None,
        "config_changed": [],
        "kernels": {"attention": "flex", "usable_bytes": 2048},
    }
    facts |= {"cost_s": 200.0, "share": 0.123456, "peak_flops_per_second": 2.5e12}
    assert event_line(Event.RESUMED, facts) == (
        "resumed  step 7  kernels attention flex, usable_bytes 2.0 kB  cost 0:03:20  share 0.1235  "
        "peak flops 2.5 TFLOP/s"
    )


@given(st.floats(0, 1e18))
def test_a_scaled_number_keeps_its_value_to_three_digits(value: float) -> None:
    number, unit = scaled(value, "B").split()
    factor = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(number) * factor == pytest.approx(
        value, rel=0.05 if factor > 1 else 1, abs=0.5 if factor == 1 else 0
    )
    assert factor == 1e15 or float(number) < 1000


@given(st.floats(0, 1e6))
def test_a_duration_is_a_number_with_a_unit_or_a_clock(seconds: float) -> None:
    assert re.fullmatch(r"\d{1,3} ms|\d{1,3}\.\d s|(\d+ days?, )?\d+:\d\d:\d\d", duration(seconds))
