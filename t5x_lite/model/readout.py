# SPDX-License-Identifier: Apache-2.0
"""The head of `Model.readout`: from the states at the inputs to labels, a number or a vector.

b batch    s input position    t target    d width    r outputs
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config
from t5x_lite.kernels.vocabulary.logits import best_other_logit, target_mask
from t5x_lite.model.layers import dropout, split, weight
from t5x_lite.model.pooling import normalize, pool_segments
from t5x_lite.utils.not_none import not_none


class ReadoutHead(nn.Module):
    """Pooling, an optional layer with tanh, and the output; computed in float32.

    With dense and bias it is transformers' T5ClassificationHead, without either its `score`.
    Attention's query is initialized to zero, so that it begins as the mean. model is the
    architecture of the whole model.
    """

    model: config.Model

    @property
    def cfg(self) -> config.Readout:
        return not_none(self.model.readout)

    @property
    def sizes(self):
        width = self.model.last_stack.embed
        size = self.cfg.project if self.cfg.kind == "vector" else self.cfg.size
        return {"embed": width, "norm": width, "projected": width} | {
            "outputs": size,
            "temperature": 1,
            "answers": 2,
        }

    def setup(self):
        cfg = self.cfg
        pooled = cfg.kind != "tags" and cfg.pooling == "attention"
        self.query = weight(self, "query", "norm", 0.0) if pooled else None
        if cfg.dense:
            self.dense = weight(self, "dense", "embed -> projected")
            self.dense_bias = weight(self, "dense_bias", "projected", 0.0)
        if cfg.project is not None:
            self.projection = weight(self, "projection", "embed -> outputs")
        if cfg.matching:
            self.matching = weight(self, "matching", "embed -> answers")
            self.matching_bias = weight(self, "matching_bias", "answers", 0.0)
        if cfg.temperature is not None:
            self.log_temperature = weight(self, "log_temperature", "temperature", 0.0)
        if cfg.kind != "vector":
            self.out = weight(self, "out", "embed -> outputs")
            self.out_bias = weight(self, "out_bias", "outputs", 0.0) if cfg.bias else None

    def match(
        self, states: Float[Array, "b j d"], segments: Int[Array, "b j"], key: jax.Array | None
    ) -> Float[Array, "b 2"]:
        """Logits of "apart" and "together" for rows of two texts.

        Args:
          states: [b j d] states at the tokens of both.
          segments: [b j] 1 for tokens, 0 for padding.
          key: dropout key; None for no dropout.
        """
        x = pool_segments(states, segments[:, None] > 0, self.cfg.pooling, self.query)[:, 0]
        x = dropout(x[:, None], self.cfg.dropout, key)[:, 0]
        logits = jnp.einsum("bd,da->ba", x, self.matching.astype(jnp.float32))
        return logits + self.matching_bias.astype(jnp.float32)

    def temperature(self) -> Float[Array, ""]:
        """The temperature that is trained: its first value times an exponential, so that no step
        makes it negative."""
        return not_none(self.cfg.temperature) * jnp.exp(self.log_temperature[0].astype(jnp.float32))

    def __call__(
        self,
        states: Float[Array, "b s d"],
        segments: Int[Array, "b s"],
        wanted: Int[Array, "b t"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b t r"]:
        """Outputs for the segments that are wanted; of tags for each state.

        Args:
          states: [b s d] states at the inputs.
          segments: [b s] segment ids of the inputs; 0 is padding.
          wanted: [b t] segment id of each target; 0 is padding.
          key: dropout key; None for no dropout.
        """
        cfg = self.cfg
        x = states.astype(jnp.float32)
        if cfg.kind != "tags":
            chosen = (wanted[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
            x = pool_segments(x, chosen, cfg.pooling, self.query)
        first, second = split(key, 2)
        x = dropout(x, cfg.dropout, first)
        if cfg.dense:
            x = jnp.einsum("btd,de->bte", x, self.dense.astype(jnp.float32))
            x = dropout(jnp.tanh(x + self.dense_bias.astype(jnp.float32)), cfg.dropout, second)
        if cfg.kind == "vector":
            if cfg.project is not None:
                x = jnp.einsum("btd,dr->btr", x, self.projection.astype(jnp.float32))
            return normalize(x) if cfg.normalize else x
        x = jnp.einsum("btd,dr->btr", x, self.out.astype(jnp.float32))
        return x if self.out_bias is None else x + self.out_bias.astype(jnp.float32)


class TargetLosses(NamedTuple):
    """Losses of targets.

    Attributes:
      objective: [b t] what is minimized.
      nll: [b t] cross entropy in nats, or squared error of numbers.
      correct: [b t] True where the output says the target; None for numbers.
    """

    objective: Float[Array, "b t"]
    nll: Float[Array, "b t"]
    correct: Bool[Array, "b t"] | None


def target_losses(
    cfg: config.Readout,
    outputs: Float[Array, "b t r"],
    targets: Int[Array, "b t"],
    places: Int[Array, "b t"],
) -> TargetLosses:
    """Losses of targets, without label smoothing.

    Classes and tags have the cross entropy of the target among all labels, labels the binary cross
    entropy of the label at the target's place, and a number its squared error.

    Args:
      cfg: config of the readout.
      outputs: [b t r] float32.
      targets: [b t] ids, as `tokenizers.labels` has them.
      places: [b t] place of each target in its example.
    """
    if cfg.kind == "number":
        error = jnp.square(outputs[:, :, 0] - decode_numbers(targets))
        return TargetLosses(error, error, None)
    chosen = places if cfg.kind == "labels" else targets
    logits = jnp.sum(jnp.where(target_mask(outputs, chosen), outputs, 0), axis=-1)
    if cfg.kind == "labels":
        loss = jax.nn.softplus(logits) - logits * targets
        return TargetLosses(loss, loss, (logits > 0) == (targets > 0))
    loss = jax.nn.logsumexp(outputs, axis=-1) - logits
    return TargetLosses(loss, loss, logits > best_other_logit(outputs, targets))


def decode_numbers(targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Numbers of ids, as `tokenizers.labels.decode_number`."""
    return jax.lax.bitcast_convert_type(jnp.left_shift(targets, 1), jnp.float32)
