# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.serve: a server of models with OpenAI's API."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Annotated

from t5x_lite.cli.command import Command
from t5x_lite.cli.options import add_adapter, add_checkpoints, add_number
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Range, field_types
from t5x_lite.serving.server_limits import ServerLimits
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.hub_names import short_names

KEY = "T5X_LITE_API_KEY"
# Least characters of a key.
LEAST = 16
EXAMPLES = f"""\
examples:
  # a model for programs of this machine: http://127.0.0.1:8000/v1
  python -m t5x_lite.serve --checkpoint=google/flan-t5-small
  curl http://127.0.0.1:8000/v1/translations -H 'Content-Type: application/json' -d \\
    '{{"model": "flan-t5-small", "input": "translate English to German: Good night"}}'
  # several models; requests choose one by its name, "g2p" or "SmolLM2-135M-Instruct.Q4_1.gguf"
  python -m t5x_lite.serve --checkpoint=runs/g2p --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf
  # a model with adapters of its own for some requests: "model": "reviews"
  python -m t5x_lite.serve --checkpoint=google/flan-t5-small --adapter=reviews=runs/reviews
  # for other machines, with an API key; 32 texts at a time, 500 more may wait
  {KEY}=$(cat key.txt) python -m t5x_lite.serve --checkpoint=runs/g2p --host=0.0.0.0 \\
    --rows=32 --queue=500

Any client of OpenAI's API works: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="...").
Routes: /v1/completions, /v1/chat/completions, /v1/embeddings, /v1/translations, /v1/summaries,
/v1/models; /health, /ready, /metrics (Prometheus). SIGTERM finishes what has begun (--drain).
It needs the extra "serve".
"""


# Options of limits: the metavar and help of each.
LIMITS = {
    "rows": ("N", "texts that a model writes at the same time"),
    "max_input_tokens": ("N", "most tokens of an input"),
    "max_new_tokens": ("N", "most new tokens of a text"),
    "texts": ("N", "most texts of a request, its inputs times n"),
    "prefix_cache": ("MIB", "memory for beginnings of prompts that requests share; 0 for none"),
    "queue": ("N", "texts that may wait for a row; more get status 429"),
    "connections": ("N", "most connections at a time; more get status 503"),
    "body_bytes": ("N", "longest body of a request; longer ones get status 413"),
    "body_seconds": ("S", "seconds for a body to arrive; slower ones get status 408"),
    "timeout": ("S", "seconds from a request to its last token; later is status 504"),
    "drain": ("S", "seconds that running requests have to end after SIGTERM"),
}


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "serve",
        description="Serves models with OpenAI's API: texts of many clients at the same time.",
        epilog=EXAMPLES,
    )
    add = command.add_argument
    add_checkpoints(command, ". The last part of the path names it in requests")
    beside = "the first checkpoint with adapters (LoRA), a model NAME in requests; again for more"
    add_adapter(command, beside)
    port = "0 takes any free one (default: 8000)"
    add_number(command, "port", Annotated[int, Range(0, 65535)], "N", port, default=8000)
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine alone). Another one needs an "
        f"API key in the environment variable {KEY}; commas separate several keys",
    )
    add(
        "--warm_up",
        action="store_true",
        help="compile the programs of all widths before the first request; else each when a "
        "request needs it, beside the others",
    )
    group, types, defaults = (
        command.add_argument_group("limits"),
        field_types(ServerLimits),
        ServerLimits(),
    )
    for field, (metavar, text) in LIMITS.items():
        default = getattr(defaults, field)
        shown = f"{text} (default: {default:,.0f})"
        add_number(group, field, types[field], metavar, shown, default)
    return command


def serve(args: argparse.Namespace) -> int:
    """Binds the port, loads the models, and serves until it is stopped; returns the exit status.

    Raises:
      ValueError: a limit is out of range, the port is taken, a checkpoint cannot be loaded, an
        address of other machines has no key, or no server is installed.
    """
    limits = ServerLimits(**{field: getattr(args, field) for field in LIMITS})
    keys = read_keys(os.environ.get(KEY, ""))
    try:
        from t5x_lite.serving import app, connections, models
    except ImportError as error:
        raise ValueError(f"{error}: {install_command('serve')}") from error
    if not keys and not connections.is_loopback(args.host):
        raise ValueError(
            f"--host={args.host} is not this machine alone: set an API key in {KEY}, which "
            "clients send, or leave out --host"
        )
    with connections.bind_socket(args.host, args.port) as bound:
        host, port = bound.getsockname()[:2]
        served = models.ServedModels(limits)
        names, adapters = short_names(args.checkpoint), args.adapter or []
        check_names(names, adapters)
        for path, name in zip(args.checkpoint, names, strict=True):
            print(f"loading {name}", file=sys.stderr)
            served.load(name, path, args.warm_up, adapters)
            adapters = []
        shown = host if ":" not in host else f"[{host}]"
        print(f"serving http://{shown}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        api = app.Api(served)
        running = connections.StoppableServer(
            app.application(api, host, keys),
            api.stop,
            limits.connections,
            limits.drain,
            served.cancel_all,
        )
        return running.serve_until_stopped(bound, served.is_busy)


def check_names(names: Sequence[str], adapters: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError for an adapter that is named as a model is."""
    for name, _ in adapters:
        if name in names:
            raise ValueError(f"--adapter {name}: a model has this name already, choose another")


def read_keys(text: str) -> list[str]:
    """The API keys of the environment variable.

    Raises:
      ValueError: a key is so short that it can be guessed, or has characters that no header has.
    """
    keys = [each.strip() for each in text.split(",") if each.strip()]
    for key in keys:
        if len(key) < LEAST or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"{KEY}: a key has {LEAST} or more ASCII characters without spaces, such as those "
                "of: openssl rand -hex 32"
            )
    return keys


COMMAND = Command("serve", parser, serve)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
