# SPDX-License-Identifier: Apache-2.0
"""Write docs/benchmarks.md: prose of notes.toml, and every figure of results/*.json.

python benchmarks/page.py
"""

import argparse
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

<!-- Written by benchmarks/page.py from benchmarks/results/ and benchmarks/notes.toml. -->

Every figure that is kept, with its command, machine, versions and date. Unless a section says
otherwise the machine has 2 virtual cores of an AMD EPYC, 24 GiB and no accelerator; each figure was
measured when its part was built or last changed in speed, not all on one day. No figure was
measured on a TPU or a GPU. "Load" is the machine's load average when the file was written: above
the number of cores, other jobs ran beside the benchmark, and times are upper bounds.
"""


def format_number(value) -> str:
    """A figure with four significant digits; integers whole; None as "not measured"."""
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return value
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *lines)]
    rows.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def pivot(rows: Sequence[dict]) -> str:
    """A table of one case: systems by metrics, the fewer of them as columns.

    A figure that was measured several times is listed several times.
    """
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        value = format_number(row["value"])
        note = f" ({row['note']})" if row.get("note") else ""
        cells.setdefault((row["system"], row["metric"]), []).append(value + note)
    systems = list(dict.fromkeys(row["system"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))

    def cell(system: str, metric: str) -> str:
        return ", ".join(cells.get((system, metric), ()))

    if len(metrics) <= max(len(systems), 3):
        lines = [[system, *(cell(system, metric) for metric in metrics)] for system in systems]
        return table(["", *metrics], lines)
    lines = [[metric, *(cell(system, metric) for system in systems)] for metric in metrics]
    return table(["", *systems], lines)


def measured_tables(record: dict) -> Iterator[str]:
    """Tables of rows of case, system, metric, value: one for each case."""
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        yield f"{case}:\n\n{pivot([row for row in record['rows'] if row['case'] == case])}"


def plan_tables(record: dict) -> Iterator[str]:
    """One table of plans: memory, work and bounds of a step, per chip."""
    gib, giga = 2**30, 1e9
    head = ["model:slice:sharding:rows per chip", "chips", "peak, GiB", "available, GiB", "TFLOP"]
    head += ["HBM, GB", "links, GB", "step at best, s", "MFU at best, %", "compiling, s"]
    lines = []
    for row in record["rows"]:
        memory, estimate = row["memory"], row["estimate"]
        figures = [row["chips"], memory["peak"] / gib, memory["available"] / gib]
        figures += [row["flops"] / 1e12, row["moved"] / giga]
        figures += [sum(item["bytes"] for item in row["collectives"]) / giga]
        figures += [estimate["scheduled"], 100 * estimate["mfu"], row["compile_seconds"]]
        lines.append([row["case"], *map(format_number, figures)])
    yield table(head, lines)


def comparison_tables(record: dict) -> Iterator[str]:
    """A table of twins, and one of their quality by seed."""
    twins = record["twins"]
    fields = ("parameters", "encoder_layers", "decoder_layers", "mlp", "steps")
    lines = [[twin["name"], *(format_number(twin[field]) for field in fields)] for twin in twins]
    yield f"Twins, matched by {record['matched']}:\n\n{table(['', *fields], lines)}"
    quality = record["quality"]
    metrics = list(next(iter(quality.values()))[0]["metrics"])
    lines = []
    for metric in metrics:
        values = [
            ", ".join(format_number(seed["metrics"].get(metric)) for seed in quality[twin["name"]])
            for twin in twins
        ]
        lines.append([metric, *values])
    title = f"{record['task']}, {record['examples']} examples of {record['split']}, by seed"
    yield f"{title}:\n\n{table(['', *(twin['name'] for twin in twins)], lines)}"


def machine_line(record: dict) -> str:
    """Machine and versions of a results file, in words."""
    machine, versions = record["machine"], record["versions"]
    if isinstance(machine, dict):
        load = "/".join(map(str, machine["load"]))
        cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
        name = " ".join([machine["processor"], *machine.get("units", ())])
        machine = f"{name}, {cores}, {machine['memory_gib']} GiB, load {load}"
    if isinstance(versions, dict):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine}; {versions}"


def results_text(name: str, date: str) -> str:
    """Command, date, machine and every figure of one results file."""
    record = json.loads((HERE / "results" / f"{name}.json").read_text())
    if "twins" in record:
        tables = comparison_tables(record)
    elif "collectives" in record["rows"][0]:
        tables = plan_tables(record)
    else:
        tables = measured_tables(record)
    note = f"- Note: {record['note']}\n" if record.get("note") else ""
    return (
        f"### {name}.json\n\n"
        f"- Command: `{record['command']}`\n"
        f"- Date: {record.get('date', date)}\n"
        f"- Machine: {machine_line(record)}\n{note}\n" + "\n".join(tables)
    )


def page_text() -> str:
    """Text of docs/benchmarks.md."""
    sections = tomllib.loads((HERE / "notes.toml").read_text())["section"]
    parts = [HEAD]
    for section in sections:
        summary = "".join(f"- {line}\n" for line in section["summary"])
        parts.append(f"## {section['title']}\n\n{summary}")
        if "command" in section:
            parts.append(f"- Command: `{section['command']}`\n- Date: {section['date']}\n")
        parts += [results_text(name, section["date"]) for name in section.get("results", ())]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page_text())


if __name__ == "__main__":
    main()
