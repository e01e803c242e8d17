# SPDX-License-Identifier: Apache-2.0
"""A lane: the completions whose settings share a pool, each in a row of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import config, decoding, sharding
from t5x_lite.decoding import pool
from t5x_lite.decoding.adaptive.drafter import Adaptive
from t5x_lite.decoding.beam_ranking import LengthPenalty
from t5x_lite.decoding.chunked_prefill import WholeRows
from t5x_lite.decoding.protocol import TokenDetails
from t5x_lite.decoding.sampling import SamplingParams
from t5x_lite.decoding.steering.build import ChoiceRules, make_processors
from t5x_lite.decoding.streaming import DecodeArguments
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import TokenScore, describe_tokens
from t5x_lite.model import adapter_banks
from t5x_lite.serving.completion import FinishReason
from t5x_lite.serving.limits import EngineLimits
from t5x_lite.serving.row_text import LaneKey, RowText, join_requests

# Width of a drafter's blocks where a request leaves it to measurement: rows that come and go have
# no time to measure.
DRAFT_WIDTH = 4


class Lane:
    """Rows of one pool, and the texts in them.

    Attributes:
      key: settings that the rows share.
      predictor: the model.
      limits: sizes of the engine.
      adapters: names of the adapters beside the model's weights; "" first, for none.
      texts: the text of each row; None for a free one.
      passes: forward passes of the last block.
    """

    def __init__(
        self,
        key: LaneKey,
        predictor: Predictor,
        limits: EngineLimits,
        adapters: Sequence[str],
    ):
        """Prepares the programs of a pool, which the first text that joins begins.

        Args:
          key: settings that the rows share.
          predictor: the model with all adapters, of any Decode.compute.
          limits: sizes of the engine.
          adapters: names of the adapters in their order; "" first, for none.

        Raises:
          ValueError: the drafter does not fit the model.
        """
        self.key, self.limits, self.passes = key, limits, 0
        self.adapters = adapters
        self.predictor = predictor.for_compute(key.decode.compute)
        self.decode = fix_drafter(self.predictor, key.decode)
        self.drafting = self.predictor.drafters.get(self.decode)
        self.texts: list[RowText | None] = [None] * limits.rows
        self.program = pool.make_pool_program(
            self.predictor.cfg,
            self.predictor.params,
            self.decode,
            self.drafting,
            rows=limits.rows,
            inputs=key.inputs,
            prompts=key.prompts,
            block=limits.block,
        )
        self.arguments: DecodeArguments | None = None
        self.pool: pool.RowPool | None = None

    @property
    def used(self) -> int:
        """Number of rows that have a text."""
        return sum(text is not None for text in self.texts)

    @property
    def writes(self) -> bool:
        """True if some row writes."""
        return any(text is not None and not text.reading for text in self.texts)

    @property
    def free(self) -> list[int]:
        """Rows without a text."""
        return [row for row, text in enumerate(self.texts) if text is None]

    def rows_of_prefill(self, text: RowText) -> int:
        """Rows of the program that reads a text's input and prompt.

        A function of the text alone: its row is computed in the same shape in any company.
        """
        shards = sharding.batch_shards()
        rows = max(self.limits.prefill_tokens // max(sum(text.widths()), 1), 1)
        return -(-min(rows, self.limits.rows) // shards) * shards

    def reserve(self, text: RowText) -> None:
        """Gives a text a free row, which writes nothing until the text joins."""
        self.texts[self.free[0]], text.reading = text, True

    def join(self, texts: Sequence[RowText], cache: WholeRows | None = None) -> None:
        """Reads texts whose widths and rules are alike, and gives each a free row.

        Args:
          texts: no more than `rows_of_prefill` of the first one, nor than there are free rows.
          cache: cache of the prompt of one text that has a row; None for texts that are read here.
        """
        rows = self.rows_of_prefill(texts[0])
        if cache is None:
            sizes, places = pool.PrefillSizes(*texts[0].widths()), self.free[: len(texts)]
        else:
            sizes = pool.PrefillSizes(0, self.program.prompts)
            places = [self.texts.index(texts[0])]
        request = join_requests(texts, rows, self.program.inputs, self.program.prompts)
        decodes = [text.decode for text in texts]
        sampling = sampling_rows(decodes, request)
        params = self.select_adapters([*texts, *[texts[0]] * (rows - len(texts))])
        arguments = self.make_arguments(texts[0], request)._replace(params=params)
        filled: Any = np.array([*places, *places[:1] * (rows - len(places))], np.int32)
        # On the host: one call places them all, where an array at a time takes 8 ms.
        joining = pool.JoiningRows(request._replace(eos=None), sampling, filled, cache)
        if self.pool is None:
            self.pool = pool.empty_pool(self.program, sizes, arguments, joining)
        self.pool = pool.join_pool(self.program, sizes, arguments, self.pool, joining)
        for row, text in zip(places, texts, strict=True):
            self.texts[row] = text
        params = self.select_adapters(self.texts)
        self.arguments = (self.arguments or arguments)._replace(params=params)

    def select_adapters(self, texts: Sequence[RowText | None]) -> Any:
        """Returns the weights for rows with the adapters of these texts."""
        if len(self.adapters) == 1:
            return self.predictor.params
        names = ["" if text is None else text.completion.request.adapter for text in texts]
        numbers = jnp.array([self.adapters.index(name) for name in names], jnp.int32)
        return adapter_banks.select_adapters(self.predictor.params, numbers)

    def make_arguments(self, text: RowText, request: decoding.Request) -> DecodeArguments:
        """Returns the traced arguments for rows of a request.

        Args:
          text: the first of them; its rules are those of all.
          request: the rows.
        """
        tables: dict[str, Any] = {"eos": text.request.eos, "constraint": text.request.constraint}
        processors = make_processors(text.decode, request._replace(**tables))
        shared = decoding.Request(*[None] * 7, eos=text.request.eos)
        return DecodeArguments(
            params=self.predictor.params,
            request=shared,
            rules=ChoiceRules(processors=processors),
            weights=self.drafting.weights,
            penalty=LengthPenalty(0.0),
        )

    def advance(self) -> list[tuple[RowText, int, FinishReason | None]]:
        """Writes a block of every row, and frees those that have ended.

        Returns:
          The texts, how many tokens each has got, and why it has ended, or None.
        """
        step = self.write_block()
        self.passes = int(step.passes)
        advanced = []
        for row, text in enumerate(self.texts):
            if text is None or text.reading:
                continue
            tokens = step.tokens[row, : step.counts[row]].tolist()
            accepted = (step.nodes[row, : step.counts[row]] > 0).tolist()
            scores = self.describe_scores(text, step.details, row, tokens)
            before = len(text.tokens)
            reason = text.add(tokens, scores, accepted, bool(step.done[row]))
            advanced.append((text, len(text.tokens) - before, reason))
            if reason is not None:
                self.texts[row] = None
        return advanced

    def write_block(self) -> pool.PoolStep:
        """Returns the next block of the rows that write, on the host."""
        assert self.pool is not None and self.arguments is not None
        wanted: Any = np.array([text is not None and not text.reading for text in self.texts])
        self.pool, step = pool.advance_pool(
            self.program, self.find_choice(), self.arguments, self.pool, wanted
        )
        return jax.device_get(step)

    def remove(self, texts: Sequence[RowText]) -> None:
        """Frees the rows of those texts that have one."""
        self.texts = [None if text in texts else text for text in self.texts]

    def find_choice(self) -> pool.ChoiceLevel:
        """Returns how the texts choose tokens: as the one that needs the most."""
        return max(text.choice for text in self.texts if text is not None and not text.reading)

    def describe_scores(
        self, text: RowText, details: TokenDetails | None, row: int, tokens: list[int]
    ) -> list[TokenScore]:
        """Returns the tokens of a row with their probabilities, if its request asks for them.

        Args:
          text: the text.
          details: of the block, on the host.
          row: number of the row.
          tokens: new tokens of the row.
        """
        if details is None:
            return []
        result = decoding.Result(*[None] * 5, details=jax.tree.map(lambda x: x[:, None], details))
        count = text.decode.logprobs
        return [
            score._replace(top=score.top[:count])
            for score in describe_tokens(self.predictor.targets, result, (row, 0), tokens)
        ]


def fix_drafter(predictor: Predictor, decode: config.Decode) -> config.Decode:
    """Returns a config whose drafter has blocks of one width.

    Args:
      predictor: the model.
      decode: config of decoding.
    """
    if decode.drafter == "auto":
        return dataclasses.replace(decode, drafter="plain", draft_length=0)
    if isinstance(predictor.drafters.get(decode).drafter, Adaptive):
        return dataclasses.replace(decode, draft_length=DRAFT_WIDTH)
    return decode


def sampling_rows(decodes: Sequence[config.Decode], request: decoding.Request) -> SamplingParams:
    """Returns how rows are sampled, every field an array but `typical_p` where none has it.

    Args:
      decodes: config of each row, up to those that only fill up.
      request: the rows.
    """
    filled = [*decodes, *[decodes[0]] * (len(request.seed) - len(decodes))]

    def collect(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(decode, name) for decode in filled], dtype)

    typical = any(decode.typical_p != 1 for decode in filled)
    return SamplingParams(
        temperature=collect("temperature"),
        top_k=collect("top_k", np.int32),
        top_p=collect("top_p"),
        seed=request.seed,
        row=request.row,
        min_p=collect("min_p"),
        typical_p=collect("typical_p") if typical else None,
        epsilon_cutoff=collect("epsilon_cutoff"),
        eta_cutoff=collect("eta_cutoff"),
        temperature_range=collect("dynatemp_range"),
        temperature_exponent=collect("dynatemp_exponent"),
    )
