# SPDX-License-Identifier: Apache-2.0
"""The Model that a checkpoint becomes: from one arrangement of towers to another."""

import dataclasses
from typing import Any, NamedTuple

from t5x_lite import config

# Vocabularies are rounded up to a multiple of it, so that meshes can split them and tiles are full.
MULTIPLE = 128
ARRANGEMENTS = ("encoder_decoder", "decoder_only", "encoder_only")


class Arrangement(NamedTuple):
    """Towers of an adapted model.

    Attributes:
      to: layout, one of ARRANGEMENTS.
      merged: the decoder attends to inputs and past in one softmax (T5Gemma 2).
      separate: the encoder has an embedding of its own.
      eoi: id whose embedding is not scaled (T5Gemma 2); None for that of the source.
      new_layers: layers of a decoder that is drawn anew; None to take the source's.
    """

    to: str
    merged: bool = False
    separate: bool = False
    eoi: int | None = None
    new_layers: int | None = None


def derive_model(
    source: config.Model,
    arrangement: Arrangement,
    vocab: int,
    encoder_source: config.Model | None = None,
) -> config.Model:
    """Derives the config of an adapted model.

    The encoder is that of encoder_source (None: the source), or its decoder if it has none. Where
    two checkpoints or two widths meet, each tower keeps an embedding of its own. The encoder of a
    merged model sees as many keys through a window as the decoder (T5Gemma 2).

    Args:
      source: model of the checkpoint.
      arrangement: towers of the adapted model.
      vocab: least number of ids; it is rounded up to a multiple of 128.
      encoder_source: model of the encoder's checkpoint.

    Raises:
      ValueError: the source lacks a tower that could become one of these.
    """
    changes: dict[str, Any] = {
        "vocab": round_vocabulary(max(source.vocab, vocab)),
        **dict.fromkeys(("prefix_lm", "separate_embeddings"), False),
        "readout": None,
        "eoi": source.eoi if arrangement.eoi is None else arrangement.eoi,
    }
    decoder = derive_new_decoder(source, arrangement) if arrangement.new_layers else source.decoder
    config.require(
        decoder is not None or arrangement.to == "encoder_only",
        f"The source is an encoder alone: --to={arrangement.to} needs a decoder, or --new_decoder",
    )
    if arrangement.to == "decoder_only":
        assert decoder is not None
        changes |= {"encoder": None, "decoder": dataclasses.replace(decoder, merged=False)}
        return dataclasses.replace(source, **changes)
    reader = source if encoder_source is None else encoder_source
    encoder = reader.encoder
    if encoder is None:
        assert reader.decoder is not None
        encoder = dataclasses.replace(reader.decoder, merged=False)
    if arrangement.to == "encoder_only":
        return dataclasses.replace(source, **changes, encoder=encoder, decoder=None)
    assert decoder is not None
    if arrangement.merged and encoder.window is not None:
        encoder = dataclasses.replace(encoder, window_form="halved")
    two = encoder_source is not None or encoder.embed != decoder.embed or arrangement.separate
    changes |= {"separate_embeddings": two or source.separate_embeddings, "add_bos": True}
    decoder = dataclasses.replace(decoder, merged=arrangement.merged)
    return dataclasses.replace(source, **changes, encoder=encoder, decoder=decoder)


def derive_new_decoder(source: config.Model, arrangement: Arrangement) -> config.Stack:
    """Config of a decoder that is drawn anew: the source's, or its encoder's, of another depth."""
    config.require(
        arrangement.to == "encoder_decoder",
        f"--new_decoder belongs to --to=encoder_decoder; here it is {arrangement.to}",
    )
    return dataclasses.replace(source.last_stack, layers=arrangement.new_layers)


def round_vocabulary(vocab: int) -> int:
    """vocab, or the next multiple of MULTIPLE if it is not one and not small."""
    return vocab if vocab <= MULTIPLE else -(-vocab // MULTIPLE) * MULTIPLE
