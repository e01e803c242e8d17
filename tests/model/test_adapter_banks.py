# SPDX-License-Identifier: Apache-2.0
"""Laws of adapters by row: each row is computed as with its adapter alone, in any company."""

import jax
import numpy as np
import pytest
from adapter_toys import LORAS, draw_adapter
from conftest import mark_exhaustive, toy_model
from test_decoding_loop import lively, use_one_device

from t5x_lite import config, decoding, sharding
from t5x_lite.model import adapter_banks, adapters, quantization
from t5x_lite.model.computation import params_for_compute

IDS = [5, 9, 3, 7, 11, 2]


def prepare_bank(cfg: config.Model) -> tuple[dict, dict, dict]:
    """The base, the weights with each adapter alone by name, and those with all of them.

    Args:
      cfg: the model.
    """
    base = decoding.prepare_params(cfg, lively(cfg))
    alone = {
        name: adapters.attach_to_layers(base, draw_adapter(cfg, name), lora)
        for name, lora in LORAS.items()
    }
    return base, alone, adapter_banks.bank_adapters(base, [*alone.values()])


def score_rows(cfg: config.Model, params: dict, count: int) -> np.ndarray:
    """Log-probabilities [count tokens] of a text, the same in each row.

    Args:
      cfg: the model.
      params: weights of decoding.
      count: number of rows.
    """
    scores = decoding.score(cfg, params, [IDS] * count, [IDS[::-1]] * count)
    return np.asarray(scores.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
def test_each_row_has_its_own_adapter_in_any_company(layout):
    use_one_device()
    cfg = toy_model(layout, layers=1)
    base, alone, bank = prepare_bank(cfg)
    rows = np.array([3, 0, 2, 1], np.int32)
    together = score_rows(cfg, adapter_banks.select_adapters(bank, rows), 4)
    for number, params in enumerate([base, *alone.values()]):
        (place,) = np.flatnonzero(rows == number)
        expected = score_rows(cfg, params, 4)[0]
        np.testing.assert_allclose(together[place], expected, atol=1e-5, rtol=1e-5)
        # The very bits, whatever adapters the others have.
        same = score_rows(cfg, adapter_banks.select_adapters(bank, np.full(4, number, np.int32)), 4)
        np.testing.assert_array_equal(same, np.broadcast_to(together[place], same.shape))
    # Adapters that changed nothing would show nothing.
    assert len({row.tobytes() for row in together}) == 4
    assert np.abs(together[:, None] - together).max(2)[np.triu_indices(4, 1)].min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    # Each other format is the same cast of the same arrays.
    mark_exhaustive(["int8", "bfloat16", "quantized base"], kept=["int8"]),
)
def test_other_formats_have_adapters_by_row(kind):
    use_one_device()
    cfg, name = toy_model("encoder_decoder", layers=1), "dora"
    base = decoding.prepare_params(cfg, lively(cfg))
    if kind == "quantized base":
        weights = jax.tree.map(jax.numpy.asarray, lively(cfg))
        stored = quantization.quantize_params(weights, quantization.parse_quantization("int8"))
        base = decoding.prepare_params(cfg, stored)
    alone = adapters.attach_to_layers(base, draw_adapter(cfg, name), LORAS[name])
    bank = adapter_banks.bank_adapters(base, [alone])
    if kind != "quantized base":
        alone, bank = (params_for_compute(cfg, each, kind) for each in (alone, bank))
    together = score_rows(cfg, adapter_banks.select_adapters(bank, np.array([1, 0], np.int32)), 2)
    # Of int8, an activation may round the other way: a level of 127.
    tolerance = {"int8": 1e-2, "bfloat16": 0.3, "quantized base": 1e-4}[kind]
    np.testing.assert_allclose(together[0], score_rows(cfg, alone, 2)[0], atol=tolerance)
    assert np.abs(together[0] - together[1]).max() > tolerance


@pytest.mark.slow
def test_adapters_by_row_are_split_over_a_mesh():
    cfg = toy_model("encoder_decoder", layers=1)
    rows = np.array([3, 0, 2, 1], np.int32)
    use_one_device()
    expected = score_rows(cfg, adapter_banks.select_adapters(prepare_bank(cfg)[2], rows), 4)
    sharding.use_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    params = adapter_banks.select_adapters(prepare_bank(cfg)[2], rows)
    np.testing.assert_allclose(score_rows(cfg, params, 4), expected, atol=1e-5, rtol=1e-5)
    use_one_device()
