# SPDX-License-Identifier: Apache-2.0
"""Drafters that are models: another one, the first layers of the target, or its last ones."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model
from decoding_laws import (
    EXAMPLES,
    GREEDY,
    KINDS,
    LAWS,
    LENGTH,
    SAMPLED,
    DrafterCase,
    assert_same,
    decode_rows,
    plain,
    steps,
    trained,
)
from test_decoding_loop import lively, nucleus, reference_draw, use_one_device

from t5x_lite import decoding, model, sharding
from t5x_lite.decoding import generation, target
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.drafters.late_layers import LateLayers
from t5x_lite.decoding.protocol import chain

# Draft models, narrower than their targets; one has fewer ids, one more padding ids.
SMALL = {
    "encoder_decoder": dataclasses.replace(
        toy_model("encoder_decoder", layers=1, embed=8), vocab=56
    ),
    "decoder_only": dataclasses.replace(
        toy_model("decoder_only", layers=1, positions="rotary"), vocab=72
    ),
    "prefix": toy_model("decoder_only", prefix_lm=True, layers=1),
    "bare": dataclasses.replace(
        toy_model("decoder_only", layers=1), add_bos=False, decoder_start_token_id=3
    ),
}
# Costs many compilations, and differs little from the other cases.
SLOW = (pytest.mark.slow,)
# Draft models and their targets.
COUPLES = [
    ("encoder_decoder", "encoder_decoder"),
    pytest.param("decoder_only", "decoder_only", marks=SLOW),
    ("decoder_only", "encoder_decoder"),
    ("encoder_decoder", "decoder_only"),
    ("bare", "encoder_decoder"),
    pytest.param("bare", "decoder_only", marks=SLOW),
    ("prefix", "prefix"),
]


@functools.cache
def small(name: str):
    return lively(SMALL[name], seed=5)


def draft_model_case(name: str, kind: str, width: int = 4) -> DrafterCase:
    """Returns the draft model of a name, for a target of a kind, with blocks of a width."""
    drafter = DraftModel(SMALL[name], KINDS[kind], chain(width))
    return DrafterCase(
        drafter, lambda kind: decoding.prepare_params(SMALL[name], small(name)), (kind,)
    )


CASES = {
    "encoder_decoder": draft_model_case("encoder_decoder", "encoder_decoder"),
    "decoder_only": draft_model_case("decoder_only", "decoder_only"),
    "early exit": DrafterCase(EarlyExit(1, chain(4)), kinds=("deep decoder_only",)),
    "late layers": DrafterCase(LateLayers(1, chain(3)), kinds=("deep encoder_decoder",)),
}


# A model that drafts obeys all laws by the loop that it shares with the others; where it has its
# layers from is seen in sampled text, and in what the cache holds.
OTHERS = [law for law in LAWS if not law.__name__.startswith(("sampled", "the_cache"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, law",
    [
        pytest.param(
            name,
            law,
            marks=pytest.mark.exhaustive if law in OTHERS and name != "encoder_decoder" else (),
        )
        for name in CASES
        for law in LAWS
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_laws(name, law):
    law(CASES[name])


class Uncached:
    """A model without a cache: every text is one block on an empty cache."""

    def __init__(self, cfg, params):
        self.cfg, self.params = cfg, decoding.prepare_params(cfg, params)
        self.apply = jax.jit(self.block)

    def block(self, params, ids, prefix, inputs, length):
        encoded = model.EncoderMemory()
        if self.cfg.encoder:
            encoded = target.encode_inputs(self.cfg, params, inputs, length)
        cache = model.empty_cache(self.cfg, *ids.shape, scan=False)
        block = model.TokenBlock(ids, 0 * prefix, prefix=prefix)
        transformer = model.Transformer(self.cfg, scan=False)
        hidden, _ = transformer.apply(
            {"params": params}, block, cache, encoded, method=model.Transformer.decode
        )
        return transformer.apply({"params": params}, hidden, method=model.Transformer.logits)

    def logits(self, example, written):
        """Returns the logits [64] after the example, prompted as this model is, and new tokens."""

        def known(tokens):
            return [min(int(token), self.cfg.vocab - 1) for token in tokens]

        start = [self.cfg.decoder_start_token_id] if self.cfg.encoder or self.cfg.add_bos else []
        prompt = start if self.cfg.encoder else start + known(example)
        ids, length = decoding.pad_rows([prompt + known(written)], 64)
        inputs, inputs_length = decoding.pad_rows([known(example)], 16)
        rows = (ids, np.array([len(prompt)], np.int32), inputs, inputs_length)
        logits = self.apply(self.params, *generation.shard_rows(rows))
        return np.asarray(logits)[0, length[0] - 1, :64]

    def continued(self, example, written, count, pick=lambda logits, position: np.argmax(logits)):
        """Returns `count` more tokens after written, of an example.

        Args:
          example: the input or prompt.
          written: tokens so far.
          count: number of tokens.
          pick: chooses from logits at a position, which counts from the first new token.
        """
        written = list(written)
        for _ in range(count):
            written.append(int(pick(self.logits(example, written), len(written))))
        return written[-count:]


def new_tokens(step, row, kind):
    """Returns the new tokens of a row before a step of a kind of model, root included, and its
    prompt's length."""
    prompt = 1 if KINDS[kind].encoder else 1 + len(EXAMPLES[row])
    return step.before.tokens[row, prompt : step.before.length[row] + 1], prompt


