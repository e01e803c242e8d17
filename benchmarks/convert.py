# SPDX-License-Identifier: Apache-2.0
"""Time and memory of converting a checkpoint, relative to copying it on the same disk.

A Llama of about 1 GB of drawn weights goes from Hugging Face to ours and back, each time in a
process of its own, in turns with a plain copy. All of them return when the bytes are on the disk.
The bits that come back are compared with those that went.

  python benchmarks/convert.py [--quick] [--json benchmarks/results/convert.json]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import report

CLONE = Path(__file__).resolve().parents[1]
PACKAGES = ["jax", "numpy", "tensorstore", "orbax-checkpoint"]
WIDTHS = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
# What is imported first is not measured: a conversion of many GB takes its few seconds once.
MEASURED = """
import sys, time
from t5x_lite import convert
from t5x_lite.checkpoints import opening, outputs, unfinished
begin, worked = time.perf_counter(), time.process_time()
{work}
print(time.perf_counter() - begin, time.process_time() - worked)
# Of this program alone: getrusage counts the parent's memory before it was replaced.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
CONVERT = MEASURED.format(work="convert.main(sys.argv[1:])")
COPY = MEASURED.format(
    work="""
import shutil
from pathlib import Path
with unfinished.unfinished_folder(sys.argv[2]) as folder:
    for file in Path(sys.argv[1]).iterdir():
        shutil.copyfile(file, folder / file.name)
"""
)


def checkpoint(folder: Path, layers: int, dtype: str) -> int:
    """Writes a Hugging Face folder of drawn weights in shards of 500 MB; gives its bytes."""
    from t5x_lite.checkpoints import matching, transfer, unfinished
    from t5x_lite.checkpoints.formats import safetensors_files
    from t5x_lite.checkpoints.formats.huggingface import llama

    said = {"model_type": "llama", "num_hidden_layers": layers} | WIDTHS | HEADS
    said |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    said |= {"max_position_embeddings": 2048, "rope_theta": 10000.0}
    cfg = llama.parse_config(said, ["lm_head.weight"])
    kind = next(each for each in safetensors_files.DTYPES.values() if each.name == dtype)

    class Drawn:
        leaves = matching.model_leaves(cfg)
        names = {path: (leaf.shape, kind) for path, leaf in leaves.items()}

        def read(self, path: str, layer: int | None = None) -> np.ndarray:
            shape = self.leaves[path].shape
            draw = np.random.default_rng(layer)
            wanted = shape if layer is None else shape[1:]
            return draw.standard_normal(wanted, np.float32).astype(kind)

    drawn = Drawn()
    tensors = transfer.group_by_tensor(drawn, cfg, llama.entries(cfg))
    names = transfer.describe_tensors(drawn, tensors, None)
    with unfinished.unfinished_folder(folder) as work:
        transfer.write_safetensors(drawn, tensors, work, names, 500_000_000, lambda done: None)
        (work / "config.json").write_text(json.dumps(said))
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(code: str, *arguments: str) -> tuple[float, float, int]:
    """Seconds that a process of its own took for the work, those on a core, and peak bytes."""
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(CLONE)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=settings, check=True, capture_output=True, text=True)
    seconds, worked, peak = done.stdout.split()[-3:]
    return float(seconds), float(worked), 1024 * int(peak)


def same(one: Path, other: Path) -> bool:
    """True if all shards of two folders have the same bytes."""
    shards = sorted(file.name for file in one.glob("*.safetensors"))
    return shards == sorted(file.name for file in other.glob("*.safetensors")) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in shards
    )


def measure(folder: Path, dtype: str, layers: int, rounds: int) -> list[report.Row]:
    origin, ours, back, copied = (folder / name for name in ("origin", "ours", "back", "copied"))
    size = checkpoint(origin, layers, dtype)
    weights = ["--vocabulary=none", "--shard_size=500MB"]
    ways = {
        "HF to ours": (CONVERT, f"--from={origin}", f"--to={ours}", *weights),
        "ours to HF": (
            CONVERT,
            f"--from={ours}",
            f"--to={back}",
            "--format=huggingface",
            *weights,
        ),
        "copy": (COPY, str(origin), str(copied)),
    }
    seen: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, command in ways.items():
            seen[way].append(timed(*command))
        if not same(origin, back):
            raise SystemExit("The bits that came back are not those that went")
        for made in (ours, back, copied):
            shutil.rmtree(made)
    shutil.rmtree(origin)
    rows = []
    for way, runs in seen.items():
        case = f"{way}, {dtype}, {size / 1e9:.2f} GB"
        system = "disk" if way == "copy" else "t5x_lite"
        measured = {
            "GB/s": [size / seconds / 1e9 for seconds, _, _ in runs],
            # Does not depend on what else the machine is doing.
            "core seconds per GB": [worked / size * 1e9 for _, worked, _ in runs],
            "peak GB": [peak / 1e9 for _, _, peak in runs],
        }
        for metric, values in measured.items():
            rows.append(report.Row(case, system, metric, round(statistics.median(values), 3)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the weights, one round")
    parser.add_argument("--folder", help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--json", help="also write the rows to this file")
    given = parser.parse_args()
    layers, rounds = (1, 1) if given.quick else (12, 3)
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for dtype, more in (("float32", layers), ("bfloat16", 2 * layers)):
            rows += measure(Path(folder), dtype, more, rounds)
    print(report.table(rows))
    if given.json:
        report.write(given.json, rows, PACKAGES)


if __name__ == "__main__":
    sys.path.insert(0, str(CLONE))
    main()
