"""Permutations of any size that are computed where they are asked for, not stored.

A Feistel network on 2 h bits is a permutation of 0 .. 4^h - 1 whatever its round function is. To
permute 0 .. n - 1 the smallest such network is walked: what it maps outside is mapped again until
it falls inside, which keeps it a permutation and takes under four turns on average.

Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking); Steele et
al. 2014, "Fast Splittable Pseudorandom Number Generators" (the mixing function).
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(words: Words) -> Words:
    # every bit of the result depends on all bits of the word
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keys_of(*parts: int | Ints) -> Words:
    """Mix whole numbers, or arrays (m,) of them, into keys of permutations, (m,)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mixed((key ^ np.atleast_1d(part).astype(np.uint64)) + _GOLDEN)
    return key


def permuted(positions: Ints, sizes: Ints, keys: Words) -> Ints:
    """Return what stands at `positions` (m,) of permutations of 0 .. size - 1, (m,).

    `sizes` (m,) and `keys` (m,) belong to the positions: equal ones mean the same permutation.
    """
    # exponent of the number: how many bits it takes; each half has half of them
    half = ((np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = positions.astype(np.uint64)
    todo = np.arange(len(positions))
    while len(todo):
        found = _network(result[todo], half[todo], mask[todo], keys[todo])
        result[todo] = found
        todo = todo[found >= sizes[todo].astype(np.uint64)]
    return result.astype(np.int64)


def _network(words: Words, half: Words, mask: Words, keys: Words) -> Words:
    left, right = words >> half, words & mask
    for turn in range(_ROUNDS):
        change = _mixed(keys + (right << np.uint64(8)) + np.uint64(turn)) & mask
        left, right = right, left ^ change
    return (left << half) | right
