# SPDX-License-Identifier: Apache-2.0
"""A comparison as one self-contained HTML page, and as JSON."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_lite.comparison import claims, plots, quality
from t5x_lite.utils.atomic_files import write_atomically

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .verdict { font-size: 1.15rem; margin: .4rem 0 }
.note { color: #555; font-size: 14px }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in verdict %}<p class="verdict">{{ line }}</p>
{% endfor %}
<p class="note">{{ note }}</p>
{% if words %}<h2>In words</h2>{% endif %}
<ul>{% for line in words %}<li>{{ line }}</li>{% endfor %}</ul>
{% for head, table in tables %}
<h2>{{ head }}</h2>
<table><tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% if pictures %}<h2>Pictures</h2>{% endif %}
{% for name, data in pictures %}
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
{% if published %}<h2>Beside what is published</h2>
<table><tr><th>Claim</th><th>Here</th></tr>
{% for claim in published %}
<tr><td>{{ claim.text }} <span class="note">({{ claim.source }})</span></td>
<td style="text-align: left">{{ claim.measured }}</td></tr>
{% endfor %}</table>{% endif %}
</body></html>
"""


class Page(NamedTuple):
    """Content of a page.

    Attributes:
      title: its heading.
      verdict: the result, in one or two sentences.
      note: examples, seeds, machine and versions.
      words: further sentences.
      tables: headings and tables, whose first rows are the heads.
      pictures: files of plots.
      published: published claims beside the measurements.
    """

    title: str
    verdict: list[str]
    note: str
    words: list[str]
    tables: list[tuple[str, list[list[str]]]]
    pictures: list[Path]
    published: Sequence[claims.Claim] = ()


def write_page(page: Page, path: Path) -> Path:
    """Writes a page as one self-contained HTML file; returns its path."""
    import jinja2

    pictures = [
        (picture.stem, base64.b64encode(picture.read_bytes()).decode()) for picture in page.pictures
    ]
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    write_atomically(path, template.render(page._asdict() | {"pictures": pictures}))
    return path


def write_report(record: dict, folder: Path) -> Path:
    """Writes report.json, the plots and report.html; returns the path of the page."""
    write_atomically(folder / "report.json", json.dumps(record, indent=1) + "\n")
    page = Page(
        title=f"{record['task']}: twins with equal {record['matched']}",
        verdict=claims.verdict(record["quality"], record["metrics"]),
        note=report_note(record),
        words=describe_results(record),
        tables=report_tables(record),
        pictures=plots.draw_plots(record, folder),
        published=claims.published_claims(record),
    )
    return write_page(page, folder / "report.html")


def report_note(record: dict) -> str:
    """The examples, seeds, machine and versions of a comparison."""
    taken = [claims.twin_label(each["name"]) for each in record["twins"] if each["taken"]]
    alike = "all twins trained on the same examples as often"
    if taken:
        alike = f"taken as they are, trained elsewhere: {', '.join(taken)}"
    return (
        f"{record['examples']} examples of {record['split']}, {record['seeds']} seed(s), {alike}. "
        f"{record['machine']}; {record['versions']}."
    )


def describe_results(record: dict) -> list[str]:
    """Sentences on differences, with the limits of their intervals."""
    sentences = claims.describe_differences(record["quality"], record["metrics"])
    sentences += claims.describe_roundings(record["quality"], record["metrics"])
    if record["seeds"] == 1:
        sentences.append(
            "One seed: intervals hold for other test examples, not for another training run"
        )
        return sentences
    runs = [run for measured in record["quality"].values() for run in measured]
    whole = [name for name in record["metrics"] if all(name not in run["without"] for run in runs)]
    if whole:
        sentences.append(
            f"{', '.join(whole)}: one number for the whole split, so that intervals hold for "
            "another training run, not for other test examples"
        )
    return sentences


def report_tables(record: dict) -> list[tuple[str, list[list[str]]]]:
    """Headings and tables of the report, without empty ones."""
    tables = [
        ("Twins", twins_table(record)),
        (f"Quality ({interval_words(record)})", quality_table(record)),
        ("Quantized: change from the weights as trained", quantization_table(record)),
        (
            "Drafting: tokens per forward pass (share of passes that accept the first draft token)",
            drafting_table(record),
        ),
        ("Attention to the source by step, %", source_table(record)),
        ("States of the decoder by layer, 0 before the first", geometry_table(record)),
        ("Training", training_table(record)),
        ("Speed (medians)", speed_table(record)),
        ("Memory", memory_table(record)),
    ]
    return [(head, rows) for head, rows in tables if len(rows) > 1]


def interval_words(record: dict) -> str:
    """The meaning of the intervals in a table: one seed tells nothing of other runs."""
    if record["seeds"] == 1:
        return "± half of the 95 % interval for other test examples; other runs are not covered"
    return "± half of the 95 % interval for other runs and test examples"


def twins_table(record: dict) -> list[list[str]]:
    """Size of every twin."""
    head = ["", "encoder layers", "decoder layers", "MLP width", "parameters", "off the match"]
    return [head] + [
        [
            claims.twin_label(each["name"]),
            str(each["encoder_layers"]),
            str(each["decoder_layers"]),
            str(each["mlp"]),
            f"{each['parameters']:,}",
            f"{each['off']:+.1%}",
        ]
        for each in record["twins"]
    ]


