# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.convert: converts a checkpoint from one format to another."""

import argparse
import contextlib
import dataclasses
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Count, CountOrZero, field_types
from t5x_lite.utils import bounded_files, hub_upload
from t5x_lite.utils.hub import source_identity
from t5x_lite.utils.hub_names import HubName, source_argument
from t5x_lite.utils.paths import cache_folder, parse_output_path, path_argument
from t5x_lite.utils.text_lines import escape_controls

EXAMPLES = """\
examples:
  # a Hugging Face model as a run folder for train, eval and infer
  python -m t5x_lite.convert --from=flan-t5-small --to=runs/flan_small
  # the plan: every tensor, where it goes, what does not match; nothing is written
  python -m t5x_lite.convert --from=flan-t5-small --to=runs/flan_small --dry_run
  # a trained run for transformers (and for what converts from it, such as CTranslate2)
  python -m t5x_lite.convert --from=runs/g2p --to=g2p_hf --format=huggingface
  # a .gguf file, weights rounded to bfloat16
  python -m t5x_lite.convert --from=smollm2.q8_0.gguf --to=runs/smollm2 --dtype=bfloat16
  # T5X checkpoints lack the vocabulary and part of the model's config
  python -m t5x_lite.convert --from=t5_1_1_small/checkpoint_1000000 --to=runs/t5_small \\
      --model=models/t5_1_1_small.gin --vocabulary=sentencepiece.model --extra_ids=100
  python -m t5x_lite.convert --from=runs/t5_small --to=t5x_small/checkpoint_0 --format=t5x
  # a trained run as a model of the hub
  python -m t5x_lite.convert --from=runs/g2p --to=owner/name --push --format=huggingface
  # LoRA adapters for peft, or merged into their base
  python -m t5x_lite.convert --from=runs/lora --to=lora_peft --format=peft
  python -m t5x_lite.convert --from=runs/lora --to=merged_hf --merge --format=huggingface
  # encoder, prefill and decoding step as programs with a script that needs jax alone
  python -m t5x_lite.convert --from=runs/g2p --to=g2p_stablehlo --format=stablehlo

A tensor that is missing, left over, misshapen, NaN or infinite is an error that names it;
--allow=PATTERN lets it pass: one left over is left out, one missing is initialized as for training.
Numbers are moved, not computed: without --dtype and quantized files, there and back gives the same
bits. One tensor is in memory at a time. The output appears under its name when it is whole; it
never replaces what is there. Only safetensors, GGUF and TensorStore are read.
"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "convert",
        description="Converts checkpoints: ours, Hugging Face's, T5X's; GGUF to any of them.",
        epilog=EXAMPLES,
    )
    add = command.add_argument
    add(
        "--from",
        dest="origin",
        type=source_argument,
        required=True,
        metavar="PATH",
        help="a run folder, a Hugging Face folder, a .gguf file, a T5X checkpoint, or a model of "
        "the hub: owner/name, owner/name@revision, owner/name:file.gguf",
    )
    add(
        "--to",
        type=path_argument,
        required=True,
        metavar="PATH",
        help="the folder to write; with --push, the model of the hub: owner/name[@branch]",
    )
    add("--push", action="store_true", help="upload to the hub, with a model card, as one commit")
    add("--private", action="store_true", help="a model that --push creates is private")
    add(
        "--format",
        choices=("ours", "huggingface", "t5x", "t5x_scanned", "stablehlo", "peft"),
        default="ours",
        help="what to write (default: ours, a run folder); t5x has tensors for each layer, "
        "t5x_scanned has them stacked, as scalable_t5 does; stablehlo has programs that need jax "
        "alone; peft has adapters alone",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast all weights (default: as they are)",
    )
    add("--merge", action="store_true", help="merge adapters (LoRA) into their base")
    add("--dry_run", action="store_true", help="print what would happen, write nothing")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help='names that may be missing, left over or not finite, such as "vision_tower.*"',
    )
    add_special(command.add_argument_group("for some formats"))
    return command


def add_special(group) -> None:
    """Adds the options of single formats to a group."""
    add = group.add_argument
    add(
        "--family",
        metavar="NAME",
        help="Hugging Face model_type to write (default: the one that fits)",
    )
    add(
        "--shard_size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="most bytes of a safetensors file, such as 500MB (default: 5GB)",
    )
    add(
        "--step",
        type=number_parser(CountOrZero),
        metavar="N",
        help="the checkpoint of this step (the newest)",
    )
    add(
        "--model",
        type=path_argument,
        metavar="FILE",
        help=".gin of the model of a T5X checkpoint (else by shapes)",
    )
    add(
        "--vocabulary",
        type=source_argument,
        metavar="PATH",
        help="if the origin has none: a SentencePiece .model, a tokenizer.json, a folder with "
        "one, bytes; or none, to convert the weights alone",
    )
    add(
        "--extra_ids",
        type=number_parser(field_types(config.Vocabulary)["extra_ids"]),
        default=0,
        metavar="N",
        help="sentinels on top of --vocabulary (T5's have 100)",
    )
    sizes = {
        "--batch_size": "rows of a call of stablehlo's programs (default: 8)",
        "--input_length": "most ids of an input, or of a decoder's prompt (default: 128)",
        "--row_length": "most ids of prompt and new text together (default: 256)",
    }
    for name, text in sizes.items():
        add(name, type=number_parser(Count), metavar="N", help=text)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "1000".

    Raises:
      argparse.ArgumentTypeError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * units[match[2].upper()])


def convert(args: argparse.Namespace) -> None:
    """Opens and matches everything before anything is written."""
    from t5x_lite.checkpoints import outputs, unfinished
    from t5x_lite.checkpoints.opening import ConversionOptions, open_checkpoint

    destination = None
    if args.private and not args.push:
        raise ValueError("--private is for a model that --push creates")
    if args.push:
        destination = hub_upload.parse_destination(args.to)
        to = Path(destination.repo.partition("/")[2])
        hub_upload.check_login(destination)
    else:
        to = parse_output_path(args.to)
    if not args.push and not args.dry_run:
        unfinished.check_output_folder(to)
    options = ConversionOptions(args.model, args.vocabulary, args.extra_ids)
    origin = open_checkpoint(args.origin, args.step, options=options)
    if origin.assumed:
        print(f"Assumed, as the files do not say: {origin.assumed}", file=sys.stderr)
    if args.format != "ours" and origin.model.draft_heads is not None:
        print(f"Left out: the draft heads; {args.format} has none", file=sys.stderr)
        origin = origin.without_heads()
    if args.format != "ours" and origin.model.shared_weights:
        origin = origin.with_separate_towers()
    contents = outputs.CheckpointContents(
        check_adapters(args, origin),
        origin.text,
        origin.step,
        origin.kept,
        origin=source_identity(args.origin),
        report=read_report(origin),
        base=base_digests(args, origin),
    )
    settings = outputs.OutputSettings(
        args.format, find_dtype(args.dtype), args.family, args.shard_size
    )
    output = make_output(args, contents, to, settings, origin)
    if args.dry_run:
        return dry_run(args, origin, output, settings)
    weights = select_weights(args, origin)
    print(f"Weights: {outputs.describe_dtypes(weights, settings.dtype)}", file=sys.stderr)
    if destination is None:
        outputs.write_output(output, weights, to)
    else:
        to = push(output, weights, destination, args.private)
    print(f"{origin.kind} to {args.format}: {to}", file=sys.stderr)


def check_adapters(args: argparse.Namespace, origin: Any) -> Any:
    """The config of the output: without adapters once they are merged.

    Raises:
      ValueError: the origin has adapters and the format has none, or the other way around.
    """
    if origin.adapters is None:
        if args.merge or args.format == "peft":
            flag = "--merge" if args.merge else "--format=peft"
            raise ValueError(f"{flag} is for a checkpoint of adapters; {args.origin} has none")
        return origin.run
    if args.merge and args.format == "peft":
        raise ValueError("--merge leaves no adapters for --format=peft: give one of them")
    if not args.merge and args.format not in ("ours", "peft"):
        raise ValueError(
            f"{args.origin} has adapters (LoRA), which --format={args.format} has not: add --merge "
            "for the whole model, or give --format=peft for the adapters alone"
        )
    return dataclasses.replace(origin.run, lora=None) if args.merge else origin.run


def base_digests(args: argparse.Namespace, origin: Any) -> Any:
    """Digests of the weights that a run folder of adapters belongs to; {} for any other output."""
    alone = origin.adapters is not None and not args.merge and args.format == "ours"
    return origin.adapters.base_digests() if alone and not args.dry_run else {}


def select_weights(args: argparse.Namespace, origin: Any, read: bool = True) -> Any:
    """The weights to write: the adapters alone, or whole ones with adapters merged in.

    Args:
      args: options of the command.
      origin: the opened checkpoint.
      read: values will be read too.
    """
    if origin.adapters is not None and not args.merge:
        return origin.adapters.arrays
    return origin.weights(args.allow, read)


def push(output: Any, weights: Any, destination: HubName, private: bool) -> str:
    """Writes a folder, uploads it and removes it; returns the address of the model.

    Args:
      output: the format.
      weights: the weights.
      destination: the model of the hub.
      private: a model that is created is private.
    """
    from t5x_lite.checkpoints import outputs

    with tempfile.TemporaryDirectory(prefix="push-", dir=cache_folder()) as work:
        folder = Path(work, "model")
        outputs.write_output(output, weights, folder, destination.repo)
        message = f"Upload by t5x_lite.convert --format={output.settings.format}"
        return hub_upload.upload_folder(folder, destination, private, message)


def read_report(origin: Any) -> dict[str, Any]:
    """The report at the end of a run's training; {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return bounded_files.read_json_object(origin.path / "report.json")
    return {}


