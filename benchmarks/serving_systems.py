# SPDX-License-Identifier: Apache-2.0
"""The systems of serving.py, each with the engine's methods, so that one server has them all."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoding
import decoding_systems as systems

from t5x_lite import config, interactive
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.serving.completion import Completion, CompletionChunk, TextRequest
from t5x_lite.serving.engine import Engine
from t5x_lite.serving.limits import EngineGauges, EngineLimits

OURS, ALONE = "t5x_lite", "t5x_lite, one text at a time"
NAMES = (OURS, "t5x_lite, int8", ALONE, "CTranslate2 float32", "CTranslate2 int8", "transformers")
LENGTHS = {"g2p": 40, "t5_base": 64}


def case_of(name: str, folder: Path) -> decoding.Case:
    """The model of a case, as a Hugging Face folder for every system; its rows are not read."""
    if name == "g2p":
        exported = decoding.exported("g2p", folder)
        return decoding.Case(name, exported, True, [], LENGTHS[name])
    systems.write_random_model(name, folder / name)
    return decoding.Case(name, folder / name, True, [], LENGTHS[name], half=True)


class BatchEngine:
    """A library that writes batches: what waits, up to `rows` texts, is the next one."""

    def __init__(self, predictor: Predictor, write: systems.Write, limits: EngineLimits):
        self.predictor, self.write, self.limits = predictor, write, limits
        self.waiting: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(
        self, request: TextRequest, on_chunk: Callable[[CompletionChunk], None] | None = None
    ) -> Completion:
        completion = Completion(request, on_chunk)
        self.waiting.put(completion)
        return completion

    def run(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.limits.rows and not self.waiting.empty():
                if (other := self.waiting.get()) is None:
                    return
                batch.append(other)
            texts = self.write([list(each.request.prompt) for each in batch])
            for ids, completion in zip(texts, batch, strict=True):
                text = self.predictor.targets.decode(ids)
                completion.on_chunk(CompletionChunk(text, ids, [], "stop"))

    def gauges(self) -> EngineGauges:
        counts: dict[str, Any] = dict.fromkeys(EngineGauges._fields, 0)
        counts |= {"rows": self.limits.rows, "queued": self.waiting.qsize(), "finished": {}}
        return EngineGauges(**counts)

    def cancel_all(self) -> None:
        """Ends nothing: a batch is written to its end."""

    def close(self, drain: bool = True) -> None:
        self.waiting.put(None)
        self.thread.join()


def open_engine(name: str, case: decoding.Case, rows: int, threads: int) -> tuple[Any, Any, Any]:
    """Returns an engine, the session of its vocabularies, and the settings of its texts.

    Args:
      name: one of NAMES.
      case: the model.
      rows: texts at a time.
      threads: of the other libraries.
    """
    session = interactive.load(case.folder)
    decode = config.Decode(
        max_new_tokens=case.length,
        drafter="plain",
        compute="int8" if name == "t5x_lite, int8" else "auto",
    )
    limits = EngineLimits(
        rows=1 if name == ALONE else rows, max_inputs=64, max_new_tokens=case.length, queue=10**6
    )
    if name.startswith("t5x_lite"):
        return Engine(session.predictor, limits), session, decode
    if name == "transformers":
        write = systems.transformers(case, session.predictor.targets.stops, threads)
    else:
        write = systems.ctranslate2(case, name.split()[-1], threads)
    return BatchEngine(session.predictor, write, limits), session, decode


def serve_engine(name: str, case: decoding.Case, rows: int, threads: int) -> None:
    """Serves a system over HTTP on a free port of loopback, which it prints, until it is stopped.

    Args:
      name: one of NAMES.
      case: the model.
      rows: texts at a time.
      threads: of the other libraries.
    """
    from t5x_lite.serving import app, connections, models
    from t5x_lite.serving.server_limits import ServerLimits

    limits = ServerLimits(rows=rows, max_input_tokens=64, max_new_tokens=case.length)
    served = models.ServedModels(limits)
    engine, _, decode = open_engine(name, case, rows, threads)
    # In the thread of `add`, to which the mesh of a session belongs.
    model = served.add(case.name, lambda: interactive.load(case.folder))
    model.engine.close()
    model.engine, model.decode = engine, decode
    with connections.bind_socket("127.0.0.1", 0) as bound:
        api = app.Api(served)
        server = connections.StoppableServer(
            app.application(api, "127.0.0.1", []), api.stop, limits.connections, 1
        )
        print("port", bound.getsockname()[1], flush=True)
        server.serve_until_stopped(bound, lambda: True)
