# SPDX-License-Identifier: Apache-2.0
"""A pool: rows of one decoding loop that requests join and leave between its blocks of steps.

A DecodeState is a value and its rows are independent, so a request that joins is a write of every
array of its row, and a row that leaves is done. Every program has one shape, whatever the company
of a row is, and a row that joins is overwritten whole: nothing of the one before it is left.

b rows of the pool    n rows that join    T slots of a row    N most new tokens of a block of steps
"""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Shaped

from t5x_lite import config, model, sharding
from t5x_lite.decoding import chunked_prefill, generation, target
from t5x_lite.decoding.generation import DecodeProgram, Drafting
from t5x_lite.decoding.initial_state import initial_state
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, Prompts, TokenDetails
from t5x_lite.decoding.request import Request
from t5x_lite.decoding.result import slice_new_tokens
from t5x_lite.decoding.sampling import SamplingParams
from t5x_lite.decoding.steering.build import ChoiceRules
from t5x_lite.decoding.streaming import DecodeArguments
from t5x_lite.model.computation import with_dtype_of

# Fields of SamplingParams that each cost a pass over the vocabulary. 0 changes no logit of a row:
# its text is the one without the field.
SELDOM = ("min_p", "epsilon_cutoff", "eta_cutoff", "temperature_range")


class ChoiceLevel(enum.IntEnum):
    """Work that choosing tokens takes in a block of steps; a row that needs less has its own text.

    Attributes:
      GREEDY: no row samples.
      SAMPLED: by temperature, top-k and top-p.
      FILTERED: by the fields of SELDOM too.
    """

    GREEDY = 0
    SAMPLED = 1
    FILTERED = 2


class PoolProgram(NamedTuple):
    """Static arguments of the programs of a pool.

    Attributes:
      program: those of the loop; its length is that of the longest new text.
      rows: b.
      inputs: ids of the longest input of the encoder; 0 without an encoder.
      prompts: ids of the longest prompt of the decoder.
      block: steps between two returns to the host.
    """

    program: DecodeProgram
    rows: int
    inputs: int
    prompts: int
    block: int

    @property
    def most_tokens(self) -> int:
        """Most new tokens that a row can get in a block of steps, N."""
        steps = int(self.program.drafter.tree.depth.max()) + 1
        return min(self.block * steps, self.program.length)


class RowPool(NamedTuple):
    """Rows of a pool; a value, on the mesh. Rows that nothing has joined yet are done.

    Attributes:
      request: prompt, inputs and limit of each row; without what rows share.
      sampling: how each row is sampled, every field an array.
      encoded: the encoded inputs.
      state: state of the loop.
    """

    request: Request
    sampling: SamplingParams
    encoded: model.EncoderMemory
    state: DecodeState


class JoiningRows(NamedTuple):
    """Requests that join a pool, as host arrays of the pool's widths.

    Attributes:
      request: prompt, inputs and limit of each; without what rows share.
      sampling: how each is sampled, every field an array.
      places: row of the pool that each takes; equal ones are the same request.
      cache: cache of the prompts, on the mesh; None for prompts that are read with the request.
    """

    request: Request
    sampling: SamplingParams
    places: Int[Array, " n"]
    cache: chunked_prefill.WholeRows | None = None


class PoolStep(NamedTuple):
    """New tokens of a block of steps.

    Attributes:
      tokens: of each row, padded with 0.
      nodes: the node of the block whose draft each token was; 0 for the model's own choice.
      counts: number of new tokens of each row.
      done: rows that have ended.
      log_probability: of the whole text of each row so far, in nats.
      passes: forward passes of the block.
      details: of the tokens, if the pool's program has them.
    """

    tokens: Int[Array, "b N"]
    nodes: Int[Array, "b N"]
    counts: Int[Array, " b"]
    done: Bool[Array, " b"]
    log_probability: Any
    passes: Any
    details: TokenDetails | None


