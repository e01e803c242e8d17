# SPDX-License-Identifier: Apache-2.0
"""Speculative sampling: texts have the model's distribution, but are not those of plain decoding.

p is the model's distribution after temperature, top-k and top-p, q the one that a draft was sampled
from (`Draft.log_probability`; without it, q is one at the draft). Noise is keyed by the row's seed
and number, by where the block begins and by position, so that the same request gives the same text.
Whether there is a draft at all (not -1) must not depend on what it would have been.

b rows    w nodes of a block, a chain    v vocabulary
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding.acceptance.exact import AcceptedPath, Exact, VerifyInput
from t5x_lite.decoding.sampling import NoiseKind
from t5x_lite.utils.not_none import not_none


@dataclass(frozen=True)
class Speculative:
    """Accepts draft x with probability min(1, p(x) / q(x)) (Leviathan et al., 2023, arXiv
    2211.17192, algorithm 1).

    The token after the accepted drafts is sampled from max(0, p - q) if a draft was rejected, and
    from p if none was. For greedy decoding the rule is `Exact`.

    Raises:
      ValueError: the drafter's tree is not a chain.
    """

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        return speculative_path(inputs)


@dataclass(frozen=True)
class BlockVerification:
    """Accepts the drafts of a block jointly (Sun et al., 2024, arXiv 2403.10444, algorithm 2).

    The distribution is that of Speculative, and never fewer tokens are accepted on average. For
    greedy decoding the rule is `Exact`.

    Raises:
      ValueError: the drafter's tree is not a chain.
    """

    def __call__(self, inputs: VerifyInput) -> AcceptedPath:
        if inputs.sampling is None:
            return Exact()(inputs)
        distributions = block_distributions(inputs)
        ratio = prefix_ratio(distributions)
        left = residual(ratio[..., None] * distributions.p, distributions.q)
        mass = jnp.sum(left, axis=-1)
        # Where both terms are 0, p is q and p(x) / q(x) stays 1: to stop here has probability 0.
        stay = mass / jnp.maximum(mass + 1 - ratio, jnp.finfo(jnp.float32).tiny)
        accepted = node_noise(inputs, NoiseKind.ACCEPT) < stay
        place = jnp.arange(accepted.shape[1])
        count = jnp.max(jnp.where(accepted & (place > 0), place, 0), axis=1)
        return close_path(inputs, count, take_node(left, count), take_node(distributions.p, count))


class BlockDistributions(NamedTuple):
    """Probabilities of every token after every node.

    Attributes:
      p: the model's.
      q: the drafter's; 0 where a draft is missing.
      p_draft: p of the draft that follows the node; 0 after the last one.
      q_draft: q of the draft that follows the node; 0 after the last one.
    """

    p: Float[Array, "b w v"]
    q: Float[Array, "b w v"]
    p_draft: Float[Array, "b w"]
    q_draft: Float[Array, "b w"]


def block_distributions(inputs: VerifyInput) -> BlockDistributions:
    """Computes p and q of a block.

    Raises:
      ValueError: its tree is not a chain.
    """
    if not inputs.tree.is_chain:
        raise ValueError(
            "Speculative acceptance and block verification follow one chain of drafts, and this "
            "drafter's block is a tree: accept exactly, or draft a chain"
        )
    p = jnp.exp(sampling.log_distribution(inputs.logits, inputs.sampling))
    # -1, a missing draft, after the last node too.
    drafts = next_drafts(inputs, inputs.block[:, :1] * 0 - 1)
    here = jnp.arange(p.shape[-1]) == drafts[..., None]
    if inputs.draft.log_probability is None:
        q = here.astype(p.dtype)
    else:
        q = jnp.pad(jnp.exp(inputs.draft.log_probability), ((0, 0), (0, 1), (0, 0)))
        q = jnp.where(drafts[..., None] >= 0, q, 0)

    def at_drafts(probabilities):
        return jnp.sum(jnp.where(here, probabilities, 0), axis=-1)

    return BlockDistributions(p, q, at_drafts(p), at_drafts(q))


def next_drafts(inputs: VerifyInput, last: Int[Array, "b 1"]) -> Int[Array, "b w"]:
    """The draft that follows each node, and `last` after the last node."""
    return jnp.concatenate(sharding.by_rows([inputs.block[:, 1:], last]), axis=1)


def speculative_path(inputs: VerifyInput, lenience: float = 1.0) -> AcceptedPath:
    """Accepts token by token, with `lenience` times q: below 1, more drafts than p would allow."""
    if inputs.sampling is None:
        return Exact()(inputs)
    distributions = block_distributions(inputs)
    # u < p / q, without the division: a token of probability 0 is never accepted.
    bound = node_noise(inputs, NoiseKind.ACCEPT) * lenience * distributions.q_draft
    count = count_leading(bound < distributions.p_draft)
    p, q = take_node(distributions.p, count), take_node(distributions.q, count)
    return close_path(inputs, count, residual(p, lenience * q), p)


def count_leading(accepted: Bool[Array, "b w"]) -> Int[Array, " b"]:
    """Counts the accepted drafts before the first that is rejected."""
    return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=1), axis=1)


def prefix_ratio(distributions: BlockDistributions) -> Float[Array, "b w"]:
    """Ratio p_i of arXiv 2403.10444: min(1, p_(i-1) p(x_i) / q(x_i)) of the first i drafts.

    It is 1 at the root.
    """
    p, q = distributions.p_draft, distributions.q_draft
    ratio = jnp.where(q > 0, p / q, 0)

    def follow(before, ratio):
        return jnp.minimum(1.0, before * ratio), before

    start = sharding.by_rows(jnp.ones_like(ratio[:, 0]))
    return jax.lax.scan(follow, start, ratio.T)[1].T


def residual(p: Float[Array, "... v"], q: Float[Array, "... v"]) -> Float[Array, "... v"]:
    """Computes max(0, p - q), not normalized."""
    return jnp.maximum(p - q, 0)


def take_node(x: Float[Array, "b w v"], node: Int[Array, " b"]) -> Float[Array, "b v"]:
    """Takes x at one node per row."""
    return jax.vmap(lambda row, node: row[node])(*sharding.by_rows((x, node)))


def node_noise(inputs: VerifyInput, kind: NoiseKind) -> Float[Array, "b w"]:
    """Uniform noise for every node, different in every step."""
    begin = sharding.by_rows(inputs.positions[:, 0])
    return sampling.uniform_noise(not_none(inputs.sampling), kind, begin, inputs.positions)


def close_path(
    inputs: VerifyInput, count: Int[Array, " b"], left: Float[Array, "b v"], p: Float[Array, "b v"]
) -> AcceptedPath:
    """Ends the path after the accepted drafts with a sampled token.

    Args:
      inputs: the block.
      count: number of accepted drafts.
      left: residual distribution to sample from, not normalized.
      p: the model's distribution, for rows where nothing is left.

    Returns:
      The path of count[b] drafts and one token.
    """
    begin, size = sharding.by_rows(inputs.positions[:, 0]), left.shape[-1:]
    # If q differs from p by less than rounding, nothing is left although a draft was rejected.
    left = jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), left, p)
    uniform = sampling.uniform_noise(
        not_none(inputs.sampling), NoiseKind.RESIDUAL, begin, (begin + count)[:, None], size
    )
    sampled = jnp.argmax(jnp.log(left) - jnp.log(-jnp.log(uniform[:, 0])), axis=-1)
    drafts = next_drafts(inputs, inputs.block[:, :1])
    path = jnp.zeros_like(inputs.block) + jnp.arange(inputs.tree.width)
    tokens = jnp.where(path < count[:, None], drafts, sampled[:, None].astype(jnp.int32))
    return AcceptedPath(path, tokens, count + 1)
