# SPDX-License-Identifier: Apache-2.0
"""Laws of adapters: LoRA, rsLoRA and DoRA equal those of peft; quantized bases; dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import lora_parity
import numpy as np
import peft
import pytest
import torch
from conftest import mark_exhaustive

from t5x_lite import config, sharding
from t5x_lite.model import layers
from t5x_lite.model.adapters import AdaptedWeight

CASES = mark_exhaustive(
    [
        ("llama", "lora"),
        ("llama", "dora"),
        ("t5", "lora"),
        ("t5", "dora"),
        ("t5gemma", "rslora"),
        ("t5gemma", "dora"),
    ],
    kept=[("llama", "lora"), ("t5", "dora"), ("t5gemma", "rslora")],
)


@pytest.mark.slow
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


class FixedDropout(torch.nn.Module):
    """Dropout of peft with a mask of ours."""

    def __init__(self, mask: np.ndarray):
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_that_of_peft(kind):
    """Outputs and gradients of a layer while it trains, of the same mask."""
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    draw, key, rate = np.random.default_rng(4), jax.random.key(2), 0.4
    sizes = dict(x=(2, 3, 8), weight=(8, 6), a=(8, 2), b=(2, 6), magnitude=(6,), out=(2, 3, 6))
    arrays = {name: draw.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    described = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0"], lora_dropout=rate, use_dora=kind == "dora"
    )
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)), described)
    layer = theirs.base_model.model[0]
    x = sharding.place_whole(arrays["x"], sharding.named_sharding("batch length width"))
    mask = np.asarray(layers.dropout(jnp.ones_like(x), rate, key))
    assert 0 < (mask == 0).mean() < 1
    layer.lora_dropout["default"] = FixedDropout(mask)
    trained = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    if kind == "dora":
        trained["magnitude"] = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(arrays["weight"].T))
        for name, weight in trained.items():
            weight.copy_(torch.tensor(arrays[name].T))
    expected = theirs.train()(torch.tensor(arrays["x"]))
    (expected * torch.tensor(arrays["out"])).sum().backward()

    def compute(adapter: dict) -> tuple[jax.Array, jax.Array]:
        adapted = AdaptedWeight(
            jnp.asarray(arrays["weight"]), adapter["a"], adapter["b"], None, key, 1.5, rate
        )
        adapted = dataclasses.replace(adapted, magnitude=adapter.get("magnitude"))
        y = layers.project(x, adapted, "embed -> mlp")
        return jnp.sum(y * arrays["out"]), y

    adapter = {name: jnp.asarray(arrays[name]) for name in trained}
    (_, actual), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(adapter)
    np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-5)
    for name, weight in trained.items():
        np.testing.assert_allclose(gradients[name], weight.grad.numpy().T, atol=1e-5, err_msg=name)
