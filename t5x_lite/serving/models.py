# SPDX-License-Identifier: Apache-2.0
"""ServedModels of a server: a session and its engine by name."""

import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.cli.options import attach_named
from t5x_lite.decoding.request import bucket_length
from t5x_lite.evaluation import pipeline
from t5x_lite.serving.completion import TextRequest
from t5x_lite.serving.engine import Engine, EngineLimits
from t5x_lite.serving.errors import ApiError
from t5x_lite.serving.row_text import LEAST_BUCKET, LEAST_WIDTH, SELDOM
from t5x_lite.serving.server_limits import ServerLimits
from t5x_lite.tokenizers import languages

# Seconds that engines have to end: a compilation cannot be interrupted.
LAST_SECONDS = 5
# Fields of config.Decode that shared rows do not have: a checkpoint may set them for itself.
ONE_ROW = {
    name: getattr(config.Decode, name)
    for name in (
        *("beams", "n_best", "length_penalty", "early_stopping", "alpha", "choose"),
        *("beam_groups", "diversity_penalty"),
    )
}


# Fields of config.Decode that are for sampling alone.
GREEDY = {
    name: getattr(config.Decode, name)
    for name in (*SELDOM, "top_k", "top_p", "typical_p", "dynatemp_exponent")
}


class TextTask(NamedTuple):
    """A task of an encoder-decoder.

    Attributes:
      prefix: text before every input.
      inputs: vocabulary of inputs.
      first: id that every text begins with; None for none.
      max_new_tokens: most new tokens by the checkpoint's own settings; None for none.
    """

    prefix: str
    inputs: Any
    first: int | None
    max_new_tokens: int | None


class ServedModel:
    """A model of a server.

    Attributes:
      name: its id in requests.
      session: the model with its weights and vocabularies.
      decode: settings of texts by default.
      engine: writes its texts, and those of the same model with other adapters.
      adapter: name of its adapter in the engine; "" without one.
      parameters: prefixes and settings of tasks (task_specific_params of its config.json).
    """

    def __init__(
        self,
        name: str,
        session: Any,
        limits: ServerLimits,
        adapters: Mapping[str, Any] | None = None,
    ):
        """Starts the engine.

        Args:
          name: its id in requests.
          session: the model.
          limits: limits of the server.
          adapters: sessions of the model with adapters, by name; None for none.
        """
        self.name, self.session = name, session
        sizes = engine_limits(session.predictor.cfg, limits)
        most = min(session.decode.max_new_tokens, sizes.max_new_tokens)
        self.decode = dataclasses.replace(session.decode, **ONE_ROW, max_new_tokens=most)
        predictors = {name: each.predictor for name, each in (adapters or {}).items()}
        self.engine, self.adapter = Engine(session.predictor, sizes, predictors), ""
        self.parameters: dict[str, Any] = {}
        self.embedding = 0

    def with_adapter(self, name: str, session: Any) -> "ServedModel":
        """Returns the model with one of the engine's adapters: the same rows write its texts.

        Args:
          name: name of the adapter, its id in requests.
          session: the model with it.
        """
        other = copy.copy(self)
        other.name, other.session, other.adapter, other.embedding = name, session, name, 0
        return other

    def warm_up(self, all_widths: bool = False) -> None:
        """Writes texts, so that programs are compiled before the first request.

        Args:
          all_widths: inputs of all widths, texts of each class of lengths, greedy and sampled; else
            one text.
        """
        cfg, limits = self.session.predictor.cfg, self.engine.limits
        if cfg.readout is not None or cfg.decoder is None or not cfg.causal_decoder:
            return
        widths, decodes = [1], [self.decode]
        if all_widths:
            start = cfg.encoder is None and cfg.add_bos
            widths = [each - start for each in list_widths(limits.max_inputs + start)]
            lengths = {self.decode.max_new_tokens, min(LEAST_WIDTH, limits.max_new_tokens)}
            decodes = [
                dataclasses.replace(self.decode, max_new_tokens=length, temperature=temperature)
                for length in sorted(lengths)
                for temperature in (0.0, 1.0)
            ]
        for width, decode in itertools.product(widths, decodes):
            if decode.temperature == 0:
                decode = dataclasses.replace(decode, **GREEDY)
            text = self.engine.submit(TextRequest([cfg.decoder_start_token_id] * width, decode))
            for _ in text:
                text.cancel()
            if text.error is not None:
                raise text.error

    def find_task(self, kind: str, source: str | None, target: str | None) -> TextTask:
        """The task of a route.

        Args:
          kind: "translation" or "summarization".
          source: language of the inputs; None for none.
          target: language to write; None for none.

        Raises:
          ApiError: the model is not an encoder-decoder, or does not know the languages.
        """
        predictor = self.session.predictor
        if predictor.cfg.layout != "encoder_decoder":
            raise ApiError(
                400,
                f"{self.name} is not an encoder-decoder: /v1/completions continues a text",
                param="model",
            )
        name = f"{kind}_{source}_to_{target}" if source and target else kind
        of_task = self.parameters.get(name)
        of_task = of_task if isinstance(of_task, dict) else {}
        pair, first = (predictor.inputs, predictor.targets), None
        if (source or target) and not of_task:
            try:
                pair = languages.set_languages(pair, source, target)
            except ValueError as error:
                raise ApiError(400, str(error), param="target_language") from None
            first = None if target is None else pair[1].bos
        longest = of_task.get("max_length")
        # transformers' length counts the token that decoders begin with.
        most = longest - 1 if isinstance(longest, int) and longest > 1 else None
        return TextTask(str(of_task.get("prefix") or ""), pair[0], first, most)

    def embed(self, texts: Sequence[str], prompt: str | None) -> Any:
        """Starts to compute vectors of texts, between the blocks of the engine.

        Args:
          texts: the texts.
          prompt: "query", "document" or None, as `Session.embed` has it.

        Returns:
          A future of float32 [n d].
        """
        return self.engine.call(lambda: self.session.embed(list(texts), prompt=prompt))


