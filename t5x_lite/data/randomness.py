# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a function of a key and a counter, in plain 64-bit integer arithmetic.

Nothing is drawn in sequence, so any step can be computed without those before it, and the numbers
are the same on every platform and numpy version (numpy keeps its bit generators stable, but not
the shuffles made from them).
"""

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
WORD = 0xFFFFFFFFFFFFFFFF
ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., 2014): a bijection of uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int | str) -> int:
    """A 64-bit key that depends on all the words and on their order."""
    text = repr([word if isinstance(word, str) else int(word) for word in words])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keys(first: int, counters: np.ndarray) -> np.ndarray:
    """One uint64 key per counter, all under the key `first`."""
    counters = np.asarray(counters).astype(np.uint64)
    return mix(mix(counters * np.uint64(GOLDEN) + np.uint64(first)) ^ np.uint64(first))


def uniform(first: int, counters: np.ndarray, below: np.ndarray | int) -> np.ndarray:
    """Random integers, one per counter.

    Args:
      first: the key.
      counters: integers of any shape.
      below: exclusive upper bound, at most 2**32; broadcasts against the counters.

    Returns:
      int64 in [0, below), of the counters' shape.
    """
    high = keys(first, counters) >> np.uint64(32)
    return (high * np.asarray(below).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def permute(index: np.ndarray, size: np.ndarray | int, first: np.ndarray | int) -> np.ndarray:
    """Image of an index under a random permutation of range(size), element by element.

    A Feistel network on the smallest even number of bits that holds size, walked until it lands
    inside (Black and Rogaway, 2002): a bijection of range(size) in constant memory.

    Args:
      index: integers in [0, size) [n].
      size: of the range; broadcasts against index.
      first: key of the permutation; broadcasts against index.
    """
    index = np.asarray(index, np.int64)
    size = np.broadcast_to(np.asarray(size, np.uint64), index.shape)
    first = np.broadcast_to(np.asarray(first, np.uint64), index.shape)
    # Exact for sizes below 2**53: the exponent of a float is the number of bits of its integer.
    bits = np.frexp((np.maximum(size, 2) - 1).astype(np.float64))[1]
    half = ((bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        result[todo] = feistel(result[todo], half[todo], mask[todo], first[todo])
        todo = todo[result[todo] >= size[todo]]
    return result.astype(np.int64)


def feistel(x: np.ndarray, half: np.ndarray, mask: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Keyed bijection of integers of 2 * half bits.

    Args:
      x: uint64 [n].
      half: bits of a half [n].
      mask: 2**half - 1 [n].
      first: key [n].
    """
    left, right = x >> half, x & mask
    for turn in range(ROUNDS):
        salted = right + first + np.uint64(turn * GOLDEN & WORD)
        left, right = right, left ^ (mix(salted) & mask)
    return left << half | right
