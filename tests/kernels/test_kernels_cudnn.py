# SPDX-License-Identifier: Apache-2.0
"""Attention that "auto" chooses on a GPU, seen in programs for one that is not there."""

import functools
import re

import chips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_toys import Kind, case, context_and_gradients, difference

from t5x_lite import compat
from t5x_lite.kernels import cudnn, dispatch
from t5x_lite.kernels.backend import CUDNN
from t5x_lite.kernels.decode.mask import CacheMask

PLAIN = Kind(lengths=(64, 64), heads=(2, 2, 32), biased=False)


def attend(q, sources, softcap, backend=CUDNN):
    """Attention as a layer asks for it, with masks and biases prepared for a backend.

    Args:
      q: queries.
      sources: with a mask and a bias each.
      softcap: cap of the scores, or None.
      backend: what computes it.
    """
    prepared = []
    for source in sources:
        mask = dispatch.prepare_mask(source.mask, backend)
        bias = None if source.bias is None else dispatch.prepare_bias(source.bias, mask)
        prepared.append(source._replace(mask=mask, bias=bias))
    return dispatch.dot_product_attention(q, tuple(prepared), softcap, backend)


def custom_calls(function, *arguments, kind: str = "NVIDIA H100 80GB HBM3") -> list[str]:
    """Names of cuDNN's calls in the program that a jitted function is lowered to for CUDA.

    Args:
      function: jitted.
      *arguments: of the function.
      kind: jax's name of the GPU.
    """
    with chips.described_gpu(kind), compat.assume_cudnn(91300):
        jax.clear_caches()
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    return re.findall(r"__cudnn\$\w+", lowered.as_text())


@pytest.mark.parametrize(
    "kind, dtype, chosen",
    [
        (PLAIN, "bfloat16", True),
        (PLAIN._replace(causal=True, window=True), "bfloat16", True),
        (PLAIN._replace(lengths=(32, 64)), "float16", True),
        (PLAIN._replace(causal=True, second=40), "bfloat16", True),
        (PLAIN._replace(biased=True), "bfloat16", False),
        (PLAIN._replace(softcap=3.0), "bfloat16", False),
        (PLAIN, "float32", False),
        (PLAIN._replace(lengths=(63, 64)), "bfloat16", False),
        (PLAIN._replace(heads=(2, 2, 20)), "bfloat16", False),
    ],
    ids=["rows", "window", "float16", "two", "bias", "softcap", "float32", "odd", "head of 20"],
)
def test_rows_without_a_bias_are_cudnns(kind, dtype, chosen):
    q, sources, gradient = case(kind, 0, jnp.dtype(dtype))
    calls = custom_calls(context_and_gradients, attend, q, sources, gradient, kind.softcap)
    assert len(calls) == (2 if chosen else 0), calls
    assert [call for call in calls if "Backward" in call] == calls[1:]


@pytest.mark.parametrize("kind, size", [("NVIDIA A100-SXM4-80GB", 128), ("NVIDIA H200", 256)])
def test_the_largest_head_is_the_chips(kind, size):
    q = jnp.zeros((1, 16, 1, 1, size), jnp.bfloat16)
    keys = jnp.zeros((1, 1, 16, size), jnp.bfloat16)
    with chips.described_gpu(kind):
        assert cudnn.use_cudnn(q, keys, biased=False, softcap=None)
        wider = jnp.concatenate([q, q[..., :8]], axis=-1)
        assert not cudnn.use_cudnn(wider, keys, biased=False, softcap=None)


def test_new_tokens_over_a_cache_are_plain_xla():
    q, (source,), _ = case(PLAIN._replace(lengths=(4, 64)), 0, jnp.bfloat16)
    block = CacheMask(jnp.int32([30, 9]), width=4, slots=64)
    attention = jax.jit(lambda q, source: attend(q, (source,), None))
    assert custom_calls(attention, q, source._replace(mask=block)) == []


def test_the_environment_and_the_config_still_ask_for_plain_xla(monkeypatch):
    with chips.described_gpu():
        assert dispatch.select_backend("reference") is None
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "reference")
        assert dispatch.select_backend("auto") is None


def test_keys_do_not_rotate_on_a_gpu():
    with chips.described_gpu(), pytest.raises(ValueError, match='"ring" is for TPUs'):
        dispatch.select_backend("ring")


@pytest.mark.parametrize(
    "kind",
    [PLAIN._replace(causal=True), PLAIN._replace(causal=True, window=True, second=40)],
    ids=["causal", "all"],
)
def test_cudnn_is_asked_for_the_attention_of_plain_xla(kind, monkeypatch):
    """The same call, computed by XLA: masks, scale, order of heads and queries without a key."""
    q, sources, gradient = case(kind, 1)
    wanted = context_and_gradients(
        functools.partial(attend, backend=None), q, sources, gradient, None
    )

    def by_xla(*operands, implementation, **options):
        assert implementation == "cudnn"
        assert options["is_causal"] == (not kind.second)
        return dot_product_attention(*operands, **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(cudnn, "use_cudnn", lambda *_: True)
    actual = context_and_gradients(attend, q, sources, gradient, None)
    assert difference(actual, jax.tree.map(np.asarray, wanted)) < 2e-6


def test_rematerialization_keeps_what_its_backward_pass_needs():
    q, (source,), _ = case(PLAIN, 0, jnp.bfloat16)

    def loss(policy, q):
        attention = jax.checkpoint(lambda q: attend(q, (source,), None), policy=policy)
        return jnp.sum(attention(q).astype(jnp.float32))

    for policy, count in ((cudnn.save_attention, 2), (None, 3)):
        gradient = jax.jit(jax.value_and_grad(functools.partial(loss, policy)))
        assert len(custom_calls(gradient, q)) == count
