# SPDX-License-Identifier: Apache-2.0
"""Drafters by name: `lookup`, `early:4`, `draft:runs/small`, `lookup+recycling`, `auto`."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.decoding.acceptance import approximate, exact, speculative
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.drafters.autoregressive import check_layer_number
from t5x_lite.decoding.drafters.blockwise import Blockwise
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.late_layers import LateLayers
from t5x_lite.decoding.drafters.lookahead import Lookahead
from t5x_lite.decoding.drafters.lookup import Lookup
from t5x_lite.decoding.drafters.medusa import CHANCES as HEAD_CHANCES
from t5x_lite.decoding.drafters.medusa import Medusa, best_tree_of_heads
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling, count_successors
from t5x_lite.decoding.drafters.refined import Refined
from t5x_lite.decoding.drafters.trees import best_tree
from t5x_lite.decoding.drafters.trigram import Trigram
from t5x_lite.decoding.drafters.union import union
from t5x_lite.decoding.generation import PLAIN, Drafting
from t5x_lite.decoding.protocol import Drafter, Tree, chain
from t5x_lite.model.computation import dtype_of_computation
from t5x_lite.utils.nearest import suggest
from t5x_lite.utils.not_none import not_none

# Choosing a width does not pay for models with fewer weights in their decoder: it took about
# 0.02 ms of CPU time per step, a seventh of a step of g2p's 1.7M weights, where a pass over 20M
# takes some 3 ms (27 GB/s).
MIN_ADAPTIVE_WEIGHTS = 20_000_000

# Shorter texts have little to copy from, and end before the compilation of several widths has paid:
# some 8 s of CPU time each for 135M weights.
MIN_LOOKUP_LENGTH = 128

# Each width is a program of its own, with a whole model to compile: "auto" has fewer of them.
MAX_AUTO_WIDTH, MAX_WIDTH = 8, 16
# Width of each drafter if none is set and none may be chosen.
FIXED_WIDTH = 5

# Reads the checkpoint of a draft model: its config, and its weights from `prepare_params`.
Load = Callable[[str], tuple[config.Model, Any]]
# Reads the texts of a file, as ids that the model might have written.
Texts = Callable[[str], list[list[int]]]


class DraftRequest(NamedTuple):
    """Request for a drafter by name.

    Attributes:
      cfg: config of the target.
      argument: what follows the name after a colon.
      width: width of the block; 0 for the widest that may pay.
      max_width: most nodes if width is 0.
      load: reads a draft model; None where that is not possible.
      texts: reads texts; None where that is not possible.
    """

    cfg: config.Model
    argument: str
    width: int
    max_width: int
    load: Load | None
    texts: Texts | None

    def width_or(self, default: int) -> int:
        """Returns the width of the request, or else the default up to max_width."""
        return self.width or min(default, self.max_width)

    def chain_or(self, default: int) -> Tree:
        """Returns a chain of `width_or(default)` nodes."""
        return chain(self.width_or(default))

    def layers(self, name: str) -> int:
        """Returns the argument as a number of layers.

        Raises:
          ValueError: it is not a number, or not one of layers that the decoder has.
        """
        layers = not_none(self.cfg.decoder).layers
        if not self.argument.isdecimal():
            raise ValueError(
                f"drafter={name} needs a number of layers, such as {name}:"
                f"{max(layers // 4, 1)} of {layers}; got "
                f"{self.argument!r}"
            )
        check_layer_number(layers, f"drafter={name}", int(self.argument))
        return int(self.argument)


class DraftMethod(NamedTuple):
    """A drafting method; `options.DRAFTERS` has a line of help for each.

    Attributes:
      make: request -> (drafter, its weights).
      widths: widths to choose among; none if the block is always the same.
      floor: Adaptive.floor; 0 for drafts that cost nothing, which are made at full width.
      first: Adaptive.first.
      argument: takes an argument after a colon.
    """

    make: Callable[[DraftRequest], tuple[Drafter, Any]]
    widths: tuple[int, ...] = ()
    floor: int = 0
    first: float = 0.25
    argument: bool = False


def make_draft_model(request: DraftRequest) -> tuple[Drafter, Any]:
    """Returns a draft model and its weights.

    Raises:
      ValueError: the request has no path, or nothing that could read it.
    """
    if not request.argument or request.load is None:
        raise ValueError("drafter=draft needs a checkpoint: draft:PATH, a smaller model's")
    cfg, weights = request.load(request.argument)
    return DraftModel(cfg, request.cfg, request.chain_or(8)), weights


def make_recycling(request: DraftRequest) -> tuple[Drafter, Any]:
    """Returns Recycling, with a table of the texts at the request's path if it has one.

    Raises:
      ValueError: nothing could read the path.
    """
    drafter = Recycling(best_tree(request.width_or(16), CHANCES))
    if not request.argument:
        return drafter, None
    if request.texts is None:
        raise ValueError(
            "drafter=recycling:PATH is not available here: reading texts needs a tokenizer"
        )
    texts = request.texts(request.argument)
    return drafter, count_successors(texts, drafter.top, drafter.slots)


def make_head_drafter(request: DraftRequest, make: Callable[[int], Drafter]) -> tuple[Drafter, Any]:
    """Returns make(number of tokens that the model and its heads predict at once).

    Raises:
      ValueError: the model has no heads.
    """
    if request.cfg.draft_heads is None:
        raise ValueError(
            "drafter=blockwise, refined and medusa need a model with heads that predict ahead "
            "(Model.draft_heads): train some, for example with configs/runs/heads_*.gin, or take "
            "drafter=lookup"
        )
    return make(request.cfg.draft_heads.block), None


def make_medusa(request: DraftRequest) -> tuple[Drafter, Any]:
    """Returns Medusa with the best tree of the model's heads."""

    def make(block: int) -> Drafter:
        chances = HEAD_CHANCES[: block - 1]
        # Few heads have no wider tree than all their ranks on all paths.
        depths = range(1, len(chances) + 1)
        most = 1 + sum(math.prod(map(len, chances[:depth])) for depth in depths)
        return Medusa(best_tree_of_heads(min(request.width_or(16), most), chances))

    return make_head_drafter(request, make)


