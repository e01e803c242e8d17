# SPDX-License-Identifier: Apache-2.0
"""How wide the next block is: what most tokens per second are expected of.

The price of a call is measured for every width (`costs`); how often guesses hold is counted on the
device, row by row. One call has one width for all rows; the text does not depend on it.

Guessing has a price too, which of a small model is a good part of a call's: where no call can be
afforded with it, one is made without (`RESTING`).

b rows    n widths    w nodes of the widest block    D its depth
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.decoding import acceptance, loop
from t5x_lite.decoding.protocol import Draft, Drafter, Setting, State, Tree, Verdict

# A count weighs this much less after every call that adds to it, and after every other one: what
# was so 10 calls ago is half forgotten, and a drafter that was given up is tried again in about 40.
FORGET, DRIFT = 0.93, 0.99
# How often the guess after one that held does, too, before anything is known, and how many guesses
# such an expectation weighs.
FOLLOWING, WEIGHT = 0.75, 1.0
# How much longer than plain decoding the slowest row may take, by the prices: 3 % and 1.2 tokens,
# which makes 5 % of 60 tokens whatever the guesses are worth.
SLACK, START = 0.03, 1.2
# A token of a row that is so many ahead of the last one counts 1/e of the last one's. Eight texts
# of SmolLM2 at prices of three machines: all calls together 0.2 % more to 12 % less than without.
AHEAD = 4.0
# The number of the width of a call for which nothing is guessed, and the most of them in a row.
RESTING, LONGEST = -1, 16


class Priced(NamedTuple):
    """The weights of an Adaptive: seconds of a call at each width, of one for which nothing is
    guessed (`plain`), and its drafter's weights.

    With blind every guess is taken for wrong, which is how prices are measured.
    """

    seconds: Float[Array, " n"]
    plain: Float[Array, ""]
    blind: Bool[Array, ""]
    drafter: Any = None


class Tracked(NamedTuple):
    """The drafter's memory, the guesses made ahead, and what became of those before.

    right and judged [b 2] count first guesses, and guesses after one that held; older calls count
    less. width [] numbers the width of the next call; spent [] is the price of all calls so far, in
    plain calls, and of those until the call of number `until` [] for which it rests.
    """

    drafter: Any
    ahead: Draft | None
    right: Float[Array, "b 2"]
    judged: Float[Array, "b 2"]
    width: Int[Array, ""]
    spent: Float[Array, ""]
    until: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A drafter whose blocks have one of several widths: the first nodes of its tree.

    floor is the width it always guesses for, whatever is verified: 1 lets it rest while it does
    not pay; a drafter with a cache of its own, which must keep up, needs 2. At the whole width (for
    guesses that cost next to nothing) the guesses come first and the choice knows of them: where
    there are none, or none that has proved right lately, nothing is verified. Where even they cost
    more than they bring, it rests.
    first is how often a first guess is expected to hold before anything is known.

    The memory of the drafter must not depend on its tree, and dataclasses.replace(drafter, tree=)
    must make it guess less. Its weights are `Priced`.

    Raises:
      ValueError: widths do not rise from 1 to the width of the drafter's tree.
    """

    drafter: Drafter
    widths: tuple[int, ...] = (1, 4, 8, 16)
    floor: int = 1
    first: float = 0.6

    def __post_init__(self):
        rising = sorted(set(self.widths)) == list(self.widths)
        if not rising or self.widths[:1] != (1,) or self.widths[-1] != self.tree.width:
            raise ValueError(
                f"Adaptive.widths must rise from 1 to the width of the drafter's tree, "
                f"{self.tree.width}; got {self.widths}"
            )

    @property
    def tree(self) -> Tree:
        return self.drafter.tree

    @property
    def top(self) -> int:
        return self.drafter.top

    @property
    def middle(self) -> int | None:
        return getattr(self.drafter, "middle", None)

    @property
    def is_ahead(self) -> bool:
        return self.floor == self.tree.width

    def cut(self, width: int) -> Drafter:
        """The drafter of the first `width` nodes."""
        return dataclasses.replace(self.drafter, tree=Tree(self.tree.parents[:width]))

    def begin(self, setting: Setting) -> Tracked:
        nothing = jnp.zeros_like(setting.prompts.length, jnp.float32)[:, None] + np.zeros(2)
        counts = nothing.astype(jnp.float32)
        memory = self.drafter.begin(own(setting))
        return Tracked(memory, None, counts, counts, jnp.int32(0), jnp.float32(0), jnp.int32(0))

    def propose(self, setting: Setting, memory: Tracked, state: State) -> tuple[Draft, Tracked]:
        """The widest block, for a loop that knows of no widths."""
        draft, inner = self.drafter.propose(own(setting), memory.drafter, state)
        return seen(setting, draft), memory._replace(drafter=inner)

    def observe(self, setting: Setting, memory: Tracked, state: State, verdict: Verdict) -> Tracked:
        inner = self.drafter.observe(own(setting), memory.drafter, state, verdict)
        return memory._replace(drafter=inner)


