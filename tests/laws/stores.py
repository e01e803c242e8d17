# SPDX-License-Identifier: Apache-2.0
"""Servers that stand in for S3 and Google Cloud Storage, behind a proxy that can fail."""

import contextlib
import http.client
import http.server
import json
import logging
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "toys"
SECRET = "a-secret-that-nothing-prints"
# Headers that belong to one connection.
HOP = {"expect", "connection", "transfer-encoding", "keep-alive", "content-length"}


class Store:
    """A store, as its clients see it.

    Attributes:
      scheme: "s3" or "gs".
      port: of the proxy.
      folder: of the test that runs; addresses lie in it.
      requests: method and path of every request.
      fails: called with method and path of each request; "503" answers so, "reset" cuts the
        connection, "" lets it pass.
      body_bytes: bytes of all answers.
    """

    def __init__(self, scheme: str, upstream: int):
        self.scheme, self.upstream = scheme, upstream
        self.folder = "all"
        self.requests: list[tuple[str, str]] = []
        self.fails: Callable[[str, str], str] = lambda method, path: ""
        self.body_bytes = 0
        self.generations = threading.Lock()
        handler = type("Handler", (Handler,), {"store": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.port = self.server.server_address[1]

    def address(self, name: str) -> str:
        return f"{self.scheme}://{BUCKET}/{self.folder}/{name}"

    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.port}"
        if self.scheme == "gs":
            return {"STORAGE_EMULATOR_HOST": url}
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextlib.contextmanager
    def failing(self, fails: Callable[[str, str], str]) -> Iterator[None]:
        """Context in which requests fail."""
        before, self.fails = self.fails, fails
        try:
            yield
        finally:
            self.fails = before

    def names(self, folder: str) -> list[str]:
        """Names of the objects below a folder, past all caches of clients."""
        from t5x_lite.utils.remote_paths import RemotePath

        root = RemotePath(self.address(folder))
        return sorted(str(path.relative_to(root)) for path in root.list_files())


class Server(http.server.ThreadingHTTPServer):
    """Server of a store, with a thread for each request."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """Says nothing: clients that are killed cut their connections."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Handler of a request to a store, which hands it on."""

    protocol_version = "HTTP/1.1"
    store: Store

    def forward(self) -> None:
        """Answers a request with the answer of the store, or fails it."""
        body = self.read_body()
        self.store.requests.append((self.command, self.path))
        failure = self.store.fails(self.command, self.path)
        if failure == "reset":
            linger = struct.pack("ii", 1, 0)  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif failure:
            self.answer(int(failure), {}, b"")
        elif self.store.scheme == "gs":
            self.answer(*self.ask_with_generations(body))
        else:
            self.answer(*self.ask(self.command, self.path, body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = forward

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def ask_with_generations(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """An answer that depends on the object's generation, which gcp-storage-emulator knows and
        does not look at."""
        query = parse_qs(urlsplit(self.path).query)
        wanted = {name: int(value[0]) for name, value in query.items() if name.startswith("ifGen")}
        media = self.command == "GET" and query.get("alt") == ["media"]
        if not wanted and not media:
            return self.ask(self.command, self.path, body)
        with self.store.generations:
            generation = self.find_generation(query, body)
            if wanted.get("ifGenerationMatch", generation) != generation:
                return 412, {}, b'{"error": {"code": 412, "message": "conditionNotMet"}}'
            if generation and wanted.get("ifGenerationNotMatch") == generation:
                return 304, {}, b""
            status, headers, content = self.ask(self.command, self.path, body)
            return status, headers | {"x-goog-generation": str(generation)}, content

    def find_generation(self, query: dict[str, list[str]], body: bytes) -> int:
        """Generation of the object of a request; 0 for none."""
        inside = re.search(r"/o/([^?]+)", self.path)
        named = re.search(rb'"name": *"([^"]+)"', body)
        if inside:
            name = unquote(inside[1])
        else:
            name = query["name"][0] if "name" in query else named[1].decode() if named else ""
        quoted = quote(name, safe="")
        status, _, content = self.ask("GET", f"/storage/v1/b/{BUCKET}/o/{quoted}", b"")
        return int(json.loads(content)["generation"]) if status == 200 else 0

    def ask(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The answer of the store itself to a request: method, path and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.store.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        # Each of the upstream's connections ends with its answer.
        connection.request(method, path, body, headers | {"Connection": "close"})
        response = connection.getresponse()
        content, answered = response.read(), dict(response.getheaders())
        connection.close()
        return response.status, answered, content

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        """Sends an answer: status, headers and content."""
        self.send_response_only(status)
        head = self.command == "HEAD"
        length = headers.get("Content-Length", "0") if head else str(len(content))
        for name, value in headers.items():
            if name.lower() not in HOP:
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if not head and content:
            self.store.body_bytes += len(content)
            self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def upstream(scheme: str) -> Iterator[int]:
    """A server in a thread, with an empty bucket; its port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    if scheme == "s3":
        from moto.server import ThreadedMotoServer

        server: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        request = http.client.HTTPConnection("127.0.0.1", port)
        # moto finds the service in the name of the key.
        key = "AWS4-HMAC-SHA256 Credential=someone/20260101/us-east-1/s3/aws4_request"
        request.request("PUT", f"/{BUCKET}", headers={"Authorization": key})
        assert request.getresponse().status == 200
    else:
        from gcp_storage_emulator.server import create_server

        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
        server.start()
    try:
        yield port
    finally:
        server.stop()


@contextlib.contextmanager
def open_store(scheme: str) -> Iterator[Store]:
    """A store and its proxy."""
    with upstream(scheme) as port:
        store = Store(scheme, port)
        threading.Thread(target=store.server.serve_forever, daemon=True).start()
        try:
            yield store
        finally:
            store.server.shutdown()
            store.server.server_close()
