"""Permutations of any size and their inverses, evaluated at single points without a table. Pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = (
    6  # 4 are enough for large sizes, but windows of five to eight sequences need more to be well shuffled
)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN  # the product wraps around in 64 bits

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]


def permute(x: Ints, size: Ints, key: Keys) -> Ints:
    """A bijection of [0, size) chosen by `key`, evaluated at `x` (1-D; element by element, 0 <= x < size)."""
    return _walk(x, size, key, backward=False)


def unpermute(y: Ints, size: Ints, key: Keys) -> Ints:
    """The inverse of `permute`."""
    return _walk(y, size, key, backward=True)


def _walk(x: Ints, size: Ints, key: Keys, backward: bool) -> Ints:
    # A balanced Feistel network permutes [0, 2^(2 half)), which is less than 4 times `size`. Where the result is not
    # in [0, size), the network is applied again until it is (cycle walking). This is a bijection of [0, size).
    bits = np.frexp((size - 1).astype(np.float64))[1]  # bit length
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    values, limit = x.astype(np.uint64), np.broadcast_to(size.astype(np.uint64), x.shape)
    half, key = np.broadcast_to(half, x.shape), np.broadcast_to(key, x.shape)
    todo = np.arange(len(values))
    while len(todo):
        shift = half[todo]
        mask = (np.uint64(1) << shift) - np.uint64(1)
        left, right = values[todo] >> shift, values[todo] & mask
        for added in _ROUND_KEYS[::-1] if backward else _ROUND_KEYS:
            round_key = key[todo] + added
            if backward:
                left, right = right ^ (_mix(left + round_key) & mask), left
            else:
                left, right = right, left ^ (_mix(right + round_key) & mask)
        values[todo] = (left << shift) | right
        todo = todo[values[todo] >= limit[todo]]
    return values.astype(np.int64)


def key_of(seed: int, *parts: int | Ints) -> Keys:
    """A 64-bit hash of the seed and the parts: 1-D arrays, or an integer that is the same for all elements."""
    key = _mix(np.array([seed % (1 << 64)], np.uint64) + _GOLDEN)
    for part in parts:
        key = _mix((key ^ np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)) + _GOLDEN)
    return key


def _mix(x: Keys) -> Keys:
    """Finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
