# SPDX-License-Identifier: Apache-2.0
"""Laws of the server: OpenAI's own client gets what the model writes, and limits hold."""

import http.client
import json
import socket
import threading

import numpy as np
import openai
import pytest
from conftest import toy_model
from serving_toys import (
    LIMITS,
    count_requests,
    hold_engine,
    predict_alone,
    send,
    serve_toys,
    serve_two_toys,
    wait_until,
)

from t5x_lite.decoding.request import check_positions
from t5x_lite.serving import completion_group, models
from t5x_lite.serving.server_limits import ServerLimits
from t5x_lite.utils import hub_names

SAMPLED = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def toys():
    with serve_two_toys() as server:
        yield server


@pytest.mark.parametrize("name", ["pair", "alone"])
def test_a_completion_is_what_the_model_writes(toys, name):
    client, texts = toys.client(), ["the cat", "größer", "x"]
    answer = client.completions.create(model=name, prompt=texts, max_tokens=12)
    wanted = [predict_alone(toys, name, text, max_new_tokens=12) for text in texts]
    assert [each.text for each in answer.choices] == [each.texts[0] for each in wanted]
    assert [each.index for each in answer.choices] == [0, 1, 2]
    count = sum(len(each.tokens[0]) for each in wanted)
    assert answer.usage.completion_tokens == count
    predictor = toys.models.get(name).session.predictor
    ids = predictor.encode_inputs(texts)
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    again = client.completions.create(model=name, prompt=ids, max_tokens=12)
    assert [each.text for each in again.choices] == [each.text for each in answer.choices]


def test_n_samples_are_those_of_the_seed_and_streams_say_the_same(toys):
    client = toys.client()
    whole = client.completions.create(model="alone", prompt="ab", n=3, **SAMPLED)
    wanted = predict_alone(
        toys, "alone", "ab", n_best=3, temperature=1.0, seed=7, max_new_tokens=12
    )
    assert [each.text for each in whole.choices] == wanted.texts
    assert len({each.text for each in whole.choices}) > 1
    options = {"include_usage": True}
    parts = [
        *client.completions.create(
            model="alone", prompt="ab", n=3, stream=True, stream_options=options, **SAMPLED
        )
    ]
    texts, reasons = [""] * 3, [None] * 3
    for part in parts[:-1]:
        (choice,) = part.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == wanted.texts
    assert reasons == [each.finish_reason for each in whole.choices]
    assert parts[-1].usage == whole.usage and parts[-1].choices == []


def test_a_chat_is_the_completion_of_its_template(toys):
    client = toys.client()
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="alone", messages=messages, max_tokens=8)
    prompt = "system: Be\nuser: hi\n"
    plain = client.completions.create(model="alone", prompt=prompt, max_tokens=8)
    assert chat.choices[0].message.content == plain.choices[0].text
    in_parts = [{"role": "system", "content": [{"type": "text", "text": "Be"}]}, messages[1]]
    stream = client.chat.completions.create(
        model="alone", messages=in_parts, max_completion_tokens=8, stream=True
    )
    deltas = [part.choices[0].delta for part in stream]
    assert deltas[0].role == "assistant"
    assert "".join(each.content or "" for each in deltas) == plain.choices[0].text


def test_steering_of_requests_is_that_of_decoding(toys):
    client = toys.client()
    plain = client.completions.create(model="pair", prompt="ab", max_tokens=12).choices[0]
    stop = plain.text[2]
    cut = client.completions.create(model="pair", prompt="ab", max_tokens=12, stop=[stop])
    assert cut.choices[0].text == plain.text.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    token = predict_alone(toys, "pair", "ab", max_new_tokens=1).tokens[0][0]
    other = client.completions.create(
        model="pair", prompt="ab", max_tokens=1, logit_bias={str(token): -100}
    )
    wanted = predict_alone(toys, "pair", "ab", max_new_tokens=1, logit_bias={token: -100.0})
    assert other.choices[0].text == wanted.texts[0]
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    changed = client.completions.create(model="pair", prompt="ab", max_tokens=12, **penalties)
    wanted = predict_alone(toys, "pair", "ab", max_new_tokens=12, **penalties)
    assert changed.choices[0].text == wanted.texts[0]


