# SPDX-License-Identifier: Apache-2.0
"""What the decoding loop, its drafters and its rules of acceptance hand one another.

b rows    w nodes of a block, root and drafts    D most tokens that one call can add to a row
T slots of a row    v vocabulary    d model width
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import sampling


class Target(NamedTuple):
    """The model whose text is written, as the loop sees it.

    forward(tokens [b w], index [b], cache, tree=None) -> (hidden [b w d], cache), the block written
    into slots index[b] and on; logits(hidden) -> float32 [b w v], each row whole on one device.
    part(first, last) -> the Part with the layers first <= layer < last of `layers`. heads are those
    that guess later tokens, None where the model has none.
    """

    forward: Callable
    logits: Callable
    part: Callable | None = None
    layers: int = 0
    heads: "Heads | None" = None


class Heads(NamedTuple):
    """The `count` heads of a Target; head i (0, 1, ...) guesses token i + 1 after the model's own.

    guess(hidden [b t d], which, since=None) -> [b t g d], what the logits of the heads of the slice
    `which` are read from, where hidden is what the root is read from. `sequential` heads are asked
    for one at a time: head i with since [b t i + 1], the root and the guesses of the heads before.
    """

    guess: Callable
    count: int
    sequential: bool


class Part(NamedTuple):
    """Some consecutive layers of a Target, over their own part of its cache.

    begin(tokens [b w], index) -> x [b w d], what the first layer of all is given;
    through(x, index, cache, tree=None) -> (x, cache), the block written as in Target.forward;
    finish(x) -> hidden, as after the last layer of all; of(cache) -> their part of a whole cache,
    and joined(cache, part) -> the whole one with that part replaced.
    """

    begin: Callable
    through: Callable
    finish: Callable
    of: Callable
    joined: Callable


class Rules(NamedTuple):
    """When a row stops, and how it draws (None: greedily). limit counts slots, prompt and all.

    eos is one id that ends a text, or several. pause is the number of calls after which the loop
    stops for the time being (None: it goes on until every row is done).
    """

    eos: int | Int[Array, " e"]
    limit: Int[Array, " b"]
    sampling: sampling.Sampling | None
    pause: Int[Array, ""] | None = None


class Prompts(NamedTuple):
    """Decoder tokens that are given, beginning with Model.start; right-padded."""

    tokens: Int[Array, "b p"]
    length: Int[Array, " b"]


class Setting(NamedTuple):
    """What stays the same while a request is decoded; weights are the drafter's own (or None).

    inputs [b s], of which the first inputs_length[b] exist, are the encoder's: None for a lone
    decoder. slots is T.
    """

    target: Target
    rules: Rules
    prompts: Prompts
    inputs: Int[Array, "b s"] | None = None
    inputs_length: Int[Array, " b"] | None = None
    weights: Any = None
    slots: int = 0


class State(NamedTuple):
    """All that changes. memory is the drafter's; log_probability sums over what a row wrote.

    call[b, i] is the number of the call that wrote slot i, and node[b, i] which node of its block
    had guessed it: 0 where it is the model's own choice after the last guess that was right.
    """

    tokens: Int[Array, "b T"]
    length: Int[Array, " b"]
    root: Int[Array, " b"]
    done: Bool[Array, " b"]
    log_probability: Float[Array, " b"]
    call: Int[Array, "b T"]
    node: Int[Array, "b T"]
    calls: Int[Array, ""]
    cache: Any
    memory: Any


class Draft(NamedTuple):
    """Guesses for the nodes after the root; -1 matches nothing: where there is no guess.

    log_probability is the law that each guess was drawn from by `sampling.guess`, which
    speculative acceptance asks for. None for guesses that are a function of what was written, or
    drawn with the model's own noise (`sampling.choose`): all that exact acceptance needs.

    cache is the target's, where the drafter has used its slots from length on to note things down;
    the block overwrites them.
    """

    tokens: Int[Array, "b w-1"]
    log_probability: Float[Array, "b w-1 v"] | None = None
    cache: Any = None


class Verdict(NamedTuple):
    """What the model says of a block.

    chosen[b, i] is its own choice after node i of the block; the row goes on with the first
    count[b] of tokens, which are what follows the nodes path[b, 0] = 0, path[b, 1], ... For a row
    that is done count is 0. top [b w K] are the K most probable tokens after every node, and middle
    what layer `drafter.middle` was given for it, where the drafter asks for them; beside are the
    logits of what `drafter.beside` gave.
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
    beside: Float[Array, "b m v"] | None = None


@dataclass(frozen=True)
class Tree:
    """The shape of a block: node i continues node parents[i]; the root, node 0, has parent -1.

    A chain is (-1, 0, 1, ...). Parents stand before their children.
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        before = all(-1 < parent < node for node, parent in enumerate(self.parents) if node)
        if not self.parents or self.parents[0] != -1 or not before:
            raise ValueError(f"Not a tree with its root first: parents {self.parents}")

    @property
    def width(self) -> int:
        return len(self.parents)

    @functools.cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, self.width - 1))

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """How far below the root each node is [w]."""
        return self.ancestors.sum(axis=1, dtype=np.int32) - 1

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """Which nodes [w w] each node continues, itself among them."""
        seen = np.eye(self.width, dtype=bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            seen[node] |= seen[parent]
        return seen

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """The nodes [w D] from the root to each node, which is repeated to the end."""
        steps = int(self.depth.max()) + 1
        rows = [np.flatnonzero(row) for row in self.ancestors]
        return np.array([[*row, *[row[-1]] * (steps - len(row))] for row in rows], np.int32)


def chain(width: int) -> Tree:
    """A root and width - 1 guesses one after the other."""
    return Tree(tuple(range(-1, width - 1)))


class Drafter(Protocol):
    """Guesses what follows the root; whatever it guesses, only the speed depends on it.

    A drafter is a frozen dataclass (equal ones share an executable) with a `tree`, whose width
    counts the root too, and `top`, how many tokens after every node `observe` wants to see. One
    that wants to see the states between two layers has a `middle`, the number of the later one. One
    that reads more logits in the product that gives the block's has `beside(setting, hidden [b w
    d]) -> [b m d]`, what they are read from.
    """

    tree: Tree
    top: int

    def begin(self, setting: Setting) -> Any:
        """The memory before the first call: arrays of fixed shapes."""

    def propose(self, setting: Setting, memory: Any, state: State) -> tuple[Draft, Any]:
        """Guesses for the nodes 1, 2, ... of the tree, and the memory that `observe` is given."""

    def observe(self, setting: Setting, memory: Any, state: State, verdict: Verdict) -> Any:
        """The memory for the next call, from the state after the commit and the verdict."""
