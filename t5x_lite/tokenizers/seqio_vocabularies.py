# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of seqio as ours, and ours as seqio's. This module imports TensorFlow."""

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.tokenizers import vocabularies
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.utils.not_none import not_none


class SeqioVocabulary(seqio.Vocabulary):
    """One of our vocabularies as seqio's."""

    def __init__(self, ours: TextVocabulary):
        super().__init__(extra_ids=0)
        self.ours = ours

    @property
    def eos_id(self) -> int:
        return self.ours.eos

    @property
    def unk_id(self) -> None:
        # Ours writes unknown ids itself; with an id here seqio would replace the sentinels.
        return None

    @property
    def bos_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.ours.size

    def _encode(self, s) -> list[int]:
        return self.ours.encode(s)

    def _decode(self, ids) -> str:
        return self.ours.decode(ids)

    def _encode_tf(self, s):
        def encode(text: bytes | np.ndarray) -> np.ndarray:
            # A scalar comes as bytes from a graph, as an array when run eagerly.
            return np.array(self.encode(np.asarray(text).item().decode()), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids):
        def decode(rows: np.ndarray) -> np.ndarray:
            return np.array([self.ours.decode(row) for row in np.atleast_2d(rows)], dtype=object)

        return tf.reshape(tf.numpy_function(decode, [ids], tf.string), tf.shape(ids)[:-1])

    def __eq__(self, other) -> bool:
        return isinstance(other, SeqioVocabulary) and vocabularies.fingerprint(
            self.ours
        ) == vocabularies.fingerprint(other.ours)

    __hash__ = None


def from_seqio(feature: seqio.Feature, where: str) -> TextVocabulary:
    """The feature's vocabulary as ours, which needs no TensorFlow to decode.

    Raises:
      ValueError: its kind cannot be kept with a run, or the feature is not a row of ids.
    """
    if feature.rank != 1 or not feature.dtype.is_integer:
        raise ValueError(
            f"{where}: rank {feature.rank} of {feature.dtype.name} is not a row of ids"
        )
    match feature.vocabulary:
        case SeqioVocabulary():
            return feature.vocabulary.ours
        case seqio.ByteVocabulary():
            return vocabularies.ByteVocabulary(feature.vocabulary.extra_ids, ends=feature.add_eos)
        case seqio.SentencePieceVocabulary():
            model = feature.vocabulary.sp_model  # its sentinels are in it
            return vocabularies.SentencePieceVocabulary(not_none(model), ends=feature.add_eos)
        case seqio.PassThroughVocabulary():
            eos, size = feature.vocabulary.eos_id, feature.vocabulary.vocab_size
            return vocabularies.IntegerVocabulary(
                size, -1 if eos is None else eos, ends=feature.add_eos
            )
        case other:
            raise ValueError(
                f"{where}: {type(other).__name__} cannot be kept with a run; use seqio's "
                "ByteVocabulary, SentencePieceVocabulary or PassThroughVocabulary"
            )
