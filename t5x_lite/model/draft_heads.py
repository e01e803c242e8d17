# SPDX-License-Identifier: Apache-2.0
"""Draft heads: each predicts a later token from the same hidden state, by one transformation.

b batch    t position    d width    f hidden width    g heads    j tokens since the hidden state
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from t5x_lite import config
from t5x_lite.model.layers import weight
from t5x_lite.sharding import spec
from t5x_lite.utils.not_none import not_none


class Heads(nn.Module):
    """The heads of `Model.draft_heads`: blockwise (Stern et al., 2018), Medusa, Hydra.

    Their residual is initialized to zero, so that at first every head predicts what the model
    predicts. model is the architecture of the whole model.
    """

    model: config.Model

    @property
    def sizes(self):
        cfg, stack = not_none(self.model.draft_heads), not_none(self.model.decoder)
        width = {"embed": stack.embed, "width": stack.embed, "mlp": cfg.mlp or stack.mlp}
        pairs = cfg.count * (cfg.count + 1) // 2
        return width | {"draft_heads": cfg.count, "sources": cfg.count, "pairs": pairs}

    def setup(self):
        cfg, fan_in = not_none(self.model.draft_heads), self.sizes["embed"] ** -0.5
        if cfg.residual:
            self.square = weight(self, "square", "draft_heads embed -> width", 0.0)
        else:
            self.inward = weight(self, "inward", "draft_heads embed -> mlp", fan_in)
        if cfg.shape == "hydra":
            self.tokens = weight(self, "tokens", "pairs embed -> width", 0.0)
        if cfg.shape == "block_diagonal":
            self.outward = weight(self, "outward", "draft_heads mlp -> embed", 0.0)
        if cfg.shape == "stern":
            self.outward = weight(self, "outward", "sources mlp draft_heads -> embed", 0.0)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        which: slice,
        since: Float[Array, "b t j d"] | None = None,
    ) -> Float[Array, "b t g d"]:
        """Hidden states of the heads, before the output projection.

        Args:
          x: [b t d] hidden states of the model.
          which: the heads to compute; a single one for hydra.
          since: [b t j d] embeddings of the tokens after the hidden state, for hydra only: i + 1
            tokens for head i (0, 1, ...), the first of which is the model's own.
        """
        residual = getattr(self, f"_{not_none(self.model.draft_heads).shape}")
        return x[:, :, None] + residual(x, which, since)

    def _stern(self, x, which, since):
        hidden = jax.nn.relu(jnp.einsum("btd,sdf->btsf", x, self.inward))
        return project_out("btsf,sfgd->btgd", hidden, self.outward[:, :, which])

    def _block_diagonal(self, x, which, since):
        hidden = jax.nn.relu(jnp.einsum("btd,gdf->btgf", x, self.inward[which]))
        return project_out("btgf,gfd->btgd", hidden, self.outward[which])

    def _medusa(self, x, which, since):
        return jax.nn.silu(jnp.einsum("btd,gde->btge", x, self.square[which]))

    def _hydra(self, x, which, since):
        head = which.start
        first = head * (head + 1) // 2
        token_terms = jnp.einsum("btjd,jde->bte", since, self.tokens[first : first + head + 1])
        hidden_term = jnp.einsum("btd,gde->btge", x, self.square[which])
        return jax.nn.silu(hidden_term + token_terms[:, :, None])


def project_out(axes: str, hidden: jax.Array, matrix: jax.Array) -> Float[Array, "b t g d"]:
    """Projects hidden units back to the width of the model.

    Args:
      axes: subscripts of the einsum.
      hidden: hidden units, sharded by tensor parallelism.
      matrix: output weights of the heads.
    """
    return jnp.einsum(axes, hidden, matrix, out_sharding=spec("batch length whole width"))
