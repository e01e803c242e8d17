# SPDX-License-Identifier: Apache-2.0
"""A preview as tables of rich: examples with their lengths, rates, noise and fill."""

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from t5x_lite import config
from t5x_lite.data import preview
from t5x_lite.data.preview import Denoiser, Example
from t5x_lite.tokenizers.vocabularies import sentinel_text

LONGEST = 600  # characters of a text that are shown


def example_panel(denoiser: Denoiser, number: int) -> Panel:
    """Inputs and targets of one example, and their lengths."""
    example = denoiser.examples[number]
    parts = [Text(length_line(denoiser, example), style="dim")]
    if len(example.inputs):
        parts += [Text("inputs", style="bold cyan"), ids_text(denoiser, 0, example.inputs)]
    parts += [Text("targets", style="bold green"), ids_text(denoiser, 1, example.targets)]
    return Panel(Group(*parts), title=Text(f"{denoiser.name}, example {number}"), expand=True)


def ids_text(denoiser: Denoiser, side: int, ids: np.ndarray) -> Text:
    """Ids as text with sentinels, mode and ends highlighted; not read as rich's markup.

    Args:
      denoiser: where the ids are from.
      side: 0 for inputs, 1 for targets.
      ids: of an example.
    """
    vocabulary = denoiser.vocabularies[side]
    text = Text(preview.shorten_text(preview.decode_with_ends(vocabulary, ids), LONGEST))
    names = ["</s>"]
    if denoiser.preprocessor is not None:
        special = np.intersect1d(
            ids, [*denoiser.preprocessor.sentinels, *denoiser.preprocessor.marks]
        )
        names += [sentinel_text(vocabulary, int(token)) for token in special]
        names += [getattr(denoiser.objective, "mode", None) or "</s>"]
    text.highlight_words(names, style="bold magenta")
    return text


def length_line(denoiser: Denoiser, example: Example) -> str:
    """Lengths against their limits, and the number of tokens that bear loss."""
    limits = dict(zip(("inputs", "targets"), denoiser.limits, strict=True))
    lengths = {"inputs": len(example.inputs), "targets": len(example.targets)}
    parts = [
        f"{name} {length} of {limits[name]}" + (f" ({length / limits[name]:.0%})")
        for name, length in lengths.items()
        if length
    ]
    return ", ".join([*parts, f"{int(example.loss.sum())} tokens bear loss"])


def rates_table(denoisers: list[Denoiser]) -> Table:
    """Shares, noise and spans as measured, each beside that of the config."""
    count = len(denoisers[0].examples)
    table = Table(title=f"Rates and noise of {count:,} rows, and of the config", show_edge=False)
    table.add_column("denoiser")
    columns = ("rows", "config", "hidden", "config", "mean span", "config", "sentinels", "of")
    for name in columns:
        table.add_column(name, justify="right")
    for each in denoisers:
        noise = preview.measure_noise(each)
        density, span = preview.configured_noise(each.objective)
        corrupts = isinstance(each.objective, config.SpanCorruption)
        there = "" if each.preprocessor is None else str(len(each.preprocessor.sentinels))
        table.add_row(
            Text(each.name),
            percent(each.share),
            percent(each.configured_share),
            "" if each.preprocessor is None else percent(noise.density),
            percent(density),
            "" if noise.mean_span is None else f"{noise.mean_span:.2f}",
            "" if span is None else f"{span:g}",
            str(noise.sentinels) if corrupts or noise.sentinels else "",
            there if corrupts or noise.sentinels else "",
        )
    return table


def lengths_table(denoisers: list[Denoiser]) -> Table:
    """Lengths against their limits, fill, loss and truncated examples."""
    table = Table(title="Lengths in tokens, and the share of places filled", show_edge=False)
    table.add_column("denoiser")
    columns = ("inputs", "most", "limit", "targets", "most", "limit", "filled", "loss", "truncated")
    for name in columns:
        table.add_column(name, justify="right")
    for each in denoisers:
        sides = zip(("inputs", "targets"), each.limits, strict=True)
        cells = []
        for name, limit in sides:
            sizes = [len(getattr(example, name)) for example in each.examples]
            cells += [f"{np.mean(sizes):.1f}", str(max(sizes)), str(limit)]
        filled = ", ".join(f"{name} {share:.1%}" for name, share in each.filled.items())
        loss = np.mean([example.loss.sum() for example in each.examples])
        lost = ", ".join(f"{count:,} {name}" for name, count in each.truncated.items() if count)
        table.add_row(Text(each.name), *cells, filled, f"{loss:.1f}", lost or "none")
    return table


def percent(share: float | None) -> str:
    """A share in percent; empty for None."""
    return "" if share is None else f"{share:.1%}"
