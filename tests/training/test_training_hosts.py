# SPDX-License-Identifier: Apache-2.0
"""Several hosts, each with its own rows, train as one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# One of `hosts` processes that share four devices: three steps on its part of every batch.
HOST = """
import dataclasses, sys
import jax
hosts, host, port = (int(word) for word in sys.argv[1:])
if hosts > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", hosts, host)
from conftest import toy_batch, toy_model
from t5x_lite import config, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.training import optimizer, schedules, step

run = config.Run(
    model_dir="unused",
    model=toy_model("encoder_decoder"),
    data=config.Data("unused", {"inputs": 12, "targets": 12}),
    train=config.Train(steps=10, batch_size=8, microbatches=2),
    schedule=config.Schedule("constant", 0.1),
    optimizer=config.Optimizer("sgd"),
    mesh=config.Mesh(data=2, fsdp=2),
)
sharding.use_mesh(run.mesh)
axes = model.axes(run.model)
schedule = schedules.learning_rate(run.schedule, run.train.steps)
update = optimizer.make_optimizer(run.optimizer, schedule, axes)
advance = step.make_step(run, update, schedule, axes)
now = train_state.begin_state(model.initialize(run.model, jax.random.key(0)), update)
for number in range(3):
    batch = toy_batch("encoder_decoder", rows=8, seed=number)
    # The hosts' parts differ in tokens.
    batch.loss_weights[:4, 3:] = 0
    mine = slice(host * 8 // hosts, (host + 1) * 8 // hosts)
    placed = sharding.place_batch(jax.tree.map(lambda rows: rows[mine], batch))
    with jax.transfer_guard("disallow"):
        now, metrics = advance(now, placed)
    sums = jax.device_get(metrics.sums)
    print("step", sums.loss / sums.weights, int(sums.tokens), flush=True)
"""


def start(hosts: int, host: int, port: int) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": f"{tests}:{tests.parent}",
        "JAX_PLATFORMS": "cpu",
        # conftest asks for eight, and the last word counts.
        "JAX_NUM_CPU_DEVICES": str(4 // hosts),
    }
    return subprocess.Popen(
        [sys.executable, "-c", HOST, str(hosts), str(host), str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_steps(process: subprocess.Popen) -> list[list[float]]:
    written, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = [line.split() for line in written.splitlines() if line.startswith("step")]
    return [[float(word) for word in line[1:]] for line in lines]


# test_processes trains so by the command; microbatches on several hosts are here alone.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_hosts_train_as_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [start(2, host, port) for host in (0, 1)]
    reports = [read_steps(process) for process in together]
    expected = read_steps(start(1, 0, port))
    assert len(expected) == 3
    for lines in reports:
        assert lines == [pytest.approx(line, rel=1e-5) for line in expected]
