# SPDX-License-Identifier: Apache-2.0
"""Pipelines as transformers had them before version 5: summarization, translation, text to text.

The arguments have transformers' names and meanings; fields of config.Decode are taken too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints import sources
from t5x_lite.checkpoints.formats.huggingface import kept_fields
from t5x_lite.evaluation.arguments import list_texts
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.evaluation.prediction import Prediction
from t5x_lite.tokenizers import languages
from t5x_lite.utils.nearest import suggest

# Tasks by a pattern of their names, with the field of their results.
RESULTS = {
    r"text2text-generation": "generated",
    r"summarization": "summary",
    r"translation(_\w+_to_\w+)?": "translation",
}
# Names of transformers for fields of config.Decode that mean the same.
RENAMED = {"num_beams": "beams", "num_return_sequences": "n_best"}
# Arguments that change no text here.
WITHOUT_EFFECT = {"use_cache", "return_dict_in_generate"}
# Fields of generation_config.json that pipelines take; config.Decode follows others for all uses.
GENERATION = ("num_beams", "length_penalty", "early_stopping", "max_length", "min_length")
# Defaults of a beam search there.
BEAMS = {"length_penalty": 1.0, "early_stopping": False}
# transformers samples among so many tokens, and cuts inputs of a tokenizer without a length there.
TOP_K, INPUT_LENGTH = 50, 512
# Lengths of tokenizers that cut no text are 1e30.
LONGEST = 10**6
# What clean_up_tokenization_spaces replaces.
SPACES = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")},
}


class TextPipeline:
    """Texts to texts, with the results of transformers' pipelines: a list of dicts.

    Args:
      task: "text2text-generation", "summarization", "translation" or "translation_en_to_de".
      predictor: an encoder-decoder with its weights and vocabularies.
      settings: makes a config.Decode of fields by name, as `interactive.Session.settings` does.
      parameters: the model's own arguments and prefix of each task (task_specific_params of its
        config.json), and those of all tasks under "".
      defaults: arguments of every call, which a call can replace.

    Raises:
      ValueError: there is no such task, or the model has no encoder or no decoder.
    """

    def __init__(
        self,
        task: str,
        predictor: Predictor,
        settings: Callable[[dict[str, Any]], config.Decode],
        parameters: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ):
        self.task, self.predictor, self.settings = task, predictor, settings
        self.result = result_name(task)
        config.require(
            predictor.cfg.layout == "encoder_decoder",
            f"pipeline({task!r}) is for an encoder-decoder: session.generate continues a text",
        )
        of_task = parameters.get(task)
        of_task = dict(of_task) if isinstance(of_task, Mapping) else {}
        of_task = parameters.get("", {}) | of_task
        self.prefix = str(of_task.pop("prefix", None) or "")
        self.defaults = of_task | dict(defaults)

    def __call__(self, texts: str | Sequence[str], **arguments: Any) -> list[Any]:
        """Writes a text for each text.

        Args:
          texts: a text or a list of texts; the model's prefix for the task is put before each.
          **arguments: transformers' arguments, among them max_length and min_length, which count
            the token that decoders begin with, src_lang and tgt_lang, the codes of languages in the
            tokenizer; fields of config.Decode, such as drafter.

        Returns:
          a list of {"summary_text": ...} ({"generated_text": ...}, {"translation_text": ...}), one
          for each text; with num_return_sequences above one, for a list of texts a list of lists.

        Raises:
          ValueError: an argument is unknown, or contradicts another one.
        """
        arguments = self.defaults | arguments
        output = {
            name: arguments.pop(name, default)
            for name, default in (
                ("return_text", True),
                ("return_tensors", False),
                ("clean_up_tokenization_spaces", False),
            )
        }
        truncated = arguments.pop("truncation", None) not in (None, False, "do_not_truncate")
        predictor = self.predictor
        before = predictor.batch_size, predictor.inputs, predictor.targets
        predictor.batch_size = arguments.pop("batch_size", None) or predictor.batch_size
        try:
            if first := self.set_languages(arguments):
                arguments["forced_bos_token_id"] = first
            decode = self.settings(translate_arguments(arguments))
            ids = self.predictor.encode_inputs([self.prefix + each for each in list_texts(texts)])
            ids = [self.truncate(row) for row in ids] if truncated else ids
            predictions = self.predictor.predict_ids(ids, decode)
        finally:
            predictor.batch_size, predictor.inputs, predictor.targets = before
        results = [self.describe(each, **output) for each in predictions]
        flat = isinstance(texts, str) or all(len(each) == 1 for each in results)
        return [each for result in results for each in result] if flat else results

    def set_languages(self, arguments: dict[str, Any]) -> int | None:
        """Takes src_lang and tgt_lang out of the arguments of a call and sets them, or else the
        languages in the task's name, if the tokenizer knows them.

        Returns:
          The id that every text begins with; None for none.

        Raises:
          ValueError: an argument is no language of the tokenizer.
        """
        named = re.fullmatch(r"translation_([a-zA-Z]+)_to_([a-zA-Z]+)", self.task)
        pair = self.predictor.inputs, self.predictor.targets
        source, target = languages.find_languages(pair, *named.groups()) if named else (None, None)
        source = arguments.pop("src_lang", None) or source
        target = arguments.pop("tgt_lang", None) or target
        pair = languages.set_languages(pair, source, target)
        self.predictor.inputs, self.predictor.targets = pair
        return None if target is None else pair[1].bos

    def truncate(self, ids: list[int]) -> list[int]:
        """Ids of an input without those that are too many for the tokenizer; the end stays."""
        longest = getattr(self.predictor.inputs, "origin", {}).get("model_max_length")
        most = longest if isinstance(longest, int) and longest < LONGEST else INPUT_LENGTH
        return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]

    def describe(
        self,
        prediction: Prediction,
        return_text: bool,
        return_tensors: bool,
        clean_up_tokenization_spaces: bool,
    ) -> list[dict[str, Any]]:
        """The results for one input.

        Args:
          prediction: what was predicted for it.
          return_text: the results have texts.
          return_tensors: the results have ids in place of texts.
          clean_up_tokenization_spaces: spaces before punctuation are left out of texts.
        """
        if return_tensors:
            return [{f"{self.result}_token_ids": ids} for ids in prediction.tokens]
        if not return_text:
            return [{} for _ in prediction.texts]
        clean = remove_spaces if clean_up_tokenization_spaces else str
        return [{f"{self.result}_text": clean(text)} for text in prediction.texts]


def result_name(task: str) -> str:
    """The field of a task's results; raises ValueError for a task that there is not."""
    for pattern, name in RESULTS.items():
        if re.fullmatch(pattern, task):
            return name
    tasks = ("text2text-generation", "summarization", "translation", "translation_en_to_de")
    raise ValueError(f"There is no pipeline {task!r} here: {suggest(task, tasks)}")


