# SPDX-License-Identifier: Apache-2.0
"""Laws of positions: biases and their dense form for every mask, and every kind in a model."""

import dataclasses
import functools
import types

import decoder_parity
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import transformers
from conftest import toy_batch, toy_model, toy_stack

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.kernels import api as kernels
from t5x_lite.kernels import dense_mask
from t5x_lite.kernels.relative import RelativePositionBias
from t5x_lite.model import contexts, layers, positions
from t5x_lite.model.attention import AttentionContext
from t5x_lite.training import step

YARN = config.RotaryScaling("yarn", 4.0, original=5)
DYNAMIC = config.RotaryScaling("dynamic", 3.0, original=4)
# Every kind that the families of tests/model/test_model.py do not have.
POSITIONS = {
    "none": dict(positions="none"),
    "alibi": dict(positions="alibi"),
    "interpolated": dict(positions="learned", max_length=6, interpolation=2.5),
    "bipe": dict(positions="bipe", segment_length=3),
    "hope": dict(positions="rotary", rotary_span=12, rotary_base=50.0),
    "vectors": dict(positions="relative", bias_vectors=True, buckets=8, max_distance=9),
    "redllm": dict(positions="rotary", cross_rotary=True, qkv_norm=True, output_norm=True),
    "yarn": dict(positions="rotary", rotary_scaling=YARN, rotary_base=20.0),
    "dynamic": dict(positions="rotary", rotary_scaling=DYNAMIC),
}
LENGTH = 12


@pytest.mark.slow
@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        kernels.Mask(np.ones((1, 200), np.int32), np.ones((1, 170), np.int32)),
        kernels.CacheMask(np.array([0, 7, 199]), width=1, slots=200),
        kernels.CacheMask(np.array([0, 195, 31, 3]), width=5, slots=200),
        kernels.CacheMask(np.array([0, 0]), width=130, slots=130),
        kernels.CacheMask(np.array([4, 90]), 3, 200, np.array([0, 1, 1]), np.tri(3, dtype=bool)),
    ],
    ids=["rows", "tokens", "chains", "prompts", "tree"],
)
def test_the_bias_laid_out_is_the_bucket_of_every_pair(both_sides, mask):
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    stack = toy_stack()
    table = jax.random.normal(jax.random.key(0), (stack.buckets, stack.heads))
    relative = positions.relative(table, stack, both_sides)
    over = dense_mask.materialize_mask(jax.tree.map(jnp.asarray, mask))
    distance = np.asarray(over.distance)
    bucket = relative.bucket(-distance.reshape(-1, *distance.shape[-2:]))
    wanted = np.moveaxis(np.asarray(table)[bucket], -1, 1)
    np.testing.assert_allclose(dense_mask.materialize_bias(relative, over), wanted, rtol=1e-6)


def test_buckets_begin_at_the_published_distances():
    table = np.zeros((32, 4))

    def firsts(buckets):
        return [int(np.argmax(buckets == b)) for b in range(buckets.max() + 1)]

    behind = -np.arange(300)
    both = np.asarray(RelativePositionBias(table, 128, True).bucket(behind))
    assert firsts(both)[8:] == [8, 12, 16, 23, 32, 46, 64, 91]
    causal = np.asarray(RelativePositionBias(table, 128, False).bucket(behind))
    assert firsts(causal)[16] == 16 and firsts(causal)[31] == 113


@pytest.fixture
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def toy(name: str) -> config.Model:
    return toy_model("encoder_decoder", layers=1, **POSITIONS[name])


def draw_params(cfg: config.Model) -> dict:
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.4 * draw.normal(size=leaf.shape)).astype(np.float32), model.shapes(cfg)
    )


@functools.cache
def compiled(name: str):
    """Logits of a batch, by the one program of a kind; the laws share it."""
    cfg = toy(name)
    params = draw_params(cfg)
    apply = jax.jit(lambda batch: model.Transformer(cfg).apply({"params": params}, batch))
    return lambda batch: np.asarray(apply(sharding.place_batch(batch)))


def pad_rows(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, LENGTH - rows.shape[1])))


