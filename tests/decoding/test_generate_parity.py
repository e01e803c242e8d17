# SPDX-License-Identifier: Apache-2.0
"""Texts of transformers' `generate` with each rule of decoding, on toys of three families."""

import collections
import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from families import window_within
from family_models import llama_like, t5, t5gemma
from parity import Pair, read, tensor

from t5x_lite import config, decoding
from t5x_lite.config.companions import parse_combination
from t5x_lite.decoding.companions.companion import Companion
from t5x_lite.decoding.companions.rows import attach_companion, last_rows
from t5x_lite.decoding.companions.rules import make_rule
from t5x_lite.model import computation

TOYS = {
    "t5": t5(transformers.T5ForConditionalGeneration),
    "t5gemma": t5gemma,
    "llama": llama_like("generate", transformers.LlamaConfig),
}
ROWS, LENGTH, NEW, EOS = 4, 5, 12, 7
SEED = 11
# The scores of transformers' processors, in the order of its `generate`.
SAMPLERS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
    "typical_p": transformers.TypicalLogitsWarper,
    "epsilon_cutoff": transformers.EpsilonLogitsWarper,
    "eta_cutoff": transformers.EtaLogitsWarper,
}
# Rules whose names are the same on both sides, and others with a field of each. FIRST and SECOND
# stand for the tokens that a toy writes most often.
FIRST, SECOND = -1, -2
RULES = {
    "nothing": {},
    "repetition": dict(repetition_penalty=1.6),
    "bigrams": dict(no_repeat_ngram_size=2),
    "length": dict(min_new_tokens=9),
    "bad words": dict(bad_words_ids=((FIRST,), (SECOND, SECOND))),
    "suppressed": dict(suppress_tokens=(FIRST, 11)),
    "bias": dict(logit_bias={FIRST: -4.0, SECOND: 2.5}),
    "temperature": dict(temperature=0.7),
    "top_k": dict(temperature=1.0, top_k=5),
    "top_p": dict(temperature=1.0, top_p=0.7),
    "min_p": dict(temperature=1.2, min_p=0.2),
    "typical": dict(temperature=1.0, typical_p=0.6),
    "epsilon": dict(temperature=1.0, epsilon_cutoff=0.03),
    "eta": dict(temperature=1.0, eta_cutoff=0.05),
    "guidance": dict(combine="guidance:1.8", companion="unconditional"),
    "all": dict(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=6,
        bad_words_ids=((4, 5),),
        suppress_tokens=(2,),
        logit_bias={3: 1.0},
        temperature=0.9,
        top_k=12,
        top_p=0.9,
    ),
}
# A forced first token is for encoder-decoders; transformers guides decoder-only models alone.
# All rules together are slow, each alone exhaustive but for those that are not among all: one code.
ALONE = ("min_p", "typical", "epsilon", "eta", "first")
CASES = [
    pytest.param(
        toy,
        rule,
        marks=pytest.mark.slow
        if rule in ("guidance", "all") or (toy == "t5" and rule in ALONE)
        else pytest.mark.exhaustive,
    )
    for toy in TOYS
    for rule in [*RULES, "first"]
    if rule != ("first" if toy == "llama" else "guidance")
]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Both models of a family by name."""

    @functools.cache
    def read_pair(name):
        pair = read(TOYS[name](0), tmp_path_factory.mktemp(name))
        adjusted = window_within(pair.cfg) if name == "t5gemma" else pair.cfg
        return pair._replace(cfg=adjusted)

    return read_pair


class Noise(transformers.LogitsProcessor):
    """Our noise, by which the best token is a sample."""

    def __init__(self, before: int):
        self.before = before

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1] + self.before
        rows = []
        for row in range(len(scores)):
            key = jax.random.fold_in(jax.random.key(SEED), row)
            key = jax.random.fold_in(key, position)
            rows.append(np.asarray(jax.random.gumbel(key, scores.shape[1:])))
        return scores + torch.tensor(np.stack(rows))


def inputs_of(pair: Pair) -> np.ndarray:
    """Ids of transformers: inputs of an encoder, or prompts."""
    ids = np.random.default_rng(2).integers(3, 20, size=(ROWS, LENGTH))
    if pair.cfg.encoder is None and pair.cfg.add_bos:
        ids[:, 0] = pair.cfg.decoder_start_token_id
    return ids


def frequent_tokens(pair: Pair) -> list[int]:
    """The two tokens that a toy writes most often."""
    counted = collections.Counter(our_texts(pair, {}).ravel().tolist())
    return [token for token, _ in counted.most_common(2)]


def with_tokens(value, frequent: list[int]):
    """A value of RULES with tokens in the places of FIRST and SECOND."""
    if isinstance(value, dict):
        return {with_tokens(key, frequent): each for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(with_tokens(each, frequent) for each in value)
    return frequent[-value - 1] if value in (FIRST, SECOND) else value


def our_texts(pair: Pair, options: dict, eos: int = EOS) -> np.ndarray:
    """Tokens that ours writes, up to the first end.

    Args:
      pair: both models.
      options: fields of Decode.
      eos: the token that ends a text.
    """
    decode = config.Decode(max_new_tokens=NEW, seed=SEED, **options)
    params = decoding.prepare_params(pair.cfg, pair.params)
    cfg = computation.with_dtype_of(pair.cfg, params)
    ids = inputs_of(pair)
    begins = 1 if cfg.encoder is None and cfg.add_bos else 0
    request = decoding.make_request(cfg, ids[:, begins:].tolist(), decode, eos=eos)
    if decode.companion:
        rule = make_rule(parse_combination(decode.combine, decode.companion))
        companion = Companion(rule, params, cfg=cfg)
        request = attach_companion(request, companion, last_rows(request))
    return decoding.generate(cfg, params, request, decode).tokens[:, 0]


def their_texts(pair: Pair, options: dict, eos: int) -> np.ndarray:
    """Tokens that transformers writes, with its processors and our noise.

    Args:
      pair: both models.
      options: fields of Decode.
      eos: the token that ends a text.
    """
    ids, theirs = inputs_of(pair), pair.theirs
    named, processors = dict(options), transformers.LogitsProcessorList()
    for name, kind in SAMPLERS.items():
        if (value := named.pop(name, None)) is not None:
            processors.append(kind(value))
    if "temperature" in options:
        # Slots of ours: the start token of a decoder is one of theirs too.
        processors.append(Noise(before=0))
    if bias := named.pop("logit_bias", None):
        named["sequence_bias"] = [[[token], added] for token, added in bias.items()]
    if words := named.pop("bad_words_ids", None):
        named["bad_words_ids"] = [[*each] for each in words]
    if tokens := named.pop("suppress_tokens", None):
        named["suppress_tokens"] = [*tokens]
    if combine := named.pop("combine", None):
        named.pop("companion")
        # Built here: with its cache, transformers 5.24 forgets what the second prompt read.
        processors.append(
            transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
                float(combine.partition(":")[2]), theirs, use_cache=False
            )
        )
    written = theirs.generate(
        tensor(ids),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos,
        pad_token_id=0,
        bos_token_id=0,
        decoder_start_token_id=pair.cfg.decoder_start_token_id,
        logits_processor=processors,
        **named,
    ).numpy()
    return written[:, 1 if pair.cfg.encoder else LENGTH :]


@pytest.mark.parametrize("toy, rule", CASES)
def test_texts_are_those_of_transformers(pair_of, toy, rule):
    pair = pair_of(toy)
    options = dict(forced_bos_token_id=9) if rule == "first" else RULES[rule]
    frequent = frequent_tokens(pair)
    options = {name: with_tokens(value, frequent) for name, value in options.items()}
    # A text ends early without the rule of a least length.
    eos = frequent[0] if rule == "length" else EOS
    ours, theirs = our_texts(pair, options, eos), their_texts(pair, options, eos)
    for our_row, their_row in zip(ours, theirs, strict=True):
        ends = np.flatnonzero(our_row == eos)
        length = ends[0] + 1 if len(ends) else NEW
        np.testing.assert_array_equal(our_row[:length], their_row[:length])
        assert not their_row[length:].any()
    if options:
        assert not np.array_equal(ours, our_texts(pair, {}, eos))


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_are_those_of_transformers(pair_of, early_stopping):
    pair = pair_of("t5")
    eos = frequent_tokens(pair)[1]
    params = decoding.prepare_params(pair.cfg, pair.params)
    cfg = computation.with_dtype_of(pair.cfg, params)
    lengths = set()
    for exponent in (-1.0, 0.0, 1.0, 3.0):
        rule = dict(length_penalty=exponent, early_stopping=early_stopping)
        decode = config.Decode(max_new_tokens=NEW, beams=4, n_best=4, **rule)
        request = decoding.make_request(cfg, inputs_of(pair).tolist(), decode, eos=eos)
        ours = decoding.generate(cfg, params, request, decode)
        theirs = pair.theirs.generate(
            tensor(inputs_of(pair)),
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=4,
            num_return_sequences=4,
            eos_token_id=eos,
            pad_token_id=0,
            decoder_start_token_id=cfg.decoder_start_token_id,
            return_dict_in_generate=True,
            output_scores=True,
            **rule,
        )
        written = theirs.sequences.numpy().reshape(ROWS, 4, -1)[:, :, 1:]
        width = written.shape[2]
        # It pads with eos where the id of padding is 0.
        past = np.arange(width) >= ours.lengths[:, :, None]
        np.testing.assert_array_equal(np.where(past, eos, ours.tokens[:, :, :width]), written)
        scores = theirs.sequences_scores.numpy().reshape(ROWS, 4)
        np.testing.assert_allclose(ours.scores, scores, rtol=1e-4)
        lengths |= set(ours.lengths.ravel().tolist())
    assert len(lengths) > 2
