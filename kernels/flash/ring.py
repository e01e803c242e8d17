# SPDX-License-Identifier: Apache-2.0
"""Attention of rows that are split over devices, whose keys and values rotate (Liu et al., 2023).

Each device has a part of the queries and of the keys of a row. Instead of gathering all keys it
attends to one part at a time, hands that on to the next device, and merges what it has attended to
by log(Z). So no device has more than two parts. In the backward pass the gradients of keys and
values travel with them, and are at home after one round.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_lite.kernels.backend import Backend, mesh_axes
from t5x_lite.kernels.dense_mask import AttentionSource
from t5x_lite.kernels.flash import api as flash
from t5x_lite.kernels.flash.api import PackedSource
from t5x_lite.kernels.flash.config import FlashConfig, pack_heads, unpack_heads
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.reference import CHECKPOINT_NAME
from t5x_lite.kernels.relative import RelativePositionBias
from t5x_lite.kernels.tile_math import MASK_VALUE


@dataclass(frozen=True)
class RingConfig:
    """Sizes of the attention of one device, known before it runs.

    Attributes:
      flash: of attention to one part of the keys.
      axes: the mesh axes over which rows are split.
      devices: number of parts.
      max_distance: of the bias; 0 without one.
      both_sides: the bias has buckets for keys after the query.
    """

    flash: FlashConfig
    axes: Any
    devices: int
    max_distance: int
    both_sides: bool


class KeyPart(NamedTuple):
    """The keys and values that a device has at the moment, or their gradients.

    Attributes:
      k: [b s w], keys, heads side by side in lanes.
      v: [b s w], values, likewise.
    """

    k: Float[Array, "b s w"]
    v: Float[Array, "b s w"]


def use_ring(q, sources: tuple[AttentionSource, ...], backend: Backend | None) -> bool:
    """Returns True where the keys of rows that are split over devices rotate.

    Args:
      q: queries.
      sources: keys, values, masks and biases; of two sources both are gathered.
      backend: what computes attention.
    """
    if backend is None or not backend.ring or len(sources) > 1:
        return False
    axes = mesh_axes(q)[1]
    return axes is not None and mesh_axes(sources[0].keys)[2] == axes


def ring_attention(
    q: Float[Array, "b t k g h"],
    source: AttentionSource,
    softcap: float | None,
    backend: Backend,
    axes: Any,
) -> Float[Array, "b t k g h"]:
    """Softmax attention of this device's queries to all keys of their rows, inside a shard_map.

    Args:
      q: [b t k g h], this device's queries, already scaled.
      source: this device's keys and values; the mask has all keys of its rows.
      softcap: cap of the scores, or None.
      backend: what runs the kernels.
      axes: the mesh axes over which rows are split.
    """
    b, t, k, g, h = q.shape
    bias = source.relative_bias
    config = RingConfig(
        flash=flash.make_config(q, (source,), softcap, backend, None),
        axes=axes,
        devices=jax.lax.axis_size(axes),
        max_distance=0 if bias is None else bias.max_distance,
        both_sides=bias is not None and bias.both_sides,
    )
    part = KeyPart(*(pack_heads(jnp.swapaxes(x, 1, 2)) for x in (source.keys, source.values)))
    packed = pack_heads(q.reshape(b, t, k * g, h))
    table = None if bias is None else bias.table
    context = packed_ring(config, packed, part, table, source.row_mask)
    return unpack_heads(context, k * g, h).reshape(q.shape)


def step_operands(config: RingConfig, part: KeyPart, table, mask: Mask, step):
    """Returns a step's source, mask, and difference of indices of its bias's first value.

    Args:
      config: sizes.
      part: the keys and values that are here in this step.
      table: of the bias, or None.
      mask: of this device's queries and all keys.
      step: how often parts have been handed on.
    """
    keys = part.k.shape[1]
    here = jax.lax.axis_index(config.axes)
    first = jax.lax.rem(here - step + config.devices, jnp.int32(config.devices)) * keys

    def take_part(x):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, first, keys, 1)

    mask = replace(
        mask.with_offset(-first),
        key_segments=take_part(mask.key_segments),
        key_prefix=take_part(mask.key_prefix),
    )
    vectors, origin = make_vectors(config, table, mask)
    return PackedSource(part.k, part.v, vectors), mask, origin


def make_vectors(config: RingConfig, table, mask: Mask):
    """Returns the bias of a step as the kernels take it, as `flash.make_bias_vectors` does.

    Args:
      config: sizes.
      table: of the bias, or None.
      mask: of the step.
    """
    bias = None
    if table is not None:
        bias = RelativePositionBias(table, config.max_distance, config.both_sides)
    unread: Any = None
    return flash.make_bias_vectors(config.flash, AttentionSource(unread, unread, mask, bias))


def hand_on(config: RingConfig, arrays):
    """Returns what the device before this one has had.

    Args:
      config: with the axes.
      arrays: a pytree of this device's arrays.
    """
    devices = range(config.devices)
    ring = [(device, (device + 1) % config.devices) for device in devices]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, config.axes, ring), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_ring(config: RingConfig, q, part: KeyPart, table, mask: Mask) -> Float[Array, "b t w"]:
    """Attention of packed heads to all parts.

    Args:
      config: sizes.
      q: [b t w], queries.
      part: this device's keys and values.
      table: of the bias, or None.
      mask: of this device's queries and all keys.
    """
    return packed_ring_fwd(config, q, part, table, mask)[0]


def packed_ring_fwd(config: RingConfig, q, part: KeyPart, table, mask: Mask):
    """Forward rule of `packed_ring`.

    Args:
      config: sizes.
      q: queries.
      part: this device's keys and values.
      table: of the bias, or None.
      mask: of this device's queries and all keys.
    """

    def attend(step, part):
        source, step_mask, origin = step_operands(config, part, table, mask, step)
        return flash.packed_attention(config.flash, q, (source,), (step_mask,), (origin,))

    def visit(step, state):
        part, acc, log_z = state
        part = hand_on(config, part)
        context, step_log_z = attend(step, part)
        total = jnp.logaddexp(log_z, step_log_z)
        acc = scale_rows(config, acc, log_z, total)
        return part, acc + scale_rows(config, context, step_log_z, total), total

    # A device's own part is there; the last one to come is not handed on.
    context, log_z = attend(jnp.int32(0), part)
    state = part, context.astype(jnp.float32), log_z
    _, acc, log_z = jax.lax.fori_loop(1, config.devices, visit, state)
    context = checkpoint_name(acc.astype(q.dtype), CHECKPOINT_NAME)
    log_z = checkpoint_name(log_z, CHECKPOINT_NAME)
    return context, (q, part, table, mask, context, log_z)


def scale_rows(config: RingConfig, context, log_z, total) -> Float[Array, "b t w"]:
    """Returns float32 rows times exp(log_z - total), 0 for a query that attends to nothing.

    Args:
      config: sizes.
      context: [b t w].
      log_z: [b m p t], of what the rows have attended to.
      total: [b m p t], of all.
    """
    weight = jnp.where(log_z > MASK_VALUE / 2, jnp.exp(log_z - total), 0.0)
    weight = jnp.moveaxis(weight, 3, 1).reshape(*context.shape[:2], -1)
    return context.astype(jnp.float32) * jnp.repeat(weight, config.flash.head_lanes, axis=2)


def packed_ring_bwd(config: RingConfig, residuals, dout):
    """Backward rule of `packed_ring`.

    A step's gradients are those of its part's kernel, given log(Z) and the context of all parts.

    Args:
      config: sizes.
      residuals: what the forward rule kept.
      dout: [b t w], gradient of the context.
    """
    q, part, table, mask, context, log_z = residuals
    gradients = dout, jnp.zeros_like(log_z)

    def visit(step, state):
        (part, dpart), dq, dtable = state
        source, step_mask, origin = step_operands(config, part, table, mask, step)
        kept = q, (source,), (step_mask,), (origin,), context, log_z
        step_dq, (dsource,), *_ = flash.packed_attention_bwd(config.flash, kept, gradients)
        if table is not None:
            _, pull = jax.vjp(lambda table: make_vectors(config, table, step_mask)[0], table)
            dtable = dtable + pull(dsource.bias)[0].astype(jnp.float32)
        dpart = KeyPart(dpart.k + dsource.k, dpart.v + dsource.v)
        return hand_on(config, (part, dpart)), dq + step_dq, dtable

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (part, q, table))
    state = (part, zeros[0]), *zeros[1:]
    (_, dpart), dq, dtable = jax.lax.fori_loop(0, config.devices, visit, state)
    dpart = KeyPart(*(x.astype(part.k.dtype) for x in dpart))
    return dq.astype(q.dtype), dpart, None if table is None else dtable.astype(table.dtype), None


packed_ring.defvjp(packed_ring_fwd, packed_ring_bwd)