METHODS = {
    "blockwise": DraftMethod(
        lambda request: make_head_drafter(
            request, lambda block: Blockwise(request.chain_or(block))
        ),
        (1, 4, 8, 16),
        floor=1,
        first=0.6,
    ),
    "refined": DraftMethod(
        lambda request: make_head_drafter(request, lambda block: Refined(request.chain_or(block))),
        (1, 4, 8, 16),
        floor=1,
        first=0.6,
    ),
    "medusa": DraftMethod(make_medusa, (1, 8), floor=1, first=0.6),
    "lookup": DraftMethod(lambda request: (Lookup(request.chain_or(16)), None), (1, 4, 8)),
    "recycling": DraftMethod(make_recycling, (1, 8), argument=True),
    "trigram": DraftMethod(lambda request: (Trigram(request.chain_or(8)), None), (1, 4)),
    "jacobi": DraftMethod(lambda request: (Jacobi(request.chain_or(8)), None), (1, 4)),
    "lookahead": DraftMethod(lambda request: (Lookahead(), None)),
    "early": DraftMethod(
        lambda request: (EarlyExit(request.layers("early"), request.chain_or(8)), None),
        (1, 4),
        floor=1,
        first=0.6,
        argument=True,
    ),
    "late": DraftMethod(
        lambda request: (LateLayers(request.layers("late"), request.chain_or(4)), None),
        (1, 2),
        floor=1,
        first=0.6,
        argument=True,
    ),
    "draft": DraftMethod(make_draft_model, (1, 4), floor=2, first=0.6, argument=True),
}

# Their argument is the path of a file or of a checkpoint.
READ_FILES = ("draft", "recycling")

# Rule of each name, and the types of the numbers after its colons.
ACCEPTANCES = {
    "exact": (exact.Exact, ()),
    "speculative": (speculative.Speculative, ()),
    "block": (speculative.BlockVerification, ()),
    "top-k": (approximate.TopK, (int,)),
    "distance": (approximate.Distance, (int,)),
    "typical": (approximate.Typical, (float, float)),
    "lenient": (approximate.Lenient, (float,)),
    "minimum": (approximate.MinimumBlock, (int,)),
    "always": (approximate.Always, ()),
}


def make_drafting(
    cfg: config.Model,
    decode: config.Decode,
    load: Load | None = None,
    texts: Texts | None = None,
) -> Drafting:
    """Returns the drafter, its weights and the acceptance rule of a Decode.

    An `Adaptive` drafter still needs a cost model: `adaptive.tiers` measures one.

    Args:
      cfg: config of the target.
      decode: its drafter, draft_length and accept are used.
      load: reads the checkpoint of a draft model.
      texts: reads the texts that a table begins with.

    Raises:
      ValueError: a name is unknown, or needs what the model or the request lacks.
    """
    accept = make_acceptance(decode.accept)
    name = resolve_name(cfg, decode)
    if name == "plain":
        return PLAIN._replace(accept=accept)
    # A rule that is not exact gives another text at another width: measurement may not choose it.
    names = split_names(name)
    fixed = accept != exact.Exact() or len(names) > 1
    most = FIXED_WIDTH if fixed else MAX_AUTO_WIDTH if decode.drafter == "auto" else MAX_WIDTH
    parts = [
        make_drafter(DraftRequest(cfg, part, decode.draft_length, most, load, texts), accept)
        for part in names
    ]
    if len(parts) > 1:
        _, drafters, weights = zip(*parts, strict=True)
        return Drafting(union(*drafters), weights, accept)
    method, drafter, weights = parts[0]
    widths = [width for width in method.widths if width < drafter.tree.width]
    if not widths or fixed or decode.draft_length:
        return Drafting(drafter, weights, accept)
    widths = (*widths, drafter.tree.width)
    floor = method.floor or drafter.tree.width
    return Drafting(Adaptive(drafter, widths, floor, method.first), weights, accept)


