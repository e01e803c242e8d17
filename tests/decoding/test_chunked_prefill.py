# SPDX-License-Identifier: Apache-2.0
"""Laws of chunked prefill: the cache is that of a whole prompt, in the memory of a chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_model
from test_decoding_loop import lively, use_one_device

from t5x_lite import decoding, model, sharding
from t5x_lite.decoding import chunked_prefill, generation, target
from t5x_lite.decoding.protocol import Prompts

CHUNK, SIZE = 8, 21
MEMORY = model.EncoderMemory()
KINDS = {
    "rotary": toy_model("decoder_only", positions="rotary", kv_heads=2),
    "relative": toy_model("decoder_only", positions="relative"),
    "sliding": toy_model(
        "decoder_only", positions="rotary", window=5, pattern=("sliding", "full"), layers=2
    ),
    "encoder_decoder": toy_model("encoder_decoder", positions="relative"),
}


def toy_prompts() -> Prompts:
    """Prompts of one chunk, of whole chunks, and to the last slot."""
    tokens = np.random.default_rng(0).integers(2, 64, (3, SIZE)).astype(np.int32)
    return Prompts(*generation.shard_rows((tokens, np.array([5, 2 * CHUNK, SIZE], np.int32))))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_fill_the_cache_of_a_whole_prompt(kind):
    """Within the rounding of sums over more slots: 1e-5 of numbers of about 1, in float32."""
    use_one_device()
    cfg = KINDS[kind]
    params, prompts = decoding.prepare_params(cfg, lively(cfg)), toy_prompts()

    @jax.jit
    def fill(params, prompts):
        encoded = target.encode_inputs(cfg, params, *prompts) if cfg.encoder else MEMORY
        whole = target.prefill(cfg, params, encoded, prompts, SIZE)
        return whole, chunked_prefill.fill_cache(cfg, params, encoded, *prompts, chunk=CHUNK)

    whole, chunked = fill(params, prompts)
    for ours, theirs in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        assert ours.shape == theirs.shape
        for row, length in enumerate(prompts.length.tolist()):
            np.testing.assert_allclose(
                ours[row, :, :length], theirs[row, :, :length], rtol=0, atol=1e-5
            )


def test_a_chunk_has_the_same_bits_in_the_prefill_of_a_program_and_alone():
    """The chunks of a server are those of one program, and put back they are what they were."""
    use_one_device()
    cfg = KINDS["rotary"]
    params, prompts = decoding.prepare_params(cfg, lively(cfg)), toy_prompts()
    tokens = np.pad(np.asarray(prompts.tokens[2:]), ((0, 0), (0, 3 * CHUNK - SIZE)))
    alone = chunked_prefill.start_cache(cfg, 3 * CHUNK)
    again = chunked_prefill.start_cache(cfg, 3 * CHUNK)
    for first in range(0, 3 * CHUNK, CHUNK):
        index = np.array([first], np.int32)
        block = tokens[:, first : first + CHUNK]
        alone, chunk = chunked_prefill.read_chunk(cfg, params, alone, block, index)
        again = chunked_prefill.put_chunk(again, chunk, index)
    rows = generation.shard_rows((tokens, np.array([SIZE], np.int32)))
    fill = jax.jit(lambda *rows: chunked_prefill.fill_cache(cfg, params, MEMORY, *rows, CHUNK))
    for ours, put, theirs in zip(*map(jax.tree.leaves, (alone, again, fill(*rows))), strict=True):
        np.testing.assert_array_equal(ours, put)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(30, marks=pytest.mark.exhaustive),  # the whole model: the same arrays, reused
    ],
)
def test_a_prompt_of_8k_tokens_holds_the_scores_of_a_chunk(layers):
    """By the memory of the compiled program, at the shapes of SmolLM2-135M."""
    use_one_device()
    stack = dict(embed=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, layers=layers)
    cfg = toy_model("decoder_only", positions="rotary", vocab=49152, **stack)
    size = 8192
    prepare = functools.partial(decoding.prepare_params, cfg)
    params = jax.eval_shape(prepare, model.shapes(cfg))
    rows = jax.ShapeDtypeStruct((1, size), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def read(params, tokens, length):
        prompts = Prompts(*sharding.by_rows((tokens, length)))
        return target.prefill(cfg, params, MEMORY, prompts, size)

    memory = jax.jit(read).lower(params, *rows).compile().memory_analysis()
    scores = 4 * stack["heads"] * chunked_prefill.CHUNK * size
    caches = memory.output_size_in_bytes
    assert caches >= 2 * 4 * layers * stack["kv_heads"] * stack["head_dim"] * size
    # Scores and probabilities of one layer, its activations, and the cache that is filled.
    assert memory.temp_size_in_bytes < 3 * scores + 2 * caches
    assert 3 * scores < 4 * stack["heads"] * size**2 / 5
