# SPDX-License-Identifier: Apache-2.0
"""Config of decoders that fill masked blocks, and of the policies by which they keep tokens."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from t5x_lite.config.checked import Checked, CountOrZero, Length, Share, require

# Policies of Decode.commit, with the form of each.
POLICIES = {
    "top": "top:M",
    "threshold": "threshold:P",
    "neighbors": "neighbors:P:Q:W",
    "random": "random:M",
    "order": "order:M",
}
USUAL_POLICY = "threshold:0.9"
# Type, range in words and greatest value of the numbers of policies; all are above 0.
NUMBERS = {
    "M": (int, "1..65,536", 2**16),
    "P": (float, "(0, 1]", 1),
    "Q": (float, "(0, 1]", 1),
    "W": (int, "1..65,536", 2**16),
}
# Fields of Decode that are for such a decoder alone, and those that it follows besides.
CANVAS_FIELDS = ("commit", "canvas_block")
HONORED = {
    *CANVAS_FIELDS,
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "dynatemp_range", "dynatemp_exponent", "seed", "n_best", "choose", "compute"),
    "kv_cache",
    *("suppress_tokens", "logit_bias"),
}


@dataclass(frozen=True)
class Canvas(Checked):
    """A decoder that fills blocks of masked tokens: masked and block diffusion (MDLM, Sahoo et al.,
    2024; BD3-LM, Arriola et al., 2025), and in one pass a non-autoregressive decoder.

    The tokens of a block attend to one another and to the blocks before it. As in any decoder here,
    the state at a token predicts the next one, so that a block of 1 is an autoregressive decoder.
    In training a random number of the tokens of each block is masked.

    Attributes:
      block: tokens of a block. One as long as Data.lengths["targets"] holds the whole text. Targets
        are filled up with ends to a multiple of it.
      mask_token_id: id that stands for a token not written yet, which no text has; None takes the
        last id of Model.vocab, which is free where that is rounded up.
      rates: least and greatest share of a block that is masked in training; at least one token is.
        (0, 1) trains the bound of the likelihood, (1, 1) a decoder of one pass.
      drawn_blocks: sizes of blocks, of which training draws one for each text; () is `block` alone.
    """

    block: Length
    mask_token_id: CountOrZero | None = None
    rates: tuple[Share, ...] = (0.0, 1.0)
    drawn_blocks: tuple[Length, ...] = ()

    def check(self):
        require(
            len(self.rates) == 2 and self.rates[0] <= self.rates[1],
            f"Canvas.rates are two shares, least and greatest; got {self.rates}",
        )
        odd = [size for size in self.drawn_blocks if self.block % size]
        require(
            not odd,
            f"Canvas.drawn_blocks has {odd[:1]}, which does not divide Canvas.block {self.block}: "
            "targets are filled up to a multiple of Canvas.block",
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the blocks that training draws from."""
        return self.drawn_blocks or (self.block,)

    def doubles_rows(self, length: int) -> bool:
        """True if rows of so many targets are read a second time, clean: they have several blocks.

        Blocks of one token have no mask among their inputs: both copies would be the same.
        """
        return self.block > 1 and min(self.blocks) < length


class CommitPolicy(NamedTuple):
    """Policy by which a decoder keeps tokens after a pass over a block.

    Attributes:
      kind: top: the M most probable choices; threshold: those at least P probable, and the most
        probable one; neighbors: besides, those at least Q probable up to W places from one that is
        P probable; random: M at random places; order: the M leftmost.
      count: M; 1 where a probability decides.
      least: P; 1 where none decides.
      near: Q; 1 without neighbors.
      reach: W; 0 without neighbors.
    """

    kind: str
    count: int = 1
    least: float = 1.0
    near: float = 1.0
    reach: int = 0


