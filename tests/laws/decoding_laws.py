# SPDX-License-Identifier: Apache-2.0
"""Laws that every drafter obeys; any test file can check its own drafters against them.

  CASES = {"lookup": DrafterCase(lookup.Lookup())}

  @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
  @pytest.mark.parametrize("name", CASES)
  def test_laws(name, law):
      law(CASES[name])

`steps` runs the loop step by step, so that drafts can be compared with a reference in Python. At
its end it checks that the text is that of plain decoding.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from conftest import FAMILIES, toy_model
from test_decoding_loop import KINDS as DEEP
from test_decoding_loop import NEVER, lively, use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import commit, generation, loop, protocol, target, verification
from t5x_lite.decoding.acceptance import exact
from t5x_lite.decoding.streaming import DecodeArguments

# Most drafters do not use layers: one is compiled in two thirds of the time of two.
KINDS = {
    "encoder_decoder": toy_model("encoder_decoder", positions="relative", layers=1),
    "decoder_only": toy_model("decoder_only", positions="rotary", kv_heads=2, layers=1),
    "prefix": toy_model("decoder_only", prefix_lm=True, positions="relative", layers=1),
    "bart": toy_model("encoder_decoder", **FAMILIES["bart"] | {"layers": 1}),
    "m2m100": toy_model("encoder_decoder", **FAMILIES["m2m100"] | {"layers": 1}),
    "deep encoder_decoder": DEEP["encoder_decoder"],
    "deep decoder_only": DEEP["decoder_only"],
}
# Rows of different lengths, as many as meshes split; three of them repeat something.
EXAMPLES = (
    (5, 9, 33),
    (7,),
    (60, 2, 2, 8, 14, 31, 9),
    (12, 13, 12, 13, 12),
    (40,) * 5,
    (3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 4),
    (2, 63),
    (9, 33, 5, 9),
)
EVERY = tuple(range(len(EXAMPLES)))
LENGTH = 24
GREEDY = config.Decode(max_new_tokens=LENGTH)
SAMPLED = config.Decode(max_new_tokens=LENGTH, temperature=0.9, top_k=20, top_p=0.95, seed=3)


class DrafterCase(NamedTuple):
    """A drafter under test.

    Attributes:
      drafter: the drafter.
      weights: kind -> its own weights for the target of that kind in KINDS.
      kinds: targets to test it with; each costs compilations, so leave out what adds nothing.
        Sampling is tested with the first of them, caches and meshes with the last that is not a
        prefix-LM, whose prefill is bidirectional.
    """

    drafter: protocol.Drafter
    weights: Callable[[str], Any] = lambda kind: None
    kinds: tuple[str, ...] = ("encoder_decoder", "decoder_only")

    @property
    def causal(self) -> str:
        """The last kind that is not a prefix-LM."""
        return [kind for kind in self.kinds if kind != "prefix"][-1]

    def drafting(self, kind: str) -> decoding.Drafting:
        """Returns the drafter with its weights for a kind of target."""
        return decoding.Drafting(self.drafter, self.weights(kind))


@functools.cache
def trained(kind: str) -> Any:
    """Returns the weights of the target, as numpy: the same for every law."""
    return lively(KINDS[kind])


@functools.cache
def prepared_params(kind: str, mesh: Any) -> Any:
    """Returns the target's weights converted for decoding, on the mesh in force."""
    return decoding.prepare_params(KINDS[kind], trained(kind))


def request_rows(
    kind: str, decode: config.Decode, order=EVERY, eos: int = NEVER, limit=None
) -> decoding.Request:
    """Returns a request for rows of EXAMPLES.

    Args:
      kind: the target.
      decode: limit and sampling.
      order: the rows.
      eos: the id that ends a text.
      limit: a limit for each row; that of decode if None.
    """
    examples = [EXAMPLES[row] for row in order]
    request = decoding.make_request(KINDS[kind], examples, decode, rows=list(order), eos=eos)
    return request if limit is None else request._replace(limit=np.array(limit, np.int32))


def decode_rows(
    kind: str, decode: config.Decode, drafting: decoding.Drafting = generation.PLAIN, **options: Any
) -> decoding.Result:
    """Continues the rows of EXAMPLES.

    Args:
      kind: the target.
      decode: limit and sampling.
      drafting: drafter, weights and acceptance rule.
      **options: arguments of `request_rows`.
    """
    params = prepared_params(kind, jax.sharding.get_mesh())
    request = request_rows(kind, decode, **options)
    return decoding.generate(KINDS[kind], params, request, decode, drafting)


