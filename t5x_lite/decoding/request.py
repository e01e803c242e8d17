# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model, as padded arrays of few shapes: each shape is compiled once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite import config


class Request(NamedTuple):
    """Rows to be continued, numpy arrays on the host, right-padded.

    inputs [b s] and inputs_length [b] are the encoder's (None for a lone decoder); prompts [b p]
    and prompts_length [b] are decoder tokens that are given, Model.start first unless a lone
    decoder does without (`Model.starts_prompts`); limit [b] is the most new tokens (0 for a row
    that only fills the batch); seed [b] and row [b] key the sampling; eos is the token that ends a
    text, or several [e] of which each does.
    """

    inputs: np.ndarray | None
    inputs_length: np.ndarray | None
    prompts: np.ndarray
    prompts_length: np.ndarray
    limit: np.ndarray
    seed: np.ndarray
    row: np.ndarray
    eos: int | np.ndarray = 1


def bucket(size: int, least: int = 16) -> int:
    """size rounded up to a power of two, or to half way between two: at most a third is padding."""
    power = least
    while power < size:
        power *= 2
    between = power * 3 // 4
    return between if size <= between and between >= least else power


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """rows as one array [b length] with zeros on the right, and their own lengths [b]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), length), np.int32)
    padded[np.arange(length) < lengths[:, None]] = np.concatenate([*rows, []])
    return padded, lengths


def request(
    cfg: config.Model,
    examples: Sequence[Sequence[int]],
    decode: config.Decode,
    *,
    rows: Sequence[int] | None = None,
    batch: int | None = None,
    eos: int | Sequence[int] = 1,
) -> Request:
    """A Request to continue examples: ids for the encoder, or the prompts of a lone decoder.

    rows numbers the examples for sampling (0, 1, ... otherwise): the same number and seed give the
    same text in any company. batch is how many rows to fill up to. Several eos each end a text.

    Raises:
      ValueError: the model has no decoder, or an example is empty or outside of the vocabulary.
    """
    check(cfg, examples)
    count = len(examples)
    filler = [[cfg.start]] * ((batch or count) - count)
    examples = [*examples, *filler]
    row = np.zeros(len(examples), np.uint32)
    row[:count] = np.arange(count) if rows is None else rows
    limit = np.where(np.arange(len(examples)) < count, decode.length, 0).astype(np.int32)
    if cfg.encoder is None:
        prompts = [prompt(cfg, example) for example in examples]
        inputs, inputs_length = None, None
    else:
        prompts = [[cfg.start]] * len(examples)
        inputs, inputs_length = pad(examples, bucket(max(map(len, examples))))
    longest = max(map(len, prompts))
    prompts, prompts_length = pad(prompts, longest if longest == 1 else bucket(longest))
    seed = np.full(len(examples), decode.seed, np.uint32)
    eos = eos if isinstance(eos, int) else np.array(eos, np.int32)
    return Request(inputs, inputs_length, prompts, prompts_length, limit, seed, row, eos)


def prompt(cfg: config.Model, example: Sequence[int]) -> list[int]:
    """What a lone decoder is given; it needs a token to begin with, so an empty one is start."""
    return [*example] if len(example) and not cfg.starts_prompts else [cfg.start, *example]


def check(cfg: config.Model, examples: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for what no model can continue."""
    if cfg.decoder is None:
        raise ValueError("An encoder alone writes no text: the model needs a decoder Stack")
    if not examples:
        raise ValueError("There is nothing to decode: the request has no rows")
    check_ids(cfg, "Example", examples, empty=cfg.encoder is None)


def check_ids(
    cfg: config.Model, name: str, rows: Sequence[Sequence[int]], empty: bool = False
) -> None:
    """Raises ValueError for ids that the model does not have, and for empty rows unless allowed."""
    for number, row in enumerate(rows):
        if not len(row) and not empty:
            raise ValueError(f"{name} {number} is empty: it needs at least one token")
        if len(row) and not 0 <= min(row) <= max(row) < cfg.vocab:
            raise ValueError(
                f"{name} {number} has ids outside of the model's vocabulary 0..{cfg.vocab - 1}: "
                "was it tokenised with another vocabulary?"
            )