def parse_commit(name: str) -> CommitPolicy:
    """Returns the policy of Decode.commit.

    Raises:
      ValueError: there is no such policy, or its numbers are none.
    """
    kind, _, written = (name or USUAL_POLICY).partition(":")
    forms = ", ".join(POLICIES.values())
    require(kind in POLICIES, f"Decode.commit {name!r} is not one of {forms}")
    _, *letters = POLICIES[kind].split(":")
    numbers = written.split(":")
    ranges = ", ".join(f"{each} in {NUMBERS[each][1]}" for each in letters)
    valid = len(numbers) == len(letters) and all(map(is_number_of, letters, numbers))
    require(valid, f"Decode.commit {name!r}: write it as {POLICIES[kind]}, {ranges}")
    values = dict(zip(letters, numbers, strict=True))
    return CommitPolicy(
        kind,
        count=int(values.get("M", 1)),
        least=float(values.get("P", 1)),
        near=float(values.get("Q", 1)),
        reach=int(values.get("W", 0)),
    )


def is_number_of(letter: str, text: str) -> bool:
    """True if a text is a number of the range of a letter of POLICIES."""
    kind, _, most = NUMBERS[letter]
    try:
        return 0 < kind(text) <= most
    except ValueError:
        return False


def check_canvas(model: Any) -> None:
    """Raises ValueError for fields of a config.Model that do not go with its canvas."""
    canvas, decoder = model.canvas, model.decoder
    if canvas is None:
        return
    require(decoder is not None, "Model.canvas is for a decoder: an encoder alone writes no text")
    bound = {
        "Model.draft_heads": model.draft_heads is not None,
        "Model.readout": model.readout is not None,
        "Model.prefix_lm": model.prefix_lm,
        "Stack.causal": decoder.causal is not None,
        "Stack.random_positions": decoder.random_positions is not None,
    }
    names = [name for name, value in bound.items() if value]
    require(not names, f"Model.canvas goes with no {names and names[0]}: leave one of them out")
    require(
        canvas.mask_token_id is None or canvas.mask_token_id < model.vocab,
        f"Canvas.mask_token_id must be below Model.vocab {model.vocab}",
    )
    # Places of a first block of masks alone could not be told apart by relative positions.
    require(
        model.mask_token_id != model.decoder_start_token_id,
        f"Canvas.mask_token_id {model.mask_token_id} is Model.decoder_start_token_id: bind another",
    )


def check_canvas_run(run: Any) -> None:
    """Raises ValueError for fields of a config.Run that are not for masked blocks."""
    if run.model.canvas is None or run.model.canvas.block == 1:
        return
    bound = {
        "Train.layer_skip": run.train is not None and run.train.layer_skip is not None,
        "Run.distillation": run.distillation is not None,
        "Run.preferences": run.preferences is not None,
        "Run.grpo": run.grpo is not None,
        "Mesh.context": run.mesh.context > 1,
    }
    names = [name for name, value in bound.items() if value]
    require(
        not names,
        f"Model.canvas trains masked blocks, which {names and names[0]} is not for: leave one of "
        "them out",
    )


def check_canvas_decode(model: Any, decode: Any) -> None:
    """Checks how a model is decoded, by blocks or not.

    Args:
      model: a config.Model.
      decode: a config.Decode.

    Raises:
      ValueError: a field of decode is for models of another kind; it is named.
    """
    if model.canvas is None:
        names = [name for name in CANVAS_FIELDS if getattr(decode, name)]
        require(
            not names,
            f"Decode.{names and names[0]} is for models that fill masked blocks, and this one has "
            "no Model.canvas: leave it out",
        )
        return
    for each in dataclasses.fields(decode):
        value = getattr(decode, each.name)
        plain = each.name == "drafter" and value == "plain"
        require(
            each.name in HONORED or value == each.default or plain,
            f"Decode.{each.name} needs text that is written from left to right, and Model.canvas "
            "fills the places of a block in any order: leave it out, or decode a model without it",
        )
    require(
        "checkpoints" not in decode.kv_cache,
        f"Decode.kv_cache {decode.kv_cache} keeps tokens as they are written, and the blocks of "
        "Model.canvas are written again: take int8, int4 or auto",
    )


def check_left_to_right(model: Any, what: str) -> None:
    """Raises ValueError for a model that fills masked blocks.

    Args:
      model: a config.Model.
      what: what is wanted of it, for the message.
    """
    require(
        model.canvas is None or model.canvas.block == 1,
        f"{what} needs a model that writes from left to right, and this one fills masked blocks "
        "(Model.canvas): it has infer, and eval with a bound of its likelihood",
    )