def alone(batch: Batch, row: int, segment: int) -> Batch:
    """One example of a packed batch as rows of its own, padded to the length of a row.

    Args:
      batch: packed batch.
      row: row of the example.
      segment: its number in the row, from 1.
    """
    fields = []
    for values, segments in zip(
        batch[:7], [batch.target_segments] * 4 + [batch.input_segments] * 3, strict=True
    ):
        kept = values[row][segments[row] == segment]
        fields.append(pad_rows(np.tile(kept, (len(values), 1))))
    fields[1], fields[5] = (np.minimum(fields[at], 1) for at in (1, 5))
    return Batch(*fields)


@pytest.mark.parametrize("name", POSITIONS)
def test_packed_examples_get_the_logits_they_get_alone(one_device, name):
    batch = toy_batch("encoder_decoder", rows=2)
    packed = compiled(name)(batch)
    for segment in (1, 2):
        here = batch.target_segments[1] == segment
        expected = compiled(name)(alone(batch, 1, segment))[0, : here.sum()]
        np.testing.assert_allclose(packed[1][here], expected, atol=2e-5)


def whole_rows() -> Batch:
    """Rows of one example each."""
    draw = np.random.default_rng(3)
    ids = draw.integers(2, 64, (2, 2, LENGTH)).astype(np.int32)
    ones = np.ones((2, LENGTH), np.int32)
    where = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    weights = ones.astype(np.float32)
    return Batch(ids[0], ones, where, weights, ids[1], ones, where)


@pytest.mark.parametrize("name", POSITIONS)
def test_cached_blocks_and_single_tokens_get_the_logits_of_whole_rows(one_device, name):
    cfg, batch = toy(name), whole_rows()
    transformer, params = model.Transformer(cfg), draw_params(cfg)
    tokens = np.pad(batch.targets[:, :-1], ((0, 0), (1, 0)))

    @jax.jit
    def decode(params, tokens, batch):
        def call(*args, **more):
            return transformer.apply({"params": params}, *args, **more)

        read = batch.inputs, batch.input_segments, batch.input_positions
        encoded = call(*read, method=model.Transformer.encode)
        cross_kv = call(encoded, method=model.Transformer.cross_kv)
        memory = model.EncoderMemory(cross_kv, batch.input_segments > 0)
        cache, logits, start = model.empty_cache(cfg, 2, 16), [], 0
        for width in (7, 1, 4):
            block = model.TokenBlock(tokens[:, start : start + width], jnp.full(2, start))
            hidden, cache = call(block, cache, memory, method=model.Transformer.decode)
            logits.append(call(hidden, method=model.Transformer.logits))
            start += width
        return jnp.concatenate(logits, axis=1)

    cached = np.asarray(decode(params, tokens, sharding.place_batch(batch)))
    np.testing.assert_allclose(cached, compiled(name)(batch), atol=2e-5)


def test_cross_attention_counts_targets_on_from_the_inputs_of_their_text(one_device):
    batch = toy_batch("encoder_decoder", rows=2)
    placed = sharding.place_batch(batch)
    context = AttentionContext(placed.target_positions, None, encoded=placed.inputs)
    stack = toy("redllm").decoder
    context = contexts.rotate_cross(context, stack, placed[1:3], placed[5:7])
    for row, segment in ((0, 1), (0, 2), (1, 1), (1, 2)):
        here = batch.target_segments[row] == segment
        inputs = (batch.input_segments[row] == segment).sum()
        expected = inputs + np.arange(here.sum())
        np.testing.assert_array_equal(context.cross_where[row][here], expected)
    np.testing.assert_array_equal(context.encoded_where, batch.input_positions)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_without_weights_are_the_formula(one_device, kind):
    x = np.random.default_rng(0).normal(1.0, 2.0, size=(2, 3, 4, 8)).astype(np.float32)
    stack = toy_stack(norm=kind)
    for norm, axes in ((layers.normalize, -1), (layers.normalize_heads, (-2, -1))):
        centered = x - x.mean(axis=axes, keepdims=True) if kind == "layer" else x
        scale = np.sqrt((centered**2).mean(axis=axes, keepdims=True) + stack.norm_epsilon)
        np.testing.assert_allclose(norm(jnp.asarray(x), stack), centered / scale, atol=1e-5)