def test_log_probabilities_are_those_of_the_prediction(toys):
    client = toys.client()
    (wanted,) = predict_alone(toys, "alone", "user: ab\n", max_new_tokens=8, logprobs=2).details
    prompt = "user: ab\n"
    plain = client.completions.create(model="alone", prompt=prompt, max_tokens=8, logprobs=2)
    shown = plain.choices[0].logprobs
    assert shown.tokens == [each.text for each in wanted]
    np.testing.assert_allclose(
        shown.token_logprobs, [each.log_probability for each in wanted], rtol=0, atol=1e-5
    )
    assert [len(each) for each in shown.top_logprobs] == [
        len({text for _, text, _ in each.top}) for each in wanted
    ]
    assert shown.text_offset[0] == 0 and sorted(shown.text_offset) == shown.text_offset
    parts = client.chat.completions.create(
        model="alone",
        messages=[{"role": "user", "content": "ab"}],
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
        stream=True,
    )
    content = [
        each for part in parts if (chosen := part.choices[0].logprobs) for each in chosen.content
    ]
    assert [each.token for each in content] == shown.tokens
    assert [each.logprob for each in content] == shown.token_logprobs
    for each, scores in zip(content, wanted, strict=True):
        assert [top.token for top in each.top_logprobs] == [text for _, text, _ in scores.top]
        assert bytes(each.bytes).decode() == each.token


def test_a_schema_is_followed(toys):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    format = {"type": "json_schema", "json_schema": {"name": "toy", "schema": schema}}
    answer = toys.client().chat.completions.create(
        model="alone",
        messages=[{"role": "user", "content": "x"}],
        response_format=format,
        max_tokens=32,
        **{"temperature": 1.0, "seed": 3},
    )
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)
    assert answer.choices[0].finish_reason == "stop"


def test_embeddings_are_those_of_the_session(toys):
    client, texts = toys.client(), ["the cat", "x"]
    plain = client.embeddings.create(model="pair", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="pair", input=texts)  # base64 of the client
    served = toys.models.get("pair")
    wanted = served.engine.call(lambda: served.session.embed(texts)).result()
    for answer in (plain, packed):
        vectors = np.array([each.embedding for each in answer.data], np.float32)
        np.testing.assert_array_equal(vectors, wanted)
    assert plain.usage.prompt_tokens == 8


def test_tasks_put_the_prefix_of_the_checkpoint_before_their_inputs(toys):
    served = toys.models.get("pair")
    served.parameters = {
        "translation_en_to_de": {"prefix": "to German: ", "max_length": 9},
        "summarization": {"prefix": "sum: "},
    }
    languages = {"source_language": "en", "target_language": "de"}
    for path, more, text, most in (
        ("/v1/translations", languages, "to German: ab", 8),
        ("/v1/translations", {}, "ab", 16),
        ("/v1/summaries", {}, "sum: ab", 16),
    ):
        body = {"model": "pair", "input": ["ab", "ab"], **more}
        status, _, answer = send(toys.port, json.dumps(body).encode(), path)
        assert status == 200
        wanted = predict_alone(toys, "pair", text, max_new_tokens=most).texts[0]
        assert [each["text"] for each in answer["data"]] == [wanted, wanted]
    served.parameters = {}


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_an_engine_has_no_more_tokens_than_learned_positions(layout):
    free = models.engine_limits(toy_model(layout, positions="relative"), ServerLimits())
    assert (free.max_inputs, free.max_new_tokens) == (1024, 256)
    learned = toy_model(layout, positions="learned", max_length=64)
    sizes = models.engine_limits(learned, ServerLimits())
    check_positions(learned, "Input", [[1] * sizes.max_inputs], sizes.max_new_tokens)
    assert min(sizes.max_inputs, sizes.max_new_tokens) >= 32


