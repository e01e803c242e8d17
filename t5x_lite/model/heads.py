# SPDX-License-Identifier: Apache-2.0
"""Heads that guess the tokens after the next: from the same hidden state, one transformation each.

b batch    t position    d width    f hidden width    g heads    j tokens since the hidden state
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from t5x_lite import config
from t5x_lite.model.layers import weight
from t5x_lite.sharding import spec


class Heads(nn.Module):
    """The heads of `model.blockwise`. What they add to the hidden state begins at zero, so that
    every head first says what the model itself says.
    """

    model: config.Model

    @property
    def sizes(self):
        cfg, stack = self.model.blockwise, self.model.decoder
        width = {"embed": stack.embed, "width": stack.embed, "mlp": cfg.mlp or stack.mlp}
        pairs = cfg.count * (cfg.count + 1) // 2
        return width | {"guesses": cfg.count, "sources": cfg.count, "pairs": pairs}

    def setup(self):
        cfg, fan_in = self.model.blockwise, self.model.decoder.embed**-0.5
        if cfg.residual:
            self.square = weight(self, "square", "guesses embed -> width", 0.0)
        else:
            self.inward = weight(self, "inward", "guesses embed -> mlp", fan_in)
        if cfg.shape == "hydra":
            self.tokens = weight(self, "tokens", "pairs embed -> width", 0.0)
        if cfg.shape == "block_diagonal":
            self.outward = weight(self, "outward", "guesses mlp -> embed", 0.0)
        if cfg.shape == "stern":
            self.outward = weight(self, "outward", "sources mlp guesses -> embed", 0.0)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        which: slice,
        since: Float[Array, "b t j d"] | None = None,
    ) -> Float[Array, "b t g d"]:
        """What the logits of these heads are read from.

        Heads that are told the tokens are asked for one at a time: head i (0, 1, ...) with the
        embeddings `since` of i + 1 tokens, of which the first is the model's own.
        """
        change = getattr(self, self.model.blockwise.shape)
        return x[:, :, None] + change(x, which, since)

    def stern(self, x, which, since):
        hidden = jax.nn.relu(jnp.einsum("btd,sdf->btsf", x, self.inward))
        return read("btsf,sfgd->btgd", hidden, self.outward[:, :, which])

    def block_diagonal(self, x, which, since):
        hidden = jax.nn.relu(jnp.einsum("btd,gdf->btgf", x, self.inward[which]))
        return read("btgf,gfd->btgd", hidden, self.outward[which])

    def medusa(self, x, which, since):
        return jax.nn.silu(jnp.einsum("btd,gde->btge", x, self.square[which]))

    def hydra(self, x, which, since):
        head = which.start
        first = head * (head + 1) // 2
        told = jnp.einsum("btjd,jde->bte", since, self.tokens[first : first + head + 1])
        seen = jnp.einsum("btd,gde->btge", x, self.square[which])
        return jax.nn.silu(seen + told[:, :, None])


def read(axes: str, hidden: jax.Array, matrix: jax.Array) -> Float[Array, "b t g d"]:
    """Hidden units, which tensor parallelism splits, back to the width of the model."""
    return jnp.einsum(axes, hidden, matrix, out_sharding=spec("batch length whole width"))
