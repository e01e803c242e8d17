# SPDX-License-Identifier: Apache-2.0
"""The transformer looked into: what every layer makes of a text, and where it looks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.model.attention import View
from t5x_lite.model.transformer import Transformer, on_rows


class Given(NamedTuple):
    """Texts as a model reads them: tokens are the decoder's own, its start and all.

    Of tokens the first length[b] of row b exist and the first prompt[b] were given to it; of the
    encoder's inputs the first inputs_length[b] (both None for a lone decoder).
    """

    tokens: Int[Array, "b t"]
    length: Int[Array, " b"]
    prompt: Int[Array, " b"]
    inputs: Int[Array, "b s"] | None = None
    inputs_length: Int[Array, " b"] | None = None


class Inside(NamedTuple):
    """What happens inside, layers first.

    states [layers + 1 b t d] are the decoder's before each layer and after the last, through its
    final norm. decoder [layers b n t t], cross [layers b n t s] and encoder [layers b n s s] are
    how attention is shared; None where there is none. In a merged layer a row of decoder and the
    row of cross beside it sum to 1 together.
    """

    states: Any
    decoder: Any
    cross: Any = None
    encoder: Any = None


class Inspected(Transformer):
    """A Transformer of weights from `unstack` (scan=False) that tells what it does, in plain XLA,
    whatever computes attention elsewhere."""

    how = None

    def inside(self, given: Given) -> Inside:
        given = Given(*map(on_rows, given))
        encoded = encoder = None
        if self.cfg.encoder:
            states, encoder = self.encoder_inside(given)
            encoded, encoder = states[-1], jnp.stack([own for own, _ in encoder])
        states, shares = self.decoder.watched(*self.decoder_view(given, encoded))
        decoder, cross = jnp.stack([own for own, _ in shares]), None
        if self.cfg.encoder and self.cfg.decoder.merged:
            decoder, cross = jnp.split(decoder, [given.tokens.shape[1]], axis=-1)
        elif self.cfg.encoder:
            cross = jnp.stack([crossed for _, crossed in shares])
        return Inside(jnp.stack(states), decoder, cross, encoder)

    def encoded_by_layer(self, given: Given) -> Float[Array, "layers+1 b s d"]:
        """What the encoder would give if it ended before each layer, or after the last."""
        return jnp.stack(self.encoder_inside(Given(*map(on_rows, given)))[0])

    def written(self, given: Given) -> Float[Array, "b t v"]:
        """The logits of what follows each token."""
        given = Given(*map(on_rows, given))
        encoded = None
        if self.cfg.encoder:
            segments, where = places(given.inputs, given.inputs_length)
            encoded = self.encode(given.inputs, segments, where)
        return self.logits(self.decoder(*self.decoder_view(given, encoded)))

    def encoder_inside(self, given: Given):
        segments, where = places(given.inputs, given.inputs_length)
        view = View(where, self.sight(segments, segments))
        return self.encoder.watched(self.embed(given.inputs, reader=True), view)

    def decoder_view(self, given: Given, encoded) -> tuple[Any, View]:
        """The decoder's tokens embedded, and what its layers look at."""
        segments, where = places(given.tokens, given.length)
        inside = seen = None
        if self.cfg.prefix_lm:
            inside = jnp.arange(given.tokens.shape[1]) < given.prompt[:, None]
        sight = self.sight(segments, segments, causal=True, query_prefix=inside, key_prefix=inside)
        if encoded is not None:
            seen = self.sight(segments, places(given.inputs, given.inputs_length)[0])
        return self.embed(given.tokens), View(where, sight, encoded=encoded, seen=seen)


def places(ids: Int[Array, "b t"], length: Int[Array, " b"]) -> tuple[jax.Array, jax.Array]:
    """Segments and positions of ids, of which the first length[b] of row b exist."""
    where = jnp.arange(ids.shape[1])
    exists = where < length[:, None]
    return exists.astype(jnp.int32), jnp.where(exists, where, 0)
