# SPDX-License-Identifier: Apache-2.0
"""Tokens per forward pass with blockwise heads (Stern et al., 2018, table 1).

A trained model of spelling to phonemes gets heads in four ways: frozen or trained along, on the
original targets or on what it says itself of the same words (self-distilled). Every model then
writes the test words plainly and with blocks of k tokens; the ids are compared.

  python benchmarks/heads.py --trunk runs/g2p [--folder runs/heads] [--steps 1500] [--words 1000]
      [--shapes] [--json FILE] [--plot FILE.png]

The trunk is a run of configs/runs/g2p.gin. What was trained before is not trained again: the same
command goes on after an interruption. t5x_lite has to be installed (`pip install -e .`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import heads_plot
import jax
import numpy as np
import report
import training_runs

from t5x_lite import config, decoding
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.data import corpora
from t5x_lite.decoding import protocol
from t5x_lite.decoding.drafters import blockwise, medusa, refined, trees
from t5x_lite.evaluation import metrics

BLOCKS = (2, 4, 8)
BATCH = 64
# Bigrams are learned of every tenth training word.
DISTANCE = 10
PACKAGES = ["jax", "jaxlib", "flax", "optax"]
FROZEN, JOINT = "configs/runs/heads_g2p.gin", "configs/runs/heads_g2p_tuned.gin"
DISTILLED = "configs/data/g2p_distilled.gin"


class Variant(NamedTuple):
    """One training: its row of the table, and the blocks that its heads can write."""

    name: str
    files: tuple[str, ...]
    bindings: tuple[str, ...]
    blocks: tuple[int, ...]

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_").replace(",", "")

    @property
    def kind(self) -> str:
        """The name without the size of a block."""
        return self.name.rpartition(" ")[0] if self.name[-1].isdigit() else self.name


def variants(shapes: bool) -> list[Variant]:
    """Frozen heads do not depend on one another: those of a block of 8 serve smaller ones too."""
    sources = (("", ()), (", distilled", (DISTILLED,)))
    made = [Variant(f"frozen{data}", (FROZEN, *files), (), BLOCKS) for data, files in sources]
    for block in BLOCKS[::-1]:
        size = f"config.DraftHeads.block={block}"
        for data, files in sources:
            made.append(Variant(f"fine-tuned{data} {block}", (JOINT, *files), (size,), (block,)))
    if shapes:
        for shape, mlp in (("stern", 256), ("medusa", None), ("hydra", None)):
            bound = (f"config.DraftHeads.shape={shape}", f"config.DraftHeads.mlp={mlp}")
            made.append(Variant(f"frozen {shape}", (FROZEN,), bound, BLOCKS))
    return made


def self_said(options: argparse.Namespace) -> Path:
    """The file with what the trunk says of the training words."""
    words, said = options.folder / "words.txt", options.folder / "said.jsonl"
    words.parent.mkdir(parents=True, exist_ok=True)
    rows = corpora.cmudict_rows("train", stress=False)
    kept = list(dict.fromkeys(row.inputs for row in rows))
    words.write_text("".join(f"{word}\n" for word in kept[:: options.every]))
    command = [sys.executable, "-m", "t5x_lite.infer", f"--checkpoint={options.trunk}"]
    subprocess.run([*command, f"--input={words}", f"--output={said}"], check=True)
    return said


def train(variant: Variant, options: argparse.Namespace) -> Path:
    """The folder of the variant's finished run."""
    folder = options.folder / variant.folder
    bindings = [f"INITIAL_CHECKPOINT_PATH={options.trunk}", f"TRAIN_STEPS={options.steps}"]
    bindings += ["config.Evaluate.examples=0", "config.Evaluate.batches=0"]
    if DISTILLED in variant.files:
        said = f"config.Files.train={self_said(options)}"
        bindings += [said, f"config.Vocabulary.path={options.trunk}"]
    training_runs.finish(folder, variant.files, [*bindings, *variant.bindings])
    return folder


