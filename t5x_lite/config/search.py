# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of Decode by which several texts are searched for, and one is chosen."""

import math
from typing import Any

from t5x_lite.config.checked import require
from t5x_lite.utils import hub_names

# Ways to order several texts, with the form of each.
CHOOSERS = {
    "score": "score",
    "mbr": "mbr:METRIC",
    "rerank": "rerank:PATH",
    "function": "function:MODULE.NAME",
    "coverage": "coverage:BETA",
}
# Ways to search among samples, and what their number is if none is written.
SEARCHES = {"best": 1, "rejection": 8, "smc": 1, "puct": 16}
COUNTED = {"rejection": "rejection:N", "puct": "puct:N"}
MOST_ROUNDS = 2**16


def check_choice(decode: Any) -> None:
    """Checks how one of several texts is chosen.

    Raises:
      ValueError: it names no way, or there is one text only.
    """
    if not decode.choose:
        return
    check_chooser("choose", decode.choose)
    require(
        decode.n_best > 1,
        f"Decode.choose {decode.choose} orders several texts: set Decode.n_best to 2 or more",
    )


def check_chooser(field: str, name: str) -> None:
    """Checks the name of a chooser.

    Args:
      field: of Decode, for messages.
      name: its value.

    Raises:
      ValueError: it names no way to choose.
    """
    kind, _, argument = name.partition(":")
    require(
        kind in CHOOSERS and bool(argument) == (kind != "score"),
        f"Decode.{field} {name!r} is not one of {', '.join(CHOOSERS.values())}",
    )
    if kind == "coverage":
        try:
            finite = math.isfinite(float(argument))
        except ValueError:
            finite = False
        require(finite, f"Decode.{field} {name!r}: BETA is a number, such as coverage:0.2")
    if kind == "rerank":
        try:
            hub_names.check_source(argument)
        except ValueError as error:
            raise ValueError(f"Decode.{field}: {error}") from None


def parse_search(name: str) -> tuple[str, int]:
    """Returns the policy of Decode.search and its number.

    Raises:
      ValueError: there is no such policy, or its number is none.
    """
    kind, colon, number = name.partition(":")
    forms = [COUNTED.get(each, each) for each in SEARCHES]
    require(kind in SEARCHES, f"Decode.search {name!r} is not one of {', '.join(forms)}")
    if not colon:
        return kind, SEARCHES[kind]
    valid = kind in COUNTED and number.isascii() and number.isdigit() and len(number) < 6
    require(
        valid and 1 <= int(number or 0) <= MOST_ROUNDS,
        f"Decode.search {name!r}: write it as {COUNTED.get(kind, kind)}"
        + (f", N in 1..{MOST_ROUNDS:,}" if kind in COUNTED else ""),
    )
    return kind, int(number)


def check_search(decode: Any) -> None:
    """Checks a search by a judge.

    Raises:
      ValueError: it lacks a judge or samples, or its fields are set without it.
    """
    if not decode.search:
        require(
            not decode.judge,
            f"Decode.judge {decode.judge} guides a search: set Decode.search (best, rejection, "
            "smc, puct), or choose among whole texts by Decode.choose",
        )
        return
    parse_search(decode.search)
    require(
        decode.temperature > 0,
        f"Decode.search {decode.search} searches among samples: set Decode.temperature (1 samples "
        "from the model's distribution)",
    )
    require(
        decode.judge,
        f"Decode.search {decode.search} needs a Decode.judge: {', '.join(CHOOSERS.values())}",
    )
    check_chooser("judge", decode.judge)
    most = 1 if decode.search.startswith("rejection") else decode.particles
    require(
        decode.n_best <= most,
        f"Decode.search {decode.search} returns at most {most} texts (Decode.particles "
        f"{decode.particles}); Decode.n_best is {decode.n_best}",
    )


def check_beams(decode: Any) -> None:
    """Checks what beams cannot follow, and their groups.

    Raises:
      ValueError: a stop is given, the beams cannot be divided, or a group has nothing to differ
        from.
    """
    require(
        decode.beams == 1 or not decode.stop,
        "Decode.stop ends a text at a token; beam search (Decode.beams) knows EOS alone",
    )
    require(
        decode.beams % decode.beam_groups == 0,
        f"Decode.beams ({decode.beams}) must be a multiple of Decode.beam_groups "
        f"({decode.beam_groups})",
    )
    require(
        decode.beam_groups > 1 or not decode.diversity_penalty,
        "Decode.diversity_penalty keeps groups of beams apart: set Decode.beam_groups to 2 or more",
    )
