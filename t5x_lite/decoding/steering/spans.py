# SPDX-License-Identifier: Apache-2.0
"""Constraint of new texts to parts of their own inputs, by the places that a text may have there.

b rows    w nodes of a block    D depth of the block    n places    e edges    v vocabulary
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding.steering.automaton import NEVER
from t5x_lite.decoding.steering.processor import DraftPaths, Text, per_row
from t5x_lite.tokenizers.token_bytes import TokenBytes


class SpanTable(NamedTuple):
    """Tokens of the parts of each row's input.

    Places are the bytes of the input, before which a part may end; one after the last; one for a
    text of tokens that write nothing; and then that of no text.

    Attributes:
      source: [b e] int32, place before each token.
      token: [b e] int32, the token; -1 of edges that only fill up.
      target: [b e] int32, place after it.
      tokens_left: [b n] int32, fewest tokens with which a text at a place can end, the end
        included; NEVER where there are none.
    """

    source: np.ndarray
    token: np.ndarray
    target: np.ndarray
    tokens_left: np.ndarray


class SpanState(NamedTuple):
    """State of InputSpans.

    Attributes:
      places: places of the text of each row in its input.
      budget: most new tokens that each row can still get, its end included.
      table: table of the rows.
    """

    places: Bool[Array, "b n"]
    budget: Int[Array, " b"]
    table: SpanTable


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "budget", "stops"],
    meta_fields=[],
)
@dataclass(frozen=True)
class InputSpans:
    """Allows the tokens after which the text is still a part of its input, and can end in time.

    Attributes:
      table: table of the rows.
      budget: most new tokens of each row.
      stops: ids that end a text.
    """

    table: SpanTable
    budget: Int[Array, " b"]
    stops: Int[Array, " e"]

    def begin(self, text: Text, vocab: int) -> SpanState:
        """Returns the first state for each row; of a prompt nothing counts."""
        table = jax.tree.map(jnp.asarray, self.table)
        places = jnp.arange(table.tokens_left.shape[1]) == table.tokens_left.shape[1] - 1
        return SpanState(
            jnp.broadcast_to(places, table.tokens_left.shape), jnp.asarray(self.budget), table
        )

    def process(
        self, state: SpanState, text: Text, paths: DraftPaths, logits: Float[Array, "b w v"]
    ) -> Float[Array, "b w v"]:
        """Returns the logits, minus infinity for tokens that are not allowed.

        Args:
          state: state of each row.
          text: the rows up to the root; unused.
          paths: draft tokens between the root and each node.
          logits: scores of the tokens.
        """
        width, depth = paths.exists.shape
        shape = (state.places.shape[0], width, state.places.shape[1])
        places = sharding.by_rows(jnp.broadcast_to(state.places[:, None], shape))
        for place in range(depth):
            after = step_places(state.table, places, paths.tokens[:, :, place])
            places = jnp.where(paths.exists[:, place, None], after, places)
        budget = per_row(state.budget)[:, :, 0] - paths.depth
        allowed = allow_tokens(state.table, places, budget, logits.shape[-1])
        ends = jnp.any(places & (state.table.tokens_left[:, None] == 1), axis=-1) & (budget > 0)
        stops = jnp.any(jnp.arange(logits.shape[-1]) == self.stops[:, None], axis=0)
        return jnp.where(allowed | (ends[:, :, None] & stops), logits, -jnp.inf)

    def observe(
        self, state: SpanState, tokens: Int[Array, "b D"], count: Int[Array, " b"]
    ) -> SpanState:
        """Returns the state after more tokens.

        Args:
          state: state before them.
          tokens: tokens that were added.
          count: how many of them.
        """
        places = state.places[:, None]
        for place in range(tokens.shape[1]):
            after = step_places(state.table, places, tokens[:, place, None])
            places = jnp.where((place < count)[:, None, None], after, places)
        return state._replace(places=places[:, 0], budget=state.budget - count)


def step_places(
    table: SpanTable, places: Bool[Array, "b w n"], tokens: Int[Array, "b w"]
) -> Bool[Array, "b w n"]:
    """Returns the places after one more token.

    Args:
      table: table of the rows.
      places: places before it.
      tokens: the token of each node.
    """

    def step_node(places, token, source, edges, target):
        taken = places[source] & (edges == jnp.maximum(token, 0))
        return jnp.zeros_like(places).at[target].max(taken)

    by_node = jax.vmap(step_node, in_axes=(0, 0, None, None, None))
    return jax.vmap(by_node)(
        *sharding.by_rows((places, tokens, table.source, table.token, table.target))
    )


def allow_tokens(
    table: SpanTable, places: Bool[Array, "b w n"], budget: Int[Array, "b w"], vocab: int
) -> Bool[Array, "b w v"]:
    """Marks the tokens that lead to a place from which a text can end in time.

    Args:
      table: table of the rows.
      places: places of each node's text.
      budget: most new tokens after each node.
      vocab: v.
    """

    def allow_node(places, budget, row):
        taken = places[row.source] & (row.tokens_left[row.target] < budget)
        tokens = jnp.where(row.token < 0, vocab, row.token)
        return jnp.zeros(vocab, bool).at[tokens].max(taken, mode="drop")

    by_node = jax.vmap(allow_node, in_axes=(0, 0, None))
    return jax.vmap(by_node)(*sharding.by_rows((places, budget, table)))


class RowSpans(NamedTuple):
    """Tokens of the parts of one input, see SpanTable; the place of no text is the last one.

    Attributes:
      edges: [e 3] int32, place before a token, the token, place after it.
      tokens_left: [n] int32.
    """

    edges: np.ndarray
    tokens_left: np.ndarray


def list_row_spans(
    texts: Sequence[str], vocabulary: TokenBytes, vocab: int, limit: int
) -> list[RowSpans]:
    """Returns the tokens of the parts of several inputs.

    Args:
      texts: the inputs.
      vocabulary: bytes of the ids.
      vocab: size of the model's vocabulary.
      limit: most new tokens, the end included.

    Raises:
      ValueError: no part of an input can be written with the tokens.
    """
    by_id = {token: text for token, text in vocabulary.by_id.items() if token < vocab}
    first = {token: vocabulary.first.get(token, text) for token, text in by_id.items()}
    index, first_index = index_texts(by_id), index_texts(first)
    silent = [token for token, text in first.items() if not text]
    rows = []
    for number, content in enumerate(text.encode() for text in texts):
        # After tokens that write nothing another one is either the first again, or it is not.
        begin = len(content) + 2
        begun = begin if vocabulary.drops_again else begin - 1
        edges = list_edges(content, index)
        starts = [(begin, edge) for edge in list_edges(content, first_index)]
        starts += [(begun, edge) for edge in edges if silent and begun != begin]
        edges += [
            (place, token, after)
            for place, (before, token, after) in starts
            if begins_character(content[before])
        ]
        edges += [(begin, token, begun) for token in silent]
        array = np.array(edges, np.int32).reshape(-1, 3)
        left = count_left(content, array)
        if left[begin] > limit:
            raise ValueError(
                f"No part of input {number} can be written within Decode.max_new_tokens ({limit}), "
                "as Decode.span_of_input wants it"
            )
        rows.append(RowSpans(array, left))
    return rows


def stack_spans(rows: Sequence[RowSpans]) -> SpanTable:
    """Returns the table of several rows, of one of few shapes."""
    most, places = (
        1 << max(6, (max(map(len, each)) - 1).bit_length()) for each in zip(*rows, strict=True)
    )
    filled = [fill_row(row, most, places) for row in rows]
    edges, left = (np.stack(each) for each in zip(*filled, strict=True))
    return SpanTable(edges[:, :, 0], edges[:, :, 1], edges[:, :, 2], left)


def index_texts(texts: dict[int, bytes]) -> dict[bytes, list[int]]:
    """Returns the ids that write each text."""
    index: dict[bytes, list[int]] = {}
    for token, text in texts.items():
        index.setdefault(text, []).append(token)
    index.pop(b"", None)
    return index


def list_edges(content: bytes, index: dict[bytes, list[int]]) -> list[tuple[int, int, int]]:
    """Returns (place before, token, place after) of all tokens in a text."""
    longest = max(map(len, index), default=0)
    return [
        (place, token, place + size)
        for place in range(len(content))
        for size in range(1, min(longest, len(content) - place) + 1)
        for token in index.get(content[place : place + size], ())
    ]


def begins_character(byte: int) -> bool:
    """True for the first byte of a character in UTF-8."""
    return byte & 0xC0 != 0x80


def count_left(content: bytes, edges: np.ndarray) -> np.ndarray:
    """Fewest tokens [n] with which a text at each place can end, the end included.

    Args:
      content: the input.
      edges: [e 3] place before, token, place after.
    """
    whole = [*map(begins_character, content), True]  # a text ends between characters
    left = np.append(np.where(whole, 1, NEVER), [NEVER, NEVER])
    for _ in range(5):  # bytes of a character, and a token that writes nothing
        np.minimum.at(left, edges[:, 0], np.minimum(left[edges[:, 2]] + 1, NEVER))
    return left.astype(np.int32)


def fill_row(row: RowSpans, most: int, places: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row's edges and places, filled up to the sizes of a table.

    Args:
      row: the row.
      most: edges of the table.
      places: its places.
    """
    edges, begin = row.edges, len(row.tokens_left) - 1
    filled = np.full((most, 3), (0, -1, 0), np.int32)
    filled[: len(edges)] = np.where(
        (edges == begin) & [True, False, True], places - 1, edges
    )  # the place of no text is the last one of the table
    left = np.full(places, NEVER, np.int32)
    left[:begin] = row.tokens_left[:begin]
    left[-1] = row.tokens_left[begin]
    return filled, left
