# SPDX-License-Identifier: Apache-2.0
"""Laws of decoders that fill masked blocks: their masks, and packed, doubled and cached rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_model

from t5x_lite import config, model, sharding
from t5x_lite.batch import Batch, MaskedBlocks
from t5x_lite.kernels import api as kernels
from t5x_lite.model import contexts
from t5x_lite.training import flops

BLOCK, MASK = 3, 0
PROMPTS = {"encoder_decoder": (0, 0), "decoder_only": (2, 4)}
LENGTHS = 7, 4


@pytest.fixture(autouse=True)
def one_device():
    """Sets a mesh of one device."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])


@functools.cache
def canvas_model(layout, block=BLOCK, positions="relative", drawn=()):
    """A toy model with a canvas, and its weights.

    Args:
      layout: "encoder_decoder" or "decoder_only".
      block: tokens of a block.
      positions: of its stacks.
      drawn: Canvas.drawn_blocks.
    """
    canvas = config.Canvas(block, drawn_blocks=drawn)
    cfg = toy_model(layout, layers=2, positions=positions, canvas=canvas)
    draw = np.random.default_rng(0)

    def make(shape):
        return (0.3 * draw.normal(size=shape.shape)).astype(np.float32)

    return cfg, jax.tree.map(make, model.shapes(cfg))


