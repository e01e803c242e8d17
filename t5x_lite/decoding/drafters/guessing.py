# SPDX-License-Identifier: Apache-2.0
"""A chain of guesses, one after the other: what drafters that are models have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.decoding import sampling
from t5x_lite.decoding.protocol import Draft, Setting, State

# step(tokens [b], number, notes) -> (logits [b v] of what follows them, notes)
Step = Callable[[Int[Array, " b"], Any, Any], tuple[Float[Array, "b v"], Any]]


class Guesser(NamedTuple):
    """How to guess `count` tokens one after the other; the first of them by `first`, if given.

    Guesses are chosen with the noise of the model's own choice, so that exact acceptance agrees
    with them as often as the two models agree; with `drawn` they are drawn freely, and the draft
    carries the law that speculative acceptance asks for.
    """

    count: int
    step: Step
    first: Step | None = None
    drawn: bool = False


def guesses(setting: Setting, state: State, how: Guesser, notes: Any) -> tuple[Draft, Any]:
    """The guesses after the root, each from the logits that a step gave for the one before."""

    def turn(carry, number, step=how.step):
        token, notes = carry
        logits, notes = step(token, number, notes)
        token, law = guess(setting, state, logits, number, how.drawn)
        return (token, notes), (token, law)

    carry, opening, begin = (state.root, notes), None, 0
    if how.first is not None:
        carry, opening = turn(carry, 0, how.first)
        opening, begin = jax.tree.map(lambda x: x[None], opening), 1
    (_, notes), found = jax.lax.scan(turn, carry, jnp.arange(begin, how.count))
    if opening is not None:
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts), opening, found)
    tokens, laws = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)
    return Draft(tokens, laws), notes


def guess(
    setting: Setting, state: State, logits: Float[Array, "b v"], number: Any, drawn: bool
) -> tuple[Int[Array, " b"], Float[Array, "b v"] | None]:
    """The guess of this number after the root (from 0), and with `drawn` its law."""
    begin, rules = state.length + 1, setting.rules
    position = begin + number
    if not drawn:
        return sampling.choose(logits[:, None], position[:, None], rules.sampling)[:, 0], None
    law = sampling.law(logits[:, None], rules.sampling)[:, 0]
    if rules.sampling is None:
        return jnp.argmax(law, axis=-1).astype(jnp.int32), law
    return sampling.guess(law, begin, position, rules.sampling), law
