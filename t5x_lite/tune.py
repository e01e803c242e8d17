# SPDX-License-Identifier: Apache-2.0
"""Measures which blocks make flash attention fastest on the TPU at hand, and remembers them.

  python -m t5x_lite.tune --gin_file=configs/runs/pretrain.gin
  python -m t5x_lite.tune --gin_file=... --blocks 256 512 1024 --repeats 20

For every kind of attention that the run has (the encoder's, the decoder's, the one across) a
forward and backward pass with each pair of blocks, in turns, medians. The best go to
~/.cache/t5x_lite/tiles.json (or where T5X_LITE_TILES points), which every later run on such a chip
reads. Without it, blocks are as large as the chip's fast memory lets them be.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite import config, config_file, gin_arguments, kernels
from t5x_lite.kernels import flash_attention, tile_table
from t5x_lite.kernels.tile_table import Measured, Shape
from t5x_lite.kernels.visits import Sizes
from t5x_lite.training import costs


class Case(NamedTuple):
    """One kind of attention of a run: its name, tower, lengths of a row, and mask."""

    name: str
    stack: config.Stack
    queries: int
    keys: int
    causal: bool
    biased: bool


def cases(run: config.Run) -> list[Case]:
    """The kinds of attention in a step of run."""
    inputs, targets = costs.row_lengths(run.model.layout, run.data.lengths)
    encoder, decoder, found = run.model.encoder, run.model.decoder, []
    biased = lambda stack: stack.positions == "relative"
    if encoder:
        length = inputs or targets
        found.append(Case("encoder", encoder, length, length, False, biased(encoder)))
    if decoder:
        found.append(Case("decoder", decoder, targets, targets, True, biased(decoder)))
    if encoder and decoder:
        found.append(Case("across", decoder, targets, inputs, False, False))
    return found


def shape_of(case: Case, dtype, chip: str) -> Shape:
    head, size = case.stack.head_dim, jnp.dtype(dtype).itemsize
    return Shape(chip, case.queries, case.keys, head, size, case.biased, case.causal)


def step(case: Case, rows: int, dtype, sizes: Sizes, how: kernels.How) -> Callable[[], None]:
    """A forward and backward pass with blocks of these sizes, compiled and run once."""
    stack, group = case.stack, case.stack.heads // case.stack.key_heads
    keys = jax.random.split(jax.random.key(0), 4)
    own = (rows, case.queries, stack.key_heads, group, stack.head_dim)
    other = (rows, stack.key_heads, case.keys, stack.head_dim)
    draw = lambda key, shape: jax.random.normal(key, shape, dtype)
    arrays = draw(keys[0], own), draw(keys[1], other), draw(keys[2], other)
    table = jnp.zeros((stack.buckets, stack.heads))

    def loss(q, k, v, table):
        ones = lambda length: jnp.ones((rows, length), jnp.int32)
        sight = kernels.Sight(ones(case.queries), ones(case.keys), case.causal)
        relative = kernels.Relative(table, stack.max_distance, not case.causal)
        source = flash_attention.Source(k, v, sight, relative if case.biased else None)
        found = flash_attention.flash_attention(q, (source,), stack.softcap, how, sizes)
        return jnp.sum(found.astype(jnp.float32))

    passes = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    run = lambda: jax.block_until_ready(passes(*arrays, table))
    run()
    return run


def measure(
    case: Case, rows: int, dtype, blocks: Sequence[int], repeats: int, how: kernels.How
) -> dict[Sizes, float]:
    """Milliseconds with each pair of blocks that compiles, medians of turns."""
    fits = lambda length: [block for block in blocks if block < 2 * length] or [min(blocks)]
    steps: dict[Sizes, Callable[[], None]] = {}
    for sizes in itertools.starmap(Sizes, itertools.product(fits(case.queries), fits(case.keys))):
        try:
            steps[sizes] = step(case, rows, dtype, sizes, how)
        except jax.errors.JaxRuntimeError as error:
            print(f"  {tuple(sizes)} does not compile: {str(error)[:90]}", file=sys.stderr)
    times: dict[Sizes, list[float]] = {sizes: [] for sizes in steps}
    for _, (sizes, run) in itertools.product(range(repeats), steps.items()):
        began = time.perf_counter()
        run()
        times[sizes].append(1e3 * (time.perf_counter() - began))
    return {sizes: statistics.median(own) for sizes, own in times.items()}


def tuned(run: config.Run, blocks: Sequence[int], repeats: int, how: kernels.How) -> list[Measured]:
    """The best blocks of every kind of attention of run, told as they are found."""
    chip, best = kernels.device()[1], []
    dtype = jnp.dtype(run.model.activations)
    rows = max(1, run.train.batch_size // run.train.microbatches // jax.device_count())
    for case in cases(run):
        print(f"{case.name}: {case.queries} queries, {case.keys} keys, {rows} rows", flush=True)
        times = measure(case, rows, dtype, blocks, repeats, how)
        for sizes, milliseconds in sorted(times.items(), key=lambda each: each[1]):
            print(f"  {sizes.query:5} x {sizes.key:5}  {milliseconds:9.3f} ms", flush=True)
        if times:
            sizes = min(times, key=times.get)
            shape = shape_of(case, dtype, chip)
            best.append(Measured(shape, sizes.query, sizes.key, times[sizes]))
    return best


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m t5x_lite.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gin_arguments.add(made)
    made.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 1024])
    made.add_argument("--repeats", type=int, default=10, help="passes of each, in turns")
    return made


def main(arguments: list[str] | None = None) -> int:
    given, extra = parser().parse_known_args(arguments)
    run = config_file.load(given.gin_file, gin_arguments.bindings(extra))
    how = kernels.chosen("auto")
    if how is None:
        print(
            f"There is no TPU here ({kernels.device()[1]}), and blocks are a TPU's: nothing to "
            "tune. On a TPU the same command measures and remembers them.",
            file=sys.stderr,
        )
        return 2
    if any(block < 128 or block % 128 for block in given.blocks):
        parser().error("--blocks must be multiples of 128")
    path = tile_table.file()
    tile_table.write(path, tuned(run, given.blocks, given.repeats, how))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
