# SPDX-License-Identifier: Apache-2.0
"""Rows of a request with what each must begin with, or be a part of: beginnings of targets, healed
prompts, spans of inputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.decoding import request as requests
from t5x_lite.decoding.steering.constraints import compile_healing, vocabulary_bytes
from t5x_lite.decoding.steering.spans import list_row_spans, stack_spans
from t5x_lite.decoding.steering.stop_strings import cut_text, find_tables, settled_text
from t5x_lite.tokenizers.vocabulary import TextVocabulary


class SteeredRows:
    """Inputs with the tables of a config for each.

    Attributes:
      cfg: config of the model.
      decode: config of decoding for these rows.
      targets: vocabulary of the new texts.
      ids: inputs; prompts without the token that is healed.
      beginnings: ids that each target begins with.
      healed: token of each row that is written again; None where there is none.
      tables: tables that all rows share.
      spans: spans of each input; None without Decode.span_of_input.
    """

    def __init__(
        self,
        cfg: config.Model,
        vocabularies: tuple[TextVocabulary, TextVocabulary],
        ids: Sequence[Sequence[int]],
        decode: config.Decode,
    ):
        inputs, self.targets = vocabularies
        self.cfg, self.decode = cfg, decode
        self.ids: list[list[int]] = [[*row] for row in ids]
        self.tables = find_tables(decode, self.targets, cfg.vocab)
        self.beginnings = self.encode_beginnings()
        self.healed: list[int | None] = [None] * len(self.ids)
        if decode.token_healing:
            self.remove_cut_tokens()
        self.spans = None
        if decode.span_of_input:
            texts = [inputs.decode(row) for row in self.ids]
            spelled = vocabulary_bytes(self.targets)
            self.spans = list_row_spans(texts, spelled, cfg.vocab, decode.max_new_tokens)

    def encode_beginnings(self) -> list[list[int]]:
        """Returns the ids that each target begins with.

        Raises:
          ValueError: there are neither one nor as many as inputs, or the model has no targets.
        """
        prefixes, count = self.decode.target_prefix, len(self.ids)
        if not prefixes:
            return [[] for _ in self.ids]
        config.require(
            self.cfg.encoder is not None,
            "Decode.target_prefix begins the target of an encoder-decoder: write it at the end of "
            "a decoder-only model's input",
        )
        config.require(
            len(prefixes) in (1, count),
            f"Decode.target_prefix has {len(prefixes)} texts for {count} inputs: write one for "
            "all, or one for each",
        )
        encoded = [ids.tolist() for ids in self.targets.encode_all([*prefixes])]
        requests.check_ids(self.cfg, "Decode.target_prefix", encoded, empty=True)
        forced = self.decode.forced_bos_token_id
        if forced is not None:
            encoded = [[forced, *ids] for ids in encoded]
            self.decode = dataclasses.replace(self.decode, forced_bos_token_id=None)
        return encoded * (count if len(encoded) == 1 else 1)

    def remove_cut_tokens(self) -> None:
        """Removes the last token of each prompt that others may spell longer.

        Raises:
          ValueError: an encoder-decoder has no beginnings of targets.
        """
        alone = self.cfg.encoder is None
        config.require(
            alone or any(self.beginnings),
            "Decode.token_healing heals the end of a prompt, which an encoder-decoder has with "
            "Decode.target_prefix alone",
        )
        spelled = vocabulary_bytes(self.targets).by_id
        least = 1 if alone and not self.cfg.add_bos else 0
        for place, prompt in enumerate(self.ids if alone else self.beginnings):
            if len(prompt) > least and is_text(spelled.get(prompt[-1], b"\xff")):
                self.healed[place] = prompt[-1]
                (self.ids if alone else self.beginnings)[place] = prompt[:-1]

    def request(
        self, places: Sequence[int], batch: int, rows: Sequence[int] | None = None
    ) -> requests.Request:
        """Returns the request of some rows.

        Args:
          places: their numbers among the inputs.
          batch: number of rows to fill up to.
          rows: their numbers for sampling, 0, 1, ... by default.
        """
        tables: dict[str, Any] = dict(self.tables)
        filled = [*places, *[places[0]] * (batch - len(places))]
        if self.spans is not None:
            tables["spans"] = stack_spans([self.spans[place] for place in filled])
        if self.decode.token_healing:
            tables["healing"], tables["healing_start"] = compile_healing(
                [self.healed[place] for place in filled], self.targets, self.cfg.vocab
            )
        examples = [self.ids[place] for place in places]
        if any(self.beginnings):
            tables["beginnings"] = [self.beginnings[place] for place in places]
        return requests.make_request(
            self.cfg,
            examples,
            self.decode,
            rows=rows,
            batch=batch,
            eos=self.targets.stops,
            **tables,
        )

    def write_text(self, place: int, ids: Sequence[int], growing: bool = False) -> str:
        """Returns the text of new tokens, after the text of a prompt or from a target's beginning.

        Args:
          place: number of the row.
          ids: the new tokens.
          growing: more tokens may follow: of what may become a stop, nothing is there.
        """
        text = self.targets.decode([*self.beginnings[place], *ids])
        healed = self.healed[place]
        if healed is not None and self.cfg.encoder is None:
            again = self.targets.decode([healed])
            text = text[len(again) :] if text.startswith(again) else ""
        return (settled_text if growing else cut_text)(text, self.decode.stop)


def is_text(spelled: bytes) -> bool:
    """True if bytes are whole characters."""
    try:
        return bool(spelled.decode())
    except UnicodeDecodeError:
        return False
