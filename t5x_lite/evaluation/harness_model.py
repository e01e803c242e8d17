# SPDX-License-Identifier: Apache-2.0
"""Models as the LM class of EleutherAI's lm-evaluation-harness (package lm_eval).

Texts are tokenized, cut and scored as the harness's backend of transformers does
(lm_eval/models/huggingface.py): a decoder-only model reads context and continuation as one text; an
encoder-decoder reads the context in its encoder, and its decoder is scored on the continuation.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.cli.progress import Progress
from t5x_lite.decoding.steering.stop_strings import find_stops
from t5x_lite.evaluation.arguments import merge_options
from t5x_lite.evaluation.pipeline import translate_arguments
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.tokenizers import chat
from t5x_lite.utils.extras import install_command

# Tokens of a window, and new tokens of a text, where neither model nor task says how many.
MAX_LENGTH, MAX_NEW_TOKENS = 2048, 256


def import_harness(part: str) -> ModuleType:
    """A module of the lm_eval package; ValueError with the remedy where it is not installed."""
    try:
        return importlib.import_module(f"lm_eval.{part}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The lm-evaluation-harness is not installed: {install_command('lm_eval')}"
        ) from error


class TokenPair(NamedTuple):
    """A context and what follows it.

    Attributes:
      context: ids of the context, with the token that begins a text.
      continuation: ids that are scored.
    """

    context: list[int]
    continuation: list[int]


class HarnessModel(import_harness("api.model").TemplateLM):
    """A checkpoint as the harness's LM.

    Attributes:
      predictor: the model with its weights and vocabularies.
      decode: how texts are written where a task does not say.
      max_length: most tokens of a context with its continuation; of an encoder-decoder, of each.
      tokenizer_name: name of the checkpoint.
    """

    def __init__(
        self,
        predictor: Predictor,
        decode: config.Decode,
        template: chat.ChatTemplate | None = None,
        max_length: int = MAX_LENGTH,
        name: str = "t5x_lite",
    ):
        super().__init__()
        self.predictor, self.decode, self.template = predictor, decode, template
        self.max_length, self.name = max_length, name
        config.require(
            predictor.cfg.decoder is not None,
            f"{name} is an encoder alone, which gives texts no probability: the harness measures "
            "models with a decoder",
        )
        # Where a context ends with eos, it is a source of its own, as an encoder's.
        alone = predictor.cfg.encoder is None and not predictor.ended
        self.backend = "causal" if alone else "seq2seq"

    @property
    def tokenizer_name(self) -> str:
        return self.name

    @property
    def eot_token_id(self) -> int:
        return self.predictor.targets.eos

    @property
    def prefix_token_id(self) -> int:
        """The id that stands for an empty context: bos where the tokenizer has one, or else eos."""
        origin = getattr(self.predictor.inputs, "origin", None)
        if origin:
            name = origin.get("bos_token")
            name = name["content"] if isinstance(name, dict) else name
            token = self.predictor.inputs.token(name) if name else None
            return self.predictor.inputs.eos if token is None else token
        if self.predictor.cfg.encoder is None:
            return self.predictor.cfg.decoder_start_token_id
        return self.predictor.inputs.eos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of a text.

        Args:
          string: the text.
          add_special_tokens: with the tokens that begin and end an input; None adds them unless the
            text begins with the first of them written out.
          **unused: options of other models.
        """
        vocabulary, cfg = self.predictor.inputs, self.predictor.cfg
        ids = list(vocabulary.encode(string))
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        if not add_special_tokens:
            return ids
        if cfg.encoder is None:
            start = [cfg.decoder_start_token_id] if cfg.add_bos else []
            return [*start, *ids, *([vocabulary.eos] if self.predictor.ended else [])]
        start = [] if vocabulary.bos is None else [vocabulary.bos]
        return [*start, *ids, *([vocabulary.eos] if vocabulary.ends else [])]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and that greedy decoding would write them.

        Args:
          requests: of each the texts, or None, and the ids of context and continuation.
          **options: disable_tqdm leaves out the progress bar.
        """
        pairs = [self.fit_pair(TokenPair(*ids)) for _, *ids in requests]
        with Progress("log-likelihoods", len(pairs)) as progress:
            answers = self.score_pairs(pairs, progress)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def fit_pair(self, pair: TokenPair) -> TokenPair:
        """Cuts the left of a context, so that the model reads no more than `max_length` tokens.

        Raises:
          ValueError: the continuation alone is longer, or empty.
        """
        size = len(pair.continuation)
        config.require(
            0 < size <= self.max_length,
            f"A continuation has {size} tokens, and {self.name} is scored on 1 to "
            f"{self.max_length}: set max_length in model_args",
        )
        # The last token is scored, not read.
        most = self.max_length + 1 - size if self.backend == "causal" else self.max_length
        return pair._replace(context=pair.context[-most:])

    def score_pairs(
        self, pairs: Sequence[TokenPair], on_progress: Callable[[int], None]
    ) -> list[tuple[float, bool]]:
        """Scores continuations after their contexts.

        Args:
          pairs: ids that fit.
          on_progress: called with the number of pairs done.
        """
        scored, done = {}, 0
        for predictor, places, contexts in self.by_start([pair.context for pair in pairs]):
            targets = [pairs[place].continuation for place in places]

            def report(count: int, before: int = done) -> None:
                on_progress(before + count)

            for place, each in zip(
                places, predictor.score_ids(contexts, targets, report), strict=True
            ):
                scored[place] = each.log_probability, each.greedy
            done += len(places)
        return [scored[place] for place in range(len(pairs))]

    def by_start(
        self, rows: Sequence[list[int]]
    ) -> Iterator[tuple[Predictor, list[int], list[list[int]]]]:
        """Yields the predictor that reads contexts as they are, with their places and ids.

        A decoder that begins every prompt with a start token adds it itself; a context that was cut
        has none.
        """
        cfg = self.predictor.cfg
        if cfg.encoder is not None or not cfg.add_bos:
            if rows:
                yield self.predictor, list(range(len(rows))), list(rows)
            return
        begun = [row[:1] == [cfg.decoder_start_token_id] for row in rows]
        bare = self.predictor.with_config(dataclasses.replace(cfg, add_bos=False))
        for predictor, wanted in ((self.predictor, True), (bare, False)):
            places = [place for place, has_start in enumerate(begun) if has_start == wanted]
            if places:
                yield predictor, places, [rows[place][wanted:] for place in places]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in self.rolling_windows(*request.args):
                windows.append(window)
                owners.append(owner)
        totals = [0.0] * len(requests)
        with Progress("windows of text", len(windows)) as progress:
            for owner, (total, _) in zip(owners, self.score_pairs(windows, progress), strict=True):
                totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def rolling_windows(self, text: str) -> list[TokenPair]:
        """The windows of a text, each token of which is scored once.

        An encoder reads the token that stands for an empty context, or the one before the window.
        """
        utils = import_harness("utils")
        cfg, vocabulary = self.predictor.cfg, self.predictor.inputs
        ids = self.tok_encode(text)
        if cfg.encoder is None and cfg.decoder_start_token_id == vocabulary.pad:
            # T5's start token is padding, which is no token of a text.
            ids = self.tok_encode(text, add_special_tokens=False)
        windows = utils.get_rolling_token_windows(
            token_list=ids,
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [TokenPair(*utils.make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts written after contexts, cut before the first of their stop texts."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(place)
        texts: dict[int, str] = {}
        with Progress("texts", len(requests)) as progress:
            for places in groups.values():
                options = requests[places[0]].args[1]
                contexts = [requests[place].args[0] for place in places]

                def report(count: int, before: int = len(texts)) -> None:
                    progress(before + count)

                written = self.write_texts(contexts, options, report)
                texts |= dict(zip(places, written, strict=True))
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[place])
        return [texts[place] for place in range(len(requests))]

    def write_texts(
        self,
        contexts: Sequence[str],
        options: Mapping[str, Any],
        on_progress: Callable[[int], None],
    ) -> list[str]:
        """Writes a text after each context.

        Args:
          contexts: the contexts.
          options: generation_kwargs of the task.
          on_progress: called with the number of contexts done.
        """
        decode, stop = self.decode_of(options)
        most = self.max_length - (decode.max_new_tokens if self.backend == "causal" else 0)
        config.require(
            most > 0,
            f"max_gen_toks {decode.max_new_tokens} leaves no room for a context in the "
            f"{self.max_length} tokens of {self.name}: set max_length in model_args",
        )
        rows = [self.tok_encode(context)[-most:] for context in contexts]
        tokens, done = {}, 0
        for predictor, places, ids in self.by_start(rows):

            def report(count: int, before: int = done) -> None:
                on_progress(before + count)

            predictions = predictor.predict_ids(ids, decode, rows=places, on_progress=report)
            done += len(places)
            tokens |= {
                place: each.tokens[0] for place, each in zip(places, predictions, strict=True)
            }
        written = [self.predictor.targets.decode(tokens[place]) for place in range(len(rows))]
        return [cut_before(text, stop) for text in written]

    def decode_of(self, options: Mapping[str, Any]) -> tuple[config.Decode, list[str]]:
        """Config by which a task's texts are written, and the texts that end them.

        Raises:
          ValueError: an option is unknown, or out of range.
        """
        harness_models = import_harness("models.utils")
        fields = dict(harness_models.normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
        stop = harness_models.handle_stop_sequences(fields.pop("until", None), eos=None)
        stop = [text for text in stop if text]
        fields["max_new_tokens"] = fields.pop("max_gen_toks")
        fields.pop("max_length", None)
        temperature = fields.pop("temperature", None)
        fields = translate_arguments(fields)
        if temperature is not None and fields.get("beams", 1) == 1:
            fields["temperature"] = temperature
        decode = merge_options(self.decode, fields)
        return self.with_stop(decode, stop), stop

    def with_stop(self, decode: config.Decode, stop: Sequence[str]) -> config.Decode:
        """A config by which rows end at their stop texts, where beams and tokenizer allow that.

        Texts are cut afterwards in any case, so it changes no text and only saves time.
        """
        if not stop or decode.beams > 1:
            return decode
        stopped = dataclasses.replace(decode, stop=tuple(stop))
        try:
            find_stops(stopped, self.predictor.targets, self.predictor.cfg.vocab)
        except ValueError:
            return decode
        return stopped

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text.

        Raises:
          ValueError: the model has no chat template, or it refuses the conversation.
        """
        config.require(self.template is not None, f"{self.name} has no chat template: leave it out")
        template, tokens = self.template
        text = chat.render_chat(
            template, chat_history, add_generation_prompt=add_generation_prompt, **tokens
        )
        if add_generation_prompt:
            return text
        # The last message is to be continued: what the template puts after it is left out.
        last = chat_history[-1]["content"]
        return text[: text.rindex(last.strip()) + len(last.strip())]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template; "" without one, None where none is wanted."""
        if not chat_template:
            return None
        return "" if self.template is None else self.template.template


def cut_before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    for end in stop:
        text = text.split(end)[0]
    return text
