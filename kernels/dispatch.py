# SPDX-License-Identifier: Apache-2.0
"""Attention and cross entropy by meaning: selects a backend, and runs it per device of the mesh."""

import functools
import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import compat
from t5x_lite.kernels import cudnn, dense_mask, local, reference
from t5x_lite.kernels.backend import (
    CUDNN,
    HOPPER,
    INTERPRETED,
    Backend,
    has_kernels,
    mesh_axes,
    partition_spec,
    target_device,
)
from t5x_lite.kernels.block_diffusion import BlockDiffusionMask
from t5x_lite.kernels.decode import api as decode
from t5x_lite.kernels.decode import triton as triton_decode
from t5x_lite.kernels.decode.mask import CacheMask
from t5x_lite.kernels.dense_mask import AttentionSource, DenseMask
from t5x_lite.kernels.flash import api as flash
from t5x_lite.kernels.flash import ring
from t5x_lite.kernels.flash_triton import api as flash_triton
from t5x_lite.kernels.mask import Mask
from t5x_lite.kernels.relative import PositionBias
from t5x_lite.kernels.vocabulary.cross_entropy import (
    TokenLosses,
    chunked_cross_entropy,
    fused_cross_entropy,
)
from t5x_lite.kernels.vocabulary.logits import CrossEntropyConfig

BACKEND_VARIABLE = "T5X_LITE_ATTENTION"
BACKEND_CHOICES = ("auto", "pallas", "ring", "reference")


def select_backend(choice: str, lacks_kernel: str = "") -> Backend | None:
    """Returns the backend that computes attention on the devices in force; None is plain XLA.

    "auto" is the kernels on TPUs, cuDNN and plain XLA on GPUs (`cudnn.GPU_IMPLEMENTATIONS`), and
    plain XLA elsewhere. The kernels for GPUs have not been measured: they run only for "pallas".
    Where there is neither a TPU nor a GPU, "pallas" interprets the TPU kernels, which is for tests.
    "ring" is "pallas" but for rows that are split over devices: their keys rotate.

    Args:
      choice: one of BACKEND_CHOICES; T5X_LITE_ATTENTION in the environment overrides it.
      lacks_kernel: what of the model no kernel computes, for messages; "auto" is then plain XLA.

    Raises:
      ValueError: the choice is none of these, "pallas" or "ring" where a kernel is lacking, or
        "ring" on a GPU.
    """
    choice = os.environ.get(BACKEND_VARIABLE) or choice
    if choice not in BACKEND_CHOICES:
        choices = ", ".join(BACKEND_CHOICES)
        raise ValueError(f"{BACKEND_VARIABLE}={choice!r}: it must be one of {choices}")
    if choice in ("pallas", "ring") and lacks_kernel:
        raise ValueError(
            f"{lacks_kernel} has no kernel: unset {BACKEND_VARIABLE}, or set it to reference"
        )
    device = target_device()
    if choice == "reference" or (choice == "auto" and device.platform not in ("tpu", "gpu")):
        return None
    if lacks_kernel:
        report_fallback(lacks_kernel)
        return None
    if device.platform == "gpu":
        if choice == "ring":
            raise ValueError(
                'Model.attention = "ring" is for TPUs: on a GPU choose "auto" or "pallas", which '
                "gather the keys of a row that Mesh.context splits"
            )
        return CUDNN if choice == "auto" else Backend("gpu")
    rotates = choice == "ring"
    if device.platform == "tpu":
        return Backend("tpu", tpu_generation(device.kind), device.kind, rotates)
    return replace(INTERPRETED, ring=rotates)


@functools.cache
def report_fallback(lacks_kernel: str) -> None:
    """Logs, once, that plain XLA computes attention on an accelerator, and for what setting."""
    logging.info("Attention runs in plain XLA: %s has no kernel", lacks_kernel)


def tpu_generation(kind: str) -> int:
    """Returns the number in a TPU's name: "TPU v5 lite" is 5."""
    digits = [character for character in kind if character.isdigit()]
    return int(digits[0]) if digits else 5


