# SPDX-License-Identifier: Apache-2.0
"""Objectives as seqio preprocessors. Importing this module imports TensorFlow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite import config
from t5x_lite.config.objectives import Objective
from t5x_lite.config.windows import length_limits
from t5x_lite.data import mixing, objectives, randomness
from t5x_lite.data.objectives import WindowPreprocessor
from t5x_lite.tokenizers.seqio_vocabularies import from_seqio


def preprocessor(
    objective: Objective | config.Denoisers, seed: int = 0
) -> Callable[..., tf.data.Dataset]:
    """Wraps an objective as a seqio preprocessor: running text in "targets" becomes inputs and
    targets, with CausalLM targets alone.

    It stands after tokenization in a Task's preprocessors. With append_eos before it, the ends of
    examples are part of the text of a prefix LM or causal LM; span corruption and infilling remove
    them and add their own, as the batch builder does. Windows are filled from text end to end. Of
    several denoisers each reads all of the text; they are drawn at their rates until one has read
    all of it.
    """

    def preprocess(
        examples: tf.data.Dataset,
        sequence_length: dict[str, int],
        output_features: dict[str, seqio.Feature],
    ) -> tf.data.Dataset:
        vocabulary = from_seqio(output_features["targets"], "the objective's targets")
        fit = length_limits(
            sequence_length, "encoder_decoder" if "inputs" in output_features else "decoder_only"
        )
        running = examples.map(lambda each: each["targets"])
        parts = objectives.denoisers(objective, vocabulary)
        streams = []
        for name, each, _ in parts:
            if fit.layout == "decoder_only" and not isinstance(each, config.CausalLM):
                raise ValueError(
                    f'{type(each).__name__} makes inputs: add "inputs" to the output_features'
                )
            key = randomness.key(seed, "part", name) if name else randomness.key(seed)
            streams.append(
                windows(running, objectives.make_preprocessor(each, fit, vocabulary), key)
            )
        if len(streams) == 1:
            return streams[0]
        rates = [rate for _, _, rate in parts]
        drawn = choices(mixing.MixtureSampler(rates, randomness.key(seed, "mixture")))
        return tf.data.Dataset.choose_from_datasets(streams, drawn, stop_on_empty_dataset=True)

    return preprocess


def windows(
    running: tf.data.Dataset, preprocessor: WindowPreprocessor, key: int
) -> tf.data.Dataset:
    """Inputs and targets of the windows of a text.

    Args:
      running: token ids of the text, in elements of any length.
      preprocessor: objective for lengths and a vocabulary.
      key: random key; with the number of a window it determines the noise.
    """

    def pair(number, tokens):
        inputs, targets = preprocessor.parts(tokens[None], randomness.keys(key, np.array([number])))
        source = np.zeros(0) if inputs is None else inputs.tokens
        return source.astype(np.int32), targets.tokens.astype(np.int32)

    def convert(number, tokens):
        inputs, targets = tf.numpy_function(pair, [number, tokens], [tf.int32, tf.int32])
        inputs.set_shape([None])
        targets.set_shape([None])
        both = {"inputs": inputs, "targets": targets}
        return {"targets": targets} if isinstance(preprocessor.objective, config.CausalLM) else both

    if not preprocessor.keeps_ends:
        running = running.map(lambda ids: ids[: tf.size(ids) - ended(ids, preprocessor.eos)])
    running = running.filter(lambda ids: tf.size(ids) > 0)
    if not preprocessor.joins_examples:
        texts = running.flat_map(
            lambda ids: tf.data.Dataset.from_tensor_slices(ids).batch(preprocessor.window)
        )
    else:
        texts = running.map(lambda ids: join_seam(ids, preprocessor.seam))
        texts = texts.rebatch(preprocessor.window)
    texts = texts.filter(lambda ids: tf.size(ids) >= 2)
    return texts.enumerate().map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def join_seam(ids: Any, seam: np.ndarray) -> tf.Tensor:
    """The ids of an example and, unless it ends so already, the seam [n] after it."""
    if not len(seam):
        return ids
    missing = tf.cast(ids[-1] != tf.cast(seam[-1], ids.dtype), tf.int32)
    return tf.concat([ids, tf.cast(seam, ids.dtype)[: len(seam) * missing]], 0)


def ended(ids: Any, eos: int) -> tf.Tensor:
    """1 if the ids finish with eos, else 0."""
    return tf.reduce_sum(tf.cast(ids[-1:] == eos, tf.int32))


def choices(mixture: mixing.MixtureSampler) -> tf.data.Dataset:
    """Endless numbers of the denoiser of each window."""

    def draw(block):
        return mixture.block(int(block))[0].astype(np.int64)

    def block(number):
        drawn = tf.numpy_function(draw, [number], tf.int64)
        drawn.set_shape([int(mixture.counts.sum())])
        return drawn

    return tf.data.Dataset.counter().map(block).unbatch()
