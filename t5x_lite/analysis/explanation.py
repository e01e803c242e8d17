# SPDX-License-Identifier: Apache-2.0
"""Explanation of a text: views of the model's predictions, attention and decoding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import config
from t5x_lite.analysis import decoder_lens, drawing, reading
from t5x_lite.analysis.drawing import token_label, token_labels
from t5x_lite.analysis.maps import AttentionMaps, Positions
from t5x_lite.analysis.views import Alternatives, Blocks, DecoderLens, Lens
from t5x_lite.config.canvas import check_left_to_right
from t5x_lite.evaluation.draft_report import draft_text
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import Prediction
from t5x_lite.model import positions
from t5x_lite.utils.not_none import not_none


class Explanation(drawing.Renderable):
    """A text as a model reads or writes it, with views of what happens inside the model.

    Each view renders itself in a notebook and in a terminal, and has its numbers as numpy:
    alternatives, lens, attention, decoder_lens, blocks, positions. A view that does not apply to
    the model raises a ValueError.

    Attributes:
      input: the input text.
      written: the output text.
    """

    def __init__(
        self,
        predictor: Predictor,
        input: str,
        text: reading.ExplainedText,
        read: reading.Inspection,
        decode: config.Decode,
        prediction: Prediction | None,
    ):
        """Keeps the inputs of the views, which are computed on demand.

        Args:
          predictor: the model with its vocabularies.
          input: the input text.
          text: its ids, with those written.
          read: activations of the model over the text.
          decode: settings of decoding.
          prediction: the prediction, if the model wrote the text; None for a given target.
        """
        self.predictor, self.input, self.text = predictor, input, text
        self.read, self.decode, self.prediction = read, decode, prediction
        self.written = predictor.targets.decode(text.written)

    @functools.cached_property
    def alternatives(self) -> Alternatives:
        """Probabilities of the tokens written, and of their alternatives."""
        predictions = reading.TokenPredictions(*(each[-1] for each in self.read.predictions))
        return Alternatives(
            self.labels, predictions, [self.target_labels(row) for row in predictions.ids]
        )

    @functools.cached_property
    def lens(self) -> Lens:
        """The logit lens: predictions of every layer."""
        predictions = self.read.predictions
        return Lens(
            self.labels, predictions, [self.target_labels(row[:, 0]) for row in predictions.ids]
        )

    @functools.cached_property
    def attention(self) -> AttentionMaps:
        """Attention of every layer and head."""
        cfg, text = self.predictor.cfg, self.text
        inputs = token_labels(self.predictor.inputs, text.inputs)
        before = text.tokens[: text.prompt]
        # The prompt of a decoder-only model has the vocabulary of inputs.
        prompt = token_labels(self.predictor.inputs, before, cfg.decoder_start_token_id)
        tokens = [*prompt, *self.labels][:-1]
        return AttentionMaps(inputs, tokens, self.read.decoder, self.read.cross, self.read.encoder)

    @functools.cached_property
    def decoder_lens(self) -> DecoderLens:
        """Texts decoded from every layer of the encoder."""
        predictor = self.predictor
        ids = decoder_lens.decode_layers(
            predictor.cfg,
            predictor.params,
            inputs=self.text.inputs,
            length=self.decode.max_new_tokens,
            stops=predictor.targets.stops,
        )
        return DecoderLens(ids, [predictor.targets.decode(row) for row in ids])

    @property
    def blocks(self) -> Blocks:
        """Tokens by the forward pass that wrote them."""
        if self.prediction is None or not self.prediction.calls:
            reason = "was given" if self.prediction is None else "was found by beam search"
            raise ValueError(
                f"This text {reason}, not written block by block: explain without a target and "
                "with beams=1"
            )
        return Blocks(self.labels, draft_text(self.input, self.prediction, self.predictor.targets))

    @functools.cached_property
    def positions(self) -> Positions:
        """Relative position biases."""
        return position_bias(self.predictor.cfg, self.predictor.params)

    @functools.cached_property
    def labels(self) -> list[str]:
        """Labels of the tokens written."""
        return self.target_labels(self.text.written)

    def target_labels(self, ids: Any) -> list[str]:
        """Labels of ids of the targets' vocabulary."""

        @functools.cache
        def label(token: int) -> str:
            return token_label(self.predictor.targets, token)

        return [label(int(token)) for token in ids]

    def views(self) -> list[drawing.Renderable]:
        """The views that apply to this model and text."""
        views = [self.alternatives, self.lens, self.attention]
        cfg = self.predictor.cfg
        if cfg.encoder is not None:
            views.append(self.decoder_lens)
        if self.prediction is not None and self.prediction.calls:
            views.append(self.blocks)
        if any(stack and stack.positions == "relative" for stack in (cfg.encoder, cfg.decoder)):
            views.append(self.positions)
        return views

    def html(self) -> str:
        title = drawing.heading(f"{self.input} → {self.written}")
        return title + "".join(view.html() for view in self.views())

    def terminal(self) -> list[Any]:
        from rich.text import Text

        names = ".alternatives .lens .attention .decoder_lens .blocks .positions"
        texts = [Text(f"{self.input} → {self.written}"), Text(f"views: {names}", style="dim")]
        return [texts[0], *self.alternatives.terminal(), texts[1]]


def explain(
    predictor: Predictor,
    input: str,
    target: str | None = None,
    *,
    decode: config.Decode,
    top: int = 5,
) -> Explanation:
    """Explains a text: an input with its target, or with what the model writes.

    Args:
      predictor: the model with its vocabularies.
      input: the input text.
      target: the output text; None for the text that the model writes.
      decode: settings of decoding.
      top: number of alternatives per token.

    Raises:
      ValueError: the model lacks a decoder, a text is empty that must not be, or is too long.
    """
    check_left_to_right(predictor.cfg, "An explanation")
    example, prediction = predictor.encode_inputs([input])[0], None
    if target is None:
        with predictor.drafters.at_once():
            prediction = predictor.predict_ids([example], decode)[0]
    if prediction is None:
        written = predictor.encode_targets([not_none(target)])[0]
    else:
        written = prediction.tokens[0]
    text = reading.explained_text(predictor.cfg, example, written)
    read = reading.inspect_text(predictor.cfg, predictor.params, text, top)
    return Explanation(predictor, input, text, read, decode, prediction)


def position_bias(cfg: config.Model, params: Any) -> Positions:
    """Relative position biases of every stack with a table; NaN for the future of a decoder.

    Raises:
      ValueError: no stack has a table.
    """
    stacks, farthest = {}, 0
    for name, stack in (("encoder", cfg.encoder), ("decoder", cfg.decoder)):
        if stack is not None and stack.positions == "relative":
            stacks[name] = stack
            farthest = max(farthest, stack.max_distance)
    if not stacks:
        raise ValueError(
            "This model lacks a table of position biases: its positions are "
            f"{cfg.last_stack.positions}"
        )
    distances = np.arange(-farthest, farthest + 1)
    bias = {}
    for name, stack in stacks.items():
        tower, both = params[name], name == "encoder"
        layers = tower["layers"] if stack.bias_per_layer else []
        tables = [layer["attention"]["bias"] for layer in layers] or [tower["bias"]]
        tables = np.stack([np.asarray(jax.device_get(t), np.float32) for t in tables])
        bucket = np.asarray(
            positions.relative(tables[0], stack, both).bucket(jnp.asarray(distances))
        )
        bias[name] = np.moveaxis(tables[:, bucket], 1, 2)
        if not both:
            bias[name][..., distances > 0] = np.nan
    return Positions(distances, bias)
