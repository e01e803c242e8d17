# SPDX-License-Identifier: Apache-2.0
"""The folder of an exported model: programs, weights, settings, tokenizer and a script."""

import json
from pathlib import Path

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints import matching, outputs, transfer
from t5x_lite.checkpoints.outputs import CheckpointContents, OutputSettings, RenamedOutput
from t5x_lite.checkpoints.transfer import ProgressCallback
from t5x_lite.checkpoints.transforms import STACKED, Entry
from t5x_lite.checkpoints.weights import Weights
from t5x_lite.export import programs
from t5x_lite.export.programs import ExportShapes

# Of the arrangement of the folder; the programs have jax's own.
VERSION = 2
SCRIPT = Path(__file__).with_name("generate.py")


class StableHloOutput(RenamedOutput):
    """A folder whose programs run with jax alone; generate.py in it decodes greedily.

    Args:
      contents: the checkpoint to write.
      settings: the dtype of weights is float32.
      shapes: sizes of the programs' arrays.

    Raises:
      ValueError: another dtype, or a model that cannot be exported.
    """

    def __init__(
        self, contents: CheckpointContents, settings: OutputSettings, shapes: ExportShapes
    ):
        if settings.dtype not in (None, np.dtype(np.float32)):
            raise ValueError(
                f"--dtype={settings.dtype}: the programs of stablehlo compute in float32, and so "
                "are their weights; leave out --dtype"
            )
        programs.check_exportable(contents.model, shapes)
        in_float32 = settings._replace(dtype=np.dtype(np.float32))
        super().__init__(contents, in_float32, layer_entries(contents.model))
        self.shapes = shapes

    def write(self, weights: Weights, folder: Path, on_progress: ProgressCallback) -> None:
        """Writes programs, settings, script, tokenizer and weights.

        Args:
          weights: the weights.
          folder: an empty folder.
          on_progress: called with the number of bytes written so far.
        """
        mappings, names = self.mappings(weights), self.names(weights)
        described = {
            name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in names.items()
        }
        exported = programs.export_programs(
            self.contents.model, described, self.shapes, tuple(self.describe([])["stops"])
        )
        for name, program in exported.items():
            (folder / f"{name}.jax").write_bytes(program)
        text = json.dumps(self.describe(list(exported)), indent=2)
        (folder / "export.json").write_text(text + "\n", encoding="utf-8")
        (folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
        outputs.write_tokenizer(self.contents, folder)
        one_file = sum(np.prod(shape, dtype=int) * 4 for shape, _ in names.values()) + 1
        transfer.write_safetensors(weights, mappings, folder, names, int(one_file), on_progress)

    def describe(self, names: list[str]) -> dict:
        """Settings that the script reads.

        Args:
          names: names of the programs.
        """
        cfg, text = self.contents.model, self.contents.text
        first = self.contents.run.decode.forced_bos_token_id
        return {
            "version": VERSION,
            "jax": jax.__version__,
            "platforms": programs.PLATFORMS,
            "programs": names,
            "batch_size": self.shapes.batch,
            "input_length": self.shapes.input_length,
            "row_length": self.shapes.row_length,
            "vocab": cfg.vocab,
            "prefix": programs.start_tokens(cfg),
            "forced_bos_token_id": -1 if first is None else first,
            "stops": [] if text is None else list(text.vocabularies[1].stops),
        }


def layer_entries(cfg: config.Model) -> list[Entry]:
    """Our weights under our names and axes, each layer by itself: decoder.layers.0.norm."""
    entries = []
    for path, leaf in matching.model_leaves(cfg).items():
        names = leaf.axes.split()
        theirs = path.replace("/", ".")
        if names[0] == STACKED:
            theirs = theirs.replace(".layers.", ".layers.{layer}.")
        entries.append(Entry(path, theirs, " ".join(name for name in names if name != STACKED)))
    return entries