@pytest.mark.parametrize("name", POSITIONS)
def test_a_kernel_that_is_lacking_is_refused_by_name(one_device, name, monkeypatch):
    """Positions that are added or rotated have the kernels of all models: those take no bias."""
    monkeypatch.setenv("T5X_LITE_ATTENTION", "pallas")
    cfg = toy(name)
    if not cfg.lacks_kernel:
        assert model.Transformer(cfg).backend is not None
        return
    with pytest.raises(ValueError, match=f"{cfg.lacks_kernel} has no kernel"):
        model.Transformer(cfg).backend  # noqa: B018
    with pytest.raises(ValueError, match=f"{cfg.lacks_kernel} has no kernel"):
        dataclasses.replace(cfg, attention="pallas")


@pytest.mark.slow
def test_kernels_give_the_logits_of_plain_xla(one_device, monkeypatch):
    cfg = toy_model("decoder_only", layers=1, **POSITIONS["bipe"])
    params, batch = draw_params(cfg), toy_batch("decoder_only", rows=2)
    logits = {}
    for kind in ("reference", "pallas"):
        monkeypatch.setenv("T5X_LITE_ATTENTION", kind)
        apply = jax.jit(lambda batch: model.Transformer(cfg).apply({"params": params}, batch))
        logits[kind] = np.asarray(apply(sharding.place_batch(batch)))
    exists = batch.target_segments > 0
    np.testing.assert_allclose(logits["pallas"][exists], logits["reference"][exists], atol=2e-5)


def test_a_bias_without_a_kernel_is_plain_xla_on_a_tpu_and_the_log_says_so(monkeypatch, caplog):
    from t5x_lite.kernels import dispatch

    tpu = dispatch.target_device()._replace(platform="tpu", kind="TPU v5 lite")
    monkeypatch.setattr(dispatch, "target_device", lambda: tpu)
    monkeypatch.delenv("T5X_LITE_ATTENTION", raising=False)
    dispatch.report_fallback.cache_clear()
    with caplog.at_level("INFO", logger="absl"):
        assert kernels.select_backend("auto", toy("alibi").lacks_kernel) is None
    assert 'plain XLA: Stack.positions = "alibi" has no kernel' in caplog.text
    assert kernels.select_backend("auto") is not None


