# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.adapt: a pretrained model in another arrangement of its towers."""

import argparse
import os
import signal
import sys
from pathlib import Path

from t5x_lite.evaluation import options

EXAMPLES = """\
examples:
  # a decoder-only model as an encoder-decoder, with sentinels and UL2's modes
  python -m t5x_lite.adapt --source=smollm2.gguf --output=runs/smollm2_pair --cross_scale=0.1 \\
      --sentinels=100 --names="[NLU],[NLG],[S2S]"
  # what would happen: the model, where every weight comes from; nothing is written
  python -m t5x_lite.adapt --source=smollm2.gguf --output=runs/smollm2_pair --dry_run
  # a large encoder and a small decoder: there is nothing to copy cross-attention from
  python -m t5x_lite.adapt --encoder_source=gemma-2-9b --source=gemma-2-2b --cross=random \\
      --output=runs/gemma_9b_2b
  # without layers of cross-attention: one softmax over inputs and past (T5Gemma 2)
  python -m t5x_lite.adapt --source=gemma-3-270m --cross=merged --eoi=256000 --output=runs/merged
  # back again, and an encoder alone
  python -m t5x_lite.adapt --source=runs/smollm2_pair --to=decoder_only --output=runs/back
  python -m t5x_lite.adapt --source=smollm2.gguf --to=encoder_only --sentinels=100 \\
      --output=runs/encoder

The output is a run folder: eval, infer and convert take it, and training begins with it
(--gin.INITIAL_CHECKPOINT=runs/smollm2_pair, and Vocabulary.kind = "checkpoint" for the data). A run
can also adapt by itself, with config.Run.adaptation: see configs/runs/adapt_ul2.gin.

Encoder and decoder are copies; the encoder reads in both directions. Old ids keep their rows, new
ones are added above them. An adapted model has to be trained before it writes sense.
"""


def parser() -> options.Parser:
    made = options.Parser(
        prog="python -m t5x_lite.adapt",
        description="Makes an encoder-decoder of a decoder-only checkpoint, or the reverse.",
        epilog=EXAMPLES,
    )
    add = made.add_argument
    kinds = "a run folder, a Hugging Face folder or a .gguf file"
    add("--source", required=True, metavar="PATH", help=f"where the decoder comes from: {kinds}")
    add("--output", required=True, metavar="PATH", help="the run folder to make")
    add(
        "--to",
        choices=("encoder_decoder", "decoder_only", "encoder_only"),
        default="encoder_decoder",
        help="what to make (default: encoder_decoder)",
    )
    add("--encoder_source", metavar="PATH", help="where the encoder comes from (--source)")
    add(
        "--cross",
        choices=("copy", "random", "merged"),
        default="copy",
        help="cross-attention copied from the decoder's self-attention (the default), drawn anew, "
        "or merged with it into one softmax",
    )
    add(
        "--cross_scale",
        type=float,
        default=1.0,
        metavar="S",
        help="what cross-attention says at the start, times S: small or 0 for models without norms "
        "after the sublayers, such as Llama's",
    )
    add("--dry_run", action="store_true", help="print what would happen, write nothing")
    add("--seed", type=int, default=0, metavar="N", help="what new weights are drawn by (0)")
    add_vocabulary(made.add_argument_group("vocabulary and embeddings"))
    return made


def add_vocabulary(group) -> None:
    add = group.add_argument
    add("--sentinels", type=int, default=0, metavar="N", help="sentinels to add (T5 has 100)")
    add(
        "--names",
        default="",
        metavar="A,B",
        help='texts that become one id each, such as "[NLU],[NLG],[S2S]"',
    )
    add(
        "--rows",
        choices=("mean", "random"),
        default="mean",
        help="embeddings of new ids: the mean of the old ones with a tenth of their spread as "
        "noise (the default), or drawn as for pretraining",
    )
    add(
        "--separate_embeddings",
        action="store_true",
        help="an embedding for each tower (T5Gemma), as unequal widths have anyway",
    )
    add(
        "--vocabulary",
        metavar="PATH",
        help="where the source has none: a SentencePiece .model, a tokenizer.json, a folder with "
        "one, bytes; or none, to adapt the weights alone",
    )
    add("--eoi", type=int, metavar="ID", help="the id with a row that is not scaled (T5Gemma 2)")


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse(arguments)
    # No weight goes to a device: what trains on this machine keeps its accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # So that what was begun is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        adapt(given)
    except KeyboardInterrupt:
        options.stop("t5x_lite.adapt", "stopped; nothing was written", status=130)
    except (ValueError, OSError) as error:
        options.stop("t5x_lite.adapt", error)


def adapt(given: argparse.Namespace) -> None:
    """Opens and plans everything before anything is written."""
    from t5x_lite.adaptation import beginning, making, report
    from t5x_lite.conversion import outputs, unfinished

    to = Path(given.output).expanduser()
    if not given.dry_run:
        unfinished.check(to)
    how, way, growth = asked(given)
    made = making.opened(how, way, growth, given.seed)
    plan = beginning.planned(made.run, made.sources)
    table = report.of(plan, how).text()
    print(table, file=sys.stdout if given.dry_run else sys.stderr)
    if given.dry_run:
        print(f"\n{told(made)}\nNothing was written.")
        return
    weights = made.weights(plan)
    outputs.write(outputs.RunFolder(made.origin(), to, outputs.Settings("ours")), weights, to)
    print(f"{told(made)}\n{to}", file=sys.stderr)


def asked(given: argparse.Namespace) -> tuple:
    """The options as Adaptation, Way and Growth."""
    from t5x_lite import config
    from t5x_lite.adaptation.derived import Way
    from t5x_lite.adaptation.making import Growth

    merged = given.cross == "merged"
    how = config.Adaptation(
        source=given.source,
        encoder_source=given.encoder_source,
        cross="copy" if merged else given.cross,
        cross_scale=given.cross_scale,
        rows=given.rows,
    )
    way = Way(given.to, merged, given.separate_embeddings, given.eoi)
    names = tuple(name.strip() for name in given.names.split(",") if name.strip())
    return how, way, Growth(names, given.sentinels, given.vocabulary)


def told(made) -> str:
    """The model and its vocabulary in one line each."""
    model, lines = made.run.model, []
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        if stack is not None:
            lines.append(f"{name}: {stack.layers} layers of width {stack.embed}")
    vocabulary = "none" if made.text is None else f"{made.text.pair[1].size:,} ids"
    lines.append(f"vocabulary: {vocabulary}; Model.vocab = {model.vocab}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