def prepare_mask(
    mask: Mask | CacheMask | BlockDiffusionMask | Bool[Array, "b s"], backend: Backend | None
):
    """Returns the mask as attention takes it: a DenseMask for plain XLA, or a LocalMask if it has a
    span, once for all layers.

    What describes keys is unsharded along them, as every device needs all keys of its rows.

    Args:
      mask: a Mask, a CacheMask, a BlockDiffusionMask (for plain XLA alone), or Bool [b s] of keys
        that every query of a row attends to.
      backend: what computes attention; None is plain XLA.
    """
    if isinstance(mask, Mask):
        prefix = mask.key_prefix
        prefix = None if prefix is None else unshard_axis(prefix, 1)
        mask = replace(mask, key_segments=unshard_axis(mask.key_segments, 1), key_prefix=prefix)
    if has_kernels(backend):
        return mask
    if isinstance(mask, Mask) and local.saves_work(mask):
        return local.make_local_mask(mask)
    if isinstance(mask, (Mask, CacheMask, BlockDiffusionMask)):
        return dense_mask.materialize_mask(mask)
    return DenseMask(mask[:, None, :], jnp.zeros((1, mask.shape[1]), jnp.int32))


def prepare_bias(bias: PositionBias, mask):
    """Returns the bias as attention takes it: for plain XLA the array of the mask's pairs.

    Args:
      bias: the relative position bias.
      mask: what `prepare_mask` returned.
    """
    if isinstance(mask, local.LocalMask):
        return local.make_local_bias(bias, mask)
    return dense_mask.materialize_bias(bias, mask) if isinstance(mask, DenseMask) else bias


def dot_product_attention(
    q: Float[Array, "b t k g h"],
    sources: tuple[AttentionSource, ...],
    softcap: float | None = None,
    backend: Backend | None = None,
) -> Float[Array, "b t k g h"]:
    """Softmax attention over all sources in one softmax, g query heads to each of k key heads.

    Scores and softmax are float32. A fully masked query gets 0.

    Args:
      q: [b t k g h], queries, already scaled.
      sources: keys, values, masks and biases; masks and biases are those of `prepare_mask` and
        `prepare_bias`.
      softcap: c turns scores x into c tanh(x / c), before bias and mask; None without one.
      backend: the backend that masks were prepared for; None is plain XLA.
    """
    context_axes = mesh_axes(q)[1]
    if not ring.use_ring(q, sources, backend):
        sources = tuple(gather_keys(source) for source in sources)
    if isinstance(sources[0].mask, DenseMask):
        return dense_attention(q, sources, softcap, backend)
    if isinstance(sources[0].mask, local.LocalMask):
        queries, blocks = local.split_source(q, sources[0])
        y = dense_attention(queries, (blocks,), softcap, None)
        return local.join_rows(y, sources[0].mask)
    assert backend is not None
    if isinstance(sources[-1].mask, (CacheMask, jax.Array)):
        kernel = functools.partial(cache_attention, softcap=softcap, backend=backend)
    else:
        kernel = functools.partial(
            row_attention,
            softcap=softcap,
            backend=backend,
            context_axes=context_axes,
            rotates=ring.use_ring(q, sources, backend),
        )
    return run_sharded(kernel, q, sources)


def gather_keys(source: AttentionSource) -> AttentionSource:
    """Returns the source with all keys of a row on every device that has some of its queries: where
    the length of rows is split over the mesh, this is the all-gather."""
    keys, values = (unshard_axis(x, 2) for x in (source.keys, source.values))
    return source._replace(keys=keys, values=values)


def unshard_axis(x: jax.Array, axis: int) -> jax.Array:
    """Returns x with all of `axis` on every device."""
    spec = list(mesh_axes(x))
    if spec[axis] is None:
        return x
    spec[axis] = None
    return jax.reshard(x, jax.sharding.PartitionSpec(*spec))


