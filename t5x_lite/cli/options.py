# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: the checkpoint, and how text is decoded."""

import argparse
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.config.canvas import check_canvas_decode
from t5x_lite.config.checked import (
    Count,
    CountOrZero,
    OutOfRange,
    coerce,
    field_types,
    type_in_words,
)
from t5x_lite.utils.hub_names import source_argument
from t5x_lite.utils.paths import parse_path, path_argument

DECODE = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "beams", "alpha", "n_best"),
    *("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("bad_words", "regex", "choices", "json_schema", "grammar"),
    *("force_words", "stop", "target_prefix", "span_of_input", "token_healing"),
    *("drafter", "draft_length", "accept", "companion", "combine", "compute", "kv_cache", "commit"),
    *("logprobs", "choose", "beam_groups", "diversity_penalty"),
    *("search", "judge", "judge_weight", "particles", "segment_tokens", "segment_stop"),
)
COMPUTE = typing.get_args(field_types(config.Decode)["compute"])
FILES_OF_DECODE = ("json_schema", "grammar")  # whose options name a file

# Measures of `evaluation.multiple_choice`, and prompts of `data.superglue`.
NORMALIZATIONS = ("none", "tokens", "characters", "prior")
PROMPT_STYLES = ("t5", "plain")

# Names of `decoding.drafters.registry`; A+B is both at once.
DRAFTERS = {
    "auto": "the model's draft heads, or lookup for long texts; plain if neither is safe or pays",
    "plain": "one token per forward pass",
    "blockwise": "a chain from the model's draft heads (Stern et al., 2018)",
    "refined": "the best chain through the likely tokens of those heads",
    "medusa": "a tree of the likely tokens of those heads",
    "lookup": "copies what followed the last tokens before: in the text, or the encoder's input",
    "recycling": "a tree of the model's runners-up; recycling:PATH starts with those of texts",
    "trigram": "what most often followed the last two tokens",
    "jacobi": "the last block's predictions, moved on by one",
    "lookahead": "n-grams of a window of Jacobi iterations",
    "early": "early:N, the model's first N layers",
    "late": "late:N, the model's layers from N on",
    "draft": "draft:PATH, a smaller checkpoint of the same vocabulary",
}
ACCEPTANCES = {
    "exact": "the text of plain decoding",
    "speculative": "another text of the same distribution, for drafters with probabilities",
    "block": "the same, verified a block at a time: more tokens are kept",
    "top-k": "top-k:N CHANGES THE TEXT: keeps a token among the N most probable",
    "distance": "distance:N CHANGES THE TEXT: keeps an id within N (ids that are quantities)",
    "typical": "typical[:0.3:0.09] CHANGES THE TEXT: keeps a probable token, by the entropy",
    "lenient": "lenient:0.5 CHANGES THE TEXT: keeps a token half as probable as the best",
    "minimum": "minimum:N CHANGES THE TEXT: keeps at least N tokens per forward pass",
    "always": "CHANGES THE TEXT: keeps every draft token",
}
CHOICES = {
    "score": "by the log-probability over the length penalty",
    "mbr": "mbr:METRIC, by the mean of a metric against the other texts (minimum Bayes risk)",
    "rerank": "rerank:PATH, by the log-probability of another checkpoint",
    "function": "function:MODULE.NAME, by a function (input, texts) -> a number for each",
    "coverage": "coverage:BETA, by score plus BETA times how well the input is attended to",
}
SEARCHES = {
    "best": "keeps the best one and doubles it; of whole texts, the best of n",
    "rejection": "rejection:N, draws a segment up to N times, until the judge accepts it",
    "smc": "resamples by weight: draws of the model's law times exp(weight * judge)",
    "puct": "puct:N, tree search in N simulations; judges whole texts",
}
NUMBERS_OF_SEARCH = {
    "judge_weight": ("W", "factor of the judge's numbers (default: 1)"),
    "particles": ("N", "samples that are written at a time (default: 8)"),
    "segment_tokens": ("N", "tokens of a segment (default: 16)"),
}
# Fields of config.Decode that are numbers: metavar and help of the option.
NUMBERS_OF_DECODE = {
    "max_new_tokens": ("N", "the most new tokens of a text"),
    "temperature": ("T", "0 is greedy; 1 samples from the model"),
    "top_k": ("K", "sample among the K most probable tokens only"),
    "top_p": ("P", "sample among the fewest tokens of probability P"),
    "seed": ("N", "seed of sampling: the same text for the same line"),
    "beams": ("N", "beam search with N beams"),
    "alpha": ("A", "length penalty of beam search; 0 is none"),
    "n_best": ("N", "return the N best beams, or N samples"),
}
STEERING_OF_DECODE = {
    "min_p": ("P", "sample among tokens P times as probable as the best one, or more"),
    "typical_p": ("P", "sample among the tokens nearest to the entropy, of probability P"),
    "epsilon_cutoff": ("P", "sample among tokens of probability P or more"),
    "eta_cutoff": ("P", "the same, with a limit that falls as the entropy rises"),
    "repetition_penalty": ("R", "divide the logits of tokens in prompt and text; 1 is none"),
    "presence_penalty": ("A", "subtract A from the logits of tokens that the text has"),
    "frequency_penalty": ("A", "the same, for each time that it has them"),
    "no_repeat_ngram_size": ("N", "never write the same N tokens in a row twice"),
    "min_new_tokens": ("N", "at least N new tokens before the end"),
}


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint and what selects and places its weights."""
    group = parser.add_argument_group("weights")
    add = group.add_argument
    add(
        "--checkpoint",
        type=source_argument,
        required=True,
        metavar="PATH",
        help="a run or Hugging Face folder, a .gguf file, g2p, or of the hub: "
        "owner/name[@revision], owner/name:file.gguf",
    )
    one = group.add_mutually_exclusive_group()
    step = "the checkpoint of this step (default: the newest)"
    one.add_argument("--step", type=number_parser(CountOrZero), metavar="N", help=step)
    best = "the best checkpoint by Checkpoint.metric of the run"
    one.add_argument("--best", action="store_true", help=best)
    add_mesh(group)
    add(
        "--quantize",
        metavar="KIND",
        help="keeps weights in int8, int4, int4:32, int8_activations, ...",
    )


def add_checkpoints(command: Any, ending: str = "") -> None:
    """Adds --checkpoint to a command that serves several models.

    Args:
      command: the parser.
      ending: more for its help.
    """
    command.add_argument(
        "--checkpoint",
        type=source_argument,
        action="append",
        required=True,
        metavar="PATH",
        help="the MODEL_DIR of a run, a Hugging Face folder, a .gguf file or a model of the hub, "
        f"owner/name; again for another one{ending}",
    )


def add_adapter(group: Any, text: str) -> None:
    """Adds --adapter, which may be repeated, to a group of options; `text` is its help."""
    group.add_argument(
        "--adapter", type=named_source, action="append", metavar="NAME=PATH", help=text
    )


def named_source(text: str) -> tuple[str, str]:
    """A name and a source, for `type=` of argparse.

    Raises:
      argparse.ArgumentTypeError: it is not written NAME=PATH.
    """
    name, sign, source = text.partition("=")
    if not (name and sign and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not written as NAME=PATH")
    return name, source_argument(source)


def attach_named(session: Any, named: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Sessions with adapters by name, which share the weights of one.

    Args:
      session: an interactive.Session of the base.
      named: names and sources of adapters.

    Raises:
      ValueError: a name is there twice, or a source has no adapters of this model.
    """
    sessions: dict[str, Any] = {}
    for name, source in named:
        config.require(name not in sessions, f"--adapter has the name {name} twice")
        try:
            sessions[name] = session.with_adapters(source)
        except ValueError as error:
            raise ValueError(f"--adapter {name}: {error}") from error
    return sessions


