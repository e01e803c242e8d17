# SPDX-License-Identifier: Apache-2.0
"""Laws of the model: masks, caches, meshes, packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, mark_exhaustive, toy_batch, toy_model, toy_stack

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch
from t5x_lite.kernels import api as kernels
from t5x_lite.model import layer_config

KINDS = [
    ("encoder_decoder", False, {"positions": "relative"}),
    ("encoder_decoder", False, {"positions": "rotary", "kv_heads": 2}),
    ("decoder_only", False, {"positions": "relative", "kv_heads": 1}),
    ("decoder_only", True, {"positions": "rotary"}),
    ("encoder_decoder", False, FAMILIES["t5gemma"]),
    ("encoder_decoder", False, FAMILIES["t5gemma2"]),
    ("encoder_decoder", False, FAMILIES["umt5"]),
    ("decoder_only", False, FAMILIES["gpt2"]),
    ("encoder_decoder", False, FAMILIES["bart"]),
    ("encoder_decoder", False, FAMILIES["m2m100"]),
    ("decoder_only", True, FAMILIES["mistral"]),
]
# Relative, rotary and learned positions, prefixes, windows, merged attention, shared key heads.
REPRESENTATIVE = [KINDS[number] for number in (0, 2, 5, 8, 10)]


@pytest.fixture
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


def logits_of(cfg, params, batch):
    """Teacher-forced logits.

    Args:
      cfg: architecture.
      params: weights.
      batch: batch in numpy.
    """
    apply = jax.jit(lambda params, batch: model.Transformer(cfg).apply({"params": params}, batch))
    return np.asarray(apply(params, sharding.place_batch(batch)))


def moved(params):
    """params away from the zeros and ones at which biases and scales begin."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), params)


