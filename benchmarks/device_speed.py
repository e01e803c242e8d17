# SPDX-License-Identifier: Apache-2.0
"""Cases of device.py that are timed: training, attention, decoding, and twins."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attention
import device_cases
import jax
import numpy as np
from attention_systems import FRAMEWORKS
from device_cases import Case
from device_checks import random_batch
from report import Row

from t5x_lite import config, decoding, model, sharding
from t5x_lite.checkpoints import train_state
from t5x_lite.planning import aot
from t5x_lite.training import flops, optimizer, schedules

ROOT = Path(__file__).resolve().parents[1]


def measure_training(case: Case, settings: dict, rehearse: bool) -> Iterator[Row]:
    """Yields sequences per second, MFU, peak memory and seconds of compiling of a training step.

    Args:
      case: of the stage.
      settings: arguments of `device_cases.run_of`.
      rehearse: PyTorch compiles nothing.
    """
    run, steps = device_cases.run_of(**settings), 2 if rehearse else 10
    system = "transformers" if settings["system"] == "transformers" else "t5x_lite"
    sharding.use_mesh(run.mesh, jax.devices()[:1])
    if system == "transformers":
        measured = peer_step(run, steps, "eager" if rehearse else "inductor")
    else:
        measured = own_step(run, steps)
    seconds, compile_seconds, peak, loss = measured
    yield Row(case.key, system, "sequences/s", run.train.batch_size / seconds)
    peak_flops = flops.peak_flops(jax.devices()[0].device_kind)
    if peak_flops:
        yield Row(case.key, system, "MFU", flops.run_flops(run) / seconds / peak_flops)
    yield Row(case.key, system, "peak GB", peak / 1e9)
    yield Row(case.key, system, "compile seconds", compile_seconds)
    yield Row(case.key, system, "loss", loss)


def step_seconds(step: Callable[[], float], steps: int) -> tuple[float, float]:
    """Median seconds of a step after two that warm up, and the last loss."""
    seconds = []
    for _ in range(2 + steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:]), loss


def own_step(run, steps: int) -> tuple[float, float, float, float]:
    """Seconds of our step, of its compilation, peak bytes, loss."""
    devices = jax.devices()[:1]
    begin = time.perf_counter()
    compiled = aot.trace_step(run, devices).lower().compile()
    compile_seconds = time.perf_counter() - begin
    axes, schedule = model.axes(run.model), schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes)
    state = train_state.begin_state(model.initialize(run.model, jax.random.key(0)), update)
    batch = random_batch(run)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, None, None)
        return float(metrics.sums.loss / metrics.sums.weights)

    seconds, loss = step_seconds(step, steps)
    statistic = devices[0].memory_stats() or {}
    peak = statistic.get("peak_bytes_in_use", compiled.memory_analysis().peak_memory_in_bytes)
    return seconds, compile_seconds, peak, loss


def peer_step(run, steps: int, backend: str) -> tuple[float, float, float, float]:
    """The same of transformers: a model of the same sizes with torch.compile and its Adafactor."""
    import torch
    import transformers

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = peer_model(run.model).to(device).train()
    optimize = transformers.Adafactor(
        net.parameters(), lr=1e-3, scale_parameter=True, relative_step=False, warmup_init=False
    )
    batch, ids = random_batch(run, texts=1), {}
    ids["labels"] = torch.from_numpy(np.array(batch.targets, np.int64)).to(device)
    source = batch.targets if run.model.encoder is None else batch.inputs
    ids["input_ids"] = torch.from_numpy(np.array(source, np.int64)).to(device)
    forward = torch.compile(net, backend=backend)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = forward(**ids, use_cache=False).loss
        loss.backward()
        optimize.step()
        optimize.zero_grad()
        return float(loss.detach())

    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    seconds, loss = step_seconds(step, steps)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return seconds, first - seconds, peak, loss


def peer_model(cfg: config.Model):
    """A T5 or Llama of transformers in the sizes of cfg."""
    import transformers

    stack = cfg.decoder
    if cfg.encoder is None:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=cfg.vocab,
                hidden_size=stack.embed,
                intermediate_size=stack.mlp,
                num_hidden_layers=stack.layers,
                num_attention_heads=stack.heads,
                num_key_value_heads=stack.key_heads,
                head_dim=stack.head_dim,
            )
        )
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=cfg.vocab,
            d_model=stack.embed,
            d_kv=stack.head_dim,
            d_ff=stack.mlp,
            num_layers=cfg.encoder.layers,
            num_decoder_layers=stack.layers,
            num_heads=stack.heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu" if stack.gated else "relu",
            decoder_start_token_id=0,
        )
    )


def measure_attention(case: Case, settings: dict, rehearse: bool) -> Iterator[Row]:
    """Yields the rows of attention.py for each shape of the case.

    Args:
      case: of the stage.
      settings: of `device_cases.attention_cases`.
      rehearse: nothing is repeated.
    """
    shapes = device_cases.attention_cases(settings)
    lengths = [shape.length for shape in shapes]
    options = argparse.Namespace(
        turns=2 if rehearse else 5, quick=rehearse, lengths=lengths, caches=lengths
    )
    frameworks = [name for name in FRAMEWORKS if name == "JAX" or not shapes[0].width]
    workers = {name: attention.Worker(name) for name in frameworks}
    try:
        yield from attention.opened(workers)
        for shape in shapes:
            yield from attention.measure(shape, workers, options)
    finally:
        for worker in workers.values():
            worker.close()


def measure_decoding(case: Case, settings: dict, rehearse: bool) -> Iterator[Row]:
    """Yields tokens per second, and seconds of a pass, of each drafter.

    Weights are drawn, so a drafter's blocks are hardly ever accepted: its passes count, and what
    it gains is their price times the tokens that a trained model accepts.

    Args:
      case: of the stage.
      settings: model, rows, inputs, tokens and drafters.
      rehearse: one turn.
    """
    from t5x_lite.evaluation.drafting import DrafterCache

    lengths = {"inputs": settings["inputs"], "targets": settings["tokens"]}
    bindings = settings.get("bindings", ())
    cfg = device_cases.run_of(settings["model"], lengths, settings["rows"], bindings=bindings).model
    sharding.use_mesh(config.Mesh(), jax.devices()[:1])
    params = decoding.prepare_params(cfg, model.initialize(cfg, jax.random.key(0)))
    draw = np.random.default_rng(0)
    rows = draw.integers(3, cfg.vocab, (settings["rows"], settings["inputs"])).tolist()
    drafters = DrafterCache(cfg, None)
    for text in settings["drafters"]:
        name, width = text.split(":")
        width = 0 if name == "plain" else int(width)
        tokens = settings["tokens"]
        decode = config.Decode(max_new_tokens=tokens, drafter=name, draft_length=width)
        request = decoding.make_request(cfg, rows, decode, eos=-1)
        begin = time.perf_counter()
        drafters.generate(params, request, decode)
        yield Row(case.key, "t5x_lite", f"compile seconds, {text}", time.perf_counter() - begin)
        seconds = []
        for _ in range(1 if rehearse else 5):
            begin = time.perf_counter()
            result = drafters.generate(params, request, decode)
            seconds.append(time.perf_counter() - begin)
        best = statistics.median(seconds)
        yield Row(case.key, "t5x_lite", f"tokens/s, {text}", len(rows) * tokens / best)
        yield Row(case.key, "t5x_lite", f"ms a pass, {text}", 1e3 * best / result.steps)


def measure_twins(case: Case, settings: dict, rehearse: bool) -> Iterator[Row]:
    """Yields the losses of twins of 30M parameters that learn docstrings of Python's library.

    Args:
      case: of the stage.
      settings: `steps` of each, `rows` of a batch, `bindings` of sizes.
      rehearse: without what the lent machine lacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "t5x_lite.compare"]
        command += [
            "--gin_file=configs/runs/compare_docstrings.gin",
            f"--gin.MODEL_DIR={folder}/run",
        ]
        command += [
            f"--gin.TRAIN_STEPS={settings['steps']}",
            f"--gin.BATCH_SIZE={settings['rows']}",
        ]
        command += [f"--gin.config.{binding}" for binding in settings["bindings"]]
        # The machine has neither tensorboardX nor rouge-score.
        command += ['--gin.config.Evaluate.metrics=("bleu", "chrf")']
        command += ["--gin.config.Train.tensorboard=False", "--gin.config.Compare.seeds=1"]
        command += ["--gin.config.Compare.drafters=()", "--gin.config.Compare.quantized=()"]
        command += ['--gin.config.Compare.twins=("encoder_decoder", "causal_decoder")']
        command += ["--gin.config.Compare.repeats=0"]
        environment = without_packages(Path(folder)) if rehearse else None
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        for path in sorted(Path(folder).rglob("metrics.jsonl")):
            last = json.loads(path.read_text().splitlines()[-1])
            name = path.parent.name
            for metric in sorted(key for key in last if "loss" in key):
                yield Row(case.key, name, metric, last[metric])


def without_packages(folder: Path) -> dict[str, str]:
    """An environment in which Python does not find what the lent machine lacks.

    Args:
      folder: where modules that fail to be imported are written.
    """
    from device_worker import LACKING

    for name in LACKING:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


MEASURES = {
    "training": measure_training,
    "attention": measure_attention,
    "decoding": measure_decoding,
    "twins": measure_twins,
}
