# SPDX-License-Identifier: Apache-2.0
"""A conversation as the prompt that a chat model was tuned on: Hugging Face's chat templates.

Templates are Jinja and come with a checkpoint, so they run in Jinja's sandbox and see plain JSON
values only. What they may use beyond Jinja is what transformers gives them: tojson without HTML
escapes, raise_exception, strftime_now, {% generation %}, {% break %}, {% continue %}.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.conversion import tokenizer_settings
from t5x_lite.conversion.sources import naming

# The names that a message's reasoning goes by.
REASONING = ("reasoning_content", "thinking", "reasoning")
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Chat(NamedTuple):
    """A template, and the special tokens that it may name (bos_token ...)."""

    template: str
    tokens: dict[str, str]


def read(folder: str | Path, name: str = "default") -> Chat | None:
    """The chat template of a Hugging Face folder, None if it has none.

    name chooses among several.

    Raises:
      ValueError: the folder has several templates, none of that name.
    """
    settings = tokenizer_settings.read_settings(Path(folder))
    with naming(settings.folder, "its chat template"):
        templates = all_of(settings)
        tokens = {role: settings.name(role) for role in TOKENS}
    if not templates:
        return None
    if name not in templates:
        raise ValueError(f"{folder} has no chat template {name!r}; it has {', '.join(templates)}")
    return Chat(templates[name], {role: token for role, token in tokens.items() if token})


def all_of(settings: tokenizer_settings.Settings) -> dict[str, str]:
    """Every template of a folder, by name."""
    templates = told(settings)
    single = settings.folder / "chat_template.jinja"
    if single.exists():
        templates["default"] = single.read_text(encoding="utf-8")
    for path in sorted((settings.folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def told(settings: tokenizer_settings.Settings) -> dict[str, str]:
    """The templates in tokenizer_config.json, by name."""
    found = settings.tokenizer.get("chat_template") or {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        found = {each.get("name"): each.get("template") for each in found}
    whole = isinstance(found, dict)
    if not whole or not all(isinstance(part, str) for each in found.items() for part in each):
        raise settings.wrong("chat_template", found, "a template, or several with their names")
    return found


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    **tokens: Any,
) -> str:
    """The messages ({"role": "user", "content": "..."}) as one prompt, as transformers writes it.

    add_generation_prompt ends it where the answer begins. tokens are the special tokens that the
    template names, and whatever else it asks for: tools, documents, enable_thinking ...

    Raises:
      ValueError: the template is broken, refuses the messages, or they are not JSON values.
    """
    import jinja2

    if not messages:
        raise ValueError("A chat needs at least one message")
    try:
        plain = json.loads(json.dumps([message_of(each) for each in messages]))
        given = json.loads(json.dumps(tokens))
    except TypeError as error:
        raise ValueError(f"A chat template sees plain JSON values only: {error}") from error
    values = {"tools": None, "documents": None} | given
    try:
        made = compiled(template)
        return made.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template is broken, line {error.lineno}: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"The chat template refuses these messages: {error}") from error
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise ValueError(f"The chat template fails on these messages: {kind}: {error}") from error


def message_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without empty fields, its reasoning under the names that templates read."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f'A chat message is {{"role": "user", "content": "..."}}; got {message!r:.80}'
        )
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> Any:
    """The template in a sandbox: it cannot change what it is given nor reach Python's insides."""
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's part for training; in a prompt it does nothing."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made.from_string(template)
