# SPDX-License-Identifier: Apache-2.0
"""Config of decoding."""

import json
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from t5x_lite.config.canvas import parse_commit
from t5x_lite.config.checked import (
    FAR,
    Checked,
    CountOrZero,
    Few,
    Length,
    LengthOrZero,
    Positive,
    Range,
    Seed,
    ShareAboveZero,
    ShareBelowOne,
    require,
)
from t5x_lite.config.companions import check_companion
from t5x_lite.config.kv_cache import parse_kv_cache
from t5x_lite.config.search import check_beams, check_choice, check_search
from t5x_lite.utils import hub_names, paths

# Fields that say what a whole text may be, and those that forbid tokens by what stands before them.
CONSTRAINTS = ("regex", "json_schema", "grammar", "choices", "span_of_input", "force_words")
FORBIDDING = (
    "no_repeat_ngram_size",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "forced_bos_token_id",
)
# Fields that narrow what is sampled: a greedy text has the most probable token, which all keep.
FILTERS = (
    *("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "dynatemp_range",
)
Penalty = Annotated[float, Range(-100, 100)]


def schema_text(schema: object) -> str:
    """Returns a JSON schema as text.

    Raises:
      ValueError: it is neither text nor a dict of JSON values.
    """
    if isinstance(schema, dict):
        try:
            return json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"it is not JSON: {error}") from None
    require(isinstance(schema, str), f"must be a JSON schema, as text or as a dict; got {schema!r}")
    return str(schema)


