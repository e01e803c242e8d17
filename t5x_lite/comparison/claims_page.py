# SPDX-License-Identifier: Apache-2.0
"""The page of claims: studies trained and measured, their rows decided together."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config
from t5x_lite.comparison import claim_rows, report, sweep
from t5x_lite.config.training_run import ComparisonRun
from t5x_lite.utils.atomic_files import write_atomically

QUICK_EXAMPLES = 200


class Study(NamedTuple):
    """A comparison that decides rows.

    Attributes:
      name: name of its .gin file, without the ending.
      run: its config, with the twins that its rows need.
    """

    name: str
    run: ComparisonRun


def select_study(run: ComparisonRun, name: str, rows: Sequence[str], quick: bool) -> Study | None:
    """A study with some of its rows; None if it has none of them.

    Args:
      run: config of the study.
      name: its name.
      rows: names of the rows of the page; empty for all.
      quick: trains few steps and measures few examples.

    Raises:
      ValueError: it cannot decide one of its rows.
    """
    compare = run.compare
    claim_rows.check_rows(compare)
    config.require(
        not compare.is_sweep,
        "Compare.claims are decided by one size and one kind of positions: leave out "
        "Compare.depths, widths and positions",
    )
    chosen = tuple(row for row in compare.claims if not rows or row in rows)
    if not chosen:
        return None
    timed = any(claim_rows.ROWS[row].speed for row in chosen)
    compare = dataclasses.replace(
        compare,
        claims=chosen,
        twins=claim_rows.needed_twins(chosen),
        studies=(),
        repeats=compare.repeats if timed else 0,
    )
    run = dataclasses.replace(run, compare=compare)
    return Study(name, shorten(run) if quick else run)


def shorten(run: ComparisonRun) -> ComparisonRun:
    """The study with Compare.quick_steps, a warm-up in proportion, and few examples."""
    compare, share = run.compare, min(1.0, run.compare.quick_steps / run.train.steps)
    few = dataclasses.replace(
        compare,
        examples=min(compare.examples, QUICK_EXAMPLES),
        pretraining_steps=max(1, round(share * compare.pretraining_steps)),
    )
    schedule = dataclasses.replace(
        run.schedule, warmup=min(run.schedule.warmup, max(1, round(share * run.schedule.warmup)))
    )
    train = dataclasses.replace(run.train, steps=min(run.train.steps, compare.quick_steps))
    return dataclasses.replace(run, compare=few, schedule=schedule, train=train)


def decide_claims(studies: Sequence[Study], folder: Path, modules: list[str]) -> Path:
    """Trains and measures what is missing, writes claims.json and claims.html; returns the page.

    Args:
      studies: the studies, each with a folder of its own.
      folder: folder of the page.
      modules: Python modules that training imports first.
    """
    records, estimates = {}, {}
    for study in studies:
        compare = study.run.compare
        record = sweep.run_variant(sweep.Variant("", study.run, 0, ""), modules)
        record["lengths"] = compare.lengths
        for name in compare.claims:
            records[name] = record
            estimates[name] = claim_rows.ROWS[name].statistic(record)
    seeds = min(study.run.compare.seeds for study in studies)
    decisions = claim_rows.decide_rows(estimates, seeds)
    table = claims_table(decisions, records)
    content = {
        "rows": [decision_row(each) for each in decisions],
        "table": table,
        "machine": records[decisions[0].name]["machine"],
        "versions": records[decisions[0].name]["versions"],
    }
    write_atomically(folder / "claims.json", json.dumps(content, indent=1) + "\n")
    page = report.Page(
        title="Published claims, tried in small",
        verdict=[count_verdicts(decisions)],
        note=report.report_note(records[decisions[0].name]),
        words=page_words(),
        tables=[("Claims", table)],
        pictures=[],
    )
    return report.write_page(page, folder / "claims.html")


def decision_row(decision: claim_rows.Decision) -> dict:
    """A decision, ready for JSON."""
    row = claim_rows.ROWS[decision.name]
    return {
        "name": decision.name,
        "claim": row.text,
        "source": row.source,
        "published": row.number,
        "statistic": row.meaning,
        "least": row.least,
        "value": decision.estimate.value,
        "half": decision.half if decision.half == decision.half else None,
        "p": decision.p if decision.p == decision.p else None,
        "level": decision.level,
        "verdict": decision.verdict,
    }


def claims_table(
    decisions: Sequence[claim_rows.Decision], records: dict[str, dict]
) -> list[list[str]]:
    """Rows of the page, the heads first.

    Args:
      decisions: the decided rows.
      records: record of the comparison of each row, by its name.
    """
    rows = [["row", "claim", "published", "here", "holds if above", "seeds", "cost", "verdict"]]
    for each in decisions:
        row, record = claim_rows.ROWS[each.name], records[each.name]
        interval = "no interval"
        if each.half == each.half:
            low, high = each.estimate.value - each.half, each.estimate.value + each.half
            interval = f"{low:.3g} to {high:.3g}"
        here = f"{each.estimate.value:.3g} ({interval}): {row.meaning}"
        rows.append(
            [
                each.name,
                f"{row.text} ({row.source})",
                row.number or "no number",
                here,
                f"{row.least:g}",
                str(record["seeds"]),
                describe_cost(row.twins, record),
                each.verdict,
            ]
        )
    return rows


def describe_cost(twins: Sequence[str], record: dict) -> str:
    """The costs of the twins of a row beside the encoder-decoder's: parameters and FLOPs."""
    costs = {each["name"]: each for each in record["twins"]}
    base, parts = costs[claim_rows.BASE], []
    for name in twins:
        if name == claim_rows.BASE:
            continue
        shares = [
            costs[name][axis] / base[axis] - 1
            for axis in ("parameters", "training_flops", "inference_flops")
        ]
        values = ", ".join(f"{share:+.0%}" for share in shares)
        more = costs[name]["pretraining_steps"] - base["pretraining_steps"]
        pretrained = f" ({more:+,} steps of pretraining)" if more else ""
        parts.append(f"{name}: {values}{pretrained}")
    return "; ".join(parts)


def count_verdicts(decisions: Sequence[claim_rows.Decision]) -> str:
    """The number of claims by verdict, in a sentence."""
    verdicts = [each.verdict for each in decisions]
    parts = [f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)]
    return f"Of {len(decisions)} claims: {', '.join(parts)}."


def page_words() -> list[str]:
    """Sentences on the intervals and the costs of the page."""
    return [
        "Intervals cover other seeds and other test examples, which all twins share; of times they "
        "cover other turns on this machine. They are as wide as Holm's correction for all rows of "
        f"the page wants, so that with a probability of {1 - claim_rows.LEVEL:.0%} no verdict "
        "beyond \u201ccannot be told\u201d is due to chance.",
        f"Verdicts take at least {claim_rows.FEWEST_SEEDS} seeds.",
        "A claim that holds here holds for this task at this size, and no more.",
        "Costs are parameters, training FLOPs and inference FLOPs beside the encoder-decoder's.",
    ]
