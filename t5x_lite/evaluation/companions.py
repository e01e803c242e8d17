# SPDX-License-Identifier: Apache-2.0
"""Companions of a Predictor, built once per name, and what they read."""

from collections.abc import Callable, Sequence
from typing import Any

from t5x_lite import config, decoding
from t5x_lite.config.companions import INPUT, parse_combination, parse_companion
from t5x_lite.decoding.companions.companion import Companion
from t5x_lite.decoding.companions.rows import (
    attach_companion,
    companion_layers,
    last_rows,
    same_rows,
)
from t5x_lite.decoding.companions.rules import make_rule
from t5x_lite.decoding.request import (
    check_examples,
    check_positions,
    count_samples,
    prompt_rows,
)

# Loads another checkpoint of the same vocabulary, for whoever is named: its config and weights.
LoadModel = Callable[[str, str], tuple[config.Model, Any]]


class CompanionCache:
    """Companions of one model, by the fields of config.Decode that name them.

    Attributes:
      cfg: config of the model.
      load: loads the checkpoint of a companion.
    """

    def __init__(self, cfg: config.Model, load: LoadModel):
        self.cfg, self.load = cfg, load
        self.companions: dict[tuple[str, str], Companion | None] = {}

    def get(self, decode: config.Decode, params: Any) -> Companion | None:
        """Returns the companion that decode names, without rows; None for none.

        Args:
          decode: config of decoding.
          params: weights of the model, prepared for decoding.

        Raises:
          ValueError: there is no such companion, or it does not fit the model.
        """
        key = (decode.companion, decode.combine)
        if key not in self.companions:
            self.companions[key] = self.make(decode) if decode.companion else None
        companion = self.companions[key]
        if companion is None or companion.layers or companion.params is not None:
            return companion
        return companion.with_params(params)

    def make(self, decode: config.Decode) -> Companion:
        """Returns a companion; one that reads with the model itself has no weights yet.

        Raises:
          ValueError: it does not fit the model.
        """
        rule = make_rule(parse_combination(decode.combine, decode.companion))
        kind, argument = parse_companion(decode.companion)
        if kind == "layers":
            return Companion(rule, layers=companion_layers(self.cfg, decode.companion))
        if kind != "model":
            return Companion(rule, cfg=self.cfg)
        cfg, params = self.load(argument, f"companion=model:{argument}")
        alike = ("layout", "add_bos", "decoder_start_token_id")
        differing = [name for name in alike if getattr(cfg, name) != getattr(self.cfg, name)]
        config.require(
            not differing,
            f"companion=model:{argument} reads its texts otherwise than the model: Model."
            f"{differing and differing[0]} differs",
        )
        return Companion(rule, cfg=cfg).with_params(params)

    def attach(
        self,
        request: decoding.Request,
        decode: config.Decode,
        params: Any,
        prompts: Sequence[Sequence[int]] | None,
        places: Sequence[int] = (0,),
    ) -> decoding.Request:
        """Returns a request with the companion that decode names.

        Args:
          request: the rows of the model.
          decode: config of decoding.
          params: weights of the model, prepared for decoding.
          prompts: ids of the companion's own inputs, for "prompt:TEXT"; None for others.
          places: those of them that the rows have.
        """
        companion = self.get(decode, params)
        if companion is None or companion.layers:
            return request._replace(companion=companion)
        samples = count_samples(decode)
        if prompts is not None:
            empty = [[self.cfg.decoder_start_token_id]]
            missing = len(request.prompts) // samples - len(places)
            rows = prompt_rows(self.cfg, [*(prompts[place] for place in places), *empty * missing])
            if self.cfg.encoder is not None:  # the targets begin as those of the model
                targets = same_rows(request, samples)
                rows = targets._replace(inputs=rows.inputs, inputs_length=rows.inputs_length)
        elif decode.companion == "unconditional":
            rows = last_rows(request, samples)
        else:
            rows = same_rows(request, samples)
        return attach_companion(request, companion, rows)

    def check(self, decode: config.Decode, inputs: Sequence[Sequence[int]]) -> None:
        """Checks that the companion can read inputs and what follows.

        Args:
          decode: config of decoding.
          inputs: ids of the companion's inputs.

        Raises:
          ValueError: an input is empty, outside of the vocabulary or too long.
        """
        companion = self.companions.get((decode.companion, decode.combine))
        if companion is not None and companion.cfg is not None and len(inputs):
            check_examples(companion.cfg, inputs)
            name = "Decode.companion: input"
            check_positions(companion.cfg, name, inputs, decode.max_new_tokens)


def companion_texts(decode: config.Decode, texts: Sequence[str]) -> list[str] | None:
    """Texts that a companion reads, one for each input; None for those of the model.

    Args:
      decode: config of decoding.
      texts: inputs of the model.
    """
    if not decode.companion.startswith("prompt:"):
        return None
    _, template = parse_companion(decode.companion)
    return [template.replace(INPUT, text) for text in texts]
