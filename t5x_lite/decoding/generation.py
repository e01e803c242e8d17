# SPDX-License-Identifier: Apache-2.0
"""From a request to ids: read the inputs, fill the cache, run the loop, hand back what is new."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, model, sharding
from t5x_lite.decoding import acceptance, beam, loop, target, widths
from t5x_lite.decoding.protocol import Drafter, Prompts, Rules, Setting, State, Target
from t5x_lite.decoding.request import Request, bucket
from t5x_lite.decoding.sampling import Sampling


class Result(NamedTuple):
    """New tokens [b n L], padded with 0, best first; their lengths [b n], EOS counted.

    log_probability [b n] sums over the tokens; scores [b n] are log_probability over the length
    penalty, which is what beams are ranked by. calls is how many forward passes it took; call and
    node [b n L] say of each token in which of them it was written and which node of the block had
    guessed it (0: none; None after beam search).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    log_probability: np.ndarray
    calls: int
    call: np.ndarray | None = None
    node: np.ndarray | None = None


class Shape(NamedTuple):
    """What an executable is compiled for, besides the shapes of its arguments."""

    cfg: config.Model
    length: int
    beams: int
    n_best: int
    drafter: Drafter
    accept: acceptance.Acceptance


class Drafting(NamedTuple):
    """Who drafts, with the weights it needs, and which of its guesses are accepted."""

    drafter: Drafter = loop.Plain()
    weights: Any = None
    accept: acceptance.Acceptance = acceptance.Exact()


PLAIN = Drafting()


def generate(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: Drafting = PLAIN,
) -> Result:
    """What the model writes after each row of the request, decided on the device alone.

    params come from `prepare`. drafting changes how many forward passes that takes and, as long as
    its acceptance is exact, no token. Runs under the mesh in force; rows must be a multiple
    of `sharding.batch_shards()`.
    """
    how = (decode.beams, decode.n_best, drafting.drafter, drafting.accept)
    shape = Shape(target.precise(cfg), bucket(decode.length), *how)
    placed = place(request._replace(eos=None))
    draws = place(draw(request, decode)) if decode.temperature > 0 else None
    alpha = jnp.float32(decode.alpha)
    result = compiled(
        shape, params, placed._replace(eos=request.eos), draws, alpha, drafting.weights
    )
    result = jax.device_get(result)
    length = int(max(decode.length, 1))
    each = {name: getattr(result, name) for name in ("tokens", "call", "node")}
    cut = {name: None if rows is None else rows[:, :, :length] for name, rows in each.items()}
    return result._replace(calls=int(result.calls), **cut)


def draw(request: Request, decode: config.Decode) -> Sampling:
    """How each row of the request draws."""
    rows = len(request.row)
    return Sampling(
        temperature=np.full(rows, decode.temperature, np.float32),
        top_k=np.full(rows, decode.top_k, np.int32),
        top_p=np.full(rows, decode.top_p, np.float32),
        seed=request.seed,
        row=request.row,
    )


def place(rows: Any) -> Any:
    """Arrays that every process holds whole, split over the mesh by rows.

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
        named = sharding.named(axes)
        return jax.make_array_from_callback(array.shape, named, lambda part: array[part])

    return jax.tree.map(split, rows)


@functools.partial(jax.jit, static_argnums=0)
def compiled(shape: Shape, params, request: Request, draws, alpha, weights) -> Result:
    """One executable per shape: temperature, limits, seeds and penalties do not change it."""
    read = model.Read()
    if request.inputs is not None:
        read = target.read(shape.cfg, params, request.inputs, request.inputs_length)
    setting = set_up(shape, target.of(shape.cfg, params, read), request, draws, weights)
    prompts, rules, slots = setting.prompts, setting.rules, setting.slots
    cache = target.prefill(shape.cfg, params, read, prompts, slots)
    if shape.beams > 1:
        read, cache = jax.tree.map(lambda x: beam.spread(x, shape.beams), (read, cache))
        search = beam.Search(shape.beams, shape.n_best, alpha)
        state = beam.start(search, prompts, rules, cache, slots)
        state = beam.run(target.of(shape.cfg, params, read), search, rules, state)
        result = ranked(state, search, shape.length)
    else:
        state = started(setting, cache, slots, shape.drafter.begin(setting))
        result = written(run(shape, setting, state), prompts, shape.length, alpha)
    return jax.tree.map(lambda x: jax.reshard(x, P()), result)


def set_up(shape: Shape, asked: Target, request: Request, draws, weights) -> Setting:
    """What stays the same while the request is put to a model, its inputs read."""
    return Setting(
        asked,
        Rules(request.eos, request.prompts_length + request.limit, draws),
        Prompts(request.prompts, request.prompts_length),
        request.inputs,
        request.inputs_length,
        weights,
        request.prompts.shape[1] + shape.length + shape.drafter.tree.width,
    )


def run(shape: Shape, setting: Setting, state: State) -> State:
    """The state when every row is done, or when the rules want a pause."""
    adapts = isinstance(shape.drafter, widths.Adaptive)
    return (widths if adapts else loop).run(setting, shape.drafter, shape.accept, state)


def started(setting: Setting, cache, slots: int, memory) -> State:
    """The loop's first state: everything but the last token of each prompt is in the cache."""
    prompts, rules = setting.prompts, setting.rules
    tokens = prompts.tokens
    last = jnp.arange(tokens.shape[1]) == prompts.length[:, None] - 1
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
    return State(
        tokens=tokens,
        length=prompts.length - 1,
        root=jnp.sum(jnp.where(last, prompts.tokens, 0), axis=1),
        done=prompts.length >= rules.limit,
        log_probability=jnp.zeros_like(prompts.length, jnp.float32),
        call=jnp.zeros_like(tokens),
        node=jnp.zeros_like(tokens),
        calls=jnp.int32(0),
        cache=cache,
        memory=memory,
    )


def written(state: State, prompts: Prompts, length: int, alpha) -> Result:
    """What each row wrote after its prompt."""
    lengths = state.length + 1 - prompts.length
    new = lambda slots: since(slots, prompts.length, lengths, length)[:, None]
    scores = state.log_probability / beam.penalty(lengths, alpha)
    each = (x[:, None] for x in (lengths, scores, state.log_probability))
    return Result(new(state.tokens), *each, state.calls, new(state.call), new(state.node))


def ranked(state: beam.State, search: beam.Search, length: int) -> Result:
    """The best n finished texts of each row."""
    tokens, lengths, log_probability, scores = jax.tree.map(
        lambda x: x[:, : search.n_best], state.finished
    )
    cut = lambda tokens, lengths: since(tokens, state.prompt, lengths, length)
    tokens = jax.vmap(cut, in_axes=1, out_axes=1)(tokens, lengths)
    return Result(tokens, lengths, scores, log_probability, state.calls)


def since(tokens, start, lengths, size: int):
    """tokens [b T] from slot start[b] on, `size` of them, those from lengths[b] on set to 0."""
    take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size)
    tokens = jax.vmap(take)(tokens, start)
    return jnp.where(jnp.arange(size) < lengths[:, None], tokens, 0)
