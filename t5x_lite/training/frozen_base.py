# SPDX-License-Identifier: Apache-2.0
"""The weights that train and those that do not: adapters over a frozen base, or all weights.

With Run.lora the params of the training state are the adapters and the head of Model.readout alone,
and so are the optimizer's state and the checkpoints; the base is an argument of the step beside the
state.
"""

import logging
from typing import Any, NamedTuple

import jax

from t5x_lite import config, model
from t5x_lite.checkpoints import adapters as saved_adapters
from t5x_lite.checkpoints.digests import array_digest
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.weight_paths import flatten_tree, nest_tree
from t5x_lite.checkpoints.weights import READOUT, new_weights
from t5x_lite.model import adapters, quantization
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path

log = logging.getLogger(__name__)

NEW_READOUT = "Checkpoint.initial (%s) has no head for Model.readout: a new one is drawn"
# Folded into the seed for A, so that it does not repeat bits of the weights of a run by that seed.
NEW_ADAPTERS = 1 << 31


class FrozenBase(NamedTuple):
    """Frozen weights of a run with adapters.

    Attributes:
      params: tree of the weights, as they are kept: in Model.dtype, or quantized.
      digests: digest of every weight in float32 by dotted name.
      readout: head of Model.readout that training begins with; None to draw one.
    """

    params: Any
    digests: dict[str, int]
    readout: Any = None


def trained_axes(run: config.Run) -> Any:
    """Tree of the axis names of what trains: of the adapters, or of all weights."""
    axes = model.axes(run.model)
    if run.lora is None:
        return axes
    return nest_tree(adapters.adapter_axes(run.lora, flatten_tree(axes))) | readout_of(axes)


def trained_shapes(run: config.Run) -> Any:
    """Tree of shapes and placements of what trains, as `model.shapes` has them."""
    shapes = model.shapes(run.model)
    if run.lora is None:
        return shapes
    axes = flatten_tree(model.axes(run.model))
    trained = adapters.adapter_shapes(run.lora, axes, flatten_tree(shapes))
    return nest_tree(trained) | readout_of(shapes)


def readout_of(params: dict[str, Any]) -> dict[str, Any]:
    """The head of Model.readout, which trains beside adapters; {} without one."""
    return {name: part for name, part in params.items() if name == READOUT}


def base_shapes(run: config.Run) -> Any:
    """Tree of shapes and placements of the frozen weights; None without adapters."""
    if run.lora is None:
        return None
    freeze = adapters.freezer(run.lora, run.model.dtype)

    def freeze_all(shapes: dict[str, Any]) -> dict[str, Any]:
        return {name: freeze(name, leaf) for name, leaf in shapes.items()}

    mesh = jax.sharding.get_mesh()

    def place(leaf: Any) -> Any:
        placement = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    shapes = {name: part for name, part in model.shapes(run.model).items() if name != READOUT}
    kept = jax.eval_shape(freeze_all, flatten_tree(shapes))
    return nest_tree(jax.tree.map(place, kept))


def load_base(run: config.Run) -> FrozenBase | None:
    """Reads the frozen weights of a run with adapters; None for any other run.

    One weight is in float32 at a time.

    Raises:
      ValueError: the base is missing or does not fit; it is Checkpoint.initial, or in MODEL_DIR.
    """
    if run.lora is None:
        return None
    freeze = adapters.freezer(run.lora, run.model.dtype)
    digests: dict[str, Any] = {}
    digest = jax.jit(array_digest)

    def keep(name: str, weight: jax.Array) -> Any:
        if name.split(".")[0] == READOUT:
            return weight
        digests[name] = digest(weight)
        return freeze(name, weight)

    opened = open_checkpoint(base_source(run), options=WEIGHTS_ONLY)
    params = opened.params_for(run.model, model.shapes(run.model), keep)
    readout = params.pop(READOUT, None)
    return FrozenBase(params, {name: int(value) for name, value in digests.items()}, readout)


def base_source(run: config.Run) -> str:
    """The checkpoint that the adapters of a run belong to."""
    folder = parse_path(run.model_dir)
    return saved_adapters.locate_base(folder, not_none(run.checkpoint.initial))


def new_adapters(run: config.Run, base: FrozenBase) -> Any:
    """Adapters of a new run, with which its model computes what the base does."""
    key = jax.random.fold_in(jax.random.key(run.seed), NEW_ADAPTERS)
    axes = flatten_tree(model.axes(run.model))
    kept = flatten_tree(base.params, is_leaf=quantization.is_quantized)
    drawn = nest_tree(adapters.new_adapters(not_none(run.lora), axes, kept, key))
    if READOUT not in model.shapes(run.model):
        return drawn
    if base.readout is not None:
        return drawn | {READOUT: base.readout}
    log.warning(NEW_READOUT, run.checkpoint.initial)
    return drawn | {READOUT: new_weights(run.model, run.seed, lambda params: params[READOUT])}


def check_base(run: config.Run, base: FrozenBase | None, digests: dict[str, int]) -> None:
    """Raises CheckpointMismatchError where a checkpoint's adapters belong to another base.

    Args:
      run: config of the run.
      base: the frozen weights; None without adapters.
      digests: of the weights that the adapters were trained on.
    """
    if base is not None:
        saved_adapters.check_digests(digests, base.digests, str(run.model_dir))


def whole_params(run: config.Run, params: Any, base: Any, key: jax.Array | None = None) -> Any:
    """The weights that the model computes with.

    Args:
      run: config of the run.
      params: the weights that train.
      base: the FrozenBase or its params; None without adapters.
      key: random key of a step, for the adapters' dropout; None for no dropout.
    """
    if run.lora is None:
        return params
    base = base.params if isinstance(base, FrozenBase) else base
    key = None if key is None else jax.random.fold_in(key, adapters.ADAPTER_KEY)
    return adapters.attach_adapters(base, params, run.lora, key) | readout_of(params)
