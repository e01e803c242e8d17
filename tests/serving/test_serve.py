# SPDX-License-Identifier: Apache-2.0
"""Laws of the command: it ends after what it has begun, and a killed one is served again."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import openai
import pytest

from t5x_lite import serve

# Texts that take many blocks: more than there are rows, and no end before 100 tokens.
LONG = {"n": 40, "temperature": 1.0, "seed": 1, "max_tokens": 128}
LONG |= {"extra_body": {"min_new_tokens": 100}, "stream": True}


class Served(NamedTuple):
    """A server in a process.

    Attributes:
      process: the process.
      client: its client.
      errors: returns all that it has written to stderr.
    """

    process: subprocess.Popen
    client: openai.OpenAI
    errors: Callable[[], str]


@contextlib.contextmanager
def serve_g2p(*options: str) -> Iterator[Served]:
    """A server of g2p in a process with options."""
    command = [sys.executable, "-m", "t5x_lite.serve", "--checkpoint=g2p", "--port=0", *options]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, text=True) as running,
    ):
        try:
            while not (url := re.search(r"^serving (\S+)", read_all(errors), re.M)):
                assert running.poll() is None, read_all(errors)
                time.sleep(0.05)
            client = openai.OpenAI(base_url=url[1], api_key="none", max_retries=0, timeout=60)
            yield Served(running, client, lambda: read_all(errors))
        finally:
            running.kill()


def read_all(file) -> str:
    """All of a file that another process writes."""
    return os.pread(file.fileno(), 2**20, 0).decode()


@pytest.mark.slow
def test_what_has_begun_is_finished_and_a_killed_server_is_served_again():
    with serve_g2p() as (running, client, errors):
        stream = client.completions.create(model="g2p", prompt="cat", **LONG)
        next(iter(stream))
        running.kill()
        with pytest.raises(Exception, match="(?i)connection"):
            list(stream)
    with serve_g2p() as (running, client, errors):
        answer = client.completions.create(model="g2p", prompt=["photograph", "cat"])
        assert [each.text for each in answer.choices] == ["F OW T AH G R AE F", "K AE T"]
        stream = client.completions.create(model="g2p", prompt="cat", **LONG)
        parts = iter(stream)
        next(parts)
        running.send_signal(signal.SIGTERM)
        reasons = [part.choices[0].finish_reason for part in parts]
        assert sum(reason is not None for reason in reasons) == LONG["n"]
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert running.wait(timeout=300) == 128 + signal.SIGTERM
        assert errors().splitlines()[-1] == "stopped by SIGTERM"


@pytest.mark.parametrize(
    "options, key, reason",
    [
        (["--host=0.0.0.0"], "", "set an API key in T5X_LITE_API_KEY"),
        (["--host=0.0.0.0"], "short", "16 or more ASCII characters"),
        (["--host=192.0.2.1"], "x" * 16, "Choose another --port"),
        (["--rows=0"], "", "--rows"),
        (["--drain=-1"], "", "--drain"),
        (["--checkpoint=nowhere"], "", "nowhere"),
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
