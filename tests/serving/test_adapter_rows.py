# SPDX-License-Identifier: Apache-2.0
"""Laws of adapters by row: rows of one decoding loop have each its own, from Python and by name."""

import dataclasses
import random

import openai
import pytest
from adapter_toys import LORAS, draw_adapter, draw_adapters
from conftest import mark_exhaustive
from conversion_toys import T5
from hub_toys import write_folders
from serving_toys import LIMITS as SERVER_LIMITS
from serving_toys import serve_toys
from test_engine import LIMITS, PLAIN, PROMPTS, predictor_of

from t5x_lite import interactive
from t5x_lite.model import adapters
from t5x_lite.serving import models
from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.engine import Engine

SCORED = dataclasses.replace(PLAIN, logprobs=1)
# A session has all devices of the tests.
ON_MESH = dataclasses.replace(SERVER_LIMITS, rows=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    # The mechanism is the same for a lone decoder: 15 s more.
    mark_exhaustive(["encoder_decoder", "decoder_only"], kept=["encoder_decoder"]),
)
def test_rows_of_one_pool_have_each_its_own_adapter(layout):
    """The text is that of the adapter alone; its very scores are the same in any company."""
    base = predictor_of(layout)
    loaded = {
        name: base.with_params(
            adapters.attach_to_layers(base.params, draw_adapter(base.cfg, name), LORAS[name])
        )
        for name in ("low", "dora")
    }
    expected = {
        (prompt, name): predictor.predict([prompt], PLAIN)[0].tokens[0]
        for name, predictor in {"": base, **loaded}.items()
        for prompt in PROMPTS[1:4]
    }
    assert len({tuple(tokens) for tokens in expected.values()}) == 9
    requests = [TextRequest(prompt, SCORED, name) for prompt, name in expected]
    random.Random(0).shuffle(requests)
    # Prompts of a lone decoder are read in chunks, from a prefix cache for each adapter.
    chunked = {} if layout == "encoder_decoder" else {"prefill_tokens": 8}
    engine = Engine(base, dataclasses.replace(LIMITS, **chunked), loaded)
    together = [engine.submit(request) for request in requests]
    chunks = [completion.result() for completion in together]
    for request, chunk in zip(requests, chunks, strict=True):
        assert chunk.tokens == expected[request.prompt, request.adapter]
        assert engine.submit(request).result() == chunk
    # Adapters share the rows: there is one pool.
    assert len(engine.lanes) == 1
    engine.close()


@pytest.mark.slow
def test_a_request_names_an_adapter_as_its_model(tmp_path):
    folders = write_folders(tmp_path)
    paths = {name: draw_adapters(folders, T5, seed) for seed, name in enumerate(("one", "two"))}
    served = models.ServedModels(ON_MESH)
    served.load(
        "base", str(folders / "hf"), adapters=[(name, str(path)) for name, path in paths.items()]
    )
    session = interactive.load(folders / "hf")
    sessions = {"base": session} | {name: session.with_adapters(paths[name]) for name in paths}
    options = {"max_new_tokens": 9, "drafter": "plain"}
    with serve_toys(served) as server:
        client = server.client()
        assert [each.id for each in client.models.list()] == ["base", "one", "two"]
        for name, each in sessions.items():
            answer = client.completions.create(model=name, prompt="abc", max_tokens=9)
            assert answer.choices[0].text == each.generate("abc", **options), name
        vector = client.embeddings.create(model="two", input="abc").data[0].embedding
        assert vector == pytest.approx(sessions["two"].embed("abc").tolist(), abs=1e-5)
        with pytest.raises(openai.NotFoundError, match="choose from base, one, two"):
            client.completions.create(model="three", prompt="abc")
        metrics = server.api.metrics.write().decode()
        assert 't5x_lite_rows{model="base"}' in metrics
        assert 't5x_lite_rows{model="one"}' not in metrics
    assert not served.is_busy()


def test_an_adapter_of_another_model_is_refused_by_its_name(tmp_path):
    folders = write_folders(tmp_path)
    served = models.ServedModels(ON_MESH)
    with pytest.raises(ValueError, match="--adapter one: .* has no adapters"):
        served.load("base", str(folders / "hf"), adapters=[("one", str(folders / "hf"))])
    assert served.served == {}
