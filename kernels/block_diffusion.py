# SPDX-License-Identifier: Apache-2.0
"""Mask of a decoder that fills blocks of masked tokens, for training and scoring; in plain XLA."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["segments", "blocks"], meta_fields=["doubled"]
)
@dataclass(frozen=True)
class BlockDiffusionMask:
    """Mask of rows of masked blocks: tokens of a block attend to one another and to earlier blocks.

    A doubled row holds the same places twice, first as they are masked and then clean: masked ones
    attend to their own block and to the clean blocks before it, clean ones to clean ones alone
    (BD3-LM; Arriola et al., 2025, section 3.2). Four tokens in blocks of two (x: attends):

        one text    doubled
        x x . .     x x . .   . . . .
        x x . .     x x . .   . . . .
        x x x x     . . x x   x x . .
        x x x x     . . x x   x x . .
                    . . . .   x x . .
                    . . . .   x x . .
                    . . . .   x x x x
                    . . . .   x x x x

    Attributes:
      segments: [b t], the text of each token; 0 is padding, which nothing attends to.
      blocks: [b t], number of each token's block in its text; tokens of a prompt have negative
        numbers of their own, so that it is read causally.
      doubled: queries and keys are rows of 2 t tokens.
    """

    segments: Int[Array, "b t"]
    blocks: Int[Array, "b t"]
    doubled: bool = False

    def materialize(self) -> Bool[Array, "b r r"]:
        """Returns the mask as an array over all pairs, True where a query attends to a key."""
        keys = self.segments[:, None, :]
        same = (self.segments[:, :, None] == keys) & (keys > 0)
        later = self.blocks[:, :, None] - self.blocks[:, None, :]
        clean = same & (later >= 0)
        if not self.doubled:
            return clean
        masked = jnp.concatenate([same & (later == 0), same & (later > 0)], axis=2)
        return jnp.concatenate(
            [masked, jnp.concatenate([jnp.zeros_like(clean), clean], axis=2)], axis=1
        )

    def distance(self) -> Int[Array, "r r"]:
        """Returns query place minus key place of every pair; both copies have the same places."""
        places = jnp.tile(jnp.arange(self.blocks.shape[1]), 2 if self.doubled else 1)
        return places[:, None] - places[None, :]
