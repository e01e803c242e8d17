# SPDX-License-Identifier: Apache-2.0
"""A preview as it is printed: examples side by side with their lengths, and the tables."""

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from t5x_lite import config
from t5x_lite.data import preview
from t5x_lite.data.preview import Denoiser, Example
from t5x_lite.data.vocabularies import sentinel

LONGEST = 600  # characters of a text that are shown


def shown(denoiser: Denoiser, number: int) -> Panel:
    """One example: what is read, what is asked for, and how long both are."""
    example = denoiser.examples[number]
    parts = [Text(facts(denoiser, example), style="dim")]
    if len(example.inputs):
        parts += [Text("inputs", style="bold cyan"), text(denoiser, 0, example.inputs)]
    parts += [Text("targets", style="bold green"), text(denoiser, 1, example.targets)]
    return Panel(Group(*parts), title=Text(f"{denoiser.name}, example {number}"), expand=True)


def text(denoiser: Denoiser, side: int, ids: np.ndarray) -> Text:
    """Ids as text, sentinels, mode and ends standing out; never read as rich's markup."""
    vocabulary = denoiser.vocabularies[side]
    made = Text(preview.shortened(preview.written(vocabulary, ids), LONGEST))
    names = ["</s>"]
    if denoiser.cutter is not None:
        special = np.intersect1d(ids, [*denoiser.cutter.sentinels, *denoiser.cutter.marks])
        names += [sentinel(vocabulary, int(token)) for token in special]
        names += [getattr(denoiser.objective, "mode", None) or "</s>"]
    made.highlight_words(names, style="bold magenta")
    return made


def facts(denoiser: Denoiser, example: Example) -> str:
    """Lengths against their limits, and the tokens that bear loss."""
    limits = dict(zip(("inputs", "targets"), denoiser.limits, strict=True))
    lengths = {"inputs": len(example.inputs), "targets": len(example.targets)}
    told = [
        f"{name} {length} of {limits[name]}" + (f" ({length / limits[name]:.0%})")
        for name, length in lengths.items()
        if length
    ]
    return ", ".join([*told, f"{int(example.loss.sum())} tokens bear loss"])


def rates(found: list[Denoiser]) -> Table:
    """Shares, noise and spans beside what was asked for."""
    count = len(found[0].examples)
    made = Table(title=f"What was drawn in {count:,} rows, and was asked for", show_edge=False)
    made.add_column("denoiser")
    columns = ("rows", "asked", "hidden", "asked", "mean span", "asked", "sentinels", "of")
    for name in columns:
        made.add_column(name, justify="right")
    for each in found:
        noise, (density, span) = preview.noise(each), preview.asked_noise(each.objective)
        corrupts = isinstance(each.objective, config.SpanCorruption)
        there = "" if each.cutter is None else str(len(each.cutter.sentinels))
        made.add_row(
            Text(each.name),
            percent(each.drawn),
            percent(each.asked),
            "" if each.cutter is None else percent(noise.density),
            percent(density),
            "" if noise.mean_span is None else f"{noise.mean_span:.2f}",
            "" if span is None else f"{span:g}",
            str(noise.sentinels) if corrupts or noise.sentinels else "",
            there if corrupts or noise.sentinels else "",
        )
    return made


def lengths(found: list[Denoiser]) -> Table:
    """Lengths against their limits, fill, loss and what was cut off."""
    made = Table(title="Lengths in tokens, and the share of places filled", show_edge=False)
    made.add_column("denoiser")
    columns = ("inputs", "most", "limit", "targets", "most", "limit", "filled", "loss", "truncated")
    for name in columns:
        made.add_column(name, justify="right")
    for each in found:
        sides = zip(("inputs", "targets"), each.limits, strict=True)
        cells = []
        for name, limit in sides:
            sizes = [len(getattr(example, name)) for example in each.examples]
            cells += [f"{np.mean(sizes):.1f}", str(max(sizes)), str(limit)]
        filled = ", ".join(f"{name} {share:.1%}" for name, share in each.filled.items())
        loss = np.mean([example.loss.sum() for example in each.examples])
        lost = ", ".join(f"{count:,} {name}" for name, count in each.truncated.items() if count)
        made.add_row(Text(each.name), *cells, filled, f"{loss:.1f}", lost or "none")
    return made


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
