# SPDX-License-Identifier: Apache-2.0
"""The systems of attention.py, each framework in a process that answers requests in JSON."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

OURS, PLAIN, COPY = "t5x_lite", "t5x_lite, plain XLA", "copy"
# Our kernels for a GPU where those for Mosaic GPU are taken in their place.
TRITON = "t5x_lite, Triton"
DOT = {"jax.nn, XLA": "xla", "jax.nn, cuDNN": "cudnn"}
SDPA, FLEX = "PyTorch SDPA", "PyTorch FlexAttention"
BUCKETS, FARTHEST = 32, 128


@dataclass(frozen=True)
class Case:
    """Rows of so many tokens, packed with so many texts of one length; or, where width is not 0, so
    many new tokens in each row over so many layers' caches of that length."""

    length: int
    rows: int
    heads: int
    head_dim: int
    biased: bool
    causal: bool = False
    backward: bool = False
    width: int = 0
    layers: int = 1
    texts: int = 1

    @property
    def name(self) -> str:
        size = f"{self.rows} x {self.length}, head {self.head_dim}"
        if self.width:
            return f"cache {size}, {self.width} new"
        bias = "T5 bias" if self.biased else "no bias"
        sides = "causal" if self.causal else "bidirectional"
        sides += f", {self.texts} texts" if self.texts > 1 else ""
        return f"{size}, {bias}, {sides}, {'forward + backward' if self.backward else 'forward'}"

    @property
    def segments(self) -> np.ndarray:
        """Number of each token's text, from 1."""
        return (1 + np.arange(self.length) * self.texts // self.length).astype(np.int32)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values in all layers, bfloat16."""
        return 4 * self.layers * self.rows * self.heads * self.length * self.head_dim


class Ready(NamedTuple):
    """A system with its operands: call starts the work, wait ends with it, values are float32
    arrays to compare of what call gave, moved the bytes whose speed counts."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    values: Callable[[Any], list[np.ndarray]]
    moved: int = 0


@functools.lru_cache(1)
def numbers(shape: tuple[int, ...], head_dim: int) -> tuple[np.ndarray, ...]:
    """Queries (scaled), keys, values and the context's gradient, the same for every system."""
    draw = np.random.default_rng(0)
    q, k, v, gradient = draw.standard_normal((4, *shape), np.float32)
    return q * np.float32(head_dim**-0.5), k, v, gradient


def table_of(case: Case) -> np.ndarray:
    draw = np.random.default_rng(1)
    return draw.standard_normal((BUCKETS, case.heads), np.float32)


def operands(case: Case) -> tuple[np.ndarray, ...]:
    """`numbers` as [b t n h]."""
    return numbers((case.rows, case.length, case.heads, case.head_dim), case.head_dim)


def some(x: np.ndarray, case: Case) -> np.ndarray:
    """A few hundred numbers of the first row of x [b t ...], from all heads and along t."""
    flat = np.asarray(x[0], np.float32).reshape(case.width or case.length, -1)
    return flat[:: max(1, len(flat) // 16), :: max(1, flat.shape[1] // 32)].ravel()


def jax_systems(platform: str) -> list[str]:
    on_gpu = [TRITON, *DOT] if platform == "gpu" else ["jax.nn, XLA"]
    return [OURS, PLAIN, *on_gpu]


def jax_ready(system: str, case: Case) -> Ready:
    if case.width:
        return jax_copy(case) if system == COPY else jax_decoding(system, case)
    return jax_dot(system, case) if system in DOT else jax_ours(system, case)


def jax_passes(case: Case, attention, given: tuple, read, gradient) -> Ready:
    """attention(*given, read), of which given have gradients; both are pytrees."""
    import jax

    def both(given, read, gradient):
        context, pull = jax.vjp(lambda *given: attention(*given, read), *given)
        return context, *pull(gradient)

    def forward(given, read, gradient):
        return (attention(*given, read),)

    run = jax.jit(both if case.backward else forward)
    values = lambda outputs: [some(x, case) for x in outputs[:2]]
    return Ready(lambda: run(given, read, gradient), jax.block_until_ready, values)


def jax_attend(q, k, v, mask, bias, backend):
    """Our attention to one source; backend None is plain XLA."""
    from t5x_lite.kernels import api as kernels
    from t5x_lite.kernels import reference

    if backend is not None:
        source = kernels.AttentionSource(k, v, mask, bias)
        return kernels.dot_product_attention(q, (source,), None, backend)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], *q.shape[2:4], *bias.shape[2:])
    return reference.reference_attention(q, k, v, mask.visible, bias)


def jax_ours(system: str, case: Case) -> Ready:
    import jax
    import jax.numpy as jnp

    from t5x_lite.kernels import api as kernels

    backend = None if system == PLAIN else kernels.select_backend("pallas")
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in operands(case)]
    apart = lambda x: x.reshape(*x.shape[:2], case.heads, 1, case.head_dim)
    q, gradient = apart(arrays[0]), apart(arrays[3])
    k, v = (jnp.swapaxes(x, 1, 2) for x in arrays[1:3])
    segments = jnp.tile(jnp.asarray(case.segments), (case.rows, 1))
    mask = kernels.Mask(segments, segments, case.causal)
    mask = jax.jit(lambda mask: kernels.prepare_mask(mask, backend))(mask)
    arguments = q, k, v
    if case.biased:
        table = jnp.asarray(table_of(case))
        bias = kernels.RelativePositionBias(table, FARTHEST, not case.causal)
        arguments += (jax.jit(kernels.prepare_bias)(bias, mask),)

    def attention(q, k, v, *rest):
        *bias, mask = rest
        bias = bias[0] if bias else None
        if system == TRITON:
            from t5x_lite.kernels.flash_triton.api import flash_attention

            source = kernels.AttentionSource(k, v, mask, bias)
            return flash_attention(q, (source,), None, backend)[0]
        return jax_attend(q, k, v, mask, bias, backend)

    return jax_passes(case, attention, arguments, mask, gradient)