def assert_drafts_follow(case: DrafterCase, kind: str, reference: Uncached, decode=GREEDY):
    """Checks the drafts of the first steps against the reference, for some rows, the longest and
    the shortest among them.

    Args:
      case: the drafter.
      kind: kind of the model.
      reference: the layers that draft, without a cache.
      decode: settings of decoding.
    """
    count = case.drafter.tree.width - 1
    for step in itertools.islice(steps(case, kind, decode), 5):
        for row in (0, 1, 4, 5):
            example = EXAMPLES[row]
            written, prompt = new_tokens(step, row, kind)
            options = {}
            if decode.temperature:
                choose = reference_draw(decode, row)
                options["pick"] = lambda logits, place, choose=choose, p=prompt: choose(
                    logits, p + place
                )
            expected = reference.continued(example, written, count, **options)
            assert step.draft.tokens[row].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", COUPLES)
def test_drafts_are_the_draft_models_own_text(name, kind):
    use_one_device()
    assert_drafts_follow(draft_model_case(name, kind), kind, Uncached(SMALL[name], small(name)))


def test_sampled_drafts_are_the_draft_models_own_text_with_the_same_noise():
    use_one_device()
    assert_drafts_follow(
        draft_model_case("encoder_decoder", "encoder_decoder"),
        "encoder_decoder",
        Uncached(SMALL["encoder_decoder"], small("encoder_decoder")),
        SAMPLED,
    )


def sampling_distribution(logits, decode):
    """Computes the probabilities [64] that tokens are sampled from, by sorting."""
    logits = logits / decode.temperature
    left = nucleus(logits, decode)
    probability = np.zeros(64)
    probability[left] = np.exp(logits[left] - logits.max())
    return probability / probability.sum()


def test_stochastic_drafts_carry_the_distribution_they_were_sampled_from():
    use_one_device()
    case = draft_model_case("encoder_decoder", "encoder_decoder")
    case = case._replace(drafter=dataclasses.replace(case.drafter, stochastic=True))
    reference = Uncached(SMALL["encoder_decoder"], small("encoder_decoder"))
    for step in itertools.islice(steps(case, "encoder_decoder", SAMPLED), 3):
        for row, example in enumerate(EXAMPLES):
            written = list(new_tokens(step, row, "encoder_decoder")[0])
            for token, log_p in zip(*(part[row] for part in step.draft[:2]), strict=True):
                expected = sampling_distribution(reference.logits(example, written), SAMPLED)
                np.testing.assert_allclose(np.exp(log_p), expected, atol=1e-5)
                assert expected[token] > 0
                written.append(int(token))


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("bare", "encoder_decoder"), ("prefix", "prefix")])
def test_the_rarer_draft_models_change_no_token(name, kind):
    use_one_device()
    case = draft_model_case(name, kind)
    assert_same(decode_rows(kind, GREEDY, case.drafting(kind)), plain(kind, GREEDY))


@pytest.mark.slow
@pytest.mark.parametrize("kind, decode", [("encoder_decoder", SAMPLED), ("decoder_only", GREEDY)])
def test_a_draft_model_that_is_the_target_is_always_right(kind, decode):
    use_one_device()
    cfg = KINDS[kind]
    params = decoding.prepare_params(cfg, trained(kind))
    drafting = decoding.Drafting(DraftModel(cfg, cfg, chain(4)), params)
    result = decode_rows(kind, decode, drafting)
    assert_same(result, plain(kind, decode))
    assert result.steps == LENGTH / 4


