# SPDX-License-Identifier: Apache-2.0
"""Weights as `Decode.compute` computes with them: in float32, bfloat16 or int8."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import config
from t5x_lite.model import quantization
from t5x_lite.model.adapter_banks import AdapterBank
from t5x_lite.model.adapters import AdaptedWeight


def dtype_of_computation(cfg: config.Model, compute: str = "auto") -> str:
    """The dtype of activations, and of weights that are not quantized.

    By default float32 on a CPU, where XLA's products of a single row in bfloat16 take ten times as
    long, and Model.dtype elsewhere.

    Args:
      cfg: config of the model.
      compute: Decode.compute.
    """
    if compute in ("float32", "bfloat16"):
        return compute
    return "float32" if jax.default_backend() == "cpu" else cfg.dtype


def with_dtype_of(cfg: config.Model, params: Any) -> config.Model:
    """Returns cfg with the dtype of its prepared weights, in which everything is computed."""
    return dataclasses.replace(cfg, dtype=str(params["embedding"].dtype))


def cast_params(params: Any, dtype: str) -> Any:
    """Casts all weights that are not quantized to dtype."""

    def cast(weight):
        return weight if quantization.is_quantized(weight) else jnp.asarray(weight, dtype)

    return jax.tree.map(cast, params, is_leaf=quantization.is_quantized)


def params_for_compute(cfg: config.Model, params: Any, compute: str) -> Any:
    """Converts weights for Decode.compute; int8 quantizes layers and the output head.

    Args:
      cfg: config of the model.
      params: weights, stacked or from `prepare_params`.
      compute: Decode.compute.
    """
    params = cast_params(params, dtype_of_computation(cfg, compute))
    return quantize_computation(params, cfg.tied) if compute == "int8" else params


def quantize_computation(params: dict, tied: bool) -> dict:
    """Quantizes layers and output head to int8, and what they multiply to two int8 rows each.

    With activations in 8 bits alone, SmolLM2-135M loses 1.4 % of its loss, half of it in the head.

    Weights that are quantized already keep their bits. An embedding that is the head too stays for
    the tokens, and the head beside it is a weight of its own.

    Args:
      params: weights, stacked or one tree per layer, with adapters or without.
      tied: the output head is the embedding.
    """

    def convert(path, weight):
        fan_in = quantization.layer_fan_in(path)
        if fan_in is None:
            return weight
        if quantization.is_quantized(weight):
            return dataclasses.replace(weight, kind=weight.kind._replace(activations=16))
        if any(isinstance(key, jax.tree_util.SequenceKey) for key in path):
            return quantization.quantize_channels(weight, fan_in)
        return quantization.quantize_layers(weight, fan_in, quantization.QuantizationConfig(8, 16))

    def convert_inner(path, leaf):
        if isinstance(leaf, AdaptedWeight | AdapterBank):
            return dataclasses.replace(leaf, weight=convert(path, leaf.weight))
        return convert(path, leaf)

    def is_matrix(leaf):
        return quantization.is_quantized(leaf) or isinstance(leaf, AdaptedWeight | AdapterBank)

    params = jax.tree_util.tree_map_with_path(convert_inner, params, is_leaf=is_matrix)
    head = jnp.swapaxes(params["embedding"], 0, 1) if tied else params["head"]
    return params | {"head": quantization.quantize_channels(head, 1)}
