# SPDX-License-Identifier: Apache-2.0
"""Attention asked for by meaning: who computes it, and each device its own rows and heads."""

import functools
import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.kernels import block_decode_attention as decoding
from t5x_lite.kernels import block_decode_triton, flash_triton, reference
from t5x_lite.kernels import cross_entropy as losses
from t5x_lite.kernels import flash_attention as flash
from t5x_lite.kernels import pairs as drawn
from t5x_lite.kernels.block_sight import BlockSight
from t5x_lite.kernels.pairs import Pairs
from t5x_lite.kernels.relative import Relative
from t5x_lite.kernels.sight import Sight
from t5x_lite.kernels.source import Source
from t5x_lite.kernels.tiles import INTERPRETED, How, device
from t5x_lite.kernels.token_losses import TokenLosses
from t5x_lite.kernels.vocabulary import VocabularyRule

VARIABLE = "T5X_LITE_ATTENTION"
WISHES = ("auto", "pallas", "reference")


def chosen(wish: str) -> How | None:
    """How attention is computed on the devices in force, or None for plain XLA.

    auto is the kernels on TPUs and plain XLA elsewhere: on GPUs too, as long as the Triton kernels
    have not been measured there, so these are for those who ask for pallas. Kernels that are asked
    for where there is neither are interpreted, which is for tests.

    Raises:
      ValueError: T5X_LITE_ATTENTION says something else than wishes can be.
    """
    wish = os.environ.get(VARIABLE) or wish
    if wish not in WISHES:
        raise ValueError(f"{VARIABLE}={wish!r}: it must be one of {', '.join(WISHES)}")
    platform, kind = device()
    if wish == "reference" or (wish == "auto" and platform != "tpu"):
        return None
    if platform == "gpu":
        return How("gpu")
    return How("tpu", generation(kind), kind) if platform == "tpu" else INTERPRETED


def generation(kind: str) -> int:
    """The number in a TPU's name: "TPU v5 lite" is 5."""
    digits = [letter for letter in kind if letter.isdigit()]
    return int(digits[0]) if digits else 5


def prepared(sight: Sight | BlockSight | Bool[Array, "b s"], how: How | None):
    """sight as attention reads it: for plain XLA drawn as pairs, once for all layers.

    Bool [b s] are keys that every query of a row sees. Marks of keys are whole on every device.
    """
    if isinstance(sight, Sight):
        prefix = sight.key_prefix
        prefix = None if prefix is None else whole_along(prefix, 1)
        sight = replace(sight, key_segments=whole_along(sight.key_segments, 1), key_prefix=prefix)
    if how is not None:
        return sight
    if isinstance(sight, (Sight, BlockSight)):
        return drawn.pairs(sight)
    return Pairs(sight[:, None, :], jnp.zeros((1, sight.shape[1]), jnp.int32))


def laid(relative: Relative, sight):
    """relative as attention reads it, for what `prepared` made of a sight."""
    return drawn.bias(relative, sight) if isinstance(sight, Pairs) else relative


def attend(
    q: Float[Array, "b t k g h"],
    sources: tuple[Source, ...],
    softcap: float | None = None,
    how: How | None = None,
) -> Float[Array, "b t k g h"]:
    """Softmax attention over all sources in one softmax, g query heads to each of k key heads.

    Queries come scaled. softcap c turns scores x into c tanh(x / c), before bias and mask. Scores
    and softmax are float32. A query that may see nothing gets 0.
    """
    context = drawn.placement(q)[1]
    sources = tuple(with_whole_keys(source) for source in sources)
    if isinstance(sources[0].sight, Pairs):
        return over_pairs(q, sources, softcap)
    if isinstance(sources[-1].sight, (BlockSight, jax.Array)):
        return by_device(functools.partial(blocks, softcap=softcap, how=how), q, sources)
    kernel = functools.partial(rows, softcap=softcap, how=how, context=context)
    return by_device(kernel, q, sources)


def with_whole_keys(source: Source) -> Source:
    """source with all keys of a row on every device that has some of its queries: where the length
    of rows is split over the mesh, this is the all-gather."""
    keys, values = (whole_along(x, 2) for x in (source.keys, source.values))
    return source._replace(keys=keys, values=values)


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    placed = list(drawn.placement(x))
    if placed[axis] is None:
        return x
    placed[axis] = None
    return jax.reshard(x, jax.sharding.PartitionSpec(*placed))


def over_pairs(q, sources: tuple[Source, ...], softcap) -> Float[Array, "b t k g h"]:
    """Plain XLA: keys and pairs of all sources one after the other."""
    keys, values, seen, bias = joined(q, sources)
    return reference.attend(q, keys, values, seen, bias, softcap)


