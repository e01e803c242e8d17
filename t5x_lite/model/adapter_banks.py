# SPDX-License-Identifier: Apache-2.0
"""Several adapters of one frozen model, chosen row by row (as Punica and S-LoRA, arXiv 2310.18547,
2311.03285).

`bank_adapters` puts an `AdapterBank` in the place of every matrix that some adapter has;
`select_adapters` says which adapter each row of a batch has. The product with the frozen matrix is
one for all rows, and each row adds x A B of its own adapter: a row is computed from its own numbers
alone, whatever adapters the others have.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_lite.model import quantization
from t5x_lite.model.adapters import AdaptedWeight, column_norms, is_adapted
from t5x_lite.model.quantization import Quantized


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "a", "b", "column_scales", "rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """A frozen matrix of one layer and all its adapters; the first one adds nothing.

    Attributes:
      weight: the matrix [inputs ... outputs ...], an array or Quantized.
      a: [adapters inputs ... rank], those of smaller ranks padded with zeros.
      b: [adapters rank outputs ...], the scale of each adapter in it.
      column_scales: [adapters outputs ...] factors on the columns (DoRA), 1 for other adapters;
        None where no adapter has them.
      rows: [b] adapter of each row; None until they are selected.
    """

    weight: Any
    a: Any
    b: Any
    column_scales: Any = None
    rows: Any = None

    def read(self, dtype: str) -> "AdapterBank":
        """Returns all arrays in the dtype of activations."""

        def cast(leaf):
            return leaf if leaf is None or isinstance(leaf, Quantized) else leaf.astype(dtype)

        names = ("weight", "a", "b", "column_scales")
        return dataclasses.replace(self, **{name: cast(getattr(self, name)) for name in names})

    def add_to(self, y: Float[Array, "b t ..."], x: Float[Array, "b t ..."]) -> jax.Array:
        """Returns the product of x and the matrix with what the adapter of each row adds.

        Args:
          y: the product with the frozen matrix, outputs last.
          x: what was multiplied, inputs last.
        """

        def add(y, x, rows, a, b, scales):
            count, length = x.shape[:2]
            down = a[rows].reshape(count, -1, a.shape[-1])
            up = b[rows].reshape(count, a.shape[-1], -1)
            low = jnp.einsum("bti,bir->btr", x.reshape(count, length, -1), down)
            y = y + jnp.einsum("btr,bro->bto", low, up).reshape(y.shape)
            return y if scales is None else y * scales[rows][:, None]

        placed = jax.typeof(y).sharding.spec
        arrays = (y, x, self.rows, self.a, self.b, self.column_scales)
        return jax.sharding.auto_axes(add, out_sharding=placed)(*arrays)


def is_bank(leaf: Any) -> bool:
    """Returns True for a weight with a bank of adapters."""
    return isinstance(leaf, AdapterBank)


def bank_adapters(base: Any, adapted: Sequence[Any]) -> Any:
    """Returns weights with all adapters of several trees; adapter 0 is none, 1 that of the first.

    Args:
      base: weights of `unstack`, without adapters.
      adapted: the same weights with each adapter, of `attach_to_layers`.
    """

    def combine(weight: Any, *others: Any) -> Any:
        adapters = [each if is_adapted(each) else None for each in others]
        return bank_matrix(weight, adapters) if any(adapters) else weight

    return jax.tree.map(combine, base, *adapted, is_leaf=quantization.is_quantized)


def bank_matrix(weight: Any, adapters: Sequence[AdaptedWeight | None]) -> AdapterBank:
    """Returns the bank of one matrix.

    Args:
      weight: the frozen matrix.
      adapters: its adapters, in order; None for one that leaves it alone.
    """
    known = [each for each in adapters if each is not None]
    rank = max(each.a.shape[-1] for each in known)

    def stack(arrays: list[jax.Array | None], missing: float) -> jax.Array:
        """All arrays, those of adapter 0 and of None filled with one number."""
        filled = jnp.full_like(next(each for each in arrays if each is not None), missing)
        return jnp.stack([filled, *(filled if each is None else each for each in arrays)])

    def pad_rank(array: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rank - array.shape[axis])
        return jnp.pad(array, widths)

    def collect(read: Callable[[AdaptedWeight], Any], missing: float) -> jax.Array:
        return stack([None if each is None else read(each) for each in adapters], missing)

    has_scales = any(each.magnitude is not None for each in known)
    return AdapterBank(
        weight,
        a=collect(lambda each: pad_rank(each.a, each.a.ndim - 1), 0),
        b=collect(lambda each: pad_rank(each.scale * each.b, 0), 0),
        column_scales=collect(find_column_scales, 1) if has_scales else None,
    )


def find_column_scales(adapted: AdaptedWeight) -> jax.Array | None:
    """Magnitude over the norm of each column of W + scale A B (DoRA, equation 5); None for LoRA."""
    if adapted.magnitude is None:
        return None

    def divide(weight, a, b, magnitude):
        delta = adapted.scale * jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)
        norms = column_norms(weight, delta, inputs=a.ndim - 1)
        return magnitude.astype(jnp.float32) / norms

    arrays = (adapted.weight, adapted.a, adapted.b, adapted.magnitude)
    return jax.jit(jax.sharding.auto_axes(divide, out_sharding=P()))(*arrays)


def select_adapters(params: Any, rows: Int[Array, " b"]) -> Any:
    """Returns weights for a batch whose rows have these adapters; the arrays are shared.

    Args:
      params: weights of `bank_adapters`.
      rows: number of the adapter of each row; 0 for none.
    """

    def select(leaf: Any) -> Any:
        return dataclasses.replace(leaf, rows=rows) if is_bank(leaf) else leaf

    return jax.tree.map(select, params, is_leaf=is_bank)
