# SPDX-License-Identifier: Apache-2.0
"""What a call costs at each width: measured once for a model, a batch and a device, and kept.

Measured is the very program that will run, drafting and all, with every guess taken for wrong: then
each call writes one token, and the time of some of them is the price of a width.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite import config
from t5x_lite.decoding import generation, widths
from t5x_lite.decoding.acceptance import Exact
from t5x_lite.decoding.protocol import Target
from t5x_lite.decoding.request import Request, bucket

VARIABLE = "T5X_LITE_COSTS"
DEFAULT = "~/.cache/t5x_lite/costs.json"
# Calls of one measurement at least, and how often each width is measured, in turns; the quickest
# counts.
CALLS, ROUNDS = 8, 3
# What a row of the table is; rows of another layout are measured anew.
LAYOUT = "plain call, then widths"


def priced(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> generation.Drafting:
    """drafting with the prices of its Adaptive drafter, from the table or measured now.

    The first measurement compiles what `generate` needs anyway. Several processes measure together,
    and all take what the first one measured: they must choose alike.
    """
    if jax.process_count() > 1:
        seconds = np.array(measured(cfg, params, request, decode, drafting))
        return with_prices(drafting, multihost_utils.broadcast_one_to_all(seconds).tolist())
    name = key(cfg, params, request, decode, drafting)
    table = read(file())
    if name not in table:
        seconds = measured(cfg, params, request, decode, drafting)
        table = remembered(file(), name, seconds)
    return with_prices(drafting, table[name])


def with_prices(
    drafting: generation.Drafting, seconds: list[float], blind: bool = False
) -> generation.Drafting:
    """drafting whose weights, the drafter's own, are joined by prices: of a plain call, and of one
    at each width."""
    plain, each = np.float32(seconds[0]), np.array(seconds[1:], np.float32)
    return drafting._replace(weights=widths.Priced(each, plain, np.bool_(blind), drafting.weights))


def measured(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> list[float]:
    """Seconds of a call for which nothing is guessed, and of one at each width of the drafter.

    Never less for a wider block than for a narrower one: that would be noise.
    """
    count = len(drafting.drafter.widths)
    never = -1 if isinstance(request.eos, int) else np.full_like(request.eos, -1)
    request = request._replace(eos=never)
    most = max(min(decode.length, int(np.max(request.limit))) - 1, 1)

    def one(number: int, calls: int) -> float:
        """Seconds of the opening (encoder, prefill, first token) and of so many calls."""
        blind = with_prices(drafting, only(number, count), blind=True)
        rows = request._replace(limit=np.minimum(request.limit, calls + 1))
        began = time.perf_counter()
        generation.generate(cfg, params, rows, decode, blind)
        return time.perf_counter() - began

    one(0, 0)
    opening = one(0, 0)
    calls = np.full(count, min(CALLS, most))
    for number in range(count):
        # The opening of a small model takes as long as a hundred calls: of a few, its noise would
        # be most of what is left when it is taken off.
        while calls[number] < most and one(number, calls[number]) < 1.5 * opening:
            calls[number] = min(2 * calls[number], most)
    whole = np.full(count, np.inf)
    for _ in range(ROUNDS):
        opening = min(opening, one(0, 0))
        whole = np.minimum(whole, [one(number, calls[number]) for number in range(count)])
    # On a busy machine the opening alone can have taken longer than all of it.
    seconds = np.maximum.accumulate(np.maximum(whole - opening, whole / 4) / calls)
    guessed = guessing(request, decode, drafting) if drafting.drafter.is_ahead else 0.0
    return [max(seconds[0] - guessed, seconds[0] / 4), *seconds.tolist()]


def only(number: int, count: int) -> list[float]:
    """Prices that leave no choice but the width of this number, of so many; RESTING: to rest."""
    place = 0 if number == widths.RESTING else number + 1
    return [1.0 if each == place else np.inf for each in range(count + 1)]


def guessing(request: Request, decode: config.Decode, drafting: generation.Drafting) -> float:
    """Seconds that guessing before a call and choosing its width add to one of plain decoding.

    Measured of a model that does nothing. Of a large one's calls it is less than their noise: a
    drafter that was thought to cost 1 ms in 28 (2 us are true) spent on looking what it may lose
    on trying, and wrote two of eight texts at width 1 that a block of 8 writes in 0.76 and 0.98 of
    the time.
    """
    wide = drafting.drafter
    narrow = drafting._replace(drafter=dataclasses.replace(wide, widths=(1, wide.tree.width)))
    narrow = with_prices(narrow, only(0, 2), blind=True)
    rows = generation.place(request._replace(eos=None))

    def one(drafting: generation.Drafting) -> float:
        shape = generation.Shape(None, bucket(decode.length), 1, 1, drafting.drafter, Exact())
        began = time.perf_counter()
        jax.block_until_ready(silent(shape, rows, drafting.weights))
        return time.perf_counter() - began

    both = generation.PLAIN, narrow
    list(map(one, both))
    plain, guessed = np.min([list(map(one, both)) for _ in range(ROUNDS)], axis=0)
    return float(max(guessed - plain, 0.0)) / max(int(np.max(request.limit)), 1)


@functools.partial(jax.jit, static_argnums=0)
def silent(shape: generation.Shape, request: Request, weights: Any):
    """How many calls a text takes of a model that costs nothing, and says token 0."""
    drafter = shape.drafter
    words = np.zeros(max(drafter.top, 1), np.float32)
    nothing = Target(
        forward=lambda tokens, index, cache, tree=None: (0.0 * tokens[..., None], cache),
        logits=lambda hidden: hidden + words,
    )
    setting = generation.set_up(shape, nothing, request._replace(eos=-1), None, weights)
    state = generation.started(setting, None, setting.slots, drafter.begin(setting))
    return generation.run(shape, setting, state).calls


def key(
    cfg: config.Model,
    params: Any,
    request: Request,
    decode: config.Decode,
    drafting: generation.Drafting,
) -> str:
    """A name for all that decides the price of a call: model, shapes, drafter, device, versions."""
    shapes = [None if x is None else np.shape(x) for x in (request.inputs, request.prompts)]
    device = jax.devices()[0]
    about = (
        cfg,
        # Quantised weights are read in less time.
        sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}),
        drafting.drafter,
        drafting.accept,
        jax.tree.map(np.shape, drafting.weights),
        shapes,
        bucket(decode.length),
        decode.temperature > 0,
        (device.platform, device.device_kind, jax.device_count(), platform.node(), os.cpu_count()),
        jax.sharding.get_abstract_mesh().shape_tuple,
        jax.__version__,
        LAYOUT,
    )
    return hashlib.sha256(repr(about).encode()).hexdigest()[:24]


def file() -> Path:
    """Where the table is: T5X_LITE_COSTS in the environment, or the user's cache."""
    return Path(os.environ.get(VARIABLE) or DEFAULT).expanduser()


def read(path: Path) -> dict[str, list[float]]:
    """The prices by key; of a cache that somebody broke, none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sound = lambda row: isinstance(row, list) and all(isinstance(x, float) for x in row)
    return (
        {name: row for name, row in table.items() if sound(row)} if isinstance(table, dict) else {}
    )


def remembered(path: Path, name: str, seconds: list[float]) -> dict[str, list[float]]:
    """The table with a row more, written in one move; where it cannot be written, still known."""
    table = read(path) | {name: seconds}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
    return table
