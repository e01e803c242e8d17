# SPDX-License-Identifier: Apache-2.0
"""Model.dtype of training on a CPU: the one whose products take less time, measured once.

With AMX units bfloat16 takes a half of the time or less, without them up to three times as long.
"""

import functools
import hashlib
import os
import platform
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.config.checked import require
from t5x_lite.utils import latency_table

# float32 or bfloat16, in place of a measurement.
VARIABLE = "T5X_LITE_CPU_DTYPE"
DTYPES = ("float32", "bfloat16")
# bfloat16 has to gain a fifth: losses are coarser in it.
LARGEST_RATIO = 0.8
ROWS, EMBED, MLP, HEADS, ROUNDS = 256, 512, 2048, 8, 3


class LayerMatrices(NamedTuple):
    """Matrices of a layer's products, in float32: [embed mlp] and [mlp embed]."""

    wide: jax.Array
    back: jax.Array


def fastest_dtype() -> str:
    """Returns float32 or bfloat16, as T5X_LITE_CPU_DTYPE says or a measurement.

    Processes of one run could measure differently: they take float32.

    Raises:
      ValueError: T5X_LITE_CPU_DTYPE is something else.
    """
    named = os.environ.get(VARIABLE)
    if named:
        require(named in DTYPES, f"{VARIABLE} is {named!r}, but has to be float32 or bfloat16")
        return named
    if jax.process_count() > 1:
        return "float32"
    ratio = kept_ratio()
    if ratio is None:
        ratio = measure_ratio()
        latency_table.save_row(latency_table.cache_path(), table_key(), [ratio])
    return "bfloat16" if ratio < LARGEST_RATIO else "float32"


def reason() -> str:
    """Why training on this CPU has its dtype, for the overview; empty if nothing was measured."""
    ratio = None if os.environ.get(VARIABLE) else kept_ratio()
    if ratio is None:
        return ""
    return f"products in bfloat16 take {ratio:.2f} of the time of float32 on this processor"


def kept_ratio() -> float | None:
    """The ratio that was measured on this processor; None before."""
    row = latency_table.read_table(latency_table.cache_path()).get(table_key(), [])
    return row[0] if len(row) == 1 else None


@functools.cache
def table_key() -> str:
    """Key of the table: processor, cores and version."""
    identity = (platform.node(), platform.processor(), os.cpu_count(), jax.__version__)
    sizes = ROWS, EMBED, MLP, HEADS, ROUNDS
    return "dtype " + hashlib.sha256(repr((identity, sizes)).encode()).hexdigest()[:24]


def measure_ratio() -> float:
    """Seconds of a layer's products in bfloat16, forward and backward, by those in float32."""
    draw = np.random.default_rng(0)
    shapes = (EMBED, MLP), (MLP, EMBED), (ROWS, EMBED)
    *matrices, x = (jnp.asarray(draw.normal(0, 0.02, shape), jnp.float32) for shape in shapes)
    gradient = jax.jit(jax.grad(sum_of_squares, (0, 1)), static_argnums=2)
    seconds = dict.fromkeys(DTYPES, float("inf"))
    for number in range(ROUNDS + 1):
        for dtype in DTYPES:
            begin = time.perf_counter()
            jax.block_until_ready(gradient(LayerMatrices(*matrices), x, dtype))
            if number:  # the first compiles
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    return seconds["bfloat16"] / seconds["float32"]


def sum_of_squares(weights: LayerMatrices, x: jax.Array, dtype: str) -> jax.Array:
    """A layer without its norms, of which only the time counts.

    Args:
      weights: of the layer.
      x: [rows embed] float32.
      dtype: of the products.
    """
    wide, back, x = (value.astype(dtype) for value in (*weights, x))
    y = jax.nn.relu(x @ wide) @ back
    heads = y.reshape(ROWS, HEADS, EMBED // HEADS)
    probs = jax.nn.softmax(jnp.einsum("qhd, khd -> hqk", heads, heads))
    read = jnp.einsum("hqk, khd -> qhd", probs, heads).reshape(ROWS, EMBED)
    return jnp.sum(jnp.square((y + read).astype(jnp.float32)))
