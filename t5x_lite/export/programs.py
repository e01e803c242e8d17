# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding, and its parts encoder, prefill and step, as serialized `jax.export` programs.

b rows    s encoder inputs    p prompt tokens    v vocabulary    n places of a row
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config, model, sharding
from t5x_lite.checkpoints.weight_paths import nest_tree
from t5x_lite.config.canvas import check_left_to_right
from t5x_lite.decoding import target
from t5x_lite.decoding.protocol import Prompts
from t5x_lite.kernels.dispatch import BACKEND_VARIABLE
from t5x_lite.utils.not_none import not_none

PLATFORMS = ("cpu", "cuda", "tpu")
# How many callers of an operation a program names, by the paths of their files.
CALLERS = "jax_traceback_in_locations_limit"


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


def start_tokens(cfg: config.Model) -> list[int]:
    """Ids before a prompt: the token that decoders begin with, where there is one."""
    starts = cfg.encoder is not None or cfg.add_bos
    return [cfg.decoder_start_token_id] if starts else []


@contextlib.contextmanager
def without_environment(name: str) -> Generator[None]:
    """Context in which a variable of the environment is not set."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


@contextlib.contextmanager
def without_paths() -> Generator[None]:
    """Context in which programs do not name files of this machine."""
    callers = getattr(jax.config, CALLERS)
    jax.config.update(CALLERS, 0)
    try:
        yield
    finally:
        jax.config.update(CALLERS, callers)


def export_programs(
    cfg: config.Model,
    params: Mapping[str, jax.ShapeDtypeStruct],
    shapes: ExportShapes,
    stops: tuple[int, ...] = (),
) -> dict[str, bytes]:
    """Serialized programs by name: generate, and its parts encode (of encoder-decoders), prefill
    and step.

    They compute as decoding on a CPU does: in float32, attention in plain XLA, whatever the
    environment selects. They name no file of this machine.

    Args:
      cfg: config of the model.
      params: float32 weights by name, with a number for each layer: decoder.layers.0.norm.
      shapes: sizes of the arrays.
      stops: ids of which any ends a text.

    Raises:
      ValueError: the model cannot be exported, or not in these sizes.
    """
    check_exportable(cfg, shapes)
    cfg = dataclasses.replace(cfg, dtype="float32", attention="reference", draft_heads=None)
    rows, length = shapes.batch, shapes.input_length
    programs: dict[str, export.Exported] = {}

    def add(name: str, function: Callable, *arguments: Any) -> Any:
        programs[name] = export.export(jax.jit(function), platforms=PLATFORMS)(
            dict(params), *arguments
        )
        leaves = [describe_rows(each.shape, each.dtype) for each in programs[name].out_avals]
        return jax.tree.unflatten(programs[name].out_tree, leaves)

    with sharding.one_device_mesh(), without_environment(BACKEND_VARIABLE), without_paths():
        one_each, rows_of_ids = describe_rows((rows,)), describe_rows((rows, length))
        prompts = rows_of_ids if cfg.encoder is None else describe_rows((rows, 1))
        memory = (
            ()
            if cfg.encoder is None
            else add("encode", functools.partial(encode, cfg), rows_of_ids, one_each)
        )
        fill = functools.partial(prefill, cfg, slots=shapes.row_length)
        cache = add("prefill", fill, memory, prompts, one_each)
        add("step", functools.partial(step, cfg), memory, cache, one_each, one_each)
        write = functools.partial(generate, GreedySettings(cfg, shapes.row_length, stops))
        count = jax.ShapeDtypeStruct((), jnp.int32)
        add("generate", write, rows_of_ids, one_each, one_each, count)
    return {name: bytes(program.serialize()) for name, program in programs.items()}


def describe_rows(shape: tuple, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with a value, a sequence, or keys for each row, on the mesh in force."""
    axes = {1: "batch", 2: "batch length", 4: "batch kv_heads length head_dim"}[len(shape)]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named_sharding(axes))


def check_exportable(cfg: config.Model, shapes: ExportShapes) -> None:
    """Raises ValueError for a model that writes no text, and for sizes that it does not have."""
    if cfg.decoder is None:
        raise ValueError("An encoder alone writes no text: there is no step to export")
    check_left_to_right(cfg, "A program")
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
        if stack is not None and stack.longest is not None and size > stack.longest:
            raise ValueError(f"{name}={size}: the model has {stack.longest} learned positions")


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
        model.EncoderMemory(tuple(join_layers(*memory[:2])), memory[2])
        if memory
        else model.EncoderMemory()
    )


