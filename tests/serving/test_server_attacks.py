# SPDX-License-Identifier: Apache-2.0
"""Attacks on a server in a process of its own: it answers others meanwhile, and nothing stays."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from test_serve import serve_g2p

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps({"model": "g2p", "prompt": "cat", "n": 64, "temperature": 1, "stream": True})
# Requests of the long run, and clients that send them, each over one connection.
REQUESTS, CLIENTS = int(os.environ.get("T5X_LITE_SOAK", "100000")), 16
WORDS = ["cat", "photograph", "jaxon", "a", "strengths", "onomatopoeia", "xyz", "hats"]
# Messages that are no HTTP, or try to be two requests at once.
TRICKS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /v1/models\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n",
    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 20000 + b"\r\n",
    b"GET /v1/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models/%00%ff%0d%0aX:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
    f"{HEAD}Content-Length: 3\r\nContent-Length: 4\r\n\r\n{{}}..".encode(),
    f"{HEAD}Content-Length: -1\r\n\r\n{{}}".encode(),
    f"{HEAD}Content-Length: 99999999999999999999\r\n\r\n{{}}".encode(),
    f"{HEAD}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x".encode(),
    f"{HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    f"{HEAD}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n".encode(),
]


class Target:
    """A server under attack: its port, and what Linux says of its process."""

    def __init__(self, running, client):
        self.port, self.client = client.base_url.port, client
        self.proc = Path("/proc", str(running.pid))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def megabytes(self) -> float:
        return int(re.search(r"VmRSS:\s+(\d+)", (self.proc / "status").read_text())[1]) / 1024

    def files(self) -> int:
        return len([*(self.proc / "fd").iterdir()])

    def gauge(self, name: str, labels: str = "") -> float:
        url = f"http://127.0.0.1:{self.port}/metrics"
        text = urllib.request.urlopen(url, timeout=60).read().decode()
        return float(re.search(rf'^t5x_lite_{name}{{model="g2p"{labels}}} (\S+)', text, re.M)[1])

    def answers(self, count: int = 10) -> float:
        """Slowest of some answers, each of them right, in seconds."""
        slowest = 0.0
        for _ in range(count):
            begun = time.monotonic()
            answer = self.client.completions.create(model="g2p", prompt="cat")
            assert answer.choices[0].text == "K AE T"
            slowest = max(slowest, time.monotonic() - begun)
        return slowest

    def exchange(self, sent: bytes) -> bytes:
        """The answer to bytes, until the server closes or waits for more."""
        with self.connect() as connection, contextlib.suppress(ConnectionError, TimeoutError):
            connection.settimeout(2)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while part := connection.recv(65536):
                received += part
            return received
        return b""


def hold_many(target: Target, stack: contextlib.ExitStack) -> str:
    """500 connections that say nothing, or half of a request."""
    for number in range(500):
        connection = stack.enter_context(target.connect())
        connection.sendall(
            [b"", GET[:20], f"{HEAD}Content-Length: 9\r\n\r\n{{".encode()][number % 3]
        )
    return "500 connections"


def write_slowly(target: Target, stack: contextlib.ExitStack) -> str:
    """A byte a second on 100 connections, until the server hangs up."""
    opened = [stack.enter_context(target.connect()) for _ in range(100)]
    begun, cut = time.monotonic(), 0
    for byte in f"{HEAD}Content-Length: 9\r\n\r\n"[:25].encode():
        for connection in opened:
            with contextlib.suppress(OSError):
                connection.sendall(bytes([byte]))
        time.sleep(1)
        target.answers(1)
    for connection in opened:
        with contextlib.suppress(OSError):
            cut += connection.recv(100) == b""
            continue
        cut += 1
    return f"{cut} of 100 slow writers cut off after {time.monotonic() - begun:.0f} s"


def read_slowly(target: Target, stack: contextlib.ExitStack) -> str:
    """20 streams that nobody reads."""
    for _ in range(20):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", target.port))
        stack.enter_context(connection)
        connection.sendall(f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n{BODY}".encode())
    time.sleep(20)
    return "20 streams that nobody reads"


def send_giants(target: Target, stack: contextlib.ExitStack) -> str:
    """Bodies of a terabyte: announced, and sent in chunks for as long as they are taken."""
    announced = target.exchange(f"{HEAD}Content-Length: {2**40}\r\n\r\n{{".encode())
    assert b" 413 " in announced.splitlines()[0]
    sent, chunk = 0, b"100000\r\n" + b" " * 2**20 + b"\r\n"
    connection = stack.enter_context(target.connect())
    connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    with contextlib.suppress(OSError):
        while sent < 2**10:
            connection.sendall(chunk)
            sent += 1
    assert sent < 64
    return f"a body of chunks was cut off after {sent} MiB"


def send_tricks(target: Target, stack: contextlib.ExitStack) -> str:
    """Odd messages, and 1,000 of random bytes or with random changes."""
    draw, statuses = random.Random(0), set()
    messages = list(TRICKS)
    for _ in range(500):
        messages.append(draw.randbytes(draw.randrange(1, 2000)))
        changed = bytearray(draw.choice([GET, f"{HEAD}Content-Length: 2\r\n\r\n{{}}".encode()]))
        changed[draw.randrange(len(changed))] = draw.randrange(256)
        messages.append(bytes(changed))
    for message in messages:
        received = target.exchange(message)
        statuses.update(re.findall(rb"HTTP/1.1 (\d+) ", received))
        assert b"Traceback" not in received
    assert not any(status.startswith(b"5") for status in statuses), statuses
    return f"{len(messages)} messages: statuses {sorted(map(int, statuses))}"


def cut_off(target: Target, stack: contextlib.ExitStack) -> str:
    """200 requests of 64 texts whose clients go at once."""
    for _ in range(200):
        with target.connect() as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n{BODY}".encode())
    return "200 requests of clients that went away"


def ask_at_once(target: Target, stack: contextlib.ExitStack) -> str:
    """300 requests at a time: each is answered, or refused with a time."""

    def ask(number: int) -> int:
        with target.connect() as connection:
            body = json.dumps({"model": "g2p", "prompt": "cat", "n": 4})
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            received = connection.recv(65536)
        status = int(received.split()[1])
        assert status != 429 or b"retry-after" in received.lower()
        return status

    with concurrent.futures.ThreadPoolExecutor(300) as threads:
        statuses = [*threads.map(ask, range(300))]
    assert set(statuses) <= {200, 429}
    return f"300 requests at once: {statuses.count(200)} answered, {statuses.count(429)} refused"


ATTACKS = (send_giants, send_tricks, cut_off, ask_at_once, hold_many, read_slowly, write_slowly)


@pytest.mark.exhaustive  # minutes of waiting for time-outs
def test_a_server_under_attack_answers_others_and_nothing_stays():
    with serve_g2p() as (running, client):
        target = Target(running, client)
        # Programs of sampled texts are compiled before memory is compared.
        list(client.completions.create(**json.loads(BODY)))
        usual = target.answers()
        memory, files = target.megabytes(), target.files()
        print(f"\nusual answer {usual:.3f} s, {memory:.0f} MB, {files} files")
        for attack in ATTACKS:
            with contextlib.ExitStack() as stack:
                report = attack(target, stack)
                during = target.answers(3)
            until = time.monotonic() + 300
            while target.gauge("queued") + target.gauge("rows_used"):
                assert time.monotonic() < until, report
                time.sleep(0.1)
            time.sleep(0.5)
            print(
                f"{report}; answers meanwhile within {during:.3f} s, {target.megabytes():.0f} MB, "
                f"{target.files()} files"
            )
            assert running.poll() is None and target.files() < files + 20, report
        assert target.megabytes() < memory + 200
        running.terminate()
        running.wait(timeout=300)
        assert "Traceback" not in running.stderr.read()


@pytest.mark.exhaustive  # half an hour of requests
def test_of_many_requests_none_is_lost_or_doubled_and_memory_does_not_grow():
    with serve_g2p() as (running, client):
        target = Target(running, client)
        texts = [each.text for each in client.completions.create(model="g2p", prompt=WORDS).choices]
        assert len(set(texts)) == len(WORDS)

        def send_share(number: int) -> int:
            wrong = 0
            connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=120)
            with contextlib.closing(connection):
                for place in range(number, REQUESTS // 2, CLIENTS):
                    word = place % len(WORDS)
                    body = json.dumps({"model": "g2p", "prompt": WORDS[word]})
                    connection.request(
                        "POST", "/v1/completions", body, {"Content-Type": "application/json"}
                    )
                    answer = json.loads(connection.getresponse().read())
                    wrong += [each["text"] for each in answer["choices"]] != [texts[word]]
            return wrong

        memory = []
        for _ in range(2):
            begun = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
                assert sum(threads.map(send_share, range(CLIENTS))) == 0
            memory.append(target.megabytes())
            rate = REQUESTS / 2 / (time.monotonic() - begun)
            print(f"{REQUESTS // 2} requests right, {rate:.0f}/s, {memory[-1]:.0f} MB")
        assert memory[1] < memory[0] + 100
        stopped = target.gauge("finished_total", ',reason="stop"')
        assert stopped >= REQUESTS and target.gauge("rows_used") == 0
