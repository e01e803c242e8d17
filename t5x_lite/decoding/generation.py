# SPDX-License-Identifier: Apache-2.0
"""From a request to ids: encode the inputs, fill the cache, run the loop, return the new tokens.

b rows    n texts per row    T slots of a row    L new tokens, at most
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from t5x_lite import config, model, sharding
from t5x_lite.decoding import beam, loop, target
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.adaptive.adaptive_loop import begin_adaptive, run_adaptive_loop
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Drafter,
    Prompts,
    StoppingCriteria,
    Target,
)
from t5x_lite.decoding.request import Request, bucket_length
from t5x_lite.decoding.sampling import make_sampling_params
from t5x_lite.decoding.steering.build import ChoiceRules, make_processors
from t5x_lite.decoding.steering.processor import Text


class Result(NamedTuple):
    """Decoded texts, the best one first: jax arrays of a program, numpy arrays once fetched.

    Attributes:
      tokens: [b n L], padded with 0.
      lengths: [b n], EOS counted.
      scores: [b n], log_probability over the length penalty; ranks beams.
      log_probability: [b n], summed over the tokens.
      steps: number of forward passes.
      token_step: [b n L], the forward pass that wrote each token; None after beam search.
      token_node: [b n L], the node of the block whose draft a token was, 0 for the model's own
        choice; None after beam search.
    """

    tokens: Any
    lengths: Any
    scores: Any
    log_probability: Any
    steps: Any
    token_step: Any = None
    token_node: Any = None


class DecodeProgram(NamedTuple):
    """Static arguments of a compiled program, besides the shapes of its arrays.

    Attributes:
      cfg: config of the model.
      length: L.
      beams: beams of a row; 1 for the decoding loop.
      n_best: texts to return per row.
      drafter: the drafter.
      accept: the acceptance rule.
    """

    cfg: config.Model
    length: int
    beams: int
    n_best: int
    drafter: Drafter
    accept: exact.Acceptance


class Drafting(NamedTuple):
    """A drafter with its weights and the rule that accepts its drafts.

    Attributes:
      drafter: the drafter.
      weights: its own weights, any tree of arrays, or None.
      accept: the acceptance rule.
    """

    drafter: Drafter = loop.Plain()
    weights: Any = None
    accept: exact.Acceptance = exact.Exact()


PLAIN = Drafting()


def generate(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: Drafting = PLAIN,
) -> Result:
    """Continues each row of a request, on the device from the first token to the last.

    Runs under the mesh in force; rows must be a multiple of `sharding.batch_shards()`.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: the rows.
      decode: limits, sampling and beams.
      drafting: changes how many forward passes are needed and, if its acceptance is exact, no
        token.

    Returns:
      The new tokens, as numpy arrays.
    """
    program = make_program(cfg, decode, drafting)
    placed = place_request(request)
    rules = make_rules(request, decode)
    alpha = jnp.float32(decode.alpha)
    result = compiled_generate(program, params, placed, rules, alpha, drafting.weights)
    return trim_result(jax.device_get(result), max(decode.max_new_tokens, 1))


def make_program(
    cfg: config.Model, decode: config.Decode, drafting: Drafting = PLAIN
) -> DecodeProgram:
    """Returns the static arguments of a request's program.

    Args:
      cfg: config of the model.
      decode: limits and beams.
      drafting: drafter and acceptance rule.
    """
    return DecodeProgram(
        cfg=target.with_cpu_dtype(cfg),
        length=bucket_length(decode.max_new_tokens),
        beams=decode.beams,
        n_best=decode.n_best,
        drafter=drafting.drafter,
        accept=drafting.accept,
    )


def place_request(request: Request) -> Request:
    """Splits the rows of a request over the mesh; its constraint is left out (`make_rules`)."""
    return shard_rows(request._replace(eos=None, constraint=None))._replace(eos=request.eos)


def trim_result(result: Result, length: int) -> Result:
    """Cuts the arrays of a result, whose L is a bucket, to `length` tokens."""
    arrays = {
        name: getattr(result, name)[:, :, :length]
        for name in ("tokens", "token_step", "token_node")
        if getattr(result, name) is not None
    }
    return result._replace(steps=int(result.steps), **arrays)


def make_rules(request: Request, decode: config.Decode) -> ChoiceRules:
    """Returns the rules of a config for the rows of a request, on the mesh."""
    processors = make_processors(decode, request)
    if decode.temperature == 0:
        return ChoiceRules(processors=processors)
    return ChoiceRules(shard_rows(make_sampling_params(request, decode)), processors)


def shard_rows(rows: Any) -> Any:
    """Splits arrays, complete on every process, over the mesh by rows.

    Raises:
      ValueError: the rows cannot be split evenly.
    """
    shards = sharding.batch_shards()

    def split(array):
        if len(array) % shards:
            raise ValueError(
                f"{len(array)} rows cannot be split over {shards} parts of the mesh: fill up the "
                "batch to a multiple"
            )
        axes = "batch length" if array.ndim == 2 else "batch"
        return sharding.place_whole(array, sharding.named_sharding(axes))

    return jax.tree.map(split, rows)


@functools.partial(jax.jit, static_argnums=0)
def compiled_generate(
    program: DecodeProgram,
    params: Any,
    request: Request,
    rules: ChoiceRules,
    alpha: Array,
    weights: Any,
) -> Result:
    """Decodes a request; temperature, limits, seeds and penalties share one executable.

    Args:
      program: static arguments.
      params: weights of the model.
      request: the rows, on the mesh.
      rules: by which the next token is chosen.
      alpha: exponent of the length penalty, float32.
      weights: the drafter's own weights.

    Returns:
      The result, replicated, its arrays `program.length` long.
    """
    cfg = program.cfg
    encoded = model.EncoderMemory()
    if request.inputs is not None:
        encoded = target.encode_inputs(cfg, params, request.inputs, request.inputs_length)
    decoded = target.make_target(cfg, params, encoded)
    context = make_context(program, decoded, request, rules, weights)
    prompts, slots = context.prompts, context.slots
    cache = target.prefill(cfg, params, encoded, prompts, slots)
    if program.beams > 1:
        repeat = functools.partial(beam.repeat_rows, beams=program.beams)
        encoded, cache = jax.tree.map(repeat, (encoded, cache))
        search = beam.BeamSearch(program.beams, program.n_best, alpha)
        context = context._replace(target=target.make_target(cfg, params, encoded))
        state = beam.initial_beams(context, search, cache, slots)
        state = beam.run_beam_search(context, search, state)
        result = beam_result(state, search, program.length)
    else:
        state = initial_state(context, cache, slots, program.drafter.begin(context))
        state = begin_drafting(context, program.drafter, state)
        result = loop_result(run_decoding(program, context, state), prompts, program.length, alpha)
    return jax.tree.map(lambda x: jax.reshard(x, P()), result)


def make_context(
    program: DecodeProgram,
    decoded: Target,
    request: Request,
    rules: ChoiceRules,
    weights: Any,
) -> DecodeContext:
    """Collects what stays constant while a request is decoded.

    Args:
      program: static arguments.
      decoded: the model, its inputs encoded.
      request: the rows.
      rules: by which the next token is chosen.
      weights: the drafter's own weights.

    Returns:
      The context.
    """
    return DecodeContext(
        target=decoded,
        stopping=StoppingCriteria(request.eos, request.prompts_length + request.limit),
        prompts=Prompts(request.prompts, request.prompts_length),
        inputs=request.inputs,
        inputs_length=request.inputs_length,
        weights=weights,
        slots=request.prompts.shape[1] + program.length + program.drafter.tree.width,
        sampling=rules.sampling,
        processors=rules.processors,
    )


def begin_drafting(context: DecodeContext, drafter: Drafter, state: DecodeState) -> DecodeState:
    """Chooses the first width of an adaptive drafter; any other has nothing to choose.

    Args:
      context: constants of the request.
      drafter: the drafter.
      state: state of the loop, with the drafter's first state.
    """
    return begin_adaptive(context, drafter, state) if isinstance(drafter, Adaptive) else state


def run_decoding(program: DecodeProgram, context: DecodeContext, state: DecodeState) -> DecodeState:
    """Decodes until every row is done, or paused.

    Args:
      program: static arguments.
      context: constants of the request.
      state: state to start from.

    Returns:
      The last state.
    """
    if isinstance(program.drafter, Adaptive):
        return run_adaptive_loop(context, program.drafter, program.accept, state)
    return loop.run_loop(context, program.drafter, program.accept, state)


def initial_state(
    context: DecodeContext, cache: Any, slots: int, drafter_state: Any
) -> DecodeState:
    """Returns the loop's first state, all but the last token of each prompt in the cache.

    Args:
      context: constants of the request.
      cache: cache of the prompts.
      slots: T.
      drafter_state: the drafter's first state.
    """
    prompts = context.prompts
    tokens = prompts.tokens
    last = jnp.arange(tokens.shape[1]) == prompts.length[:, None] - 1
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
    text = Text(tokens, prompts.length, prompts.length)
    return DecodeState(
        tokens=tokens,
        length=prompts.length - 1,
        root=jnp.sum(jnp.where(last, prompts.tokens, 0), axis=1),
        done=prompts.length >= context.stopping.limit,
        log_probability=jnp.zeros_like(prompts.length, jnp.float32),
        token_step=jnp.zeros_like(tokens),
        token_node=jnp.zeros_like(tokens),
        steps=jnp.int32(0),
        cache=cache,
        drafter_state=drafter_state,
        processor_states=context.processors.begin(text, context.target.vocab),
    )


def loop_result(state: DecodeState, prompts: Prompts, length: int, alpha: Array) -> Result:
    """Returns the text that each row has after its prompt.

    Args:
      state: state of the loop.
      prompts: the prompts.
      length: L.
      alpha: exponent of the length penalty.
    """
    lengths = state.length + 1 - prompts.length

    def new(slots):
        return slice_new_tokens(slots, prompts.length, lengths, length)[:, None]

    scores = state.log_probability / beam.length_penalty(lengths, alpha)
    return Result(
        tokens=new(state.tokens),
        lengths=lengths[:, None],
        scores=scores[:, None],
        log_probability=state.log_probability[:, None],
        steps=state.steps,
        token_step=new(state.token_step),
        token_node=new(state.token_node),
    )


def beam_result(state: beam.BeamState, search: beam.BeamSearch, length: int) -> Result:
    """Returns the n best finished texts of each row.

    Args:
      state: last state of the search.
      search: its settings.
      length: L.
    """
    finished = jax.tree.map(lambda x: x[:, : search.n_best], state.finished)

    def new(tokens, lengths):
        return slice_new_tokens(tokens, state.prompt, lengths, length)

    return Result(
        tokens=jax.vmap(new, in_axes=1, out_axes=1)(finished.tokens, finished.lengths),
        lengths=finished.lengths,
        scores=finished.score,
        log_probability=finished.log_probability,
        steps=state.steps,
    )


def slice_new_tokens(
    tokens: Int[Array, "b T"], start: Int[Array, " b"], lengths: Int[Array, " b"], size: int
) -> Int[Array, "b L"]:
    """Takes the slots after the prompts.

    Args:
      tokens: the rows, of tokens or of any other numbers per slot.
      start: first slot after each prompt.
      lengths: how many slots of each row to keep; those after them are set to 0.
      size: L.

    Returns:
      The slots start[b], start[b] + 1, ...
    """

    def take(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, size)

    tokens = jax.vmap(take)(tokens, start)
    return jnp.where(jnp.arange(size) < lengths[:, None], tokens, 0)