@functools.cache
def plain(kind: str, decode: config.Decode, eos: int = NEVER, limit=None) -> decoding.Result:
    """Continues the rows of EXAMPLES by plain decoding on one device.

    Args:
      kind: the target.
      decode: limit and sampling.
      eos: the id that ends a text.
      limit: a tuple of limits, or None.
    """
    use_one_device()
    return decode_rows(kind, decode, eos=eos, limit=limit)


def assert_same(result: decoding.Result, plain: decoding.Result) -> None:
    """Checks that the ids are the same, and took no more steps."""
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    np.testing.assert_array_equal(result.lengths, plain.lengths)
    np.testing.assert_allclose(result.log_probability, plain.log_probability, atol=1e-3)
    assert result.steps <= plain.steps


def greedy_text_is_that_of_plain_decoding(case: DrafterCase) -> None:
    """Greedy decoding: the same text as without the drafter."""
    use_one_device()
    for kind in case.kinds:
        assert_same(decode_rows(kind, GREEDY, case.drafting(kind)), plain(kind, GREEDY))


def sampled_text_is_that_of_plain_decoding(case: DrafterCase) -> None:
    """Sampling: the same text as without the drafter."""
    use_one_device()
    kind = case.kinds[0]
    assert_same(decode_rows(kind, SAMPLED, case.drafting(kind)), plain(kind, SAMPLED))


def eos_inside_a_block_ends_a_text_there(case: DrafterCase) -> None:
    """An EOS among the accepted tokens of a block is the last token of its text."""
    use_one_device()
    for kind in case.kinds:
        free = plain(kind, GREEDY).tokens[:, 0]
        for eos in sorted(set(free[:, LENGTH // 2].tolist()))[:4]:
            assert_same(
                decode_rows(kind, GREEDY, case.drafting(kind), eos=eos), plain(kind, GREEDY, eos)
            )


def limits_inside_a_block_end_a_text_there(case: DrafterCase) -> None:
    """A limit inside of a block cuts the block off."""
    use_one_device()
    limit = (3, 0, LENGTH, 1, 14, 23, 2, 7)
    for kind in case.kinds:
        result = decode_rows(kind, GREEDY, case.drafting(kind), limit=limit)
        assert result.lengths[:, 0].tolist() == list(limit)
        assert_same(result, plain(kind, GREEDY, limit=limit))


def a_row_depends_on_no_other_row_nor_on_its_place(case: DrafterCase) -> None:
    """Not only its text: also which step added which token, and whose draft it was."""
    use_one_device()
    order = (4, 2, 2, 0, 7, 5, 3, 2)
    for kind in case.kinds:
        together = decode_rows(kind, GREEDY, case.drafting(kind))
        mixed = decode_rows(kind, GREEDY, case.drafting(kind), order=order)
        for place, row in enumerate(order):
            np.testing.assert_array_equal(mixed.tokens[place], together.tokens[row])
            np.testing.assert_array_equal(mixed.token_step[place], together.token_step[row])
            np.testing.assert_array_equal(mixed.token_node[place], together.token_node[row])
        if kind == case.kinds[0]:
            alone = decode_rows(kind, GREEDY, case.drafting(kind), order=(2,))
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[2])


def a_mesh_changes_no_token_and_no_draft(case: DrafterCase) -> None:
    """Rows and weights split over 8 devices: the same tokens, drafts and steps."""
    kind = case.causal
    use_one_device()
    alone = decode_rows(kind, GREEDY, case.drafting(kind))
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = decode_rows(kind, GREEDY, case.drafting(kind))
    np.testing.assert_array_equal(split.tokens, alone.tokens)
    np.testing.assert_array_equal(split.token_node, alone.token_node)
    assert split.steps == alone.steps


def the_cache_is_that_of_plain_decoding(case: DrafterCase) -> None:
    """The cache of plain decoding is that of a fresh prefill (test_decoding_loop)."""
    *_, last = steps(case, case.causal)
    state, plain = last.after, last_plain_state(case.causal)
    np.testing.assert_array_equal(state.length, plain.length)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.cache, plain.cache)), strict=True):
        for row, filled in enumerate(plain.length):
            np.testing.assert_allclose(ours[row, :, :filled], theirs[row, :, :filled], atol=2e-5)


