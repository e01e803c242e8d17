# SPDX-License-Identifier: Apache-2.0
"""A plan as tables for people and as a record for programs."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from t5x_lite import config, model, sharding
from t5x_lite.cli.progress import format_count, format_duration
from t5x_lite.planning import compiled
from t5x_lite.planning.chips import Slice
from t5x_lite.planning.collectives import Collective
from t5x_lite.planning.figures import Figures, Memory, StepEstimate, estimate
from t5x_lite.training.reporting import dry_run, overview
from t5x_lite.utils.not_none import not_none

MIB, GIB = 1 << 20, 1 << 30
REMEDIES = (
    "more chips (--topology), weights split over more of them (Mesh.fsdp, Mesh.tensor), fewer rows "
    "at once (Train.microbatches, BATCH_SIZE), less kept (Train.remat = 'full'), or let --search "
    "find one that fits"
)
DECODE_REMEDIES = (
    "more chips (--topology), weights split over more of them (Mesh.tensor), fewer rows "
    "(--decode_rows) or tokens (--decode_length)"
)


def console() -> Console:
    """Console as wide as the terminal; 100 columns where there is none."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=100)


def show(figures: Figures, price: float | None, efficiency: float) -> None:
    """Prints the figures of a step.

    Args:
      figures: the figures.
      price: of one chip for an hour, if known.
      efficiency: share of the speed at best that is assumed in the second column.
    """
    console().print(Group(*tables(figures, price, efficiency)))


def tables(figures: Figures, price: float | None, efficiency: float) -> list[Any]:
    """Headline and tables of a step.

    Args:
      figures: the figures.
      price: of one chip for an hour, if known.
      efficiency: share of the speed at best that is assumed in the second column.
    """
    parts: list[Any] = [headline(figures), memory_table(figures.memory)]
    if figures.flops is None:
        return parts
    times = estimate(figures, price)
    if figures.collectives:
        parts.append(collectives_table(figures.collectives))
    parts.append(time_table(figures, times))
    parts.append(speed_table(figures, times, efficiency))
    if figures.unknown_loops:
        parts.append(
            "Loops of unknown length, counted once: " + ", ".join(figures.unknown_loops[:5])
        )
    return parts


def headline(figures: Figures) -> str:
    """Lines that say if the step fits, and by how much."""
    memory, slice_ = figures.memory, figures.slice
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures.mesh.items())
    origin = "by arithmetic alone, not compiled"
    if figures.source == "compiled":
        origin = f"compiled in {format_duration(figures.compile_seconds)}"
    first = f"{figures.what} on {slice_.name} = {slice_.count} chips, {mesh} ({origin})"
    peak, available = memory.peak / GIB, memory.available / GIB
    if memory.fits:
        return (
            f"{first}\nFITS: {peak:.2f} of {available:.2f} GiB of each chip, "
            f"{available - peak:.2f} GiB are left"
        )
    remedies = REMEDIES if figures.what == "training step" else DECODE_REMEDIES
    message = f"\nThe compiler: {memory.message.splitlines()[0]}" if memory.message else ""
    return (
        f"{first}\nDOES NOT FIT: {memory.excess / GIB:.2f} GiB too much, {peak:.2f} of "
        f"{available:.2f} GiB of each chip{message}\nWhat helps: {remedies}"
    )


def memory_table(memory: Memory) -> Table:
    """Memory of one chip by kind, and the most at once."""
    table = plain_table("bytes of each chip", "MiB")
    for kind, count in memory.kinds.items():
        table.add_row(kind, f"{count / MIB:,.1f}")
    table.add_row("most at once", f"{memory.peak / MIB:,.1f}")
    return table


def collectives_table(collectives: Iterable[Collective]) -> Table:
    """The collectives of a step, summed by kind, mesh axes, and whether they overlap."""
    table = plain_table("collectives of each chip", "axes", "times", "MiB", "ms", "while computing")
    for row in sum_collectives(collectives):
        table.add_row(
            row["kind"],
            "+".join(row["axes"]) or "none",
            f"{row['times']:,}",
            f"{row['bytes'] / MIB:,.1f}",
            f"{1e3 * row['seconds']:,.3f}",
            "yes" if row["overlapped"] else "no",
        )
    return table


