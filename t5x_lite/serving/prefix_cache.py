# SPDX-License-Identifier: Apache-2.0
"""Prefix cache: keys and values of beginnings of prompts, computed once for all that share them."""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class ChunkKey(NamedTuple):
    """Key of a chunk of a prompt; equal keys are equal ids from the first one on.

    Attributes:
      owner: what else keys and values depend on, and who may read them: adapter, computation, API
        key.
      parent: number of the chunk before it; 0 for the first.
      ids: bytes of the ids of the chunk, as int32.
    """

    owner: Hashable
    parent: int
    ids: bytes


class CachedChunk(NamedTuple):
    """Keys and values of a chunk of a prompt.

    Attributes:
      key: its key.
      number: its own number, which no other chunk ever has.
      cache: its slots.
      size: bytes of them on all devices.
    """

    key: ChunkKey
    number: int
    cache: Any
    size: int


class PrefixCache:
    """Chunks of prompts by their ids, at most so many bytes; the least recently used go first.

    A chunk is reached through those before it, so that a chain is used from its first chunk on, and
    its last chunk goes first. One thread uses it.

    Attributes:
      most_bytes: most bytes of all chunks; 0 keeps none.
      used_bytes: bytes of the chunks in it.
      chunks: the chunks, the one used last at the end.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes, self.used_bytes = most_bytes, 0
        self.chunks: OrderedDict[ChunkKey, CachedChunk] = OrderedDict()
        self.numbers = itertools.count(1)

    def find(self, owner: Hashable, chunks: Sequence[np.ndarray]) -> list[CachedChunk]:
        """Returns the chunks that a prompt begins with and that are in the cache.

        Args:
          owner: as in ChunkKey.
          chunks: int32 ids of the prompt's chunks, in order.
        """
        known: list[CachedChunk] = []
        for ids in chunks:
            chunk = self.chunks.get(next_key(owner, known, ids))
            if chunk is None:
                break
            known.append(chunk)
        self.touch(known)
        return known

    def add(self, owner: Hashable, before: Sequence[CachedChunk], ids: np.ndarray, cache: Any):
        """Adds a chunk, and drops the least recently used ones beyond the most bytes.

        Args:
          owner: as in ChunkKey.
          before: the chunks before it.
          ids: its ids.
          cache: its slots.

        Returns:
          The chunk.
        """
        size = sum(each.nbytes for each in jax.tree.leaves(cache))
        chunk = CachedChunk(next_key(owner, before, ids), next(self.numbers), cache, size)
        old = self.chunks.pop(chunk.key, None)
        self.used_bytes += size - (0 if old is None else old.size)
        self.chunks[chunk.key] = chunk
        self.touch([*before, chunk])
        while self.used_bytes > self.most_bytes:
            self.used_bytes -= self.chunks.popitem(last=False)[1].size
        return chunk

    def touch(self, chain: Sequence[CachedChunk]) -> None:
        """Marks the chunks of a chain as used, the first one last."""
        for chunk in reversed(chain):
            if chunk.key in self.chunks:
                self.chunks.move_to_end(chunk.key)


def next_key(owner: Hashable, before: Sequence[CachedChunk], ids: np.ndarray) -> ChunkKey:
    """Returns the key of the chunk after others.

    Args:
      owner: as in ChunkKey.
      before: the chunks before it.
      ids: its ids.
    """
    return ChunkKey(owner, before[-1].number if before else 0, ids.tobytes())
