# SPDX-License-Identifier: Apache-2.0
"""Penalties on tokens that the text already has.

b rows    w nodes of a block    v vocabulary
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

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


class SeenTokens(NamedTuple):
    """State of a RepetitionPenalty.

    Attributes:
      penalty: the penalty of each row.
      present: which tokens the row has.
    """

    penalty: Float[Array, " b"]
    present: Bool[Array, "b v"]


class TokenCounts(NamedTuple):
    """State of a FrequencyPenalty.

    Attributes:
      presence: penalty of each row for tokens that occur.
      frequency: penalty of each row for every occurrence.
      counts: occurrences of each token in the new text of the row.
    """

    presence: Float[Array, " b"]
    frequency: Float[Array, " b"]
    counts: Int[Array, "b v"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["penalty"], meta_fields=[])
@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits of tokens in prompt or text by the penalty, and multiplies negative
    ones (Keskar et al., 2019, arXiv 1909.05858, section 4.1, in transformers' form).

    Attributes:
      penalty: above 0; above 1 discourages, below 1 encourages repetition.
    """

    penalty: Float[Array, " b"]

    def begin(self, text: Text, vocab: int) -> SeenTokens:
        """Returns which tokens each prompt has."""
        exists = jnp.arange(text.tokens.shape[1]) < text.length[:, None]
        return SeenTokens(self.penalty, count_tokens(text.tokens, exists, vocab) > 0)

    def process(
        self,
        state: SeenTokens,
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
        present = state.present[:, None] | (count_in_paths(paths, logits.shape[-1]) > 0)
        penalty = per_row(state.penalty)
        return jnp.where(present, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def observe(
        self, state: SeenTokens, tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> SeenTokens:
        """Returns which tokens each row has after more of them.

        Args:
          state: which tokens it had.
          tokens: tokens that were added.
          count: how many of them.
        """
        exists = jnp.arange(tokens.shape[1]) < count[:, None]
        added = count_tokens(tokens, exists, state.present.shape[1]) > 0
        return state._replace(present=state.present | added)


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

    def begin(self, text: Text, vocab: int) -> TokenCounts:
        """Returns no occurrence of any token."""
        counts = count_tokens(text.tokens, jnp.zeros_like(text.tokens, bool), vocab)
        return TokenCounts(self.presence, self.frequency, counts)

    def process(
        self,
        state: TokenCounts,
        text: Text,
        paths: DraftPaths,
        logits: Float[Array, "b w v"],
    ) -> Float[Array, "b w v"]:
        """Returns the logits less the penalties.

        Args:
          state: occurrences of each token.
          text: the rows up to the root; unused.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        counts = state.counts[:, None] + count_in_paths(paths, logits.shape[-1])
        lowered = logits - per_row(state.frequency) * counts
        return lowered - per_row(state.presence) * (counts > 0)

    def observe(
        self, state: TokenCounts, tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> TokenCounts:
        """Returns the occurrences after more tokens.

        Args:
          state: occurrences before them.
          tokens: tokens that were added.
          count: how many of them.
        """
        exists = jnp.arange(tokens.shape[1]) < count[:, None]
        added = count_tokens(tokens, exists, state.counts.shape[1])
        return state._replace(counts=state.counts + added)
