# SPDX-License-Identifier: Apache-2.0
"""Laws of refusals: each has a status, OpenAI's shape, a reason, and the field that is wrong."""

import contextlib
import http.client
import json

import openai
import pytest
from serving_toys import send, serve_two_toys


@pytest.fixture(scope="module")
def toys():
    with serve_two_toys() as server:
        yield server


# Changes of a request, the field that is wrong, and a part of the reason.
REFUSED = {
    "model": ({"model": "../etc"}, 404, "model", "choose from pair, alone"),
    "no model": ({"model": None}, 400, "model", "is missing"),
    "half a name": ({"model": "\ud800"}, 400, "model", "surrogate"),
    "half a field": ({"\ud800": 1}, 400, "?", "? is not a field"),
    "half a stop": ({"stop": "\ud800"}, 400, "stop", "stop"),
    "no prompt": ({"prompt": None}, 400, "prompt", "is missing"),
    "empty": ({"prompt": []}, 400, "prompt", "must be a text, a list"),
    "mixed": ({"prompt": ["a", 5]}, 400, "prompt", "must be a text, a list"),
    "ids": ({"prompt": [10**20]}, 400, "prompt", "outside of every vocabulary"),
    "other ids": ({"prompt": [299, 300]}, 400, None, "outside of the model's vocabulary"),
    "surrogate": ({"prompt": "\ud800"}, 400, "prompt", "surrogate"),
    "long": ({"prompt": "a" * 65}, 400, None, "65 tokens, more than 64"),
    "max_tokens": ({"max_tokens": 33}, 400, "max_tokens", "at most 32"),
    "true": ({"max_tokens": True}, 400, "max_tokens", "must be"),
    "half": ({"max_tokens": 2.5}, 400, "max_tokens", "must be"),
    "temperature": ({"temperature": -1}, 400, "temperature", "must be"),
    "infinite": ({"temperature": 1e999}, 400, None, "not JSON"),
    "top_p": ({"top_p": 0.5}, 400, "top_p", "greedy"),
    "seed": ({"seed": 2**32}, 400, "seed", "must be"),
    "n": ({"n": 17}, 400, "n", "17 texts, more than 16"),
    "stream": ({"stream": "yes"}, 400, "stream", "must be"),
    "bias": ({"logit_bias": {"x": 1}}, 400, "logit_bias", "must be"),
    "bias digits": ({"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "must be"),
    "bias id": ({"logit_bias": {"300": 1}}, 400, "logit_bias", "has id 300"),
    "format": ({"response_format": {"type": "xml"}}, 400, "response_format", "json_object"),
    "schema": (
        {"response_format": {"type": "json_schema"}},
        400,
        "response_format",
        "must be a JSON",
    ),
    "stop": (
        {"stop": "a", "response_format": {"type": "json_object"}},
        400,
        "stop",
        "leave one out",
    ),
    "rules": ({"bad_words": ["ab"] * 9000}, 400, "bad_words", "too long"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "echo": ({"echo": True}, 400, "echo", "not supported"),
    "drafter": ({"drafter": "draft:/etc"}, 400, "drafter", "is not a field"),
    "companion": ({"companion": "model:/etc"}, 400, "companion", "is not a field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field(toys, name):
    changes, wanted, param, reason = REFUSED[name]
    body = {"model": "pair", "prompt": "ab"} | changes
    status, _, answer = send(toys.port, json.dumps(body).encode())
    error = answer["error"]
    assert (status, error["param"]) == (wanted, param), answer
    assert reason in error["message"] and error["type"]


def test_alternatives_need_log_probabilities(toys):
    chat = [{"role": "user", "content": "x"}]
    body = {"model": "alone", "messages": chat, "top_logprobs": 2}
    status, _, answer = send(toys.port, json.dumps(body).encode(), "/v1/chat/completions")
    assert status == 400 and answer["error"]["param"] == "top_logprobs"


def test_what_asks_for_nothing_is_ignored(toys):
    idle = {"echo": False, "best_of": 1, "suffix": None, "user": "me", "tools": []}
    body = {"model": "pair", "prompt": "ab", "temperature": 0, "top_p": 0.5} | idle
    assert send(toys.port, json.dumps(body).encode())[0] == 200


BROKEN = {
    "half": (b"{", 400, {}),
    "deep": (b"[" * 4000, 400, {}),
    "list": (b"[]", 400, {}),
    "not UTF-8": (b'{"model": "\xff"}', 400, {}),
    "NaN": (b'{"model": "pair", "prompt": "a", "temperature": NaN}', 400, {}),
    "digits": (b'{"seed": ' + b"9" * 4000 + b"}", 400, {}),
    "form": (b"model=pair", 415, {"Content-Type": "application/x-www-form-urlencoded"}),
    "gzip": (b"{}", 415, {"Content-Encoding": "gzip"}),
    "large": (b" " * 65537, 413, {}),
    "other host": (b"{}", 421, {"Host": "evil.example"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_request_is_refused_in_the_same_shape(toys, name):
    body, wanted, headers = BROKEN[name]
    status, _, answer = send(toys.port, body, **headers)
    assert status == wanted and answer["error"]["message"]


def test_a_body_in_chunks_is_cut_off_at_the_limit(toys):
    connection = http.client.HTTPConnection("127.0.0.1", toys.port, timeout=60)
    with contextlib.closing(connection):
        chunks = (b" " * 16384 for _ in range(5))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 413 and json.loads(answer.read())["error"]["message"]


def test_a_host_with_more_in_it_changes_no_path(toys):
    body = json.dumps({"model": "pair", "prompt": "ab"}).encode()
    for host in ("localhost:1/v1/chat", "localhost:1?", "localhost:x#", "LOCALHOST"):
        assert send(toys.port, body, Host=host)[0] == 200, host


def test_other_paths_and_methods_are_refused_in_the_same_shape(toys):
    for path in ("/", "/v1/completions/", "/v1/../etc/passwd", "/v1//models", "/metrics"):
        status, _, answer = send(toys.port, b"{}", path)
        assert status in (404, 405) and answer["error"]["message"], path
    with pytest.raises(openai.NotFoundError, match="choose from"):
        toys.client().models.retrieve("a/b")


def test_models_without_what_a_route_needs_say_so(toys):
    client = toys.client()
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="pair", messages=[{"role": "user", "content": "x"}])
    body = json.dumps({"model": "alone", "input": "x"}).encode()
    assert "not an encoder-decoder" in send(toys.port, body, "/v1/summaries")[2]["error"]["message"]
    languages = {"model": "pair", "input": "x", "target_language": "de"}
    status, _, answer = send(toys.port, json.dumps(languages).encode(), "/v1/translations")
    assert status == 400 and answer["error"]["param"] == "target_language"
