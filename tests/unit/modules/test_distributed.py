"""Random state as a function of (seed, step, rank), and what ranks agree on; several ranks: test_training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.tensors import ALONE
from pretrain.distributed import gather_objects, on_main, seed_step, sum_over_ranks
from pretrain.errors import ConfigError

keys = st.tuples(st.integers(0, 2**31), st.integers(1, 10**7), st.integers(0, 4095))


def draw(key: tuple[int, int, int]) -> list[float]:
    seed_step(*key)
    return torch.rand(4).tolist()


@given(keys, keys)
def test_random_state_is_a_function_of_seed_step_and_rank(one: tuple, other: tuple) -> None:
    torch.rand(3)  # whatever was drawn before does not matter
    assert draw(one) == draw(one)
    assert (draw(one) == draw(other)) == (one == other)


@given(keys)
def test_neighbors_differ(key: tuple[int, int, int]) -> None:
    seed, step, rank = key
    neighbors = [(seed + 1, step, rank), (seed, step + 1, rank), (seed, step, rank + 1)]
    assert draw(key) not in [draw(neighbor) for neighbor in neighbors]


def test_a_world_of_one() -> None:
    assert sum_over_ranks([1.5, -2.0], ALONE) == [1.5, -2.0]
    assert gather_objects("mine", ALONE) == ["mine"]
    assert on_main(lambda: 7, ALONE) == 7

    def refuse() -> None:
        raise ConfigError("a sentence")

    with pytest.raises(ConfigError, match="a sentence"):
        on_main(refuse, ALONE)
