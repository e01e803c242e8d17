# SPDX-License-Identifier: Apache-2.0
"""Readers of what runs and commands leave and take: inputs and outputs of infer, metrics, tables of
measurements, cached tokens, a teacher's logits, compiled programs, requests to the page."""

import contextlib
import functools
import json
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_target import WORDS, Target, write_json, write_jsonl

from t5x_lite import distill
from t5x_lite.adaptation import teacher_logits
from t5x_lite.batch import Batch, TeacherLogits
from t5x_lite.cli import records
from t5x_lite.comparison import measurements, taken
from t5x_lite.config import gin_file
from t5x_lite.data import cache, token_writer
from t5x_lite.data.corpora import TextExample
from t5x_lite.kernels import tile_table
from t5x_lite.planning import counted, hlo, searching, trips
from t5x_lite.training import model_dir
from t5x_lite.training.reporting import metric_writers
from t5x_lite.utils import latency_table

SETTINGS = {"input_digest": "x", "n": 1}


def make_infer(folder: Path) -> None:
    """Writes input files of `t5x_lite.infer`, and an unfinished output file."""
    rows = [{"inputs": word, "targets": [word, "b"], "n": 1} for word in WORDS]
    write_jsonl(folder / "in.jsonl", rows)
    (folder / "in.txt").write_text("\n".join(WORDS))
    (folder / "out.jsonl").write_text('{"a": 1}\n{"b"')
    (folder / "out.jsonl.settings.json").write_text(json.dumps(SETTINGS))


def read_infer(folder: Path) -> None:
    """Reads the inputs, and compares the output with its settings."""
    for name, jsonl in (("in.jsonl", True), ("in.txt", False)):
        source = records.Source(str(folder / name), jsonl, "inputs")
        assert source.count() == sum(1 for _ in source.records())
        for record in source.records():
            json.dumps(record.fields).encode()
    records.Sink(str(folder / "out.jsonl"), SETTINGS).compare()


def make_pairs(folder: Path) -> None:
    """Writes an unfinished output of `t5x_lite.distill`."""
    rows = [{"line": n, "inputs": word, "targets": word} for n, word in enumerate(WORDS, 1)]
    write_jsonl(folder / "pairs.jsonl", rows)


def make_metrics(folder: Path) -> None:
    """Writes metrics and report of a run."""
    rows = [
        {"step": step, "train/loss": 1 / step, "rate": 0.1, "validation/loss": None}
        for step in range(1, 30)
    ]
    write_jsonl(folder / "metrics.jsonl", rows)
    write_json(folder, report={"steps": 30, "loss": 0.1, "seconds": 5.0})


def read_metrics(folder: Path) -> None:
    """Reads metrics as a curve, and the report."""
    values = metric_writers.read_metrics(folder)
    for points in values.values():
        np.array([*points.values()], np.float64).sum()
    metric_writers.has_line(folder, 3, "train")
    measurements.loss_curve(str(folder))
    taken.read_report(str(folder)).get("seconds")
    model_dir.read_report(folder / "report.json", 30)


def make_tables(folder: Path) -> None:
    """Writes the tables of measurements."""
    shape = dict(chip="TPU v4", queries=8, keys=8, head_dim=64, bytes=2, biased=True, causal=False)
    tiles = [{"shape": shape, "query": 128, "key": 256, "milliseconds": 1.5}]
    plans = {"a": {"memory": {"weights": 5}, "seconds": 0.1}}
    write_json(folder, tiles=tiles, costs={"key": [0.1, 0.2]}, plans=plans)
    write_json(folder, speed={"asked": {"twins": ["a"]}, "rows": []})


def read_tables(folder: Path) -> None:
    """Reads each table as its users do."""
    os.environ[tile_table.TABLE_VARIABLE] = str(folder / "tiles.json")
    tile_table.read_table.cache_clear()
    shape = tile_table.AttentionShape("TPU v4", 8, 8, 64, 2, True, False)
    assert tile_table.fastest_blocks(shape) != ()
    for seconds in latency_table.read_table(folder / "costs.json").values():
        np.array(seconds, np.float32)[1:]
    for plan in searching.read_results(folder / "plans.json").values():
        assert "memory" in plan
    measurements.read_measured(folder / "speed.json").get("asked")


def cache_entry() -> token_writer.CacheEntry:
    """Three examples with their texts."""
    ids = [np.arange(size) for size in (3, 1, 5)]
    rows = [TextExample("a", "b", ("b", "c"))] * 3
    return token_writer.CacheEntry(
        name="toy/train",
        identity={"a": 1},
        chunks=[token_writer.Chunk(ids, ids, rows)],
        sizes=(60, 60),
        eos=(1, 1),
        counts={},
        keep_rows=True,
    )


def read_cache(folder: Path) -> None:
    """Reads every example of cached tokens."""
    tokens = cache.open_tokens(str(folder), cache_entry())
    for number in range(len(tokens)):
        int(tokens.inputs[number].sum() + tokens.targets[number].sum())
        tokens.rows[number].targets.encode()
    list(tokens.rows)


