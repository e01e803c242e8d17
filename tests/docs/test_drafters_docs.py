# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/drafters.md obeys the laws of drafters, and drafts as it says."""

import re
import sys
import types
from pathlib import Path

import pytest
from decoding_laws import LAWS, DrafterCase, steps

DOCUMENT = Path(__file__).parents[2] / "docs" / "drafters.md"


@pytest.fixture(scope="module")
def periodic():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    (source,) = (block for block in blocks if "class Periodic" in block)
    # dataclasses look for the module of a class.
    module = sys.modules.setdefault("example_drafter", types.ModuleType("example_drafter"))
    exec(compile(source, str(DOCUMENT), "exec"), module.__dict__)
    return DrafterCase(module.Periodic(), kinds=("decoder_only",))


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law, periodic):
    law(periodic)


def test_it_drafts_that_the_text_repeats_itself(periodic):
    some = 0
    for number, (before, draft, _, _) in enumerate(steps(periodic, "decoder_only")):
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