class Words(NamedTuple):
    """Held-out words and how they may be spoken."""

    texts: list[str]
    spoken: list[list[str]]


class Writer:
    """A model that writes the words, in batches, by any drafter."""

    def __init__(self, folder: Path, words: Words):
        self.restored, self.words = open_checkpoint(folder).load(), words
        self.cfg = self.restored.run.model
        self.params = decoding.prepare_params(self.cfg, self.restored.params)
        inputs, self.targets = self.restored.vocabularies
        self.ids = [[*map(int, ids), inputs.eos] for ids in inputs.encode_all(words.texts)]
        self.decode = config.Decode(max_new_tokens=40)

    def result(self, rows: range, drafting: decoding.Drafting) -> decoding.Result:
        """Decoded outputs of the words of these rows."""
        ids = [self.ids[row] for row in rows]
        request = decoding.make_request(
            self.cfg, ids, self.decode, batch=BATCH, eos=self.targets.stops
        )
        return decoding.generate(self.cfg, self.params, request, self.decode, drafting)

    def all(self, drafting: decoding.Drafting) -> list[decoding.Result]:
        starts = range(0, len(self.ids), BATCH)
        return [self.result(range(i, min(i + BATCH, len(self.ids))), drafting) for i in starts]

    def errors(self, results: list[decoding.Result]) -> dict[str, float]:
        """Phoneme and word error rate of what was written, in per cent."""
        rows = [
            row for result in results for row in zip(result.tokens, result.lengths, strict=True)
        ]
        texts = [
            self.targets.decode(ids[0, : length[0]].tolist())
            for (ids, length), _ in zip(rows, self.ids, strict=False)
        ]
        return metrics.measure_metrics(("per", "wer"), texts, self.words.spoken)


def calls(result: decoding.Result) -> np.ndarray:
    """Number of forward passes of each row; a row that only fills up the batch took none."""
    last = np.maximum(result.lengths[:, 0] - 1, 0)
    counted = np.take_along_axis(result.token_step[:, 0], last[:, None], axis=1)[:, 0] + 1
    return np.where(result.lengths[:, 0] > 0, counted, 0)


def per_call(results: list[decoding.Result]) -> dict[str, float]:
    """Tokens per forward pass of a row, and the same after the first, which has no drafts yet."""
    lengths = np.concatenate([result.lengths[:, 0] for result in results])
    counted = np.concatenate([calls(result) for result in results])
    later, rows = counted.sum() - (counted > 0).sum(), (counted > 0).sum()
    return {
        "tokens per call": lengths.sum() / counted.sum(),
        "tokens per call after the first": (lengths.sum() - rows) / max(later, 1),
    }


def accepted(results: list[decoding.Result], block: int) -> list[float]:
    """Share of the passes after the first in which the draft of head 1, 2, ... was accepted."""
    nodes = np.concatenate([result.token_node[:, 0] for result in results])
    counted = np.concatenate([calls(result) for result in results])
    later = max(counted.sum() - (counted > 0).sum(), 1)
    return [float((nodes == head).sum() / later) for head in range(1, block)]


def same(results: list[decoding.Result], others: list[decoding.Result]) -> float:
    """Per cent of the rows with the same ids."""
    equal = [
        np.all(a.tokens == b.tokens, axis=(1, 2)) for a, b in zip(results, others, strict=True)
    ]
    return 100 * float(np.concatenate(equal).mean())


def seconds(writer: Writer, made: dict[Any, decoding.Drafting], turns: int) -> dict[Any, float]:
    """The median time to write the first batch of words, all taking turns."""
    found: dict[Any, list[float]] = {case: [] for case in made}
    for _ in range(turns):
        for case, drafting in made.items():
            begin = time.perf_counter()
            writer.result(range(min(BATCH, len(writer.ids))), drafting)
            found[case].append(time.perf_counter() - begin)
    return {case: statistics.median(times) for case, times in found.items()}


