# SPDX-License-Identifier: Apache-2.0
"""A checkpoint read back for decoding: its config, vocabularies and weights.

It is a run folder, or of another make: a Hugging Face folder or a .gguf file.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from t5x_lite import config, config_file, model, quantization, sharding
from t5x_lite.conversion import checkpoint as foreign
from t5x_lite.conversion.chat import Chat
from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.training import checkpoint

CHAT = "chat_template.jinja"


class Restored(NamedTuple):
    """params lie on the mesh in force, stacked and in float32, as training has them.

    chat is how the model was taught to hold conversations, None if it was not.
    """

    run: config.Run
    params: Any
    vocabularies: tuple[Vocabulary, Vocabulary]
    step: int
    chat: Chat | None = None


def restore(
    folder: str | Path,
    step: int | None = None,
    best: bool = False,
    mesh: config.Mesh | None = None,
    quantize: str | None = None,
) -> Restored:
    """The run in folder, with the newest weights unless a step or the best is asked for.

    A checkpoint of another make is a run without data. Sets the mesh: all devices share the batch
    unless another one is given. quantize names how the layers' matrices are rounded
    (`quantization.kind`).

    Raises:
      ValueError: it is no checkpoint, or its parts do not belong together.
    """
    rounding = None if quantize is None else quantization.kind(quantize)
    found = opened(folder, step, best, mesh)
    if rounding is None:
        return found
    return found._replace(params=quantization.quantised(found.params, rounding))


def opened(folder: str | Path, step: int | None, best: bool, mesh: config.Mesh | None) -> Restored:
    """What `restore` gives, as it was saved."""
    if foreign.is_foreign(folder):
        if best or step is not None:
            raise ValueError(f"{folder} has one set of weights: a step, or the best, has a run")
        return of_another_make(folder, mesh)
    run = read_config(folder)
    vocabulary = Path(folder) / "vocabulary"
    pair = vocabularies.load_pair(vocabulary)
    check_sizes(vocabulary, pair, run.model)
    params, step = checkpoint.load_params(folder, step=step, best=best)
    sharding.use_mesh(mesh or config.Mesh())
    return Restored(run, place(run.model, params), pair, step, chat_of(vocabulary, pair[1]))


def of_another_make(path: str | Path, mesh: config.Mesh | None) -> Restored:
    """The checkpoint at path as it is; nothing is written."""
    found = foreign.open(path)
    pair = found.told.vocabularies
    check_sizes(Path(path), pair, found.model)
    sharding.use_mesh(mesh or config.Mesh())
    run = config.Run(model_dir=str(path), model=found.model)
    return Restored(run, found.params(), pair, 0, found.told.chat)


def check_sizes(path: Path, pair: tuple[Vocabulary, Vocabulary], cfg: config.Model) -> None:
    """Raises ValueError where a vocabulary has ids that the model does not."""
    for name, each in zip(("inputs", "targets"), pair, strict=True):
        if each.size > cfg.vocab:
            raise ValueError(
                f"{path} ({name}) has {each.size} ids, more than the {cfg.vocab} of Model.vocab: "
                "is it the vocabulary of another model?"
            )


def chat_of(vocabulary: Path, targets: Vocabulary) -> Chat | None:
    """The chat template that a conversion wrote beside the vocabularies."""
    path = vocabulary / CHAT
    if not path.is_file():
        return None
    return Chat(path.read_text(encoding="utf-8"), foreign.special_tokens(targets))


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