def task_parameters(source: str) -> dict[str, Any]:
    """The arguments and prefixes of tasks (task_specific_params) of a checkpoint, and under "" the
    arguments for all tasks in its generation_config.json."""
    kept = kept_fields.find_kept(sources.locate_source(source, weights=False).path)
    tasks = kept.config.get("task_specific_params")
    of_all = {name: kept.generation[name] for name in GENERATION if name in kept.generation}
    return (tasks if isinstance(tasks, dict) else {}) | {"": of_all}


def translate_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' generate as fields of config.Decode."""
    fields: dict[str, Any] = {
        RENAMED.get(name, name): value
        for name, value in arguments.items()
        if name not in WITHOUT_EFFECT
    }
    for theirs, ours in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = fields.pop(theirs, None)
        if length is not None and fields.get(ours) is None:
            # Theirs count the token that decoders begin with.
            fields[ours] = max(int(ours == "max_new_tokens"), length - 1)
    samples = fields.pop("do_sample", None)
    if samples:
        fields = {"temperature": 1.0, "top_k": TOP_K} | fields
    elif samples is not None or (fields.get("beams") or 1) > 1:
        fields["temperature"] = 0.0
    if (fields.get("beams") or 1) > 1 and "alpha" not in fields:
        fields = BEAMS | fields
    return fields


def remove_spaces(text: str) -> str:
    """A text without the spaces that tokenizers leave before punctuation and English endings."""
    for before, after in SPACES.items():
        text = text.replace(before, after)
    return text
