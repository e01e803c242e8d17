# SPDX-License-Identifier: Apache-2.0
"""Benchmarks under two environments in turns: is a newer version of a dependency slower?

Every benchmark runs as a process of either interpreter, one after the other, for some rounds. Of
each figure of ours the median of each side is printed with the ratio second / first. Higher is
better for rates (.../s); for everything else (seconds, bytes) lower is. The file is written after
every benchmark and keeps the rows of those that are not measured now.

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
# What may be slower or larger; counts that do not depend on versions are left out.
METRICS = {
    *("seconds", "cpu_seconds", "scratch_mib", "peak_mib", "tokens/s", "examples/s", "GB/s"),
    *("peak GB", "core seconds per GB", "ms of a core per token"),
}
VERSIONS = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); import report; "
    "print(json.dumps(report.versions(sys.argv[2:])))"
)


def measure(python: str, benchmark: str) -> dict[tuple[str, str, str], float]:
    """The METRICS of one run of a benchmark, by case, system and metric.

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
    return {key: value for key, value in figures.items() if value is not None and key[2] in METRICS}


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


def kept_rows(path: str | None, again: list[str]) -> list[report.Row]:
    """Rows of an earlier file, without the benchmarks that are measured again."""
    if path is None or not Path(path).exists():
        return []
    rows = [report.Row(**row) for row in json.loads(Path(path).read_text())["rows"]]
    return [row for row in rows if row.case.partition(":")[0] not in again]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs=2, metavar="PYTHON", help="interpreters of environments")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    first, second = (installed(python) for python in options.pythons)
    versions = {name: f"{first[name]} and {second[name]}" for name in first}
    print(versions)
    rows = kept_rows(options.json, options.only)
    for benchmark in options.only:
        measured = compare(options.pythons, benchmark, options.rounds)
        print(report.table(measured))
        rows += measured
        if options.json:
            report.write(options.json, rows, versions)


if __name__ == "__main__":
    main()
