# SPDX-License-Identifier: Apache-2.0
"""Benchmarks under two environments in turns: is a newer version of a dependency slower?

Every benchmark runs as a process of either interpreter, one after the other, for some rounds. Of
each figure of ours the median of each side is printed with the ratio second / first. Higher is
better for rates (.../s); for everything else (seconds, bytes) lower is.

  python benchmarks/versions.py PYTHON_A PYTHON_B [--only train_step decoding] [--rounds 3]
      [--json benchmarks/results/versions.json]
"""

import argparse
import collections
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import report

HERE = Path(__file__).parent
COMMANDS = {
    "train_step": ["train_step.py", "--quick"],
    "distillation": ["distillation.py", "--quick"],
    "decoding": ["decoding.py", "--cases", "t5_base", "--rounds", "3", "--only", "t5x_lite"],
    "input_pipeline": ["input_pipeline.py", "--quick"],
    "convert": ["convert.py", "--quick"],
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "torch")
VERSIONS = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); import report; "
    "print(json.dumps(report.versions(sys.argv[2:])))"
)


def measure(python: str, benchmark: str) -> dict[tuple[str, str, str], float]:
    """The figures of one run of a benchmark, by case, system and metric.

    Args:
      python: path of the interpreter that runs it.
      benchmark: a name of COMMANDS.

    Raises:
      CalledProcessError: the benchmark failed.
    """
    script, *options = COMMANDS[benchmark]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        if benchmark == "decoding":
            options = [*options, "--folder", folder]
        command = [python, HERE / script, *options, "--json", target]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(target.read_text())["rows"]
    figures = {(row["case"], row["system"], row["metric"]): row.get("value") for row in rows}
    return {key: value for key, value in figures.items() if value is not None}


def installed(python: str) -> dict[str, str | None]:
    """Versions of Python and PACKAGES in the environment of an interpreter."""
    command = [python, "-c", VERSIONS, str(HERE), *PACKAGES]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(pythons: list[str], benchmark: str, rounds: int) -> list[report.Row]:
    """Medians of both sides and their ratio, for every figure of a benchmark.

    Args:
      pythons: paths of two interpreters.
      benchmark: a name of COMMANDS.
      rounds: how many runs of each interpreter, in turns.
    """
    figures = [collections.defaultdict(list), collections.defaultdict(list)]
    for _ in range(rounds):
        for side, python in enumerate(pythons):
            for key, value in measure(python, benchmark).items():
                figures[side][key].append(value)
    rows = []
    for key in figures[0].keys() & figures[1].keys():
        case, system, metric = key
        first, second = (statistics.median(side[key]) for side in figures)
        ratio = second / first if first else float("nan")
        rows += [
            report.Row(f"{benchmark}: {case}", f"{system}, first", metric, first),
            report.Row(f"{benchmark}: {case}", f"{system}, second", metric, second),
            report.Row(f"{benchmark}: {case}", f"{system}, second / first", metric, ratio),
        ]
    return sorted(rows, key=lambda row: (row.case, row.metric, row.system))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs=2, metavar="PYTHON", help="interpreters of environments")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    versions = [installed(python) for python in options.pythons]
    differing = {name: [v[name] for v in versions] for name in versions[0]}
    print({name: pair for name, pair in differing.items() if pair[0] != pair[1]})
    rows: list[report.Row] = []
    for benchmark in options.only:
        rows += compare(options.pythons, benchmark, options.rounds)
        print(report.table(rows))
    if options.json:
        notes = [
            report.Row("versions", name, "first, second", None, ", ".join(map(str, pair)))
            for name, pair in differing.items()
        ]
        report.write(options.json, [*notes, *rows], ["jax"])


if __name__ == "__main__":
    main()
