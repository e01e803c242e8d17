# SPDX-License-Identifier: Apache-2.0
"""Laws of the local page: it streams what the model writes, keeps its limits, and answers nobody
else; in a real browser where there is one."""

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import mark_exhaustive, toy_model

from t5x_lite import config, interactive, model, sharding
from t5x_lite.demo import limits, server
from t5x_lite.evaluation import predict
from t5x_lite.serving import connections
from t5x_lite.tokenizers import chat, vocabularies

LETTERS = "abcdefghijklmnopqrstuvwxyz é<&>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def toy_session(layout):
    """A session of random weights on one device, made in the thread that calls."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    cfg, draw = toy_model(layout, layers=1), np.random.default_rng(0)

    def make(shape):
        return (0.1 * draw.normal(size=shape.shape)).astype(np.float32)

    params = jax.tree.map(make, model.shapes(cfg))
    pair = (vocabularies.SymbolVocabulary(LETTERS),) * 2
    return interactive.Session(predict.Predictor(cfg, params, pair), config.Decode())


@pytest.fixture(scope="module")
def demo():
    """A server with twins: (port, models)."""
    models = server.Models(limits.Limits(characters=100, tokens=32, waiting=1))
    models.add("pair", lambda: toy_session("encoder_decoder"))
    models.add("<b>joined</b>", lambda: toy_session("decoder_only"))
    with connections.bind_socket("127.0.0.1", 0) as taken:
        app = server.application(models, connections.own_names("127.0.0.1"))
        running = server.page_server(app, models)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield taken.getsockname()[1], models
        running.should_exit = True
        thread.join(timeout=300)


def ask(port, body=None, path="/write", kind="application/json", **headers):
    """(status, headers, text) of a POST of body (GET if None) of a kind to a path of a port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        sent_headers = {"Content-Type": kind} | headers
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, text, sent_headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def request_body(model="pair", **changes):
    return {"model": model, "text": "abab", "max_new_tokens": 12} | changes


def lines(text):
    """The pieces of an answer, but the notice that its programs are compiled first."""
    pieces = [json.loads(line) for line in text.splitlines()]
    return [piece for piece in pieces if "compiling" not in piece]


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_exhaustive(["pair", "<b>joined</b>"], kept=["pair"]))
@pytest.mark.parametrize("companion", ["", "unconditional"])
@pytest.mark.parametrize("drafter", ["plain", "lookup"])
def test_the_answer_is_what_the_model_writes_token_by_token(demo, name, drafter, companion):
    port, models = demo
    status, _, text = ask(port, request_body(name, drafter=drafter, companion=companion))
    *pieces, last = lines(text)
    session = models.sessions[name]
    whole = models.thread.submit(
        session.predict, "abab", max_new_tokens=12, drafter="plain", companion=companion
    ).result()
    assert status == 200 and "".join(piece["text"] for piece in pieces) == whole.texts[0]
    *chosen, _ = lines(ask(port, request_body(name, drafter=drafter, choices=" abab, b,"))[2])
    assert "".join(piece["text"] for piece in chosen) in ("abab", "b")
    tokens = [token for piece in pieces for token in piece["tokens"]]
    assert len(tokens) == last["count"] == len(whole.tokens[0])
    assert {who for _, _, who in tokens} <= {"model", "lookup"}
    assert drafter == "lookup" or all(who == "model" for _, _, who in tokens)
    assert 0 < last["first"] <= last["seconds"]
    assert last["rate"] == pytest.approx(last["count"] / last["seconds"])


@pytest.mark.slow
def test_the_controls_of_the_page_are_those_of_a_session(demo):
    port, models = demo
    controls = dict(temperature=1.0, seed=3, top_p=0.9, min_p=0.01, repetition_penalty=3.0)
    session = models.sessions["pair"]

    def predict(**options):
        return models.thread.submit(session.generate, "abab", max_new_tokens=12, **options).result()

    def read(**options):
        return "".join(piece["text"] for piece in lines(ask(port, request_body(**options))[2])[:-1])

    text = predict(**controls)
    assert read(**controls) == text != predict(temperature=1.0, seed=3)
    stop = text[2]
    assert read(**controls, stop=stop) == text[: text.index(stop)]


def test_the_same_question_compiles_once_and_says_so(demo):
    port, _ = demo
    question = request_body(text="x" * 60, max_new_tokens=30, temperature=0.5, seed=7)
    answers = [ask(port, question)[2] for _ in range(2)]
    notices = [json.loads(answer.splitlines()[0]).get("compiling") for answer in answers]
    assert notices == [True, None]
    first, second = map(lines, answers)
    assert first[-1]["compiled"] > 0 and second[-1]["compiled"] is None
    assert [piece["text"] for piece in first[:-1]] == [piece["text"] for piece in second[:-1]]


