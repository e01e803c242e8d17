# SPDX-License-Identifier: Apache-2.0
"""The plan of a server as tables, and its phases as points below a roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from t5x_lite.cli.progress import format_count, format_duration
from t5x_lite.planning.figures import estimate
from t5x_lite.planning.phases import Phase, ServingArithmetic
from t5x_lite.planning.report import GIB, MIB, console, memory_table, plain_table
from t5x_lite.planning.serving import ServingPlan

REMEDIES = (
    "more chips, layers split over more of them (Mesh.tensor), weights in 8 or 4 bits "
    "(--quantize), caches in 8 or 4 (--cache_dtype), shorter inputs (--inputs) or texts "
    "(--decode_length)"
)


def show_server(plan: ServingPlan, efficiency: float) -> None:
    """Prints the figures of a server.

    Args:
      plan: the figures.
      efficiency: share of the speed at best that is assumed in the last columns.
    """
    parts: list[Any] = [headline(plan), memory_table(plan.memory)]
    if plan.points:
        parts += [phase_table(plan.phases), points_table(plan, efficiency), footnotes(plan)]
    console().print(Group(*parts))


def headline(plan: ServingPlan) -> str:
    """Lines that say how many rows fit."""
    known, memory, sizes = plan.known, plan.memory, plan.known.sizes
    origin = "by arithmetic alone, not compiled"
    if plan.step is not None:
        origin = f"compiled in {format_duration(plan.step.compile_seconds)}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in known.mesh.items())
    first = f"a server on {known.slice.name} = {known.slice.count} chips, {mesh} ({origin})"
    texts = f"of {sizes.inputs} ids and {sizes.new_tokens} new tokens"
    if plan.points:
        slots = f"{known.slots} slots"
        if known.inputs:
            slots += f" and {known.inputs} encoded ids"
        return (
            f"{first}\nFITS: {plan.points[-1].rows:,} rows {texts}; the cache of a row, {slots}, "
            f"has {known.row_bytes() / MIB:,.2f} MiB on a chip"
        )
    message = f"\nThe compiler: {memory.message.splitlines()[0]}" if memory.message else ""
    return (
        f"{first}\nDOES NOT FIT: rows {texts} need {memory.excess / GIB:.2f} GiB more than the "
        f"{memory.available / GIB:.2f} GiB of each chip{message}\nWhat helps: {REMEDIES}"
    )


def phase_table(listed: Sequence[Phase]) -> Table:
    """Phases on the roofline of a chip: work, FLOPs for each byte, time at best."""
    ridge = listed[0].chip.peak / listed[0].chip.bandwidth
    table = plain_table(
        *("at best", "rows", "tokens", "FLOPs", "GiB", f"FLOPs a byte (ridge {ridge:,.0f})"),
        *("longest part", "ms", "tokens/s"),
    )
    for phase in listed:
        table.add_row(
            phase.name,
            f"{phase.rows:,}",
            f"{phase.tokens:,}",
            format_count(phase.flops),
            f"{phase.moved / GIB:,.3f}",
            f"{phase.intensity:,.1f}",
            phase.bound,
            f"{1e3 * phase.seconds:,.3f}",
            f"{phase.tokens / phase.seconds:,.0f}",
        )
    return table


def points_table(plan: ServingPlan, efficiency: float) -> Table:
    """Speed and price by number of rows: at best, and the price at a share of that speed.

    Args:
      plan: the figures.
      efficiency: the share.
    """
    table = plain_table(
        *("all in use, at best", "GiB", "first ms", "token ms", "requests/s", "tokens/s"),
        *("inputs", "new", "both", f"at {100 * efficiency:g} %"),
    )
    for point in plan.points:
        table.add_row(
            f"{point.rows:,} rows",
            f"{point.memory / GIB:,.2f}",
            f"{1e3 * point.first_seconds:,.2f}",
            f"{1e3 * point.token_seconds:,.2f}",
            f"{point.requests_per_second:,.1f}",
            f"{point.tokens_per_second:,.0f}",
            f"{point.input_price:,.4f}",
            f"{point.token_price:,.4f}",
            f"{point.whole_price:,.4f}",
            f"{point.whole_price / efficiency:,.4f}",
        )
    return table


def footnotes(plan: ServingPlan) -> str:
    """Origin of the price, and the compiler's step beside that of arithmetic."""
    chip = plan.known.slice.chip
    text = (
        "first ms: an input is read and a step made; token ms: a step, and inputs of others read "
        "between. Prices of 10^6 ids of inputs, of new tokens, and of new tokens with their inputs:"
        f" {plan.price:,.2f} for an hour of a chip"
    )
    if plan.price == chip.price:
        text += f", in dollars ({chip.price_source}; --price sets yours)"
    if plan.step is not None:
        compiled = 1e3 * estimate(plan.step).scheduled
        text += (
            f"\nThe last line has the compiler's step: {compiled:,.3f} ms at best, where "
            f"arithmetic says {1e3 * plan.phases[-1].seconds:,.3f}"
        )
    return text


def show_phases(known: ServingArithmetic, rows: int) -> list[Phase]:
    """Prints the phases of so many rows on one roofline, and returns them.

    Args:
      known: bytes and FLOPs of the texts.
      rows: of all chips.

    Raises:
      ValueError: the mesh cannot split the rows.
    """
    most = known.shard_rows(rows)
    listed = [known.reading(min(known.read_rows(), most))]
    listed += [known.decoding(count) for count in sorted({1, most})]
    console().print(phase_table(listed))
    return listed


def draw_roofline(listed: Sequence[Phase], path: Path) -> None:
    """Draws phases below the roofline of their chip.

    Args:
      listed: the phases.
      path: PNG, PDF or SVG file to write.

    Raises:
      ValueError: the name ends in no format of matplotlib.
    """
    from matplotlib.figure import Figure

    chip = listed[0].chip
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ridge = chip.peak / chip.bandwidth
    widths = [phase.intensity for phase in listed]
    ends = [min(*widths, ridge) / 4, ridge, max(*widths, ridge) * 4]
    axes.loglog(ends, [min(each * chip.bandwidth, chip.peak) / 1e12 for each in ends], "k-")
    for phase in listed:
        speed = phase.flops / phase.seconds / 1e12
        label = f"{phase.name}, {phase.rows:,} rows: {1e3 * phase.seconds:,.3g} ms"
        axes.plot([phase.intensity], [speed], "o", label=label)
    axes.set(xlabel="FLOPs for each byte of HBM", ylabel="TFLOP/s", title=chip.kind)
    axes.grid(alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
