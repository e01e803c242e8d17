# SPDX-License-Identifier: Apache-2.0
"""Laws of memory: what the host frees is used again, and a lack of it is one sentence."""

import subprocess
import sys

import jax
import pytest

from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser
from t5x_lite.training import host
from t5x_lite.utils.exit_status import FAILURE, OutOfMemoryError

PROGRAM = """
import resource
import numpy as np
from t5x_lite.training import host

host.keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill = lambda: np.ones(2**24, np.uint8)
fill()
before = faults()
fill()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_was_freed_is_used_again_without_asking_the_system():
    # Fetched anew, 16 MiB are up to 4096 pages.
    assert int(subprocess.check_output([sys.executable, "-c", PROGRAM])) < 8


LACKS = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore lines"),
    MemoryError(),
]


@pytest.mark.parametrize("error", LACKS, ids=repr)
def test_a_lack_of_memory_is_one_sentence_with_remedies(error, capsys):
    def train(options):
        with host.naming_lack_of_memory():
            raise error

    def infer(options):
        raise error

    for work in (train, infer):
        with pytest.raises(SystemExit) as ended:
            Command("some", lambda: Parser("some"), work).main([])
        assert ended.value.code == FAILURE
        (line,) = capsys.readouterr().err.splitlines()
        assert "Out of memory" in line and ("Train.batch_size" in line) == (work is train)


def test_other_errors_of_the_device_keep_their_class():
    for error in (jax.errors.JaxRuntimeError("INTERNAL: a bug"), RuntimeError("of a user")):
        with pytest.raises(type(error)), host.naming_lack_of_memory():
            raise error
    assert not issubclass(OutOfMemoryError, RuntimeError)
