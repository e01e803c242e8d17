# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.convert: a checkpoint of one make as that of another."""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

from t5x_lite.evaluation import options

EXAMPLES = """\
examples:
  # a model of Hugging Face as a run folder that train, eval and infer take
  python -m t5x_lite.convert --from=flan-t5-small --to=runs/flan_small
  # what would happen: every tensor, where it goes, what does not fit; nothing is written
  python -m t5x_lite.convert --from=flan-t5-small --to=runs/flan_small --dry_run
  # a trained run for transformers (and for what converts from it, such as CTranslate2)
  python -m t5x_lite.convert --from=runs/g2p --to=g2p_hf --format=huggingface
  # a .gguf file, weights rounded to bfloat16
  python -m t5x_lite.convert --from=smollm2.q8_0.gguf --to=runs/smollm2 --dtype=bfloat16
  # T5X checkpoints do not say what their vocabulary is, nor all of their model
  python -m t5x_lite.convert --from=t5_1_1_small/checkpoint_1000000 --to=runs/t5_small \\
      --model=models/t5_1_1_small.gin --vocabulary=sentencepiece.model --extra_ids=100
  python -m t5x_lite.convert --from=runs/t5_small --to=t5x_small/checkpoint_0 --format=t5x

A tensor that is missing, left over, misshapen, NaN or infinite is an error that names it;
--allow=PATTERN lets it pass: left over is left out, missing is new as for training.
Numbers are moved, not computed: without --dtype and quantised files, there and back gives the same
bits. One tensor lies in memory at a time. The output appears when it is whole, under its name; what
is there already is never written over. Only safetensors, GGUF and TensorStore are read.
"""


def parser() -> options.Parser:
    made = options.Parser(
        prog="python -m t5x_lite.convert",
        description="Converts checkpoints: ours, Hugging Face's, T5X's; GGUF to any of them.",
        epilog=EXAMPLES,
    )
    add = made.add_argument
    add(
        "--from",
        dest="origin",
        required=True,
        metavar="PATH",
        help="a run folder, a Hugging Face folder, a .gguf file or a T5X checkpoint",
    )
    add("--to", required=True, metavar="PATH", help="the folder to make")
    add(
        "--format",
        choices=("ours", "huggingface", "t5x", "t5x_scanned"),
        default="ours",
        help="what to write (default: ours, a run folder); t5x has tensors for each layer, "
        "t5x_scanned has them stacked, as scalable_t5 does",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast all weights (default: as they are)",
    )
    add("--dry_run", action="store_true", help="print what would happen, write nothing")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help='names that may be missing, left over or not finite, such as "vision_tower.*"',
    )
    add_special(made.add_argument_group("for some formats"))
    return made


def add_special(group) -> None:
    add = group.add_argument
    add("--family", metavar="NAME", help="Hugging Face model_type to write (default: which fits)")
    add(
        "--shard_size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="most bytes of a safetensors file, such as 500MB (default: 5GB)",
    )
    add("--step", type=int, metavar="N", help="which checkpoint of a run folder (the newest)")
    add("--model", metavar="FILE", help=".gin of the model of a T5X checkpoint (else by shapes)")
    add(
        "--vocabulary",
        metavar="PATH",
        help="where the origin has none: a SentencePiece .model, a tokenizer.json, a folder with "
        "one, bytes; or none, to convert the weights alone",
    )
    add(
        "--extra_ids",
        type=int,
        default=0,
        metavar="N",
        help="sentinels on top of --vocabulary (T5's have 100)",
    )


def size(text: str) -> int:
    """The bytes that "5GB", "500MB" or "1000" are."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(float(found[1]) * units[found[2].upper()])


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse(arguments)
    # No weight goes to a device: what trains on this machine keeps its accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # So that what was begun is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        convert(given)
    except KeyboardInterrupt:
        options.stop("t5x_lite.convert", "stopped; nothing was written", status=130)
    except (ValueError, OSError) as error:
        options.stop("t5x_lite.convert", error)


def convert(given: argparse.Namespace) -> None:
    """Opens and matches everything before anything is written."""
    from t5x_lite.conversion import origins, outputs, unfinished

    to = Path(given.to).expanduser()
    if not given.dry_run:
        unfinished.check(to)
    asked = origins.Asked(given.model, given.vocabulary, given.extra_ids, given.step)
    origin = origins.open(given.origin, asked)
    if origin.assumed:
        print(f"Assumed, as the files do not say: {origin.assumed}", file=sys.stderr)
    if given.format != "ours" and origin.model.blockwise is not None:
        print(
            f"Left out: the heads that guess later tokens; {given.format} has none", file=sys.stderr
        )
        origin = origin.without_heads()
    settings = outputs.Settings(given.format, dtype(given.dtype), given.family, given.shard_size)
    output = outputs.make(origin, to, settings)
    if given.dry_run:
        return dry_run(given, origin, output, settings)
    weights = origin.weights(given.allow)
    print(f"Weights: {outputs.told_dtypes(weights, settings.dtype)}", file=sys.stderr)
    outputs.write(output, weights, to)
    print(f"{origin.kind} to {given.format}: {to}", file=sys.stderr)


def dtype(name: str | None):
    """The numpy dtype of that name."""
    from t5x_lite.conversion import sources

    return None if name is None else next(d for d in sources.DTYPES.values() if d.name == name)


def dry_run(given: argparse.Namespace, origin, output, settings) -> None:
    """Prints the tables of both sides; ends with status 2 where something does not fit."""
    from t5x_lite.conversion import matching, outputs

    if origin.tensors is not None:
        plan = origin.tensors.plan(given.allow)
        print(f"{origin.kind} -> ours")
        print(matching.table(plan, origin.tensors.source.names))
        if plan.problems:
            options.stop("t5x_lite.convert", f"{len(plan.problems)} problems, marked with !")
    weights = origin.weights(given.allow)
    table = output.table(weights)
    if table:
        print(f"\nours -> {given.format}\n{table}")
    total = matching.count(weights.leaves)
    print(f"\n{total:,} parameters, {output.size(weights) / 1e9:,.3f} GB")
    print(f"Weights: {outputs.told_dtypes(weights, settings.dtype)}. Nothing was written.")


if __name__ == "__main__":
    main()
