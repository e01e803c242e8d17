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
DOT = {"jax.nn, XLA": "xla", "jax.nn, cuDNN": "cudnn"}
SDPA, FLEX = "PyTorch SDPA", "PyTorch FlexAttention"
BUCKETS, FARTHEST = 32, 128


@dataclass(frozen=True)
class Case:
    """Rows of so many tokens; or, where width is not 0, so many new tokens in each row over so many
    layers' caches of that length."""

    length: int
    rows: int
    heads: int
    head_dim: int
    biased: bool
    causal: bool = False
    backward: bool = False
    width: int = 0
    layers: int = 1

    @property
    def name(self) -> str:
        size = f"{self.rows} x {self.length}, head {self.head_dim}"
        if self.width:
            return f"cache {size}, {self.width} new"
        bias = "T5 bias" if self.biased else "no bias"
        sides = "causal" if self.causal else "bidirectional"
        return f"{size}, {bias}, {sides}, {'forward + backward' if self.backward else 'forward'}"

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
    return [OURS, PLAIN, *(name for name in DOT if name != "jax.nn, cuDNN" or platform == "gpu")]


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

    backend = kernels.select_backend("pallas") if system == OURS else None
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in operands(case)]
    apart = lambda x: x.reshape(*x.shape[:2], case.heads, 1, case.head_dim)
    q, gradient = apart(arrays[0]), apart(arrays[3])
    k, v = (jnp.swapaxes(x, 1, 2) for x in arrays[1:3])
    ones = jnp.ones((case.rows, case.length), jnp.int32)
    mask = kernels.Mask(ones, ones, case.causal)
    mask = jax.jit(lambda mask: kernels.prepare_mask(mask, backend))(mask)
    arguments = q, k, v
    if case.biased:
        table = jnp.asarray(table_of(case))
        bias = kernels.RelativePositionBias(table, FARTHEST, not case.causal)
        arguments += (jax.jit(kernels.prepare_bias)(bias, mask),)

    def attention(q, k, v, *rest):
        *bias, mask = rest
        return jax_attend(q, k, v, mask, bias[0] if bias else None, backend)

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
        *bias, _ = rest
        return jax.nn.dot_product_attention(
            q, k, v, *bias, scale=1.0, is_causal=case.causal, implementation=DOT[system]
        )

    return jax_passes(case, attention, tuple(arguments), None, gradient)


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


def torch_ready(system: str, case: Case) -> Ready:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = lambda x: torch.from_numpy(x).to(device, torch.bfloat16)
    *given, gradient = (place(x).transpose(1, 2).contiguous() for x in operands(case))
    attention, bias = (torch_flex if system == FLEX else torch_sdpa)(case, device)
    given = [x.requires_grad_(case.backward) for x in (*given, *bias)]

    def call():
        context = attention(*given)
        return (
            (context, *torch.autograd.grad(context, given, gradient))
            if case.backward
            else (context,)
        )

    def wait(outputs):
        if device == "cuda":
            torch.cuda.synchronize()
        return outputs

    own = lambda x: x.detach().transpose(1, 2).float().cpu().numpy()
    return Ready(call, wait, lambda outputs: [some(own(x), case) for x in outputs[:2]])


def by_distance(case: Case) -> np.ndarray:
    """The bias [n 2t-1] of key index minus query index, from 1 - t on."""
    import jax.numpy as jnp

    from t5x_lite.kernels.api import RelativePositionBias

    relative = RelativePositionBias(jnp.asarray(table_of(case)), FARTHEST, not case.causal)
    return np.array(relative.by_distance(1 - case.length, 2 * case.length - 1))


def torch_sdpa(case: Case, device: str):
    """PyTorch picks among flash, cuDNN, memory-efficient and plain attention by itself."""
    import torch

    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=1.0)
    if not case.biased:
        return functools.partial(attend, is_causal=case.causal), []
    vector = torch.from_numpy(by_distance(case)).to(device, torch.bfloat16)
    bias = vector.unfold(1, case.length, 1).flip(1)[None].contiguous()
    if case.causal:
        hidden = torch.ones(bias.shape[2:], dtype=torch.bool, device=device).triu(1)
        bias.masked_fill_(hidden, -torch.inf)
    return lambda q, k, v, bias: attend(q, k, v, attn_mask=bias), [bias]


def torch_flex(case: Case, device: str):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Without this the ninth case would run uncompiled.
    torch._dynamo.reset()
    compiled, seen, first = torch.compile(flex_attention), None, case.length - 1
    if case.causal:
        past = lambda b, h, query, key: query >= key
        seen = create_block_mask(past, None, None, case.length, case.length, device=device)
    if not case.biased:
        return lambda q, k, v: compiled(q, k, v, block_mask=seen, scale=1.0), []

    def attention(q, k, v, vector):
        biased = lambda score, b, h, query, key: score + vector[h, key - query + first]
        return compiled(q, k, v, score_mod=biased, block_mask=seen, scale=1.0)

    return attention, [torch.from_numpy(by_distance(case)).to(device)]


def jax_opened() -> dict:
    import jax

    kind, platform = jax.devices()[0].device_kind, jax.default_backend()
    return {"device": kind, "platform": platform, "systems": jax_systems(platform)}


def torch_opened() -> dict:
    import torch

    if torch.cuda.is_available():
        kind = torch.cuda.get_device_name(0)
        return {"device": kind, "platform": "gpu", "systems": [SDPA, FLEX]}
    return {"device": "cpu", "platform": "cpu", "systems": [SDPA]}


def torch_emptied() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


FRAMEWORKS = {
    "JAX": (jax_opened, jax_ready, caches.cache_clear),
    "PyTorch": (torch_opened, torch_ready, torch_emptied),
}


class Desk:
    """Commands of a worker: prepare a system, time it, and forget all systems."""

    def __init__(self, framework: str):
        _, self.make, self.emptied = FRAMEWORKS[framework]
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
        reply(FRAMEWORKS[framework][0]())
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
