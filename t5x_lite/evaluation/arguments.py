# SPDX-License-Identifier: Apache-2.0
"""Arguments of a caller in Python, checked, and options that are fields of config.Decode; loads no
library of arrays.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from t5x_lite import config
from t5x_lite.config import aliases
from t5x_lite.config.checked import OutOfRange, WrongType, coerce, wrong_type_in_words
from t5x_lite.config.decoding import FILTERS


def takes_decode_options(method: Callable) -> Callable:
    """Makes `help` and completion show the fields of config.Decode in place of **options.

    The default of each is None: what the session has in `decode`.
    """
    signature = inspect.signature(method)
    named = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    for name, hint in get_type_hints(config.Decode).items():
        if name not in signature.parameters:
            named.append(inspect.Parameter(name, keyword, default=None, annotation=hint | None))

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        return method(*arguments, **options)

    # What inspect, help and editors read.
    call.__dict__["__signature__"] = signature.replace(parameters=named)
    described = (inspect.getdoc(config.Decode) or "").partition("Attributes:\n")[2].rstrip()
    line = re.compile(r"^  \*\*options: .*$", re.MULTILINE)
    call.__doc__ = line.sub(lambda match: described, inspect.getdoc(method) or "")
    return call


def merge_options(decode: config.Decode, options: Any) -> config.Decode:
    """Returns a config with those options in place of its fields that are not None.

    An option temperature 0 is greedy, and puts the defaults that narrow a sample out of use.

    Args:
      decode: the defaults.
      options: fields of config.Decode, old names included.

    Raises:
      ValueError: an option is unknown, of another type or out of range, or two contradict each
        other.
    """
    if not isinstance(options, dict):
        raise ValueError(f"options must be a dict of fields of config.Decode; got {options!r}")
    known = [field.name for field in dataclasses.fields(config.Decode)]
    options = aliases.rename_keywords(options, "Decode")
    for name in options:
        if name not in known:
            hint = aliases.suggest_field(name, "Decode", known)
            raise ValueError(f"Unknown option {name}: {hint}")
    chosen = {name: value for name, value in options.items() if value is not None}
    greedy = chosen.get("temperature") == 0
    unused = {name: getattr(config.Decode, name) for name in FILTERS} if greedy else {}
    return dataclasses.replace(decode, **(unused | chosen))


def check_argument(name: str, value: Any, hint: Any) -> Any:
    """Returns an argument as the type of an annotation.

    Args:
      name: of the argument, for messages.
      value: what was passed.
      hint: annotation with its range, as of a config's field.

    Raises:
      ValueError: it is of another type, or out of range.
    """
    try:
        return coerce(value, hint)
    except WrongType:
        raise ValueError(f"{name} {wrong_type_in_words(value, hint)}") from None
    except OutOfRange as error:
        raise ValueError(f"{name} {error}") from None


def check_callback(name: str, value: Callable | None) -> None:
    """Raises ValueError unless an argument can be called, or is None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function or None; got {shorten(value)}")


def list_texts(texts: Any, one: bool = False) -> list[str]:
    """Returns a text, or an iterable of texts, as a list.

    Args:
      texts: the argument of a method.
      one: it must be a single text.

    Raises:
      ValueError: it is something else, or something in it is.
    """
    if isinstance(texts, str):
        return [texts]
    # Of a dict, a set or bytes the order or the parts are not what one means.
    listed = isinstance(texts, Iterable) and not isinstance(texts, dict | set | bytes)
    if one or not listed:
        wanted = "a text" if one else "a text or a list of texts"
        raise ValueError(f"Expected {wanted}; got {shorten(texts)}")
    every = list(texts)
    for number, each in enumerate(every):
        if not isinstance(each, str):
            raise ValueError(f"Text {number} of the list must be a text; got {shorten(each)}")
    return every


def list_pairs(name: str, inputs: Any, targets: Any) -> tuple[list[str], list[str]]:
    """Returns inputs and their targets as two lists of texts.

    Args:
      name: of the method, for messages.
      inputs: a text or a list of texts.
      targets: as many.

    Raises:
      ValueError: they are not texts, or do not pair up.
    """
    pair = list_texts(inputs), list_texts(targets)
    if isinstance(inputs, str) != isinstance(targets, str):
        raise ValueError(f"{name} takes two texts, or two lists of texts")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{name} takes pairs: got {len(pair[0])} inputs but {len(pair[1])} targets"
        )
    return pair


def check_messages(messages: Any) -> None:
    """Raises ValueError unless messages are a list of dicts, each with a role."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, bytes) and messages
    if not listed or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise ValueError(
            'Expected a question, or a list such as [{"role": "user", "content": "..."}]; got '
            f"{shorten(messages)}"
        )


def shorten(value: Any) -> str:
    """The representation of a value, cut for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def predict_texts(
    predictor: Any,
    texts: list[str],
    options: Mapping[str, Any],
    merge: Callable[[dict[str, Any]], config.Decode],
) -> list[Any]:
    """Predictions of a model for texts: texts, or with Model.readout what `readouts` reads.

    Args:
      predictor: `evaluation.predict.Predictor`.
      texts: the texts.
      options: fields of config.Decode, which a model with a readout does not take.
      merge: adds them to the defaults of the session.

    Raises:
      ValueError: an option that the model does not take, or a text that it cannot read.
    """
    if predictor.cfg.readout is None:
        return predictor.predict(texts, merge(dict(options)))
    from t5x_lite.evaluation import readouts

    bound = [name for name, value in options.items() if value is not None]
    config.require(
        not bound, f"The model writes no text (Model.readout): leave out {', '.join(bound)}"
    )
    return readouts.predict_readouts(predictor, texts)
