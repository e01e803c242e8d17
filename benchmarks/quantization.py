# SPDX-License-Identifier: Apache-2.0
"""Cost of 8 and 4 bits to an encoder-decoder and to its decoder-only twin.

Takes finished runs of the same task and measures each with its layers' matrices rounded in every
way: test loss (nats per target token), phoneme and word error rate of words decoded greedily, bytes
of the weights, and processor seconds of all threads for decoding a batch (the least of some times,
as compiled; on a CPU they are of more use than the clock where others work too). Rows already in
the JSON file are not measured again.

  python benchmarks/quantization.py [--runs runs/g2p runs/g2p_decoder] [--examples 1000]
      [--kinds whole int8 int4 ...] [--json benchmarks/results/quantization.json]
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

PACKAGES = ["jax", "jaxlib", "flax"]
WHOLE = "whole"
KINDS = [WHOLE, "int8", "int4", "int4:32", "int8_activations", "int4_int8_activations"]
KINDS += ["int4_activations", "int4_activations:32"]
TIMES = 3


def measure(folder: str, kind: str, examples: int) -> list[report.Row]:
    """A run's newest weights, rounded as `kind` says."""
    import jax

    from t5x_lite import config
    from t5x_lite.checkpoints.opening import open_checkpoint
    from t5x_lite.evaluation import evaluate, predict
    from t5x_lite.model import quantization

    restored = open_checkpoint(folder).load(config.Mesh(), None if kind == WHOLE else kind)
    with tempfile.TemporaryDirectory() as kept:
        settings = dataclasses.replace(restored.run.evaluate, examples=examples, batches=20)
        greedy = config.Decode(max_new_tokens=restored.run.decode.max_new_tokens)
        run = dataclasses.replace(
            restored.run, evaluate=settings, decode=greedy, model_dir=str(kept)
        )
        found = evaluate.Evaluator(run, "test")
        numbers = found(restored.params, restored.step)
    towers = [restored.params[name] for name in ("encoder", "decoder") if name in restored.params]
    layers = [tower["layers"] for tower in towers]
    numbers["layers, KB"] = quantization.weight_bytes(layers) / 1e3
    numbers["weights, KB"] = quantization.weight_bytes(restored.params) / 1e3
    predictor = predict.Predictor(run.model, restored.params, restored.vocabularies)
    texts = [found.dataset.inputs_text(place) for place in range(64)]
    seconds = min(spent(predictor, texts, greedy) for _ in range(TIMES + 1))
    numbers["CPU seconds, 64 words"] = seconds
    jax.clear_caches()
    wanted = ("loss", "per", "wer", "layers, KB", "weights, KB", "CPU seconds, 64 words")
    case = f"{Path(folder).name} step {restored.step}"
    return [report.Row(case, kind, name, round(numbers[name], 4)) for name in wanted]


def spent(predictor: Any, texts: list[str], decode: Any) -> float:
    """Processor seconds, of all threads, for one batch."""
    began = time.process_time()
    predictor.predict(texts, decode)
    return time.process_time() - began


def kept_rows(path: str | None) -> list[report.Row]:
    """The rows of an earlier run of this."""
    if not path or not Path(path).exists():
        return []
    return [report.Row(**row) for row in json.loads(Path(path).read_text())["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=["runs/g2p", "runs/g2p_decoder"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    rows = kept_rows(given.json)
    wanted = [(folder, kind) for kind in given.kinds for folder in given.runs]
    began = time.monotonic()
    for number, (folder, kind) in enumerate(wanted, 1):
        there = {(row.case.partition(" ")[0], row.system) for row in rows}
        if (Path(folder).name, kind) not in there:
            rows += measure(folder, kind, given.examples)
            if given.json:
                report.write(given.json, rows, PACKAGES)
        left = (time.monotonic() - began) / number * (len(wanted) - number)
        print(f"{number}/{len(wanted)} {folder} {kind}, {left:,.0f} s left", file=sys.stderr)
    print(report.table(sorted(rows, key=lambda row: (row.metric, row.case))))


if __name__ == "__main__":
    main()