def make_pool_program(
    cfg: config.Model, params: Any, decode: config.Decode, drafting: Drafting, **sizes: int
) -> PoolProgram:
    """Returns the static arguments of a pool.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      decode: the most new tokens of a text, and logprobs.
      drafting: drafter and acceptance rule of every row.
      **sizes: the other fields of PoolProgram.
    """
    program = generation.make_program(with_dtype_of(cfg, params), decode, drafting)
    return PoolProgram(program, **sizes)


class PrefillSizes(NamedTuple):
    """Widths at which joining rows are read, each a bucket of their own lengths.

    Attributes:
      inputs: of the encoder; 0 without one.
      prompts: of the decoder.
    """

    inputs: int
    prompts: int


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_pool(
    pool: PoolProgram, sizes: PrefillSizes, arguments: DecodeArguments, joining: JoiningRows
) -> RowPool:
    """Returns a pool of zeros, in which every row is done.

    Args:
      pool: static arguments.
      sizes: those of `join_pool`.
      arguments: those of `join_pool`.
      joining: rows that could join; their arrays give the shapes, and are not read.
    """

    def zeros(row: Array) -> Array:
        size = (pool.rows, *row.shape[1:]) if row.ndim else ()
        return jnp.zeros(size, row.dtype, out_sharding=jax.typeof(row).sharding.spec)

    empty = jax.tree.map(zeros, read_rows(pool, sizes, arguments, joining))
    if empty.encoded.input_mask is not None:
        # A softmax over no key at all would not be a number.
        mask = empty.encoded.input_mask | (jnp.arange(pool.inputs) == 0)
        empty = empty._replace(encoded=empty.encoded._replace(input_mask=mask))
    return empty._replace(state=empty.state._replace(done=~empty.state.done))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def join_pool(
    pool: PoolProgram,
    sizes: PrefillSizes,
    arguments: DecodeArguments,
    rows: RowPool,
    joining: JoiningRows,
) -> RowPool:
    """Reads requests, and writes each over a row of the pool.

    Args:
      pool: static arguments.
      sizes: widths at which they are read.
      arguments: weights, ends of texts, and the processors of the joining rows.
      rows: the pool; donated.
      joining: the requests.

    Returns:
      The pool with them.
    """
    fresh = read_rows(pool, sizes, arguments, joining)

    def write(old: Array, new: Array) -> Array:
        if not old.ndim:  # the number of steps, which all rows share
            return old
        return old.at[joining.places].set(new, out_sharding=jax.typeof(old).sharding.spec)

    return jax.tree.map(write, rows, fresh)


def read_rows(
    pool: PoolProgram, sizes: PrefillSizes, arguments: DecodeArguments, joining: JoiningRows
) -> RowPool:
    """Encodes inputs, fills a cache with prompts, and returns the first state of the rows.

    Args:
      pool: static arguments.
      sizes: widths at which they are read.
      arguments: weights, ends of texts, and the processors of the rows.
      joining: the requests.
    """
    program, params = pool.program, arguments.params
    request, sampling = sharding.by_rows((joining.request, joining.sampling))
    encoded = model.EncoderMemory()
    if request.inputs is not None:
        inputs = sharding.by_rows(request.inputs[:, : sizes.inputs])
        read = inputs, request.inputs_length
        encoded = target.encode_inputs(program.cfg, params, *read, program.kv_cache)
    slots = generation.count_slots(program, request)
    if joining.cache is not None:
        cache = load_cache(program, joining.cache, request.prompts_length, slots)
    else:
        prompts = sharding.by_rows(request.prompts[:, : sizes.prompts])
        prompts = Prompts(prompts, request.prompts_length)
        cache = target.prefill(program.cfg, params, encoded, prompts, slots, program.kv_cache)
    encoded = pad_inputs(encoded, pool.inputs)
    rules = arguments.rules._replace(sampling=sampling)
    context = pool_context(pool, arguments, request, encoded, rules)
    drafter_state = program.drafter.begin(context)
    state = initial_state(context, cache, slots, drafter_state)
    return RowPool(request, sampling, encoded, state)