LAWS = (
    greedy_text_is_that_of_plain_decoding,
    sampled_text_is_that_of_plain_decoding,
    eos_inside_a_block_ends_a_text_there,
    limits_inside_a_block_end_a_text_there,
    a_row_depends_on_no_other_row_nor_on_its_place,
    a_mesh_changes_no_token_and_no_draft,
    the_cache_is_that_of_plain_decoding,
)


class DecodeStep(NamedTuple):
    """One step of the loop.

    Attributes:
      before: state before it.
      draft: the draft.
      output: what the model made of the block.
      after: state after it.
    """

    before: protocol.DecodeState
    draft: protocol.Draft
    output: protocol.VerifyOutput
    after: protocol.DecodeState


@functools.cache
def last_plain_state(kind: str) -> protocol.DecodeState:
    """Returns the last state of plain decoding."""
    *_, last = steps(DrafterCase(loop.Plain()), kind)
    return last.after


@functools.cache
def programs(drafter: protocol.Drafter, kind: str, slots: int) -> tuple[Callable, Callable]:
    """Returns two jitted functions, compiled once for all tests of a file.

    begin(arguments) -> (encoded inputs, first state);
    step(arguments, encoded, state) -> (draft, output, next state).

    Args:
      drafter: the drafter.
      kind: the target.
      slots: slots of a row.
    """
    cfg = KINDS[kind]

    def make_context(arguments: DecodeArguments, encoded):
        request = arguments.request
        return protocol.DecodeContext(
            target=target.make_target(cfg, arguments.params, encoded),
            stopping=protocol.StoppingCriteria(NEVER, request.prompts_length + request.limit),
            prompts=protocol.Prompts(request.prompts, request.prompts_length),
            inputs=request.inputs,
            inputs_length=request.inputs_length,
            weights=arguments.weights,
            slots=slots,
            sampling=arguments.rules.sampling,
        )

    @jax.jit
    def begin(arguments):
        encoded, request = model.EncoderMemory(), arguments.request
        if request.inputs is not None:
            encoded = target.encode_inputs(
                cfg, arguments.params, request.inputs, request.inputs_length
            )
        context = make_context(arguments, encoded)
        cache = target.prefill(cfg, arguments.params, encoded, context.prompts, slots)
        drafter_state = drafter.begin(context)
        return encoded, generation.initial_state(context, cache, slots, drafter_state)

    @jax.jit
    def step(arguments, encoded, state):
        context = make_context(arguments, encoded)
        draft, drafter_state = drafter.propose(context, state.drafter_state, state)
        output, cache = verification.verify(context, drafter, exact.Exact(), state, draft)
        after = commit.commit(context, state._replace(cache=cache), drafter.tree, output)
        drafter_state = drafter.observe(context, drafter_state, after, output)
        return draft, output, after._replace(drafter_state=drafter_state)

    return begin, step


def steps(case: DrafterCase, kind: str, decode: config.Decode = GREEDY) -> Iterator[DecodeStep]:
    """Decodes EXAMPLES step by step, on one device.

    Args:
      case: the drafter.
      kind: the target.
      decode: limit and sampling.

    Yields:
      Each step, as numpy arrays.
    """
    use_one_device()
    request = request_rows(kind, decode)
    rules = generation.make_rules(request, decode)
    request = generation.shard_rows(request._replace(eos=None))
    slots = request.prompts.shape[1] + LENGTH + case.drafter.tree.width
    begin, step = programs(case.drafter, kind, slots)
    params = prepared_params(kind, jax.sharding.get_mesh())
    arguments = DecodeArguments(params, request, rules, case.weights(kind))
    encoded, state = begin(arguments)
    while not np.all(state.done):
        draft, output, after = step(arguments, encoded, state)
        yield jax.device_get(DecodeStep(state, draft, output, after))
        state = after
    for row, text in enumerate(plain(kind, decode).tokens[:, 0]):
        first = int(request.prompts_length[row])
        np.testing.assert_array_equal(state.tokens[row, first : first + LENGTH], text)
