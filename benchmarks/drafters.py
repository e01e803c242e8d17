# SPDX-License-Identifier: Apache-2.0
"""Tokens per forward pass with drafters that need no model, by drafter.

SmolLM2-135M continues code and prose of Python's own library, greedily; g2p spells words. Texts
are those of plain decoding, which is checked. Cases that the JSON file has are not run again.

  python benchmarks/drafters.py --smollm2 FILE.gguf --g2p RUN_FOLDER [--json FILE] [--only NAME ...]
"""

import argparse
import heapq
import inspect
import json
import pdb
import random
import shlex
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report

from t5x_lite import config, decoding, interactive
from t5x_lite.decoding.acceptance import stats
from t5x_lite.decoding.drafters import trees
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.lookahead import Lookahead
from t5x_lite.decoding.drafters.lookup import Lookup
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling, count_successors
from t5x_lite.decoding.drafters.trigram import Trigram
from t5x_lite.decoding.drafters.union import draft_sources, union
from t5x_lite.decoding.generation import PLAIN
from t5x_lite.decoding.protocol import chain

PACKAGES = ["jax", "jaxlib", "flax", "gguf"]
BEGUN = "recycling 16, begun with other texts"
DRAFTERS = {
    "plain": PLAIN.drafter,
    "lookup 8": Lookup(chain(8)),
    "trigram 8": Trigram(chain(8)),
    "trigram 12, a tree": Trigram(trees.best_tree(12, (0.5, 0.2, 0.1))),
    "recycling 16": Recycling(trees.best_tree(16, CHANCES)),
    "recycling 32": Recycling(trees.best_tree(32, CHANCES)),
    BEGUN: Recycling(trees.best_tree(16, CHANCES)),
    "jacobi 8": Jacobi(chain(8)),
    "lookahead 5 4 5": Lookahead(5, 4, 5),
    "lookup 8 + recycling 16": union(Lookup(chain(8)), Recycling(trees.best_tree(16, CHANCES))),
    "lookup 8 + trigram 8": union(Lookup(chain(8)), Trigram(chain(8))),
}
SOURCES = {
    "code": (textwrap.TextWrapper, shlex.shlex),
    "prose": (heapq.__about__, pdb.__doc__),
}
OTHERS = (argparse, json.decoder, inspect, random)
PROMPT, LENGTH = 128, 64


class Case(NamedTuple):
    """Rows of ids to go on with, by which model, and other texts of the kind.

    Every row belongs to one of kinds.
    """

    session: Any
    rows: list[list[int]]
    kinds: list[str]
    decode: config.Decode
    others: list[list[int]]


def continued(path: str) -> Case:
    """The first PROMPT ids of sources and essays, for a decoder-only model."""
    session = interactive.load(path)
    texts = [(kind, each) for kind, several in SOURCES.items() for each in several]
    texts = [
        (kind, each if isinstance(each, str) else inspect.getsource(each)) for kind, each in texts
    ]
    rows = [ids[:PROMPT] for ids in session.predictor.encode_inputs([text for _, text in texts])]
    others = session.predictor.encode_targets([inspect.getsource(each) for each in OTHERS])
    kinds = [kind for kind, _ in texts]
    return Case(session, rows, kinds, config.Decode(max_new_tokens=LENGTH), others)


def spelled(path: str, words: int = 32) -> Case:
    """Held-out words of a g2p run."""
    session = interactive.load(path)
    lines = sorted(Path(path, "predictions").glob("*.jsonl"))[-1].read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    predictor, start = session.predictor, session.predictor.cfg.decoder_start_token_id
    rows = predictor.encode_inputs([pair["input"] for pair in pairs[:words]])
    others = predictor.encode_targets([pair["prediction"] for pair in pairs[words:]])
    begun = [[start, *other] for other in others]
    return Case(session, rows, ["g2p"] * words, config.Decode(max_new_tokens=32), begun)


def measured(case: Case, name: str, plain: decoding.Result | None) -> tuple[list, decoding.Result]:
    """Rows of the report for one drafter, and what it wrote."""
    predictor, drafter = case.session.predictor, DRAFTERS[name]
    eos = predictor.targets.stops
    request = decoding.make_request(predictor.cfg, case.rows, case.decode, eos=eos)
    weights = count_successors(case.others) if name == BEGUN else None
    drafting = decoding.Drafting(drafter, weights)
    result = decoding.generate(predictor.cfg, predictor.params, request, case.decode, drafting)
    if plain is not None and not np.array_equal(result.tokens, plain.tokens):
        raise SystemExit(f"{name} wrote another text than plain decoding")
    rows = []
    for kind in dict.fromkeys(case.kinds):
        own = np.array([each == kind for each in case.kinds])
        each = ("tokens", "lengths", "call", "node")
        part = result._replace(**{field: getattr(result, field)[own] for field in each})
        count = stats.AcceptanceStats()
        count.add(part, draft_sources(drafter), int(own.sum()))
        rows.append(report.Row(kind, name, "tokens per call", round(count.tokens_per_step, 3)))
        for source, tokens in count.drafted.items():
            share = round(tokens / count.tokens, 3)
            rows.append(report.Row(kind, name, f"share drafted by {source}", share))
        if "recycling" in name and "+" not in name:
            rows += [report.Row(kind, name, *each) for each in held(part, drafter.tree)]
    return rows, result


def held(result: decoding.Result, tree) -> list[tuple[str, float]]:
    """Rate at which the draft of each rank was accepted below an accepted node."""
    rank = trees.ranks(tree)
    children = [
        {rank[i] for i, of in enumerate(tree.parents) if of == node} for node in range(tree.width)
    ]
    tried, right = np.zeros(8), np.zeros(8)
    for row, length in enumerate(result.lengths[:, 0]):
        call, node = result.token_step[row, 0, :length], result.token_node[row, 0, :length]
        for number in range(call.max() + 1):
            path = [0, *(int(each) for each in node[call == number] if each)]
            for at in path:
                tried[list(children[at])] += 1
            np.add.at(right, rank[path[1:]], 1)
    return [
        (f"drafts of rank {i} accepted", round(right[i] / tried[i], 4))
        for i in range(8)
        if tried[i]
    ]


def known(path: Path) -> list[report.Row]:
    return (
        [report.Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smollm2", metavar="FILE", help="SmolLM2 as a .gguf file")
    parser.add_argument("--g2p", metavar="FOLDER", help="MODEL_DIR of configs/runs/g2p.gin")
    parser.add_argument("--json", default="benchmarks/results/drafters.json", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(DRAFTERS), help="some drafters")
    options = parser.parse_args()
    rows = known(options.json)
    for make, path in ((spelled, options.g2p), (continued, options.smollm2)):
        if not path:
            continue
        case, plain = make(path), None
        done = {row.system for row in rows if row.case in case.kinds}
        names = [name for name in options.only or DRAFTERS if name not in done]
        for number, name in enumerate(["plain", *names] if names else []):
            print(f"{case.kinds[0]}: {name} ({number} of {len(names)})", flush=True)
            found, result = measured(case, name, plain)
            plain = plain or result
            rows += found if name not in done else []
            done.add(name)
            report.write(options.json, rows, PACKAGES)
    print(report.table([row for row in rows if row.metric == "tokens per call"]))


if __name__ == "__main__":
    main()
