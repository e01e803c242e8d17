# SPDX-License-Identifier: Apache-2.0
"""Measures which block sizes make flash attention fastest on the TPU at hand."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite import config
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.kernels import api as kernels
from t5x_lite.kernels.flash import api as flash_attention
from t5x_lite.kernels.flash.block_mask import BlockSizes
from t5x_lite.kernels.tile_table import AttentionShape, MeasuredBlocks
from t5x_lite.training import flops


class Case(NamedTuple):
    """One kind of attention of a run.

    Attributes:
      name: "encoder", "decoder" or "cross".
      stack: config of the stack of layers.
      queries: queries in a row.
      keys: keys in a row.
      causal: whether the mask is causal.
      biased: whether a relative position bias is added.
    """

    name: str
    stack: config.Stack
    queries: int
    keys: int
    causal: bool
    biased: bool


def cases(run: TrainingRun) -> list[Case]:
    """The kinds of attention in a training step of a run."""
    inputs, targets = flops.row_lengths(run.model.batch_layout, run.data.lengths)
    encoder, decoder, kinds = run.model.encoder, run.model.decoder, []
    if encoder:
        length = inputs or targets
        kinds.append(Case("encoder", encoder, length, length, False, is_biased(encoder)))
    if decoder:
        kinds.append(Case("decoder", decoder, targets, targets, True, is_biased(decoder)))
    if encoder and decoder:
        kinds.append(Case("cross", decoder, targets, inputs, False, False))
    return kinds


def is_biased(stack: config.Stack) -> bool:
    """True if self-attention of a stack has a relative position bias."""
    return stack.positions == "relative"


def shape_of(case: Case, dtype: Any, chip: str) -> AttentionShape:
    """Key of a case in the table of tiles.

    Args:
      case: a kind of attention.
      dtype: dtype of queries and keys.
      chip: jax's device_kind.
    """
    head, size = case.stack.head_dim, jnp.dtype(dtype).itemsize
    return AttentionShape(chip, case.queries, case.keys, head, size, case.biased, case.causal)


def compile_step(
    case: Case, rows: int, dtype: Any, sizes: BlockSizes, backend: kernels.Backend
) -> Callable[[], None]:
    """A forward and backward pass, compiled and run once.

    Args:
      case: a kind of attention.
      rows: rows of a batch on one device.
      dtype: dtype of queries, keys and values.
      sizes: queries and keys of a block.
      backend: what runs the kernels.
    """
    stack, group = case.stack, case.stack.heads // case.stack.key_heads
    keys = jax.random.split(jax.random.key(0), 4)
    query_shape = (rows, case.queries, stack.key_heads, group, stack.head_dim)
    key_shape = (rows, stack.key_heads, case.keys, stack.head_dim)
    shapes = zip(keys, (query_shape, key_shape, key_shape), strict=False)
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in shapes]
    table = jnp.zeros((stack.buckets, stack.heads))

    def loss(q, k, v, table):
        queries, keys = (jnp.ones((rows, n), jnp.int32) for n in (case.queries, case.keys))
        mask = kernels.Mask(queries, keys, case.causal)
        relative = kernels.RelativePositionBias(table, stack.max_distance, not case.causal)
        source = flash_attention.AttentionSource(k, v, mask, relative if case.biased else None)
        output, _ = flash_attention.flash_attention(q, (source,), stack.softcap, backend, sizes)
        return jnp.sum(output.astype(jnp.float32))

    passes = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))

    def run() -> None:
        jax.block_until_ready(passes(*arrays, table))

    run()
    return run


def measure_blocks(
    case: Case, rows: int, dtype: Any, blocks: Sequence[int], repeats: int, backend: kernels.Backend
) -> dict[BlockSizes, float]:
    """Milliseconds with each pair of blocks that compiles, medians of turns.

    Args:
      case: a kind of attention.
      rows: rows of a batch on one device.
      dtype: dtype of queries, keys and values.
      blocks: lengths of a block to try, multiples of 128.
      repeats: passes of each pair.
      backend: what runs the kernels.
    """
    lengths = fitting(blocks, case.queries), fitting(blocks, case.keys)
    steps: dict[BlockSizes, Callable[[], None]] = {}
    for sizes in itertools.starmap(BlockSizes, itertools.product(*lengths)):
        try:
            steps[sizes] = compile_step(case, rows, dtype, sizes, backend)
        except jax.errors.JaxRuntimeError as error:
            print(f"  {tuple(sizes)} does not compile: {str(error)[:90]}", file=sys.stderr)
    times: dict[BlockSizes, list[float]] = {sizes: [] for sizes in steps}
    for _, (sizes, run) in itertools.product(range(repeats), steps.items()):
        began = time.perf_counter()
        run()
        times[sizes].append(1e3 * (time.perf_counter() - began))
    return {sizes: statistics.median(each) for sizes, each in times.items()}


def fitting(blocks: Sequence[int], length: int) -> list[int]:
    """Blocks that are not twice as long as a row, or the shortest one."""
    return [block for block in blocks if block < 2 * length] or [min(blocks)]


def tune_run(
    run: TrainingRun, blocks: Sequence[int], repeats: int, backend: kernels.Backend
) -> list[MeasuredBlocks]:
    """The fastest blocks for every kind of attention of a run; prints them as they are measured.

    Args:
      run: config of a run that trains.
      blocks: lengths of a block to try, multiples of 128.
      repeats: passes of each pair of blocks.
      backend: what runs the kernels.
    """
    chip, best = kernels.target_device().kind, []
    dtype = jnp.dtype(run.model.dtype)
    rows = max(1, run.train.batch_size // run.train.microbatches // jax.device_count())
    for case in cases(run):
        print(f"{case.name}: {case.queries} queries, {case.keys} keys, {rows} rows", flush=True)
        times = measure_blocks(case, rows, dtype, blocks, repeats, backend)
        for sizes, milliseconds in sorted(times.items(), key=lambda each: each[1]):
            print(f"  {sizes.query:5} x {sizes.key:5}  {milliseconds:9.3f} ms", flush=True)
        if times:
            sizes = min(times, key=lambda each: times[each])
            shape = shape_of(case, dtype, chip)
            best.append(MeasuredBlocks(shape, sizes.query, sizes.key, times[sizes]))
    return best
