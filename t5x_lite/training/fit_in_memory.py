# SPDX-License-Identifier: Apache-2.0
"""Training on a few examples in memory, as in a notebook: no run, no data set, no checkpoint."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import generation, verification
from t5x_lite.decoding.request import decoder_prompt
from t5x_lite.decoding.sampling import gather_vocabulary
from t5x_lite.decoding.scoring import check_pairs
from t5x_lite.model import adapters, quantization
from t5x_lite.model.computation import with_dtype_of

# Adam without its learning rate, an argument of every step; clipped, since batches are small.
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


class TrainingExamples(NamedTuple):
    """Rows of examples, one per row.

    Attributes:
      inputs: input ids of the encoder and tokens of the decoder.
      next_ids: [b t] int32, the id after each decoder token.
      weights: [b t] float32, 1 where next_ids is a target.
    """

    inputs: model.InspectionInputs
    next_ids: Any
    weights: Any


class Learner:
    """Weights from `decoding.prepare_params` that train by Adam (Kingma and Ba, 2015).

    Attributes:
      master: weights in float32, which the optimizer updates.
      params: the same weights in the dtypes that decoding reads.
    """

    def __init__(self, cfg: config.Model, params: Any):
        self.cfg = with_dtype_of(cfg, params)
        self.params = params
        self.master = jax.tree.map(lambda weight: weight.astype(jnp.float32), params)
        self.optimizer = jax.jit(ADAM.init)(self.master)

    def step(
        self,
        inputs: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        learning_rate: float,
    ) -> float:
        """Takes one step of Adam.

        Args:
          inputs: input ids of each example.
          targets: target ids of each example.
          learning_rate: step size, positive.

        Returns:
          the loss before the step, in nats per target token.

        Raises:
          ValueError: lists that do not pair up, ids that the model lacks, a rate that is not
            positive; or a loss or gradient that is not finite, which changes nothing.
        """
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {learning_rate}")
        example = make_training_examples(self.cfg, inputs, targets)
        loss, master, optimizer = update_step(
            self.cfg, self.master, self.optimizer, example, jnp.float32(learning_rate)
        )
        loss = float(loss)
        if not np.isfinite(loss):
            raise ValueError(
                "The loss or its gradient is not finite, so no weight was changed: load the model "
                "again to undo earlier steps, and lower learning_rate"
            )
        self.master, self.optimizer = master, optimizer
        self.params = jax.tree.map(
            lambda weight, old: weight.astype(old.dtype), master, self.params
        )
        return loss


def teach(
    predictor: Any,
    learner: Learner | None,
    pairs: tuple[Sequence[str], Sequence[str]],
    learning_rate: float,
) -> tuple[Learner, float]:
    """Takes one step on texts, after which a predictor has the new weights.

    Args:
      predictor: `evaluation.predict.Predictor`.
      learner: of the steps before; None for the first one.
      pairs: inputs and as many targets.
      learning_rate: step size.

    Returns:
      The learner, and the loss before the step.

    Raises:
      ValueError: the weights are quantized or have adapters, or as Learner.step.
    """
    if quantization.has_quantized(predictor.params):
        raise ValueError("Quantized weights cannot be trained: load without quantize")
    if adapters.has_adapted(predictor.params):
        raise ValueError("A session with adapters does not train: train the one without them")
    learner = learner or Learner(predictor.cfg, predictor.params)
    inputs, targets = pairs
    ids = predictor.encode_inputs(inputs), predictor.encode_targets(targets)
    loss = learner.step(*ids, learning_rate)
    predictor.params = learner.params
    return learner, loss


def make_training_examples(
    cfg: config.Model, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> TrainingExamples:
    """Places one pair per row on the mesh; rows that only fill it up have weight 0.

    Args:
      cfg: config of the model.
      inputs: input ids of each example.
      targets: target ids of each example.
    """
    check_pairs(cfg, inputs, targets)
    count = len(inputs)
    missing = -count % sharding.batch_shards()
    inputs, targets = ([*rows, *(rows[0] for _ in range(missing))] for rows in (inputs, targets))
    prompts = [
        [cfg.decoder_start_token_id] if cfg.encoder else decoder_prompt(cfg, row) for row in inputs
    ]
    rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    tokens, length = pad_to_bucket([row[:-1] for row in rows])
    next_ids = pad_to_bucket([row[1:] for row in rows])[0]
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    position = np.arange(tokens.shape[1])
    weights = (position >= prompt_lengths[:, None] - 1) & (position < length[:, None])
    weights[count:] = False
    inspected = model.InspectionInputs(tokens, length, prompt_lengths)
    if cfg.encoder:
        input_ids, inputs_length = pad_to_bucket(inputs)
        inspected = inspected._replace(inputs=input_ids, inputs_length=inputs_length)
    return generation.shard_rows(TrainingExamples(inspected, next_ids, weights.astype(np.float32)))


def pad_to_bucket(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of ids to a bucketed length [b t]; also returns their lengths [b]."""
    return decoding.pad_rows(ids, decoding.bucket_length(max(map(len, ids))))


@functools.partial(jax.jit, static_argnums=0)
def update_step(
    cfg: config.Model,
    params: Any,
    optimizer: Any,
    example: TrainingExamples,
    learning_rate: jax.Array,
):
    """Takes one step of ADAM; changes nothing if the loss or the gradient is not finite.

    Args:
      cfg: config of the model.
      params: float32 weights.
      optimizer: state of ADAM.
      example: rows to train on.
      learning_rate: float32 scalar.

    Returns:
      the loss before the step (NaN if nothing changed), new weights, new state of ADAM.
    """

    def loss_of(params):
        cast = jax.tree.map(lambda weight: weight.astype(cfg.dtype), params)
        transformer = model.Inspected(cfg, scan=False)
        logits = gather_vocabulary(
            transformer.apply(
                {"params": cast}, example.inputs, method=model.Inspected.next_token_logits
            )
        )
        tokens = verification.token_log_probability(logits, example.next_ids)
        return -jnp.sum(tokens * example.weights) / jnp.sum(example.weights)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, new_optimizer = ADAM.update(gradient, optimizer, params)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
    params = jax.tree.map(
        lambda old, update: jnp.where(finite, old - learning_rate * update, old), params, updates
    )
    new_optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), new_optimizer, optimizer
    )
    return jax.reshard(jnp.where(finite, loss, jnp.nan), P()), params, new_optimizer
