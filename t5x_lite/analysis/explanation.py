# SPDX-License-Identifier: Apache-2.0
"""A text and what the model made of it, to be looked at from several sides."""

import functools
from typing import Any

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.analysis import decoder_lens, drawing, reading
from t5x_lite.analysis.labels import label, labels
from t5x_lite.analysis.maps import Attention, Positions
from t5x_lite.analysis.views import Alternatives, Blocks, DecoderLens, Lens
from t5x_lite.evaluation.blocks import drawn
from t5x_lite.evaluation.predict import Prediction, Predictor
from t5x_lite.model import positions


class Explanation(drawing.View):
    """What a model made of an input and what it wrote, or was given as written.

    input and written are texts. Each view draws itself in a notebook and in a terminal, and has its
    numbers as numpy: alternatives, lens, attention, decoder_lens, blocks, positions. One that the
    model has nothing for raises a ValueError that says so.
    """

    def __init__(
        self,
        predictor: Predictor,
        input: str,
        text: reading.Text,
        read: reading.Reading,
        decode: config.Decode,
        made: Prediction | None,
    ):
        self.predictor, self.input, self.text = predictor, input, text
        self.read, self.decode, self.made = read, decode, made
        self.written = predictor.targets.decode(text.written)

    @functools.cached_property
    def alternatives(self) -> Alternatives:
        guesses = reading.Guesses(*(each[-1] for each in self.read.guesses))
        return Alternatives(self.labels, guesses, [self.named(row) for row in guesses.ids])

    @functools.cached_property
    def lens(self) -> Lens:
        guesses = self.read.guesses
        return Lens(self.labels, guesses, [self.named(row[:, 0]) for row in guesses.ids])

    @functools.cached_property
    def attention(self) -> Attention:
        cfg, text = self.predictor.cfg, self.text
        inputs = labels(self.predictor.inputs, text.inputs)
        before = text.tokens[: text.prompt]
        # What a lone decoder was given are inputs.
        prompt = labels(self.predictor.inputs, before, cfg.start)
        tokens = [*prompt, *self.labels][:-1]
        return Attention(inputs, tokens, self.read.decoder, self.read.cross, self.read.encoder)

    @functools.cached_property
    def decoder_lens(self) -> DecoderLens:
        predictor = self.predictor
        given = (self.text.inputs, self.decode.length, predictor.targets.stops)
        ids = decoder_lens.written(predictor.cfg, predictor.params, *given)
        return DecoderLens(ids, [predictor.targets.decode(row) for row in ids])

    @property
    def blocks(self) -> Blocks:
        if self.made is None or not self.made.calls:
            reason = "was given" if self.made is None else "was found by beam search"
            raise ValueError(
                f"This text {reason}, not written block by block: explain without a target and "
                "with beams=1"
            )
        return Blocks(self.labels, drawn(self.input, self.made, self.predictor.targets))

    @functools.cached_property
    def positions(self) -> Positions:
        return position_bias(self.predictor.cfg, self.predictor.params)

    @functools.cached_property
    def labels(self) -> list[str]:
        """Of the tokens that were written."""
        return self.named(self.text.written)

    def named(self, ids: Any) -> list[str]:
        name = functools.cache(lambda token: label(self.predictor.targets, token))
        return [name(int(token)) for token in ids]

    def views(self) -> list[drawing.View]:
        """Those that this model and this text have."""
        found = [self.alternatives, self.lens, self.attention]
        has = self.predictor.cfg
        if has.encoder is not None:
            found.append(self.decoder_lens)
        if self.made is not None and self.made.calls:
            found.append(self.blocks)
        if any(stack and stack.positions == "relative" for stack in (has.encoder, has.decoder)):
            found.append(self.positions)
        return found

    def html(self) -> str:
        title = drawing.heading(f"{self.input} → {self.written}")
        return title + "".join(view.html() for view in self.views())

    def terminal(self) -> list[Any]:
        from rich.text import Text

        names = ".alternatives .lens .attention .decoder_lens .blocks .positions"
        texts = [Text(f"{self.input} → {self.written}"), Text(f"look at {names}", style="dim")]
        return [texts[0], *self.alternatives.terminal(), texts[1]]


def explain(
    predictor: Predictor,
    input: str,
    target: str | None = None,
    *,
    decode: config.Decode,
    top: int = 5,
) -> Explanation:
    """The model's reading of input and of target; without a target, of what it writes itself as
    decode says. top is how many alternatives a place has.

    Raises:
      ValueError: there is no decoder, the text is empty where it may not be, or too long.
    """
    example, made = predictor.read([input])[0], None
    if target is None:
        made = predictor.continued([example], decode)[0]
    written = predictor.written([target])[0] if made is None else made.tokens[0]
    text = reading.text_of(predictor.cfg, example, written)
    read = reading.read(predictor.cfg, predictor.params, text, top)
    return Explanation(predictor, input, text, read, decode, made)


def position_bias(cfg: config.Model, params: Any) -> Positions:
    """The relative position bias of every stack that has one; NaN where a decoder never looks.

    Raises:
      ValueError: none has one.
    """
    found, farthest = {}, 0
    for name, stack in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        if stack is not None and stack.positions == "relative":
            found[name] = stack
            farthest = max(farthest, stack.max_distance)
    if not found:
        raise ValueError(
            "This model has no table of position biases: its positions are "
            f"{(cfg.decoder or cfg.encoder).positions}"
        )
    distances = np.arange(-farthest, farthest + 1)
    bias = {}
    for name, stack in found.items():
        tower, both = params[name], name == "encoder"
        layers = tower["layers"] if stack.bias_per_layer else []
        tables = [layer["attention"]["bias"] for layer in layers] or [tower["bias"]]
        tables = np.stack([np.asarray(jax.device_get(t), np.float32) for t in tables])
        bucket = np.asarray(positions.relative(tables[0], stack, both).bucket(distances))
        bias[name] = np.moveaxis(tables[:, bucket], 1, 2)
        if not both:
            bias[name][..., distances > 0] = np.nan
    return Positions(distances, bias)
