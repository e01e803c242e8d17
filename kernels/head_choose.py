# SPDX-License-Identifier: Apache-2.0
"""The next token of each row from hidden states: no logits are written.

Top-k and top-p sampling is not done here: what they leave out depends on all logits of a row. Who
samples so takes the logits and `decoding.sampling.choose`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from t5x_lite.kernels import choosing, tiles, vocabulary, vocabulary_plan
from t5x_lite.kernels.vocabulary import VocabularyRule


class Draw(NamedTuple):
    """How each row draws, as `decoding.sampling.Sampling` has it; temperature 0 is greedy."""

    temperature: Float[Array, " r"]
    seed: UInt32[Array, " r"]
    row: UInt32[Array, " r"]
    position: Int[Array, " r"]

    def keys(self) -> UInt32[Array, "r 2"]:
        """The key of each row's noise at its position."""

        def one(seed, row, position):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
            return jax.random.key_data(key)

        return jax.vmap(one)(self.seed, self.row, self.position)


class Chosen(NamedTuple):
    """The token of each row, its logit, log(Z) of the row, and the largest logits with their ids,
    in falling order; none where top_k is 0."""

    token: Int[Array, " r"]
    logit: Float[Array, " r"]
    log_z: Float[Array, " r"]
    top_values: Float[Array, "r k"]
    top_ids: Int[Array, "r k"]


def head_choose(
    hidden: Float[Array, "r d"],
    table: Float[Array, "..."],
    rule: VocabularyRule,
    draw: Draw | None,
    how: tiles.How,
    top_k: int = 0,
) -> Chosen:
    """The token that `decoding.sampling.choose` takes from the logits of each row.

    It is the argmax of logits / temperature + Gumbel noise, or of the logits where temperature is
    0 or draw is None; the lowest id of equals. Noise is keyed by seed, row, position and id, so
    it is the same wherever the vocabulary is split. logit, log_z and the top_k largest are of the
    logits as they are, without temperature. rule's smoothing and z_loss play no part.

    Raises:
      ValueError: top_k is above 8 or above the ids of a device, or jax_threefry_partitionable is
        off: then noise at an id depends on how many ids there are.
    """
    most = min(choosing.MOST_TOP, rule.local(table))
    if not 0 <= top_k <= most:
        raise ValueError(f"top_k must be from 0 to {most}; got {top_k}")
    if draw is not None and not jax.config.jax_threefry_partitionable:
        raise ValueError("head_choose draws as JAX does with jax_threefry_partitionable on")
    operands = (hidden, table) if draw is None else (hidden, table, draw.temperature, draw.keys())
    operands = vocabulary.alike(*operands)
    numbers, ids = walk(operands, rule, how, top_k)
    return merged(numbers[: len(hidden)], ids[: len(hidden)], rule.axes, top_k)


def walk(operands, rule: VocabularyRule, how: tiles.How, top_k: int):
    """What each row knows after all ids of this device: numbers and ids, in choosing's columns."""
    hidden, table, *drawing = operands
    count, rows = choosing.rows_of_tile(hidden.shape[0])
    pad = lambda x: jnp.pad(x, ((0, rows * count - x.shape[0]), (0, 0)))
    filled = vocabulary_plan.filled(table, 0 if rule.tied else 1)
    seen = choosing.Seen(rule, rule.local(table), choosing.ids_of_tile(filled, rule), top_k)
    first, _ = vocabulary.alike(rule.first(table), hidden)
    if drawing:
        drawing = [drawing[0][:, None], drawing[1]]
    operands = (pad(hidden), filled, *map(pad, drawing))
    like = lambda dtype: tiles.like((rows * count, choosing.COLUMNS), dtype, *operands)
    per_row = lambda columns: pl.BlockSpec((rows, columns), lambda i, j, first: (i, 0))
    of_table = pl.BlockSpec((seen.tile, hidden.shape[1]), lambda i, j, first: (j, 0))
    if not rule.tied:
        of_table = pl.BlockSpec((hidden.shape[1], seen.tile), lambda i, j, first: (0, j))
    return pl.pallas_call(
        functools.partial(choosing.kernel, seen=seen, drawn=bool(drawing)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, -(-rule.local(filled) // seen.tile)),
            in_specs=[per_row(hidden.shape[1]), of_table, *(per_row(x.shape[1]) for x in drawing)],
            out_specs=[per_row(choosing.COLUMNS)] * 2,
        ),
        out_shape=[like(jnp.float32), like(jnp.int32)],
        interpret=how.interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * count * filled.size,
            bytes_accessed=count * filled.nbytes
            + sum(x.nbytes for x in operands if x is not filled),
            transcendentals=(3 if drawing else 1) * rows * count * rule.local(filled),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(first[None], *operands)


def merged(numbers, ids, axes: tuple[str, ...], top_k: int) -> Chosen:
    """What the devices along axes know together; the lowest id of equals, as ids rise with the
    devices."""
    numbers, ids = numbers[None], ids[None]
    if axes:
        keep = slice(None, choosing.TOP + top_k)
        kept = numbers[0, :, keep], ids[0, :, keep]
        numbers, ids = jax.lax.all_gather(kept, axes, to="invarying")
    winner = jnp.argmax(numbers[:, :, choosing.SCORE], axis=0)
    of_winner = lambda x: jnp.take_along_axis(x, winner[None], axis=0)[0]
    peak = jnp.max(numbers[:, :, choosing.PEAK], axis=0)
    totals = numbers[:, :, choosing.TOTAL] * jnp.exp(numbers[:, :, choosing.PEAK] - peak)
    top = slice(choosing.TOP, choosing.TOP + top_k)
    in_a_row = lambda x: jnp.moveaxis(x[:, :, top], 0, 1).reshape(x.shape[1], -1)
    values, places = jax.lax.top_k(in_a_row(numbers), top_k)
    return Chosen(
        of_winner(ids[:, :, choosing.SCORE]),
        of_winner(numbers[:, :, choosing.LOGIT]),
        peak + jnp.log(jnp.sum(totals, axis=0)),
        values,
        jnp.take_along_axis(in_a_row(ids), places, axis=1),
    )