def make_output(
    args: argparse.Namespace, contents: Any, to: Path, settings: Any, origin: Any
) -> Any:
    """The output that the command line describes.

    Args:
      args: options of the command.
      contents: the checkpoint to write.
      to: the folder.
      settings: format and dtype of the output.
      origin: the opened checkpoint.

    Raises:
      ValueError: the format cannot express the model, or options are of another format.
    """
    from t5x_lite.checkpoints import outputs, peft_output

    if args.format == "peft":
        return peft_output.PeftOutput(contents, settings, origin.adapters)

    options = {"batch": args.batch_size, "input_length": args.input_length}
    options |= {"row_length": args.row_length}
    options = {name: value for name, value in options.items() if value is not None}
    if args.format == "stablehlo":
        from t5x_lite.export.output import StableHloOutput
        from t5x_lite.export.programs import ExportShapes

        return StableHloOutput(contents, settings, ExportShapes(**options))
    if options:
        raise ValueError(
            "--batch_size, --input_length and --row_length are sizes of --format=stablehlo"
        )
    return outputs.make_output(contents, to, settings)


def find_dtype(name: str | None) -> Any:
    """The numpy dtype of that name; None for None."""
    from t5x_lite.checkpoints.formats import safetensors_files

    return next((each for each in safetensors_files.DTYPES.values() if each.name == name), None)


def dry_run(args: argparse.Namespace, origin: Any, output: Any, settings: Any) -> None:
    """Prints the tables of both sides.

    Args:
      args: options of the command.
      origin: the checkpoint to convert.
      output: where it goes.
      settings: format and dtype of the output.

    Raises:
      ValueError: a tensor does not match.
    """
    from t5x_lite.checkpoints import matching, outputs

    if origin.tensors is not None:
        plan = origin.tensors.plan(args.allow)
        print(f"{origin.kind} -> ours")
        print(escape_controls(matching.format_plan(plan, origin.tensors.source.names)))
        if plan.problems:
            raise ValueError(
                f"{args.origin}: {len(plan.problems)} tensors do not fit, marked with !"
            )
    weights = select_weights(args, origin, read=False)
    table = output.table(weights)
    if table:
        print(f"\nours -> {args.format}\n{table}")
    total = matching.count_parameters(weights.leaves)
    print(f"\n{total:,} parameters, {output.size(weights) / 1e9:,.3f} GB")
    print(f"Weights: {outputs.describe_dtypes(weights, settings.dtype)}. Nothing was written.")


COMMAND = Command(
    "convert", parser, convert, afterwards="nothing was written", rewrites_weights=True
)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