def sum_collectives(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, axes and overlap as one row each, the longest first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for each in collectives:
        key = (each.kind, each.axes, each.overlapped)
        row = rows.setdefault(
            key,
            {"kind": each.kind, "axes": list(each.axes), "overlapped": each.overlapped}
            | {"times": 0, "bytes": 0, "seconds": 0.0},
        )
        row["times"] += each.times
        row["bytes"] += each.times * each.bytes
        row["seconds"] += each.times * each.seconds
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def time_table(figures: Figures, times: StepEstimate) -> Table:
    """Work and time of a step at best."""
    chip = figures.slice.chip
    needed = figures.model_flops / figures.slice.count
    table = plain_table("a step", "", "at best, ms")

    def row(name: str, amount: str, seconds: float) -> None:
        table.add_row(name, amount, f"{1e3 * seconds:,.3f}")

    amount = f"{format_count(not_none(figures.flops))} FLOPs at {format_count(chip.peak)}FLOP/s"
    row("compute", f"{amount} (the model's own: {format_count(needed)})", times.compute)
    moved = f"{not_none(figures.moved) / GIB:,.2f} GiB at {chip.bandwidth / 1e9:,.0f} GB/s"
    row("memory (HBM)", moved, times.memory)
    row("interconnect", "the collectives above", times.interconnect)
    row("all overlapped", "the longest of the three", times.overlapped)
    schedule = "collectives that the compiler runs beside other work overlap"
    if figures.source == "arithmetic":
        schedule = "collectives of weights overlap, those of activations do not"
    row("as scheduled", schedule, times.scheduled)
    row("nothing overlapped", "the sum", times.summed)
    return table


def speed_table(figures: Figures, times: StepEstimate, efficiency: float) -> Table:
    """Time, speed, utilization and cost as scheduled: at best, and at a share of that speed.

    Args:
      figures: the figures.
      times: times at best.
      efficiency: the share.
    """
    shares = 1.0, efficiency
    table = plain_table("as scheduled", "", "at best", f"at {100 * efficiency:g} % of it")

    def row(name: str, unit: str, values: list[float], digits: int) -> None:
        table.add_row(name, unit, *(f"{value:,.{digits}f}" for value in values))

    row("time of a step", "ms", [1e3 * times.scheduled / share for share in shares], 1)
    speed = f"tokens/s, {figures.tokens:,} tokens a step"
    row("speed", speed, [times.tokens_per_second * share for share in shares], 0)
    row("model FLOP utilization", "% of the peak", [100 * times.mfu * share for share in shares], 1)
    if times.cost is not None:
        currency = "in the price's currency"
        row("cost of 10^9 tokens", currency, [times.cost / share for share in shares], 2)
    return table


def search_table(plans: list[dict[str, Any]], price: float | None, count: int) -> Table:
    """Table of the plans that fit, the fastest first.

    Args:
      plans: results of `searching.search`.
      price: of one chip for an hour, if known.
      count: number of chips.
    """
    table = plain_table(
        "what fits, at best", "GiB of a chip", "ms a step", "tokens/s", "MFU %", "10^9 tokens"
    )
    for row in plans:
        known = row["estimate"]
        cost = ""
        if price is not None:
            cost = f"{1e9 / known['tokens_per_second'] * count * price / 3600:,.2f}"
        table.add_row(
            row["name"],
            f"{row['memory']['peak'] / GIB:.2f}",
            f"{1e3 * known['scheduled']:,.1f}",
            f"{known['tokens_per_second']:,.0f}",
            f"{100 * known['mfu']:.1f}",
            cost,
        )
    return table


def plain_table(*columns: str) -> Table:
    """A table without frame, numbers on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for index, column in enumerate(columns):
        numeric = column in ("MiB", "ms", "times") or "ms" in column or index > 2
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def record(
    figures: Figures, price: float | None = None, efficiency: float | None = None
) -> dict[str, Any]:
    """All figures as a JSON object, in bytes, seconds and FLOPs; `estimate` is at best.

    Args:
      figures: the figures.
      price: of one chip for an hour, if known.
      efficiency: share of the speed at best for `expected`; None to leave it out.
    """
    memory = figures.memory
    result: dict[str, Any] = {
        "what": figures.what,
        "source": figures.source,
        "slice": figures.slice.name,
        "chips": figures.slice.count,
        "chip": figures.slice.chip.kind,
        "mesh": figures.mesh,
        "memory": {"fits": memory.fits, "excess": memory.excess, "peak": memory.peak}
        | {"available": memory.available, "kinds": memory.kinds},
        "tokens": figures.tokens,
        "model_flops": figures.model_flops,
        "compile_seconds": round(figures.compile_seconds, 1),
    }
    if figures.flops is not None:
        result |= {
            "flops": figures.flops,
            "moved": figures.moved,
            "collectives": sum_collectives(figures.collectives),
            "unknown_loops": list(figures.unknown_loops),
            "estimate": estimate(figures, price)._asdict(),
        }
        if efficiency is not None:
            result["expected"] = expected(result["estimate"], efficiency)
    return result


def expected(at_best: dict[str, Any], efficiency: float) -> dict[str, Any]:
    """Speed, utilization and cost at a share of the speed at best."""
    cost = at_best["cost"]
    return {
        "efficiency": efficiency,
        "tokens_per_second": at_best["tokens_per_second"] * efficiency,
        "mfu": at_best["mfu"] * efficiency,
        "cost": None if cost is None else cost / efficiency,
    }


def placement_text(run: config.Run, slice_: Slice) -> str:
    """A line for every parameter: name, shape, axes, mesh axes that split it, bytes of each
    chip."""
    sharding.use_mesh(run.mesh, compiled.devices(slice_))
    params = model.shapes(run.model)
    return "\n".join([overview.mesh_text(), *dry_run.weight_lines(params, model.axes(run.model))])
