# SPDX-License-Identifier: Apache-2.0
"""Adapters alone as an output of a conversion: a folder that peft loads."""

import json
from pathlib import Path

from t5x_lite.checkpoints import adapters, safetensors_writer, transfer
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.checkpoints.formats.huggingface import peft
from t5x_lite.checkpoints.opened_checkpoint import OpenedAdapters
from t5x_lite.checkpoints.outputs import CheckpointContents, OutputSettings, RenamedOutput
from t5x_lite.checkpoints.transfer import ProgressCallback
from t5x_lite.checkpoints.weights import Weights


class PeftOutput(RenamedOutput):
    """adapter_config.json and adapter_model.safetensors; the tokenizer is the base's."""

    def __init__(
        self, contents: CheckpointContents, settings: OutputSettings, opened: OpenedAdapters
    ):
        if opened.shared and not opened.base.model.shared_weights:
            raise ValueError(
                f"The adapters are of weights that both towers share (Model.shared_weights), and "
                f"the decoder of their base {opened.source} has others: add --merge and "
                "--format=huggingface for the whole model"
            )
        family = huggingface.family_for_export(contents.model, settings.family)
        self.opened, self.table_of_base = opened, family.entries(contents.model)
        axes = adapters.model_axes(contents.model)
        entries = peft.adapter_entries(self.table_of_base, opened.lora, axes)
        super().__init__(contents, settings, entries)

    def write(self, weights: Weights, folder: Path, on_progress: ProgressCallback) -> None:
        """Writes both files.

        Args:
          weights: the adapters.
          folder: an empty folder.
          on_progress: called with the number of bytes written so far.
        """
        mappings, names = self.mappings(weights), self.names(weights)
        fields = peft.adapter_config(
            self.opened.lora, self.opened.source, self.contents.model, self.table_of_base
        )
        text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / peft.CONFIG).write_text(text + "\n", encoding="utf-8")
        done = 0
        with (folder / peft.TENSORS).open("wb") as stream:
            stream.write(safetensors_writer.encode_header(names))
            for name, parts in mappings.items():
                array = transfer.assemble_tensor(weights, parts, *names[name])
                stream.write(array.tobytes())
                done += array.nbytes
                on_progress(done)
