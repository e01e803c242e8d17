# SPDX-License-Identifier: Apache-2.0
"""Speed of attention kernels on this accelerator, also relative to its memory bandwidth.

Whole rows: our kernels (Mosaic GPU or Triton on a GPU, Mosaic on a TPU) and plain XLA, beside
jax.nn.dot_product_attention (XLA, and cuDNN on a GPU) and PyTorch (scaled_dot_product_attention,
FlexAttention). bfloat16, 8 heads, as many rows as make 16,384 tokens; with T5's bias of 32 buckets
and without, causal and bidirectional, forward, and forward with backward. Every system gets the
order of axes that it likes best. Those that read the bias as an array get it ready made, as layers
share it: its making is not in their time, its gradient is. Ours make it from the table inside.

Decoding: 1 or 8 new tokens in each of 16 rows over full caches, as many layers as make 1 GiB of
keys and values; GB/s of these, beside GB/s of a copy on the same card in the same turns.

  python benchmarks/attention.py [--lengths 2048 8192 16384] [--only rows decoding] [--json FILE]
  python benchmarks/attention.py --quick        # tiny, on any machine: do the systems agree?

JAX and PyTorch have a process each, and systems take turns: after warming up, as many calls in a
row as last 20 ms, then the next system; medians of the turns. A system whose context or gradient is
not the others' gets no time but a note, and so does one that runs out of memory: JAX may take 70 %
of the card's, PyTorch what is left. Needs t5x_lite with the extra cuda or tpu, and for PyTorch's
rows a torch that sees the GPU. Milliseconds: less is better, and "t5x_lite / it" below 1 says that
ours are faster. GB/s: more is better, and beside "copy" it is the share of the copy's speed.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import report
from attention_systems import COPY, FLEX, FRAMEWORKS, OURS, PLAIN, Case

PACKAGES = ["jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "libtpu", "torch", "triton"]
# Deviations of what bfloat16 computes, in shares of the largest value.
TOLERANCE = 3e-2
QUICK = dict(lengths=[32, 200], head_dims=[64], caches=[64, 300], tokens=64, turns=2)


def cases(options: argparse.Namespace) -> list[Case]:
    heads, found = 2 if options.quick else 8, []
    if "rows" in options.only:
        each = (options.lengths, options.head_dims, (True, False), (False, True), (False, True))
        for length, size, biased, causal, backward in itertools.product(*each):
            rows = max(1, options.tokens // length)
            found.append(Case(length, rows, heads, size, biased, causal, backward))
    if "decoding" in options.only:
        each = (options.caches, options.head_dims, (1, 8))
        for length, size, width in itertools.product(*each):
            case = Case(length, 2 if options.quick else 16, heads, size, True, width=width)
            layers = 1 if options.quick else max(1, min(16, 2**30 // case.cache_bytes))
            found.append(replace(case, layers=layers))
    return found


class Worker:
    """A framework in a process of its own; one that dies is started again when needed."""

    def __init__(self, framework: str):
        self.framework, self.process = framework, None
        self.opened = self.start()

    def start(self) -> dict:
        command = [sys.executable, str(Path(__file__).with_name("attention_systems.py"))]
        others = ("T5X_LITE_ATTENTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
        environment = {name: x for name, x in os.environ.items() if name not in others}
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": "0.7"}
        if self.framework == "PyTorch":
            environment["JAX_PLATFORMS"] = "cpu"  # there it computes the numbers of the bias alone
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([*command, self.framework], env=environment, **pipes)
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        ended, self.process = self.process.wait(), None
        return {"note": f"its process ended with {ended}"}

    def ask(self, question: str, **given) -> dict:
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({"ask": question} | given) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()


def skipped(system: str, case: Case, platform: str, options: argparse.Namespace) -> str:
    """Why a system is not tried, or an empty string."""
    tiniest = min(options.caches if case.width else options.lengths)
    if system == OURS and platform == "cpu" and case.length > tiniest:
        return "interpreted here: only the shortest is tried"
    return ""


def systems_of(case: Case, workers: dict[str, Worker]) -> dict[str, Worker]:
    """Systems measured in this case, with the worker of each."""
    if case.width:
        return dict.fromkeys((OURS, PLAIN, COPY), workers["JAX"])
    return {name: one for one in workers.values() for name in one.opened["systems"]}


def deviation(found: list[list[float]], wanted: list[list[float]]) -> float:
    """The largest, in shares of the largest value."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(found, wanted, strict=True)]
    return max((float(np.max(np.abs(x - y)) / np.max(np.abs(y))) for x, y in pairs), default=0.0)


