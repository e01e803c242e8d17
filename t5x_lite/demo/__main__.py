# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.demo: a local page that writes with one model, or several side by side."""

import argparse
import socket
import sys
from pathlib import Path

from t5x_lite.demo.limits import Limits
from t5x_lite.evaluation import options

EXAMPLES = """\
examples:
  # type a word, watch its phonemes come
  python -m t5x_lite.demo --checkpoint=runs/g2p
  # twins side by side, each with its time to first token and its tokens per second
  python -m t5x_lite.demo --checkpoint=runs/g2p --checkpoint=runs/g2p_decoder
  # a Hugging Face folder or a .gguf file; at most 128 new tokens of a text
  python -m t5x_lite.demo --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --most_tokens=128

The page is for this machine alone: it listens on 127.0.0.1 and answers no other name. Models write
one text at a time; --waiting says how many more may wait. Needs pip install "t5x_lite[demo]".
"""


def parser() -> options.Parser:
    made = options.Parser(
        prog="python -m t5x_lite.demo",
        description="A local page: type, and watch one model or several write.",
        epilog=EXAMPLES,
    )
    add = made.add_argument
    add(
        "--checkpoint",
        action="append",
        required=True,
        metavar="PATH",
        help="the MODEL_DIR of a run, a Hugging Face folder or a .gguf file; again for another one",
    )
    add("--port", type=int, default=8765, metavar="N", help="0 takes any free one (default: 8765)")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1, this machine alone). With another address "
        "everybody who reaches it can use the models: there is no password",
    )
    most = Limits()
    add("--most_letters", type=int, default=most.letters, metavar="N", help="of a text to read")
    add("--most_tokens", type=int, default=most.tokens, metavar="N", help="of a text to write")
    add("--waiting", type=int, default=most.waiting, metavar="N", help="texts that may wait")
    return made


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse(arguments)
    try:
        serve(given)
    except KeyboardInterrupt:
        options.stop("t5x_lite.demo", "stopped", status=130)
    except (ValueError, OSError) as error:
        options.stop("t5x_lite.demo", error)


def serve(given: argparse.Namespace) -> None:
    """Takes the port, loads the models, and answers until it is stopped.

    Raises:
      ValueError: a limit that is none, a checkpoint that cannot be loaded, or no server installed.
      OSError: the port is taken.
    """
    limits = Limits(given.most_letters, given.most_tokens, given.waiting)
    try:
        import uvicorn

        from t5x_lite.demo import server
    except ImportError as error:
        raise ValueError(f'{error}: pip install "t5x_lite[demo]"') from error
    with listening(given.host, given.port) as taken:
        host, port = taken.getsockname()[:2]
        if not server.is_loopback(host):
            print(
                f"{host} is not this machine alone: everybody who reaches it can use the models",
                file=sys.stderr,
            )
        models = server.Models(limits)
        for path, name in zip(given.checkpoint, names(given.checkpoint), strict=True):
            print(f"loading {name}", file=sys.stderr)
            models.load(name, path)
        print(f"open http://{host if ':' not in host else f'[{host}]'}:{port}", file=sys.stderr)
        app = server.application(models, host)
        settings = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=3
        )
        uvicorn.Server(settings).run(sockets=[taken])


def listening(host: str, port: int) -> socket.socket:
    """A socket that has the port, before minutes are spent on loading.

    Raises:
      OSError: it is taken; the message says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(f"{host}:{port}: {error.strerror}. Choose another --port, or 0") from error
    return made


def names(paths: list[str]) -> list[str]:
    """Short names of checkpoints, no two alike."""
    found: list[str] = []
    for path in paths:
        name = Path(path).resolve().name
        alike = sum(each == name or each.startswith(f"{name} (") for each in found)
        found.append(f"{name} ({alike + 1})" if alike else name)
    return found


if __name__ == "__main__":
    main()
