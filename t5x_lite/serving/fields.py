# SPDX-License-Identifier: Apache-2.0
"""Fields of requests: those of OpenAI's API, checked, and those of config.Decode beside them."""

import dataclasses
import json
import re
import secrets
from typing import Any, NamedTuple, NoReturn

from t5x_lite import config
from t5x_lite.config.checked import Few, field_types
from t5x_lite.config.decoding import FILTERS
from t5x_lite.decoding.request import SEED_STEP
from t5x_lite.evaluation.arguments import check_argument, merge_options
from t5x_lite.serving.errors import InvalidField

# Names of OpenAI's for fields of config.Decode.
RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# Fields of config.Decode that a request may set: none of them names a file or another model.
DECODE = (
    *("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("min_new_tokens", "bad_words", "suppress_tokens", "regex", "grammar", "choices"),
)
# Characters of rules that a request may have: their automata take time and memory.
RULES = ("stop", "bad_words", "regex", "grammar", "choices", "response_format")
MOST_CHARACTERS = 2**15
# Fields that change no text.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier"}
# Fields of OpenAI's that are not served: a request may have them with a value that asks nothing.
IDLE = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
}


class Wanted(NamedTuple):
    """Fields of a request, by what reads them.

    Attributes:
      model: name of the model.
      n: number of texts of each input.
      stream: the texts are sent while they are written.
      include_usage: a stream ends with the counts of its tokens.
      decode: fields of config.Decode.
      others: fields of the route.
    """

    model: str
    n: int
    stream: bool
    include_usage: bool
    decode: dict[str, Any]
    others: dict[str, Any]


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses the body of a request.

    Raises:
      InvalidField: it is not UTF-8, not JSON, or not an object.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        fields = json.loads(body.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidField(None, f"The request is not JSON: {reason}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidField(None, "The request must be a JSON object", "invalid_json")
    return {name: value for name, value in fields.items() if value is not None}


def read_field(fields: dict[str, Any], name: str, hint: Any, default: Any = None) -> Any:
    """Takes a field out of a request.

    Args:
      fields: the request.
      name: name of the field.
      hint: annotation with its range, as of a config's field.
      default: its value where it is missing; `...` if it is required.

    Raises:
      InvalidField: it is missing and required, of another type, or out of range.
    """
    if name not in fields:
        if default is ...:
            raise InvalidField(name, f"{name} is missing", "missing_required_parameter")
        return default
    try:
        return check_argument(name, fields.pop(name), hint)
    except ValueError as error:
        message = str(error)
        shown = message if message.startswith(name) else f"{name}: {message}"
        raise InvalidField(name, shown) from None


def read_request(fields: dict[str, Any], hints: dict[str, Any]) -> Wanted:
    """Reads the fields of a request that writes texts.

    Args:
      fields: the request.
      hints: annotations of the route's own fields by name, and the default of each.

    Raises:
      InvalidField: a field is unknown, missing, of another type or out of range.
    """
    fields = dict(fields)
    model = read_field(fields, "model", str, ...)
    n = read_field(fields, "n", Few, 1)
    stream = read_field(fields, "stream", bool, False)
    options = read_field(fields, "stream_options", dict[str, bool], {})
    others = {name: read_field(fields, name, *hint) for name, hint in hints.items()}
    decode = read_decode(fields)
    check_others(fields)
    return Wanted(model, n, stream, options.get("include_usage", False), decode, others)


def read_decode(fields: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of config.Decode out of a request."""
    types, decode = field_types(config.Decode), {}
    rules = {name: fields[name] for name in RULES if name in fields}
    if len(json.dumps(rules)) > MOST_CHARACTERS:
        name = max(rules, key=lambda each: len(json.dumps(rules[each])))
        message = f"{name} is too long: rules have at most {MOST_CHARACTERS:,} characters in all"
        raise InvalidField(name, message)
    bias = fields.get("logit_bias")
    if isinstance(bias, dict):
        fields["logit_bias"] = {
            int(key) if key.isdecimal() and len(key) < 11 else key: bias[key] for key in bias
        }
    for theirs, ours in RENAMED.items():
        if theirs in fields:
            decode[ours] = read_field(fields, theirs, types[ours])
    for name in DECODE:
        if name in fields:
            decode[name] = read_field(fields, name, types[name])
    if "response_format" in fields:
        schema = read_format(read_field(fields, "response_format", dict[str, object]))
        if schema is not None:
            decode["json_schema"] = schema
    return decode


def read_format(format: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of a response_format; None for free text."""
    kind, name = format.get("type"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise InvalidField(name, f"{name}.type must be text, json_object or json_schema")
    described = format.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise InvalidField(name, f"{name}.json_schema.schema must be a JSON schema, an object")
    return schema


def check_others(fields: dict[str, Any]) -> None:
    """Raises InvalidField for what is left of a request, unless it asks for nothing."""
    for name, value in fields.items():
        if name in WITHOUT_EFFECT or value in IDLE.get(name, ()):
            continue
        reason = "is not supported here: leave it out" if name in IDLE else "is not a field here"
        message = f"{name} {reason}"
        raise InvalidField(name[:100], message[:200], "unknown_parameter")


def make_decode(defaults: config.Decode, wanted: Wanted, logprobs: int | None) -> config.Decode:
    """The config of decoding of a request.

    A sample without a seed gets one of its own.

    Args:
      defaults: settings of the checkpoint.
      wanted: the request.
      logprobs: number of alternatives of each token; None for no log-probabilities.

    Raises:
      InvalidField: two fields contradict each other.
    """
    options = dict(wanted.decode)
    if options.get("temperature") == 0:
        # All tokens of the highest probability pass these filters.
        options = {name: value for name, value in options.items() if name not in FILTERS}
    try:
        decode = merge_options(defaults, options | {"logprobs": logprobs})
    except ValueError as error:
        raise refuse_decode(error) from None
    if decode.temperature > 0 and "seed" not in options:
        decode = dataclasses.replace(decode, seed=secrets.randbits(32))
    return decode


def refuse_decode(error: ValueError) -> InvalidField:
    """The error of a field of config.Decode, by its name in requests."""
    message, named = str(error), re.search(r"Decode\.(\w+)", str(error))
    shown = {"max_new_tokens": "max_tokens", "json_schema": "response_format"}
    for ours, theirs in shown.items():
        message = message.replace(f"Decode.{ours}", theirs)
    param = shown.get(named[1], named[1]) if named else None
    return InvalidField(param, message.replace("Decode.", ""))


def list_decodes(decode: config.Decode, count: int) -> list[config.Decode]:
    """The configs of `count` texts of one input: samples have the seeds of those of n_best."""
    if decode.temperature == 0:
        return [decode] * count
    seeds = [(decode.seed + number * SEED_STEP) % 2**32 for number in range(count)]
    return [dataclasses.replace(decode, seed=seed) for seed in seeds]


def list_prompts(value: Any, name: str) -> list[str | list[int]]:
    """The inputs of a request: a text, texts, ids, or lists of ids.

    Args:
      value: the field.
      name: its name, for messages.

    Raises:
      InvalidField: it is something else, or empty.
    """
    if isinstance(value, str):
        return [check_text(value, name)]
    listed = value if isinstance(value, list) else []
    if listed and all(type(each) is int for each in listed):
        return [check_ids(listed, name)]
    for each in listed:
        if isinstance(each, list) and each and all(type(token) is int for token in each):
            check_ids(each, name)
        elif not isinstance(each, str):
            listed = []
            break
        else:
            check_text(each, name)
    if not listed:
        raise InvalidField(name, f"{name} must be a text, a list of texts, or lists of token ids")
    return listed


def check_text(text: str, name: str) -> str:
    """Returns a text; raises InvalidField if it has a lone surrogate, which JSON can escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{name} has half of a surrogate pair: send whole characters"
        raise InvalidField(name, message) from None
    return text


def check_ids(ids: list[int], name: str) -> list[int]:
    """Returns ids; raises InvalidField for one that no vocabulary has."""
    if not 0 <= min(ids) <= max(ids) < 2**31:
        raise InvalidField(name, f"{name} has a token id outside of every vocabulary")
    return ids
