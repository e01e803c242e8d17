# SPDX-License-Identifier: Apache-2.0
"""From names to a Drafting: `lookup`, `early:4`, `draft:runs/small`, `lookup+recycling`, `auto`."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.decoding import acceptance, lossy, speculative, target
from t5x_lite.decoding.drafters.blockwise import Blockwise
from t5x_lite.decoding.drafters.draft_model import DraftModel
from t5x_lite.decoding.drafters.early_exit import EarlyExit
from t5x_lite.decoding.drafters.jacobi import Jacobi
from t5x_lite.decoding.drafters.late_layers import LateLayers
from t5x_lite.decoding.drafters.lookahead import Lookahead
from t5x_lite.decoding.drafters.lookup import Lookup
from t5x_lite.decoding.drafters.medusa import CHANCES as RANKS
from t5x_lite.decoding.drafters.medusa import Medusa, promising
from t5x_lite.decoding.drafters.recycling import CHANCES, Recycling, expected
from t5x_lite.decoding.drafters.refined import Refined
from t5x_lite.decoding.drafters.trees import likeliest
from t5x_lite.decoding.drafters.trigram import Trigram
from t5x_lite.decoding.drafters.union import union
from t5x_lite.decoding.generation import PLAIN, Drafting
from t5x_lite.decoding.protocol import Drafter, Tree, chain
from t5x_lite.decoding.widths import Adaptive

# Below so many weights in its decoder a model answers in less time than a choice of width is worth:
# that choice took about 0.02 ms of CPU time per call, a seventh of a call of g2p's 1.7M weights,
# where a pass over 20M takes some 3 ms (27 GB/s).
WORTH = 20_000_000

# Shorter texts have little to copy from, and end before the compilation of several widths is worth
# it: some 8 s of CPU time each for 135M weights.
LONG = 128

# Each width is a program of its own, of a whole model to compile: without being asked, no more.
WIDEST, WIDEST_ASKED = 8, 16
# The width of each drafter where none is asked for and none may be chosen.
FIXED = 5

# Reads the checkpoint of a draft model: its config, and its weights from `prepare`.
Load = Callable[[str], tuple[config.Model, Any]]
# Reads the texts of a file, as ids that the model might have written.
Texts = Callable[[str], list[list[int]]]


class Asked(NamedTuple):
    """What a drafter is made for: the model, the argument after its name, and its width, or 0 for
    the widest that may pay, up to most."""

    cfg: config.Model
    argument: str
    width: int
    most: int
    load: Load | None
    texts: Texts | None

    def of(self, otherwise: int) -> int:
        """The width asked for, or else this one."""
        return self.width or min(otherwise, self.most)

    def wide(self, otherwise: int) -> Tree:
        return chain(self.of(otherwise))

    def layers(self, name: str) -> int:
        """The argument as a number of layers."""
        if not self.argument.isdecimal():
            raise ValueError(
                f"--decoder={name} needs a number of layers, such as {name}:"
                f"{max(self.cfg.decoder.layers // 4, 1)} of {self.cfg.decoder.layers}; got "
                f"{self.argument!r}"
            )
        return int(self.argument)


class Method(NamedTuple):
    """A way to draft: make(asked) -> (drafter, its weights); `options.DECODERS` has a line of help.

    widths are those chosen among (none: its block is always the same); floor and first are those
    of `Adaptive`, where floor 0 stands for guesses that cost nothing. argument says whether it
    takes one.
    """

    make: Callable[[Asked], tuple[Drafter, Any]]
    widths: tuple[int, ...] = ()
    floor: int = 0
    first: float = 0.25
    argument: bool = False


def draft_model(asked: Asked) -> tuple[Drafter, Any]:
    if not asked.argument or asked.load is None:
        raise ValueError("--decoder=draft needs a checkpoint: draft:PATH, a smaller model's")
    cfg, weights = asked.load(asked.argument)
    return DraftModel(cfg, asked.cfg, asked.wide(8)), weights


def recycling(asked: Asked) -> tuple[Drafter, Any]:
    drafter = Recycling(likeliest(asked.of(16), CHANCES))
    if not asked.argument:
        return drafter, None
    if asked.texts is None:
        raise ValueError("--decoder=recycling:PATH begins with texts, which nobody reads here")
    return drafter, expected(asked.texts(asked.argument), drafter.top, drafter.slots)


def by_heads(asked: Asked, make: Callable[[int], Drafter]) -> tuple[Drafter, Any]:
    """What make makes of the number of tokens that the model's heads guess in one, with its own."""
    if asked.cfg.blockwise is None:
        raise ValueError(
            "--decoder=blockwise, refined and medusa need a model with heads that guess ahead "
            "(Model.blockwise): train some, for example with configs/runs/heads_*.gin, or take "
            "--decoder=lookup"
        )
    return make(asked.cfg.blockwise.block), None