@dataclass(frozen=True)
class Decode(Checked):
    """Decoding of text: greedily (temperature 0), by sampling, or by beam search (beams > 1).

    Attributes:
      max_new_tokens: most new tokens of a row.
      temperature: 0 is greedy; 1 samples from the model's distribution.
      top_k: samples among the k most probable tokens; 0 among all.
      top_p: samples among the fewest tokens whose probabilities sum to p; 1 among all.
      seed: the same seed gives the same text for a row.
      beams: beams of the search; 1 is none.
      alpha: length penalty: beams are ranked by log-probability / ((5 + length) / 6) ** alpha (Wu
        et al., 2016, eq. 14).
      length_penalty: transformers' penalty in place of alpha: beams are ranked by log-probability /
        length ** length_penalty; None takes alpha.
      early_stopping: transformers' rule for the end of a beam search: True, at as many ended texts
        as beams; False, once no unfinished text has, at its length, a higher score than all of
        these; "never", once none could have at any length. None is True, but texts that the limit
        cuts off then stand in for missing ones only; with force_words it is False.
      n_best: texts returned for an input: the best beams, best first, or so many samples.
      drafter: what drafts tokens ahead, which changes the speed and not the text: auto, plain,
        lookup, early:4, draft:PATH, lookup+recycling, ... (`infer --help` lists them).
      draft_length: tokens of a block, its first included, 2 to 64; 0 takes the fastest by
        measurement.
      accept: rule by which draft tokens are kept; some rules change the text, and say so.
      min_p: samples among tokens at least so probable, as a share of the most probable one.
      typical_p: samples among the tokens nearest to the expected information whose probabilities
        sum to p; 1 among all.
      epsilon_cutoff: samples among tokens at least so probable.
      eta_cutoff: the same, with a limit that falls as the entropy rises.
      repetition_penalty: divides positive logits of tokens that prompt or text has, and multiplies
        negative ones; 1 is none.
      presence_penalty: subtracted from the logits of tokens that the new text has.
      frequency_penalty: the same, for each time that it has them.
      no_repeat_ngram_size: forbids to repeat so many tokens in a row; 0 forbids nothing.
      min_new_tokens: forbids the end of a text before so many new tokens.
      bad_words: texts that no new text contains, whatever its tokens.
      bad_words_ids: sequences of ids that are never written.
      suppress_tokens: ids that are never written.
      logit_bias: {id: added to its logit}, or None.
      forced_bos_token_id: the first new token, such as a language's; None leaves it free.
      regex: regular expression that every new text matches as a whole.
      json_schema: JSON schema that every new text follows: as text, or in Python as a dict.
      grammar: grammar that every new text follows, in GBNF (llama.cpp) or in Lark's syntax.
      nesting: how often a rule of a grammar, a $ref of a schema or a JSON value of any kind may
        stand within itself; at the beginning or end of itself, as in a list, without limit.
      choices: texts of which every new text is one.
      force_words: texts that every new text contains.
      span_of_input: every new text is a part of its input, as the tokenizer writes it.
      token_healing: the last token of each prompt may be spelled otherwise, by one that goes on
        behind the cut: it is removed, and the new text begins with its characters.
      target_prefix: texts that targets of encoder-decoders begin with: one for all inputs, or one
        for each.
      logprobs: also returns the log-probability of each token and of so many alternatives, and the
        probability that top-k, top-p and their kin kept from being drawn; None returns none.
      choose: puts the n_best texts in an order, best first: by score, by mbr:METRIC, by
        rerank:PATH, by function:MODULE.NAME or by coverage:BETA (`infer --help` lists them); ""
        leaves it.
      stop: a text, or several, that ends a new text, which is cut before it; not for beams.
      search: keeps, drops and doubles samples by a judge after each segment: best, rejection:N,
        smc or puct:N (`infer --help` lists them); "" samples plainly.
      judge: gives texts so far their numbers in a search, in the forms of choose.
      judge_weight: factor of these numbers; the texts of smc have the probability that the model
        gives them times exp(judge_weight * number).
      particles: samples that a search writes at a time.
      segment_tokens: most tokens of a segment.
      segment_stop: a text, or several, that ends a segment, which keeps it.
      beam_groups: groups that the beams are divided into, each kept from the tokens of those before
        it (diverse beam search).
      diversity_penalty: subtracted from the log-probability of a token for each beam of an earlier
        group that takes it at the same step.
      dynatemp_range: the temperature of a token rises from temperature - range to temperature +
        range with the entropy of its distribution; 0 leaves it (llama.cpp's name).
      dynatemp_exponent: exponent of the entropy, as a share of the highest possible one.
      companion: second logits of the same text: of another checkpoint (model:PATH), of another
        prompt (prompt:TEXT, in which {input} stands for the input; unconditional for its last token
        alone), or of the model's own layers (layers:2,4, layers:low, layers:high); "" for none.
      combine: rule that combines them with the model's, before all other rules: guidance:1.5,
        contrast:0.1, contrast:0.1:0.5, instructive:0.3, dola:0.1, deco:0.6:0.9, switch:NATS:TOKENS;
        "" is contrast for a model, guidance for a prompt, dola for layers.
      compute: what products are computed in: auto (float32 on a CPU, else Model.dtype), float32,
        bfloat16, or int8, which quantizes weights and activations and changes the text.
      kv_cache: what keys and values are kept in: auto (the dtype of computation), or int8 or int4,
        with a scale for each token and head, which changes the text; int8:int4 is int8 for keys and
        int4 for values. checkpoints:16:512, also after one of them and a plus, keeps 512 tokens and
        the mean of every 16 before them, once the prompt is read.
      commit: policy by which a model with Model.canvas keeps tokens after each pass over a block:
        top:M, the M most probable choices; threshold:P, those at least P probable, and the most
        probable one; neighbors:P:Q:W, besides those at least Q probable within W places of one that
        is P probable; random:M, at M random places; order:M, the M leftmost; "" is threshold:0.9.
      canvas_block: tokens of its blocks; 0 takes Canvas.block.
    """

    max_new_tokens: Length = 64
    temperature: Annotated[float, Range(1e-6, also=(0.0,))] = 0.0
    top_k: CountOrZero = 0
    top_p: ShareAboveZero = 1.0
    seed: Seed = 0
    beams: Few = 1
    alpha: Annotated[float, Range(-10, 10)] = 0.6
    length_penalty: Annotated[float, Range(-10, 10)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    n_best: Few = 1
    drafter: str = "auto"
    draft_length: Annotated[int, Range(2, 64, also=(0,))] = 0
    accept: str = "exact"
    min_p: ShareBelowOne = 0.0
    typical_p: ShareAboveZero = 1.0
    epsilon_cutoff: ShareBelowOne = 0.0
    eta_cutoff: ShareBelowOne = 0.0
    repetition_penalty: Positive = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    no_repeat_ngram_size: Annotated[int, Range(0, FAR)] = 0
    min_new_tokens: LengthOrZero = 0
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[CountOrZero, ...], ...] = ()
    suppress_tokens: tuple[CountOrZero, ...] = ()
    logit_bias: dict[CountOrZero, Penalty] | None = field(default=None, hash=False)
    forced_bos_token_id: CountOrZero | None = None
    regex: str | None = None
    json_schema: None | Annotated[object, schema_text] = None
    grammar: str | None = None
    nesting: Annotated[int, Range(1, 16)] = 3
    choices: tuple[str, ...] = ()
    force_words: tuple[str, ...] = ()
    span_of_input: bool = False
    token_healing: bool = False
    target_prefix: tuple[str, ...] = ()
    logprobs: Annotated[int, Range(0, 1000)] | None = None
    choose: str = ""
    stop: str | tuple[str, ...] = ()
    search: str = ""
    judge: str = ""
    judge_weight: Annotated[float, Range(0, 1e6)] = 1.0
    particles: Few = 8
    segment_tokens: Length = 16
    segment_stop: str | tuple[str, ...] = ()
    beam_groups: Few = 1
    diversity_penalty: Annotated[float, Range(0, 100)] = 0.0
    dynatemp_range: Annotated[float, Range(0, 100)] = 0.0
    dynatemp_exponent: Positive = 1.0
    companion: str = ""
    combine: str = ""
    compute: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    kv_cache: str = "auto"
    commit: str = ""
    canvas_block: LengthOrZero = 0

    def check(self):
        for name in ("stop", "segment_stop"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        try:
            for part in self.drafter.split("+"):  # draft:SOURCE, recycling:PATH
                kind, _, source = part.partition(":")
                hub_names.check_source(source) if kind == "draft" else paths.check_path(source)
        except ValueError as error:
            raise ValueError(f"Decode.drafter: {error}") from None
        require(
            self.temperature > 0 or self.n_best <= self.beams,
            f"Decode.n_best {self.n_best} needs as many Decode.beams (now {self.beams}), or "
            "samples (temperature > 0): a greedy text is one",
        )
        require(
            self.beams == 1 or self.temperature == 0,
            "Decode.beams searches for the most probable text: it cannot also sample "
            "(temperature > 0)",
        )
        require(
            self.beams == 1 or self.drafter in ("auto", "plain"),
            f"Decode.drafter {self.drafter} drafts for one text per row; beam search (beams > 1) "
            "takes plain or auto",
        )
        idle = self.idle_filters()
        require(
            not idle,
            f"Decode.{idle and idle[0]} narrows what is sampled, and Decode.temperature 0 is "
            f"greedy: set Decode.temperature (1 samples from the model's distribution), or leave "
            f"out Decode.{idle and idle[0]}",
        )
        require(
            self.beams == 1 or self.logprobs is None,
            "Decode.logprobs are those of a text written token by token: leave out beams",
        )
        check_choice(self)
        check_search(self)
        check_beams(self)
        check_companion(self)
        parse_kv_cache(self.kv_cache)
        parse_commit(self.commit)
        self.check_tokens()
        self.check_constraints()

    def idle_filters(self) -> list[str]:
        """Fields of FILTERS that are set and change nothing, as nothing is sampled."""
        if self.temperature > 0:
            return []
        defaults = {each.name: each.default for each in fields(self)}
        return [name for name in FILTERS if getattr(self, name) != defaults[name]]

    def check_tokens(self):
        """Checks what may and must be written.

        Raises:
          ValueError: no text can satisfy it.
        """
        require(
            self.min_new_tokens < self.max_new_tokens,
            f"Decode.min_new_tokens ({self.min_new_tokens}) must be below Decode.max_new_tokens "
            f"({self.max_new_tokens}), whose last token may be the end",
        )
        for name in (
            *("bad_words", "bad_words_ids", "choices", "force_words", "stop", "segment_stop"),
        ):
            require(all(getattr(self, name)), f"Decode.{name} has an empty one")
        forbidden = {
            *self.suppress_tokens,
            *(ids[0] for ids in self.bad_words_ids if len(ids) == 1),
        }
        require(
            self.forced_bos_token_id not in forbidden,
            f"Decode.forced_bos_token_id ({self.forced_bos_token_id}) is also among "
            "Decode.suppress_tokens or Decode.bad_words_ids",
        )

    def check_constraints(self):
        """Checks what a whole text may be.

        Raises:
          ValueError: two rules contradict each other.
        """
        stated = [name for name in CONSTRAINTS if getattr(self, name) not in (None, (), False)]
        whole = [name for name in stated if name != "force_words"]
        require(
            len(whole) < 2,
            f"A text can follow one of Decode.{' and Decode.'.join(whole)}, not both",
        )
        for name in ("span_of_input", "token_healing"):
            others = [each for each in stated if each != name]
            others += ["bad_words"] if self.bad_words else []
            require(
                not getattr(self, name) or not others,
                f"Decode.{name} goes with no other rule of the whole text, and Decode."
                f"{others and others[0]} is one: leave one out",
            )
        stated += ["token_healing"] if self.token_healing else []
        require(
            not stated or not self.stop,
            f"Decode.stop may cut a text that Decode.{stated and stated[0]} needs whole: leave one "
            "out",
        )
        others = [name for name in FORBIDDING if getattr(self, name) not in (None, 0, ())]
        require(
            not stated or not others,
            f"Decode.{others and others[0]} may forbid every text that Decode."
            f"{stated and stated[0]} allows: leave one out",
        )