def split_layers(cache: Iterable[Any]) -> tuple[tuple, tuple]:
    """Keys of all layers, and values of all layers."""
    return tuple(layer.keys for layer in cache), tuple(layer.values for layer in cache)


def join_layers(keys: Iterable, values: Iterable) -> Iterator[model.Cache]:
    """Keys and values of every layer, from what `split_layers` returned."""
    return map(model.Cache, keys, values)


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
    return *split_layers(not_none(memory.cross_kv)), memory.input_mask


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
    return split_layers(cache)


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
    stores = model.make_stores(cfg, join_layers(*cache))
    hidden, cache = model_.forward(tokens[:, None], index, stores)
    return model_.logits(hidden)[:, 0], split_layers(cache)


class GreedySettings(NamedTuple):
    """Model and sizes that a program of greedy decoding is compiled for.

    Attributes:
      model: config of the model.
      slots: places of a row, prompt and new tokens together.
      stops: ids of which any ends a text.
    """

    model: config.Model
    slots: int
    stops: tuple[int, ...]


class Written(NamedTuple):
    """State of greedy decoding.

    Attributes:
      place: number of tokens written in each row so far.
      cache: keys and values of every layer.
      token: [b], the last token of each row.
      tokens: [b n], the new tokens.
      lengths: [b], how many of them belong to a row's text.
      ended: [b], true for a row whose text is complete.
    """

    place: Int[Array, ""]
    cache: tuple
    token: Int[Array, " b"]
    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    ended: Bool[Array, " b"]


def begin_rows(
    cfg: config.Model, rows: Int[Array, "b s"], length: Int[Array, " b"]
) -> tuple[Int[Array, "b p"], Int[Array, " b"], Int[Array, " b"]]:
    """Prompts of the decoder, their lengths, and their last tokens.

    Args:
      cfg: config of the model.
      rows: ids of inputs, or of prompts of a decoder alone.
      length: number of ids of each row.
    """
    if cfg.encoder is not None:
        rows, length = rows[:, :0], 0 * length
    start = start_tokens(cfg)
    before = jnp.broadcast_to(jnp.array(start, jnp.int32), (rows.shape[0], len(start)))
    prompts = jnp.concatenate([jax.reshard(before, jax.typeof(rows).sharding), rows], axis=1)
    length = length + len(start)
    here = jnp.arange(prompts.shape[1]) == length[:, None] - 1
    return prompts, length, jnp.sum(jnp.where(here, prompts, 0), axis=1)


def generate(
    settings: GreedySettings,
    params: Mapping[str, Any],
    rows: Int[Array, "b s"],
    length: Int[Array, " b"],
    first: Int[Array, " b"],
    new_tokens: Int[Array, ""],
) -> tuple[Int[Array, "b n"], Int[Array, " b"]]:
    """The most probable tokens of each row, up to one that ends a text.

    Args:
      settings: model, sizes and ends.
      params: weights by name.
      rows: ids of inputs, or of prompts of a decoder alone, padded on the right with any id.
      length: number of ids of each row.
      first: the first new token of each row, such as a language's; -1 leaves it free.
      new_tokens: most tokens to write; a row ends in any case where it is full.

    Returns:
      The new tokens, and how many each row has; those after them mean nothing.
    """
    cfg, slots, stops = settings
    memory = () if cfg.encoder is None else encode(cfg, params, rows, length)
    prompts, filled, last = begin_rows(cfg, rows, length)

    def write_next(state: Written) -> Written:
        where = filled - 1 + state.place
        logits, cache = step(cfg, params, memory, state.cache, state.token, where)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        token = jnp.where((state.place == 0) & (first >= 0), first, token)
        here = jnp.arange(slots) == state.place
        tokens = jnp.where(here, token[:, None], state.tokens)
        lengths = state.lengths + ~state.ended
        ends = jnp.isin(token, jnp.array(stops, jnp.int32)) | (where + 2 >= slots)
        return Written(state.place + 1, cache, token, tokens, lengths, state.ended | ends)

    cache = prefill(cfg, params, memory, prompts, filled, slots=slots)
    tokens = 0 * last[:, None] * jnp.arange(slots)
    begin = Written(jnp.zeros((), jnp.int32), cache, last, tokens, 0 * last, last < 0)
    written = jax.lax.while_loop(
        lambda state: (state.place < new_tokens) & ~jnp.all(state.ended), write_next, begin
    )
    return written.tokens, written.lengths
