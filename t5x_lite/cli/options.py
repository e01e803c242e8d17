# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: the checkpoint, and how text is decoded."""

import argparse
from typing import Any

from t5x_lite import config
from t5x_lite.utils.paths import path_argument

DECODE = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "beams", "alpha", "n_best"),
    *("drafter", "draft_length", "accept"),
)

# Names of `decoding.drafters.registry`; A+B is both at once.
DRAFTERS = {
    "auto": "the model's draft heads, or lookup for long texts; plain if neither is safe or pays",
    "plain": "one token per forward pass",
    "blockwise": "a chain from the model's draft heads (Stern et al., 2018)",
    "refined": "the best chain through the likely tokens of those heads",
    "medusa": "a tree of the likely tokens of those heads",
    "lookup": "copies what followed the last tokens before: in the text, or the encoder's input",
    "recycling": "a tree of the model's runners-up; recycling:PATH starts with those of texts",
    "trigram": "what most often followed the last two tokens",
    "jacobi": "the last block's predictions, moved on by one",
    "lookahead": "n-grams of a window of Jacobi iterations",
    "early": "early:N, the model's first N layers",
    "late": "late:N, the model's layers from N on",
    "draft": "draft:PATH, a smaller checkpoint of the same vocabulary",
}
ACCEPTANCES = {
    "exact": "the text of plain decoding",
    "speculative": "another text of the same distribution, for drafters with probabilities",
    "block": "the same, verified a block at a time: more tokens are kept",
    "top-k": "top-k:N CHANGES THE TEXT: keeps a token among the N most probable",
    "distance": "distance:N CHANGES THE TEXT: keeps an id within N (ids that are quantities)",
    "typical": "typical[:0.3:0.09] CHANGES THE TEXT: keeps a probable token, by the entropy",
    "lenient": "lenient:0.5 CHANGES THE TEXT: keeps a token half as probable as the best",
    "minimum": "minimum:N CHANGES THE TEXT: keeps at least N tokens per forward pass",
    "always": "CHANGES THE TEXT: keeps every draft token",
}


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint and what selects and places its weights."""
    group = parser.add_argument_group("weights")
    add = group.add_argument
    add(
        "--checkpoint",
        type=path_argument,
        required=True,
        metavar="PATH",
        help="the MODEL_DIR of a training run, a Hugging Face folder or a .gguf file",
    )
    one = group.add_mutually_exclusive_group()
    step = "the checkpoint of this step (default: the newest)"
    one.add_argument("--step", type=int, metavar="N", help=step)
    best = "the best checkpoint by Checkpoint.metric of the run"
    one.add_argument("--best", action="store_true", help=best)
    add_mesh(group)
    add(
        "--quantize",
        metavar="KIND",
        help="quantized matrices of the layers: int8, int4; int8_activations, int4_activations and "
        "int4_int8_activations quantize activations too; int4:32 has a scale for each 32 numbers",
    )


def add_mesh(group) -> None:
    """Adds --mesh to a parser or to a group of its options."""
    group.add_argument(
        "--mesh",
        type=parse_mesh,
        metavar="D,F,T",
        help="devices for data, fsdp and tensor axes, e.g. 1,1,4 for a model too large for one "
        "device (default: all devices share the batch)",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of config.Decode, and --batch_size."""
    group = parser.add_argument_group("decoding (default: Decode of the run's config)")
    add = group.add_argument
    add("--max_new_tokens", type=int, metavar="N", help="the most new tokens of a text")
    add("--temperature", type=float, metavar="T", help="0 is greedy; 1 samples from the model")
    add("--top_k", type=int, metavar="K", help="sample among the K most probable tokens only")
    add("--top_p", type=float, metavar="P", help="sample among the fewest tokens of probability P")
    add("--seed", type=int, metavar="N", help="seed of sampling: the same text for the same line")
    add("--beams", type=int, metavar="N", help="beam search with N beams")
    add("--alpha", type=float, metavar="A", help="length penalty of beam search; 0 is none")
    add("--n_best", type=int, metavar="N", help="return the N best beams")
    add("--batch_size", type=int, metavar="N", help="how many texts are decoded at once")
    group = parser.add_argument_group(
        "speculative decoding: faster, with the same text",
        name_table("--drafter", DRAFTERS) + "\n" + name_table("--accept", ACCEPTANCES),
    )
    add = group.add_argument
    add("--drafter", metavar="NAME", help="auto (default), plain, lookup, early:4, lookup+trigram")
    add("--draft_length", type=int, metavar="N", help="tokens of a block; 0 is measured (default)")
    add("--accept", metavar="RULE", help="which draft tokens are kept (default: exact)")


def name_table(title: str, rows: dict[str, str]) -> str:
    """Names and what they do, as lines of --help."""
    return "\n".join([f"{title}:", *(f"  {name:<12}{text}" for name, text in rows.items())])


def parse_mesh(text: str) -> config.Mesh:
    """Mesh of three sizes "data,fsdp,tensor".

    Raises:
      argparse.ArgumentTypeError: the text is not three positive integers.
    """
    try:
        data, fsdp, tensor = map(int, text.split(","))
        return config.Mesh(data, fsdp, tensor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not three numbers data,fsdp,tensor ({error})"
        ) from error


def decode_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of config.Decode that the command line sets."""
    return {name: value for name in DECODE if (value := getattr(options, name)) is not None}


def configure_session(session: Any, options: argparse.Namespace) -> None:
    """Sets how an interactive.Session decodes, by the options of `add_decode`.

    Raises:
      ValueError: options contradict each other.
    """
    session.decode = session.settings(decode_fields(options))
    if options.batch_size:
        session.predictor.batch_size = options.batch_size