def alone(batch: Batch, row: int, segment: int) -> Batch:
    """One example of a packed batch, unpacked into rows of its own (the same row eight times).

    Args:
      batch: packed batch.
      row: row of the example.
      segment: its number in the row, from 1.
    """

    def cut(values, segments):
        if values is None:
            return None
        kept = values[row][segments[row] == segment]
        return np.tile(kept, (8, 1))

    return Batch(
        *(cut(values, batch.target_segments) for values in batch[:4]),
        *(cut(values, batch.input_segments) for values in batch[4:7]),
        cut(batch.prefix, batch.target_segments),
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout, prefix_lm, stack", mark_exhaustive(KINDS, kept=REPRESENTATIVE))
def test_packed_examples_get_the_logits_they_get_alone(one_device, layout, prefix_lm, stack):
    cfg, batch = toy_model(layout, prefix_lm, **stack), toy_batch(layout)
    params = moved(model.initialize(cfg, jax.random.key(0)))
    packed = logits_of(cfg, params, batch)
    for segment in (1, 2):
        single = alone(batch, 3, segment)
        expected = logits_of(cfg, params, single)[0]
        np.testing.assert_allclose(
            packed[3][batch.target_segments[3] == segment], expected, atol=2e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("layout, prefix_lm, stack", mark_exhaustive(KINDS, kept=REPRESENTATIVE))
def test_a_target_changes_no_logits_before_it(one_device, layout, prefix_lm, stack):
    cfg, batch = toy_model(layout, prefix_lm, **stack), toy_batch(layout)
    params = moved(model.initialize(cfg, jax.random.key(0)))
    before = logits_of(cfg, params, batch)
    place = 3  # past the two tokens of the prefix, and in the first segment of every row
    changed = batch.targets.copy()
    changed[:, place] = (changed[:, place] + 1) % 64
    after = logits_of(cfg, params, batch._replace(targets=changed))
    np.testing.assert_array_equal(before[:, : place + 1], after[:, : place + 1])


def test_a_prefix_is_read_in_both_directions(one_device):
    cfg, batch = toy_model("decoder_only", prefix_lm=True), toy_batch("decoder_only")
    params = model.initialize(cfg, jax.random.key(0))
    changed = batch.targets.copy()
    changed[:, 1] = (changed[:, 1] + 1) % 64
    before, after = (
        logits_of(cfg, params, batch._replace(targets=t)) for t in (batch.targets, changed)
    )
    assert np.all(np.abs(before - after).max(axis=-1)[:, 0] > 1e-4)


# The families change nothing in how layers are run over: unrolled is what decoding does.
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, prefix_lm, stack, scan",
    mark_exhaustive(
        [(*kind, True) for kind in KINDS[:4]] + [(*kind, False) for kind in KINDS],
        kept=[(*KINDS[0], True), *((*kind, False) for kind in REPRESENTATIVE)],
    ),
)
def test_cached_blocks_equal_teacher_forcing(one_device, layout, prefix_lm, stack, scan):
    cfg = toy_model(layout, prefix_lm, **stack)
    params = moved(model.initialize(cfg, jax.random.key(0)))
    batch = unpacked(toy_batch(layout))
    whole = logits_of(cfg, params, batch)
    blocks = (5, 1, 3, 2, 1)  # the first holds the prefix
    cached = decode_in_blocks(cfg, params, sharding.place_batch(batch), blocks, scan)
    # Normalizing queries and keys can condition a token so badly that one ulp of the weights moves
    # its logits by more than 1e-5: no two orders of summation agree better than that.
    nudged = np.abs(logits_of(cfg, one_ulp_away(params), batch) - whole).max()
    np.testing.assert_allclose(cached, whole, atol=max(1e-5, nudged if cfg.decoder.qk_norm else 0))


def one_ulp_away(params):
    """params, each weight one unit in the last place larger or smaller."""
    draw = np.random.default_rng(1)

    def nudge(x):
        return np.nextafter(x, draw.choice([-np.inf, np.inf], x.shape).astype(np.float32))

    return jax.tree.map(nudge, params)


def unpacked(batch: Batch) -> Batch:
    """Each row as one example; the encoder's padding stays."""
    rows, length = batch.targets.shape
    where = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    prefix = None if batch.prefix is None else where < 2
    batch = batch._replace(
        target_segments=np.ones_like(where), target_positions=where, prefix=prefix
    )
    if batch.inputs is None:
        return batch
    segments = (batch.input_segments > 0).astype(np.int32)
    return batch._replace(input_segments=segments, input_positions=where)


def decode_in_blocks(cfg, params, batch, blocks, scan):
    """Logits of the targets, decoded over a cache in blocks of several widths.

    Args:
      cfg: architecture.
      params: stacked weights.
      batch: batch on the mesh.
      blocks: widths of the blocks.
      scan: decodes with stacked weights; False with unstacked ones.
    """
    transformer = model.Transformer(cfg, scan=scan)
    params = params if scan else model.unstack(params)
    rows = batch.targets.shape[0]

    @jax.jit
    def run(params, batch):
        def call(*args, **more):
            return transformer.apply({"params": params}, *args, **more)

        encoder_memory, prefix = model.EncoderMemory(), None
        if cfg.layout == "encoder_decoder":
            read = batch.inputs, batch.input_segments, batch.input_positions
            encoder_memory = model.EncoderMemory(
                call(
                    call(*read, method=model.Transformer.encode), method=model.Transformer.cross_kv
                ),
                read[1] > 0,
            )
        else:
            prefix = batch.prefix.sum(axis=1) + 1
        tokens = jnp.pad(
            batch.targets[:, :-1], ((0, 0), (1, 0)), constant_values=cfg.decoder_start_token_id
        )
        cache, logits, start = model.empty_cache(cfg, rows, 16, scan), [], 0
        for width in blocks:
            block = tokens[:, start : start + width], jnp.full(rows, start)
            block = model.TokenBlock(*block, prefix=prefix)
            hidden, cache = call(block, cache, encoder_memory, method=model.Transformer.decode)
            logits.append(call(hidden, method=model.Transformer.logits))
            start += width
        return jnp.concatenate(logits, axis=1)

    return run(params, batch)


def test_a_tree_of_drafts_equals_its_paths(one_device):
    cfg = toy_model("decoder_only", positions="relative")
    params = model.initialize(cfg, jax.random.key(0))
    transformer = model.Transformer(cfg)
    start = np.tile(np.array([[5, 9, 11]], np.int32), (8, 1))
    tree = np.tile(np.array([[7, 20, 21, 30]], np.int32), (8, 1))  # 7 -> 20 -> 30 and 7 -> 21
    depth = jnp.array([0, 1, 1, 2])
    ancestors = jnp.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool)

    @jax.jit
    def hidden_of(params, tokens, depth, ancestors):
        cache = model.empty_cache(cfg, 8, 16)

        def decode(*args):
            return transformer.apply({"params": params}, *args, method=model.Transformer.decode)

        _, cache = decode(model.TokenBlock(start, jnp.zeros(8, jnp.int32)), cache)
        return decode(model.TokenBlock(tokens, jnp.full(8, 3), depth, ancestors), cache)[0]

    by_tree = hidden_of(params, tree, depth, ancestors)
    for path in ([0, 1, 3], [0, 2]):
        chain = hidden_of(params, tree[:, path], None, None)
        np.testing.assert_allclose(by_tree[:, np.array(path)], chain, atol=1e-5)


