# SPDX-License-Identifier: Apache-2.0
"""Cost of an example for a model: FLOPs of training and of inference, and memory of its cache."""

from typing import NamedTuple

import numpy as np

from t5x_lite import config, data, model
from t5x_lite.training import flops

SAMPLE = 2000  # examples whose lengths are averaged: enough for a mean to 2 %


class Lengths(NamedTuple):
    """Mean numbers of ids of an example over a split, truncated as in training."""

    inputs: float
    targets: float


def example_lengths(cfg: config.Data, split: str = "train") -> np.ndarray:
    """Lengths [n 2] of inputs and targets of the first examples of a split, truncated.

    Raises:
      ValueError: the examples lack inputs, which an encoder needs.
    """
    dataset = data.open_dataset(cfg, split)
    count = min(len(dataset), SAMPLE)
    rows = [dataset.ids(i) for i in range(count)]
    lengths = [[len(inputs), len(targets)] for inputs, targets in rows if inputs is not None]
    if not lengths:
        raise ValueError(
            f"{dataset.name} has no inputs: compare needs examples of inputs and targets, for "
            "the encoder and the decoder"
        )
    most = (cfg.lengths["inputs"], cfg.lengths["targets"])
    return np.minimum(lengths, most)


def count_parameters(cfg: config.Model) -> int:
    """Number of parameters of a model."""
    return sum(model.count(cfg).values())


def forward_flops(cfg: config.Model, lengths: Lengths, scored: float) -> float:
    """FLOPs of a forward pass over an example, counted as in `training.flops`.

    Args:
      cfg: config of the model.
      lengths: lengths of the example.
      scored: number of positions with logits.
    """
    inputs, targets = lengths
    decoder = cfg.decoder
    assert decoder is not None
    if cfg.layout == "decoder_only":
        total = flops.self_attention_and_mlp_flops(decoder, inputs + targets)
    else:
        assert cfg.encoder is not None
        # Tokens attend to their chunk: n / chunk texts of that length.
        chunk = min(cfg.encoder.chunk or inputs, inputs)
        total = flops.self_attention_and_mlp_flops(cfg.encoder, chunk) * (inputs / chunk)
        total += flops.self_attention_and_mlp_flops(decoder, targets)
        total += flops.cross_attention_flops(decoder, targets, inputs)
    return total + 2 * decoder.embed * cfg.vocab * scored


def training_flops(cfg: config.Model, lengths: Lengths) -> float:
    """FLOPs to train on an example; a decoder-only model has logits for its inputs too."""
    scored = sum(lengths) if cfg.layout == "decoder_only" else lengths.targets
    return 3 * forward_flops(cfg, lengths, scored)


def inference_flops(cfg: config.Model, lengths: Lengths) -> float:
    """FLOPs to decode an example, one pass per token."""
    return forward_flops(cfg, lengths, lengths.targets)


def matched_cost(cfg: config.Model, lengths: Lengths, matched: str) -> float:
    """The cost that twins are matched by.

    Args:
      cfg: config of the model.
      lengths: mean lengths of the examples.
      matched: Compare.matched: "parameters", "training" or "inference".
    """
    if matched == "parameters":
        return float(count_parameters(cfg))
    return training_flops(cfg, lengths) if matched == "training" else inference_flops(cfg, lengths)


def cache_bytes(cfg: config.Model, inputs: int, outputs: int, size: int) -> int:
    """Bytes of the keys and values that decoding keeps per text.

    Args:
      cfg: config of the model.
      inputs: number of ids read.
      outputs: number of ids written.
      size: bytes of one number.
    """
    stack = cfg.decoder
    assert stack is not None
    slots = inputs + outputs
    return 2 * stack.layers * stack.key_heads * stack.head_dim * slots * size


def padding_shares(lengths: np.ndarray, most: tuple[int, int], rows: int) -> dict[str, float]:
    """Shares of padding among all tokens without packing.

    Args:
      lengths: [n 2] lengths of inputs and targets.
      most: the greatest lengths allowed, of inputs and of targets.
      rows: number of texts in a batch.

    Returns:
      Shares for texts padded to the longest allowed, and to the longest of their batch.
    """
    used = lengths.sum()
    whole = lengths[: len(lengths) // rows * rows].reshape(-1, rows, 2)
    batched = (whole.max(axis=1) * rows).sum()
    return {
        "to the longest allowed": 1 - used / (len(lengths) * sum(most)),
        f"to the longest of {rows}": 1 - whole.sum() / batched,
    }
