# SPDX-License-Identifier: Apache-2.0
"""Beam search: the k most probable texts kept per row, finished ones ranked with a length penalty.

A hypothesis is finished when EOS is among the row's k best continuations, and a row is done when it
has k finished ones (as in fairseq and CTranslate2; with one beam this is greedy decoding). Texts
that the limit cuts off count as finished where there are fewer than k. With
config.Decode.early_stopping the rules are those of transformers instead.

  b rows    k beams    T slots of a row    v vocabulary    m continuations of a row
The cache holds the live hypotheses as b * k rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import commit, loop, verification
from t5x_lite.decoding.beam_ranking import (
    BeamHypotheses,
    EarlyStopping,
    EndingRule,
    LengthPenalty,
)
from t5x_lite.decoding.beam_selection import (
    NEVER,
    BeamContinuations,
    GroupRule,
    banked_continuations,
    best_continuations,
    choose_survivors,
    diverse_continuations,
    empty_history,
    record_step,
    take_beams,
)
from t5x_lite.decoding.companions.companion import (
    BlockView,
    combine_logits,
    observe_entropy,
    take_rows,
)
from t5x_lite.decoding.protocol import DecodeContext
from t5x_lite.decoding.steering.processor import Text, draft_paths
from t5x_lite.sharding import spec


class BeamSearch(NamedTuple):
    """Settings of a search.

    Attributes:
      beams: k.
      n_best: number of texts to return per row, at most k.
      penalty: length penalty.
      groups: number of groups of k beams each; every group has rows of its own, b in all.
      diversity: subtracted from a log-probability for each beam of an earlier group that takes the
        token at the same step.
      banks: divides the beams by how much of a constraint they have met.
      recorded: steps whose continuations are kept; 0 for none.
      early_stopping: when the search ends, as in config.Decode.
    """

    beams: int
    n_best: int
    penalty: LengthPenalty
    groups: int = 1
    diversity: Any = 0.0
    banks: bool = False
    recorded: int = 0
    early_stopping: EarlyStopping = None


class BeamState(NamedTuple):
    """State of the search.

    Attributes:
      live: texts that are continued.
      finished: the best texts that have ended.
      length: number of slots of the live texts that are in the cache.
      prompt: length of each prompt.
      done: rows that have ended.
      steps: number of forward passes so far.
      cache: keys and values of the live texts.
      processor_states: state of each logits processor for the live texts.
      history: continuations of each step, [b steps m]; None unless they are recorded.
      companion_state: state of the companion for the live texts; None without one.
    """

    live: BeamHypotheses
    finished: BeamHypotheses
    length: Int[Array, " b"]
    prompt: Int[Array, " b"]
    done: Bool[Array, " b"]
    steps: Int[Array, ""]
    cache: Any
    processor_states: tuple = ()
    history: BeamContinuations | None = None
    companion_state: Any = None


def repeat_rows(x: Array, beams: int) -> Array:
    """Repeats each row of x [b ...] `beams` times in a row: [b * beams, ...]."""
    place = jax.typeof(x).sharding.spec
    return jnp.repeat(x, beams, axis=0, out_sharding=place)


def initial_beams(context: DecodeContext, search: BeamSearch, cache: Any, slots: int) -> BeamState:
    """Returns the first state: the prompt as the first live text, k - 1 of probability 0.

    Args:
      context: constants of the request.
      search: settings.
      cache: cache of the prompts, b * k rows.
      slots: T.
    """
    prompts = context.prompts
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, slots - prompts.tokens.shape[1])))
    text = Text(tokens, prompts.length, prompts.length)
    states = context.processors.begin(text, context.target.vocab)
    limit = context.stopping.limit
    if search.groups > 1:
        spread = functools.partial(repeat_rows, beams=search.groups)
        text, states, limit = jax.tree.map(spread, (text, states, limit))
    tokens, length, rows = text.tokens, text.length, text.length.shape[0]
    tokens = jnp.broadcast_to(tokens[:, None], (rows, search.beams, slots))
    counts = jnp.broadcast_to(length[:, None] * 0, (rows, search.beams))
    none = jnp.where(counts == 0, NEVER, 0.0)
    first = jnp.where(jnp.arange(search.beams) == 0, 0.0, none)
    return BeamState(
        live=BeamHypotheses(tokens, counts, first, first),
        finished=BeamHypotheses(tokens, counts, none, none),
        length=length - 1,
        prompt=length,
        done=length >= limit,
        steps=jnp.int32(0),
        cache=cache,
        processor_states=jax.tree.map(lambda x: repeat_rows(x, search.beams), states),
        history=empty_history(length, search.recorded, count_continuations(context, search)),
    )


def run_beam_search(context: DecodeContext, search: BeamSearch, state: BeamState) -> BeamState:
    """Searches until every row is done.

    Args:
      context: constants of the request, with a target of b * k rows.
      search: settings.
      state: state to start from.

    Returns:
      The last state.
    """

    if search.groups > 1:
        limit = repeat_rows(context.stopping.limit, search.groups)
        context = context._replace(stopping=context.stopping._replace(limit=limit))

    def iterate(state: BeamState) -> BeamState:
        log_probability, state = score_next_tokens(context, search, state)
        best = select_continuations(context, search, state, log_probability)
        if search.recorded:
            state = state._replace(
                history=record_step(state.history, best, state.done, state.steps)
            )
        return advance_beams(context, search, state, best)

    return jax.lax.while_loop(lambda state: jnp.any(~state.done), iterate, state)


def select_continuations(
    context: DecodeContext,
    search: BeamSearch,
    state: BeamState,
    log_probability: Float[Array, "b k v"],
) -> BeamContinuations:
    """Selects the (1 + e) k best continuations, for e EOS ids.

    At most e k of them end a text, so that at least k live on.

    Args:
      context: constants of the request.
      search: settings.
      state: state of the search.
      log_probability: of every next token.
    """
    stopping, total = context.stopping, state.live.log_probability
    count = count_continuations(context, search)
    if search.groups > 1:
        return diverse_continuations(
            log_probability,
            total,
            ~state.done,
            GroupRule(search.groups, search.diversity, count, stopping),
        )
    total = total[:, :, None] + log_probability
    if not search.banks:
        return best_continuations(total, count)
    automaton: Any = context.processors.rules[-1]
    banks = automaton.find_banks(state.processor_states[-1], search.beams)
    banks = jnp.reshape(banks, total.shape, out_sharding=spec("batch length whole"))
    return banked_continuations(total, banks, count)


def count_continuations(context: DecodeContext, search: BeamSearch) -> int:
    """Number m of continuations of a row: (1 + e) k for e EOS ids."""
    return (1 + jnp.atleast_1d(context.stopping.eos).size) * search.beams


def score_next_tokens(
    context: DecodeContext, search: BeamSearch, state: BeamState
) -> tuple[Float[Array, "b k v"], BeamState]:
    """Runs one forward pass over the last token of every live text.

    Args:
      context: constants of the request, with a target of b * k rows.
      search: settings.
      state: state of the search.

    Returns:
      The log-probability of every next token, changed by the companion and the logits processors
      as in transformers, and the state with the token in the caches.
    """
    rows = state.length.shape[0]
    index = repeat_rows(state.length, search.beams)
    here = jnp.arange(state.live.tokens.shape[2]) == state.length[:, None, None]
    root = jnp.sum(jnp.where(here, state.live.tokens, 0), axis=2)
    root = jnp.reshape(root, (rows * search.beams, 1), out_sharding=spec("batch length"))
    view = BlockView(root, index, repeat_rows(state.prompt, search.beams), loop.Plain().tree)
    hidden, cache, inner = verification.forward_block(context, view, state.cache)
    log_probability = jax.nn.log_softmax(context.target.logits(hidden))
    combined = combine_logits(
        context.companion, context.target, state.companion_state, view, inner, log_probability
    )
    log_probability = process_beams(context, search, state, root, combined.logits)[:, 0]
    placed = spec("batch length whole")
    log_probability = jnp.reshape(log_probability, (rows, search.beams, -1), out_sharding=placed)
    companion_state = observe_entropy(combined.state, combined.entropy, jnp.ones_like(index))
    return log_probability, state._replace(cache=cache, companion_state=companion_state)


def process_beams(
    context: DecodeContext,
    search: BeamSearch,
    state: BeamState,
    root: Int[Array, "bk 1"],
    log_probability: Float[Array, "bk 1 v"],
) -> Float[Array, "bk 1 v"]:
    """Applies the logits processors to log-probabilities.

    Args:
      context: constants of the request.
      search: settings.
      state: state of the search.
      root: last token of every live text.
      log_probability: of every next token.
    """
    if not context.processors.rules:
        return log_probability
    tokens = state.live.tokens
    flat = (tokens.shape[0] * search.beams, tokens.shape[2])
    text = Text(
        jnp.reshape(tokens, flat, out_sharding=spec("batch length")),
        repeat_rows(state.length + 1, search.beams),
        repeat_rows(state.prompt, search.beams),
    )
    alone = loop.Plain().tree
    paths = draft_paths(alone.paths, alone.depth, root)
    return context.processors.process(state.processor_states, text, paths, log_probability)


def advance_beams(
    context: DecodeContext, search: BeamSearch, state: BeamState, best: BeamContinuations
) -> BeamState:
    """Extends the texts by one token; rows that are done do not change.

    Args:
      context: constants of the request.
      search: settings.
      state: state of the search, with the cache of the forward pass.
      best: the best continuations.

    Returns:
      The next state.
    """
    stopping = context.stopping
    stops = commit.ends_text(best.token, stopping)
    within = jnp.arange(stops.shape[1]) < search.beams
    full = state.length + 2 >= stopping.limit
    # In transformers a text that the limit cuts off has ended as any other.
    over = stops if search.early_stopping is None else stops | full[:, None]
    ended = best._replace(log_probability=jnp.where(over & within, best.log_probability, NEVER))
    ended = extend_hypotheses(search, state, ended)
    survivors = choose_survivors(best, stops, search.beams, in_order=search.banks)
    live = extend_hypotheses(search, state, survivors)
    finished = merge_hypotheses(search, state.finished, ended)
    if search.early_stopping is None:
        incomplete = full & ~jnp.isfinite(finished.score[:, -1])
        finished = select_rows(incomplete, merge_hypotheses(search, finished, live), finished)
    rule = EndingRule(search.early_stopping, search.penalty)
    ended_early = rule.has_ended(finished, live, stopping.limit - state.prompt)
    return BeamState(
        live=select_rows(state.done, state.live, live),
        finished=select_rows(state.done, state.finished, finished),
        length=state.length + jnp.where(state.done, 0, 1),
        prompt=state.prompt,
        done=state.done | ended_early | full,
        steps=state.steps + 1,
        cache=jax.tree.map(lambda x: take_cache_rows(x, survivors.parent), state.cache),
        processor_states=observe_beams(context, state.processor_states, survivors),
        history=state.history,
        companion_state=take_rows(
            state.companion_state, lambda x: take_cache_rows(x, survivors.parent)
        ),
    )


def observe_beams(context: DecodeContext, states: tuple, survivors: BeamContinuations) -> tuple:
    """Returns the states of the logits processors for the continued texts.

    Args:
      context: constants of the request.
      states: states for the texts before.
      survivors: their continuations.
    """
    states = jax.tree.map(lambda x: take_cache_rows(x, survivors.parent), states)
    size = survivors.token.size
    tokens = jnp.reshape(survivors.token, (size, 1), out_sharding=spec("batch length"))
    return context.processors.observe(states, tokens, jnp.ones_like(tokens[:, 0]))


def extend_hypotheses(
    search: BeamSearch, state: BeamState, best: BeamContinuations
) -> BeamHypotheses:
    """Returns each continuation as a text of its own, scored with the length penalty.

    Args:
      search: settings.
      state: state of the search.
      best: the continuations.
    """
    tokens = take_beams(state.live.tokens, best.parent)
    new = jnp.arange(tokens.shape[2]) == (state.length + 1)[:, None, None]
    tokens = jnp.where(new, best.token[:, :, None], tokens)
    lengths = jnp.broadcast_to((state.length + 2 - state.prompt)[:, None], best.token.shape)
    score = best.log_probability / search.penalty.divisor(lengths)
    return BeamHypotheses(tokens, lengths, best.log_probability, score)


def merge_hypotheses(
    search: BeamSearch, first: BeamHypotheses, second: BeamHypotheses
) -> BeamHypotheses:
    """Returns the k texts of highest score of both, best first.

    Args:
      search: settings.
      first: texts, which come first among equals.
      second: more texts.
    """
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), first, second)
    _, chosen = jax.lax.top_k(both.score, search.beams)
    return jax.tree.map(lambda x: take_beams(x, chosen), both)


def take_cache_rows(x: Array, parent: Int[Array, "b k"]) -> Array:
    """Takes the parents' rows of an array of the cache, [b * k ...]."""
    rows, beams = parent.shape
    place = jax.typeof(x).sharding.spec
    split = jnp.reshape(
        x, (rows, beams, *x.shape[1:]), out_sharding=jax.P(place[0], None, *place[1:])
    )
    return jnp.reshape(take_beams(split, parent), x.shape, out_sharding=place)


def select_rows(
    condition: Bool[Array, " b"], yes: BeamHypotheses, no: BeamHypotheses
) -> BeamHypotheses:
    """Returns `yes` in the rows where the condition holds, `no` in the others.

    Args:
      condition: one value per row.
      yes: texts for the rows where it is True.
      no: texts for the other rows.
    """

    def select(x, y):
        return jnp.where(jnp.expand_dims(condition, range(1, x.ndim)), x, y)

    return jax.tree.map(select, yes, no)
