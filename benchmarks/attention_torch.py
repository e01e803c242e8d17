# SPDX-License-Identifier: Apache-2.0
"""PyTorch's systems of attention.py."""

import functools

import numpy as np
from attention_systems import FARTHEST, FLEX, SDPA, Case, Ready, operands, some, table_of


def prepare_system(system: str, case: Case) -> Ready:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = lambda x: torch.from_numpy(x).to(device, torch.bfloat16)
    *given, gradient = (place(x).transpose(1, 2).contiguous() for x in operands(case))
    attention, bias = (flex if system == FLEX else sdpa)(case, device)
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


def sdpa(case: Case, device: str):
    """PyTorch picks among flash, cuDNN, memory-efficient and plain attention by itself."""
    import torch

    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=1.0)
    if not case.biased and case.texts == 1:
        return functools.partial(attend, is_causal=case.causal), []
    segments = torch.from_numpy(case.segments).to(device)
    hidden = segments[:, None] != segments
    if case.causal:
        hidden |= torch.ones_like(hidden).triu(1)
    if not case.biased:
        return functools.partial(attend, attn_mask=~hidden), []
    vector = torch.from_numpy(by_distance(case)).to(device, torch.bfloat16)
    bias = vector.unfold(1, case.length, 1).flip(1)[None].contiguous()
    bias.masked_fill_(hidden, -torch.inf)
    return lambda q, k, v, bias: attend(q, k, v, attn_mask=bias), [bias]


def flex(case: Case, device: str):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Without this the ninth case would run uncompiled.
    torch._dynamo.reset()
    compiled, seen, first = torch.compile(flex_attention), None, case.length - 1
    segments = torch.from_numpy(case.segments).to(device)
    if case.causal or case.texts > 1:

        def visible(b, h, query, key):
            same = segments[query] == segments[key]
            return same & (query >= key) if case.causal else same

        seen = create_block_mask(visible, None, None, case.length, case.length, device=device)
    if not case.biased:
        return lambda q, k, v: compiled(q, k, v, block_mask=seen, scale=1.0), []

    def attention(q, k, v, vector):
        biased = lambda score, b, h, query, key: score + vector[h, key - query + first]
        return compiled(q, k, v, score_mod=biased, block_mask=seen, scale=1.0)

    return attention, [torch.from_numpy(by_distance(case)).to(device)]


def opened() -> dict:
    import torch

    if torch.cuda.is_available():
        kind = torch.cuda.get_device_name(0)
        return {"device": kind, "platform": "gpu", "systems": [SDPA, FLEX]}
    return {"device": "cpu", "platform": "cpu", "systems": [SDPA]}


def empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
