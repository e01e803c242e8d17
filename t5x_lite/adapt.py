# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.adapt: makes an encoder-decoder of a pretrained decoder, or the reverse."""

import argparse
import sys
from typing import Any

from t5x_lite import config
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.config.checked import Count, CountOrZero, Seed, Share
from t5x_lite.utils.hub_names import source_argument
from t5x_lite.utils.paths import parse_output_path, path_argument

EXAMPLES = """\
examples:
  # a decoder-only model as an encoder-decoder, with sentinels and UL2's modes
  python -m t5x_lite.adapt --source=smollm2.gguf --output=runs/smollm2_pair --cross_scale=0.1 \\
      --sentinels=100 --names="[NLU],[NLG],[S2S]"
  # the plan: the model, and the source of every weight; nothing is written
  python -m t5x_lite.adapt --source=smollm2.gguf --output=runs/smollm2_pair --dry_run
  # a large encoder and a small decoder: there is nothing to copy cross-attention from
  python -m t5x_lite.adapt --encoder_source=gemma-2-9b --source=gemma-2-2b --cross=random \\
      --output=runs/gemma_9b_2b
  # without layers of cross-attention: one softmax over inputs and past (T5Gemma 2)
  python -m t5x_lite.adapt --source=gemma-3-270m --cross=merged --eoi=256000 --output=runs/merged
  # a pretrained encoder and a new decoder of two layers
  python -m t5x_lite.adapt --source=flan-t5-small --new_decoder=2 --output=runs/shallow
  # back to a decoder, and an encoder alone
  python -m t5x_lite.adapt --source=runs/smollm2_pair --to=decoder_only --output=runs/back
  python -m t5x_lite.adapt --source=smollm2.gguf --to=encoder_only --sentinels=100 \\
      --output=runs/encoder

The output is a run folder for eval, infer and convert; training starts from it
(--gin.INITIAL_CHECKPOINT_PATH=runs/smollm2_pair, and Vocabulary.kind = "checkpoint" for the data).
A run can also adapt by itself, with config.Run.adaptation: see configs/runs/adapt_ul2.gin.

Encoder and decoder are copies; the encoder reads in both directions. Old ids keep their rows, new
ones are added above them. An adapted model needs training before its texts make sense.
"""


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "adapt",
        description="Makes an encoder-decoder of a decoder-only checkpoint, or the reverse.",
        epilog=EXAMPLES,
    )
    add = command.add_argument
    kinds = "a run folder, a Hugging Face folder, a .gguf file or a model of the hub, owner/name"
    add(
        "--source",
        type=source_argument,
        required=True,
        metavar="PATH",
        help=f"where the decoder comes from: {kinds}",
    )
    written = "the run folder to write"
    add("--output", type=path_argument, required=True, metavar="PATH", help=written)
    add(
        "--to",
        choices=("encoder_decoder", "decoder_only", "encoder_only"),
        default="encoder_decoder",
        help="architecture of the output (default: encoder_decoder)",
    )
    encoder = "where the encoder comes from (--source)"
    add("--encoder_source", type=source_argument, metavar="PATH", help=encoder)
    drawn = "draw the decoder anew, with so many layers, beside the encoder of --source"
    add("--new_decoder", type=number_parser(Count), metavar="LAYERS", help=drawn)
    add(
        "--cross",
        choices=("copy", "random", "merged"),
        default="copy",
        help="cross-attention copied from the decoder's self-attention (the default), drawn anew, "
        "or merged with it into one softmax",
    )
    add(
        "--cross_scale",
        type=number_parser(Share),
        default=1.0,
        metavar="S",
        help="scale of cross-attention's output at the start: small or 0 for models without norms "
        "after the sublayers, such as Llama's",
    )
    add("--dry_run", action="store_true", help="print what would happen, write nothing")
    add("--seed", type=number_parser(Seed), default=0, metavar="N", help="seed of new weights (0)")
    add_vocabulary(command.add_argument_group("vocabulary and embeddings"))
    return command


