# SPDX-License-Identifier: Apache-2.0
"""Descriptions of a model: in a line, and as the README.md of an exported one.

A card has family, data, metrics, config, and code that loads it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from t5x_lite import config, model
from t5x_lite.checkpoints.formats import huggingface
from t5x_lite.config import gin_file, run_sources
from t5x_lite.model.mixed_precision import weight_dtypes
from t5x_lite.utils import hub_names

FILE = "README.md"
TASKS = {
    "encoder_decoder": "text2text-generation",
    "decoder_only": "text-generation",
    "encoder_only": "feature-extraction",
}
CLASSES = {
    "encoder_decoder": "AutoModelForSeq2SeqLM",
    "decoder_only": "AutoModelForCausalLM",
    "encoder_only": "AutoModel",
}
# Values of report.json that say how it went, not how good the model is.
NOT_METRICS = re.compile(r"seconds|_per_|^(steps|split|device|parameters|not_computed|skipped)|mfu")
# Paths of one machine: of them the last part is kept.
LOCAL = re.compile(r"/|~|\.\.|[A-Za-z][\w+.-]*://")


class CardFacts(NamedTuple):
    """Facts about an exported model.

    Attributes:
      run: its config.
      name: its name: "owner/name" on the hub, or that of its folder.
      format: format of the export.
      origin: the checkpoint that it was converted from; "" for an unknown one.
      report: report.json of the run; {} without one.
      step: training step.
      parameters: number of its parameters.
      dtypes: dtypes of the weights, in words.
      has_tokenizer: the export has a tokenizer.
      average: the checkpoints whose mean the weights are; {} for weights of one checkpoint.
    """

    run: config.Run
    name: str
    format: str
    origin: str
    report: Mapping[str, Any]
    step: int
    parameters: int
    dtypes: str
    has_tokenizer: bool
    average: Mapping[str, Any] = {}


def format_card(facts: CardFacts) -> str:
    """The text of a model card, with the metadata that the hub reads at its top."""
    lines = [
        *metadata(facts),
        "",
        f"# {in_a_line(facts.name.rpartition('/')[2])}",
        "",
        *describe_model(facts),
        *describe_data(facts.run),
        *describe_metrics(facts),
        "",
        "## Use",
        "",
        *loading_code(facts),
        "",
        "## Config",
        "",
        "```gin",
        without_local_paths(facts.run),
        "```",
    ]
    return "\n".join(lines) + "\n"


def family_name(cfg: config.Model) -> str | None:
    """Hugging Face's model_type of a model; None for one that no family of it can express."""
    try:
        return huggingface.family_for_export(cfg).config_json(cfg)["model_type"]
    except ValueError:
        return None


def metadata(facts: CardFacts) -> Iterator[str]:
    """Lines of YAML."""
    family = family_name(facts.run.model)
    yield "---"
    libraries = {"huggingface": "transformers", "peft": "peft"}
    yield f"library_name: {libraries.get(facts.format, 't5x_lite')}"
    yield f"pipeline_tag: {TASKS[facts.run.model.layout]}"
    if base := base_model(facts):
        yield f"base_model: {base}"
    yield "tags:"
    yield "- t5x_lite"
    if family is not None:
        yield f"- {family}"
    yield "---"


def base_model(facts: CardFacts) -> str | None:
    """The model of the hub that a run began with, or that was converted; None for none."""
    first = facts.run.checkpoint.initial or facts.origin
    match = hub_names.NAME.fullmatch(first)
    named = match is not None and (match["revision"] or match["scheme"])
    return match["repo"] if match is not None and named else None


def describe_model(facts: CardFacts) -> Iterator[str]:
    """Lines about architecture and origin."""
    cfg = facts.run.model
    family = family_name(cfg)
    towers = " and ".join(
        f"{name} of {stack.layers} layers of width {stack.embed}"
        for name, stack in (("an encoder", cfg.encoder), ("a decoder", cfg.decoder))
        if stack is not None
    )
    kind = f"{family}, " if family else ""
    yield f"{kind}{cfg.layout.replace('_', '-')}: {towers}, {cfg.vocab:,} ids."
    yield f"{facts.parameters:,} parameters, {facts.dtypes}."
    if facts.average:
        each = (
            f"{shorten(part['source'])}, step {part['step']:,}, {part['share']:.4f}"
            for part in facts.average["checkpoints"]
        )
        yield f"Its weights are a mean ({facts.average['kind']}) of: {'; '.join(each)}."
    elif facts.step:
        yield f"Trained for {facts.step:,} steps with t5x_lite."
    initial = facts.run.checkpoint.initial
    if initial is not None:
        yield f"It began with the weights of {shorten(initial)}."
    elif facts.origin and not facts.step:
        yield f"Converted from {shorten(facts.origin)} with t5x_lite."


