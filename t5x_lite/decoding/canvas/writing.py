# SPDX-License-Identifier: Apache-2.0
"""Writing of texts block by block: look at a block in one forward pass, choose, keep some tokens.

b rows    w tokens of a block    T slots of a row    L new tokens, at most    v vocabulary

Slot i of a row holds its token at position i; the mask token where none is written. The state at a
token predicts the next one: the inputs of the block that begins at slot i are slots [i-1, i+w-1).
Invariants between passes:
  slots [0, start[b] - 1) of the cache are those of written tokens alone;
  slots from start[b] - 1 on are overwritten before they are read;
  a row that is not done writes at least one token, or completes a block, in every pass;
  a row's text depends on no other row.
A row whose block is full reads it once more, for the cache, unless the last pass read no mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config, model, sharding
from t5x_lite.config.canvas import CommitPolicy, check_canvas_decode, parse_commit
from t5x_lite.config.kv_cache import CacheFormat, parse_kv_cache
from t5x_lite.decoding import sampling, target
from t5x_lite.decoding.canvas.policies import select_places
from t5x_lite.decoding.commit import write_block
from t5x_lite.decoding.generation import place_request, shard_rows
from t5x_lite.decoding.protocol import Prompts, Target
from t5x_lite.decoding.request import Request, bucket_length
from t5x_lite.decoding.result import Result, slice_new_tokens, trim_result
from t5x_lite.decoding.sampling import NoiseKind, SamplingParams, make_sampling_params
from t5x_lite.decoding.verification import token_log_probability
from t5x_lite.model.computation import with_dtype_of


class CanvasProgram(NamedTuple):
    """Static arguments of a compiled program, besides the shapes of its arrays.

    Attributes:
      cfg: config of the model.
      length: L.
      block: w.
      policy: decides which tokens are kept.
      greedy: the most probable token is chosen, not a sampled one.
      kv_cache: form of the caches.
    """

    cfg: config.Model
    length: int
    block: int
    policy: CommitPolicy
    greedy: bool
    kv_cache: CacheFormat


class CanvasContext(NamedTuple):
    """Everything that stays constant while a request is decoded.

    Attributes:
      target: the model, its inputs encoded.
      prompt: [b] length of each prompt.
      limit: [b] most slots of a row, prompt included.
      eos: the id that ends a text, or several of which each does.
      params: how rows are sampled, and the keys of their random order.
      bias: [v] added to the logits; minus infinity for tokens that are never written.
    """

    target: Target
    prompt: Int[Array, " b"]
    limit: Int[Array, " b"]
    eos: Any
    params: SamplingParams
    bias: Float[Array, " v"]


class CanvasState(NamedTuple):
    """Everything that changes from pass to pass.

    Attributes:
      tokens: prompt and new tokens of each row by slot, the mask token where none is written.
      written: slots that hold a token.
      start: first slot of the block in progress.
      end: number of slots of a text that is done, else 0.
      log_probability: of each token when it was chosen.
      token_step: the pass that wrote each slot.
      steps: number of passes so far.
      cache: keys and values of the model.
    """

    tokens: Int[Array, "b T"]
    written: Bool[Array, "b T"]
    start: Int[Array, " b"]
    end: Int[Array, " b"]
    log_probability: Float[Array, "b T"]
    token_step: Int[Array, "b T"]
    steps: Int[Array, ""]
    cache: Any


class BidirectionalBlock(NamedTuple):
    """Shape of a block whose tokens all attend to one another.

    Attributes:
      width: w.
    """

    width: int

    @property
    def is_chain(self) -> bool:
        """True for one token, which attends to itself as that of a chain does."""
        return self.width == 1

    @property
    def depth(self) -> np.ndarray:
        """Position of each token in the block [w]."""
        return np.arange(self.width, dtype=np.int32)

    @property
    def ancestors(self) -> np.ndarray:
        """Mask [w w] of the tokens of the block: True for all pairs."""
        return np.ones((self.width, self.width), bool)


def fill_canvas(cfg: config.Model, params: Any, request: Request, decode: config.Decode) -> Result:
    """Continues each row of a request by filling masked blocks.

    Runs under the mesh in force; rows must be a multiple of `sharding.batch_shards()`.

    Args:
      cfg: config of the model, which has a canvas.
      params: weights from `prepare_params`.
      request: the rows.
      decode: limits, sampling and policy.

    Returns:
      The new tokens, as numpy arrays. `log_probability` sums that of each token when it was chosen,
      which is the text's own in blocks of one token alone.

    Raises:
      ValueError: a field of decode is for text that is written from left to right.
    """
    check_canvas_decode(cfg, decode)
    assert cfg.canvas is not None
    program = CanvasProgram(
        cfg=with_dtype_of(cfg, params),
        length=bucket_length(decode.max_new_tokens),
        block=decode.canvas_block or cfg.canvas.block,
        policy=parse_commit(decode.commit),
        greedy=decode.temperature == 0,
        kv_cache=parse_kv_cache(decode.kv_cache),
    )
    rows = shard_rows(make_sampling_params(request, decode))
    bias = token_bias(cfg, decode, program.block)
    result = compiled_fill(program, params, place_request(request), rows, bias)
    return trim_result(jax.device_get(result), decode)


def token_bias(cfg: config.Model, decode: config.Decode, block: int) -> np.ndarray:
    """Numbers that are added to the logits [v]: of Decode.logit_bias, and minus infinity for tokens
    that are never written, the mask token among them.

    Args:
      cfg: config of the model.
      decode: config of decoding.
      block: w; blocks of one token have no mask.
    """
    bias = np.zeros(cfg.vocab, np.float32)
    for token, value in (decode.logit_bias or {}).items():
        bias[token] += value
    bias[list(decode.suppress_tokens)] = -np.inf
    if block > 1:
        bias[cfg.mask_token_id] = -np.inf
    return bias


@functools.partial(jax.jit, static_argnums=0)
def compiled_fill(
    program: CanvasProgram, params: Any, request: Request, rows: SamplingParams, bias: Array
) -> Result:
    """Decodes a request; temperature, limits and seeds share one executable.

    Args:
      program: static arguments.
      params: weights of the model.
      request: the rows, on the mesh.
      rows: sampling parameters.
      bias: [v], added to the logits.

    Returns:
      The result, replicated, its arrays `program.length` long.
    """
    encoded = model.EncoderMemory()
    if request.inputs is not None:
        inputs = request.inputs, request.inputs_length
        encoded = target.encode_inputs(program.cfg, params, *inputs, program.kv_cache)
    prompts = Prompts(request.prompts, request.prompts_length)
    slots = request.prompts.shape[1] + program.length + program.block
    cache = target.prefill(program.cfg, params, encoded, prompts, slots, program.kv_cache)
    context = CanvasContext(
        target=target.make_target(program.cfg, params, encoded),
        prompt=prompts.length,
        limit=prompts.length + request.limit,
        eos=request.eos,
        params=rows,
        bias=bias,
    )
    state = first_state(program, context, prompts, cache)
    state = jax.lax.while_loop(
        lambda state: jnp.any(state.end == 0), functools.partial(fill_once, program, context), state
    )
    return jax.tree.map(lambda x: jax.reshard(x, P()), canvas_result(program, context, state))


def first_state(
    program: CanvasProgram, context: CanvasContext, prompts: Prompts, cache: Any
) -> CanvasState:
    """Returns the state before the first pass: prompts, and masks behind them.

    Args:
      program: static arguments.
      context: constants of the request.
      prompts: the prompts.
      cache: cache of the prompts.
    """
    width = prompts.tokens.shape[1]
    slots = width + program.length + program.block
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, slots - width)))
    written = jnp.arange(slots) < prompts.length[:, None]
    tokens = jnp.where(written, tokens, program.cfg.mask_token_id)
    return CanvasState(
        tokens=tokens,
        written=written,
        start=prompts.length,
        end=jnp.where(prompts.length >= context.limit, prompts.length, 0),
        log_probability=jnp.zeros_like(tokens, jnp.float32),
        token_step=jnp.zeros_like(tokens),
        steps=jnp.int32(0),
        cache=cache,
    )


def fill_once(program: CanvasProgram, context: CanvasContext, state: CanvasState) -> CanvasState:
    """Makes one pass over the block of every row.

    Args:
      program: static arguments.
      context: constants of the request.
      state: state before the pass.

    Returns:
      The state after it.
    """
    width = program.block
    first = state.start - 1
    inputs = take_slots(state.tokens, first, width)
    is_clean = jnp.all(take_slots(state.written, first, width), axis=1)
    shape: Any = BidirectionalBlock(width)
    hidden, cache = context.target.forward(inputs, first, state.cache, shape)
    logits = context.target.logits(hidden) + context.bias
    slots = state.start[:, None] + jnp.arange(width)
    chosen = sampling.choose_tokens(logits, slots, None if program.greedy else context.params)
    gain = token_log_probability(logits, chosen)
    filled = take_slots(state.written, state.start, width)
    is_open = ~filled & (slots < context.limit[:, None]) & (state.end == 0)[:, None]
    is_open = is_open & before_end(context, state, slots)
    noise = sampling.uniform_noise(context.params, NoiseKind.ORDER, context.prompt, slots)
    kept = select_places(program.policy, gain, noise, is_open)

    def put(values: Array, new: Array) -> Array:
        old = take_slots(values, state.start, width)
        return write_block(values, jnp.where(kept, new, old), state.start)

    state = state._replace(
        tokens=put(state.tokens, chosen),
        written=put(state.written, jnp.ones_like(kept)),
        log_probability=put(state.log_probability, gain),
        token_step=put(state.token_step, jnp.zeros_like(chosen) + state.steps),
        steps=state.steps + 1,
        cache=cache,
    )
    end = jnp.where(state.end == 0, find_end(context, state), state.end)
    is_full = jnp.all(kept | ~is_open, axis=1) & is_clean & (end == 0)
    return state._replace(end=end, start=jnp.where(is_full, state.start + width, state.start))


def is_end(context: CanvasContext, state: CanvasState) -> Bool[Array, "b T"]:
    """Returns True for the slots of new tokens that end a text."""
    ends = jnp.any(state.tokens[..., None] == jnp.atleast_1d(context.eos), axis=-1)
    is_new = jnp.arange(state.tokens.shape[1]) >= context.prompt[:, None]
    return ends & is_new & state.written


def before_end(
    context: CanvasContext, state: CanvasState, slots: Int[Array, "b w"]
) -> Bool[Array, "b w"]:
    """Returns True for slots before the first end: no text has those behind it.

    Args:
      context: constants of the request.
      state: state of the loop.
      slots: numbers of slots.
    """
    ends = is_end(context, state)
    first = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1), ends.shape[1])
    return slots < first[:, None]


def find_end(context: CanvasContext, state: CanvasState) -> Int[Array, " b"]:
    """Returns the number of slots of each text that is whole, up to its end or limit, else 0."""
    places = jnp.arange(state.tokens.shape[1])
    missing = ~state.written & (places < context.limit[:, None])
    gap = jnp.where(jnp.any(missing, axis=1), jnp.argmax(missing, axis=1), context.limit)
    ends = is_end(context, state) & (places < gap[:, None])
    end = jnp.where(gap >= context.limit, context.limit, 0)
    return jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, end)


def take_slots(values: Array, first: Int[Array, " b"], width: int) -> Array:
    """Takes `width` slots of each row.

    Args:
      values: [b T] numbers by slot.
      first: [b] the first slot.
      width: number of slots.
    """

    def take(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, width)

    return sharding.by_rows(jax.vmap(take)(values, first))


def canvas_result(program: CanvasProgram, context: CanvasContext, state: CanvasState) -> Result:
    """Returns the text that each row has after its prompt.

    Args:
      program: static arguments.
      context: constants of the request.
      state: the last state.
    """
    lengths = state.end - context.prompt

    def new(slots):
        return slice_new_tokens(slots, context.prompt, lengths, program.length)[:, None]

    total = jnp.sum(new(state.log_probability), axis=2)
    return Result(
        tokens=new(state.tokens),
        lengths=lengths[:, None],
        scores=total,
        log_probability=total,
        steps=state.steps,
        token_step=new(state.token_step),
        token_node=jnp.zeros_like(new(state.tokens)),
    )
