# SPDX-License-Identifier: Apache-2.0
"""Objectives as seqio preprocessors. Importing this module imports TensorFlow."""

from collections.abc import Callable

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite import config
from t5x_lite.data import lengths, mixing, objectives, randomness
from t5x_lite.data.objectives import Cutter
from t5x_lite.data.seqio_vocabularies import ours
from t5x_lite.denoising import Objective


def preprocessor(
    objective: Objective | config.Denoisers, seed: int = 0
) -> Callable[..., tf.data.Dataset]:
    """The objective as a seqio preprocessor: running text in "targets" becomes inputs and targets,
    with CausalLM targets alone.

    It stands after tokenisation in a Task's preprocessors. With append_eos before it, the ends of
    examples are part of the text of a prefix LM or causal LM; span corruption and infilling leave
    them out and set their own, as the batch builder does. Windows are filled from text end to end.
    Of several denoisers each reads all of the text; they are drawn at their rates until one has
    read all of it.
    """

    def cut(
        examples: tf.data.Dataset,
        sequence_length: dict[str, int],
        output_features: dict[str, seqio.Feature],
    ) -> tf.data.Dataset:
        vocabulary = ours(output_features["targets"], "the objective's targets")
        fit = lengths.of(sequence_length, "pair" if "inputs" in output_features else "joined")
        running = examples.map(lambda each: each["targets"])
        parts = objectives.denoisers(objective, vocabulary)
        made = []
        for name, each, _ in parts:
            if fit.layout == "joined" and not isinstance(each, config.CausalLM):
                raise ValueError(
                    f'{type(each).__name__} makes inputs: add "inputs" to the output_features'
                )
            key = randomness.key(seed, "part", name) if name else randomness.key(seed)
            made.append(windows(running, objectives.cutter(each, fit, vocabulary), key))
        if len(made) == 1:
            return made[0]
        rates = [rate for _, _, rate in parts]
        drawn = choices(mixing.Mixture(rates, randomness.key(seed, "mixture")))
        return tf.data.Dataset.choose_from_datasets(made, drawn, stop_on_empty_dataset=True)

    return cut


def windows(running: tf.data.Dataset, cutter: Cutter, key: int) -> tf.data.Dataset:
    """What the cutter makes of the windows of the text; the key and their number decide."""

    def pair(number, tokens):
        inputs, targets = cutter.parts(tokens[None], randomness.keys(key, np.array([number])))
        read = np.zeros(0) if inputs is None else inputs.tokens
        return read.astype(np.int32), targets.tokens.astype(np.int32)

    def convert(number, tokens):
        inputs, targets = tf.numpy_function(pair, [number, tokens], [tf.int32, tf.int32])
        inputs.set_shape([None])
        targets.set_shape([None])
        made = {"inputs": inputs, "targets": targets}
        return {"targets": targets} if isinstance(cutter.objective, config.CausalLM) else made

    if not cutter.runs_on:
        running = running.map(lambda ids: ids[: tf.size(ids) - ended(ids, cutter.eos)])
    running = running.filter(lambda ids: tf.size(ids) > 0)
    found = running.rebatch(cutter.window).filter(lambda ids: tf.size(ids) >= 2)
    return found.enumerate().map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def ended(ids: tf.Tensor, eos: int) -> tf.Tensor:
    """1 if the ids finish with eos, else 0."""
    return tf.reduce_sum(tf.cast(ids[-1:] == eos, tf.int32))


def choices(mixture: mixing.Mixture) -> tf.data.Dataset:
    """The number of the denoiser of each window, without end."""
    draw = lambda block: mixture.block(int(block))[0].astype(np.int64)

    def block(number):
        drawn = tf.numpy_function(draw, [number], tf.int64)
        drawn.set_shape([int(mixture.counts.sum())])
        return drawn

    return tf.data.Dataset.counter().map(block).unbatch()
