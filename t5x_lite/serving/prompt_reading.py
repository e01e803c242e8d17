# SPDX-License-Identifier: Apache-2.0
"""Reading of a long prompt, a chunk at a time between the blocks of rows that write."""

from typing import Any

import jax
import numpy as np

from t5x_lite import sharding
from t5x_lite.decoding import chunked_prefill
from t5x_lite.serving.lane import Lane
from t5x_lite.serving.prefix_cache import CachedChunk, PrefixCache
from t5x_lite.serving.row_text import RowText


class PromptReading:
    """A prompt that is being read into a cache of its own.

    The program that reads a chunk, and so each bit of its keys and values, depends on its place in
    the prompt alone: a chunk of the prefix cache is what would be computed.

    Attributes:
      lane: where its text has a row.
      text: the text.
      chunks: int32 ids of its chunks, the last one padded with 0.
      read: those that are in the cache of the prompt already, as far as they are whole.
      done: number of chunks that have been read.
      cache: cache of the prompt so far; None before the first chunk.
    """

    def __init__(self, lane: Lane, text: RowText, prefixes: PrefixCache):
        """Begins with the chunks that the prefix cache has.

        Args:
          lane: where the text has a row.
          text: the text.
          prefixes: the prefix cache.
        """
        self.lane, self.text, self.prefixes = lane, text, prefixes
        self.size = lane.limits.prefill_tokens
        ids = text.prompt_ids()
        self.whole = len(ids) // self.size
        padded = np.pad(ids, (0, -len(ids) % self.size)).astype(np.int32)
        self.chunks = np.split(padded, len(padded) // self.size)
        request, decode = text.completion.request, text.key.decode
        self.owner = request.adapter, decode.compute, decode.kv_cache, request.client
        self.cache: chunked_prefill.WholeRows | None = None
        self.read: list[CachedChunk] = prefixes.find(self.owner, self.chunks[: self.whole])
        self.done = len(self.read)
        for number, chunk in enumerate(self.read):
            self.cache = chunked_prefill.put_chunk(
                self.cache or self.empty_cache(self.done - 1), chunk.cache, self.index(number)
            )

    @property
    def cached_tokens(self) -> int:
        """Number of ids that were in the prefix cache, right after the beginning."""
        return len(self.read) * self.size

    @property
    def is_done(self) -> bool:
        """True when the whole prompt is in the cache."""
        return self.done == len(self.chunks)

    def slots(self, number: int) -> int:
        """Slots of the cache in which a chunk is read: a power of two of chunks."""
        return self.size << number.bit_length()

    def empty_cache(self, number: int) -> chunked_prefill.WholeRows:
        """Returns an empty cache for the chunks up to a number."""
        program = self.lane.program.program
        return chunked_prefill.start_cache(program.cfg, self.slots(number), program.kv_cache)

    def index(self, number: int) -> Any:
        """The first slot of a chunk, for each row of the cache."""
        return np.full(sharding.batch_shards(), number * self.size, np.int32)

    def read_next(self) -> int:
        """Reads a chunk, and returns its number of ids."""
        number, slots = self.done, self.slots(self.done)
        params = self.lane.select_adapters([self.text] * sharding.batch_shards())
        if self.cache is None:
            self.cache = self.empty_cache(number)
        elif self.cache[0].slots < slots:
            self.cache = chunked_prefill.widen_cache(self.cache, slots)
        # One chunk at a time: a cancelled prompt is not read to its end.
        jax.block_until_ready(self.cache)
        index = self.index(number)
        tokens: Any = np.tile(self.chunks[number], (len(index), 1))
        self.cache, chunk = chunked_prefill.read_chunk(
            self.lane.program.program.cfg, params, self.cache, tokens, index
        )
        self.done += 1
        if self.prefixes.most_bytes and number < self.whole:
            ids = self.chunks[number]
            self.read.append(self.prefixes.add(self.owner, self.read, ids, chunk))
        return self.size

    def finish(self) -> None:
        """Writes the text's row of the pool."""
        assert self.cache is not None
        slots = self.slots(-(-self.lane.program.prompts // self.size) - 1)
        if self.cache[0].slots < slots:  # one program joins prompts of all widths
            self.cache = chunked_prefill.widen_cache(self.cache, slots)
        self.lane.join([self.text], self.cache)