def split_names(name: str) -> list[str]:
    """Returns the drafters of "A+B"; a path after a colon may have a plus sign."""
    return re.split(rf"\+(?={'|'.join(METHODS)})", name)


def takes_width(name: str) -> bool:
    """True if the blocks of a drafter can have any width."""
    return all(METHODS[part.partition(":")[0]].widths for part in split_names(name))


def check_names(cfg: config.Model, decode: config.Decode) -> None:
    """Raises ValueError where `make_drafting` would by the names; reads no file that they name.

    Args:
      cfg: config of the target.
      decode: its drafter, draft_length and accept.
    """
    accept = make_acceptance(decode.accept)
    name = resolve_name(cfg, decode)
    for part in [] if name == "plain" else split_names(name):
        key, argument = parse_name(part, decode.draft_length)
        if not argument or key not in READ_FILES:
            request = DraftRequest(cfg, part, decode.draft_length, MAX_WIDTH, None, None)
            make_drafter(request, accept)


def resolve_name(cfg: config.Model, decode: config.Decode) -> str:
    """Returns the drafter's name; "auto" becomes the model's heads or lookup, if safe and useful.

    Beam search has no drafter. In bfloat16 the logits of a block differ from those of single tokens
    by more than near ties do, so plain decoding keeps the text; small models are faster than any
    choice, and short texts end before copies pay.
    """
    if decode.drafter != "auto":
        return decode.drafter
    dtype = dtype_of_computation(cfg, decode.compute)
    unsafe = dtype != "float32" or decode.accept != "exact"
    if decode.beams > 1 or unsafe or count_decoder_weights(cfg) < MIN_ADAPTIVE_WEIGHTS:
        return "plain"
    if cfg.draft_heads is not None:
        return "blockwise"
    return "lookup" if decode.max_new_tokens >= MIN_LOOKUP_LENGTH else "plain"


def count_decoder_weights(cfg: config.Model) -> int:
    """Estimates the number of weights that one token passes through: layers and output head."""
    stack = not_none(cfg.decoder)
    heads = 2 * (stack.heads + stack.key_heads) * stack.head_dim
    mlp = (3 if stack.gated else 2) * stack.mlp
    return stack.layers * stack.embed * (heads + mlp) + cfg.vocab * stack.embed


def make_drafter(
    request: DraftRequest, accept: exact.Acceptance
) -> tuple[DraftMethod, Drafter, Any]:
    """Returns the method, drafter and weights of a name, which is the request's argument.

    Raises:
      ValueError: the name is unknown, or has an argument that it does not take.
    """
    key, argument = parse_name(request.argument, request.width)
    drafter, weights = METHODS[key].make(request._replace(argument=argument))
    stochastic = isinstance(accept, speculative.Speculative | speculative.BlockVerification)
    if stochastic and hasattr(drafter, "stochastic"):
        drafter = dataclasses.replace(drafter, stochastic=True)
    return METHODS[key], drafter, weights


def parse_name(name: str, width: int) -> tuple[str, str]:
    """Returns the key of METHODS, and what follows it after a colon.

    Args:
      name: "early:4".
      width: width of the block that is asked for; 0 for any.

    Raises:
      ValueError: the name is unknown, or has an argument or a width that it does not take.
    """
    key, _, argument = name.partition(":")
    if key not in METHODS:
        known = [*METHODS, "auto", "plain"]
        if key in known:
            raise ValueError(f"The drafter {key} stands alone, without others beside it and no :")
        raise ValueError(f"Unknown drafter {name!r}: {suggest(key, known)}")
    if argument and not METHODS[key].argument:
        raise ValueError(f"drafter={name}: {key} takes nothing after a colon")
    if width and not METHODS[key].widths:
        raise ValueError(
            f"draft_length={width} is not for drafter={key}, whose blocks always have one size: "
            "leave it out, or pass draft_length=0"
        )
    return key, argument


def make_acceptance(name: str) -> exact.Acceptance:
    """Returns the acceptance rule of a name and its numbers, such as `top-k:3`, `typical:0.3:0.09`.

    Raises:
      ValueError: an unknown name, or other numbers than it takes.
    """
    key, *numbers = name.split(":")
    if key not in ACCEPTANCES:
        raise ValueError(f"Unknown accept {name!r}: {suggest(key, ACCEPTANCES)}")
    rule, kinds = ACCEPTANCES[key]
    optional = key == "typical" and not numbers
    if len(numbers) != len(kinds) and not optional:
        usage = ":".join([key, *(kind.__name__ for kind in kinds)])
        raise ValueError(f"accept={name} takes other numbers: write it as {usage}")
    try:
        arguments: Any = [kind(each) for kind, each in zip(kinds, numbers, strict=False)]
        return rule(*arguments)
    except ValueError as error:
        raise ValueError(f"accept={name}: {error}") from error
