# SPDX-License-Identifier: Apache-2.0
"""Options that the commands eval and infer share. Imports nothing heavy, so --help is quick."""

import argparse
import difflib
import sys
from typing import Any, NoReturn

from t5x_lite import config

DECODE = (
    *("length", "temperature", "top_k", "top_p", "seed", "beams", "alpha", "n_best"),
    *("decoder", "width", "accept"),
)

# What `decoding.choosing` makes of a name; A+B is both at once.
DECODERS = {
    "auto": "the model's own heads, or lookup for long texts; plain where neither is safe or pays",
    "plain": "one token per forward pass",
    "blockwise": "the model's own heads guess what follows (Stern et al., 2018)",
    "refined": "the best chain through what those heads find likely",
    "medusa": "a tree of what those heads find likely",
    "lookup": "copies what followed the last tokens before: in the text, or the encoder's input",
    "recycling": "a tree of the model's own runners-up; recycling:PATH begins with those of texts",
    "trigram": "what most often followed the last two tokens",
    "jacobi": "the last block's own answers, one further",
    "lookahead": "n-grams of a window of Jacobi iterations",
    "early": "early:N, the model's own first N layers",
    "late": "late:N, the model's own layers from N on",
    "draft": "draft:PATH, a smaller checkpoint of the same vocabulary",
}
ACCEPTANCES = {
    "exact": "the text of plain decoding",
    "speculative": "another text of the same law, for drafters with probabilities",
    "block": "the same, judged a block at a time: more guesses hold",
    "top-k": "top-k:N CHANGES THE TEXT: a guess among the N most probable holds",
    "distance": "distance:N CHANGES THE TEXT: a guess within N ids holds (ids that are quantities)",
    "typical": "typical[:0.3:0.09] CHANGES THE TEXT: so does a probable one, by the entropy",
    "lenient": "lenient:0.5 CHANGES THE TEXT: so does one half as probable",
    "minimum": "minimum:N CHANGES THE TEXT: N tokens per call at least",
    "always": "CHANGES THE TEXT: every guess holds",
}


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps its examples as written, and that tells near names."""

    def __init__(self, **given: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **given
        )

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
            self.error(f"unknown option {unknown[0]}{hint}")
        return found


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which weights")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="the MODEL_DIR of a training run, a Hugging Face folder or a .gguf file",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)"
    )
    which.add_argument(
        "--best", action="store_true", help="the best checkpoint by Checkpoint.metric of the run"
    )
    group.add_argument(
        "--mesh",
        type=mesh,
        metavar="D,F,T",
        help="devices for data, fsdp and tensor axes, e.g. 1,1,4 for a model too large for one "
        "device (default: all devices share the batch)",
    )
    group.add_argument(
        "--quantize",
        metavar="KIND",
        help="layers' matrices in few bits: int8, int4; int8_activations, int4_activations and "
        "int4_int8_activations round activations too; int4:32 has a scale for each 32 numbers",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how text is written (default: as the run's Decode says)")
    add = group.add_argument
    add("--length", type=int, metavar="N", help="the most new tokens of a text")
    add("--temperature", type=float, metavar="T", help="0 is greedy; 1 draws as the model thinks")
    add("--top_k", type=int, metavar="K", help="draw among the K most probable tokens only")
    add("--top_p", type=float, metavar="P", help="draw among the fewest tokens of probability P")
    add("--seed", type=int, metavar="N", help="the same seed draws the same text for a line")
    add("--beams", type=int, metavar="N", help="beam search with N beams")
    add("--alpha", type=float, metavar="A", help="length penalty of beam search; 0 is none")
    add("--n_best", type=int, metavar="N", help="hand back the N best beams")
    add("--batch_size", type=int, metavar="N", help="how many texts are written at once")
    group = parser.add_argument_group(
        "who guesses ahead: speed, the text stays the same",
        table("--decoder", DECODERS) + "\n" + table("--accept", ACCEPTANCES),
    )
    add = group.add_argument
    add("--decoder", metavar="NAME", help="auto (default), plain, lookup, early:4, lookup+trigram")
    add("--width", type=int, metavar="N", help="tokens of a block; 0 is measured (default)")
    add("--accept", metavar="RULE", help="which guesses hold (default: exact)")


def table(title: str, rows: dict[str, str]) -> str:
    """Names and what they do, for --help."""
    return "\n".join([f"{title}:", *(f"  {name:<12}{text}" for name, text in rows.items())])


def split_gin(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without --gin.NAME=VALUE, and the "NAME=VALUE" of those.

    Raises:
      ValueError: one has no value.
    """
    bindings = [word.removeprefix("--gin.") for word in arguments if word.startswith("--gin.")]
    for binding in bindings:
        if "=" not in binding:
            raise ValueError(f"--gin.{binding} needs a value: --gin.{binding}=VALUE")
    return [word for word in arguments if not word.startswith("--gin.")], bindings


def mesh(text: str) -> config.Mesh:
    """The mesh that "data,fsdp,tensor" names."""
    try:
        data, fsdp, tensor = map(int, text.split(","))
        return config.Mesh(data, fsdp, tensor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not three numbers data,fsdp,tensor ({error})"
        ) from error


def chosen(given: argparse.Namespace) -> dict[str, Any]:
    """The Decode fields that were named."""
    return {name: value for name in DECODE if (value := getattr(given, name)) is not None}


def stop(command: str, error: Exception | str, status: int = 2) -> NoReturn:
    """Ends the process with one message and no traceback: the mistake is the user's."""
    print(f"{command}: error: {error}", file=sys.stderr)
    raise SystemExit(status)
