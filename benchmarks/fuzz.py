# SPDX-License-Identifier: Apache-2.0
"""How do readers take files that are broken? Thousands of seeded mutations of small whole files.

Every round breaks one file of a reader's (bits, cuts, splices, huge numbers, wrong types, nesting)
and reads it. A reader may read it, or refuse it in a ValueError or OSError that names it. Another
exception, no name, 20 s of the processor, 2 GiB, a file written and a dead process are faults: each
is printed with its seed and round, which give it again.

  python benchmarks/fuzz.py [--rounds 2000] [--seed 1] [--target gguf ...]
      [--json benchmarks/results/fuzz.json]
  python benchmarks/fuzz.py --target gguf --seed 7 --round 1234   # one round again
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import report

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests/laws")]
PACKAGES = ["gin-config", "tokenizers", "sentencepiece", "gguf", "tensorstore", "pyarrow", "jax"]


def work(name: str, rounds: range, seed: int, sent: Connection) -> None:
    """Sends (content, fault) of each round; a process of its own, which a reader may kill."""
    import fuzzing
    import jax

    from t5x_lite import sharding

    jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))
    with tempfile.TemporaryDirectory() as scratch:
        for outcome in fuzzing.run(name, Path(scratch), rounds, seed):
            sent.send(outcome)
    sent.close()


def outcomes(name: str, rounds: range, seed: int):
    """(content, fault) of every round, those that killed the process too."""
    import fuzzing

    processes = multiprocessing.get_context("spawn")
    done = rounds.start
    while done < rounds.stop:
        received, sent = processes.Pipe(duplex=False)
        worker = processes.Process(target=work, args=(name, range(done, rounds.stop), seed, sent))
        worker.start()
        sent.close()
        begun = done
        try:
            while True:
                yield received.recv()
                done += 1
        except EOFError:
            worker.join()
        if worker.exitcode and done == begun:
            raise SystemExit(f"{name} cannot begin at round {begun}: see above")
        if worker.exitcode:
            what = f"the process ended with {worker.exitcode}"
            yield False, fuzzing.Fault(name, seed, done, "?", what)
            done += 1


def measured(name: str, rounds: range, seed: int) -> list[report.Row]:
    """How many rounds of a reader were read, refused and faults, and how fast."""
    from t5x_lite.cli.progress import Progress

    began, read, faults = time.perf_counter(), 0, 0
    with Progress(f"rounds of {name}", len(rounds)) as progress:
        for done, (content, fault) in enumerate(outcomes(name, rounds, seed), 1):
            read += content
            if fault:
                faults += 1
                print(f"\n{fault}", flush=True)
            progress(done)
    seconds = time.perf_counter() - began

    def row(metric, value):
        return report.Row(name, "t5x_lite", metric, value)

    return [
        row("seed", seed),
        row("rounds", len(rounds)),
        row("read all the same", read),
        row("refused by name", len(rounds) - read - faults),
        row("faults", faults),
        row("rounds per second", round(len(rounds) / seconds, 1)),
    ]


def kept(path: str) -> list[report.Row]:
    """The rows of an earlier run of this."""
    if not Path(path).exists():
        return []
    return [report.Row(**row) for row in json.loads(Path(path).read_text())["rows"]]


def main() -> None:
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2000, metavar="N")
    parser.add_argument("--round", type=int, metavar="N", help="this one alone")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    rounds = range(given.rounds)
    if given.round is not None:
        rounds = range(given.round, given.round + 1)
    rows = []
    for name in given.target:
        rows += measured(name, rounds, given.seed)
        if given.json:
            others = [row for row in kept(given.json) if row.case not in {row.case for row in rows}]
            report.write(given.json, others + rows, PACKAGES)
    print(report.table(rows))
    raise SystemExit(any(row.metric == "faults" and row.value for row in rows))


if __name__ == "__main__":
    main()
