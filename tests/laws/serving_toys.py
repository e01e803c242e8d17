# SPDX-License-Identifier: Apache-2.0
"""A server of toys in a thread, and OpenAI's client for it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import openai
from conftest import toy_model
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, interactive
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.serving import app, connections, models
from t5x_lite.serving.server_limits import ServerLimits
from t5x_lite.tokenizers import chat
from t5x_lite.tokenizers.vocabularies import ByteVocabulary

LIMITS = ServerLimits(
    rows=4, max_input_tokens=64, max_new_tokens=32, texts=16, queue=16, body_bytes=65536
)
TEMPLATE = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
DECODE = config.Decode(max_new_tokens=16, drafter="plain")


def toy_session(layout: str, template: str | None = None) -> interactive.Session:
    """A session of random weights on one device, made in the thread that calls."""
    use_one_device()
    cfg = toy_model(layout, positions="relative", layers=1, vocab=300)
    pair = (ByteVocabulary(0),) * 2
    predictor = Predictor(cfg, lively(cfg), pair, ended=False, batch_size=4)
    shown = None if template is None else chat.ChatTemplate(template, {})
    return interactive.Session(predictor, DECODE, template=shown)


class ToyServer(NamedTuple):
    """A server that runs.

    Attributes:
      port: its port.
      api: its handlers.
      server: what stops it.
    """

    port: int
    api: app.Api
    server: connections.StoppableServer

    @property
    def models(self) -> models.ServedModels:
        """Its models."""
        return self.api.models

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's client, which sends each request once."""
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@contextlib.contextmanager
def serve_toys(served: models.ServedModels, keys: tuple[str, ...] = ()) -> Iterator[ToyServer]:
    """Serves models on a free port of this machine."""
    api = app.Api(served)
    with connections.bind_socket("127.0.0.1", 0) as bound:
        page = app.application(api, "127.0.0.1", keys)
        limits = served.limits
        running = connections.StoppableServer(
            page, api.stop, limits.connections, limits.drain, served.cancel_all
        )
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield ToyServer(bound.getsockname()[1], api, running)
        running.should_exit = True
        thread.join(timeout=300)


def predict_alone(server: ToyServer, name: str, text: str, **options):
    """The prediction of a text by the model of a name with options, between texts of the server."""
    served = server.models.get(name)
    return served.engine.call(lambda: served.session.predict(text, **options)).result()


@contextlib.contextmanager
def hold_engine(server: ToyServer, name: str):
    """The engine of a model, kept from writing."""
    gate = threading.Event()
    server.models.get(name).engine.call(lambda: gate.wait(30))
    try:
        yield gate
    finally:
        gate.set()


def wait_until(condition) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def count_requests(server: ToyServer, status: int) -> float:
    """The number of completions with a status, as the metrics have it."""
    labels = {"route": "/v1/completions", "status": str(status)}
    registry = server.api.metrics.registry
    return registry.get_sample_value("t5x_lite_requests_total", labels) or 0


def send(port: int, body: bytes, path: str = "/v1/completions", **headers: str):
    """(status, headers, JSON) of a POST of body with headers to a path of a port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read())


@contextlib.contextmanager
def serve_two_toys() -> Iterator[ToyServer]:
    """A server of "pair", an encoder-decoder, and "alone", a decoder with a chat template."""
    served = models.ServedModels(LIMITS)
    served.add("pair", lambda: toy_session("encoder_decoder"))
    served.add("alone", lambda: toy_session("decoder_only", TEMPLATE))
    with serve_toys(served) as server:
        yield server
    assert not served.is_busy()
