# SPDX-License-Identifier: Apache-2.0
"""Attention with T5's bias and its gradient for GPUs from Hopper on, of packed rows.

Every other attention has a home in JAX: cuDNN takes a bias, and gives its gradient, only as an
array of all pairs. Interpreted against float64, races looked for, and lowered for an H100 in tests;
never run on a GPU, nor timed. Axes: b batch, t queries, s keys, n = k g query heads of k key heads,
h head size, d distances.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_lite.kernels.dense_mask import AttentionSource, toeplitz_matrix
from t5x_lite.kernels.flash import block_mask
from t5x_lite.kernels.flash_mosaic import tile as tiles
from t5x_lite.kernels.flash_mosaic.backward import (
    MosaicResiduals,
    backward_keys,
    backward_near_bias,
    backward_queries,
)
from t5x_lite.kernels.flash_mosaic.forward import MosaicOperands, flash_forward
from t5x_lite.kernels.flash_mosaic.tile import BLOCK, SIZES, MosaicFlashConfig
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.reference import CHECKPOINT_NAME
from t5x_lite.utils.not_none import not_none

HEAD_SIZES = (64, 128)


def has_mosaic_form(q, sources: tuple[AttentionSource, ...], softcap: float | None) -> bool:
    """Returns True for what these kernels compute: one source with a bias, causal or not, packed.

    Args:
      q: queries.
      sources: keys, values, masks and biases.
      softcap: cap of the scores, or None.
    """
    source, *others = sources
    mask = source.mask
    if others or softcap is not None or source.bias is None or not isinstance(mask, Mask):
        return False
    plain = mask.query_prefix is None and mask.window_size is None and mask.offset is None
    floats = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in (q, source.keys))
    return plain and floats and q.shape[-1] in HEAD_SIZES


def flash_attention(
    q: Float[Array, "b t k g h"], source: AttentionSource, interpret: bool = False
) -> Float[Array, "b t k g h"]:
    """Softmax attention with a relative position bias; memory linear in length, both ways.

    Scores and sums are float32. A fully masked query gets 0, and gives no gradient.

    Args:
      q: [b t k g h], queries, already scaled.
      source: keys and values with a Mask and a bias, of which `has_mosaic_form` is true.
      interpret: runs the kernels in the interpreter.
    """
    b, t, k, g, h = q.shape
    s, bias = source.keys.shape[2], not_none(source.relative_bias)
    config = MosaicFlashConfig(
        group=g,
        head_size=h,
        query_blocks=-(-t // BLOCK),
        key_blocks=-(-s // BLOCK),
        reach=tiles.bias_reach(bias),
        causal=source.row_mask.causal,
        interpret=interpret,
    )
    queries = jnp.moveaxis(q.reshape(b, t, k * g, h), 2, 0)
    keys, values = (jnp.moveaxis(x, 1, 0) for x in (source.keys, source.values))
    packed = [pad_rows(x) for x in (queries, keys, values)]
    context = mosaic_attention(config, *packed, tiles.bias_values(bias), source.row_mask)
    context = context.reshape(k * g, b, -1, h)[:, :, :t]
    return jnp.moveaxis(context, 0, 2).reshape(q.shape)


def pad_rows(x: Float[Array, "n b t h"]) -> Float[Array, "n bt h"]:
    """Returns rows padded to whole blocks, one after the other."""
    n, _, t, h = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, -t % BLOCK), (0, 0))).reshape(n, -1, h)


class MosaicSides(NamedTuple):
    """Operands for programs of blocks of queries, and for those of blocks of keys.

    Attributes:
      by_query: the visits of blocks of queries.
      by_key: those of blocks of keys, and the bias of tiles with keys along rows.
    """

    by_query: MosaicOperands
    by_key: MosaicOperands


def make_sides(config: MosaicFlashConfig, k, v, values, mask: Mask) -> MosaicSides:
    """Returns the operands of the kernels.

    Args:
      config: sizes.
      k: [k bs h], keys.
      v: [k bs h], values.
      values: [n d], the bias by distance.
      mask: of whole rows.
    """
    segment_ids = block_mask.make_segment_ids(mask, SIZES)
    needed = block_mask.needed_blocks(mask, segment_ids, SIZES)
    ids = segment_ids.query.reshape(-1), segment_ids.key.reshape(-1)
    # With keys along rows the distance of a pair is that of column and row with the other sign.
    reversed_values = jnp.pad(values[:, -2::-1], ((0, 0), (0, 1)))
    return MosaicSides(
        *(
            MosaicOperands(k, v, *ids, tile_bias(config, vector), *block_mask.block_runs(blocks))
            for vector, blocks in (
                (values, needed),
                (reversed_values, jnp.swapaxes(needed, 1, 2)),
            )
        )
    )


def tile_bias(config: MosaicFlashConfig, values: Float[Array, "n d"]) -> Float[Array, "n r c"]:
    """Returns the bias of all tiles of a head, side by side."""
    return toeplitz_matrix(values, BLOCK, (2 * config.reach + 1) * BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mosaic_attention(config: MosaicFlashConfig, q, k, v, values, mask: Mask):
    """Attention of padded rows, head by head.

    Args:
      config: sizes.
      q: [n bt h], queries.
      k: [k bs h], keys.
      v: [k bs h], values.
      values: [n d], the bias by distance.
      mask: of whole rows.
    """
    return mosaic_attention_fwd(config, q, k, v, values, mask)[0]


def mosaic_attention_fwd(config: MosaicFlashConfig, *arguments):
    """Forward rule of `mosaic_attention`, of whose arguments it takes the same.

    Args:
      config: sizes.
      *arguments: q, k, v, values and mask.
    """
    q, *rest = arguments
    context, log_z = flash_forward(config, q, make_sides(config, *rest).by_query)
    context = checkpoint_name(context, CHECKPOINT_NAME)
    log_z = checkpoint_name(log_z, CHECKPOINT_NAME)
    return context, (arguments, context, log_z)


def mosaic_attention_bwd(config: MosaicFlashConfig, kept, dout):
    """Backward rule of `mosaic_attention`.

    Args:
      config: sizes.
      kept: what the forward rule kept.
      dout: [n bt h], gradient of the context.
    """
    (q, k, v, values, mask), context, log_z = kept
    sides = make_sides(config, k, v, values, mask)
    delta = jnp.sum(dout.astype(jnp.float32) * context.astype(jnp.float32), axis=-1)
    residuals = MosaicResiduals(q, dout, log_z, delta)
    dq, far = backward_queries(config, residuals, sides.by_query)
    near = backward_near_bias(config, residuals, sides.by_query)
    # Far tiles hold one number: its gradient stands at their first element.
    before, after = jnp.split(jnp.pad(jnp.sum(far, axis=2)[:, :, None, None], PLACE), 2, axis=1)
    dtiles = jnp.concatenate([before, near, after], axis=1)
    dbias = jnp.moveaxis(dtiles, 1, 2).reshape(len(dtiles), BLOCK, -1)
    _, pull = jax.vjp(functools.partial(tile_bias, config), values)
    dk, dv = (
        jnp.sum(x.reshape(-1, config.group, *x.shape[1:]), axis=1, dtype=jnp.float32).astype(
            x.dtype
        )
        for x in backward_keys(config, residuals, sides.by_key)
    )
    return dq, dk, dv, *pull(dbias), None


# Of one number to a tile.
PLACE = ((0, 0), (0, 0), (0, BLOCK - 1), (0, BLOCK - 1))

mosaic_attention.defvjp(mosaic_attention_fwd, mosaic_attention_bwd)