def jax_dot(system: str, case: Case) -> Ready:
    import jax
    import jax.numpy as jnp

    from t5x_lite.kernels import dense_mask
    from t5x_lite.kernels.api import RelativePositionBias

    *arguments, gradient = (jnp.asarray(x, jnp.bfloat16) for x in operands(case))
    if case.biased:
        bias = RelativePositionBias(jnp.asarray(table_of(case)), FARTHEST, not case.causal)

        @jax.jit
        def materialize(bias):
            length = case.length
            values = bias.by_distance(1 - length, 2 * length)
            matrix = dense_mask.toeplitz_matrix(values, length, length)
            return matrix[None].astype(jnp.bfloat16)

        arguments.append(materialize(bias))

    def attention(q, k, v, *rest):
        *bias, mask = rest
        options = dict(scale=1.0, is_causal=case.causal, implementation=DOT[system])
        return jax.nn.dot_product_attention(q, k, v, *bias, mask=mask, **options)

    segments = jnp.asarray(case.segments)
    mask = (segments[:, None] == segments)[None, None] if case.texts > 1 else None
    return jax_passes(case, attention, tuple(arguments), mask, gradient)


@functools.lru_cache(1)
def caches(case: Case) -> list[tuple[Any, Any]]:
    """Keys and values of every layer."""
    import jax
    import jax.numpy as jnp

    shape = (case.rows, case.heads, case.length, case.head_dim)
    draw = jax.jit(lambda key: jax.random.normal(key, (2, *shape), jnp.bfloat16))
    return [tuple(draw(key)) for key in jax.random.split(jax.random.key(0), case.layers)]


