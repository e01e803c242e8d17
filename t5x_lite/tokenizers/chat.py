# SPDX-License-Identifier: Apache-2.0
"""Conversations as the prompts that a chat model was tuned on: Hugging Face's chat templates.

Templates are Jinja and come with a checkpoint, so they run in Jinja's sandbox and see plain JSON
values only. Beyond Jinja they may use what transformers offers them: tojson without HTML
escapes, raise_exception, strftime_now, {% generation %}, {% break %}, {% continue %}.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.tokenizers import tokenizer_settings
from t5x_lite.tokenizers.errors import naming_path

# Fields that may have the reasoning of a message.
REASONING = ("reasoning_content", "thinking", "reasoning")
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplate(NamedTuple):
    """A chat template, and the special tokens that it may name.

    Attributes:
      template: its text.
      tokens: tokens by role, "bos_token" ...
    """

    template: str
    tokens: dict[str, str]


def read_chat_template(folder: str | Path, name: str = "default") -> ChatTemplate | None:
    """Reads the chat template of a Hugging Face folder.

    Args:
      folder: the folder.
      name: which of several templates.

    Returns:
      The template; None if the folder has none.

    Raises:
      ValueError: the folder has several templates, none of that name.
    """
    settings = tokenizer_settings.read_tokenizer_settings(Path(folder))
    with naming_path(settings.folder, "its chat template"):
        templates = all_templates(settings)
        tokens = {role: settings.name(role) for role in TOKENS}
    if not templates:
        return None
    if name not in templates:
        raise ValueError(f"{folder} has no chat template {name!r}; it has {', '.join(templates)}")
    return ChatTemplate(templates[name], {role: token for role, token in tokens.items() if token})


def all_templates(settings: tokenizer_settings.TokenizerSettings) -> dict[str, str]:
    """Every template of a folder, by name."""
    templates = templates_in_settings(settings)
    single = settings.folder / "chat_template.jinja"
    if single.exists():
        templates["default"] = single.read_text(encoding="utf-8")
    for path in sorted((settings.folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def templates_in_settings(settings: tokenizer_settings.TokenizerSettings) -> dict[str, str]:
    """The templates in tokenizer_config.json, by name."""
    value = settings.tokenizer.get("chat_template") or {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {each.get("name"): each.get("template") for each in value}
    named = isinstance(value, dict)
    if not named or not all(isinstance(part, str) for each in value.items() for part in each):
        raise settings.wrong("chat_template", value, "a template, or several with their names")
    return value


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    **tokens: Any,
) -> str:
    """Renders a conversation as one prompt, as transformers does.

    Args:
      template: a chat template.
      messages: {"role": "user", "content": "..."} in order.
      add_generation_prompt: end the prompt where the answer begins.
      tokens: special tokens that the template names, and other variables that it uses: tools,
        documents, enable_thinking ...

    Returns:
      The prompt.

    Raises:
      ValueError: the template is broken, refuses the messages, or they are not JSON values.
    """
    import jinja2

    if not messages:
        raise ValueError("A chat needs at least one message")
    try:
        plain = json.loads(json.dumps([normalize_message(each) for each in messages]))
        variables = json.loads(json.dumps(tokens))
    except TypeError as error:
        raise ValueError(f"A chat template sees plain JSON values only: {error}") from error
    values = {"tools": None, "documents": None} | variables
    try:
        return compile_template(template).render(
            messages=plain, add_generation_prompt=add_generation_prompt, **values
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template is broken, line {error.lineno}: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"The chat template refuses these messages: {error}") from error
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise ValueError(f"The chat template fails on these messages: {kind}: {error}") from error


def normalize_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without empty fields, with its reasoning under the names that templates read."""
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
def compile_template(template: str) -> Any:
    """Compiles a template in a sandbox: it cannot change its variables or reach Python itself."""
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

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