def test_every_model_has_examples_and_a_run_those_that_it_predicted(demo, tmp_path):
    assert all(each["examples"] for each in json.loads(ask(demo[0], path="/models")[2])["models"])
    folder = tmp_path / "predictions"
    folder.mkdir()
    rows = [{"input": "cat"}, {"input": 5}, {"input": "x" * 500}, {"input": "cat"}, {"input": "ox"}]
    written = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "validation-7.jsonl").write_text(written + "{half a line")
    assert server.predicted_inputs(tmp_path) == ["cat", "ox"]
    assert not server.predicted_inputs(None) and not server.predicted_inputs(folder)


REFUSED = [
    (b"{", "not JSON"),
    (b"[" * 900, "not JSON"),
    (b"[]", "not a JSON object"),
    ({"model": "pair"}, "text must be a text"),
    (request_body(model="../etc"), "Unknown model '../etc': choose from pair"),
    (request_body(text="a" * 101), "101 characters, more than 100"),
    (request_body(max_new_tokens=33), "max_new_tokens must be at most 32"),
    (request_body(max_new_tokens=True), "max_new_tokens must be a number from 1"),
    (request_body(max_new_tokens=2.5), "max_new_tokens must be a number from 1"),
    (request_body(temperature=-1), "temperature must be a number from 0.0 to 10"),
    (request_body(choices="a" * 3000), "choices have more than"),
    (request_body(seed=2**32), "seed must be a number"),
    (request_body(top_p=0), "top_p must be a number from 0.001 to 1"),
    (request_body(min_p=1), "min_p must be a number from 0.0 to 0.999"),
    (request_body(repetition_penalty="2"), "repetition_penalty must be a number"),
    (request_body(stop="a" * 101), "stop has more than 100 characters"),
    (request_body(stop=["a"]), "stop must be a text"),
    (request_body(drafter="draft:/etc/passwd"), "drafter must be one of plain"),
    (request_body(companion="model:/etc"), "companion must be empty or one of unconditional"),
    (request_body(chat=1), "chat must be true or false"),
    (request_body(drafter="blockwise"), "drafter must be one of plain, lookup"),
    (b'"' + b"a" * 4000 + b'"', "longer than 3200 bytes"),
]


@pytest.mark.parametrize("body, why", REFUSED)
def test_a_question_beyond_its_limits_is_refused_with_the_reason(demo, body, why):
    status, _, text = ask(demo[0], body)
    assert status == 400 and why in json.loads(text)["error"]


def test_texts_that_are_no_unicode_or_empty_are_answered(demo):
    for text in ("", "日本 \U0001f600", "\ud800", "\0"):
        status, _, answer = ask(demo[0], request_body(text=text))
        assert status == 200 and lines(answer)[-1]["done"]


def test_a_question_goes_through_the_chat_template_of_a_model_that_has_one(demo):
    port, models = demo
    status, _, text = ask(port, request_body(chat=True))
    assert status == 200 and "no chat template" in lines(text)[0]["error"]
    session = models.sessions["pair"]
    session.template = chat.ChatTemplate("{{ messages[0].content }}zz", {})
    try:
        pieces = lines(ask(port, request_body(chat=True))[2])
        plain = lines(ask(port, request_body(text="ababzz"))[2])
        assert [each.get("text") for each in pieces] == [each.get("text") for each in plain]
        shown = json.loads(ask(port, path="/models")[2])["models"]
        assert [each["chats"] for each in shown] == [True, False]
    finally:
        session.template = None


def test_pages_of_other_sites_and_other_names_get_nothing(demo):
    port, _ = demo
    assert ask(port, request_body(), kind="text/plain")[0] == 415
    assert ask(port, request_body(), kind="application/x-www-form-urlencoded")[0] == 415
    assert ask(port, path="/", Host="evil.example")[0] == 400
    assert ask(port, request_body(), Host="evil.example:80")[0] == 400
    assert ask(port, path="/", Host=f"localhost:{port}")[0] == 200
    status, headers, page = ask(port, path="/")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    assert "http://" not in page and "https://" not in page and "src=" not in page


# What is sent, each after something was read for the one before.
SLOW = {
    "sends nothing": [b""],
    "sends half of a head": [b"GET / HTTP/1.1\r\nHost: loc"],
    "sends half of a body": [
        b"POST /write HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
        b"Content-Type: application/json\r\n\r\n{"
    ],
    "asks again slowly": [
        b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHo",
    ],
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=list(SLOW))
def test_who_takes_too_long_is_hung_up_on(demo, monkeypatch, sent):
    # What is answered first must have its answer on a busy machine, too.
    monkeypatch.setattr(connections.TimedProtocol, "seconds", 0.2 if len(sent) == 1 else 3.0)
    with socket.create_connection(("127.0.0.1", demo[0]), timeout=30) as slow:
        for number, part in enumerate(sent):
            assert number == 0 or slow.recv(65536)
            slow.sendall(part)
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(65536):
                pass
    monkeypatch.undo()
    assert ask(demo[0], path="/")[0] == 200


