# SPDX-License-Identifier: Apache-2.0
"""Masks in the targets of a batch, for decoders that fill masked blocks (Model.canvas).

Of a block with n targets, k are masked, k uniform in 1..n, and count n / k times each. The expected
loss is then a bound of the negative log-likelihood: that of a random order of the tokens (Uria et
al., 2014; Hoogeboom et al., 2022), which is the integral over all rates of masked diffusion (MDLM;
Sahoo et al., 2024, equation 10), as the integral of t^(k-1) (1-t)^(n-k) times n! / k! (n-k)! is
1 / k. Unlike a rate, a count masks at least one token, and the weights of a block sum to n.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from t5x_lite import config
from t5x_lite.batch import Batch, MaskedBlocks
from t5x_lite.data import randomness
from t5x_lite.tokenizers.vocabulary import TextVocabulary

# Words that separate the keys of the draws.
PLACES, COUNTS, SIZES = "places", "counts", "sizes"


@dataclass(frozen=True)
class BlockMasker:
    """Masks the targets of batches, as a function of key and row.

    Attributes:
      canvas: config of the blocks.
      mask_token_id: id of the mask token.
      eos: id that ends a text.
      key: random key of the draws.
    """

    canvas: config.Canvas
    mask_token_id: int
    eos: int
    key: int

    def for_evaluation(self) -> "BlockMasker":
        """Returns a masker that draws the same for every seed."""
        return dataclasses.replace(self, key=0)

    def mask(self, batch: Batch, rows: np.ndarray) -> Batch:
        """Returns a batch with masked blocks, and loss weights for masked targets alone.

        Args:
          batch: rows without masks.
          rows: number of each row, counted through all steps [b].
        """
        shape = batch.targets.shape
        # A counter for each token, the same on any number of hosts.
        counters = rows[:, None] * shape[1] + np.arange(shape[1])
        is_target = batch.loss_weights > 0
        first = count_prompts(batch)
        place = batch.target_positions - first
        size = self.draw_sizes(batch, counters)
        blocks = np.where(place >= 0, place // size, place)
        # Flat index of the first token of each token's block.
        begin = np.arange(batch.targets.size).reshape(shape) - np.where(place >= 0, place % size, 0)
        masked, share = self.draw_masks(begin, is_target, counters)
        weights = np.where(masked, batch.loss_weights * share, 0).astype(np.float32)
        tokens = np.where(masked, self.mask_token_id, batch.targets).astype(np.int32)
        text = (is_target & ~self.find_fill(batch, place)).astype(np.float32)
        canvas = MaskedBlocks(tokens, blocks.astype(np.int32), text)
        return batch._replace(loss_weights=weights, canvas=canvas)

    def draw_sizes(self, batch: Batch, counters: np.ndarray) -> np.ndarray:
        """Draws the size of the blocks of each token's text [b t].

        Args:
          batch: rows.
          counters: of the tokens [b t].
        """
        sizes = np.array(self.canvas.blocks)
        if len(sizes) == 1:
            return np.broadcast_to(sizes, counters.shape)
        # All tokens of a text draw by the counter of its first one.
        key = randomness.key(self.key, SIZES)
        return sizes[randomness.uniform(key, counters - batch.target_positions, len(sizes))]

    def draw_masks(
        self, begin: np.ndarray, is_target: np.ndarray, counters: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws the masked targets of each block.

        Args:
          begin: flat index of the first token of each token's block [b t].
          is_target: True for tokens that are predicted [b t].
          counters: of the tokens [b t].

        Returns:
          True for masked targets, and for each token the number of its block's targets divided by
          that of the masked ones [b t].
        """
        chosen = np.flatnonzero(is_target)
        block = begin.ravel()[chosen]
        noise = randomness.keys(randomness.key(self.key, PLACES), counters.ravel()[chosen])
        order = np.lexsort((noise, block))
        rank = np.empty(len(chosen), np.int64)
        targets = np.bincount(block, minlength=begin.size)
        starts = np.cumsum(targets) - targets
        rank[order] = np.arange(len(chosen)) - starts[block[order]]
        count = targets[block]
        low, high = self.canvas.rates
        least = np.maximum(np.ceil(low * count), 1).astype(np.int64)
        most = np.maximum(np.floor(high * count), least).astype(np.int64)
        key = randomness.key(self.key, COUNTS)
        drawn = least + randomness.uniform(key, counters.ravel()[block], most - least + 1)
        masked, share = np.zeros(begin.size, bool), np.zeros(begin.size)
        masked[chosen], share[chosen] = rank < drawn, count / drawn
        return masked.reshape(begin.shape), share.reshape(begin.shape)

    def find_fill(self, batch: Batch, place: np.ndarray) -> np.ndarray:
        """Returns True for ends that follow the end of a text [b t].

        Args:
          batch: rows.
          place: position of each token among the targets of its text [b t].
        """
        ends = batch.targets == self.eos
        before = np.pad(ends[:, :-1], ((0, 0), (1, 0)))
        return ends & before & (place > 0)


def count_prompts(batch: Batch) -> np.ndarray:
    """Number of prompt tokens in the example of each token [b t]; 0 where inputs stand apart."""
    shape = batch.targets.shape
    if batch.prefix is None:
        return np.zeros(shape, np.int64)
    example = np.arange(shape[0])[:, None] * (shape[1] + 1) + batch.target_segments
    return np.bincount(example.ravel(), batch.prefix.ravel()).astype(np.int64)[example]


def make_masker(
    model: config.Model | None, vocabulary: TextVocabulary, seed: int
) -> BlockMasker | None:
    """Returns the masker of a model with a canvas; None for one that writes from left to right.

    Args:
      model: config of the model.
      vocabulary: of the targets.
      seed: of the run.

    Raises:
      ValueError: the mask token is one of the vocabulary, without being bound, or ends texts.
    """
    if model is None or model.canvas is None or model.canvas.block == 1:
        return None
    mask, bound = model.mask_token_id, model.canvas.mask_token_id is not None
    config.require(
        mask != vocabulary.eos and (bound or mask >= vocabulary.size),
        f"The mask token of Model.canvas, id {mask}, is a token of the vocabulary: bind "
        "config.Canvas.mask_token_id to an id that no text has, or a larger config.Model.vocab",
    )
    key = randomness.key(seed, "canvas")
    return BlockMasker(model.canvas, model.mask_token_id, vocabulary.eos, key)
