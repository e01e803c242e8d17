# SPDX-License-Identifier: Apache-2.0
"""Interface of logits processors, and the text that they read.

A processor changes the logits after every node of a block before a token is chosen, accepted or
sampled. What it does to a node depends on the tokens before the node alone, so that drafted,
streamed and batched texts are those of plain decoding.

  b rows    w nodes of a block    D depth of the block    T slots of a row    v vocabulary
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import sharding


class Text(NamedTuple):
    """Text of each row up to the root of a block.

    Attributes:
      tokens: prompt and new tokens by slot; what stands from `length` on is not part of the text.
      length: number of tokens, prompt and root included.
      prompt: number of tokens of the prompt.
    """

    tokens: Int[Array, "b T"]
    length: Int[Array, " b"]
    prompt: Int[Array, " b"]


class DraftPaths(NamedTuple):
    """Draft tokens on the way from the root, which is excluded, to each node of a block.

    Attributes:
      tokens: the tokens in order; any where `exists` is False.
      exists: the first depth[w] of a node's D places.
    """

    tokens: Int[Array, "b w D"]
    exists: Bool[np.ndarray, "w D"]

    @property
    def depth(self) -> np.ndarray:
        """Number of draft tokens [w] before the next token of each node."""
        return self.exists.sum(axis=1, dtype=np.int32)


class LogitsProcessor(Protocol):
    """One rule of steering: a registered dataclass whose arrays may change without compiling again.

    Rules and their order are those of transformers (5.24): the ones that change logits first, then
    temperature and what `sampling` cuts off.
    """

    def begin(self, text: Text, vocab: int) -> Any:
        """Returns the state after a prompt: a tree of arrays [b ...], parameters of rows included.

        Whatever belongs to a row is here, so that it goes where the row goes (into several beams).

        Args:
          text: the prompts.
          vocab: size of the vocabulary.
        """

    def process(
        self, state: Any, text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Returns the logits of the token after each node.

        Args:
          state: state after `text`.
          text: the rows up to the root.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """

    def observe(self, state: Any, tokens: Int[Array, "b D"], count: Int[Array, " b"]) -> Any:
        """Returns the state after more tokens.

        Args:
          state: state before them.
          tokens: tokens that were added to each row.
          count: how many of them; 0 for a row that is done.
        """


class Processors(NamedTuple):
    """Processors of a request, in the order in which they are applied.

    Attributes:
      rules: the processors; none leaves every program as it is without.
    """

    rules: tuple[LogitsProcessor, ...] = ()

    def begin(self, text: Text, vocab: int) -> tuple:
        """Returns the states of all processors after a prompt."""
        return sharding.by_rows(tuple(rule.begin(text, vocab) for rule in self.rules))

    def process(
        self, states: tuple, text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Applies every processor to the logits after each node.

        Args:
          states: state of each processor.
          text: the rows up to the root.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        for rule, state in zip(self.rules, states, strict=True):
            logits = rule.process(state, text, paths, logits)
        return logits

    def observe(self, states: tuple, tokens: Int[Array, "b D"], count: Int[Array, " b"]) -> tuple:
        """Returns the states after more tokens.

        Args:
          states: state of each processor.
          tokens: tokens that were added to each row.
          count: how many of them.
        """
        pairs = zip(self.rules, states, strict=True)
        return tuple(rule.observe(state, tokens, count) for rule, state in pairs)


def draft_paths(paths: np.ndarray, depth: np.ndarray, block: Int[Array, "b w"]) -> DraftPaths:
    """Returns the draft tokens before each node of a block.

    Args:
      paths: nodes [w D + 1] from the root to each node, as `Tree.paths`.
      depth: distance [w] of each node from the root, as `Tree.depth`.
      block: root and draft tokens.
    """
    nodes = paths[:, 1:]
    exists = np.arange(1, nodes.shape[1] + 1) <= np.asarray(depth)[:, None]
    tokens = jax.vmap(lambda row: row[nodes])(block)
    return DraftPaths(sharding.by_rows(tokens), exists)


def last_tokens(text: Text, paths: DraftPaths, count: int) -> Int[Array, "b w n"]:
    """Returns the tokens before the next token of each node; -1 where there are fewer.

    Args:
      text: the rows up to the root.
      paths: draft tokens between the root and each node.
      count: n.
    """
    slots = text.length[:, None] - count + jnp.arange(count)
    tail = jax.vmap(lambda row, at: row[jnp.maximum(at, 0)])(text.tokens, slots)
    tail = jnp.where(slots < 0, -1, tail)
    width, depth = paths.exists.shape
    tails = jnp.broadcast_to(tail[:, None], (tail.shape[0], width, count))
    both = jnp.concatenate(sharding.by_rows([tails, paths.tokens]), axis=-1)
    places = paths.depth[:, None] + np.arange(count)
    return jnp.stack([both[:, node, places[node]] for node in range(width)], axis=1)


def count_tokens(
    tokens: Int[Array, "b n"], exists: Bool[Array, "b n"], vocab: int
) -> Int[Array, "b v"]:
    """Counts how often each token of the vocabulary occurs.

    Args:
      tokens: the tokens of each row.
      exists: which of them count.
      vocab: v.
    """

    def count_row(row, exists):
        return jnp.zeros(vocab, jnp.int32).at[row].add(exists.astype(jnp.int32))

    return jax.vmap(count_row)(*sharding.by_rows((tokens, exists)))


def count_in_paths(paths: DraftPaths, vocab: int) -> Int[Array, "b w v"] | int:
    """Counts how often each token of the vocabulary is among the draft tokens before each node."""
    ids, counts = np.arange(vocab), 0
    for place in range(paths.exists.shape[1]):
        here = (paths.tokens[:, :, place, None] == ids) & paths.exists[:, place, None]
        counts = counts + here.astype(jnp.int32)
    return counts


def per_row(value: Array) -> Array:
    """Returns one value per row [b] as [b 1 1], to be combined with logits."""
    return sharding.by_rows(value[:, None, None])