def jax_decoding(system: str, case: Case) -> Ready:
    import jax
    import jax.numpy as jnp

    from t5x_lite.kernels import api as kernels

    backend = kernels.select_backend("pallas") if system == OURS else None
    shape = (case.rows, case.width, case.heads, 1, case.head_dim)
    q = jnp.asarray(numbers(shape, case.head_dim)[0], jnp.bfloat16)
    index = jnp.full((case.rows,), case.length - case.width, jnp.int32)
    mask = kernels.CacheMask(index, width=case.width, slots=case.length)
    bias = kernels.RelativePositionBias(jnp.asarray(table_of(case)), FARTHEST, False)

    def layers(q, caches, mask, bias):
        mask = kernels.prepare_mask(mask, backend)
        if backend is None:  # `kernels.prepare_bias` needs a mesh for biases of positions
            bias = jnp.moveaxis(bias.table[bias.bucket(-mask.distance)], -1, 1)
        for keys, values in caches:
            # Each layer waits for the one before it, as in a model.
            q = q + jax_attend(q, keys, values, mask, bias, backend)
        return (q,)

    run, layer_caches = jax.jit(layers), caches(case)
    call = lambda: run(q, layer_caches, mask, bias)
    values = lambda outputs: [some(outputs[0], case)]
    return Ready(call, jax.block_until_ready, values, case.cache_bytes)


def jax_copy(case: Case) -> Ready:
    """Reads 1 GiB and writes as much, or the caches' size where that is less."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(min(2**30, case.cache_bytes) // 4, jnp.uint32)
    run = jax.jit(jnp.invert)
    return Ready(lambda: run(x), jax.block_until_ready, lambda outputs: [], 2 * x.nbytes)


def jax_opened() -> dict:
    import jax

    kind, platform = jax.devices()[0].device_kind, jax.default_backend()
    return {"device": kind, "platform": platform, "systems": jax_systems(platform)}


def frameworks(name: str) -> tuple[Callable, Callable, Callable]:
    """Functions of a framework: opens it, prepares a system, drops what is kept."""
    if name == "JAX":
        return jax_opened, jax_ready, caches.cache_clear
    import attention_torch

    return attention_torch.opened, attention_torch.prepare_system, attention_torch.empty_cache


FRAMEWORKS = ("JAX", "PyTorch")


class Desk:
    """Commands of a worker: prepare a system, time it, and forget all systems."""

    def __init__(self, framework: str):
        _, self.make, self.emptied = frameworks(framework)
        self.ready: dict[str, tuple[Ready, int]] = {}

    def prepare(self, system: str, case: dict, least: float) -> dict:
        one = self.make(system, Case(**case))
        values = [part.tolist() for part in one.values(one.wait(one.call()))]
        one.wait(one.call())
        # As many calls as last `least` seconds, so that starting them is not what is timed.
        calls = max(1, min(200, int(least / self.seconds(one, 1))))
        self.ready[system] = one, calls
        return {"values": values, "moved": one.moved}

    def turn(self, system: str) -> dict:
        return {"seconds": self.seconds(*self.ready[system])}

    def forget(self) -> dict:
        self.ready.clear()
        self.emptied()
        return {}

    def seconds(self, one: Ready, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            outputs = one.call()
        one.wait(outputs)
        return (time.perf_counter() - begin) / calls


def describe_error(error: Exception) -> str:
    """Why a system gave nothing, in a line."""
    text = f"{type(error).__name__}: {error}"
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return text.splitlines()[0][:70]


def serve(framework: str) -> None:
    """Answers every line of stdin, a question in JSON, with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get among the answers
    reply = lambda answer: print(json.dumps(answer), file=answers)
    try:
        reply(frameworks(framework)[0]())
    except ImportError as error:
        return reply({"missing": str(error)})
    desk = Desk(framework)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(getattr(desk, request.pop("ask"))(**request))
        except Exception as error:  # whatever a system refuses is a row of the table
            reply({"note": describe_error(error)})


if __name__ == "__main__":
    serve(sys.argv[1])