def own(setting: Setting) -> Setting:
    """The setting as the drafter inside knows it."""
    return setting._replace(weights=setting.weights.drafter)


def seen(setting: Setting, draft: Draft) -> Draft:
    """The draft, or none while prices are measured."""
    return draft._replace(tokens=jnp.where(setting.weights.blind, -1, draft.tokens))


def run(setting: Setting, adaptive: Adaptive, accept: acceptance.Acceptance, state: State) -> State:
    """The state when every row is done: a loop for each width, entered while it is the best.

    Loops and not a switch: what a loop carries is written in place.
    """
    going = functools.partial(loop.goes_on, setting.rules)

    def through(state: State) -> State:
        if adaptive.is_ahead:
            state = rested(setting, adaptive, accept, state)
        for number in range(len(adaptive.widths)):
            chosen = lambda state, number=number: going(state) & (state.memory.width == number)
            call = lambda state, number=number: one_call(setting, adaptive, accept, number, state)
            state = jax.lax.while_loop(chosen, call, state)
        return state

    return jax.lax.while_loop(going, through, opened(setting, adaptive, state))


def rested(
    setting: Setting, adaptive: Adaptive, accept: acceptance.Acceptance, state: State
) -> State:
    """state after the calls for which nothing is guessed, if there are to be some now."""

    def rests(state: State):
        resting = (state.memory.width == RESTING) & (state.calls < state.memory.until)
        return loop.goes_on(setting.rules, state) & resting

    call = functools.partial(plain_call, setting, adaptive, accept)
    return awake(setting, adaptive, jax.lax.while_loop(rests, call, state))


def awake(setting: Setting, adaptive: Adaptive, state: State) -> State:
    """state with the width of the next call chosen where a rest is over."""
    over = (state.memory.width == RESTING) & (state.calls >= state.memory.until)
    decide = lambda tracked: decided(setting, adaptive, state._replace(memory=tracked)).memory
    return state._replace(memory=jax.lax.cond(over, decide, lambda same: same, state.memory))


def opened(setting: Setting, adaptive: Adaptive, state: State) -> State:
    """state with the first width chosen; after a pause it has been."""
    if adaptive.is_ahead:
        return state if state.memory.ahead is not None else decided(setting, adaptive, state)
    decide = functools.partial(decided, setting, adaptive)
    return jax.lax.cond(state.calls == 0, decide, lambda state: state, state)