def dense_attention(
    q, sources: tuple[AttentionSource, ...], softcap, backend: Backend | None
) -> Float[Array, "b t k g h"]:
    """Attention over the concatenated keys of all sources, in plain XLA or by cuDNN.

    Args:
      q: queries.
      sources: with a DenseMask each.
      softcap: cap of the scores, or None.
      backend: None for plain XLA.
    """
    keys, values, visible, bias = concatenate_sources(q, sources)
    masks = [source.dense_mask for source in sources]
    of_rows = backend == CUDNN and all(mask.of_rows for mask in masks)
    if of_rows and cudnn.use_cudnn(q, keys, bias is not None, softcap):
        causal = len(masks) == 1 and masks[0].causal
        kernel = functools.partial(cudnn.cudnn_attention, causal=causal)
        return run_sharded(kernel, q, keys, values, visible)
    return reference.reference_attention(q, keys, values, visible, bias, softcap)


def attention_probs(
    q: Float[Array, "b t k g h"],
    sources: tuple[AttentionSource, ...],
    softcap: float | None = None,
) -> Float[Array, "b n t s"]:
    """Returns the attention probabilities of all sources, one after the other along s.

    An array of all pairs, in plain XLA: to inspect texts that are short enough for it.

    Args:
      q: [b t k g h], queries, already scaled.
      sources: with a DenseMask each.
      softcap: cap of the scores, or None.
    """
    sources = tuple(gather_keys(source) for source in sources)
    keys, _, visible, bias = concatenate_sources(q, sources)
    probs = reference.softmax_probs(q, keys, visible, bias, softcap)
    b, k, g, t, s = probs.shape
    rows, heads, _, *rest = mesh_axes(probs)
    return jnp.reshape(probs, (b, k * g, t, s), out_sharding=partition_spec(rows, heads, *rest))


def concatenate_sources(q, sources: tuple[AttentionSource, ...]):
    """Returns keys, values, visible pairs and bias (None without one) of all sources as one."""
    first = sources[0]
    b, t, k, g, _ = q.shape
    bias = first.bias
    if bias is not None:
        assert isinstance(bias, jax.Array)
        rows, heads, *rest = mesh_axes(bias)
        sharding = partition_spec(rows, heads, None, *rest)
        shape = (bias.shape[0], k, g, *bias.shape[2:])
        bias = jnp.reshape(bias, shape, out_sharding=sharding)
    if len(sources) == 1:
        return first.keys, first.values, first.dense_mask.visible, bias
    keys = jnp.concatenate([source.keys.astype(q.dtype) for source in sources], 2)
    values = jnp.concatenate([source.values.astype(q.dtype) for source in sources], 2)
    visible = [broadcast_queries(source.dense_mask.visible, t) for source in sources]
    return keys, values, jnp.concatenate(visible, axis=2), None


def broadcast_queries(visible: Bool[Array, " b #t s"], t: int) -> Bool[Array, "b t s"]:
    """Returns a mask with all t queries written out."""
    shape = (visible.shape[0], t, visible.shape[2])
    return jnp.broadcast_to(visible, shape, out_sharding=partition_spec(*mesh_axes(visible)))


def row_attention(
    q,
    sources: tuple[AttentionSource, ...],
    *,
    softcap,
    backend: Backend,
    context_axes=None,
    rotates: bool = False,
) -> Float[Array, "b t k g h"]:
    """Attention over whole rows of tokens on one device, for training and encoding.

    Args:
      q: this device's queries.
      sources: all keys of its rows, or where they rotate this device's.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
      context_axes: the mesh axes over which the queries of a row are split, or None.
      rotates: keys of other devices come by instead of being here.
    """
    if context_axes is not None:
        first = jax.lax.axis_index(context_axes) * q.shape[1]
        sources = tuple(
            source._replace(mask=source.row_mask.with_offset(first)) for source in sources
        )
    if rotates:
        return ring.ring_attention(q, sources[0], softcap, backend, context_axes)
    if use_mosaic_gpu(q, sources, softcap, backend):
        from t5x_lite.kernels.flash_mosaic import api as flash_mosaic

        return flash_mosaic.flash_attention(q, sources[0])
    module = flash_triton if backend.platform == "gpu" else flash
    return module.flash_attention(q, sources, softcap, backend)[0]