def probabilities(
    q: Float[Array, "b t k g h"], sources: tuple[Source, ...], softcap: float | None = None
) -> Float[Array, "b n t s"]:
    """The shares in which `attend` adds up the values of all sources, one after the other along s.

    Drawn as pairs, in plain XLA: for looking at texts that are short enough for it.
    """
    sources = tuple(with_whole_keys(source) for source in sources)
    keys, _, seen, bias = joined(q, sources)
    shares = reference.probabilities(q, keys, seen, bias, softcap)
    b, k, g, t, s = shares.shape
    rows, heads, _, *rest = drawn.placement(shares)
    return jnp.reshape(shares, (b, k * g, t, s), out_sharding=drawn.spread(rows, heads, *rest))


def joined(q, sources: tuple[Source, ...]):
    """Keys, values, pairs and bias (None: there is none) of all sources, drawn as pairs, as one."""
    first = sources[0]
    b, t, k, g, _ = q.shape
    bias = first.relative
    if bias is not None:
        rows, heads, *rest = drawn.placement(bias)
        placed = drawn.spread(rows, heads, None, *rest)
        shape = (bias.shape[0], k, g, *bias.shape[2:])
        bias = jnp.reshape(bias, shape, out_sharding=placed)
    if len(sources) == 1:
        return first.keys, first.values, first.sight.seen, bias
    join = lambda parts, axis: jnp.concatenate([part.astype(q.dtype) for part in parts], axis)
    keys = join([source.keys for source in sources], 2)
    values = join([source.values for source in sources], 2)
    seen = [whole(source.sight.seen, t) for source in sources]
    return keys, values, jnp.concatenate(seen, axis=2), None


def whole(seen: Bool[Array, " b #t s"], t: int) -> Bool[Array, "b t s"]:
    shape = (seen.shape[0], t, seen.shape[2])
    placed = drawn.spread(*drawn.placement(seen))
    return jnp.broadcast_to(seen, shape, out_sharding=placed)


def rows(q, sources: tuple[Source, ...], *, softcap, how: How, context=None):
    """Whole rows of tokens, for training and encoding; context are the mesh axes over which the
    queries of a row are split."""
    if context is not None:
        first = jax.lax.axis_index(context) * q.shape[1]
        sources = tuple(source._replace(sight=source.sight.later(first)) for source in sources)
    form = flash_triton if how.platform == "gpu" else flash
    return form.flash_attention(q, sources, softcap, how)


def blocks(q, sources: tuple[Source, ...], *, softcap, how: How):
    """Blocks of a few tokens over a cache, for decoding."""
    if how.platform == "gpu":
        return block_decode_triton.attend(q, sources, softcap, how)
    if len(sources) == 1:
        return decoding.attend(q, sources[0], softcap, how)
    return decoding.merged_decode_attention(q, sources, softcap, how)


def cross_entropy(
    hidden: Float[Array, "b t d"],
    table: Float[Array, "..."],
    targets: Int[Array, "b t"],
    rule: VocabularyRule,
    how: How | None = None,
) -> TokenLosses:
    """The losses of each token from hidden states and the table of logits, made in pieces.

    Where the mesh splits the vocabulary of table, rule.axes are filled in; where it splits its
    width, the table is gathered, and its gradient reduce-scattered.
    """
    places = drawn.placement(table)
    axes, whole = places[0 if rule.tied else 1] or (), places[1 if rule.tied else 0]
    rule = replace(rule, axes=(axes,) if isinstance(axes, str) else tuple(axes))

    def local(hidden, table, targets):
        if whole:
            # Along the first axis, where TPUs have a reduce-scatter for the way back.
            table = jax.lax.all_gather(table.T if rule.tied else table, whole, tiled=True)
            table = table.T if rule.tied else table
        flat = hidden.reshape(-1, hidden.shape[-1]), table, targets.reshape(-1)
        if how is None or how.platform == "gpu":
            told = losses.chunked_cross_entropy(*flat, rule)
        else:
            told = losses.fused_cross_entropy(*flat, rule, how)
        return TokenLosses(*(one.reshape(targets.shape) for one in told))

    placed = jax.sharding.PartitionSpec(*drawn.placement(targets))
    return by_device(local, hidden, table, targets, result=TokenLosses(placed, placed, placed))


def by_device(kernel, *operands: Any, result: Any = None):
    """kernel on each device's part of the operands, as their own types say they are split.

    The result is split as `result` says, or as the first operand is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*operands)
    specs = jax.tree.map(lambda x: jax.sharding.PartitionSpec(*drawn.placement(x)), operands)
    # Without the check of varying axes: interpreted kernels fail it (JAX 0.10.2).
    split = jax.shard_map(kernel, in_specs=specs, out_specs=result or specs[0], check_vma=False)
    return split(*operands)
