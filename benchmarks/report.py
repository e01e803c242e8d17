# SPDX-License-Identifier: Apache-2.0
"""Parts that every benchmark shares: rows, the machine they were measured on, table and file."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement. `value` None is a system that could not be measured; `note` says why."""

    case: str
    system: str
    metric: str
    value: float | None
    note: str = ""


def first_line(path: str, beginning: str) -> str:
    """The text after the colon of the first line of a file that begins so, or an empty string."""
    try:
        with open(path) as lines:
            found = (line for line in lines if line.startswith(beginning))
            return next(found, ":").partition(":")[2].strip()
    except OSError:
        return ""


# Instructions for products of int8 and bfloat16, by Linux's names.
UNITS = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "i8mm", "bf16")


def machine() -> dict:
    """Processor, its units, cores that this process may use, memory in GiB, and system."""
    flags = first_line("/proc/cpuinfo", "flags") or first_line("/proc/cpuinfo", "Features")
    affinity = getattr(os, "sched_getaffinity", None)
    memory = first_line("/proc/meminfo", "MemTotal").split()
    return {
        "processor": first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "units": [unit for unit in UNITS if unit in flags.split()],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def versions(packages: list[str]) -> dict[str, str | None]:
    """Installed version of Python and of every package by its distribution name; None if absent."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def ratio(row: Row, rows: list[Row]) -> str:
    """t5x_lite's value of the same case and metric over this row's, or an empty string."""
    ours = [
        other.value
        for other in rows
        if (other.case, other.metric, other.system) == (row.case, row.metric, "t5x_lite")
    ]
    if row.system == "t5x_lite" or not ours or not row.value or ours[0] is None:
        return ""
    return f"{ours[0] / row.value:.2f}"


def table(rows: list[Row]) -> str:
    """The rows as aligned text; the last column is t5x_lite's value over the peer's."""
    head = ("case", "metric", "system", "value", "t5x_lite / it")
    cells = [head]
    for row in rows:
        value = row.note if row.value is None else f"{row.value:,.4g}"
        cells.append((row.case, row.metric, row.system, value, ratio(row, rows)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def write(path: str | Path, rows: list[Row], packages: list[str] | dict[str, str]) -> None:
    """Writes command, date, machine, versions and rows as JSON, replacing the file in one move.

    Args:
      path: the file.
      rows: what was measured.
      packages: names whose versions are those of this process, or the versions by name.
    """
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": packages if isinstance(packages, dict) else versions(packages),
        "rows": [{k: v for k, v in asdict(row).items() if v != ""} for row in rows],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