def one_call(
    setting: Setting,
    adaptive: Adaptive,
    accept: acceptance.Acceptance,
    number: int,
    state: State,
) -> State:
    """One iteration of the loop with the width of this number, and the width of the next."""
    width, tracked = adaptive.widths[number], state.memory
    drafter = adaptive.cut(width if adaptive.is_ahead else max(width, adaptive.floor))
    draft, memory = tracked.ahead, tracked.drafter
    if not adaptive.is_ahead:
        draft, memory = guesses(setting, drafter, memory, state)
    asked = Asked(Tree(adaptive.tree.parents[:width]), adaptive.top, adaptive.middle)
    verdict, cache = loop.verify(setting, asked, accept, state, first_nodes(draft, width))
    state = loop.commit(state._replace(cache=cache), asked.tree, verdict, setting.rules)
    memory = drafter.observe(own(setting), memory, state, verdict)
    tree = Tree(adaptive.tree.parents[: draft.tokens.shape[1] + 1])
    tracked = counted(tracked._replace(drafter=memory), tree, draft, verdict)
    return decided(setting, adaptive, state._replace(memory=tracked))


def plain_call(
    setting: Setting, adaptive: Adaptive, accept: acceptance.Acceptance, state: State
) -> State:
    """One iteration for which nothing is guessed."""
    asked = Asked(Tree(adaptive.tree.parents[:1]), adaptive.top, adaptive.middle)
    nothing = Draft(state.root[:, None][:, :0])
    verdict, cache = loop.verify(setting, asked, accept, state, nothing)
    state = loop.commit(state._replace(cache=cache), asked.tree, verdict, setting.rules)
    tracked = state.memory
    memory = adaptive.cut(1).observe(own(setting), tracked.drafter, state, verdict)
    return state._replace(memory=tracked._replace(drafter=memory))


class Asked(NamedTuple):
    """What verification wants to know of a drafter: its block, and what it wants to see."""

    tree: Tree
    top: int
    middle: int | None


def first_nodes(draft: Draft, width: int) -> Draft:
    """The guesses of the first `width` nodes, of which the root is one."""
    law = draft.log_probability
    law = None if law is None else law[:, : width - 1]
    return draft._replace(tokens=draft.tokens[:, : width - 1], log_probability=law)


def guesses(setting: Setting, drafter: Drafter, memory: Any, state: State) -> tuple[Draft, Any]:
    """The drafter's guesses; where it has but a root, it is not asked."""
    if drafter.tree.width == 1:
        return Draft(state.root[:, None][:, :0]), memory
    draft, memory = drafter.propose(own(setting), memory, state)
    return seen(setting, draft), memory


def counted(tracked: Tracked, tree: Tree, draft: Draft, verdict: Verdict) -> Tracked:
    """tracked with what the tokens that were written say of the guesses, verified or not."""
    written = jnp.arange(verdict.tokens.shape[1]) < verdict.count[:, None]
    follows = jnp.where(written, verdict.tokens, -2)
    depth = int(tree.depth.max())
    follows = jnp.pad(follows, ((0, 0), (0, max(depth - follows.shape[1], 0))), constant_values=-2)

    def row(guess, follows):
        true = follows[tree.depth[1:] - 1]
        wrong = jnp.concatenate([jnp.zeros(1, bool), guess != true])
        holds = ~jnp.any(tree.ancestors & wrong, axis=1)
        asked = holds[np.array(tree.parents[1:])] & (guess >= 0) & (true >= 0)
        levels = tree.depth[1:, None] == np.arange(1, depth + 1)
        tally = lambda nodes: jnp.any(nodes[:, None] & levels, axis=0).astype(jnp.float32)
        each = jnp.stack([tally(holds[1:] & asked), tally(asked)])
        return jnp.stack([each[:, 0], jnp.sum(each[:, 1:], axis=1)], axis=1)

    if not depth:
        return tracked._replace(right=DRIFT * tracked.right, judged=DRIFT * tracked.judged)
    right, judged = jnp.split(jax.vmap(row)(draft.tokens, follows), 2, axis=1)
    right, judged = right[:, 0], judged[:, 0]
    kept = jnp.where(judged > 0, FORGET**judged, DRIFT)
    return tracked._replace(
        right=kept * tracked.right + right, judged=kept * tracked.judged + judged
    )


