# SPDX-License-Identifier: Apache-2.0
"""Empty caches: the store of each layer, by its window and by `Decode.kv_cache`."""

from collections.abc import Iterable
from typing import Any

from t5x_lite import config
from t5x_lite.config.kv_cache import CacheFormat
from t5x_lite.model.cache import Cache, CacheStore, EncoderMemory, RingCache
from t5x_lite.model.cache_slots import AXES, empty_slots, quantize_slots
from t5x_lite.model.checkpoint_cache import CheckpointCache
from t5x_lite.model.layer_config import layer_configs
from t5x_lite.utils.not_none import not_none

WHOLE = CacheFormat()


def quantize_memory(memory: EncoderMemory, form: CacheFormat) -> EncoderMemory:
    """Returns an encoder's output, with a Cache for each layer, in another form."""

    def quantize(cache: Cache) -> Cache:
        pairs = zip(cache, form.bits, strict=True)
        return Cache(*(x if bits is None else quantize_slots(x, bits) for x, bits in pairs))

    return memory._replace(cross_kv=tuple(quantize(layer) for layer in memory.cross_kv))


def empty_cache(
    cfg: config.Model, rows: int, length: int, scan: bool = True, form: CacheFormat = WHOLE
) -> Any:
    """Returns a decoder cache of zeros.

    Args:
      cfg: architecture of the model.
      rows: number of rows.
      length: slots per row.
      scan: one store for stacked layers; False for a tuple of stores, for the weights of `unstack`.
      form: form of keys and values.
    """
    stack = not_none(cfg.decoder)

    def empty_pair(slots, layers=(), axes=AXES):
        shape = (*layers, rows, stack.key_heads, slots, stack.head_dim)
        return Cache(*(empty_slots(shape, cfg.dtype, bits, axes) for bits in form.bits))

    if scan:
        return empty_pair(length, (stack.layers,), f"layers {AXES}")
    windows = layer_windows(cfg)
    rooms = [
        length if window is None or not form.block else min(window + form.block, length)
        for window in windows
    ]
    stores = make_stores(cfg, map(empty_pair, rooms))
    recent, segment = form.recent, form.segment
    room, segments = recent + 2 * segment + form.block, -(-length // max(segment, 1))
    if not form.block or not segment or room + segments >= length:
        return stores
    if stack.merged:
        raise ValueError(
            "Decode.kv_cache=checkpoints is for attention over the text alone, and Stack.merged "
            "attends to text and inputs together: choose int8"
        )
    spare = -(-form.block // segment) + 1

    def compressed():
        ring = RingCache(*empty_pair(room), room - form.block)
        return CheckpointCache(ring, empty_pair(segments + spare + 1), recent, segment)

    pairs = zip(stores, windows, strict=True)
    return tuple(compressed() if window is None else store for store, window in pairs)


def layer_windows(cfg: config.Model) -> list[int | None]:
    """Number of tokens before itself that a query of each decoder layer attends to; None is all."""
    stack = not_none(cfg.decoder)
    windows = layer_configs(stack, both_sides=False).window_size
    return [int(windows[i, 0]) if each else None for i, each in enumerate(stack.sliding)]


def make_stores(cfg: config.Model, pairs: Iterable[Cache]) -> tuple[CacheStore, ...]:
    """Returns the store of each decoder layer, from its keys and values.

    Where the window is no smaller than the row, all of its tokens are read in place.
    """
    return tuple(
        pair if window is None or pair.slots <= window else RingCache(*pair, window)
        for pair, window in zip(pairs, layer_windows(cfg), strict=True)
    )