def first_layers(kind: str, count: int):
    """Returns config and weights of a target with its first layers alone."""
    cfg, params = KINDS[kind], trained(kind)
    first = jax.tree.map(lambda stacked: stacked[:count], params["decoder"]["layers"])
    params = params | {"decoder": params["decoder"] | {"layers": first}}
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, layers=count)), params


@pytest.mark.parametrize("kind", ["deep decoder_only", "deep encoder_decoder"])
def test_an_early_exit_drafts_the_text_of_the_first_layers_alone(kind):
    use_one_device()
    assert_drafts_follow(CASES["early exit"], kind, Uncached(*first_layers(kind, 1)))


class Late:
    """Hidden states between the layers of a T5-like toy, over whole texts on empty caches."""

    def __init__(self, kind, middle):
        self.cfg, self.middle = KINDS[kind], middle
        self.params = decoding.prepare_params(self.cfg, trained(kind))
        self.early, self.late = jax.jit(self.first), jax.jit(self.second)

    def layers(self, first, last, params, inputs, length):
        encoded = target.encode_inputs(self.cfg, params, inputs, length)
        return target.layer_range(self.cfg, params, encoded, first, last)

    def apply_layers(self, layers, x):
        index = 0 * x[:, 0, 0].astype(jnp.int32)
        cache = layers.take_cache(model.empty_cache(self.cfg, 1, x.shape[1], False))
        return layers.apply_layers(x, index, cache)[0]

    def first(self, params, tokens, inputs, length):
        layers = self.layers(0, self.middle, params, inputs, length)
        return self.apply_layers(layers, layers.embed(tokens, length * 0))

    def second(self, params, x, inputs, length):
        layers = self.layers(self.middle, self.cfg.decoder.layers, params, inputs, length)
        hidden = layers.final_norm(self.apply_layers(layers, x))
        transformer = model.Transformer(self.cfg, scan=False)
        return transformer.apply({"params": params}, hidden, method=model.Transformer.logits)

    def read(self, example, tokens):
        """Returns the early layers' output, and what they added to the token before the root."""
        inputs = generation.shard_rows(decoding.pad_rows([example], 16))
        ids, _ = decoding.pad_rows([tokens], 64)
        states = np.array(self.early(self.params, generation.shard_rows(ids), *inputs))[0]
        last = len(tokens) - 2
        return states, states[last] - np.asarray(self.params["embedding"])[tokens[last]]

    def continued(self, example, tokens, count):
        """`count` drafts after tokens of an example, start and root included, all but the root in
        the cache."""
        table = np.asarray(self.params["embedding"])
        inputs = generation.shard_rows(decoding.pad_rows([example], 16))
        states, added = self.read(example, tokens)
        root = len(tokens) - 1
        drafts = [tokens[-1]]
        for place in range(root, root + count):
            states[place] = table[drafts[-1]] + added
            x = jax.device_put(states[None], sharding.named_sharding("batch length width"))
            logits = np.asarray(self.late(self.params, x, *inputs))
            drafts.append(int(np.argmax(logits[0, place])))
        return drafts[1:]


def test_late_layers_draft_from_the_last_state_before_them():
    use_one_device()
    reference, count = Late("deep encoder_decoder", 1), CASES["late layers"].drafter.tree.width - 1
    first, *later = itertools.islice(steps(CASES["late layers"], "deep encoder_decoder"), 5)
    assert np.all(first.draft.tokens == -1)
    for step in later:
        for row, example in enumerate(EXAMPLES):
            tokens = step.before.tokens[row, : step.before.length[row] + 1].tolist()
            expected = reference.continued(example, tokens, count)
            assert step.draft.tokens[row].tolist() == expected


def test_drafters_that_do_not_fit_are_refused():
    cfg = KINDS["encoder_decoder"]
    with pytest.raises(ValueError, match="draft model is an encoder alone"):
        DraftModel(toy_model("encoder_only"), cfg)
    with pytest.raises(ValueError, match="one node wide"):
        DraftModel(cfg, cfg, chain(1))
    use_one_device()
    for drafter in (EarlyExit(2), EarlyExit(0), LateLayers(2)):
        with pytest.raises(ValueError, match=r"must be in 1\.\.1"):
            decode_rows("deep encoder_decoder", GREEDY, decoding.Drafting(drafter))
