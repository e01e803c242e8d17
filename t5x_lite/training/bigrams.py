# SPDX-License-Identifier: Apache-2.0
"""A small neural bigram model of targets, for drafts that are refined by it (decoding.drafters).

n pairs    v vocabulary    r width
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_lite.decoding.drafters.refined import Bigrams

RATE = 0.02


def pairs(rows: Iterable[Sequence[int]], start: int) -> np.ndarray:
    """Every token [n 2] of the rows with the one before it; before the first one stands start."""
    found = [np.stack([[start, *row[:-1]], row], axis=1) for row in rows if len(row)]
    return np.concatenate(found).astype(np.int32) if found else np.zeros((0, 2), np.int32)


def fit(
    rows: Iterable[Sequence[int]],
    vocab: int,
    *,
    start: int = 0,
    width: int = 32,
    steps: int = 300,
    seed: int = 0,
) -> Bigrams:
    """Bigrams of the rows of ids, with the least cross entropy that Adam finds in `steps` steps.

    The same rows and seed give the same weights.

    Raises:
      ValueError: there is no token, or one outside of the vocabulary.
    """
    data = pairs(rows, start)
    if not len(data):
        raise ValueError("Bigrams cannot be learned of no tokens at all: give rows of target ids")
    if data.min() < 0 or data.max() >= vocab:
        raise ValueError(f"Bigrams: ids must be in 0..{vocab - 1}; got {data.min()}..{data.max()}")
    first, second = jax.random.split(jax.random.key(seed))
    draw = lambda key, shape: width**-0.5 * jax.random.normal(key, shape)
    params = Bigrams(draw(first, (vocab, width)), draw(second, (width, vocab)))
    optimizer = optax.adam(RATE)
    chosen = np.random.default_rng(seed).integers(0, len(data), (steps, min(1024, len(data))))

    def step(carry, places):
        params, state = carry
        before, after = jnp.asarray(data)[places].T
        loss = lambda params: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(params[0][before] @ params[1], after)
        )
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), chosen)[0][0])
    return Bigrams(*map(np.asarray, run(params)))