def teacher_run(folder: Path) -> Any:
    """A run that reads its teacher's logits from a folder."""
    return gin_file.load_run(
        ["configs/runs/adapt_stdlib_tiny_taught.gin"],
        [
            f"config.Distillation.answers={folder}",
            "config.Distillation.top_k=4",
            "BATCH_SIZE=2",
            "TRAIN_STEPS=4",
        ],
    )


def teacher_batch() -> Batch:
    """A batch of two rows."""
    ids = np.ones((2, 3), np.int32)
    fields = dict.fromkeys(Batch._fields)
    named = ("targets", "target_segments", "target_positions", "loss_weights", "inputs")
    return Batch(**fields | dict.fromkeys((*named, "input_segments", "input_positions"), ids))


def make_teacher(folder: Path) -> None:
    """Writes a teacher's logits for four steps."""
    settings = teacher_logits.logits_settings(teacher_run(folder)) | {"chunk": 2}
    writer = teacher_logits.TeacherLogitsWriter(folder, settings)
    logits = TeacherLogits(
        ids=np.ones((2, 3, 4), np.int32),
        log_probabilities=np.zeros((2, 3, 5), np.float32),
        known=np.ones((2, 3), bool),
    )
    rows = teacher_logits.row_digests(teacher_batch())
    for first in (0, 2):
        writer.write(first, [logits] * 2, [rows] * 2)


def read_teacher(folder: Path) -> None:
    """Reads a teacher's logits of every step."""
    saved = teacher_logits.SavedTeacherLogits(teacher_run(folder))
    for step in range(4):
        saved.teacher_data(teacher_batch(), step).log_probabilities.sum()


def make_program(folder: Path) -> None:
    """Writes a compiled program as text."""
    import jax

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x + 1, x.sum()), x, None, length=3)

    lowered = jax.jit(loop).lower(np.ones((4, 4), np.float32))
    (folder / "program.hlo").write_text(lowered.compile().as_text())


def read_program(folder: Path) -> None:
    """Counts what a compiled program does."""
    module = hlo.parse_module((folder / "program.hlo").read_bytes().decode("utf-8", "replace"))
    counted.program_cost(module, trips.executions(module))


# Seconds after which a request that has no answer is taken for one that is not complete.
PATIENCE = 1.0
QUESTION = {"model": "toy", "text": "Hi", "max_new_tokens": 4, "temperature": 0.5, "chat": False}


def make_request(folder: Path) -> None:
    """Writes a request to the page."""
    body = json.dumps(QUESTION)
    head = f"POST /write HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\nAccept: */*\r\n\r\n"
    (folder / "request.http").write_text(head + body, newline="")


@functools.cache
def page_port() -> int:
    """Port of a page whose model repeats the question."""
    from t5x_lite.demo import limits, server
    from t5x_lite.serving import connections
    from t5x_lite.serving.connections import bind_socket

    class Parrot(server.Models):
        """Models without weights."""

        def describe(self):
            return [{"name": "toy"}]

        def answer(self, question):
            yield {"text": question.text * question.decode.max_new_tokens, "tokens": [], "calls": 1}

    models = Parrot(limits.Limits(characters=100, tokens=8, waiting=1))
    models.sessions, models.drafters = {"toy": None}, {"toy": ["plain", "lookup"]}
    bound = bind_socket("127.0.0.1", 0)
    app = server.application(models, connections.own_names("127.0.0.1"))
    running = server.page_server(app, models)
    threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True).start()
    while not running.started:
        time.sleep(0.01)
    return bound.getsockname()[1]


def send_bytes(content: bytes) -> bytes:
    """The answer of the page to bytes, after which it has to close the connection."""
    answer = b""
    with socket.create_connection(("127.0.0.1", page_port())) as connection:
        with contextlib.suppress(ConnectionError):  # the page refuses to read on
            connection.sendall(content)
            piece = b"-"
            while piece and select.select([connection], [], [], PATIENCE)[0]:
                piece = connection.recv(65536)
                answer += piece
            # It may wait for more, or for the next request: there is none.
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer += piece
    return answer


def read_request(folder: Path) -> None:
    """Sends a request, and another one that must be answered; ValueError where it is refused."""
    answer = send_bytes((folder / "request.http").read_bytes())
    after = send_bytes(b"GET /models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert after.startswith(b"HTTP/1.1 200"), after[:200]
    status = answer[9:12].decode("latin-1")
    assert not status.startswith("5") or status == "503", answer[:300]
    if status != "200":
        raise ValueError(f"request.http is refused: {status}")


TARGETS = {
    "infer": Target(make_infer, read_infer),
    "pairs": Target(make_pairs, lambda folder: distill.last_line(str(folder / "pairs.jsonl"))),
    "metrics": Target(make_metrics, read_metrics),
    "tables": Target(make_tables, read_tables),
    "cache": Target(
        lambda folder: cache.open_tokens(str(folder), cache_entry()), read_cache, repairs=True
    ),
    "teacher": Target(make_teacher, read_teacher),
    "program": Target(make_program, read_program, ("HLO",)),
    "request": Target(make_request, read_request),
}