SHAPES = [config.Mesh(8, 1, 1), config.Mesh(2, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, changes, meshes",
    [
        ("encoder_decoder", {"kv_heads": 2}, [*SHAPES, config.Mesh(1, 4, 2)]),
        ("encoder_only", {"kv_heads": 2}, SHAPES),
        ("encoder_decoder", FAMILIES["t5gemma2"], SHAPES),
        ("decoder_only", FAMILIES["gpt2"], SHAPES),
        # What these split is split above: key heads, norms, biases, tables.
        *mark_exhaustive(
            [
                ("decoder_only", {"kv_heads": 2}, SHAPES),
                ("encoder_decoder", FAMILIES["t5gemma"], SHAPES),
                ("encoder_decoder", FAMILIES["bart"], SHAPES),
                ("encoder_decoder", {"positions": "alibi"}, SHAPES),
                ("encoder_decoder", {"bias_vectors": True}, SHAPES),
            ],
            kept=(),
        ),
    ],
)
def test_the_mesh_changes_neither_weights_nor_loss_nor_gradients(layout, changes, meshes):
    cfg, batch, results = toy_model(layout, **changes), toy_batch(layout), []
    for mesh in meshes:
        sharding.use_mesh(mesh)
        params = model.initialize(cfg, jax.random.key(7))

        def loss(params, batch):
            logits = model.Transformer(cfg).apply({"params": params}, batch)
            shifted = jax.nn.log_softmax(jax.reshard(logits, sharding.spec("batch length whole")))
            return -jnp.mean(shifted[..., 1])

        value, gradients = jax.jit(jax.value_and_grad(loss))(params, sharding.place_batch(batch))
        results.append(jax.tree.map(np.asarray, (params, value, gradients)))
    for params, value, gradients in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, params, results[0][0])
        np.testing.assert_allclose(value, results[0][1], rtol=1e-5)

        def close(a, b):
            return np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

        jax.tree.map(close, without_key_bias(gradients), without_key_bias(results[0][2]))


