# SPDX-License-Identifier: Apache-2.0
"""Weights that both towers share by `Model.shared_weights`: params have the encoder's alone.

The decoder reads the encoder's arrays, so that a gradient is the sum over both, and optimizers and
checkpoints hold them once.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

from flax import linen as nn

from t5x_lite import config
from t5x_lite.model.layers import FlaxModule


class SharingModule(FlaxModule):
    """A module with a `cfg` whose params leave out what the decoder shares with the encoder."""

    cfg: config.Model

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the module.

        Args:
          variables: {"params": weights}.
          *args: arguments of the method.
          **kwargs: method, if it is not `__call__`, and its keyword arguments.
        """
        if self.cfg.shared_weights:
            variables = {**variables, "params": spread_shared(self.cfg, variables["params"])}
        return super().apply(variables, *args, **kwargs)


def matches_shared(name: str, patterns: Sequence[str]) -> bool:
    """True if a pattern names a weight, "decoder.layers.mlp.gate"."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def spread_shared(cfg: config.Model, params: dict) -> dict:
    """Params with the shared weights in the decoder too; layers are stacked or a tuple."""
    patterns = cfg.shared_weights
    return params | {"decoder": fill_in(params["encoder"], params["decoder"], "decoder", patterns)}


def fill_in(source: dict, target: dict, path: str, patterns: Sequence[str]) -> dict:
    """A part of the decoder with what it shares.

    Args:
      source: the same part of the encoder.
      target: the part.
      path: its dotted name.
      patterns: names of the weights that are shared.
    """
    filled = dict(target)
    for name, part in source.items():
        where = f"{path}.{name}"
        if type(part) is tuple:
            layers: Any = zip(part, target.get(name, [{}] * len(part)), strict=True)
            filled[name] = tuple(fill_in(one, other, where, patterns) for one, other in layers)
        elif type(part) is dict:
            if inner := fill_in(part, target.get(name, {}), where, patterns):
                filled[name] = inner
        elif name not in target and matches_shared(where, patterns):
            filled[name] = part
    return filled


def drop_shared(cfg: config.Model, params: dict) -> dict:
    """Params without the decoder's weights that are the encoder's.

    Raises:
      ValueError: a pattern names no weight of both towers, or one of another shape.
    """
    if not cfg.shared_weights:
        return params
    used: set[str] = set()
    decoder = leave_out(params["encoder"], params["decoder"], "decoder", (cfg.shared_weights, used))
    for pattern in cfg.shared_weights:
        config.require(
            any(fnmatch.fnmatchcase(name, pattern) for name in used),
            f"Model.shared_weights: {pattern!r} names no weight of the decoder that the encoder "
            "has too, such as decoder.layers.mlp.*",
        )
    return params | {"decoder": decoder}


def leave_out(
    source: dict, target: dict, path: str, patterns: tuple[Sequence[str], set[str]]
) -> dict:
    """A part of the decoder without what it shares.

    Args:
      source: the same part of the encoder.
      target: the part.
      path: its dotted name.
      patterns: names of the weights that are shared, and a set that receives those left out.
    """
    kept = {}
    for name, part in target.items():
        where = f"{path}.{name}"
        if type(part) is dict:
            if inner := leave_out(source.get(name, {}), part, where, patterns):
                kept[name] = inner
        elif name in source and matches_shared(where, patterns[0]):
            check_shapes(where, source[name], part)
            patterns[1].add(where)
        else:
            kept[name] = part
    return kept


def check_shapes(name: str, source: Any, target: Any) -> None:
    """Raises ValueError for a weight of the decoder that differs in shape from the encoder's.

    Args:
      name: of the weight.
      source: the encoder's, boxed during init.
      target: the decoder's.
    """
    shapes = [getattr(getattr(part, "value", part), "shape", None) for part in (source, target)]
    config.require(
        shapes[0] == shapes[1],
        f"Model.shared_weights: {name} is {list(shapes[1] or ())} and the encoder's "
        f"{list(shapes[0] or ())}: give both Stacks the same sizes, or name fewer weights",
    )
