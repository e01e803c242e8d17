# SPDX-License-Identifier: Apache-2.0
"""Models with Model.readout as transformers' classes ...ForSequenceClassification and
...ForTokenClassification.

T5's and BART's read a text by the decoder's state at its end, through a layer with tanh; those of
decoders read the last token's state, and have no bias. Their tags have one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints.transforms import Entry

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
# What transformers calls the kinds of a sequence's readout.
PROBLEMS = {
    "classes": "single_label_classification",
    "labels": "multi_label_classification",
    "number": "regression",
}
# Ends of the names of classes that write text, in whose place a readout's stands.
TEXT_CLASSES = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "EncoderModel")
# model_types whose sequence readout is T5ClassificationHead; of T5, all names have a prefix.
WITH_DENSE = ("t5", "mt5", "umt5", "bart", "mbart")
PREFIXED = ("t5", "mt5", "umt5")
PREFIX = "transformer."


def parse_readout(config_json: dict) -> config.Readout | None:
    """The readout of a checkpoint with this config.json; None for a model that writes text.

    Raises:
      ValueError: the labels or the problem_type cannot be read.
    """
    classes = config_json.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if not name.endswith((SEQUENCE, TOKEN)):
        return None
    model_type = config_json.get("model_type")
    names = read_labels(config_json)
    dense = model_type in WITH_DENSE
    dropout = config_json.get("classifier_dropout") or 0.0
    if name.endswith(TOKEN):
        return config.Readout("tags", labels=names, dropout=dropout)
    problem = config_json.get("problem_type") or ("regression" if len(names) == 1 else "")
    kinds = {theirs: ours for ours, theirs in PROBLEMS.items()} | {"": "classes"}
    if problem not in kinds or (kinds[problem] == "number" and len(names) > 1):
        raise ValueError(
            f"problem_type = {problem!r} with {len(names)} labels is not implemented; there are "
            f"{', '.join(PROBLEMS.values())}, the last with one output"
        )
    kind: Any = kinds[problem]
    labels = () if kind == "number" else names
    return config.Readout(kind, "last", labels, dense=dense, bias=dense, dropout=dropout)


def read_labels(config_json: dict) -> tuple[str, ...]:
    """Names of the outputs, in order; transformers' own without any, LABEL_0 and LABEL_1."""
    named = config_json.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        by_number = {int(number): str(name) for number, name in named.items()}
        return tuple(by_number[number] for number in range(len(by_number)))
    except (AttributeError, TypeError, ValueError, KeyError):
        raise ValueError(f"id2label = {named!r:.80} does not name outputs 0, 1, 2 ...") from None


def renamer(model_type: str) -> Callable[[str], str]:
    """Function from the name of a tensor to the one without the prefix that T5's classes add."""
    prefix = prefix_of(model_type)
    return lambda name: name.removeprefix(prefix)


def trunk_fields(model_type: str) -> dict[str, Any]:
    """Fields of config.json with which a family reads the trunk: labels have no table of ids."""
    return {} if model_type in WITH_DENSE else {"tie_word_embeddings": True}


def with_readout(cfg: config.Model, readout: config.Readout) -> config.Model:
    """A model that reads labels in place of text."""
    return dataclasses.replace(cfg, readout=readout, tied=True, logits_bias=False)


def without_readout(cfg: config.Model) -> config.Model:
    """The same model as one that writes text through its embeddings."""
    return dataclasses.replace(cfg, readout=None, tied=True, logits_bias=False)


def is_labeled(cfg: config.Model) -> bool:
    """True for a model whose readout is one of transformers' classes."""
    return cfg.readout is not None and cfg.readout.kind != "vector"


def head_entries(cfg: config.Model) -> list[Entry]:
    """Table of the head."""
    readout = cfg.readout
    if readout is None:
        return []
    if readout.kind == "tags":
        # T5's class has a name of its own.
        part = "classifier" if cfg.decoder is None else "score"
        table = [Entry("readout/out", f"{part}.weight", "outputs embed")]
        return [*table, Entry("readout/out_bias", f"{part}.bias", "outputs")]
    if not readout.dense:
        return [Entry("readout/out", "score.weight", "outputs embed")]
    part = "classification_head"
    return [
        Entry("readout/dense", f"{part}.dense.weight", "projected embed"),
        Entry("readout/dense_bias", f"{part}.dense.bias", "projected"),
        Entry("readout/out", f"{part}.out_proj.weight", "outputs embed"),
        Entry("readout/out_bias", f"{part}.out_proj.bias", "outputs"),
    ]


def readout_entries(cfg: config.Model, trunk: Sequence[Entry], prefix: str = "") -> list[Entry]:
    """Table of a model with a readout.

    Args:
      cfg: config of the model.
      trunk: table of `without_readout`.
      prefix: of the names of the trunk's tensors.
    """
    named = [entry._replace(theirs=prefix + entry.theirs) for entry in trunk]
    return named + head_entries(cfg)


def prefix_of(model_type: str) -> str:
    """Prefix of the trunk's tensors in transformers' classes of a family."""
    return PREFIX if model_type in PREFIXED else ""


def config_fields(cfg: config.Model, trunk_json: dict) -> dict[str, Any]:
    """Fields of config.json that the readout adds to those of the trunk, or replaces.

    Raises:
      ValueError: the family has no class with this readout; names the field.
    """
    readout = cfg.readout
    assert readout is not None
    model_type, written = trunk_json["model_type"], trunk_json["architectures"][0]
    check_expressible(cfg, readout, model_type)
    end = TOKEN if readout.kind == "tags" else SEQUENCE
    for text_class in TEXT_CLASSES:
        written = written.removesuffix(text_class)
    names = readout.labels or ("LABEL_0",)
    fields: dict[str, Any] = {
        "architectures": [written + end],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if readout.kind != "tags":
        fields["problem_type"] = PROBLEMS[readout.kind]
    if model_type in WITH_DENSE or readout.kind == "tags":
        fields["classifier_dropout"] = readout.dropout
    return fields


def check_expressible(cfg: config.Model, readout: config.Readout, model_type: str) -> None:
    """Raises ValueError, naming the field, for a readout that transformers' class lacks.

    Args:
      cfg: config of the model.
      readout: its readout.
      model_type: of the family.
    """
    tags, dense = readout.kind == "tags", model_type in WITH_DENSE
    wanted = {"dense": dense and not tags, "bias": dense or tags}
    if not tags:
        wanted["pooling"] = "last"
    different = [name for name, value in wanted.items() if getattr(readout, name) != value]
    config.require(
        not different,
        f"transformers' class of {model_type} needs "
        + ", ".join(f"Readout.{name} = {wanted[name]!r}" for name in different),
    )
    layout = cfg.layout
    fits = layout == "decoder_only" if not dense else (layout == "encoder_only") == tags
    config.require(
        fits and (dense or model_type not in ("t5gemma", "t5gemma2", "m2m_100", "marian")),
        f"transformers has no class of {model_type} for a readout of kind {readout.kind} on an "
        f"{layout.replace('_', '-')} model that is equal to it",
    )
