# SPDX-License-Identifier: Apache-2.0
"""Companions of toys, the formula of each rule by hand, and logits of full passes."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from test_decoding_loop import EXAMPLES, KINDS, NEVER, Rollout, lively, use_one_device

from t5x_lite import config, decoding, model
from t5x_lite.config.companions import parse_combination
from t5x_lite.decoding import generation, target
from t5x_lite.decoding.companions import rules
from t5x_lite.decoding.companions.companion import Companion
from t5x_lite.decoding.companions.rows import (
    attach_companion,
    last_rows,
    same_rows,
)
from t5x_lite.decoding.request import prompt_rows

LENGTH = 10
GREEDY = config.Decode(max_new_tokens=LENGTH)
SAMPLED = config.Decode(max_new_tokens=LENGTH, temperature=0.9, top_k=20, seed=3)


class Case(NamedTuple):
    """A companion under test: what it is, and the rule."""

    companion: str
    combine: str


CASES = {
    "guidance": Case("unconditional", "guidance:1.7"),
    "instructive": Case("prompt:other", "instructive:0.4"),
    "contrast": Case("model:other", "contrast:0.2:0.5"),
    "switch": Case("model:other", "switch:3.86"),
    "rolling switch": Case("model:other", "switch:3.86:3"),
    "dola": Case("layers:1", "dola:0.05"),
    "deco": Case("layers:1", "deco:0.6:0.9"),
}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def entropy_of(logits) -> float:
    """Entropy in nats, in float64."""
    logarithms = log_softmax(logits)
    return -(np.exp(logarithms) * logarithms).sum()


def combine_by_hand(case: Case, model_logits, others, entropy=None) -> np.ndarray:
    """The formula of each paper for one token, in float64; minus infinity for implausible tokens.

    Args:
      case: companion and rule.
      model_logits: logits of the model [v].
      others: logits of the companions [c v].
      entropy: mean entropy of the companion; None takes that of the token.
    """
    name, *numbers = case.combine.split(":")
    numbers = [float(number) for number in numbers]
    plain_logits, others = log_softmax(model_logits), [log_softmax(each) for each in others]
    if name == "guidance":
        return numbers[0] * (plain_logits - others[0]) + others[0]
    if name == "instructive":
        return plain_logits - numbers[0] * others[0]
    if name == "switch":
        entropy = entropy_of(others[0]) if entropy is None else entropy
        return plain_logits if entropy >= numbers[0] else others[0]
    if name == "deco":
        order = np.argsort(-plain_logits)
        before = np.cumsum(np.exp(plain_logits[order])) - np.exp(plain_logits[order])
        likely = order[before < numbers[1]]
        best = max(others, key=lambda each: each[likely].max())
        combined = np.full_like(plain_logits, -np.inf)
        combined[likely] = (
            plain_logits[likely] + numbers[0] * np.exp(best[likely].max()) * best[likely]
        )
        return combined
    plausible = plain_logits >= plain_logits.max() + np.log(numbers[0])
    if name == "dola":

        def divergence(other):
            mean = (np.exp(plain_logits) + np.exp(other)) / 2
            return sum((mean * (np.log(mean) - each)).sum() for each in (plain_logits, other)) / 2

        other, beta = max(others, key=divergence), None
    else:
        other, beta = others[0], (numbers[1:] or [None])[0]
    contrast = plain_logits - other if beta is None else (1 + beta) * plain_logits - beta * other
    return np.where(plausible, contrast, -np.inf)


def assert_same_logits(ours, expected, atol: float):
    """Checks logits; implausible tokens are below all others.

    Args:
      ours: logits [v].
      expected: the same by hand, minus infinity for implausible tokens.
      atol: tolerance of the others.
    """
    ours, plausible = np.asarray(ours), np.isfinite(expected)
    np.testing.assert_allclose(ours[plausible], expected[plausible], rtol=1e-5, atol=atol)
    assert (ours[~plausible] < rules.IMPLAUSIBLE / 2).all()


@functools.cache
def trained(kind: str, seed: int = 1):
    return lively(KINDS[kind], seed)


@functools.cache
def prepared(kind: str, mesh, seed: int = 1):
    return decoding.prepare_params(KINDS[kind], trained(kind, seed))


def others_of(example):
    """Ids that a companion with a prompt of its own reads for an example."""
    return [*example[::-1], 21, 34]


def with_companion(request, name: str, kind: str, examples=EXAMPLES):
    """A request with the companion of a case.

    Args:
      request: the rows.
      name: of the case.
      kind: of the model.
      examples: inputs of the rows.
    """
    case, cfg, mesh = CASES[name], KINDS[kind], jax.sharding.get_mesh()
    rule = rules.make_rule(parse_combination(case.combine, case.companion))
    if case.companion.startswith("layers"):
        return attach_companion(request, Companion(rule, layers=(1,)))
    seed = 2 if case.companion.startswith("model") else 1
    companion = Companion(rule, cfg=cfg).with_params(prepared(kind, mesh, seed))
    if case.companion.startswith("prompt"):
        rows = prompt_rows(cfg, [others_of(example) for example in examples])
        return attach_companion(request, companion, rows)
    rows = last_rows if case.companion == "unconditional" else same_rows
    samples = len(request.prompts) // len(examples)
    return attach_companion(request, companion, rows(request, samples))


def request_of(name, kind, decode, examples=EXAMPLES, **options):
    request = decoding.make_request(KINDS[kind], examples, decode, **({"eos": NEVER} | options))
    return with_companion(request, name, kind, examples)


def generate(name, kind, decode, drafting=generation.PLAIN, examples=EXAMPLES, **options):
    request = request_of(name, kind, decode, examples, **options)
    params = prepared(kind, jax.sharding.get_mesh())
    return decoding.generate(KINDS[kind], params, request, decode, drafting)


@functools.cache
def plain(name, kind, decode):
    """Tokens of plain decoding on one device.

    Args:
      name: of the case.
      kind: of the model.
      decode: limit and sampling.
    """
    use_one_device()
    return generate(name, kind, decode).tokens


class FullPass(Rollout):
    """Logits by a pass over the whole text, without a cache."""

    def __init__(self, cfg, params):
        self.cfg, self.params = cfg, params
        self.apply = jax.jit(
            lambda params, batch: model.Transformer(cfg).apply({"params": params}, batch)
        )


@functools.cache
def full_pass(kind: str, seed: int = 1, layers: int | None = None, start: int | None = None):
    """Full passes of a model, of its first layers, or with another start token.

    Args:
      kind: of the model.
      seed: of its weights.
      layers: number of its first layers; None for all.
      start: id of the start token; None for the model's.
    """
    cfg, params = KINDS[kind], trained(kind, seed)
    if start is not None:
        cfg = dataclasses.replace(cfg, decoder_start_token_id=start)
    if layers is not None:
        cfg = target.keep_layers(cfg, 0, layers)
        cut = jax.tree.map(lambda x: x[:layers], params["decoder"]["layers"])
        params = params | {"decoder": params["decoder"] | {"layers": cut}}
    return FullPass(cfg, params)


def expected_logits(name, kind, example, written):
    """Logits after a text, of full passes of the model and of its companion.

    Args:
      name: of the case.
      kind: of the model.
      example: the input.
      written: new tokens.
    """
    case, plain_logits, entropy = CASES[name], full_pass(kind).logits(example, written), None
    if case.companion.startswith("layers"):
        other = full_pass(kind, layers=1).logits(example, written)
    elif case.companion.startswith("model"):
        other = full_pass(kind, 2).logits(example, written)
        if name == "rolling switch":
            before = [written[:length] for length in range(len(written) + 1)][-3:]
            every = [full_pass(kind, 2).logits(example, each) for each in before]
            entropy = np.mean([entropy_of(each) for each in every])
    elif case.companion.startswith("prompt"):
        other = full_pass(kind).logits(others_of(example), written)
    elif KINDS[kind].encoder is not None:
        other = full_pass(kind).logits(example[-1:], written)
    else:  # the last token of the prompt alone, without the start token
        other = full_pass(kind, start=example[-1]).logits([], written)
    return combine_by_hand(case, plain_logits, [other], entropy)
