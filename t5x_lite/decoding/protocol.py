# SPDX-License-Identifier: Apache-2.0
"""Interfaces between the decoding loop, its drafters and its acceptance rules.

A step of the loop is one forward pass of the target over one block of every row.

  b rows    w nodes of a block, root and drafts    D most tokens that one step can add to a row
  T slots of a row    v vocabulary    d model width
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding.sampling import SamplingParams
from t5x_lite.decoding.steering.processor import Processors
from t5x_lite.decoding.steering.stop_strings import StopStrings


class Target(NamedTuple):
    """The model that is decoded, as the loop sees it.

    Attributes:
      forward: (tokens [b w], index [b], cache, tree=None) -> (hidden [b w d], cache), with the
        block written into the slots from index[b] on.
      logits: hidden [b w d] -> float32 [b w v], the vocabulary of a row whole on one device.
      layer_range: (first, last) -> the LayerRange of the layers first <= layer < last.
      num_layers: layers of the decoder.
      vocab: v.
      heads: the heads that predict later tokens; None if the model has none.
    """

    forward: Callable
    logits: Callable
    layer_range: Callable | None = None
    num_layers: int = 0
    vocab: int = 0
    heads: "TargetHeads | None" = None


class TargetHeads(NamedTuple):
    """Draft heads of a Target: head i (0, 1, ...) predicts token i + 1 after the model's own.

    Attributes:
      apply: (hidden [b t d], heads, tokens=None) -> [b t g d], the hidden states to read the logits
        of the g heads of the slice `heads` from; `hidden` is the state that the root is read from.
      count: number of heads.
      sequential: heads depend on the drafts before them and are applied one at a time, head i with
        tokens [b t i + 1]: the root and the drafts of the heads before it.
    """

    apply: Callable
    count: int
    sequential: bool


class LayerRange(NamedTuple):
    """Consecutive layers of a Target, over their slice of its cache.

    Attributes:
      embed: (tokens [b w], index [b]) -> x [b w d], the input of the first layer of all.
      apply_layers: (x, index, cache, tree=None) -> (x, cache), with the block written as by
        Target.forward.
      final_norm: x -> hidden, as after the last layer of all.
      take_cache: whole cache -> the part of these layers.
      put_cache: (whole cache, part) -> the whole cache with that part replaced.
    """

    embed: Callable
    apply_layers: Callable
    final_norm: Callable
    take_cache: Callable
    put_cache: Callable


class StoppingCriteria(NamedTuple):
    """Conditions that end a row, and the loop.

    Attributes:
      eos: the id that ends a text, or several of which each does.
      limit: most slots of a row, prompt included.
      pause: number of steps after which the loop returns although rows are left (None: never).
      strings: texts that end a row; None for none.
    """

    eos: int | Int[Array, " e"]
    limit: Int[Array, " b"]
    pause: Int[Array, ""] | None = None
    strings: StopStrings | None = None


class Prompts(NamedTuple):
    """Decoder tokens of the request, right-padded; Model.decoder_start_token_id comes first."""

    tokens: Int[Array, "b p"]
    length: Int[Array, " b"]


class TokenDetails(NamedTuple):
    """Probabilities of tokens that were written; the model's own, without temperature and rules.

    Attributes:
      log_probability: of the token.
      top_tokens: the k most probable tokens of the place.
      top_log_probability: their log-probabilities.
      truncated: probability, at the temperature, of the tokens that top-k, top-p, min-p and their
        kin kept from being drawn; 0 if greedy.
    """

    log_probability: Float[Array, "b T"]
    top_tokens: Int[Array, "b T k"]
    top_log_probability: Float[Array, "b T k"]
    truncated: Float[Array, "b T"]


class DecodeContext(NamedTuple):
    """Everything that stays constant while a request is decoded.

    Attributes:
      target: the model.
      stopping: conditions that end a row.
      prompts: the decoder's prompts.
      inputs: the encoder's tokens, of which the first inputs_length[b] exist; None without an
        encoder.
      inputs_length: [b] int32, lengths of inputs; None without an encoder.
      weights: the drafter's own weights, or None.
      slots: T.
      sampling: how rows are sampled; None for greedy decoding.
      processors: what changes the logits before a token is chosen.
      companion: `companions.companion.Companion` whose logits are combined with the model's before
        the processors; None for none.
      logprobs: how many alternatives of each token to return; None for no TokenDetails.
    """

    target: Target
    stopping: StoppingCriteria
    prompts: Prompts
    inputs: Int[Array, "b s"] | None = None
    inputs_length: Any = None
    weights: Any = None
    slots: int = 0
    sampling: SamplingParams | None = None
    processors: Processors = Processors()
    companion: Any = None
    logprobs: int | None = None


class DecodeState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      tokens: prompt and new tokens of each row by slot.
      length: number of tokens of each row that are in the cache.
      root: tokens[b, length[b]], the last token, not yet in the cache.
      done: rows that have ended.
      log_probability: sum over the new tokens of each row.
      token_step: the step that wrote each slot.
      token_node: the node of the block whose draft a slot holds; 0 for the model's own choice after
        the last accepted draft.
      steps: number of steps so far.
      cache: keys and values of the target.
      drafter_state: state of the drafter, any tree of arrays.
      processor_states: state of each logits processor after the root.
      details: of the token of each slot, if the request asks for them.
      stop_state: state of StoppingCriteria.strings after the root; None without them.
      companion_state: state of the companion, its cache filled as the model's; None without one.
    """

    tokens: Int[Array, "b T"]
    length: Int[Array, " b"]
    root: Int[Array, " b"]
    done: Bool[Array, " b"]
    log_probability: Float[Array, " b"]
    token_step: Int[Array, "b T"]
    token_node: Int[Array, "b T"]
    steps: Int[Array, ""]
    cache: Any
    drafter_state: Any
    processor_states: tuple = ()
    details: TokenDetails | None = None
    stop_state: Any = None
    companion_state: Any = None


