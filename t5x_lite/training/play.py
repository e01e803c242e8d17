# SPDX-License-Identifier: Apache-2.0
"""Weights that learn from a few examples at once, for play: no run, no data set, no checkpoint."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import generation, loop
from t5x_lite.decoding.request import check, check_ids, prompt
from t5x_lite.decoding.sampling import whole

# Adam without its rate, which every step is given anew; clipped, since batches of play are small.
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


class Lesson(NamedTuple):
    """Rows as the decoder reads them, what follows each token, and what of that is a target."""

    given: model.Given
    wanted: Any
    weights: Any


class Learner:
    """Weights from `decoding.prepare` that learn; each step is one of Adam's (Kingma and Ba, 2015).

    They are kept in float32; `params` are the same in the dtype that decoding reads.
    """

    def __init__(self, cfg: config.Model, params: Any):
        self.cfg = decoding.precise(cfg)
        self.params = params
        self.exact = jax.tree.map(lambda weight: weight.astype(jnp.float32), params)
        self.optimizer = jax.jit(ADAM.init)(self.exact)

    def step(
        self,
        inputs: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        learning_rate: float,
    ) -> float:
        """The loss before the step, in nats per target token.

        Raises:
          ValueError: lists that do not pair up, ids that the model does not have, a rate that is
            not positive; or a loss or gradient that is not finite, which changes nothing.
        """
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {learning_rate}")
        taught = lesson(self.cfg, inputs, targets)
        loss, exact, optimizer = stepped(
            self.cfg, self.exact, self.optimizer, taught, jnp.float32(learning_rate)
        )
        loss = float(loss)
        if not np.isfinite(loss):
            raise ValueError(
                "The loss or its gradient is not finite, so nothing was learnt: take back what was "
                "learnt so far by loading the model again, and lower learning_rate"
            )
        self.exact, self.optimizer = exact, optimizer
        self.params = jax.tree.map(lambda new, old: new.astype(old.dtype), exact, self.params)
        return loss


def lesson(
    cfg: config.Model, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> Lesson:
    """One pair per row, on the mesh; rows that fill it up count for nothing."""
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets: they must pair up")
    check(cfg, inputs)
    check_ids(cfg, "Target", targets)
    count = len(inputs)
    missing = -count % sharding.batch_shards()
    inputs, targets = [*inputs, *inputs[:1] * missing], [*targets, *targets[:1] * missing]
    before = [[cfg.start] if cfg.encoder else prompt(cfg, row) for row in inputs]
    rows = [[*first, *rest] for first, rest in zip(before, targets, strict=True)]
    padded = lambda ids: decoding.pad(ids, decoding.bucket(max(map(len, ids))))
    tokens, length = padded([row[:-1] for row in rows])
    wanted = padded([row[1:] for row in rows])[0]
    prompts = np.array([len(row) for row in before], np.int32)
    place = np.arange(tokens.shape[1])
    taught = (place >= prompts[:, None] - 1) & (place < length[:, None])
    taught[count:] = False
    given = model.Given(tokens, length, prompts)
    if cfg.encoder:
        read, read_length = padded(inputs)
        given = given._replace(inputs=read, inputs_length=read_length)
    return generation.place(Lesson(given, wanted, taught.astype(np.float32)))


@functools.partial(jax.jit, static_argnums=0)
def stepped(cfg: config.Model, params: Any, optimizer: Any, taught: Lesson, rate: jax.Array):
    """The loss before, and weights and optimizer after a step: NaN and the old ones where the loss
    or the gradient is not finite."""

    def loss_of(params):
        cast = jax.tree.map(lambda weight: weight.astype(cfg.activations), params)
        transformer = model.Inspected(cfg, scan=False)
        logits = whole(transformer.apply({"params": cast}, taught.given, method="written"))
        tokens = loop.token_log_probability(logits, taught.wanted)
        return -jnp.sum(tokens * taught.weights) / jnp.sum(taught.weights)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, after = ADAM.update(gradient, optimizer, params)
    fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
    params = jax.tree.map(lambda old, u: jnp.where(fine, old - rate * u, old), params, updates)
    after = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, optimizer)
    return jax.reshard(jnp.where(fine, loss, jnp.nan), P()), params, after