def use_mosaic_gpu(q, sources: tuple[AttentionSource, ...], softcap, backend: Backend) -> bool:
    """Returns True where attention is computed by the kernels for Mosaic GPU, not by Triton's.

    Args:
      q: queries.
      sources: keys, values, masks and biases.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
    """
    if backend.platform != "gpu" or not compat.has_mosaic_gpu():
        return False
    # Imported here: jax 0.10.2 has another Mosaic GPU.
    from t5x_lite.kernels.flash_mosaic import api as flash_mosaic

    # Theirs are the products of Hopper alone.
    is_hopper = any(name in target_device().kind for name in HOPPER)
    return is_hopper and flash_mosaic.has_mosaic_form(q, sources, softcap)


def cache_attention(
    q, sources: tuple[AttentionSource, ...], *, softcap, backend: Backend
) -> Float[Array, "b w k g h"]:
    """Attention of a few new tokens over a cache on one device, for decoding.

    Args:
      q: queries of the new tokens.
      sources: the cache, and where there is one the encoder's output.
      softcap: cap of the scores, or None.
      backend: what runs the kernel.
    """
    if backend.platform == "gpu" and compat.has_mosaic_gpu(interpreted=True):
        # Imported here: older versions of jax have another Mosaic GPU.
        from t5x_lite.kernels.decode import mosaic as mosaic_decode

        if mosaic_decode.has_mosaic_form(q, sources):
            return mosaic_decode.mosaic_decode_attention(q, sources, softcap)
    if backend.platform == "gpu":
        return triton_decode.triton_decode_attention(q, sources, softcap, backend)
    if len(sources) == 1:
        return decode.decode_attention(q, sources[0], softcap, backend)
    return decode.merged_decode_attention(q, sources, softcap, backend)


def cross_entropy(
    hidden: Float[Array, "b t d"],
    table: Float[Array, "..."],
    targets: Int[Array, "b t"],
    config: CrossEntropyConfig,
    backend: Backend | None = None,
    bias: Float[Array, " v"] | None = None,
) -> TokenLosses:
    """Returns the losses of each token from hidden states, without an array of all logits.

    Where the mesh splits the vocabulary of the table, config.axes are filled in; where it splits
    its width, the table is gathered, and its gradient reduce-scattered.

    Args:
      hidden: [b t d], what the logits are computed from.
      table: [v d] where config.tied, an embedding; else [d v], a head.
      targets: [b t], ids.
      config: of logits and loss.
      backend: what computes it; on a GPU, and for logits with a bias, it is plain XLA.
      bias: [v], added to the logits; None without one.
    """
    spec = mesh_axes(table)
    axes, width_axes = spec[0 if config.tied else 1] or (), spec[1 if config.tied else 0]
    config = replace(config, axes=(axes,) if isinstance(axes, str) else tuple(axes))

    def local_losses(hidden, table, targets, bias):
        if width_axes:
            # Along the first axis, where TPUs have a reduce-scatter for the way back.
            table = table.T if config.tied else table
            table = jax.lax.all_gather(table, width_axes, tiled=True)
            table = table.T if config.tied else table
        rows, row_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        fused = backend is not None and backend.platform in ("tpu", "interpret")
        if not fused or bias is not None:
            losses = chunked_cross_entropy(rows, table, row_targets, config, bias)
        else:
            assert backend is not None
            losses = fused_cross_entropy(rows, table, row_targets, config, backend)
        return TokenLosses(*(field.reshape(targets.shape) for field in losses))

    result: Any = jax.sharding.PartitionSpec(*mesh_axes(targets))
    return run_sharded(
        local_losses, hidden, table, targets, bias, result=TokenLosses(result, result, result)
    )


def run_sharded(kernel, *operands: Any, result: Any = None):
    """Runs a kernel on each device's part of the operands, as their types say they are split.

    Args:
      kernel: function of local arrays.
      *operands: pytrees of arrays.
      result: PartitionSpecs of what the kernel returns; by default that of the first operand.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*operands)
    specs = jax.tree.map(lambda x: jax.sharding.PartitionSpec(*mesh_axes(x)), operands)
    # Without the check of varying axes: interpreted kernels fail it (JAX 0.10.2).
    run = jax.shard_map(kernel, in_specs=specs, out_specs=result or specs[0], check_vma=False)
    return run(*operands)
