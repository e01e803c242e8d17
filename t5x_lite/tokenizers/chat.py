# SPDX-License-Identifier: Apache-2.0
"""Conversations as the prompts that a chat model was tuned on: Hugging Face's chat templates.

Templates are Jinja and come with a checkpoint: they run in a process of their own
(`chat_renderer`), whose time and memory are limited, and see plain JSON values only.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.tokenizers import chat_renderer, tokenizer_settings
from t5x_lite.tokenizers.errors import naming_path
from t5x_lite.utils import bounded_files
from t5x_lite.utils.not_none import not_none

# Fields that may have the reasoning of a message.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Of a template; the longest that are published have 20 kB.
MOST_BYTES = 2**22
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
        bounded_files.check_regular(single, MOST_BYTES)
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
    if not messages:
        raise ValueError("A chat needs at least one message")
    variables = {"tools": None, "documents": None} | tokens
    variables |= {
        "messages": [normalize_message(each) for each in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps({"template": template, "variables": variables})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"A chat template sees plain JSON values only: {error}") from error
    reply = RENDERER.request(request)
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["text"]


class TemplateProcess:
    """A process that renders templates, started with the first and again after one that ended it.

    Attributes:
      process: the process; None before the first template.
      parent: process that started it: a fork of it needs one of its own.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.parent = 0
        self.lock = threading.Lock()

    def request(self, line: str) -> dict[str, str]:
        """The reply to a request of `chat_renderer`, a line of JSON."""
        with self.lock:
            if self.process is None or self.parent != os.getpid():
                self.start()
            try:
                process = not_none(self.process)
                not_none(process.stdin).write(line.encode() + b"\n")
                not_none(process.stdin).flush()
                reply = not_none(process.stdout).readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:
                self.close()  # an unread reply would be taken for the next one
                raise
            if reply.endswith(b"\n"):
                return json.loads(reply)
            self.close()
        return {
            "error": "The chat template does not come to an end: it was stopped after "
            f"{chat_renderer.CPU_SECONDS} seconds, or at {chat_renderer.MEMORY >> 20} MiB"
        }

    def start(self) -> None:
        """Starts the process."""
        # -P: the folder of the script holds our modules, which must not hide Python's.
        self.process = subprocess.Popen(
            [sys.executable, "-P", chat_renderer.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.parent = os.getpid()

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None and self.parent == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


RENDERER = TemplateProcess()
atexit.register(RENDERER.close)


def end_of_turn(template: ChatTemplate) -> str:
    """The text that a template puts after an answer; "" if it cannot be rendered."""
    answer = "The answer."
    talk = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        tokens: dict[str, Any] = template.tokens
        text = render_chat(template.template, talk, **tokens)
    except ValueError:
        return ""
    return text.rpartition(answer)[2] if answer in text else ""


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