def without_key_bias(gradients):
    """gradients without those that are nothing but rounding: a bias shared by all keys moves every
    score of a query alike, which no softmax sees.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))

    def kept(path, leaf):
        if path[-1].key != "key_bias":
            return leaf
        assert np.abs(leaf).max() < 1e-6 * largest
        return np.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(kept, gradients)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 1}, "Mesh.tensor=2 cannot split Model.encoder.kv_heads=1"),
        ({"embed": 18}, "Mesh.fsdp=4 cannot split Model.encoder.embed=18"),
        ({"vocab": 63}, "Mesh.tensor=2 cannot split Model.vocab=63"),
    ],
)
def test_a_mesh_that_cannot_split_a_weight_is_refused_by_name(changes, message):
    sharding.use_mesh(config.Mesh(1, 4, 2))
    with pytest.raises(ValueError, match=message):
        model.shapes(toy_model("encoder_decoder", **changes))


def test_attention_to_nothing_gives_zero_and_no_nan(one_device):
    cfg, batch = toy_model("encoder_decoder"), toy_batch("encoder_decoder")
    params = model.initialize(cfg, jax.random.key(0))
    nothing = batch._replace(input_segments=np.zeros_like(batch.input_segments))
    assert np.isfinite(logits_of(cfg, params, nothing)).all()


@pytest.mark.slow
def test_remat_and_dropout_keep_their_promises(one_device):
    cfg = dataclasses.replace(toy_model("encoder_decoder"), dropout=0.3)
    params = model.initialize(cfg, jax.random.key(0))
    batch = sharding.place_batch(toy_batch("encoder_decoder"))

    def gradient(remat, key):
        apply = model.Transformer(cfg, remat=remat).apply

        def loss(params):
            return jnp.mean(jnp.square(apply({"params": params}, batch, key)))

        return jax.jit(jax.grad(loss))(params)

    key = jax.random.key(1)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    jax.tree.map(close, gradient("layers", key), gradient("none", key))
    jax.tree.map(close, gradient("minimal", key), gradient("none", key))
    with_key, without = gradient("none", key), gradient("none", None)
    assert not np.allclose(with_key["head"], without["head"])


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize("form", ["below", "within", "halved"])
def test_a_window_shows_what_its_form_says(one_device, form, both_sides):
    stack = toy_stack(layers=1, pattern=("sliding",), window=5, window_form=form)
    row = np.ones((1, 12), np.int32)
    mask = kernels.prepare_mask(kernels.Mask(row, row, causal=not both_sides), None)
    windows = layer_config.layer_configs(stack, both_sides).window_size
    shown = np.asarray(mask.with_window(windows[0]).visible)[0]
    for query in range(12):
        for key in range(12):
            distance = query - key
            expected = {
                "below": abs(distance) < 5,
                "within": abs(distance) <= 5,
                "halved": distance in (-2, -1, 0, 1, 2),
            }[form]
            if not both_sides:
                expected = 0 <= distance < 5
            assert shown[query, key] == expected, (query, key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "first", "last"])
@pytest.mark.parametrize(
    "layout", mark_exhaustive(["encoder_only", "decoder_only"], kept=["encoder_only"])
)
def test_padding_on_either_side_does_not_change_a_pooled_vector(one_device, layout, kind):
    readout = config.Readout("vector", kind, project=5, normalize=True)
    cfg = dataclasses.replace(toy_model(layout, positions="rotary"), readout=readout)
    params = model.initialize(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(2, 64, (1, 6)).astype(np.int32)
    place = np.arange(6, dtype=np.int32)[None]

    def pooled(before, after):
        def padded(x):
            return np.pad(x, ((0, 0), (before, after)))

        arrays = padded(tokens), padded(np.ones_like(place)), padded(place)
        return model.Transformer(cfg).apply(
            {"params": params}, *arrays, method=model.Transformer.pooled
        )

    alone = pooled(0, 0)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=-1), 1, rtol=1e-5)
    for before, after in ((3, 0), (0, 4), (2, 1)):
        np.testing.assert_allclose(pooled(before, after), alone, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_may_be_wider_than_its_decoder(one_device):
    cfg = toy_model("encoder_decoder", **FAMILIES["t5gemma"])
    wide = dataclasses.replace(cfg.encoder, embed=24, layers=3, heads=3, kv_heads=3)
    cfg = dataclasses.replace(cfg, encoder=wide)
    params = moved(model.initialize(cfg, jax.random.key(0)))
    assert params["encoder_embedding"].shape == (64, 24)
    assert params["decoder"]["layers"]["cross_attention"]["key"].shape == (2, 24, 2, 8)
    batch = unpacked(toy_batch("encoder_decoder"))
    cached = decode_in_blocks(cfg, params, sharding.place_batch(batch), (12,), True)
    np.testing.assert_allclose(cached, logits_of(cfg, params, batch), atol=1e-5)