def medusa(asked: Asked) -> tuple[Drafter, Any]:
    def tree(block: int) -> Drafter:
        ranks = RANKS[: block - 1]
        # Few heads make no wider tree than all their ranks on all paths.
        most = 1 + sum(math.prod(map(len, ranks[:depth])) for depth in range(1, len(ranks) + 1))
        return Medusa(promising(min(asked.of(16), most), ranks))

    return by_heads(asked, tree)


METHODS = {
    "blockwise": Method(
        lambda asked: by_heads(asked, lambda block: Blockwise(asked.wide(block))),
        (1, 4, 8, 16),
        floor=1,
        first=0.6,
    ),
    "refined": Method(
        lambda asked: by_heads(asked, lambda block: Refined(asked.wide(block))),
        (1, 4, 8, 16),
        floor=1,
        first=0.6,
    ),
    "medusa": Method(medusa, (1, 8), floor=1, first=0.6),
    "lookup": Method(lambda asked: (Lookup(asked.wide(16)), None), (1, 4, 8)),
    "recycling": Method(recycling, (1, 8), argument=True),
    "trigram": Method(lambda asked: (Trigram(asked.wide(8)), None), (1, 4)),
    "jacobi": Method(lambda asked: (Jacobi(asked.wide(8)), None), (1, 4)),
    "lookahead": Method(lambda asked: (Lookahead(), None)),
    "early": Method(
        lambda asked: (EarlyExit(asked.layers("early"), asked.wide(8)), None),
        (1, 4),
        floor=1,
        first=0.6,
        argument=True,
    ),
    "late": Method(
        lambda asked: (LateLayers(asked.layers("late"), asked.wide(4)), None),
        (1, 2),
        floor=1,
        first=0.6,
        argument=True,
    ),
    "draft": Method(draft_model, (1, 4), floor=2, first=0.6, argument=True),
}

# What a name makes, and the numbers after its colons.
ACCEPTANCES = {
    "exact": (acceptance.Exact, ()),
    "speculative": (speculative.Speculative, ()),
    "block": (speculative.BlockVerification, ()),
    "top-k": (lossy.TopK, (int,)),
    "distance": (lossy.Distance, (int,)),
    "typical": (lossy.Typical, (float, float)),
    "lenient": (lossy.Lenient, (float,)),
    "minimum": (lossy.MinimumBlock, (int,)),
    "always": (lossy.Always, ()),
}