def add_vocabulary(group) -> None:
    """Adds the options of vocabulary and embeddings to a group."""
    add = group.add_argument
    add(
        "--sentinels",
        type=number_parser(CountOrZero),
        default=0,
        metavar="N",
        help="sentinels to add (T5 has 100)",
    )
    add(
        "--names",
        default="",
        metavar="A,B",
        help='texts of one id each, such as "[NLU],[NLG],[S2S]"',
    )
    add(
        "--rows",
        choices=("mean", "random"),
        default="mean",
        help="embeddings of new ids: the mean of the old ones with a tenth of their spread as "
        "noise (the default), or initialized as for pretraining",
    )
    add(
        "--separate_embeddings",
        action="store_true",
        help="an embedding for each tower (T5Gemma); towers of unequal width always have their own",
    )
    add(
        "--vocabulary",
        type=source_argument,
        metavar="PATH",
        help="if the source has none: a SentencePiece .model, a tokenizer.json, a folder with "
        "one, bytes; or none, to adapt the weights alone",
    )
    add(
        "--eoi",
        type=number_parser(CountOrZero),
        metavar="ID",
        help="the id with a row that is not scaled (T5Gemma 2)",
    )


def adapt(args: argparse.Namespace) -> None:
    """Opens and plans everything before anything is written."""
    from t5x_lite.adaptation import adapt_checkpoint, initial_weights, report
    from t5x_lite.checkpoints import outputs, unfinished

    to = parse_output_path(args.output)
    if not args.dry_run:
        unfinished.check_output_folder(to)
    adaptation = adaptation_config(args)
    adapted = adapt_checkpoint.plan_adapted_model(
        adaptation, arrangement(args), vocabulary_extension(args), args.seed
    )
    plan = initial_weights.plan_weights(adapted.run, adapted.sources)
    table = report.make_report(plan, adaptation).text()
    print(table, file=sys.stdout if args.dry_run else sys.stderr)
    if args.dry_run:
        print(f"\n{summary(adapted)}\nNothing was written.")
        return
    folder = outputs.RunFolderOutput(adapted.contents(), to, outputs.OutputSettings("ours"))
    outputs.write_output(folder, adapted.weights(plan), to)
    print(f"{summary(adapted)}\n{to}", file=sys.stderr)


def adaptation_config(args: argparse.Namespace) -> config.Adaptation:
    """The config of an adaptation with these options."""
    return config.Adaptation(
        source=args.source,
        encoder_source=args.encoder_source,
        decoder_from="decoder" if args.new_decoder is None else None,
        cross="copy" if args.cross == "merged" else args.cross,
        cross_scale=args.cross_scale,
        rows=args.rows,
    )


def arrangement(args: argparse.Namespace) -> Any:
    """The architecture to derive, as a derive_config.Arrangement."""
    from t5x_lite.adaptation.derive_config import Arrangement

    return Arrangement(
        args.to, args.cross == "merged", args.separate_embeddings, args.eoi, args.new_decoder
    )


def vocabulary_extension(args: argparse.Namespace) -> Any:
    """Additions to the vocabulary, as an adapt_checkpoint.VocabularyExtension."""
    from t5x_lite.adaptation.adapt_checkpoint import VocabularyExtension

    names = tuple(name.strip() for name in args.names.split(",") if name.strip())
    return VocabularyExtension(names, args.sentinels, args.vocabulary)


def summary(adapted: Any) -> str:
    """The towers and the vocabulary of an adapted model, a line each."""
    model, lines = adapted.run.model, []
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        if stack is not None:
            lines.append(f"{name}: {stack.layers} layers of width {stack.embed}")
    vocabulary = "none" if adapted.text is None else f"{adapted.text.vocabularies[1].size:,} ids"
    lines.append(f"vocabulary: {vocabulary}; Model.vocab = {model.vocab}")
    return "\n".join(lines)


COMMAND = Command("adapt", parser, adapt, afterwards="nothing was written", rewrites_weights=True)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