def describe_data(run: config.Run) -> Iterator[str]:
    """Lines about the training data; none for a model that was not trained here."""
    if run.data is None:
        return
    tasks = run.data.task.tasks if isinstance(run.data.task, config.Mixture) else (run.data.task,)
    names = (task if isinstance(task, str) else shorten_local(task.name) for task in tasks)
    named = in_a_line(", ".join(names))
    lengths = ", ".join(f"{name} {length}" for name, length in run.data.lengths.items())
    yield ""
    yield "## Data"
    yield ""
    yield f"Task: {named}. Tokens per row: {lengths}."
    if run.data.objective is not None:
        yield f"Objective: {type(run.data.objective).__name__}."


def describe_metrics(facts: CardFacts) -> Iterator[str]:
    """Lines with the metrics of report.json; none without any."""
    metrics = {
        name: value
        for name, value in facts.report.items()
        if isinstance(value, int | float) and not NOT_METRICS.search(name)
    }
    if not metrics:
        return
    yield ""
    yield "## Metrics"
    yield ""
    if split := facts.report.get("split"):
        steps = facts.report.get("steps")
        steps = steps if isinstance(steps, int) else facts.step
        yield f"On the split {in_a_line(split)}, after {steps:,} steps:"
        yield ""
    yield "| Metric | Value |"
    yield "| --- | --- |"
    for name, value in metrics.items():
        yield f"| {in_a_line(name)} | {value:.6g} |"


def loading_code(facts: CardFacts) -> Iterator[str]:
    """Lines of Python that load the model; the command that runs an exported program."""
    name = json.dumps(facts.name, ensure_ascii=False)  # in quotes
    if facts.format == "stablehlo":
        yield "In this folder, after `pip install jax flatbuffers`; the numbers are input ids:"
        yield ""
        yield "```bash"
        yield "python generate.py 5 3 22"
        yield "```"
        return
    yield "```python"
    if facts.format.startswith("t5x"):
        yield "# python -m t5x_lite.convert --from=CHECKPOINT --to=FOLDER, or T5X itself"
    else:
        yield "from t5x_lite import interactive"
        yield ""
        yield f"model = interactive.load({name})"
        method = "embed" if facts.run.model.decoder is None else "generate"
        yield f'model.{method}("...")'
    if facts.format == "huggingface":
        kind = CLASSES[facts.run.model.layout]
        tokenizer = "AutoTokenizer, " if facts.has_tokenizer else ""
        yield ""
        yield f"from transformers import {tokenizer}{kind}"
        yield ""
        if facts.has_tokenizer:
            yield f"tokenizer = AutoTokenizer.from_pretrained({name})"
        yield f"model = {kind}.from_pretrained({name})"
    yield "```"


def shorten(source: str) -> str:
    """A source as others may read it: the name of a model of the hub, the last part of a path.

    An address may have a password before its host, and a signature after its path.
    """
    if hub_names.NAME.fullmatch(source):
        return source
    if "://" in source:
        source = re.split("[?#]", source.partition("://")[2])[0].partition("/")[2]
    return source.rstrip("/").rpartition("/")[2] or "."


def without_local_paths(run: config.Run) -> str:
    """The config as text, with the last part of each path of the machine that trained."""
    run = run_sources.map_sources(run, lambda place, source: shorten(source))
    run = run_sources.map_sources(
        run, lambda place, path: shorten_local(path), kinds=run_sources.PATHS
    )
    return gin_file.to_text(run).strip()


def shorten_local(path: str) -> str:
    """A path as others may read it: what is relative to a folder stays as it is."""
    return shorten(path) if LOCAL.match(path) else path


def in_a_line(text: object) -> str:
    """A text of the user as a part of a line of Markdown, also within a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def summarize_model(cfg: config.Model, params: Any) -> list[str]:
    """Returns family, layout, towers, parameters and dtypes of a model, as parts of a line."""
    try:
        family = [huggingface.family_for_export(cfg).config_json(cfg)["model_type"]]
    except ValueError:
        family = []  # one that other libraries do not have
    towers = {"encoder": cfg.encoder, "decoder": cfg.decoder}
    stacks = [f"{name} {tower.layers} x {tower.embed}" for name, tower in towers.items() if tower]
    return [
        *family,
        cfg.layout.replace("_", "-"),
        " + ".join(stacks),
        f"{sum(model.count(cfg).values()) / 1e6:,.1f}M parameters",
        " and ".join(weight_dtypes(params)),
    ]