def add_mesh(group) -> None:
    """Adds --mesh to a parser or to a group of its options."""
    group.add_argument(
        "--mesh",
        type=parse_mesh,
        metavar="D,F,T",
        help="devices for data, fsdp, tensor: 1,1,4 (default: all for data)",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of config.Decode, and --batch_size."""
    group = parser.add_argument_group("decoding (default: Decode of the run's config)")
    for name, (metavar, text) in NUMBERS_OF_DECODE.items():
        add_number(group, name, field_types(config.Decode)[name], metavar, text)
    add_number(group, "batch_size", Count, "N", "how many texts are decoded at once")
    computed = "float32, bfloat16, or int8, which CHANGES THE TEXT"
    group.add_argument("--compute", choices=COMPUTE, metavar="DTYPE", help=computed)
    cached = "int8, int4 or int8:int4 (keys, values), which CHANGES THE TEXT"
    group.add_argument("--kv_cache", metavar="DTYPE", help=cached)
    kept = "with Model.canvas, after a pass: top:M, threshold:P, random:M"
    group.add_argument("--commit", metavar="POLICY", help=kept)
    group = parser.add_argument_group(
        "several texts for an input (--n_best)", name_table("--choose", CHOICES)
    )
    group.add_argument("--choose", metavar="HOW", help="order them, best first (default: as drawn)")
    text = "add log-probabilities: of each token and its K best alternatives"
    add_number(group, "logprobs", CountOrZero, "K", text)
    groups = "groups of beams that differ (diverse beam search)"
    add_number(group, "beam_groups", CountOrZero, "N", groups)
    hint = field_types(config.Decode)["diversity_penalty"]
    apart = "subtracted for each beam of an earlier group that takes a token"
    add_number(group, "diversity_penalty", hint, "P", apart)
    add_search(parser)
    add_steering(parser)
    group = parser.add_argument_group(
        "speculative decoding: faster, with the same text",
        name_table("--drafter", DRAFTERS) + "\n" + name_table("--accept", ACCEPTANCES),
    )
    add = group.add_argument
    add("--drafter", metavar="NAME", help="auto (default), plain, lookup, early:4, lookup+trigram")
    hint = field_types(config.Decode)["draft_length"]
    add_number(group, "draft_length", hint, "N", "tokens of a block; 0 is measured (default)")
    add("--accept", metavar="RULE", help="which draft tokens are kept (default: exact)")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of config.Decode by which samples are judged on the way."""
    group = parser.add_argument_group(
        "search among samples (--temperature): judged after each segment",
        name_table("--search", SEARCHES),
    )
    group.add_argument("--search", metavar="HOW", help="keep, drop and double samples")
    group.add_argument("--judge", metavar="HOW", help="gives texts numbers, as --choose does")
    for name, (metavar, text) in NUMBERS_OF_SEARCH.items():
        add_number(group, name, field_types(config.Decode)[name], metavar, text)
    ends = "end a segment too, such as a line break"
    group.add_argument("--segment_stop", nargs="+", metavar="TEXT", help=ends)


def add_languages(group: Any) -> None:
    """Adds the languages of a translation to a group of options."""
    source = "of M2M100, NLLB, mBART-50, Marian: of the input: en, en_XX"
    group.add_argument("--source_language", metavar="CODE", help=source)
    group.add_argument("--target_language", metavar="CODE", help="language of the texts: de, de_DE")


def add_steering(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of config.Decode that say what may follow."""
    group = parser.add_argument_group("steering: which tokens may follow, with any drafter")
    for name, (metavar, text) in STEERING_OF_DECODE.items():
        add_number(group, name, field_types(config.Decode)[name], metavar, text)
    add = group.add_argument
    kinds = "model:PATH, prompt:TEXT, unconditional, layers:2"
    add("--companion", metavar="WHAT", help=f"second logits: {kinds}")
    rules = "guidance:1.5, contrast:0.1, instructive, dola, deco, switch:NATS"
    add("--combine", metavar="RULE", help=rules)
    add("--bad_words", nargs="+", metavar="TEXT", help="texts that are never written")
    add("--stop", nargs="+", metavar="TEXT", help="ends a text, which is cut before it")
    add("--target_prefix", nargs=1, metavar="TEXT", help="what the targets begin with")
    add("--token_healing", action="store_true", default=None, help="go on from a cut last token")
    add("--force_words", nargs="+", metavar="TEXT", help="every text contains all of these")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--regex", metavar="PATTERN", help="every text matches it as a whole")
    one.add_argument("--choices", nargs="+", metavar="TEXT", help="every text is one of these")
    text = "every text is a part of its input"
    one.add_argument("--span_of_input", action="store_true", default=None, help=text)
    schema = "every text is JSON that follows the JSON schema in this file"
    one.add_argument("--json_schema", type=path_argument, metavar="FILE", help=schema)
    grammar = "every text follows the grammar in this file, GBNF or Lark"
    one.add_argument("--grammar", type=path_argument, metavar="FILE", help=grammar)


def name_table(title: str, rows: dict[str, str]) -> str:
    """Names and what they do, as lines of --help."""
    return "\n".join([f"{title}:", *(f"  {name:<12}{text}" for name, text in rows.items())])


def add_number(
    group, name: str, hint: Any, metavar: str, text: str, default: float | None = None
) -> None:
    """Adds an option that is a number to a parser or to a group of its options.

    Args:
      group: the parser or group.
      name: of the option, without dashes.
      hint: annotation with its range, as of `number_parser`.
      metavar: stands for the number in help.
      text: help.
      default: the number without the option.
    """
    kind = number_parser(hint)
    group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text, default=default)


def number_parser(hint: Any) -> Callable[[str], float]:
    """A function for `type=` of argparse that reads a number of an annotated range.

    Args:
      hint: annotation of config.checked, such as Count, or that of a field.
    """
    kind = typing.get_args(hint)[0]

    def read_number(text: str) -> float:
        try:
            return coerce(kind(text), hint)
        except OutOfRange as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except ValueError as error:
            wanted = f"must be {type_in_words(hint)}; got {text!r:.80}"
            raise argparse.ArgumentTypeError(wanted) from error

    return read_number


def parse_mesh(text: str) -> config.Mesh:
    """Mesh of three sizes "data,fsdp,tensor".

    Raises:
      argparse.ArgumentTypeError: the text is not three positive integers.
    """
    try:
        data, fsdp, tensor = map(int, text.split(","))
        return config.Mesh(data, fsdp, tensor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not three numbers data,fsdp,tensor ({error})"
        ) from error


def decode_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of config.Decode that the command line sets.

    Raises:
      ValueError: the file of --json_schema or --grammar cannot be read.
    """
    fields = {name: value for name in DECODE if (value := getattr(options, name)) is not None}
    for name in FILES_OF_DECODE:
        if name not in fields:
            continue
        try:
            fields[name] = parse_path(fields[name]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"--{name}: {fields[name]} cannot be read: {error}") from error
    return fields


def configure_session(session: Any, options: argparse.Namespace) -> None:
    """Sets how an interactive.Session decodes, by the options of `add_decode`.

    Raises:
      ValueError: options contradict each other.
    """
    try:
        session.decode = session.settings(decode_fields(options))
        check_canvas_decode(session.predictor.cfg, session.decode)
    except ValueError as error:
        # The fields were set by options, whose names are theirs.
        named = re.sub(rf"\bDecode\.(?=(?:{'|'.join(DECODE)})\b)", "--", str(error))
        raise ValueError(named) from error
    if options.batch_size:
        session.predictor.batch_size = options.batch_size
    source, target = (getattr(options, f"{side}_language", None) for side in ("source", "target"))
    if source or target:
        session.set_languages(source, target)
