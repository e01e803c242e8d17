# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.demo: a local page for one model, or for several side by side."""

import argparse
import sys
from typing import Annotated

from t5x_lite.cli.command import Command
from t5x_lite.cli.options import add_adapter, add_checkpoints, add_number, number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Count, Range
from t5x_lite.demo.limits import Limits
from t5x_lite.utils.extras import install_command
from t5x_lite.utils.hub_names import short_names

EXAMPLES = """\
examples:
  # type a word, watch its phonemes appear
  python -m t5x_lite.demo --checkpoint=runs/g2p
  # twins side by side, each with its time to first token and its tokens per second
  python -m t5x_lite.demo --checkpoint=runs/g2p --checkpoint=runs/g2p_decoder
  # a model, and beside it the same weights with adapters
  python -m t5x_lite.demo --checkpoint=google/flan-t5-small --adapter reviews=runs/reviews
  # a Hugging Face folder or a .gguf file; at most 128 new tokens of a text
  python -m t5x_lite.demo --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --most_tokens=128

  # for other machines, which open http://lab.example.org:8765 (or the address of this one)
  python -m t5x_lite.demo --checkpoint=runs/g2p --host=0.0.0.0 --allow_host=lab.example.org

The page is for this machine alone: it listens on 127.0.0.1 and refuses any other host name.
Models write one text at a time; --waiting limits how many more may wait. It needs the extra "demo".
"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "demo",
        description="A local page: type, and watch one model or several write.",
        epilog=EXAMPLES,
    )
    add = command.add_argument
    add_checkpoints(command)
    beside = "the first checkpoint with adapters (LoRA), beside it; again for another one"
    add_adapter(command, beside)
    port = "0 takes any free one (default: 8765)"
    add_number(command, "port", Annotated[int, Range(0, 65535)], "N", port, default=8765)
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine alone). With another one "
        "everybody who reaches it can use the models, without a password",
    )
    add(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="with --host: a name under which others open the page; again for another one. This "
        "machine's own name and its addresses need no naming",
    )
    most = Limits()
    add(
        "--most_characters",
        "--most_letters",
        type=number_parser(Count),
        default=most.characters,
        metavar="N",
        help="of a text to read",
    )
    add_number(command, "most_tokens", Count, "N", "of a text to write", most.tokens)
    add_number(command, "waiting", Count, "N", "texts that may wait", most.waiting)
    return command


def serve(args: argparse.Namespace) -> int:
    """Binds the port, loads the models, and serves until it is stopped; returns the exit status.

    Raises:
      ValueError: a limit is out of range, the port is taken, a checkpoint cannot be loaded, or no
        server is installed.
    """
    limits = Limits(args.most_characters, args.most_tokens, args.waiting)
    try:
        from t5x_lite.demo import server
        from t5x_lite.serving import connections
    except ImportError as error:
        raise ValueError(f"{error}: {install_command('demo')}") from error
    with connections.bind_socket(args.host, args.port) as bound:
        host, port = bound.getsockname()[:2]
        if not connections.is_loopback(host):
            print(
                f"{host} is not this machine alone: everybody who reaches it can use the models",
                file=sys.stderr,
            )
        models = server.Models(limits)
        for path, name in zip(args.checkpoint, short_names(args.checkpoint), strict=True):
            print(f"loading {name}", file=sys.stderr)
            models.load(name, path)
        for name, path in args.adapter or []:
            print(f"loading adapters {name}", file=sys.stderr)
            models.attach(name, path)
        names = [*connections.own_names(host), *map(str.lower, args.allow_host)]
        shown = host if ":" not in host else f"[{host}]"
        print(f"open http://{shown}:{port} (Ctrl-C stops)", file=sys.stderr)
        app = server.application(models, names, not connections.is_loopback(host))
        running = server.page_server(app, models)
        return running.serve_until_stopped(bound, models.is_busy)


COMMAND = Command("demo", parser, serve)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