def test_stopping_ends_the_texts_in_progress_and_those_that_wait(capfd):
    models = server.Models(limits.Limits(waiting=4))
    models.add("pair", lambda: toy_session("encoder_decoder"))
    with connections.bind_socket("127.0.0.1", 0) as bound:
        app = server.application(models, connections.own_names("127.0.0.1"))
        running = server.page_server(app, models)
        status = []
        thread = threading.Thread(
            target=lambda: status.append(running.serve_until_stopped(bound, lambda: False))
        )
        thread.start()
        while not running.started:
            time.sleep(0.01)
        gate, answers = threading.Event(), []
        models.thread.submit(gate.wait, 30)
        port = bound.getsockname()[1]

        def wait_for_answer():
            answers.append(ask(port, request_body())[2])

        waiting = [threading.Thread(target=wait_for_answer) for _ in range(3)]
        for each in waiting:
            each.start()
        while models.pending < 3:
            time.sleep(0.01)
        running.handle_exit(signal.SIGINT, None)
        gate.set()
        for each in [*waiting, thread]:
            each.join(timeout=300)
    assert status == [128 + signal.SIGINT] and models.pending == 0
    assert all(lines(answer)[-1] == {"error": "the server was stopped"} for answer in answers)
    assert len(answers) == 3
    assert "Traceback" not in capfd.readouterr().err


def test_more_than_may_wait_are_refused_and_the_place_is_free_again(demo):
    port, models = demo
    gate = threading.Event()
    models.thread.submit(gate.wait, 30)
    statuses = []
    asking = [
        threading.Thread(target=lambda: statuses.append(ask(port, request_body())[0]))
        for _ in range(2)
    ]
    for thread in asking:
        thread.start()
    while models.pending < 2:
        time.sleep(0.01)
    status, _, text = ask(port, request_body())
    assert status == 503 and "Busy: 1 texts are waiting" in text
    gate.set()
    for thread in asking:
        thread.join(timeout=300)
    assert statuses == [200, 200] and models.pending == 0


def test_who_goes_away_is_no_longer_written_for(demo):
    port, models = demo
    gate = threading.Event()
    models.thread.submit(gate.wait, 30)
    body = json.dumps(request_body(max_new_tokens=32)).encode()
    with socket.create_connection(("127.0.0.1", port)) as gone:
        head = f"POST /write HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        gone.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        while models.pending < 1:
            time.sleep(0.01)
    gate.set()
    until = time.monotonic() + 300
    while models.pending and time.monotonic() < until:
        time.sleep(0.01)
    assert models.pending == 0
    assert ask(port, request_body())[0] == 200


def test_an_encoder_alone_and_empty_limits_are_refused():
    models = server.Models(limits.Limits())
    with pytest.raises(ValueError, match="encoder alone: it writes nothing"):
        models.add("reader", lambda: toy_session("encoder_only"))
    with pytest.raises(ValueError, match="--most_tokens must be at least 1; got 0"):
        limits.Limits(tokens=0)


def test_help_teaches_and_is_quick():
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "t5x_lite.demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--checkpoint=runs/g2p_decoder" in answer.stdout
    assert not any(f" {heavy}\n" in answer.stderr for heavy in ("jax", "starlette", "uvicorn"))


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_person_types_and_sees_both_twins_write(demo, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    troubles = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(f"http://127.0.0.1:{demo[0]}")
        page.locator("textarea").fill("abab")
        page.get_by_label("new tokens").fill("12")
        page.get_by_label("drafter").select_option("lookup")
        page.locator("textarea").press("End")
        page.locator("textarea").press("Shift+Enter")
        assert page.locator("textarea").input_value() == "abab\n"
        page.locator("textarea").press("Backspace")
        page.locator("textarea").press("Enter")
        page.locator(".times b").nth(3).wait_for(timeout=60000)
        page.locator("#write:enabled").wait_for()
        texts = page.locator(".text").all_text_contents()
        whole = [lines(ask(demo[0], request_body(name))[2]) for name in ("pair", "<b>joined</b>")]
        assert texts == ["".join(piece.get("text", "") for piece in each) for each in whole]
        assert page.locator("h2").all_text_contents() == ["pair", "<b>joined</b>"]
        drafted, begins = (page.locator(f".blocks {kind}") for kind in (".drafted", ".begins"))
        assert 2 <= begins.count() < page.locator(".blocks span").count() and drafted.count() > 0
        # Of the twins one alone writes again: the other keeps its text.
        page.get_by_role("checkbox").first.uncheck()
        page.locator("textarea").fill("zz")
        page.get_by_role("button", name="Write").click()
        page.locator("#write:enabled").wait_for()
        again = page.locator(".text").all_text_contents()
        assert again[0] == texts[0] and again[1] != texts[1]
        # An example is written for at a click.
        page.locator("#examples button").first.click()
        page.locator("#write:enabled").wait_for()
        assert page.locator("textarea").input_value() == server.T5_TASKS[0]
        page.screenshot(path=tmp_path / "demo.png")
        browser.close()
    assert troubles == [] and (tmp_path / "demo.png").stat().st_size > 10000
