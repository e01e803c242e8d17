# SPDX-License-Identifier: Apache-2.0
"""Pads a small trained encoder-decoder to T5-base's shape: the same text at T5-base's cost.

What drafts bring depends on what a model has learned, what a forward pass costs on its size, and a
T5-base that learned something here would take days. Weights are padded with zeros (norms are
scaled, as they divide by the mean over more features; words that are added score like one that no
text has), so the padded model computes the same function: other systems do T5-base's arithmetic as
well. Prints how many texts of the test split both models write alike.

  python benchmarks/widened.py --run runs/heads_restore_tuned --out runs/heads_restore_base
  python benchmarks/decoding.py --folder F --cases heads --heads runs/heads_restore_base
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np

from t5x_lite import config, data, decoding
from t5x_lite.checkpoints import matching, run_folder, transfer
from t5x_lite.checkpoints.opening import open_checkpoint

T5_BASE = {"layers": 12, "embed": 768, "heads": 12, "head_dim": 64, "mlp": 3072}
VOCAB = 32128
TEXTS = 32


def widened(cfg: config.Model) -> config.Model:
    """cfg in the shape of T5-base, its heads as wide as the model.

    Raises:
      ValueError: it is larger, or of another kind than a T5 with a relu.
    """
    for stack in (cfg.encoder, cfg.decoder):
        small = stack is not None and all(getattr(stack, k) <= v for k, v in T5_BASE.items())
        plain = small and (stack.norm, stack.positions, stack.gated) == ("rms", "relative", False)
        if not plain or stack.kv_heads not in (None, stack.heads) or stack.bias_per_layer:
            raise ValueError("--run is no T5 without gates that fits into T5-base")
    draft_heads = cfg.draft_heads and dataclasses.replace(cfg.draft_heads, mlp=T5_BASE["embed"])
    return dataclasses.replace(
        cfg,
        vocab=VOCAB,
        encoder=dataclasses.replace(cfg.encoder, **T5_BASE),
        decoder=dataclasses.replace(cfg.decoder, **T5_BASE),
        draft_heads=draft_heads,
    )


class Padded:
    """The weights of a checkpoint in a wider model's shapes; unused is a word that no text has."""

    def __init__(self, saved: run_folder.SavedWeights, cfg: config.Model, unused: int):
        self.saved, self.unused = saved, unused
        self.leaves = matching.model_leaves(cfg)
        self.names = {key: (leaf.shape, saved.names[key][1]) for key, leaf in self.leaves.items()}
        self.shrink = np.float32((saved.run.model.decoder.embed / cfg.decoder.embed) ** 0.5)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        leaf, old = self.leaves[path], self.saved.leaves[path]
        axes = [axis for axis in leaf.axes.split() if axis != "layers"]
        shape = leaf.shape if layer is None else leaf.shape[1:]
        if layer is not None and layer >= old.layers:
            return np.zeros(shape, self.names[path][1])
        values = self.saved.read(path, layer)
        wide = np.pad(values, [(0, new - n) for new, n in zip(shape, values.shape, strict=True)])
        if axes == ["norm"]:
            wide *= self.shrink
        if "vocab" in axes:
            place = axes.index("vocab")
            added = np.arange(values.shape[place], shape[place])
            word = np.take(wide, [self.unused], place)
            wide[(slice(None),) * place + (added,)] = word
        return wide


def texts(checkpoint: Path, rows: list[list[int]], length: int) -> list[list[int]]:
    """Greedily decoded outputs of a checkpoint."""
    loaded = open_checkpoint(checkpoint).load()
    cfg = loaded.run.model
    params = decoding.prepare_params(cfg, loaded.params)
    decode = config.Decode(max_new_tokens=length)
    request = decoding.make_request(cfg, rows, decode, eos=loaded.vocabularies[1].eos)
    result = decoding.generate(cfg, params, request, decode)
    pairs = zip(result.tokens[:, 0].tolist(), result.lengths[:, 0].tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a trained encoder-decoder")
    parser.add_argument("--out", type=Path, required=True, help="the run folder to make")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: choose another --out")
    saved = run_folder.SavedWeights(options.run)
    vocabulary = open_checkpoint(options.run).text.vocabularies[0]
    found = data.open_dataset(saved.run.data, "test")
    rows = [
        [*map(int, vocabulary.encode(found.inputs_text(n))), vocabulary.eos] for n in range(TEXTS)
    ]
    seen = {token for row in rows for token in row}
    unused = next(word for word in range(3, saved.run.model.vocab) if word not in seen)
    cfg = widened(saved.run.model)
    run = dataclasses.replace(saved.run, model=cfg, model_dir=str(options.out))
    transfer.write_run_folder(Padded(saved, cfg, unused), run, options.out, None, lambda done: None)
    shutil.copytree(options.run / "vocabulary", options.out / "vocabulary")
    length = saved.run.decode.max_new_tokens
    pairs = zip(texts(options.run, rows, length), texts(options.out, rows, length), strict=True)
    print(f"{options.out}: {sum(a == b for a, b in pairs)} of {TEXTS} texts are the small model's")


if __name__ == "__main__":
    main()
