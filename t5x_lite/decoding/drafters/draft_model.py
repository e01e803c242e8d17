# SPDX-License-Identifier: Apache-2.0
"""A smaller model of the same vocabulary drafts (Leviathan et al., 2023, arXiv 2211.17192).

b rows    w nodes of a block    s inputs    v vocabulary
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite import config, model
from t5x_lite.decoding import sampling
from t5x_lite.decoding import target as targets
from t5x_lite.decoding.drafters import guessing
from t5x_lite.decoding.protocol import Prompts, Setting, State, Tree, Verdict, chain


class Memory(NamedTuple):
    """What the draft model has read and written.

    It was prompted in its own way: prompt [b] counts its tokens, of which `last` is the last, and
    what follows stands `later` slots after where the target has it.
    """

    read: Any
    cache: Any
    prompt: Int[Array, " b"]
    last: Int[Array, " b"]
    later: Int[Array, " b"]


@dataclass(frozen=True)
class DraftModel:
    """Guesses a chain with the model `cfg`, whose weights, from `prepare`, are the drafting's own.

    Both models may have an encoder or not: what the target was given (the encoder's inputs, or the
    prompt) is what the draft model is given, in its own way. `target` is the target's config.
    Its cache is rolled back by the length of the text alone: slots behind it are written again. In
    a union it reads what every call wrote, one pass more.

      Drafting(DraftModel(small, large, chain(5)), prepare(small, small_params))

    Raises:
      ValueError: the target has no decoder to draft for, or the draft model none to draft with.
    """

    cfg: config.Model
    target: config.Model
    tree: Tree = chain(5)
    drawn: bool = False
    top: int = 0

    def __post_init__(self):
        for whose, cfg in (("The draft model", self.cfg), ("The target", self.target)):
            if cfg.decoder is None:
                raise ValueError(f"{whose} is an encoder alone: it writes no text")
        if self.tree.width < 2:
            raise ValueError("A draft model that guesses nothing: DraftModel.tree is one node wide")

    def begin(self, setting: Setting) -> Memory:
        """The draft model's own reading of the request, and its cache with the prompts in it."""
        cfg, params = targets.precise(self.cfg), setting.weights
        given, length = self.given(setting)
        # Without a start, an empty prompt goes on after its padding.
        read, prompts = model.Read(), Prompts(given, jnp.maximum(length, 1))
        if cfg.encoder is not None:
            read = targets.read(cfg, params, given, length)
            start = jnp.full_like(given[:, :1], cfg.start)
            prompts = Prompts(start, jnp.ones_like(length))
        elif cfg.starts_prompts:
            start = jnp.full_like(given[:, :1], cfg.start)
            prompts = Prompts(jnp.concatenate([start, given], axis=1), length + 1)
        # As many slots after the prompts as the target has.
        slots = prompts.tokens.shape[1] + setting.slots - setting.prompts.tokens.shape[1]
        cache = targets.prefill(cfg, params, read, prompts, slots)
        here = jnp.arange(prompts.tokens.shape[1]) == prompts.length[:, None] - 1
        last = jnp.sum(jnp.where(here, prompts.tokens, 0), axis=1)
        return Memory(read, cache, prompts.length, last, prompts.length - setting.prompts.length)

    def given(self, setting: Setting) -> tuple[Int[Array, "b s"], Int[Array, " b"]]:
        """What the request asks to be read or continued, without a start, and its lengths."""
        if setting.inputs is not None:
            return self.known(setting.inputs), setting.inputs_length
        tokens, length = setting.prompts
        if self.target.starts_prompts:
            return self.known(jnp.roll(tokens, -1, axis=1)), length - 1
        return self.known(tokens), length

    def known(self, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
        """tokens, those that the draft model has not (padding of the other table) as its last."""
        return jnp.minimum(tokens, self.cfg.vocab - 1)

    def propose(self, setting: Setting, memory: Memory, state: State):
        # The guess that ended a block which was right to its end is not in the cache yet. So first
        # come two tokens, the one before the root again; in the prompt there is nothing to mend.
        ended = setting.prompts.length - 1
        before = jnp.maximum(state.length - 1, ended)
        take = jax.vmap(lambda row, place: jax.lax.dynamic_slice(row, (place,), (2,)))
        pair = take(state.tokens, before)
        prompted = (before == ended)[:, None] & (jnp.arange(2) == 0)
        pair = jnp.where(prompted, memory.last[:, None], pair)

        def first(token, number, cache):
            hidden, cache = self.written(setting, memory, pair, before, cache)
            second = (state.length > before)[:, None, None]
            return self.logits(setting, jnp.where(second, hidden[:, 1:], hidden[:, :1])), cache

        def step(token, number, cache):
            index = state.length + number
            hidden, cache = self.written(setting, memory, token[:, None], index, cache)
            return self.logits(setting, hidden), cache

        how = guessing.Guesser(self.tree.width - 1, step, first, self.drawn)
        draft, cache = guessing.guesses(setting, state, how, memory.cache)
        return draft, memory._replace(cache=cache)

    def written(self, setting: Setting, memory: Memory, tokens, index, cache):
        """Hidden states of tokens, which the target has from slot index on, and the cache with
        them in it."""
        index = index + memory.later
        block = model.Block(self.known(tokens), index, prefix=memory.prompt)
        return self.apply(setting, block, cache, memory.read, method="decode")

    def logits(self, setting: Setting, hidden: Float[Array, "b 1 d"]) -> Float[Array, "b v"]:
        """The logits of the target's vocabulary: its ids are the same, its padding may differ."""
        logits = sampling.whole(self.apply(setting, hidden, method="logits"))[:, 0]
        missing = max(self.target.vocab - self.cfg.vocab, 0)
        logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        return logits[:, : self.target.vocab]

    def apply(self, setting: Setting, *given, method: str):
        transformer = model.Transformer(targets.precise(self.cfg), scan=False)
        return transformer.apply({"params": setting.weights}, *given, method=method)

    def observe(self, setting: Setting, memory: Memory, state: State, verdict: Verdict) -> Memory:
        if verdict.block.shape[1] <= self.tree.width:
            return memory
        # In a union others' guesses may have held, which this model has not read: it reads all that
        # the call wrote. What is behind it in the block is written again before anyone sees it.
        first = state.length - verdict.count + 1
        tokens = jnp.maximum(verdict.tokens, 0)
        _, cache = self.written(setting, memory, tokens, first, memory.cache)
        return memory._replace(cache=cache)
