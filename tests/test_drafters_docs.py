# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/drafters.md obeys the laws of drafters, and guesses as it says."""

import re
import sys
import types
from pathlib import Path

import pytest
from decoding_laws import LAWS, Drafted, steps

DOCUMENT = Path(__file__).parents[1] / "docs" / "drafters.md"


@pytest.fixture(scope="module")
def periodic():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    (source,) = (block for block in blocks if "class Periodic" in block)
    # dataclasses look for the module of a class.
    module = sys.modules.setdefault("example_drafter", types.ModuleType("example_drafter"))
    exec(compile(source, str(DOCUMENT), "exec"), module.__dict__)
    return Drafted(module.Periodic(), kinds=("joined",))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law, periodic):
    law(periodic)


def test_it_guesses_that_the_text_repeats_itself(periodic):
    some = 0
    for number, (before, draft, _, _) in enumerate(steps(periodic, "joined")):
        for row, length in enumerate(before.length):
            *earlier, root = before.tokens[row, : length + 1].tolist()
            expected = [-1] * 4
            if root in earlier and number:
                distance = 1 + earlier[::-1].index(root)
                expected = [[*earlier, root][-distance:][i % distance] for i in range(4)]
            if not before.done[row]:
                assert draft.tokens[row].tolist() == expected
                some += expected[0] >= 0
    assert some