class Draft(NamedTuple):
    """Draft tokens for the nodes after the root.

    Attributes:
      tokens: one per node; -1, which never matches, where there is no draft.
      log_probability: the distribution that each token was drawn from by `sampling.sample_draft`,
        which speculative acceptance needs. None for tokens that are a function of the text so far,
        or that were drawn with the model's own noise (`sampling.choose_tokens`): exact acceptance
        needs no more.
      cache: the target's cache, if the drafter used its slots from `length` on as scratch space;
        the block overwrites them.
    """

    tokens: Int[Array, "b w-1"]
    log_probability: Float[Array, "b w-1 v"] | None = None
    cache: Any = None


class VerifyOutput(NamedTuple):
    """Result of verifying one block.

    Attributes:
      block: the root and the draft tokens.
      chosen: the model's own choice after every node.
      hidden: the model's hidden state at every node.
      top: the K = `drafter.top` most probable tokens after every node; None if K is 0.
      path: nodes whose successors are accepted: path[b, 0] = 0 is the root, then drafts.
      tokens: the accepted tokens, each the successor of the same place of `path`.
      log_probability: log-probability of `tokens` under the model.
      count: how many of `tokens` the row takes; 0 for a row that is done.
      middle: input of layer `drafter.middle` at every node, for drafters that have a `middle`.
      details: of `tokens`, if the request asks for them.
      companion_state: state of the companion, with the block in its cache; None without one.
      by_model: of `tokens`, whether the model itself decided; None unless the companion switches.
      entropy: of the companion before each of `tokens`; None unless its rule reads it.
    """

    block: Int[Array, "b w"]
    chosen: Int[Array, "b w"]
    hidden: Float[Array, "b w d"]
    top: Int[Array, "b w K"] | None
    path: Int[Array, "b D"]
    tokens: Int[Array, "b D"]
    log_probability: Float[Array, "b D"]
    count: Int[Array, " b"]
    middle: Float[Array, "b w d"] | None = None
    details: TokenDetails | None = None
    companion_state: Any = None
    by_model: Bool[Array, "b D"] | None = None
    entropy: Float[Array, "b D"] | None = None


@dataclass(frozen=True)
class Tree:
    """Shape of a block: node i continues node parents[i]; the root, node 0, has parent -1.

    A chain is (-1, 0, 1, ...). Parents come before their children (as in SpecInfer, Miao et al.,
    2024, arXiv 2305.09781).

    Raises:
      ValueError: parents do not describe such a tree.
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        before = all(-1 < parent < node for node, parent in enumerate(self.parents) if node)
        if not self.parents or self.parents[0] != -1 or not before:
            raise ValueError(f"Not a tree with its root first: parents {self.parents}")

    @property
    def width(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parents)

    @functools.cached_property
    def is_chain(self) -> bool:
        """True if every node continues the one before it."""
        return self.parents == tuple(range(-1, self.width - 1))

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """Distance [w] of each node from the root."""
        return self.ancestors.sum(axis=1, dtype=np.int32) - 1

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """Tree mask [w w]: True where the second node is the first or one of its ancestors."""
        mask = np.eye(self.width, dtype=bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """Nodes [w D] from the root to each node, which is repeated to the end."""
        steps = int(self.depth.max()) + 1
        rows = [np.flatnonzero(row) for row in self.ancestors]
        return np.array([[*row, *[row[-1]] * (steps - len(row))] for row in rows], np.int32)


def chain(width: int) -> Tree:
    """Returns the tree of a root and width - 1 drafts, one after the other."""
    return Tree(tuple(range(-1, width - 1)))


class VerifySpec(NamedTuple):
    """The part of a drafter that verification reads.

    Attributes:
      tree: shape of the block.
      top: number of most probable tokens to return.
      middle: layer whose input to return, or None.
    """

    tree: Tree
    top: int
    middle: int | None


class Drafter(Protocol):
    """Proposes tokens to follow the root; only the speed depends on what it proposes.

    A drafter is a frozen dataclass, so that equal ones share an executable. One that needs the
    hidden states between two layers also has a `middle`, the index of the later layer.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tree(self) -> Tree:
        """Shape of its block, whose width counts the root too."""

    @property
    def top(self) -> int:
        """Number of most probable tokens after every node that `observe` needs."""

    def begin(self, context: DecodeContext) -> Any:
        """Returns the drafter's state before the first step: arrays of fixed shapes."""

    def propose(
        self, context: DecodeContext, drafter_state: Any, state: DecodeState
    ) -> tuple[Draft, Any]:
        """Proposes a token for each of the nodes 1, 2, ... of the tree.

        Args:
          context: constants of the request.
          drafter_state: this drafter's state.
          state: state of the loop, whose root is not in the cache yet.

        Returns:
          The draft, and the drafter's state that `observe` is called with.
        """

    def observe(
        self, context: DecodeContext, drafter_state: Any, state: DecodeState, output: VerifyOutput
    ) -> Any:
        """Returns the drafter's state for the next step.

        Args:
          context: constants of the request.
          drafter_state: this drafter's state, from `propose`.
          state: state of the loop after the commit.
          output: what the model made of the block.
        """
