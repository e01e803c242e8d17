# SPDX-License-Identifier: Apache-2.0
"""How do readers take files that are broken? Seeded mutations of small whole files, by format.

Every round breaks one file of a reader's (`tests/laws/fuzz_formats.py`) and reads it. A reader may
read it, or refuse it in a ValueError or OSError that names it. Everything else is a fault: a crash
(another exception, or a dead process), a hang (10 s of the processor), memory (1 GB more than
before), an error without a name, a file written. A fault is printed with its seed and round, which
give it again.

A target goes on after the rounds that --json already has with this seed, so that 100,000 rounds can
be run in pieces.

  python benchmarks/fuzz.py [--rounds 2000] [--seed 1] [--target gguf ...] [--seconds 400]
      [--json benchmarks/results/fuzz.json]
  python benchmarks/fuzz.py --target gguf --seed 7 --round 1234   # one round again
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import report

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests/laws")]
PACKAGES = ["gin-config", "jinja2", "tokenizers", "sentencepiece", "gguf", "tensorstore", "pyarrow"]
PACKAGES += ["orbax-checkpoint", "msgpack", "uvicorn", "jax"]
# A reader that waits for something takes no time of the processor.
SILENCE = 300
TOTAL = "all readers"
# Columns of the table, by the kind of a round (`fuzzing.KINDS`).
COLUMNS = {
    "read": "read",
    "refused": "refused by name",
    "crash": "crashes",
    "hang": "hangs over 10 s",
    "memory": "over 1 GB",
    "unnamed": "errors without a name",
    "writes": "files written",
}


def work(jobs: dict[str, range], seed: int, results: Connection) -> None:
    """Runs rounds by reader, in a process that a reader may end.

    Args:
      jobs: numbers of the rounds of each reader.
      seed: seed of the draws.
      results: receives (name, None) when a reader begins, then (name, (accepted, fault)).
    """
    # libtpu has a timer of its own with the signal of `fuzzing.limits`.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import fuzzing
    import jax

    from t5x_lite import sharding

    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))
    for name, rounds in jobs.items():
        with tempfile.TemporaryDirectory() as scratch:
            fuzzing.prepare(name, Path(scratch))
            results.send((name, None))
            for outcome in fuzzing.attack(name, Path(scratch), rounds, seed):
                results.send((name, outcome))
    results.close()


def outcomes(jobs: dict[str, range], seed: int) -> Iterator:
    """(name, (accepted, fault)) of every round, those that ended the process too."""
    import fuzzing

    processes, jobs = multiprocessing.get_context("spawn"), dict(jobs)
    while jobs:
        name, (received, results) = None, processes.Pipe(duplex=False)
        worker = processes.Process(target=work, args=(jobs, seed, results))
        worker.start()
        results.close()
        try:
            while received.poll(SILENCE):
                name, outcome = received.recv()
                while (first := next(iter(jobs))) != name:
                    del jobs[first]  # finished
                if outcome is not None:
                    jobs[name] = jobs[name][1:]
                    yield name, outcome
        except EOFError:
            worker.join()
        finally:
            worker.terminate()
            worker.join()
        if worker.exitcode == 0:
            return
        if not (name and jobs[name]):
            raise SystemExit(f"The reader after {name} cannot begin: see above")
        late = worker.exitcode in (-signal.SIGXCPU, -signal.SIGTERM)
        kind = fuzzing.HANG if late else fuzzing.CRASH
        what = f"the process ended with {worker.exitcode}"
        yield name, (False, fuzzing.Fault(name, seed, jobs[name].start, "?", kind, what))
        jobs[name] = jobs[name][1:]


def count_rounds(jobs: dict[str, range], seed: int, until: float) -> dict[str, collections.Counter]:
    """Rounds of each reader by their outcome, as many as there is time for.

    Args:
      jobs: numbers of the rounds of each reader.
      seed: seed of the draws.
      until: time.monotonic() at which to stop.
    """
    from t5x_lite.cli.progress import Progress

    counts = collections.defaultdict(collections.Counter)
    with Progress("rounds", sum(map(len, jobs.values()))) as progress:
        for done, (name, (accepted, fault)) in enumerate(outcomes(jobs, seed), 1):
            counts[name][fault.kind if fault else "read" if accepted else "refused"] += 1
            if fault:
                print(f"\n{fault}", flush=True)
            progress(done)
            if time.monotonic() > until:
                break
    return counts


def make_rows(seed: int, counts: dict[str, collections.Counter]) -> list[report.Row]:
    """The table of all readers, a line each, with their total."""
    rows = [report.Row("draws", "all", "seed", seed)]
    total = sum(counts.values(), collections.Counter())
    for name, each in (counts | {TOTAL: total}).items():
        rows.append(report.Row("inputs", "tried", name, each.total()))
        rows += [report.Row("inputs", column, name, each[k]) for k, column in COLUMNS.items()]
    return rows


def read_counts(path: str | None, seed: int) -> dict[str, collections.Counter]:
    """Rounds of every reader by outcome, as an earlier run of this seed wrote them."""
    if path is None or not Path(path).exists():
        return {}
    rows = [report.Row(**row) for row in json.loads(Path(path).read_text())["rows"]]
    if not any(row.case == "draws" and row.value == seed for row in rows):
        return {}
    kinds = {column: kind for kind, column in COLUMNS.items()}
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in rows:
        if row.case == "inputs" and row.metric != TOTAL and row.system in kinds:
            counts[row.metric][kinds[row.system]] = int(row.value)
    return counts


def main() -> None:
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2000, metavar="N", help="of each target")
    parser.add_argument("--round", type=int, metavar="N", help="this one alone")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    if args.round is not None:
        one = {name: range(args.round, args.round + 1) for name in args.target}
        print(dict(count_rounds(one, args.seed, until)))
        return
    counts = collections.defaultdict(collections.Counter, read_counts(args.json, args.seed))
    left = {name: range(counts[name].total(), args.rounds) for name in args.target}
    jobs = {name: rounds for name, rounds in left.items() if rounds}
    for name, each in count_rounds(jobs, args.seed, until).items():
        counts[name] += each
    rows = make_rows(args.seed, {name: each for name, each in counts.items() if each})
    if args.json:
        report.write(args.json, rows, PACKAGES)
    print(report.table([row for row in rows if row.metric == TOTAL]))
    faults = {kind for each in counts.values() for kind in each} - {"read", "refused"}
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