class ServedModels:
    """ServedModels by name, loaded in one thread, as a mesh belongs to a thread.

    Attributes:
      limits: limits of the server.
      served: models by name.
      sources: names by the --checkpoint that they were loaded from.
    """

    def __init__(self, limits: ServerLimits):
        self.limits = limits
        self.served: dict[str, ServedModel] = {}
        self.sources: dict[str, str] = {}

    def load(
        self,
        name: str,
        source: str,
        all_widths: bool = False,
        adapters: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Loads a checkpoint and writes texts, so that its programs are compiled.

        Args:
          name: its name in requests.
          source: what `interactive.load` takes.
          all_widths: of inputs of all widths, see `ServedModel.warm_up`.
          adapters: name in requests and source of each adapter.

        Raises:
          ValueError: it cannot be loaded, or an adapter is of another model.
        """
        from t5x_lite import interactive

        served = self.add(name, lambda: interactive.load(source), adapters)
        parameters = pipeline.task_parameters(source)
        for each in (served, *(self.served[adapter] for adapter, _ in adapters)):
            each.parameters = parameters
        self.sources[source] = name
        served.warm_up(all_widths)

    def add(
        self, name: str, make: Callable[[], Any], adapters: Sequence[tuple[str, str]] = ()
    ) -> ServedModel:
        """Adds a session, and the same model with adapters.

        Args:
          name: its name in requests.
          make: returns the session; runs in a thread of its own.
          adapters: name in requests and source of each adapter.
        """

        def serve() -> list[ServedModel]:
            session = make()
            sessions = attach_named(session, adapters)
            served = ServedModel(name, session, self.limits, sessions)
            return [served, *(served.with_adapter(*each) for each in sessions.items())]

        with ThreadPoolExecutor(1) as thread:
            models = thread.submit(serve).result()
        self.served |= {each.name: each for each in models}
        return models[0]

    def get(self, name: str) -> ServedModel:
        """The model of a name or a --checkpoint; raises ApiError where there is none."""
        served = self.served.get(self.sources.get(name, name))
        if served is None:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r}: choose from {', '.join(self.served)}",
                param="model",
                code="model_not_found",
            )
        return served

    def cancel_all(self) -> None:
        """Ends all texts: their requests are answered by an error."""
        for each in self.served.values():
            each.engine.cancel_all()

    def is_busy(self) -> bool:
        """Ends the engines; true if one still computes after a few seconds."""
        threads = [
            threading.Thread(target=each.engine.close, args=(False,), daemon=True)
            for each in self.served.values()
            if not each.adapter
        ]
        until = time.monotonic() + LAST_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        return any(thread.is_alive() for thread in threads)


def list_widths(most: int) -> list[int]:
    """The widths to which inputs are padded, up to the one of `most` ids."""
    widths = {bucket_length(size, LEAST_BUCKET) for size in range(1, most + 1)}
    return sorted(min(width, most) for width in widths)


def engine_limits(cfg: config.Model, limits: ServerLimits) -> EngineLimits:
    """Sizes of a model's engine: those of the server, or fewer learned positions."""
    inputs, new = limits.max_input_tokens, limits.max_new_tokens
    if cfg.encoder is not None:
        inputs = min(inputs, cfg.encoder.max_length or inputs)
    if cfg.decoder is not None and cfg.decoder.max_length is not None:
        positions = cfg.decoder.max_length
        new = min(new, positions if cfg.encoder is not None else max(positions // 2, 1))
        inputs = inputs if cfg.encoder is not None else min(inputs, max(positions - new, 1))
    return EngineLimits(
        rows=limits.rows,
        max_inputs=inputs,
        max_new_tokens=new,
        queue=limits.queue,
        prefix_bytes=limits.prefix_cache * 2**20,
    )