def drafting(
    cfg: config.Model,
    decode: config.Decode,
    load: Load | None = None,
    texts: Texts | None = None,
) -> Drafting:
    """Who drafts, by decode.decoder, decode.width and decode.accept.

    A drafter that comes as `Adaptive` still needs prices (`costs.priced`). load reads the
    checkpoint of a draft model, texts what a table begins with.

    Raises:
      ValueError: an unknown name, or one that needs what the model or the request has not.
    """
    accept = rule(decode.accept)
    name = chosen(cfg, decode)
    if name == "plain":
        return PLAIN._replace(accept=accept)
    # A rule that is not exact writes another text at another width: measurement may not choose it.
    names = re.split(rf"\+(?={'|'.join(METHODS)})", name)
    fixed = accept != acceptance.Exact() or len(names) > 1
    most = FIXED if fixed else WIDEST if decode.decoder == "auto" else WIDEST_ASKED
    parts = [made(Asked(cfg, part, decode.width, most, load, texts), accept) for part in names]
    if len(parts) > 1:
        drafters, weights = zip(*[(found, own) for _, found, own in parts], strict=True)
        return Drafting(union(*drafters), weights, accept)
    method, drafter, weights = parts[0]
    widths = [width for width in method.widths if width < drafter.tree.width]
    if not widths or fixed or decode.width:
        return Drafting(drafter, weights, accept)
    widths = (*widths, drafter.tree.width)
    floor = method.floor or drafter.tree.width
    return Drafting(Adaptive(drafter, widths, floor, method.first), weights, accept)


def chosen(cfg: config.Model, decode: config.Decode) -> str:
    """What "auto" stands for: the model's own heads, or lookup, where that is safe and pays.

    Beam search drafts nothing. In bfloat16 a block's logits differ from single tokens' by more
    than near ties do, so plain keeps the text; small models are quicker than any choice, and short
    texts done before copies pay.
    """
    if decode.decoder != "auto":
        return decode.decoder
    unsafe = target.precise(cfg).activations != "float32" or decode.accept != "exact"
    if decode.beams > 1 or unsafe or decoder_size(cfg) < WORTH:
        return "plain"
    if cfg.blockwise is not None:
        return "blockwise"
    return "lookup" if decode.length >= LONG else "plain"


def decoder_size(cfg: config.Model) -> int:
    """Weights that one token goes through, roughly: layers and the head."""
    stack = cfg.decoder
    heads = 2 * (stack.heads + stack.key_heads) * stack.head_dim
    mlp = (3 if stack.gated else 2) * stack.mlp
    return stack.layers * stack.embed * (heads + mlp) + cfg.vocab * stack.embed


def made(asked: Asked, accept: acceptance.Acceptance) -> tuple[Method, Drafter, Any]:
    """The drafter of one name, which is asked's argument: the name's own follows a colon."""
    key, _, argument = asked.argument.partition(":")
    if key not in METHODS:
        known = [*METHODS, "auto", "plain"]
        raise ValueError(f"Unknown --decoder {asked.argument!r}: {near(key, known)}")
    if argument and not METHODS[key].argument:
        raise ValueError(f"--decoder={asked.argument}: {key} takes nothing after a colon")
    drafter, weights = METHODS[key].make(asked._replace(argument=argument))
    draws = isinstance(accept, speculative.Speculative | speculative.BlockVerification)
    if draws and hasattr(drafter, "drawn"):
        drafter = dataclasses.replace(drafter, drawn=True)
    return METHODS[key], drafter, weights


def rule(name: str) -> acceptance.Acceptance:
    """The rule of acceptance of a name and its numbers: `exact`, `top-k:3`, `typical:0.3:0.09`.

    Raises:
      ValueError: an unknown name, or other numbers than it takes.
    """
    key, *numbers = name.split(":")
    if key not in ACCEPTANCES:
        raise ValueError(f"Unknown --accept {name!r}: {near(key, list(ACCEPTANCES))}")
    made, kinds = ACCEPTANCES[key]
    optional = key == "typical" and not numbers
    if len(numbers) != len(kinds) and not optional:
        wanted = ":".join([key, *(kind.__name__ for kind in kinds)])
        raise ValueError(f"--accept={name} takes other numbers: write it as {wanted}")
    try:
        return made(*(kind(number) for kind, number in zip(kinds, numbers, strict=False)))
    except ValueError as error:
        raise ValueError(f"--accept={name}: {error}") from error


def near(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {found[0]}? " if found else "") + f"There are {', '.join(known)}"
