# SPDX-License-Identifier: Apache-2.0
"""Laws of the dtype of training on a CPU: measured once, and the same from then on."""

import jax
import numpy as np
import pytest
from conftest import toy_model

from t5x_lite.training import cpu_dtype
from t5x_lite.training.reporting import overview
from t5x_lite.utils import latency_table


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Path of an empty table; nothing in the environment decides."""
    monkeypatch.delenv(cpu_dtype.VARIABLE, raising=False)
    monkeypatch.setenv(latency_table.VARIABLE, str(tmp_path / "costs.json"))
    return tmp_path / "costs.json"


@pytest.mark.parametrize("ratio, dtype", [(0.5, "bfloat16"), (0.85, "float32"), (1.6, "float32")])
def test_the_faster_dtype_is_measured_once(table, monkeypatch, ratio, dtype):
    monkeypatch.setattr(cpu_dtype, "measure_ratio", lambda: ratio)
    assert cpu_dtype.reason() == ""
    assert cpu_dtype.fastest_dtype() == dtype
    monkeypatch.setattr(cpu_dtype, "measure_ratio", lambda: pytest.fail("measured again"))
    assert cpu_dtype.fastest_dtype() == dtype
    assert cpu_dtype.reason().startswith(f"products in bfloat16 take {ratio:.2f} of the time")


def test_a_damaged_table_is_measured_anew(table, monkeypatch):
    table.write_text('{"dtype": [0.1')
    monkeypatch.setattr(cpu_dtype, "measure_ratio", lambda: 0.5)
    assert cpu_dtype.fastest_dtype() == "bfloat16"
    assert latency_table.read_table(table) == {cpu_dtype.table_key(): [0.5]}


def test_the_environment_and_several_processes_measure_nothing(table, monkeypatch):
    monkeypatch.setattr(cpu_dtype, "measure_ratio", lambda: pytest.fail("measured"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert cpu_dtype.fastest_dtype() == "float32"
    monkeypatch.setenv(cpu_dtype.VARIABLE, "bfloat16")
    assert cpu_dtype.fastest_dtype() == "bfloat16"
    assert overview.model_text(toy_model("encoder_decoder")).endswith("Model.dtype float32")
    monkeypatch.setenv(cpu_dtype.VARIABLE, "float16")
    with pytest.raises(ValueError, match="T5X_LITE_CPU_DTYPE is 'float16', but has to be float32"):
        cpu_dtype.fastest_dtype()


def test_a_measurement_is_a_ratio_of_times_of_equal_sums():
    assert 0.01 < cpu_dtype.measure_ratio() < 100
    draw = np.random.default_rng(0)
    shapes = (cpu_dtype.EMBED, cpu_dtype.MLP), (cpu_dtype.MLP, cpu_dtype.EMBED)
    weights = cpu_dtype.LayerMatrices(*(draw.normal(0, 0.02, shape) for shape in shapes))
    x = draw.normal(0, 1, (cpu_dtype.ROWS, cpu_dtype.EMBED)).astype(np.float32)
    sums = [float(cpu_dtype.sum_of_squares(weights, x, dtype)) for dtype in cpu_dtype.DTYPES]
    np.testing.assert_allclose(*sums, rtol=0.05)
