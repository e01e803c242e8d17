# SPDX-License-Identifier: Apache-2.0
"""The first state of the decoding loop.

b rows    T slots of a row
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite import sharding
from t5x_lite.decoding.protocol import DecodeContext, DecodeState, TokenDetails
from t5x_lite.decoding.steering.processor import Text


def initial_state(
    context: DecodeContext, cache: Any, slots: int, drafter_state: Any
) -> DecodeState:
    """Returns the loop's first state, all but the last token of each prompt in the cache.

    Args:
      context: constants of the request.
      cache: cache of the prompts.
      slots: T.
      drafter_state: the drafter's first state.
    """
    prompts, strings = context.prompts, context.stopping.strings
    tokens = prompts.tokens
    last = jnp.arange(tokens.shape[1]) == prompts.length[:, None] - 1
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
    text = Text(tokens, prompts.length, prompts.length)
    details = None if context.logprobs is None else empty_details(tokens, context.logprobs)
    return DecodeState(
        tokens=tokens,
        length=prompts.length - 1,
        root=jnp.sum(jnp.where(last, prompts.tokens, 0), axis=1),
        done=prompts.length >= context.stopping.limit,
        log_probability=jnp.zeros_like(prompts.length, jnp.float32),
        token_step=jnp.zeros_like(tokens),
        token_node=jnp.zeros_like(tokens),
        steps=jnp.int32(0),
        cache=cache,
        drafter_state=drafter_state,
        processor_states=context.processors.begin(text, context.target.vocab),
        details=details,
        stop_state=None if strings is None else strings.begin(prompts.length),
    )


def empty_details(tokens: Int[Array, "b T"], count: int) -> TokenDetails:
    """Returns details of no token, with room for `count` alternatives at every slot."""
    zeros = jnp.zeros_like(tokens, jnp.float32)
    several = sharding.by_rows(jnp.repeat(zeros[..., None], count, axis=2))
    return TokenDetails(zeros, several.astype(jnp.int32), several, zeros)


def take_first_samples(x: Array, samples: int) -> Array:
    """Takes the first of each `samples` rows of x [b * samples ...]: [b ...]."""
    place = jax.typeof(x).sharding.spec
    shape = (x.shape[0] // samples, samples, *x.shape[1:])
    split = jnp.reshape(x, shape, out_sharding=jax.P(place[0], None, *place[1:]))
    return sharding.by_rows(split[:, 0])