def draftings(variant: Variant, writer: Writer) -> dict[tuple[str, str], decoding.Drafting]:
    """Drafting by case and system: chains of every size; for frozen heads better ones too."""
    made = {("k = 1", variant.kind): decoding.Drafting()}
    for block in variant.blocks:
        drafter = blockwise.Blockwise(protocol.chain(block))
        made[f"k = {block}", variant.kind] = decoding.Drafting(drafter)
    if variant.name != "frozen":
        return made
    rows = corpora.cmudict_rows("train", stress=False)
    texts = writer.targets.encode_all([row.targets for row in rows][::DISTANCE])
    said = [[*map(int, ids), writer.targets.eos] for ids in texts]
    learned = refined.fit_bigrams(said, vocab=writer.cfg.vocab)
    for block in variant.blocks[1:]:
        drafter = refined.Refined(protocol.chain(block), share=0.0)
        made[f"k = {block}", "frozen, refined"] = decoding.Drafting(drafter, learned)
    for nodes in (8, 16):
        drafter = medusa.Medusa(trees.best_tree_of_heads(nodes, medusa.CHANCES))
        made[f"k = {nodes}", "frozen, tree"] = decoding.Drafting(drafter)
    return made


def measured(variant: Variant, folder: Path, words: Words) -> list[report.Row]:
    """The rows of one model: plainly, and with each block."""
    writer = Writer(folder, words)
    made = draftings(variant, writer)
    plain, rows = None, []
    for (case, system), drafting in made.items():
        results = writer.all(drafting)
        plain = plain or results
        values = per_call(results) | {"same ids as plain, %": same(results, plain)}
        values |= writer.errors(results)
        if drafting.drafter.tree.is_chain:
            shares = accepted(results, drafting.drafter.tree.width)
            values |= {f"draft {i} accepted": share for i, share in enumerate(shares, start=1)}
        rows += [report.Row(case, system, metric, value) for metric, value in values.items()]
    times = seconds(writer, made, turns=7)
    for (case, system), taken in times.items():
        faster = times["k = 1", variant.kind] / taken
        rows.append(report.Row(case, system, "times faster", faster))
    # A model trained for one block: that block's rows have what it writes plainly.
    return rows if len(variant.blocks) > 1 else [row for row in rows if row.case != "k = 1"]


def kept(variant: Variant, options: argparse.Namespace, words: Words) -> list[report.Row]:
    """The rows of the variant, measured once: the file beside its run has them from then on."""
    folder = train(variant, options)
    file = folder / f"measured_{len(words.texts)}.json"
    if not file.exists():
        report.write(file, measured(variant, folder, words), PACKAGES)
        jax.clear_caches()
    return [report.Row(**row) for row in json.loads(file.read_text())["rows"]]


def held_out(count: int) -> Words:
    rows = list(corpora.cmudict_rows("test", stress=False))[:count]
    return Words([row.inputs for row in rows], [list(row.references) for row in rows])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", type=Path, required=True, help="a run of configs/runs/g2p.gin")
    parser.add_argument("--folder", type=Path, default=Path("runs/heads"), help="where to train")
    parser.add_argument("--steps", type=int, default=1500, help="steps of each training")
    parser.add_argument("--words", type=int, default=1000, help="held-out words that are written")
    parser.add_argument("--every", type=int, default=4, help="distil every n-th training word")
    parser.add_argument("--shapes", action="store_true", help="the other shapes of heads too")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="draw tokens per call against k into this file")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    words = held_out(options.words)
    rows: list[report.Row] = []
    for variant in variants(options.shapes):
        rows += kept(variant, options, words)
        if options.json:
            report.write(options.json, rows, PACKAGES)
    print(report.table(rows))
    if options.plot:
        heads_plot.draw(rows, options.plot)


if __name__ == "__main__":
    main()