def load_cache(
    program: DecodeProgram,
    cache: chunked_prefill.WholeRows,
    length: Int[Array, " n"],
    slots: int,
) -> tuple[model.CacheStore, ...]:
    """Returns the stores of rows whose prompts are in a cache already.

    Args:
      program: static arguments of the loop.
      cache: the prompts.
      length: their lengths.
      slots: T.
    """
    form, rows = program.kv_cache, len(length)
    stores = model.empty_cache(program.cfg, rows, slots, scan=False, form=form)
    read = chunked_prefill.resize_cache(cache, min(slots, cache[0].slots))
    return tuple(store.load(whole, length) for store, whole in zip(stores, read, strict=True))


def pad_inputs(encoded: model.EncoderMemory, size: int) -> model.EncoderMemory:
    """Pads encoded inputs with keys that are masked, to `size` of them."""
    if encoded.input_mask is None:
        return encoded
    added = size - encoded.input_mask.shape[1]
    return model.EncoderMemory(
        tuple(layer.widen(added) for layer in encoded.cross_kv),
        jnp.pad(encoded.input_mask, ((0, 0), (0, added))),
    )


def pool_context(
    pool: PoolProgram,
    arguments: DecodeArguments,
    request: Request,
    encoded: model.EncoderMemory,
    rules: ChoiceRules,
) -> DecodeContext:
    """Returns what stays constant during a block of steps.

    Args:
      pool: static arguments.
      arguments: weights and ends of texts.
      request: the rows.
      encoded: their encoded inputs.
      rules: by which the next token is chosen.
    """
    decoded = target.make_target(pool.program.cfg, arguments.params, encoded)
    request = request._replace(eos=arguments.request.eos)
    return generation.make_context(pool.program, decoded, request, rules, arguments.weights)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance_pool(
    pool: PoolProgram,
    choice: ChoiceLevel,
    arguments: DecodeArguments,
    rows: RowPool,
    wanted: Bool[Array, " b"],
) -> tuple[RowPool, PoolStep]:
    """Decodes a block of steps, or until every row is done.

    Args:
      pool: static arguments.
      choice: how the rows choose tokens.
      arguments: weights, ends of texts, and processors.
      rows: the pool; donated.
      wanted: False for rows that end now, whatever they have.

    Returns:
      The pool, and the new tokens of the block.
    """
    sampling = None if choice == ChoiceLevel.GREEDY else rows.sampling
    if choice == ChoiceLevel.SAMPLED:
        sampling = rows.sampling._replace(**dict.fromkeys(SELDOM))
    rules = arguments.rules._replace(sampling=sampling)
    context = pool_context(pool, arguments, rows.request, rows.encoded, rules)
    paused = context.stopping._replace(pause=jnp.int32(pool.block))
    # Counted anew in every block: a server runs for more steps than an int32 has.
    before = rows.state._replace(steps=jnp.int32(0), done=rows.state.done | ~wanted)
    state = generation.run_decoding(pool.program, context._replace(stopping=paused), before)
    counts = state.length - before.length

    def take(slots: Shaped[Array, "b T ..."]) -> Shaped[Array, "b N ..."]:
        slots = jnp.pad(slots, ((0, 0), (0, pool.most_tokens), *((0, 0),) * (slots.ndim - 2)))
        return slice_new_tokens(slots, before.length + 1, counts, pool.most_tokens)

    step = PoolStep(
        tokens=take(state.tokens),
        nodes=take(state.token_node),
        counts=counts,
        done=state.done,
        log_probability=state.log_probability,
        passes=state.steps,
        details=jax.tree.map(take, state.details),
    )
    return rows._replace(state=state), jax.tree.map(lambda x: jax.reshard(x, P()), step)