def test_alibi_has_the_published_slopes():
    np.testing.assert_allclose(kernels.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    twelve = kernels.alibi_slopes(12)
    np.testing.assert_allclose(twelve[:8], 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(twelve[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))
    bias = kernels.LinearPositionBias(jnp.array([0.5, 0.25]))
    expected = -np.abs([-3, -2, -1, 0, 1]) * [[0.5], [0.25]]
    np.testing.assert_array_equal(bias.by_distance(-3, 5), expected)


def test_bias_vectors_are_the_products_of_every_pair(one_device):
    draw = np.random.default_rng(0)
    q, keys = draw.normal(size=(2, 3, 4, 5)), draw.normal(size=(2, 4, 6, 5))
    vectors, buckets = draw.normal(size=(7, 5)), draw.integers(0, 7, (2, 3, 6))
    ours = positions.vector_bias(*map(jnp.asarray, (vectors, q, keys, buckets)))
    pairs = vectors[buckets]
    expected = np.einsum("btnh,btsh->bnts", q, pairs) + np.einsum("bnsh,btsh->bnts", keys, pairs)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_an_interpolated_table_has_its_rows_where_they_are_and_lines_between(one_device):
    stack = toy_stack(positions="learned", max_length=4, interpolation=2.0)
    table = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    places = np.arange(stack.longest)[None]
    assert stack.longest == 7
    ours = positions.look_up_positions(jnp.asarray(table), jnp.asarray(places), stack)
    ours = np.asarray(ours)[0]
    np.testing.assert_array_equal(ours[::2], table)
    np.testing.assert_allclose(ours[1::2], (table[:-1] + table[1:]) / 2, atol=1e-6)


def test_random_positions_increase_in_every_text_and_reach_far(one_device):
    batch = toy_batch("decoder_only", rows=64)
    segments, where = batch.target_segments, batch.target_positions

    def draw(segments, where, count):
        placed = [sharding.place(np.asarray(each), "batch length") for each in (segments, where)]
        return np.asarray(positions.draw_positions(*placed, count, jax.random.key(0)))

    drawn = draw(segments, where, 50)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert (np.diff(drawn, axis=1)[same] > 0).all()
    assert (drawn >= where).all() and drawn.max() < 50 and drawn.max() > 40
    np.testing.assert_array_equal(drawn[segments == 0], where[segments == 0])
    np.testing.assert_array_equal(draw(np.ones((1, 12), int), where[:1] * 0, 12), 0)
    with pytest.raises(ValueError, match="Stack.random_positions is 11, and rows have 12 tokens"):
        draw(segments, where, 11)


def test_random_positions_are_drawn_in_training_alone(one_device):
    cfg = toy_model("decoder_only", positions="sinusoidal", random_positions=40, layers=1)
    plain = toy_model("decoder_only", positions="sinusoidal", layers=1)
    params, batch = draw_params(cfg), sharding.place_batch(toy_batch("decoder_only", rows=2))

    def logits(cfg, key=None):
        return np.asarray(model.Transformer(cfg).apply({"params": params}, batch, key))

    np.testing.assert_array_equal(logits(cfg), logits(plain))
    key = jax.random.key(0)
    assert np.abs(logits(cfg, key) - logits(plain, key)).max() > 0.1
    np.testing.assert_array_equal(logits(plain), logits(plain, key))
    state = types.SimpleNamespace(step=jnp.array(3))
    train = config.Train(steps=4, batch_size=4)
    for model_config in (cfg, plain):
        context = step.step_context(config.Run("none", model_config, train=train), state)
        assert (context.key is not None) == (model_config is cfg)


THEIRS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 1.3,
        "mscale_all_dim": 0.4,
        "truncate": False,
        "original_max_position_embeddings": 8,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_stretched_positions_are_those_of_transformers(one_device, name, tmp_path):
    """Their dynamic scaling depends on the length so far: token by token over their cache."""
    longest = 5 if name == "dynamic" else 32
    fields = dict(hidden_size=24, intermediate_size=20, num_attention_heads=3, num_hidden_layers=2)
    theirs = transformers.LlamaConfig(
        vocab_size=41,
        **fields,
        max_position_embeddings=longest,
        rope_parameters=THEIRS[name] | {"rope_theta": 30.0},
        bos_token_id=1,
    )
    pair = parity.read(
        parity.shaken(transformers.LlamaForCausalLM(theirs), seed=0), tmp_path / "theirs"
    )
    tokens = decoder_parity.drawn_ids(41, 1, seed=0).tokens[2:]
    ids = decoder_parity.Ids(tokens, np.ones_like(tokens, bool))
    expected = decoder_parity.their_cached_logits(pair.theirs, ids)
    assert np.ptp(expected) > 0.5
    for logits in (decoder_parity.our_logits, decoder_parity.our_cached_logits):
        actual = logits(pair, ids)
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    written = huggingface.family_for_export(pair.cfg).config_json(pair.cfg)
    family = huggingface.family_of_config(written)
    assert family.parse_config(written, ["lm_head.weight"]) == dataclasses.replace(
        pair.cfg, dtype=family.parse_config(written, ["lm_head.weight"]).dtype
    )
    again = transformers.LlamaConfig(**written)
    assert again.rope_parameters.get("rope_type") == THEIRS[name]["rope_type"]


FIELDS = [
    (dict(interpolation=2.0), "Stack.interpolation is for learned positions, not relative"),
    (dict(positions="bipe"), "Stack.segment_length belongs to"),
    (dict(positions="alibi", merged=True), "it has no alibi positions"),
    (dict(rotary_span=4), "Stack.rotary_span is for rotary positions, not relative"),
    (dict(cross_rotary=True), "Stack.cross_rotary is for rotary positions"),
    (dict(qk_norm=True, qkv_norm=True), "Stack.qk_norm and Stack.qkv_norm normalize the same"),
    (dict(positions="none", bias_vectors=True), "Stack.bias_vectors are those of relative"),
    (dict(bias_vectors=True, kv_heads=2), "Stack.bias_vectors has as many key heads"),
    (dict(positions="alibi", random_positions=9), "Stack.random_positions is for positions that"),
    (
        dict(positions="learned", max_length=4, interpolation=2.0, random_positions=8),
        "Stack.random_positions must be at most 7",
    ),
    (
        dict(positions="rotary", rotary_scaling=DYNAMIC, rotary_span=9),
        "dynamic RotaryScaling needs Stack.head_dim above 2 and no Stack.rotary_span",
    ),
]


@pytest.mark.parametrize("fields, message", FIELDS)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        toy_stack(**fields)
