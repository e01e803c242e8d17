# SPDX-License-Identifier: Apache-2.0
"""Laws of several samples, which share encoder and prompt, and of the probabilities of tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive
from decoding_laws import EXAMPLES, KINDS, decode_rows, prepared_params, request_rows
from test_decoding_loop import NEVER, use_one_device

from t5x_lite import config, decoding, model, sharding
from t5x_lite.decoding import generation, scoring, target
from t5x_lite.decoding.drafters import lookup, recycling
from t5x_lite.decoding.request import SEED_STEP

LENGTH, SAMPLES, ALTERNATIVES = 8, 3, 4
DRAWN = config.Decode(max_new_tokens=LENGTH, temperature=1.3, top_k=20, top_p=0.9, seed=3)
SEVERAL = dataclasses.replace(DRAWN, n_best=SAMPLES)
DETAILED = dataclasses.replace(DRAWN, logprobs=ALTERNATIVES)
DRAFTINGS = {
    "plain": generation.PLAIN,
    "lookup": decoding.Drafting(lookup.Lookup()),
    "recycling": decoding.Drafting(recycling.Recycling()),
}
ORDER = (2, 0, 5, 3)


@pytest.fixture(autouse=True)
def one_device():
    use_one_device()


def samples_one_by_one(kind):
    """The samples of rows that are each a request of their own: same row number, seeds apart."""
    texts = []
    for number in range(SAMPLES):
        seed = (DRAWN.seed + number * SEED_STEP) % 2**32
        result = decode_rows(kind, dataclasses.replace(DRAWN, seed=seed), order=ORDER)
        texts.append(result.tokens[:, 0])
    return np.stack(texts, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, drafter",
    mark_exhaustive(
        [(kind, name) for kind in ("encoder_decoder", "prefix") for name in ("plain", "lookup")],
        kept=[("encoder_decoder", "lookup"), ("prefix", "plain")],
    ),
)
def test_samples_that_share_a_prompt_are_those_of_repeated_rows(kind, drafter):
    together = decode_rows(kind, SEVERAL, DRAFTINGS[drafter], order=ORDER)
    assert together.tokens.shape == (len(ORDER), SAMPLES, LENGTH)
    assert together.log_probability.shape == together.lengths.shape == (len(ORDER), SAMPLES)
    np.testing.assert_array_equal(together.tokens, samples_one_by_one(kind))
    assert len(np.unique(together.tokens[0], axis=0)) == SAMPLES


@pytest.mark.slow
def test_samples_on_a_split_mesh_are_those_of_one_device():
    alone = decode_rows("encoder_decoder", SEVERAL, order=ORDER)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    split = decode_rows("encoder_decoder", SEVERAL, order=ORDER)
    np.testing.assert_array_equal(split.tokens, alone.tokens)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_inputs_are_encoded_and_prompts_read_once_for_all_samples(kind, monkeypatch):
    rows = {"encode_inputs": [], "prefill": []}

    def count(name, place, function):
        def counted(*args):
            leaf = jax.tree.leaves(args[place])[0]
            rows[name].append(leaf.shape[0])
            return function(*args)

        monkeypatch.setattr(target, name, counted)

    count("encode_inputs", 2, target.encode_inputs)
    count("prefill", 3, target.prefill)
    params = prepared_params(kind, jax.sharding.get_mesh())
    program = generation.make_program(KINDS[kind], SEVERAL)
    placed = generation.place_request(request_rows(kind, SEVERAL, order=ORDER))
    assert len(placed.row) == len(ORDER) * SAMPLES
    read = functools.partial(generation.read_request, program)
    encoded, cache = jax.eval_shape(read, params, placed._replace(eos=None))
    has_encoder = KINDS[kind].encoder is not None
    assert rows == {"encode_inputs": [len(ORDER)] * has_encoder, "prefill": [len(ORDER)]}
    for leaf in jax.tree.leaves((encoded, cache)):
        assert leaf.shape[0] == len(ORDER) * SAMPLES


def log_probabilities(kind, order, texts):
    """Log-probability of every token after each prefix of the texts, in float64 [b t v].

    Args:
      kind: the model.
      order: rows of EXAMPLES.
      texts: new tokens of each.
    """
    cfg = KINDS[kind]
    params = prepared_params(kind, jax.sharding.get_mesh())
    inputs = [EXAMPLES[row] for row in order]
    if cfg.encoder is None:
        inputs = [[cfg.decoder_start_token_id, *row] for row in inputs]
        begins = [len(row) - 1 for row in inputs]
        rows = [[*a, *b] for a, b in zip(inputs, texts, strict=True)]
        ids, _ = decoding.pad_rows(rows, 32)
        transformer = model.Transformer(cfg, scan=False)

        @jax.jit
        def read(params, ids, prefix):
            block = model.TokenBlock(ids, 0 * prefix, prefix=prefix)
            cache = model.empty_cache(cfg, *ids.shape, scan=False)
            run = functools.partial(transformer.apply, {"params": params})
            hidden, _ = run(block, cache, method=model.Transformer.decode)
            return run(hidden, method=model.Transformer.logits)

        prefix = np.array([len(row) for row in inputs], np.int32)
        logits = read(params, *generation.shard_rows((ids, prefix)))
    else:
        begins = [0] * len(inputs)
        batch = generation.shard_rows(scoring.teacher_forced_batch(cfg, inputs, texts))
        apply = functools.partial(model.Transformer(cfg, scan=False).apply, {"params": params})
        logits = jax.jit(apply)(batch)
    logits = np.asarray(logits, np.float64)
    logits = np.stack([row[b : b + LENGTH] for row, b in zip(logits, begins, strict=True)])
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def truncated(log_probability, decode):
    """Probability of the tokens that top-k, then top-p, leave out; by sorting, in float64."""
    scaled = np.exp(log_probability / decode.temperature)
    share = scaled / scaled.sum()
    order = np.argsort(-share)
    kept = order[: decode.top_k]
    sums = np.cumsum(share[kept]) / share[kept].sum()
    kept = kept[: int(np.searchsorted(sums, decode.top_p)) + 1]
    return 1 - share[kept].sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, drafter",
    mark_exhaustive(
        [(kind, name) for kind in ("encoder_decoder", "decoder_only") for name in DRAFTINGS],
        kept=[
            ("encoder_decoder", "recycling"),
            ("decoder_only", "plain"),
            ("encoder_decoder", "lookup"),
        ],
    ),
)
def test_probabilities_of_tokens_are_those_of_a_float64_recomputation(kind, drafter):
    result = decode_rows(kind, DETAILED, DRAFTINGS[drafter], order=ORDER)
    details, texts = result.details, result.tokens[:, 0]
    assert details.top_tokens.shape == (len(ORDER), 1, LENGTH, ALTERNATIVES)
    expected = log_probabilities(kind, ORDER, texts.tolist())
    chosen = np.take_along_axis(expected, texts[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(details.log_probability[:, 0], chosen, atol=2e-5)
    np.testing.assert_allclose(chosen.sum(axis=1), result.log_probability[:, 0], atol=2e-4)
    best = -np.sort(-expected, axis=-1)[..., :ALTERNATIVES]
    np.testing.assert_allclose(details.top_log_probability[:, 0], best, atol=2e-5)
    named = np.take_along_axis(expected, details.top_tokens[:, 0], axis=-1)
    np.testing.assert_allclose(named, best, atol=2e-5)
    masses = [[truncated(place, DETAILED) for place in row] for row in expected]
    np.testing.assert_allclose(details.truncated[:, 0], masses, atol=2e-5)
    assert np.min(masses) > 0.01  # or there is nothing to see
    plain = decode_rows(kind, DRAWN, order=ORDER)
    np.testing.assert_array_equal(texts, plain.tokens[:, 0])


@pytest.mark.slow
def test_greedy_text_truncates_nothing_and_samples_have_details_each():
    greedy = config.Decode(max_new_tokens=LENGTH, logprobs=0)
    details = decode_rows("encoder_decoder", greedy, order=ORDER).details
    assert details.top_tokens.shape[-1] == 0 and not details.truncated.any()
    several = dataclasses.replace(DETAILED, n_best=SAMPLES)
    result = decode_rows("encoder_decoder", several, order=ORDER, eos=NEVER)
    totals = result.details.log_probability.sum(axis=-1)
    np.testing.assert_allclose(totals, result.log_probability, atol=1e-4)
    assert result.details.top_tokens.shape == (len(ORDER), SAMPLES, LENGTH, ALTERNATIVES)


def test_a_stream_has_the_details_of_the_whole_text():
    cfg, params = KINDS["decoder_only"], prepared_params("decoder_only", jax.sharding.get_mesh())
    request = request_rows("decoder_only", DETAILED, order=ORDER)
    *_, last = decoding.stream(cfg, params, request, DETAILED, every=3)
    whole = decode_rows("decoder_only", DETAILED, order=ORDER)
    np.testing.assert_array_equal(last.details.top_tokens, whole.details.top_tokens)
    np.testing.assert_allclose(last.details.truncated, whole.details.truncated, atol=1e-6)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="logprobs are those of a text written token by token"):
        config.Decode(beams=2, logprobs=1)
    with pytest.raises(ValueError, match="set Decode.n_best to 2 or more"):
        config.Decode(choose="score")
    with pytest.raises(ValueError, match="logprobs 65 is more than the 64 ids of the model"):
        request_rows("decoder_only", dataclasses.replace(DRAWN, logprobs=65))
    for choose in ("best", "mbr", "mbr:", "score:x", "rerank", "function"):
        with pytest.raises(ValueError, match="is not one of score, mbr:METRIC, rerank:PATH"):
            config.Decode(temperature=1.0, n_best=2, choose=choose)
