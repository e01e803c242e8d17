# SPDX-License-Identifier: Apache-2.0
"""What an example costs a model: operations to learn from it, to answer it, and memory to hold."""

from typing import NamedTuple

import numpy as np

from t5x_lite import config, data, model
from t5x_lite.training import costs

SAMPLE = 2000  # examples whose lengths are averaged: enough for a mean to 2 %


class Lengths(NamedTuple):
    """Ids of an example: means over a split, cut as in training."""

    inputs: float
    targets: float


def lengths_of(cfg: config.Data, split: str = "train") -> np.ndarray:
    """The lengths [n 2] of the inputs and targets of the first examples of a split, as cut.

    Raises:
      ValueError: the examples have no inputs, so that there is nothing for an encoder to read.
    """
    dataset = data.open_dataset(cfg, split)
    count = min(len(dataset), SAMPLE)
    rows = [dataset.ids(i) for i in range(count)]
    if not count or rows[0][0] is None:
        raise ValueError(
            f"{dataset.name} has no inputs: compare needs examples of inputs and targets, because "
            "an encoder-decoder reads the ones and writes the others"
        )
    most = (cfg.lengths["inputs"], cfg.lengths["targets"])
    return np.minimum([[len(inputs), len(targets)] for inputs, targets in rows], most)


def parameters(cfg: config.Model) -> int:
    return sum(model.count(cfg).values())


def forward(cfg: config.Model, lengths: Lengths, scored: float) -> float:
    """Operations of a forward pass over an example, with logits at `scored` positions.

    Two for every weight and token that meet, and two products per attention (`training.costs`).
    """
    inputs, targets = lengths
    if cfg.layout == "joined":
        total = costs.self_attention_and_mlp(cfg.decoder, inputs + targets)
    else:
        total = costs.self_attention_and_mlp(cfg.encoder, inputs)
        total += costs.self_attention_and_mlp(cfg.decoder, targets)
        total += costs.cross_attention(cfg.decoder, targets, inputs)
    return total + 2 * cfg.decoder.embed * cfg.vocab * scored


def training(cfg: config.Model, lengths: Lengths) -> float:
    """Operations to learn from an example; a lone decoder has logits for its inputs too."""
    scored = sum(lengths) if cfg.layout == "joined" else lengths.targets
    return 3 * forward(cfg, lengths, scored)


def inference(cfg: config.Model, lengths: Lengths) -> float:
    """Operations to answer an example, every token of it once."""
    return forward(cfg, lengths, lengths.targets)


def cost(cfg: config.Model, lengths: Lengths, matched: str) -> float:
    """What `Compare.matched` names."""
    if matched == "parameters":
        return float(parameters(cfg))
    return training(cfg, lengths) if matched == "training" else inference(cfg, lengths)


def cache_bytes(cfg: config.Model, inputs: int, outputs: int, size: int) -> int:
    """Keys and values that decoding keeps per text, with `size` bytes a number."""
    stack = cfg.decoder
    slots = inputs + outputs
    return 2 * stack.layers * stack.key_heads * stack.head_dim * slots * size


def padding(lengths: np.ndarray, most: tuple[int, int], rows: int) -> dict[str, float]:
    """The share of padding among all tokens without packing: with every text filled up to the
    longest allowed, and to the longest of `rows` texts as they come."""
    used = lengths.sum()
    whole = lengths[: len(lengths) // rows * rows].reshape(-1, rows, 2)
    batched = (whole.max(axis=1) * rows).sum()
    return {
        "to the longest allowed": 1 - used / (len(lengths) * sum(most)),
        f"to the longest of {rows}": 1 - whole.sum() / batched,
    }
