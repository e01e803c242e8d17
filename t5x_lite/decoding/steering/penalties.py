# SPDX-License-Identifier: Apache-2.0
"""Penalties on tokens that the text already has.

b rows    w nodes of a block    v vocabulary
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding.steering.processor import (
    DraftPaths,
    Text,
    count_in_paths,
    count_tokens,
    per_row,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["penalty"], meta_fields=[])
@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits of tokens in prompt or text by the penalty, and multiplies negative
    ones (Keskar et al., 2019, arXiv 1909.05858, section 4.1, in transformers' form).

    Attributes:
      penalty: above 0; above 1 discourages, below 1 encourages repetition.
    """

    penalty: Float[Array, " b"]

    def begin(self, text: Text, vocab: int) -> Bool[Array, "b v"]:
        """Returns which tokens each prompt has."""
        exists = jnp.arange(text.tokens.shape[1]) < text.length[:, None]
        return count_tokens(text.tokens, exists, vocab) > 0

    def process(
        self,
        state: Bool[Array, "b v"],
        text: Text,
        paths: DraftPaths,
        logits: Float[Array, "b w v"],
    ) -> Float[Array, "b w v"]:
        """Returns the logits with those of earlier tokens lowered.

        Args:
          state: which tokens each row has.
          text: the rows up to the root; unused.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        seen = state[:, None] | (count_in_paths(paths, logits.shape[-1]) > 0)
        penalty = per_row(self.penalty)
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def observe(
        self, state: Bool[Array, "b v"], tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> Bool[Array, "b v"]:
        """Returns which tokens each row has after more of them.

        Args:
          state: which tokens it had.
          tokens: tokens that were added.
          count: how many of them.
        """
        exists = jnp.arange(tokens.shape[1]) < count[:, None]
        return state | (count_tokens(tokens, exists, state.shape[1]) > 0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["presence", "frequency"], meta_fields=[]
)
@dataclass(frozen=True)
class FrequencyPenalty:
    """Subtracts from the logits of tokens of the new text: once, and for every occurrence.

    OpenAI's `presence_penalty` and `frequency_penalty`, as vLLM computes them: of a prompt no token
    counts.

    Attributes:
      presence: subtracted from the logit of each token that occurs.
      frequency: subtracted for every occurrence.
    """

    presence: Float[Array, " b"]
    frequency: Float[Array, " b"]

    def begin(self, text: Text, vocab: int) -> Int[Array, "b v"]:
        """Returns no occurrence of any token."""
        return count_tokens(text.tokens, jnp.zeros_like(text.tokens, bool), vocab)

    def process(
        self,
        state: Int[Array, "b v"],
        text: Text,
        paths: DraftPaths,
        logits: Float[Array, "b w v"],
    ) -> Float[Array, "b w v"]:
        """Returns the logits less the penalties.

        Args:
          state: occurrences of each token in the new text of each row.
          text: the rows up to the root; unused.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        counts = state[:, None] + count_in_paths(paths, logits.shape[-1])
        lowered = logits - per_row(self.frequency) * counts
        return lowered - per_row(self.presence) * (counts > 0)

    def observe(
        self, state: Int[Array, "b v"], tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> Int[Array, "b v"]:
        """Returns the occurrences after more tokens.

        Args:
          state: occurrences before them.
          tokens: tokens that were added.
          count: how many of them.
        """
        exists = jnp.arange(tokens.shape[1]) < count[:, None]
        return state + count_tokens(tokens, exists, state.shape[1])
