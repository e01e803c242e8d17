# SPDX-License-Identifier: Apache-2.0
"""The Model that a checkpoint becomes: from one arrangement of towers to another."""

import dataclasses
from typing import NamedTuple

from t5x_lite import config

# Vocabularies are rounded up to it, so that meshes can split them and tiles are full.
MULTIPLE = 128
WAYS = ("encoder_decoder", "decoder_only", "encoder_only")


class Way(NamedTuple):
    """What to make (one of WAYS): `merged` reads inputs and past in one softmax; `separate` gives
    the encoder an embedding of its own; `eoi` is an id whose row is not scaled (T5Gemma 2).
    """

    to: str
    merged: bool = False
    separate: bool = False
    eoi: int | None = None


def derive(
    source: config.Model, way: Way, vocab: int, encoder_source: config.Model | None = None
) -> config.Model:
    """The source's model with the towers of `way` and at least `vocab` ids.

    The encoder is that of encoder_source (None: the source), or its decoder if it has none. Where
    two checkpoints or two widths meet, each tower keeps an embedding of its own. The encoder of a
    merged model sees as many keys through a window as the decoder (T5Gemma 2).

    Raises:
      ValueError: the source has no tower that could become one of these.
    """
    made = {
        "vocab": rounded(max(source.vocab, vocab)),
        "prefix_lm": False,
        "separate_embeddings": False,
        "eoi": source.eoi if way.eoi is None else way.eoi,
    }
    decoder = source.decoder
    config.require(
        decoder is not None or way.to == "encoder_only",
        f"The source is an encoder alone: --to={way.to} needs a decoder",
    )
    if way.to == "decoder_only":
        made |= {"encoder": None, "decoder": dataclasses.replace(decoder, merged=False)}
        return dataclasses.replace(source, **made, pooling=None)
    reader = source if encoder_source is None else encoder_source
    encoder = reader.encoder or dataclasses.replace(reader.decoder, merged=False)
    if way.to == "encoder_only":
        return dataclasses.replace(source, **made, encoder=encoder, decoder=None)
    if way.merged and encoder.window is not None:
        encoder = dataclasses.replace(encoder, window_form="halved")
    two = encoder_source is not None or encoder.embed != decoder.embed or way.separate
    made |= {"separate_embeddings": two or source.separate_embeddings, "starts_prompts": True}
    decoder = dataclasses.replace(decoder, merged=way.merged)
    return dataclasses.replace(source, **made, encoder=encoder, decoder=decoder)


def rounded(vocab: int) -> int:
    """vocab, or the next multiple of MULTIPLE if it is not one and not small."""
    return vocab if vocab <= MULTIPLE else -(-vocab // MULTIPLE) * MULTIPLE
