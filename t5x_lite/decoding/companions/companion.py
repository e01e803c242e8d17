# SPDX-License-Identifier: Apache-2.0
"""Companions of the model: what reads the same block, and what it knows between steps.

A companion is another model, the same model with another prompt, or layers of the model itself.
The first two have a cache of their own, which goes where the model's goes: it is written with each
block, compacted after a tree, and reordered with beams.

  b rows    w nodes of a block    c companions    v vocabulary    d model width
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import config, model, sharding
from t5x_lite.decoding import sampling
from t5x_lite.decoding import target as targets
from t5x_lite.decoding.companions.rules import IMPLAUSIBLE, BothLogits, CombinationRule
from t5x_lite.decoding.protocol import Prompts, Target, Tree
from t5x_lite.decoding.request import PromptRows
from t5x_lite.model.computation import with_dtype_of
from t5x_lite.utils.not_none import not_none


class CompanionState(NamedTuple):
    """State of a companion between steps.

    Attributes:
      model_tokens: number of new tokens that the model itself decided (`rules.Switch`).
      recent: its entropy before each of the last new tokens, -1 where there were fewer; as many as
        the rule's window has besides the next one.
      encoded: its encoded inputs; None for layers, as all below.
      cache: its cache.
      last: last token of its prompt.
      prompt: length of its prompt.
    """

    model_tokens: Int[Array, " b"]
    recent: Float[Array, "b n"]
    encoded: Any = None
    cache: Any = None
    last: Int[Array, " b"] | None = None
    prompt: Int[Array, " b"] | None = None


class BlockView(NamedTuple):
    """A block as the model reads it.

    Attributes:
      tokens: the block.
      index: slot of each row's root in the model's cache.
      prompt: length of each row's prompt.
      tree: shape of the block.
    """

    tokens: Int[Array, "b w"]
    index: Int[Array, " b"]
    prompt: Int[Array, " b"]
    tree: Tree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rule", "params", "rows"],
    meta_fields=["cfg", "layers"],
)
@dataclass(frozen=True)
class Companion:
    """Second logits of the same text, and the rule that combines them with the model's.

    Attributes:
      rule: the rule.
      params: weights, from `prepare_params`, of the model that reads `rows`; None for layers.
      rows: what it reads: one row for all samples of an input; None for layers.
      cfg: config of that model; None for layers.
      layers: numbers of the model's own layers after which the logits are read; none for a reader.
    """

    rule: CombinationRule
    params: Any = None
    rows: PromptRows | None = None
    cfg: config.Model | None = None
    layers: tuple[int, ...] = ()

    def with_params(self, params: Any) -> "Companion":
        """Returns the companion with those weights, which it computes in the dtype of."""
        cfg = with_dtype_of(not_none(self.cfg), params)
        return dataclasses.replace(self, params=params, cfg=cfg)

    def begin(self, prompts: Prompts, slots: int) -> CompanionState:
        """Encodes the inputs of the companion, and fills its cache.

        Args:
          prompts: prompts of the model, a row for each input.
          slots: slots of a row of the model.
        """
        none = jnp.zeros_like(prompts.length)
        recent = jnp.full_like(none, -1, jnp.float32)[:, None]
        recent = sharding.by_rows(jnp.repeat(recent, max(self.rule.window - 1, 0), axis=1))
        if self.cfg is None:
            return CompanionState(none, recent)
        rows, encoded = not_none(self.rows), model.EncoderMemory()
        if rows.inputs is not None:
            encoded = targets.encode_inputs(self.cfg, self.params, rows.inputs, rows.inputs_length)
        size = rows.prompts.shape[1]
        cache = targets.prefill(
            self.cfg,
            self.params,
            encoded,
            Prompts(rows.prompts, rows.prompts_length),
            slots + size - prompts.tokens.shape[1],
        )
        here = jnp.arange(size) == rows.prompts_length[:, None] - 1
        last = jnp.sum(jnp.where(here, rows.prompts, 0), axis=1)
        return CompanionState(none, recent, encoded, cache, last, rows.prompts_length)

    def read(
        self,
        target: Target,
        state: CompanionState,
        view: BlockView,
        inner: dict[int, Float[Array, "b w d"]],
    ) -> tuple[Float[Array, "c b w v"], CompanionState]:
        """Returns the logits after each node, and the state with the block in the cache.

        Args:
          target: the model.
          state: state before the block.
          view: the block.
          inner: input of each layer of `layers` at every node.
        """
        if self.cfg is None:
            norm = not_none(target.layer_range)(0, target.num_layers).final_norm
            return jnp.stack([target.logits(norm(inner[layer])) for layer in self.layers]), state
        # The first root is the end of the prompt: for the companion the end of its own.
        begins = (view.index == view.prompt - 1)[:, None] & (np.arange(view.tree.width) == 0)
        tokens = jnp.where(begins, not_none(state.last)[:, None], view.tokens)
        reader = targets.make_target(self.cfg, self.params, state.encoded)
        hidden, cache = reader.forward(
            jnp.minimum(tokens, self.cfg.vocab - 1),
            view.index + not_none(state.prompt) - view.prompt,
            state.cache,
            view.tree,
        )
        return reader.logits(hidden)[None], state._replace(cache=cache)


class CompanionOutput(NamedTuple):
    """Logits of one block after the companion.

    Attributes:
      logits: of the next token; the model's own without a companion.
      by_model: nodes after which the model itself decided; None for a rule that always mixes.
      entropy: of the companion after each node; None unless the rule reads it.
      state: state of the companion, with the block in its cache; None without a companion.
    """

    logits: Float[Array, "b w v"]
    by_model: Bool[Array, "b w"] | None = None
    entropy: Float[Array, "b w"] | None = None
    state: CompanionState | None = None


def combine_logits(
    companion: Companion | None,
    target: Target,
    state: CompanionState | None,
    view: BlockView,
    inner: dict[int, Float[Array, "b w d"]],
    logits: Float[Array, "b w v"],
) -> CompanionOutput:
    """Combines the logits of a block with the companion's.

    Args:
      companion: the companion; None for none.
      target: the model.
      state: state of the companion before the block.
      view: the block.
      inner: input of each layer of the companion at every node.
      logits: the model's logits after each node.
    """
    if companion is None:
        return CompanionOutput(logits)
    others, state = companion.read(target, not_none(state), view, inner)
    # Ids that only one of the two has, padding of its table, are no tokens.
    shared = min(logits.shape[-1], others.shape[-1])
    model_logits, others = logits[..., :shared], others[..., :shared]
    never = jnp.isneginf(model_logits) | jnp.any(jnp.isneginf(others), axis=0)
    entropy, mean = None, None
    if companion.rule.window:
        entropy = sampling.entropy(others[0])[..., 0]
        mean = mean_entropy(state.recent, entropy, view.tree)
    both = BothLogits(
        model=jnp.maximum(jax.nn.log_softmax(model_logits), IMPLAUSIBLE),
        others=jnp.maximum(jax.nn.log_softmax(others), IMPLAUSIBLE),
        entropy=mean,
    )
    combined, by_model = companion.rule.combine(both)
    combined = jnp.where(never, -jnp.inf, combined)
    missing = [(0, 0), (0, 0), (0, logits.shape[-1] - shared)]
    combined = jnp.pad(combined, missing, constant_values=-jnp.inf)
    return CompanionOutput(combined, by_model, entropy, state)


def mean_entropy(
    recent: Float[Array, "b n"], entropy: Float[Array, "b w"], tree: Tree
) -> Float[Array, "b w"]:
    """Returns the mean entropy over the last n + 1 tokens after each node.

    Args:
      recent: before each of the last new tokens, -1 where there were fewer.
      entropy: after each node.
      tree: shape of the block.
    """
    count = recent.shape[1]
    places = [[*range(count), *(count + np.flatnonzero(row))] for row in tree.ancestors]
    last = np.array([row[-count - 1 :] for row in places])
    values = jnp.concatenate(sharding.by_rows([recent, entropy]), axis=1)[:, last]
    exists = values >= 0
    return jnp.sum(jnp.where(exists, values, 0), axis=-1) / jnp.sum(exists, axis=-1)


def observe_entropy(
    state: CompanionState | None, entropy: Float[Array, "b D"] | None, count: Int[Array, " b"]
) -> CompanionState | None:
    """Returns the state after more tokens, as far as the companion's entropy goes.

    Args:
      state: state before them; None without a companion.
      entropy: before each of them; None unless the rule reads it.
      count: how many of them each row takes.
    """
    if state is None or entropy is None or not state.recent.shape[1]:
        return state
    both = jnp.concatenate(sharding.by_rows([state.recent, entropy]), axis=1)
    take = jax.vmap(lambda row, n: jax.lax.dynamic_slice(row, (n,), state.recent.shape[1:]))
    return state._replace(recent=take(both, count))


def replace_cache(state: CompanionState | None, change: Any) -> CompanionState | None:
    """Returns the state with another cache.

    Args:
      state: state of a companion; None without one.
      change: cache -> the new one.
    """
    if state is None or state.cache is None:
        return state
    return state._replace(cache=change(state.cache))


def take_rows(state: CompanionState | None, take: Any) -> CompanionState | None:
    """Returns the state of texts that go on from others, as beams do.

    Args:
      state: state of a companion; None without one.
      take: takes the rows of an array that they go on from.
    """
    if state is None:
        return None
    state = state._replace(recent=take(state.recent))
    return replace_cache(state, functools.partial(jax.tree.map, take))
