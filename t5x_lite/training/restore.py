# SPDX-License-Identifier: Apache-2.0
"""A run folder read back for decoding: its config, vocabularies and the weights of a checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from t5x_lite import config, config_file, model, sharding
from t5x_lite.data import vocabularies
from t5x_lite.training import checkpoint


class Restored(NamedTuple):
    """params lie on the mesh in force, stacked and in float32, as training has them."""

    run: config.Run
    params: Any
    vocabularies: tuple[vocabularies.Vocabulary, vocabularies.Vocabulary]
    step: int


def restore(
    folder: str | Path,
    step: int | None = None,
    best: bool = False,
    mesh: config.Mesh | None = None,
) -> Restored:
    """The run in folder, with the newest weights unless a step or the best is asked for.

    Sets the mesh: all devices share the batch unless another one is given.

    Raises:
      ValueError: it is no run folder, or its parts do not belong together.
    """
    run = read_config(folder)
    vocabulary = Path(folder) / "vocabulary"
    pair = vocabularies.load_pair(vocabulary)
    for name, each in zip(("inputs", "targets"), pair, strict=True):
        if each.size > run.model.vocab:
            raise ValueError(
                f"{vocabulary / name} has {each.size} ids, more than the {run.model.vocab} of "
                "Model.vocab: is it the vocabulary of another run?"
            )
    params, step = checkpoint.load_params(folder, step=step, best=best)
    sharding.use_mesh(mesh or config.Mesh())
    return Restored(run, place(run.model, params), pair, step)


def read_config(folder: str | Path) -> config.Run:
    """The config a run was saved with."""
    path = Path(folder) / "config.gin"
    if not path.exists():
        raise ValueError(
            f"{folder} is not the MODEL_DIR of a run: it has no {path.name}. Train one first, for "
            "example: python -m t5x_lite.train --gin_file=configs/runs/g2p.gin "
            f"--gin.MODEL_DIR={folder}"
        )
    try:
        return config_file.from_text(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def place(cfg: config.Model, params: Any) -> Any:
    """Whole host arrays as params on the mesh.

    Raises:
      ValueError: they are not of this model; the first difference is told.
    """
    wanted, given = flat(model.shapes(cfg)), flat(params)
    for name in sorted(wanted.keys() | given.keys()):
        shapes = [tree[name].shape if name in tree else None for tree in (wanted, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The checkpoint is of another model: weight {name} is {shapes[1]} there and "
                f"{shapes[0]} in the config (None: there is none)"
            )

    def put(shape, weight):
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda part: weight[part])

    return jax.tree.map(put, model.shapes(cfg), params)


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
