# SPDX-License-Identifier: Apache-2.0
"""Largest differences to transformers over models of a family whose sizes are drawn by seed.

For each seed the same weights and ids go through both libraries in float32: the encoder's output,
the logits in one pass, and the logits token by token over a cache. The tests compare each with a
tolerance of 1e-4; this records how near they come. Families are those of tests/laws/families.py.

  python benchmarks/parity.py bart [mbart ...] [--seeds 50] [--quick] [--json FILE]

With --json, rows of other families that the file has already are kept.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "laws"))
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled as in the tests: these models are compiled far longer than they run.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import encoder_decoder_parity as law
import jax
import numpy as np
import parity
from families import FAMILIES

PACKAGES = ["jax", "transformers", "torch"]
FAMILIES = {name: each for name, each in FAMILIES.items() if each.laws is law}


def measure_seed(name: str, seed: int) -> dict[str, float]:
    """Largest differences of one model, by what is compared.

    Args:
      name: family.
      seed: of its sizes and weights.
    """
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as folder:
        pair = parity.read(family.draw(seed), Path(folder))
    pair = pair._replace(cfg=family.adjust(pair.cfg))
    start = pair.cfg.decoder_start_token_id if family.start is None else family.start
    ids = family.ids(law.drawn_ids(pair.cfg.vocab, start, 5))
    encoded, logits = law.their_results(pair.theirs, ids)
    our_encoded, our_logits = law.our_results(pair, ids)
    cached = law.their_cached_logits(pair.theirs, ids)
    our_cached = law.our_cached_logits(pair, ids)
    jax.clear_caches()
    return {
        "encoder output": float(np.abs(our_encoded - encoded)[ids.exists].max()),
        "logits": float(np.abs(our_logits - logits).max()),
        "logits over a cache": float(np.abs(our_cached - cached).max()),
    }


def measure_family(name: str, seeds: int) -> list[report.Row]:
    """Rows of one family: maxima over seeds 0, 1, 2 ...

    Args:
      name: family.
      seeds: number of models.
    """
    worst: dict[str, float] = {}
    for seed in range(seeds):
        for what, value in measure_seed(name, seed).items():
            worst[what] = max(worst.get(what, 0.0), value)
        print(f"{name}, seed {seed}: {worst}", file=sys.stderr, flush=True)
    case = f"{seeds} models drawn by seed"
    return [report.Row(case, name, f"{what}, largest difference", worst[what]) for what in worst]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="+", choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    if args.json and Path(args.json).exists():
        kept = json.loads(Path(args.json).read_text())["rows"]
        rows = [report.Row(**row) for row in kept if row["system"] not in args.families]
    for name in args.families:
        rows += measure_family(name, 2 if args.quick else args.seeds)
        if args.json:
            report.write(args.json, rows, PACKAGES)
    print(report.table(rows))


if __name__ == "__main__":
    main()