def decided(setting: Setting, adaptive: Adaptive, state: State) -> State:
    """state with the width of the next call chosen, and its guesses where they come first."""
    tracked = state.memory
    if not adaptive.is_ahead:
        return state._replace(memory=weighed(setting, adaptive, tracked, state))

    def guessed(tracked: Tracked) -> Tracked:
        ahead, memory = guesses(setting, adaptive.drafter, tracked.drafter, state)
        tracked = tracked._replace(drafter=memory, ahead=ahead)
        return weighed(setting, adaptive, tracked, state)

    if tracked.ahead is None:
        return state._replace(memory=guessed(tracked))
    owed = tracked.spent + jnp.min(prices(setting)) - allowance(setting, state)
    # Every plain call is allowed to cost SLACK more than it does: in so many the next is paid for.
    count = jnp.ceil(jnp.clip(owed / SLACK, 1, LONGEST)).astype(jnp.int32)
    resting = lambda tracked: tracked._replace(
        width=jnp.int32(RESTING), spent=tracked.spent + count, until=state.calls + count
    )
    return state._replace(memory=jax.lax.cond(owed > 0, resting, guessed, tracked))


def prices(setting: Setting) -> Float[Array, " n"]:
    """The price of a call at each width, in plain calls; infinity rules a width out."""
    seconds = jnp.asarray(setting.weights.seconds)
    return jnp.where(jnp.isfinite(seconds), seconds / setting.weights.plain, jnp.inf)


def weighed(setting: Setting, adaptive: Adaptive, tracked: Tracked, state: State) -> Tracked:
    """tracked with the width chosen of which most is expected for its price, the narrowest of
    equal ones, and paid for."""
    gain = urgency(setting, state)[:, None] * expected(setting, adaptive, tracked, state)
    total = tracked.spent + prices(setting)
    affordable = (total <= allowance(setting, state)) | (np.arange(len(adaptive.widths)) == 0)
    worth = jnp.sum(gain, axis=0) / jnp.asarray(setting.weights.seconds)
    width = jnp.argmax(jnp.where(affordable, worth, -1)).astype(jnp.int32)
    return tracked._replace(width=width, spent=total[width])


def urgency(setting: Setting, state: State) -> Float[Array, " b"]:
    """How much a token counts in each row: rows that are written together end with the last."""
    left = jnp.where(state.done, -1, setting.rules.limit - state.length)
    behind = (left - jnp.max(left)).astype(jnp.float32)
    return jnp.where(state.done, 0, jnp.exp(behind / AHEAD))


def allowance(setting: Setting, state: State) -> Float[Array, ""]:
    """What the calls up to the next may cost, in plain calls: about what plain decoding would have
    cost the row that is least far. A plain call is always within it, and adds to it."""
    written = state.length + 2 - setting.prompts.length
    least = jnp.min(jnp.where(state.done, jnp.iinfo(jnp.int32).max, written))
    return (1 + SLACK) * least + START


def expected(
    setting: Setting, adaptive: Adaptive, tracked: Tracked, state: State
) -> Float[Array, "b n"]:
    """How many tokens a call is expected to write at each width."""
    prior = np.array([adaptive.first, FOLLOWING], np.float32)
    rate = (tracked.right + WEIGHT * prior) / (tracked.judged + WEIGHT)
    first, following = rate[:, :1], rate[:, 1:]
    room = jnp.maximum(setting.rules.limit - 2 - state.length, 0)
    depths = [int(adaptive.tree.depth[:width].max()) for width in adaptive.widths]
    steps = np.arange(max(depths))
    reach = first * following**steps
    found = jnp.ones_like(reach, bool)
    if tracked.ahead is not None:
        levels = adaptive.tree.depth[1:, None] == steps + 1
        found = jnp.any((tracked.ahead.tokens >= 0)[:, :, None] & levels, axis=1)
    reach = jnp.where(found & (steps < room[:, None]), reach, 0)
    sums = [1 + jnp.sum(reach[:, :depth], axis=1) for depth in depths]
    return jnp.stack(sums, axis=1)
