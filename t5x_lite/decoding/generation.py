# SPDX-License-Identifier: Apache-2.0
"""From a request to ids: encode the inputs, fill the cache, run the loop, return the new tokens.

b rows    T slots of a row    L new tokens, at most
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model, sharding
from t5x_lite.config.canvas import check_left_to_right
from t5x_lite.config.kv_cache import CacheFormat
from t5x_lite.decoding import beam, loop, target
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.adaptive.adaptive_loop import begin_adaptive, run_adaptive_loop
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.beam_ranking import EarlyStopping, LengthPenalty, make_length_penalty
from t5x_lite.decoding.companions.companion import Companion, CompanionState
from t5x_lite.decoding.companions.rows import place_companion
from t5x_lite.decoding.initial_state import initial_state, take_first_samples
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Drafter,
    Prompts,
    StoppingCriteria,
    Target,
)
from t5x_lite.decoding.request import Request, bucket_length, count_samples
from t5x_lite.decoding.result import Result, beam_result, loop_result, trim_result
from t5x_lite.decoding.sampling import make_sampling_params
from t5x_lite.decoding.steering.build import ChoiceRules, make_processors
from t5x_lite.decoding.steering.stop_strings import StopStrings
from t5x_lite.model.computation import with_dtype_of


class DecodeProgram(NamedTuple):
    """Static arguments of a compiled program, besides the shapes of its arrays.

    Attributes:
      cfg: config of the model.
      length: L.
      beams: beams of a row; 1 for the decoding loop.
      n_best: texts to return per row.
      drafter: the drafter.
      accept: the acceptance rule.
      samples: rows in a row that continue the same inputs and prompt.
      logprobs: how many alternatives of each token to return; None for no TokenDetails.
      groups: groups that the beams are divided into.
      banks: divides the beams by how much of a constraint they have met.
      early_stopping: when a search ends, as in config.Decode.
      kv_cache: form of the model's caches; draft models and companions have theirs as computed.
    """

    cfg: config.Model
    length: int
    beams: int
    n_best: int
    drafter: Drafter
    accept: exact.Acceptance
    samples: int = 1
    logprobs: int | None = None
    groups: int = 1
    banks: bool = False
    early_stopping: EarlyStopping = None
    kv_cache: CacheFormat = model.WHOLE


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
    program = make_program(with_dtype_of(cfg, params), decode, drafting)
    placed = place_request(request)
    rules = make_rules(request, decode)
    penalty = make_length_penalty(decode)
    result = compiled_generate(program, params, placed, rules, penalty, drafting.weights)
    return trim_result(jax.device_get(result), decode)


def make_program(
    cfg: config.Model, decode: config.Decode, drafting: Drafting = PLAIN
) -> DecodeProgram:
    """Returns the static arguments of a request's program.

    Args:
      cfg: config of the model, of the dtype of its prepared weights.
      decode: limits and beams.
      drafting: drafter and acceptance rule.

    Raises:
      ValueError: the model fills masked blocks.
    """
    check_left_to_right(cfg, "Decoding token by token, as streams, searches and servers do,")
    banks = decode.beams > decode.beam_groups == 1 and bool(decode.force_words)
    # Improbable texts that have all words end first, and are not to end the search.
    ending = False if banks and decode.early_stopping is None else decode.early_stopping
    return DecodeProgram(
        cfg=cfg,
        length=bucket_length(decode.max_new_tokens),
        beams=decode.beams,
        n_best=decode.n_best,
        drafter=drafting.drafter,
        accept=drafting.accept,
        samples=count_samples(decode),
        logprobs=decode.logprobs,
        groups=decode.beam_groups,
        banks=banks,
        early_stopping=ending,
        kv_cache=target.cache_format(decode, drafting.drafter.tree),
    )


def place_request(request: Request) -> Request:
    """Splits the rows of a request over the mesh; its tables are left out (`make_rules`)."""
    rows = request.drop_shared()._replace(healing_start=None, spans=None)
    return shard_rows(rows)._replace(eos=request.eos)


def make_rules(request: Request, decode: config.Decode) -> ChoiceRules:
    """Returns the rules of a config for the rows of a request, on the mesh."""
    processors = make_processors(decode, request)
    arrays: Any = request.stop
    strings = None if arrays is None else StopStrings(*arrays)
    companion = place_companion(request.companion, shard_rows)
    if decode.temperature == 0:
        diversity: Any = np.float32(decode.diversity_penalty) if decode.beam_groups > 1 else None
        return ChoiceRules(None, processors, strings, diversity, companion)
    sampling = shard_rows(make_sampling_params(request, decode))
    return ChoiceRules(sampling, processors, strings, companion=companion)


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
    penalty: LengthPenalty,
    weights: Any,
) -> Result:
    """Decodes a request; temperature, limits, seeds and penalties share one executable.

    Args:
      program: static arguments.
      params: weights of the model.
      request: the rows, on the mesh.
      rules: by which the next token is chosen.
      penalty: length penalty, float32.
      weights: the drafter's own weights.

    Returns:
      The result, replicated, its arrays `program.length` long.
    """
    if program.beams > 1:
        state, search = run_beams(program, params, request, rules, penalty)
        result = beam_result(state, search, program.length)
    else:
        encoded, cache = read_request(program, params, request)
        decoded = target.make_target(program.cfg, params, encoded)
        context = make_context(program, decoded, request, rules, weights)
        state = initial_state(context, cache, context.slots, program.drafter.begin(context))
        companion_state = begin_companion(program, request, rules.companion)
        state = state._replace(companion_state=companion_state)
        state = begin_drafting(context, program.drafter, state)
        state = run_decoding(program, context, state)
        result = loop_result(state, context.prompts, program.length, penalty)
    return jax.tree.map(lambda x: jax.reshard(x, P()), result)


def run_beams(
    program: DecodeProgram,
    params: Any,
    request: Request,
    rules: ChoiceRules,
    penalty: LengthPenalty,
    recorded: int = 0,
) -> tuple[beam.BeamState, beam.BeamSearch]:
    """Searches with beams.

    Args:
      program: static arguments.
      params: weights of the model.
      request: the rows, on the mesh.
      rules: by which the next token is chosen.
      penalty: length penalty.
      recorded: steps whose continuations are kept.

    Returns:
      The last state, and the settings of the search.
    """
    encoded, cache = read_request(program, params, request)
    decoded = target.make_target(program.cfg, params, encoded)
    context = make_context(program, decoded, request, rules, None)
    search = beam.BeamSearch(
        beams=program.beams // program.groups,
        n_best=program.n_best,
        penalty=penalty,
        groups=program.groups,
        diversity=rules.diversity,
        banks=program.banks,
        recorded=recorded,
        early_stopping=program.early_stopping,
    )
    state = beam.initial_beams(context, search, cache, context.slots)
    state = state._replace(companion_state=begin_companion(program, request, rules.companion))
    return beam.run_beam_search(context, search, state), search


def read_request(
    program: DecodeProgram, params: Any, request: Request
) -> tuple[model.EncoderMemory, Any]:
    """Encodes the inputs and fills a cache with the prompts, once for all texts that share them.

    Args:
      program: static arguments.
      params: weights of the model.
      request: the rows, on the mesh.

    Returns:
      The encoded inputs and the cache, a row for each sample or beam.
    """
    slots = count_slots(program, request)
    if program.samples > 1:
        request = jax.tree.map(
            functools.partial(take_first_samples, samples=program.samples),
            request._replace(eos=None),
        )
    encoded = model.EncoderMemory()
    if request.inputs is not None:
        inputs = request.inputs, request.inputs_length
        encoded = target.encode_inputs(program.cfg, params, *inputs, program.kv_cache)
    prompts = Prompts(request.prompts, request.prompts_length)
    cache = target.prefill(program.cfg, params, encoded, prompts, slots, program.kv_cache)
    texts = program.samples * program.beams
    if texts == 1:
        return encoded, cache
    repeat = functools.partial(beam.repeat_rows, beams=texts)
    return jax.tree.map(repeat, (encoded, cache))


def begin_companion(
    program: DecodeProgram, request: Request, companion: Companion | None
) -> CompanionState | None:
    """Reads the prompts of the companion, once for all texts that share them.

    Args:
      program: static arguments.
      request: the rows, on the mesh.
      companion: the companion; None for none.

    Returns:
      Its first state, a row for each sample or beam; None without a companion.
    """
    if companion is None:
        return None
    prompts = Prompts(request.prompts, request.prompts_length)
    if program.samples > 1:
        prompts = jax.tree.map(
            functools.partial(take_first_samples, samples=program.samples), prompts
        )
    state = companion.begin(prompts, count_slots(program, request))
    texts = program.samples * program.beams
    if texts == 1:
        return state
    return jax.tree.map(functools.partial(beam.repeat_rows, beams=texts), state)


def count_slots(program: DecodeProgram, request: Request) -> int:
    """Slots of a row, T: its prompt, its new tokens, and a block after them."""
    return request.prompts.shape[1] + program.length + program.drafter.tree.width


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
        stopping=StoppingCriteria(
            request.eos, request.prompts_length + request.limit, strings=rules.strings
        ),
        prompts=Prompts(request.prompts, request.prompts_length),
        inputs=request.inputs,
        inputs_length=request.inputs_length,
        weights=weights,
        slots=count_slots(program, request),
        sampling=rules.sampling,
        processors=rules.processors,
        companion=rules.companion,
        logprobs=program.logprobs,
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
