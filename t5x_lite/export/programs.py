# SPDX-License-Identifier: Apache-2.0
"""A model's encoder, prefill and decoding step as serialized `jax.export` programs.

b rows    s encoder inputs    p prompt tokens    v vocabulary
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints.weight_paths import nest_tree
from t5x_lite.decoding import target
from t5x_lite.decoding.protocol import Prompts
from t5x_lite.utils.not_none import not_none

PLATFORMS = ("cpu", "cuda", "tpu")


class ExportShapes(NamedTuple):
    """Sizes of the arrays of exported programs.

    They are numbers: jax does not resolve symbolic sizes in programs that place arrays on a mesh.

    Attributes:
      batch: b; a call with fewer rows is filled up.
      input_length: s of encoder-decoders, p of decoders alone: longer rows are refused, shorter
        ones padded.
      row_length: most ids of a row of the decoder, its prompt and the new ones together.
    """

    batch: int = 8
    input_length: int = 128
    row_length: int = 256


def export_programs(
    cfg: config.Model, params: Mapping[str, jax.ShapeDtypeStruct], shapes: ExportShapes
) -> dict[str, bytes]:
    """Serialized programs by name: encode (of encoder-decoders), prefill and step.

    They compute as decoding on a CPU does: in float32, attention in plain XLA.

    Args:
      cfg: config of the model.
      params: float32 weights by name, with a number for each layer: decoder.layers.0.norm.
      shapes: sizes of the arrays.

    Raises:
      ValueError: the model cannot be exported, or not in these sizes.
    """
    check_exportable(cfg, shapes)
    cfg = dataclasses.replace(cfg, dtype="float32", attention="reference", draft_heads=None)
    rows, length = shapes.batch, shapes.input_length
    programs: dict[str, export.Exported] = {}

    def add(name: str, function: Callable, *arguments: Any) -> Any:
        jitted = jax.jit(functools.partial(function, cfg))
        programs[name] = export.export(jitted, platforms=PLATFORMS)(dict(params), *arguments)
        leaves = [describe_rows(each.shape, each.dtype) for each in programs[name].out_avals]
        return jax.tree.unflatten(programs[name].out_tree, leaves)

    with sharding.one_device_mesh():
        one_each, rows_of_ids = describe_rows((rows,)), describe_rows((rows, length))
        prompts = rows_of_ids if cfg.encoder is None else describe_rows((rows, 1))
        memory = () if cfg.encoder is None else add("encode", encode, rows_of_ids, one_each)
        fill = functools.partial(prefill, slots=shapes.row_length)
        cache = add("prefill", fill, memory, prompts, one_each)
        add("step", step, memory, cache, one_each, one_each)
    return {name: bytes(program.serialize()) for name, program in programs.items()}


def describe_rows(shape: tuple, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with a value, a sequence, or keys for each row, on the mesh in force."""
    axes = {1: "batch", 2: "batch length", 4: "batch kv_heads length head_dim"}[len(shape)]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named_sharding(axes))


def check_exportable(cfg: config.Model, shapes: ExportShapes) -> None:
    """Raises ValueError for a model that writes no text, and for sizes that it does not have."""
    if cfg.decoder is None:
        raise ValueError("An encoder alone writes no text: there is no step to export")
    prompt = 1 if cfg.encoder is not None else shapes.input_length
    if shapes.row_length <= prompt:
        raise ValueError(
            f"--row_length={shapes.row_length} has no place for new ids: it counts those of the "
            f"prompt too, here up to {prompt}"
        )
    sizes = (
        ("--input_length", cfg.encoder, shapes.input_length),
        ("--row_length", cfg.decoder, shapes.row_length),
    )
    for name, stack, size in sizes:
        if stack is not None and stack.max_length is not None and size > stack.max_length:
            raise ValueError(f"{name}={size}: the model has {stack.max_length} learned positions")


def nest_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The params of decoding, each stack's layers in a tuple, of weights by name."""
    params = nest_tree(flat)
    for name in ("encoder", "decoder"):
        if name in params:
            layers = params[name]["layers"]
            params[name]["layers"] = tuple(layers[str(number)] for number in range(len(layers)))
    return params


def as_memory(memory: tuple) -> model.EncoderMemory:
    """The encoder's output of `encode`; () for a decoder alone."""
    return (
        model.EncoderMemory(model.Cache(*memory[:2]), memory[2])
        if memory
        else model.EncoderMemory()
    )


def encode(
    cfg: config.Model,
    params: Mapping[str, Any],
    inputs: Int[Array, "b s"],
    length: Int[Array, " b"],
) -> tuple:
    """Cross-attention keys and values of every decoder layer, and which inputs exist [b s].

    Args:
      cfg: config of the model.
      params: weights by name.
      inputs: ids, padded on the right with any id.
      length: number of ids of each row.
    """
    memory = target.encode_inputs(cfg, nest_params(params), inputs, length)
    cross_kv = not_none(memory.cross_kv)
    return cross_kv.keys, cross_kv.values, memory.input_mask


def prefill(
    cfg: config.Model,
    params: Mapping[str, Any],
    memory: tuple,
    prompts: Int[Array, "b p"],
    length: Int[Array, " b"],
    *,
    slots: int,
) -> tuple:
    """The cache, keys and values of every layer, with the prompts in it.

    Args:
      cfg: config of the model.
      params: weights by name.
      memory: result of `encode`; () for a decoder alone.
      prompts: ids, padded on the right with any id.
      length: number of ids of each row.
      slots: number of ids that the cache has room for.
    """
    filled = Prompts(prompts, length)
    cache = target.prefill(cfg, nest_params(params), as_memory(memory), filled, slots)
    return cache.keys, cache.values


def step(
    cfg: config.Model,
    params: Mapping[str, Any],
    memory: tuple,
    cache: tuple,
    tokens: Int[Array, " b"],
    index: Int[Array, " b"],
) -> tuple[Float[Array, "b v"], tuple]:
    """Logits of the token after `tokens`, and the cache with them in it.

    The last token of a prompt goes through it too, at its place.

    Args:
      cfg: config of the model.
      params: weights by name.
      memory: result of `encode`; () for a decoder alone.
      cache: result of `prefill` or of the last step.
      tokens: one id of each row.
      index: its place in the row, from 0.
    """
    model_ = target.make_target(cfg, nest_params(params), as_memory(memory))
    hidden, cache = model_.forward(tokens[:, None], index, model.Cache(*cache))
    return model_.logits(hidden)[:, 0], (cache.keys, cache.values)
