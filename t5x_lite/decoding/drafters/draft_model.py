# SPDX-License-Identifier: Apache-2.0
"""Drafts of a smaller model of the same vocabulary (Leviathan et al., 2023, arXiv 2211.17192).

b rows    w nodes of a block    s source tokens    d width of the draft model    v vocabulary
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import config, model, sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding import target as targets
from t5x_lite.decoding.drafters import autoregressive
from t5x_lite.decoding.protocol import (
    DecodeContext,
    DecodeState,
    Draft,
    Prompts,
    Tree,
    VerifyOutput,
    chain,
)
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.utils.not_none import not_none


class DraftModelState(NamedTuple):
    """State of a draft model, which has a prompt of its own.

    Attributes:
      encoded: its encoded inputs.
      cache: its cache.
      prompt: length of its prompt.
      last: last token of its prompt.
      offset: slot of a new token in its cache, minus the slot in the target's.
    """

    encoded: Any
    cache: Any
    prompt: Int[Array, " b"]
    last: Int[Array, " b"]
    offset: Int[Array, " b"]


@dataclass(frozen=True)
class DraftModel:
    """Drafts a chain with another model, whose weights, from `prepare_params`, are the drafter's.

    Each of the two models may have an encoder or not: the source of the request (the encoder's
    inputs, or the prompt) becomes inputs or prompt of the draft model. Its cache needs no rollback:
    slots after the accepted text are overwritten. In a union it reads the accepted tokens of every
    step, one pass more.

      Drafting(DraftModel(small, large, chain(5)), prepare_params(small, small_params))

    Attributes:
      cfg: config of the draft model.
      target: config of the target.
      tree: the chain.
      stochastic: sample the drafts, and return their distributions (`autoregressive.Proposer`).
      top: 0.

    Raises:
      ValueError: one of the models has no decoder, or the tree no drafts.
    """

    cfg: config.Model
    target: config.Model
    tree: Tree = chain(5)
    stochastic: bool = False
    top: int = 0

    def __post_init__(self):
        for name, cfg in (("The draft model", self.cfg), ("The target", self.target)):
            if cfg.decoder is None:
                raise ValueError(f"{name} is an encoder alone: it writes no text")
        if self.tree.width < 2:
            raise ValueError("DraftModel.tree is one node wide: it needs at least one draft")

    def begin(self, context: DecodeContext) -> DraftModelState:
        """Encodes the source with the draft model, and fills its cache with the prompts."""
        params = context.weights
        cfg = with_dtype_of(self.cfg, params)
        source, length = self.source(context)
        # Without a start token, an empty prompt goes on after its padding.
        encoded, prompts = model.EncoderMemory(), Prompts(source, jnp.maximum(length, 1))
        if cfg.encoder is not None:
            encoded = targets.encode_inputs(cfg, params, source, length)
            prompts = self.decoder_prompts(context)
        elif cfg.add_bos:
            start = jnp.full_like(source[:, :1], cfg.decoder_start_token_id)
            prompts = Prompts(
                jnp.concatenate(sharding.by_rows([start, source]), axis=1), length + 1
            )
        # As many slots after the prompts as the target has.
        slots = prompts.tokens.shape[1] + context.slots - context.prompts.tokens.shape[1]
        here = jnp.arange(prompts.tokens.shape[1]) == prompts.length[:, None] - 1
        return DraftModelState(
            encoded=encoded,
            cache=targets.prefill(cfg, params, encoded, prompts, slots),
            prompt=prompts.length,
            last=jnp.sum(jnp.where(here, prompts.tokens, 0), axis=1),
            offset=prompts.length - context.prompts.length,
        )

    def decoder_prompts(self, context: DecodeContext) -> Prompts:
        """Returns the prompts of a draft model with an encoder: its start token.

        The target's text so far follows it where the target has an encoder too.
        """
        tokens, length = context.prompts
        start = jnp.full_like(tokens[:, :1], self.cfg.decoder_start_token_id)
        if context.inputs is None:
            return Prompts(start, jnp.ones_like(length))
        text = self.clip_ids(tokens[:, 1:])
        return Prompts(jnp.concatenate(sharding.by_rows([start, text]), axis=1), length)

    def source(self, context: DecodeContext) -> tuple[Int[Array, "b s"], Int[Array, " b"]]:
        """Returns the encoder inputs or the prompt without its start token, and the lengths."""
        if context.inputs is not None:
            return self.clip_ids(context.inputs), not_none(context.inputs_length)
        tokens, length = context.prompts
        if self.target.add_bos:
            following = np.arange(1, tokens.shape[1] + 1) % tokens.shape[1]
            return self.clip_ids(sharding.by_rows(tokens[:, following])), length - 1
        return self.clip_ids(tokens), length

    def clip_ids(self, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
        """Replaces ids beyond the draft model's vocabulary, the target's padding, by its last."""
        return jnp.minimum(tokens, self.cfg.vocab - 1)

    def propose(
        self, context: DecodeContext, drafter_state: DraftModelState, state: DecodeState
    ) -> tuple[Draft, DraftModelState]:
        """Runs the draft model w - 1 times.

        Args:
          context: constants of the request.
          drafter_state: the draft model's cache.
          state: state of the loop.
        """
        # If all drafts of the last block were accepted, the last of them is not in the cache yet.
        # So the first pass reads two tokens: the root and the one before it. In the first step the
        # root is the end of the prompt, which for the draft model is the last token of its own.
        prompt_end = context.prompts.length - 1
        before = jnp.maximum(state.length - 1, prompt_end)
        take = jax.vmap(lambda row, place: jax.lax.dynamic_slice(row, (place,), (2,)))
        pair = take(state.tokens, before)
        in_prompt = (before == prompt_end)[:, None] & (jnp.arange(2) == 0)
        pair = jnp.where(in_prompt, drafter_state.last[:, None], pair)

        def first(token, number, cache):
            hidden, cache = self.decode(context, drafter_state, pair, before, cache)
            second = (state.length > before)[:, None, None]
            return self.logits(context, jnp.where(second, hidden[:, 1:], hidden[:, :1])), cache

        def step(token, number, cache):
            index = state.length + number
            hidden, cache = self.decode(context, drafter_state, token[:, None], index, cache)
            return self.logits(context, hidden), cache

        proposer = autoregressive.Proposer(self.tree.width - 1, step, first, self.stochastic)
        draft, cache = autoregressive.propose_chain(context, state, proposer, drafter_state.cache)
        return draft, drafter_state._replace(cache=cache)

    def decode(
        self,
        context: DecodeContext,
        drafter_state: DraftModelState,
        tokens: Int[Array, "b j"],
        index: Int[Array, " b"],
        cache: Any,
    ) -> tuple[Float[Array, "b j d"], Any]:
        """Runs the draft model over tokens.

        Args:
          context: constants of the request.
          drafter_state: offset and prompt of the draft model.
          tokens: the tokens.
          index: slot of the first of them in the target's cache.
          cache: the draft model's cache.

        Returns:
          Hidden states, and the cache with the tokens in it.
        """
        index = index + drafter_state.offset
        block = model.TokenBlock(self.clip_ids(tokens), index, prefix=drafter_state.prompt)
        transformer = self.transformer(context)
        return transformer.apply(
            {"params": context.weights},
            block,
            cache,
            drafter_state.encoded,
            method=model.Transformer.decode,
        )

    def logits(self, context: DecodeContext, hidden: Float[Array, "b 1 d"]) -> Float[Array, "b v"]:
        """Computes the logits of the target's vocabulary: the ids agree, the padding may differ."""
        logits = self.transformer(context).apply(
            {"params": context.weights}, hidden, method=model.Transformer.logits
        )
        logits = sampling.gather_vocabulary(logits)[:, 0]
        missing = max(self.target.vocab - self.cfg.vocab, 0)
        logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        return logits[:, : self.target.vocab]

    def transformer(self, context: DecodeContext) -> model.Transformer:
        """Returns the module of the draft model."""
        return model.Transformer(with_dtype_of(self.cfg, context.weights), scan=False)

    def observe(
        self,
        context: DecodeContext,
        drafter_state: DraftModelState,
        state: DecodeState,
        output: VerifyOutput,
    ) -> DraftModelState:
        """Reads accepted tokens that the draft model did not draft itself.

        Args:
          context: constants of the request.
          drafter_state: the draft model's cache.
          state: state of the loop after the commit.
          output: the accepted tokens.
        """
        if output.block.shape[1] <= self.tree.width:
            return drafter_state
        # In a union other drafters' tokens may be accepted: the draft model reads all accepted
        # ones. What comes after them in its cache is overwritten before it is read.
        first = state.length - output.count + 1
        tokens = jnp.maximum(output.tokens, 0)
        _, cache = self.decode(context, drafter_state, tokens, first, drafter_state.cache)
        return drafter_state._replace(cache=cache)