def test_models_are_listed_by_name(toys):
    listed = toys.client().models.list().data
    assert [each.id for each in listed] == ["pair", "alone"]
    assert toys.client().models.retrieve("pair").id == "pair"
    assert hub_names.short_names(["runs/a", "b/a", "c", "d/a/"]) == ["a", "a (2)", "c", "a (3)"]


def test_a_full_queue_is_refused_with_a_time_and_takes_more_later(toys):
    client = toys.client()
    with hold_engine(toys, "pair"):
        results = []

        def ask():
            results.append(client.completions.create(model="pair", prompt="x", n=16))

        first = threading.Thread(target=ask)
        first.start()
        engine = toys.models.get("pair").engine
        wait_until(lambda: engine.gauges().queued == LIMITS.queue)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="pair", prompt="x")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    first.join(timeout=300)
    assert len(results[0].choices) == 16
    assert client.completions.create(model="pair", prompt="x").choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_not_written_for(toys, stream):
    engine = toys.models.get("pair").engine
    before, gone_before = engine.gauges().finished.get("cancelled", 0), count_requests(toys, 499)
    body = json.dumps({"model": "pair", "prompt": "x", "n": 3, "stream": stream}).encode()
    with hold_engine(toys, "pair"):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", toys.port)) as gone:
            gone.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
            wait_until(lambda: engine.gauges().queued == 3)
        wait_until(lambda: count_requests(toys, 499) == gone_before + 1)
    wait_until(lambda: engine.gauges().finished.get("cancelled", 0) == before + 3)
    assert toys.client().completions.create(model="pair", prompt="x").choices


def test_a_text_that_is_late_is_a_timeout(toys, monkeypatch):
    limits = LIMITS.__class__(**{**vars(LIMITS), "timeout": 0.01})
    monkeypatch.setattr(toys.models, "limits", limits)
    monkeypatch.setattr(completion_group, "GRACE", 0.05)
    with hold_engine(toys, "pair"):
        with pytest.raises(openai.APIStatusError) as late:
            toys.client().completions.create(model="pair", prompt="x")
    assert late.value.status_code == 504 and late.value.code == "timeout"


def test_a_body_that_does_not_arrive_is_a_timeout(toys, monkeypatch):
    limits = LIMITS.__class__(**{**vars(LIMITS), "body_seconds": 0.05})
    monkeypatch.setattr(toys.models, "limits", limits)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9"
    with socket.create_connection(("127.0.0.1", toys.port), timeout=30) as slow:
        slow.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{{".encode())
        assert b"408 Request Timeout" in slow.recv(65536)


def test_health_and_metrics(toys):
    connection = http.client.HTTPConnection("127.0.0.1", toys.port, timeout=60)
    for path in ("/health", "/ready"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read()) == {"status": "ok"}
    toys.api.stop()
    connection.request("GET", "/ready")
    answer = connection.getresponse()
    assert answer.status == 503 and answer.read()
    toys.api.stopping = False
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert 't5x_lite_rows{model="pair"} 4.0' in text
    assert 't5x_lite_requests_total{route="/ready",status="503"}' in text
    connection.close()


def test_a_key_is_needed_where_there_are_keys(toys):
    keys = ("first-key-of-the-server", "second-key-of-the-server")
    with serve_toys(toys.models, keys) as guarded:
        for key in keys:
            assert guarded.client(key).models.list().data
        wrong = ["Bearer ", "Bearer first-key-of-the-serve", "Bearer ключ", f"Basic {keys[0]}"]
        for value in (*wrong, keys[0], f"Bearer {keys[0]} ,"):
            headers = {"Authorization": value.encode()}
            status, shown, answer = send(guarded.port, b"{}", **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert shown["WWW-Authenticate"] == "Bearer" and keys[0] not in str(answer)
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=60)
        for path, status in (("/health", 200), ("/metrics", 401), ("/v1/models", 401)):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (status, True)
        connection.close()
