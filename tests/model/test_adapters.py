# SPDX-License-Identifier: Apache-2.0
"""Laws of adapters: LoRA, rsLoRA and DoRA equal those of peft; quantized bases; dropout."""

import lora_parity
import numpy as np
import pytest

CASES = [
    ("llama", "lora"),
    *(
        pytest.param(toy, kind, marks=pytest.mark.slow)
        for toy, kind in (
            ("llama", "dora"),
            ("t5", "lora"),
            ("t5", "dora"),
            ("t5gemma", "rslora"),
            ("t5gemma", "dora"),
        )
    ),
]


@pytest.mark.parametrize("toy, kind", CASES)
def test_outputs_and_gradients_are_those_of_peft(toy, kind, tmp_path):
    drawn = lora_parity.draw_pair(toy, kind, tmp_path)
    expected = drawn.laws.their_outputs(drawn.pair.theirs, drawn.ids)
    np.testing.assert_allclose(lora_parity.our_outputs(drawn), expected, atol=1e-5, rtol=0)
    actual, theirs = lora_parity.our_gradients(drawn), lora_parity.their_gradients(drawn)
    assert actual.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.abs(gradient).max() > 1e-4, name
        np.testing.assert_allclose(actual[name], gradient, atol=1e-5, rtol=0, err_msg=name)
