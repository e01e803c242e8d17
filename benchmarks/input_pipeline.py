# SPDX-License-Identifier: Apache-2.0
"""Packed examples per second that reach a training step from cached tokens.

The same task, ids, lengths and batch size go through t5x_lite, seqio (EncDecFeatureConverter with
packing, as T5X reads) and grain (its first-fit packing), in turns, on this machine.

  python benchmarks/input_pipeline.py [--quick] [--json benchmarks/results/input_pipeline.json]
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import report

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from t5x_lite import config, data

BATCH = 32
CASES = {
    "cmudict_g2p 256+512": config.Data("cmudict_g2p", {"inputs": 256, "targets": 512}),
    "cmudict_g2p 64+64": config.Data("cmudict_g2p", {"inputs": 64, "targets": 64}),
    "stdlib_docstrings 1024+256": config.Data(
        "stdlib_docstrings", {"inputs": 1024, "targets": 256}
    ),
}
PACKAGES = ["numpy", "seqio", "tensorflow", "grain"]

Segments = Iterator[np.ndarray]  # target segments [rows length] of each batch


def ours(cfg: config.Data) -> Segments:
    batches = data.open_batches(cfg, "encoder_decoder", BATCH, seed=0)
    step = 0
    while True:
        yield batches.at(step).target_segments
        step += 1


def examples(cfg: config.Data) -> list[dict[str, np.ndarray]]:
    """The cached ids, trimmed to the lengths, in memory."""
    dataset = data.open_dataset(cfg, "train")
    pairs = (dataset.ids(i) for i in range(len(dataset)))
    limits = cfg.lengths["inputs"], cfg.lengths["targets"]
    return [
        {
            "inputs": np.array(inputs[: limits[0]], np.int32),
            "targets": np.array(targets[: limits[1]], np.int32),
        }
        for inputs, targets in pairs
    ]


def seqio_batches(cfg: config.Data) -> Segments:
    """Batches as T5X reads them: seqio.get_dataset over ids that are in memory already."""
    import seqio
    import tensorflow as tf

    found = examples(cfg)
    ragged = {
        name: tf.ragged.constant([each[name] for each in found], dtype=tf.int32)
        for name in ("inputs", "targets")
    }

    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(ragged)

    name = "cached_" + "_".join([cfg.task, *map(str, cfg.lengths.values())])
    vocabulary = seqio.PassThroughVocabulary(2**15, eos_id=1)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, ["train"]),
        preprocessors=[],
        output_features={side: seqio.Feature(vocabulary) for side in ("inputs", "targets")},
        shuffle_buffer_size=10_000,
    )
    dataset = seqio.get_dataset(
        name,
        cfg.lengths,
        seqio.EncDecFeatureConverter(pack=True),
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=BATCH,
    )
    for batch in dataset.as_numpy_iterator():
        yield batch["decoder_segment_ids"]


def grain_batches(cfg: config.Data) -> Segments:
    """grain's MapDataset, shuffled, with its first-fit packing of 32 open rows."""
    import grain

    dataset = grain.MapDataset.source(examples(cfg)).shuffle(seed=0).repeat().to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset, length_struct=dict(cfg.lengths), num_packing_bins=BATCH
    )
    for batch in packed.batch(BATCH):
        yield np.asarray(batch["targets_segment_ids"])


SYSTEMS: dict[str, Callable[[config.Data], Segments]] = {
    "t5x_lite": ours,
    "seqio": seqio_batches,
    "grain": grain_batches,
}


def run(batches: Segments, seconds: float) -> tuple[float, float, float]:
    """Examples and rows per second over some seconds, and the share of target places filled."""
    count = rows = filled = places = 0
    begin = time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        segments = next(batches)
        count += int(segments.max(axis=1).sum())
        rows += len(segments)
        filled += int((segments > 0).sum())
        places += segments.size
    return count / passed, rows / passed, filled / places


def measure(case: str, cfg: config.Data, rounds: int, seconds: float) -> list[report.Row]:
    """All systems in turns, `rounds` times; the median of each."""
    rows, opened = [], {}
    for system, opener in SYSTEMS.items():
        try:
            batches = opener(cfg)
            next(batches)  # tracing, planning and threads are not what is measured
            opened[system] = batches
        except ImportError as error:
            rows.append(report.Row(case, system, "examples/s", None, f"not installed: {error}"))
    seen = {system: [] for system in opened}
    for _ in range(rounds):
        for system, batches in opened.items():
            seen[system].append(run(batches, seconds))
    for column, metric in enumerate(("examples/s", "rows/s", "target fill")):
        for system, runs in seen.items():
            value = statistics.median(each[column] for each in runs)
            rows.append(report.Row(case, system, metric, value))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one case, one short round")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    cases = dict(list(CASES.items())[:1]) if options.quick else CASES
    rounds, seconds = (1, 2.0) if options.quick else (5, 4.0)
    rows = [row for case, cfg in cases.items() for row in measure(case, cfg, rounds, seconds)]
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
