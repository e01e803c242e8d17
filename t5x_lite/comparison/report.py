# SPDX-License-Identifier: Apache-2.0
"""A comparison as one page of HTML that stands alone, and as JSON."""

import base64
import json
import os
from pathlib import Path

from t5x_lite.comparison import claims, plots, quality

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .note { color: #555; font-size: 14px }
</style></head><body>
<h1>{{ title }}</h1>
<p class="note">{{ note }}</p>
<h2>In words</h2>
<ul>{% for line in words %}<li>{{ line }}</li>{% endfor %}</ul>
{% for head, table in tables %}
<h2>{{ head }}</h2>
<table><tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<h2>Pictures</h2>
{% for name, data in pictures %}
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
<h2>Beside what is published</h2>
<table><tr><th>Claim</th><th>Here</th></tr>
{% for claim in published %}
<tr><td>{{ claim.text }} <span class="note">({{ claim.source }})</span></td>
<td style="text-align: left">{{ claim.found }}</td></tr>
{% endfor %}</table>
</body></html>
"""


def write(record: dict, folder: Path) -> Path:
    """report.json, the pictures and report.html in the folder; the path of the page."""
    import jinja2

    replace(folder / "report.json", json.dumps(record, indent=1) + "\n")
    pictures = [
        (path.stem, base64.b64encode(path.read_bytes()).decode())
        for path in plots.draw(record, folder)
    ]
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        title=f"{record['task']}: twins with equal {record['matched']}",
        note=note(record),
        words=words(record),
        tables=tables(record),
        pictures=pictures,
        published=claims.published(record),
    )
    replace(folder / "report.html", text)
    return folder / "report.html"


def replace(path: Path, text: str) -> None:
    part = path.with_suffix(".partial")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def note(record: dict) -> str:
    found = [claims.spoken(each["name"]) for each in record["twins"] if each["taken"]]
    alike = "all twins trained on the same examples as often"
    if found:
        alike = f"taken as they are, whatever they were trained on: {', '.join(found)}"
    return (
        f"{record['examples']} examples of {record['split']}, {record['seeds']} seed(s), {alike}. "
        f"{record['machine']}; {record['versions']}."
    )


def words(record: dict) -> list[str]:
    """What differs beyond noise and what does not."""
    said = claims.differences(record["quality"], record["metrics"])
    said += claims.roundings(record["quality"], record["metrics"])
    if record["seeds"] == 1:
        said.append(
            "One seed: intervals hold for other test examples, not for another training run"
        )
        return said
    runs = [run for measured in record["quality"].values() for run in measured]
    whole = [name for name in record["metrics"] if all(name not in run["without"] for run in runs)]
    if whole:
        said.append(
            f"{', '.join(whole)}: one number for the whole split, so that intervals hold for "
            "another training run, not for other test examples"
        )
    return said


def tables(record: dict) -> list[tuple[str, list[list[str]]]]:
    made = [
        ("Twins", twins(record)),
        ("Quality (half of the 95 % interval)", qualities(record)),
        ("In few bits: what changes beside the weights as trained", few_bits(record)),
        ("Drafts: tokens per call (share of calls whose first guess held)", drafts(record)),
        ("Training", trainings(record)),
        ("Speed (medians)", speeds(record)),
        ("Memory", memories(record)),
    ]
    return [(head, rows) for head, rows in made if len(rows) > 1]


def twins(record: dict) -> list[list[str]]:
    head = ["", "encoder layers", "decoder layers", "MLP width", "parameters", "off the match"]
    return [head] + [
        [
            claims.spoken(each["name"]),
            str(each["encoder_layers"]),
            str(each["decoder_layers"]),
            str(each["mlp"]),
            f"{each['parameters']:,}",
            f"{each['off']:+.1%}",
        ]
        for each in record["twins"]
    ]


def qualities(record: dict) -> list[list[str]]:
    rows = [["", *record["metrics"]]]
    for twin, measured in record["quality"].items():
        found = [quality.estimate(measured, metric) for metric in record["metrics"]]
        cells = [claims.told(each, ".4g") for each in found]
        rows.append([claims.spoken(twin), *cells])
    return rows


def few_bits(record: dict) -> list[list[str]]:
    """A row for every twin and way of rounding; differences on the same examples."""
    rows = [["", "weights", *record["metrics"]]]
    for twin, runs in record["quality"].items():
        for name in runs[0]["quantised"]:
            gaps = [claims.rounding(runs, name, metric) for metric in record["metrics"]]
            cells = [claims.told(gap) for gap in gaps]
            rows.append([claims.spoken(twin), name, *cells])
    return rows


def drafts(record: dict) -> list[list[str]]:
    """Means over seeds, a drafter a column."""
    names = sorted({name for runs in record["quality"].values() for name in runs[0]["drafted"]})
    rows = [["", *names]]
    for twin, runs in record["quality"].items() if names else ():
        cells = []
        for name in names:
            found = [run["drafted"][name] for run in runs]
            per_call = sum(each["tokens_per_call"] for each in found) / len(found)
            held = sum((each["held_by_position"] or [0.0])[0] for each in found) / len(found)
            cells.append(f"{per_call:.2f} ({held:.0%})")
        rows.append([claims.spoken(twin), *cells])
    return rows


def trainings(record: dict) -> list[list[str]]:
    rows = [["", "steps", "seconds (mean of seeds)", "GFLOPs an example"]]
    for each in record["twins"]:
        runs = [run for run in record["training"] if run["twin"] == each["name"]]
        known = [run["seconds"] for run in runs if run["seconds"] is not None]
        seconds = f"{sum(known) / len(known):,.0f}" if known else "unknown"
        steps = f"{each['steps']:,}" if each["steps"] else "taken as it is"
        flops = f"{each['training_flops'] / 1e9:.3g}"
        rows.append([claims.spoken(each["name"]), steps, seconds, flops])
    return rows


def speeds(record: dict) -> list[list[str]]:
    rows = [["", "texts at once", "ids in", "ids out", "first token, ms", "tokens/s afterwards"]]
    for each in record["speed"]:
        case = [str(each[name]) for name in ("rows", "inputs", "outputs")]
        cells = f"{each['first_token_ms']:.2f}", rate(each)
        rows.append([claims.spoken(each["twin"]), *case, *cells])
    return rows


def rate(each: dict) -> str:
    if each["tokens_per_second"] is None:
        return "lost in noise"
    low, high = each["tokens_per_second_quartiles"]
    return f"{each['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def memories(record: dict) -> list[list[str]]:
    rows = [["", "weights, MB", "ids in", "ids out", "cache a text, MB"]]
    for each in record["memory"]:
        sizes = [f"{each['weights'] / 1e6:.2f}", str(each["inputs"]), str(each["outputs"])]
        rows.append([claims.spoken(each["twin"]), *sizes, f"{each['cache'] / 1e6:.3f}"])
    return rows