def prepared(case: Case, systems: dict[str, Worker], options: argparse.Namespace):
    """Bytes moved of every system that can, and a note of every other."""
    moved, notes, wanted = {}, {}, None
    # Plain XLA first: the others are compared with it, where it fits.
    for system in sorted(systems, key=lambda name: name != PLAIN):
        worker = systems[system]
        notes[system] = skipped(system, case, worker.opened["platform"], options)
        if notes[system]:
            continue
        least = 0.0 if options.quick else 0.02
        reply = worker.ask("prepare", system=system, case=asdict(case), least=least)
        if "note" in reply:
            notes[system] = reply["note"]
            continue
        wanted = wanted or reply["values"]
        far = deviation(reply["values"], wanted) if reply["values"] else 0.0
        if not far < TOLERANCE:
            notes[system] = f"differs from the others by {far:.1e} of the largest value"
            continue
        moved[system] = reply["moved"]
    return moved, notes


def measure(case: Case, workers: dict[str, Worker], options) -> list[report.Row]:
    systems = systems_of(case, workers)
    moved, notes = prepared(case, systems, options)
    times: dict[str, list[float]] = {system: [] for system in moved}
    for _, system in itertools.product(range(options.turns), moved):
        reply = systems[system].ask("turn", system=system)
        notes[system] = reply.get("note", "")
        times[system] += [reply["seconds"]] if "seconds" in reply else []
    for worker in set(systems.values()):
        worker.ask("forget")
    rows, metric = [], "GB/s" if case.width else "milliseconds"
    for system in systems:
        value = None
        if times.get(system) and not notes[system]:
            seconds = statistics.median(times[system])
            value = moved[system] / seconds / 1e9 if case.width else 1e3 * seconds
        rows.append(report.Row(case.name, system, metric, value, notes[system]))
    return rows


def opened(workers: dict[str, Worker]) -> list[report.Row]:
    """Device and versions of each framework; drops those that cannot run here, with the reason."""
    rows, platform = [], workers["JAX"].opened.get("platform")
    for name, worker in list(workers.items()):
        reply, reason = worker.opened, ""
        if "systems" not in reply:
            reason = f"not there: {reply.get('missing') or reply['note']}"
        elif name == "PyTorch" and reply["platform"] != platform:
            reason = f"sees no {platform} here"
        if reason:
            worker.close()
            del workers[name]
        rows.append(report.Row("device", name, "", None, reason or reply["device"]))
    if platform == "cpu":
        rows.append(report.Row("device", FLEX, "", None, "needs a GPU"))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = functools.partial(parser.add_argument, type=int, nargs="+")
    whole("--lengths", default=[2048, 8192, 16384], help="tokens of a row")
    whole("--caches", default=[1024, 4096, 32768], help="slots of a cache")
    whole("--head-dims", default=[64, 128], help="sizes of a head")
    parser.add_argument("--tokens", type=int, default=16384, help="rows times length, at least")
    parser.add_argument("--turns", type=int, default=7, help="turns of each system")
    both = ["rows", "decoding"]
    parser.add_argument("--only", nargs="+", choices=both, default=both, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="tiny, 2 turns; times mean nothing")
    parser.add_argument("--json", help="also write the rows to this file")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    workers = {framework: Worker(framework) for framework in FRAMEWORKS}
    rows = opened(workers)
    print(report.table(rows), flush=True)
    if "JAX" not in workers:
        return 2
    if workers["JAX"].opened["platform"] == "cpu" and not options.quick:
        print("JAX sees no GPU or TPU; --quick tries the script without one", file=sys.stderr)
        return 2
    for case in cases(options):
        new = measure(case, workers, options)
        print("\n" + report.table(new), flush=True)
        rows += new
        if options.json:
            report.write(options.json, rows, PACKAGES)
    for worker in workers.values():
        worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