def texts_of(layout, block=BLOCK):
    """Two texts: ids, masked ids, blocks and prompt length of each, and inputs of an encoder."""
    draw = np.random.default_rng(1)
    texts = []
    for prompt, length in zip(PROMPTS[layout], LENGTHS, strict=True):
        ids = draw.integers(2, 64, prompt + length)
        place = np.arange(prompt + length) - prompt
        masked = np.where((place >= 0) & (draw.random(len(ids)) < 0.5), MASK, ids)
        blocks = np.where(place >= 0, place // block, place)
        texts.append((ids, masked, blocks, prompt, draw.integers(2, 64, 5)))
    return texts


def rows_of(layout, texts, length=20):
    """A batch of one row that holds the texts one after the other.

    Args:
      layout: "encoder_decoder" or "decoder_only".
      texts: what `texts_of` returns.
      length: tokens of the row.
    """

    def lay(parts, size=length):
        row = np.concatenate(parts)
        return np.pad(row, (0, size - len(row)))[None].astype(np.int32)

    ids, masked, blocks, prompts, inputs = zip(*texts, strict=True)
    segments = lay([np.full(len(each), i + 1) for i, each in enumerate(ids)])
    where = lay([np.arange(len(each)) for each in ids])
    prefix = lay([np.arange(len(a)) < n for a, n in zip(ids, prompts, strict=True)])
    batch = Batch(
        targets=lay(ids),
        target_segments=segments,
        target_positions=where,
        loss_weights=(segments > 0).astype(np.float32),
        prefix=prefix > 0,
        canvas=MaskedBlocks(lay(masked), lay(blocks), (segments > 0).astype(np.float32)),
    )
    if layout == "decoder_only":
        return batch
    return batch._replace(
        prefix=None,
        inputs=lay(inputs, 12),
        input_segments=lay([np.full(len(each), i + 1) for i, each in enumerate(inputs)], 12),
        input_positions=lay([np.arange(len(each)) for each in inputs], 12),
    )


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(cfg, params, batch):
    """Hidden states of every target.

    Args:
      cfg: architecture.
      params: weights.
      batch: rows.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    return model.Transformer(cfg).apply({"params": params}, batch, method="hidden")


def test_the_mask_is_the_one_that_a_loop_over_pairs_writes():
    draw = np.random.default_rng(0)
    segments = np.sort(draw.integers(0, 3, (4, 6)), axis=1)[:, ::-1].copy()
    blocks = draw.integers(-2, 3, (4, 6))
    for doubled in (False, True):
        mask = kernels.BlockDiffusionMask(jnp.asarray(segments), jnp.asarray(blocks), doubled)
        dense, size = np.asarray(mask.materialize()), 12 if doubled else 6
        for row, query, key in np.ndindex(4, size, size):
            i, j = query % 6, key % 6
            later = blocks[row, i] - blocks[row, j]
            if not doubled or (query >= 6 and key >= 6):
                wanted = later >= 0
            elif query < 6:
                wanted = later == 0 if key < 6 else later > 0
            else:
                wanted = False
            wanted = wanted and segments[row, i] == segments[row, j] > 0
            assert dense[row, query, key] == wanted
        places = np.arange(size) % 6
        np.testing.assert_array_equal(mask.distance(), places[:, None] - places[None])


# A bias by distance and a rotation reach other code; the rest are their products.
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, positions",
    mark_exhaustive(
        [(layout, name) for layout in PROMPTS for name in ("relative", "rotary", "alibi")],
        kept=[("encoder_decoder", "relative"), ("decoder_only", "rotary")],
    ),
)
def test_packed_rows_are_single_ones_and_those_of_the_cache(layout, positions):
    cfg, params = canvas_model(layout, positions=positions)
    texts, first = texts_of(layout), 0
    packed = hidden_of(cfg, params, rows_of(layout, texts))[0]
    decode = functools.partial(decoded, cfg, model.unstack(params))
    for text in texts:
        size = len(text[0])
        alone = hidden_of(cfg, params, rows_of(layout, [text]))[0, :size]
        np.testing.assert_allclose(packed[first : first + size], alone, atol=1e-5)
        np.testing.assert_allclose(decode(text)[text[3] :], alone[text[3] :], atol=1e-5)
        first += size


def test_a_second_copy_of_a_row_costs_the_decoder_twice():
    cfg, _ = canvas_model("encoder_decoder")
    lengths = {"inputs": 16, "targets": 12}
    whole = dataclasses.replace(cfg, canvas=config.Canvas(12))
    plain = dataclasses.replace(cfg, canvas=None)
    assert flops.step_flops(whole, 4, lengths) == flops.step_flops(plain, 4, lengths)
    decoder = [
        flops.self_attention_and_mlp_flops(cfg.decoder, length)
        + flops.cross_attention_flops(cfg.decoder, length, 16)
        for length in (12, 24)
    ]
    more = flops.step_flops(cfg, 4, lengths) - flops.step_flops(plain, 4, lengths)
    assert more == 3 * 4 * (decoder[1] - decoder[0])


@pytest.mark.slow
def test_doubled_rows_are_the_same_on_any_mesh():
    cfg, params = canvas_model("encoder_decoder")
    row = rows_of("encoder_decoder", texts_of("encoder_decoder"))
    batch = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), row)
    alone = np.asarray(hidden_of(cfg, params, row))
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    placed = sharding.place_batch(batch)
    split = jax.jit(model.Transformer(cfg).apply, static_argnames="method")(
        {"params": params}, placed, method="hidden"
    )
    for each in np.asarray(split):
        np.testing.assert_allclose(each, alone[0], atol=1e-5)


def decoded(cfg, params, text):
    """Hidden states of a text, block by block over a cache of what is before it, without masks.

    Args:
      cfg: architecture.
      params: unstacked weights.
      text: one of `texts_of`.
    """
    ids, masked, blocks, prompt, inputs = text
    apply = functools.partial(model.Transformer(cfg, scan=False).apply, {"params": params})
    memory = model.EncoderMemory()
    if cfg.encoder is not None:
        exists = jnp.ones((1, len(inputs)), jnp.int32)
        where = jnp.arange(len(inputs))[None]
        encoded = apply(jnp.asarray(inputs[None]), exists, where, method="encode")
        memory = model.EncoderMemory(apply(encoded, method="cross_kv"), exists > 0)
    # Of the slots after a block nothing is read.
    cache = jax.tree.map(lambda x: x + 7.0, model.empty_cache(cfg, 1, 24, scan=False))
    run = jax.jit(functools.partial(apply, method="decode"))
    clean = np.array([0, *ids[:-1]])
    hidden = np.zeros((len(ids), cfg.decoder.embed), np.float32)
    for number in np.unique(blocks):
        here = np.flatnonzero(blocks == number)
        noised = np.array([clean[here[0]], *masked[here[:-1]]])
        for tokens in (noised, clean[here]):
            width = len(here)
            block = model.TokenBlock(
                jnp.asarray(tokens[None]),
                jnp.asarray([here[0]]),
                jnp.arange(width),
                jnp.ones((width, width), bool),
            )
            state, after = run(block, cache, memory)
            if tokens is noised:
                hidden[here] = state[0]
        cache = after
    return hidden


@pytest.mark.slow
@pytest.mark.parametrize("layout", PROMPTS)
def test_a_block_as_long_as_the_text_needs_no_second_copy_and_one_of_a_token_is_causal(layout):
    whole, params = canvas_model(layout, block=20)
    doubled, _ = canvas_model(layout, block=20, drawn=(10, 20))
    batch = rows_of(layout, texts_of(layout, block=20))
    masks = [contexts.decoder_rows(cfg, batch).mask for cfg in (whole, doubled)]
    assert layout == "decoder_only" or [mask.doubled for mask in masks] == [False, True]
    np.testing.assert_allclose(
        hidden_of(whole, params, batch), hidden_of(doubled, params, batch), atol=1e-5
    )
    single, params = canvas_model(layout, block=1)
    batch = rows_of(layout, texts_of(layout, block=1))
    causal = dataclasses.replace(single, canvas=None)
    np.testing.assert_allclose(
        hidden_of(single, params, batch),
        hidden_of(causal, params, batch._replace(canvas=None)),
        atol=1e-6,
    )
