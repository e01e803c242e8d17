# SPDX-License-Identifier: Apache-2.0
"""Laws of the command: it ends after what it has begun, and a killed one is served again."""

import contextlib
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
import pytest

from t5x_lite import serve

# Texts that take many blocks: more than there are rows, and no end before 100 tokens.
LONG = {"n": 40, "temperature": 1.0, "seed": 1, "max_tokens": 128}
LONG |= {"extra_body": {"min_new_tokens": 100}, "stream": True}
# Texts that take many seconds in eight rows.
ENDLESS = LONG | {"n": 128, "max_tokens": 256, "extra_body": {"min_new_tokens": 255}}


class Served(NamedTuple):
    """A server in a process.

    Attributes:
      process: the process.
      client: its client.
    """

    process: subprocess.Popen
    client: Any

    def wait_for(self, pattern: str) -> str:
        """The first line that the process writes to stderr from now on and that has a pattern."""
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError("".join(lines))


@contextlib.contextmanager
def serve_g2p(*options: str) -> Iterator[Served]:
    """A server of g2p in a process with options."""
    command = [sys.executable, "-m", "t5x_lite.serve", "--checkpoint=g2p", "--port=0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            url = Served(running, None).wait_for(r"^serving ").split()[1]
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
            yield Served(running, client)
        finally:
            running.kill()


@pytest.mark.slow
def test_what_has_begun_is_finished_and_a_killed_server_is_served_again():
    with serve_g2p() as served:
        running, client = served
        stream = client.completions.create(model="g2p", prompt="cat", **LONG)
        next(iter(stream))
        running.kill()
        with pytest.raises(Exception, match="(?i)connection"):
            list(stream)
    with serve_g2p() as served:
        running, client = served
        answer = client.completions.create(model="g2p", prompt=["photograph", "cat"])
        assert [each.text for each in answer.choices] == ["F OW T AH G R AE F", "K AE T"]
        stream = client.completions.create(model="g2p", prompt="cat", **LONG)
        parts = iter(stream)
        next(parts)
        running.send_signal(signal.SIGTERM)
        served.wait_for("^stopping: 1 running")
        reasons = [part.choices[0].finish_reason for part in parts]
        assert sum(reason is not None for reason in reasons) == LONG["n"]
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert running.wait(timeout=300) == 128 + signal.SIGTERM
        assert running.stderr.read().splitlines()[-1] == "stopped by SIGTERM"


def read_page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["signal", "drain"])
def test_what_is_cut_off_is_answered_by_an_error(end):
    """At a second signal, or when the time of the drain is over: streams, and whole texts."""
    with (
        serve_g2p(
            "--rows=8", "--texts=128", "--drain=0.1" if end == "drain" else "--drain=600"
        ) as served,
        ThreadPoolExecutor(1) as thread,
    ):
        running, client = served
        stream = client.completions.create(model="g2p", prompt="cat", **ENDLESS)
        parts = iter(stream)
        next(parts)
        others = ENDLESS | {"model": "g2p", "prompt": "dog", "stream": False}
        whole = thread.submit(client.completions.create, **others)
        url = str(client.base_url).replace("/v1/", "/metrics")
        # More than the first request has: those of the second wait too.
        while float(re.search(r"^t5x_lite_queued\S* (\S+)", read_page(url), re.M)[1]) < 128:
            assert not whole.done()
        running.send_signal(signal.SIGTERM)
        served.wait_for("^stopping: 2 running")
        if end == "signal":
            running.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server is stopping"):
            list(parts)
        with pytest.raises(openai.InternalServerError, match="The server is stopping"):
            whole.result()
        assert running.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "options, key, reason",
    [
        (["--host=0.0.0.0"], "", "set an API key in T5X_LITE_API_KEY"),
        (["--host=0.0.0.0"], "short", "16 or more ASCII characters"),
        (["--host=192.0.2.1"], "x" * 16, "Choose another --port"),
        (["--rows=0"], "", "--rows"),
        (["--drain=-1"], "", "--drain"),
        (["--checkpoint=nowhere"], "", "nowhere"),
        (["--adapter=nowhere=runs/x"], "", "--adapter nowhere: a model has this name already"),
    ],
)
def test_a_mistake_ends_it_before_it_serves(monkeypatch, capsys, options, key, reason):
    monkeypatch.setenv(serve.KEY, key)
    with pytest.raises(SystemExit) as end:
        serve.main(["--checkpoint=nowhere", "--port=0", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and reason in error and (not key or key not in error)


def test_help_teaches_and_is_quick():
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "t5x_lite.serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--checkpoint=runs/g2p" in answer.stdout
    assert not any(f" {heavy}\n" in answer.stderr for heavy in ("jax", "starlette", "uvicorn"))