def quality_table(record: dict) -> list[list[str]]:
    """Metrics of every twin."""
    heads = [f"{metric} ({quality.metric_unit(metric)})" for metric in record["metrics"]]
    rows = [["", *heads]]
    for twin, measured in record["quality"].items():
        estimates = [quality.estimate_metric(measured, metric) for metric in record["metrics"]]
        cells = [claims.format_estimate(each, ".4g") for each in estimates]
        rows.append([claims.twin_label(twin), *cells])
    return rows


def quantization_table(record: dict) -> list[list[str]]:
    """Change of the metrics by quantization, for every twin and kind, on the same examples."""
    rows = [["", "weights", *record["metrics"]]]
    for twin, runs in record["quality"].items():
        for name in runs[0]["quantized"]:
            gaps = [claims.rounding_effect(runs, name, metric) for metric in record["metrics"]]
            cells = [claims.format_estimate(gap) for gap in gaps]
            rows.append([claims.twin_label(twin), name, *cells])
    return rows


def drafting_table(record: dict) -> list[list[str]]:
    """Acceptance statistics: means over seeds, a column per drafter."""
    names = sorted({name for runs in record["quality"].values() for name in runs[0]["drafted"]})
    rows = [["", *names]]
    for twin, runs in record["quality"].items() if names else ():
        cells = []
        for name in names:
            reports = [run["drafted"][name] for run in runs]
            per_call = sum(each["tokens_per_call"] for each in reports) / len(reports)
            accepted = sum((each["held_by_position"] or [0.0])[0] for each in reports) / len(
                reports
            )
            cells.append(f"{per_call:.2f} ({accepted:.0%})")
        rows.append([claims.twin_label(twin), *cells])
    return rows


def mean_inside(runs: Sequence[dict], name: str) -> list[float]:
    """Mean over seeds of a list that `quality.inspect_twin` measured; [] where it did not."""
    measured = [run["inside"][name] for run in runs if run.get("inside")]
    return [sum(values) / len(values) for values in zip(*measured, strict=True)]


def source_table(record: dict) -> list[list[str]]:
    """Attention to the source of every twin; 100 where cross-attention has the source alone."""
    lines = {twin: mean_inside(runs, "source") for twin, runs in record["quality"].items()}
    steps = range(max(map(len, lines.values()), default=0))
    rows = [["", *(str(step + 1) for step in steps)]]
    for twin, values in lines.items():
        if values:
            rows.append([claims.twin_label(twin), *(f"{100 * value:.0f}" for value in values)])
    return rows


def geometry_table(record: dict) -> list[list[str]]:
    """Geometry of the states of every twin, layer by layer."""
    rows = [["", "layer", "anisotropy", "intrinsic dimension", "cosine of neighbors"]]
    for twin, runs in record["quality"].items():
        names = "anisotropy", "dimension", "neighbors"
        columns = [mean_inside(runs, name) for name in names]
        for layer, values in enumerate(zip(*columns, strict=True)):
            cells = [f"{value:.3g}" for value in values]
            rows.append([claims.twin_label(twin), str(layer), *cells])
    return rows


def training_table(record: dict) -> list[list[str]]:
    """Steps, seconds and FLOPs of training."""
    rows = [["", "steps", "seconds (mean of seeds)", "GFLOPs an example"]]
    for each in record["twins"]:
        runs = [run for run in record["training"] if run["twin"] == each["name"]]
        known = [run["seconds"] for run in runs if run["seconds"] is not None]
        seconds = f"{sum(known) / len(known):,.0f}" if known else "unknown"
        steps = f"{each['steps']:,}" if each["steps"] else "taken as it is"
        flops = f"{each['training_flops'] / 1e9:.3g}"
        rows.append([claims.twin_label(each["name"]), steps, seconds, flops])
    return rows


def speed_table(record: dict) -> list[list[str]]:
    """Times of every twin and case."""
    rows = [["", "texts at once", "ids in", "ids out", "first token, ms", "tokens/s afterwards"]]
    for each in record["speed"]:
        case = [str(each[name]) for name in ("rows", "inputs", "outputs")]
        cells = f"{each['first_token_ms']:.2f}", format_rate(each)
        rows.append([claims.twin_label(each["twin"]), *case, *cells])
    return rows


def format_rate(each: dict) -> str:
    """Formats tokens per second with their quartiles."""
    if each["tokens_per_second"] is None:
        return "lost in noise"
    low, high = each["tokens_per_second_quartiles"]
    return f"{each['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def memory_table(record: dict) -> list[list[str]]:
    """Memory of weights and of caches."""
    rows = [["", "weights, MB", "ids in", "ids out", "cache a text, MB"]]
    for each in record["memory"]:
        sizes = [f"{each['weights'] / 1e6:.2f}", str(each["inputs"]), str(each["outputs"])]
        rows.append([claims.twin_label(each["twin"]), *sizes, f"{each['cache'] / 1e6:.3f}"])
    return rows
