# SPDX-License-Identifier: Apache-2.0
"""Real weights: SmolLM2-135M as an encoder-decoder knows far more than nothing at step 0."""

import adaptation_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mark_exhaustive
from test_smollm2 import weights

from t5x_lite import adaptation, data, model, sharding
from t5x_lite.config import gin_file


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    mark_exhaustive(["adapt_ul2", "adapt_prefixlm_distill"], kept=["adapt_prefixlm_distill"]),
)
def test_an_adapted_smollm2_is_far_below_scratch_before_the_first_step(name):
    toys.one_device()
    lengths = "TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 128}"
    bindings = [f"SOURCE={weights()}", lengths, "config.Run.distillation=None"]
    run = gin_file.load_run([f"configs/runs/{name}.gin"], bindings)
    # Eight rows: one of each denoiser on average. Four are too few to say anything of UL2.
    batch = sharding.place_batch(data.open_batches(run.data, "encoder_decoder", 8, 0).at(0))
    params, report = adaptation.initialize(run)
    assert report.new == 128 * 576

    @jax.jit
    def loss(params):
        logits = model.Transformer(run.model).apply({"params": params}, batch)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.sum(logits * jax.nn.one_hot(batch.targets, run.model.vocab), axis=-1)
        return jnp.sum((log_z - chosen) * batch.loss_weights) / jnp.sum(batch.loss_weights)

    # Scratch knows nothing: the logarithm of the number of ids, 10.8.
    measured = float(loss(params))
    assert measured < 0.6 * np.log(run.model.vocab)
