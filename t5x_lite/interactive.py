# SPDX-License-Identifier: Apache-2.0
"""Trained models in notebooks and scripts: load one, then generate, score and inspect.

    from t5x_lite import interactive

    g2p = interactive.load("runs/g2p")
    g2p.generate("photograph")                              # 'F OW T AH G R AE F'
    g2p.generate(["cat", "hats"], beams=4, n_best=2)        # two texts for each
    g2p.generate("cat", temperature=1.0, n_best=5, seed=7)  # five draws, the same for a seed
    g2p.search("cat", judge=my_score, search="smc")         # samples guided by a function of yours
    g2p.score("cat", "K AE T")                              # log-probability, in nats
    g2p.choose("cat", ["K AE T", "D AO G"]).best            # number of the most likely one
    g2p.embed(["cat", "hats"])                              # a vector for each, numpy [2 d]
    for piece in g2p.stream("photograph"):                  # the same text, streamed
        print(piece, end="", flush=True)
    g2p.explain("photograph").lens                          # logit lens: predictions of each layer
    g2p.train_step(["jaxon"], ["JH AE K S AH N"])           # one step of Adam: the loss before it

A Hugging Face folder, a .gguf file or a model of the hub is loaded without conversion:

    flan = interactive.load("google/flan-t5-small")
    smol = interactive.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    smol.generate("The capital of France is", max_new_tokens=32)
    smol.chat("What is the capital of France?")             # with the model's own chat template

Importing this module imports neither JAX nor TensorFlow; loading a run never imports TensorFlow.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.config.checked import Count, CountOrZero, Positive
from t5x_lite.evaluation.arguments import (
    check_argument,
    check_callback,
    check_messages,
    list_pairs,
    list_texts,
    merge_options,
    predict_texts,
    takes_decode_options,
)


class Session:
    """A model with its weights and vocabularies.

    Args:
      predictor: `evaluation.predict.Predictor`, with the model, its weights and its vocabularies.
      decode: default options of `generate`.
      step: training step of the weights.
      template: its chat template (`tokenizers.chat.ChatTemplate`); None for a model without one.
      source: what was loaded, as `print` shows it.
    """

    def __init__(
        self,
        predictor: Any,
        decode: config.Decode,
        step: int = 0,
        template: Any = None,
        source: str = "a model",
    ):
        self.predictor, self.decode, self.step = predictor, decode, step
        self.template, self.source, self.learner = template, source, None

    def __repr__(self) -> str:
        """Returns what was loaded: source, family and size of the model, dtype, step."""
        from t5x_lite.checkpoints import model_card

        parts = model_card.summarize_model(self.predictor.cfg, self.predictor.params)
        parts = [*parts, f"step {self.step:,}", *["chat template"] * (self.template is not None)]
        return f"<Session of {self.source}: {', '.join(parts)}>"

    @takes_decode_options
    def generate(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Generates a text for a text, a list for a list; with n_best, lists of texts.

        `predictor.tally` counts tokens per forward pass.

        Args:
          texts: a text or a list of texts.
          **options: fields of config.Decode; None for that of the session's `decode`.

        Raises:
          ValueError: texts are not texts, an unknown option, or options that contradict each other.
        """
        predictions = self.predict(texts, **options)
        several = self.settings(options).n_best > 1
        listed = [predictions] if isinstance(texts, str) else predictions
        results = [each.texts if several else each.texts[0] for each in listed]
        return results[0] if isinstance(texts, str) else results

    def set_languages(self, source: str | None = None, target: str | None = None) -> None:
        """Sets the languages of a translation by their codes in its tokenizer (fr, fra_Latn);
        raises ValueError for another code."""
        from t5x_lite.tokenizers import languages

        reader = self.predictor
        pair = languages.set_languages((reader.inputs, reader.targets), source, target)
        reader.inputs, reader.targets = pair
        if target is not None:
            self.decode = dataclasses.replace(self.decode, forced_bos_token_id=pair[1].bos)

    @takes_decode_options
    def predict(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Generates texts with scores and ids, as `evaluation.prediction.Prediction`; with
        Model.readout predicts labels, a number or spans, as `evaluation.readouts` has them.

        Args:
          texts: a text or a list of texts.
          **options: fields of config.Decode; None for that of the session's `decode`.

        Raises:
          ValueError: texts are not texts, an unknown option, or options that contradict each other.
        """
        predictions = predict_texts(self.predictor, list_texts(texts), options, self.settings)
        return predictions[0] if isinstance(texts, str) else predictions

    @takes_decode_options
    def search(self, texts: str | Sequence[str], judge: Any, **options: Any) -> Any:
        """Searches among samples by a judge, and returns as `predict`.

        Rows are stopped after each segment, judged, dropped or doubled; `utilities` are what the
        judge says of the texts.

        Args:
          texts: a text or a list of texts.
          judge: a function (input, texts so far) -> a number for each, higher is better, minus
            infinity to drop it; or a name, as Decode.judge.
          **options: fields of config.Decode; None for that of the session's `decode`.

        Raises:
          ValueError: texts are not texts, an unknown option, or options that contradict each other.
        """
        from t5x_lite.evaluation.search import name_judge

        judge = name_judge(self.predictor, judge)
        samples = {"search": "smc", "temperature": self.decode.temperature or 1.0}
        return self.predict(texts, **samples | options | {"judge": judge})

    @takes_decode_options
    def lattice(self, text: str, *, merged: int = 3, **options: Any) -> Any:
        """Searches with beams, and returns all texts on the way as a `decoding.lattice.Lattice`.

        Args:
          text: the input.
          merged: texts that agree in so many last tokens are merged.
          **options: fields of config.Decode, beams among them.
        """
        from t5x_lite.evaluation import search

        (text,) = list_texts(text, one=True)
        merged = check_argument("merged", merged, Count)
        return search.search_lattice(self.predictor, text, self.settings(options), merged)

    def extract(self, input: str, text: str, longest: int = 8) -> Any:
        """Scores the spans of a text as outputs for an input, exactly; returns
        `evaluation.extraction.Span` of every one, the most probable first.

        Args:
          input: input of the model.
          text: the text.
          longest: most tokens of a span.
        """
        from t5x_lite.evaluation import extraction

        longest = check_argument("longest", longest, Count)
        (input,), (text,) = list_texts(input, one=True), list_texts(text, one=True)
        return extraction.score_spans(self.predictor, input, text, longest)

    @takes_decode_options
    def stream(self, text: str, *, every: int = 4, **options: Any) -> Iterator[str]:
        """Yields the text of `generate` piece by piece.

        A piece may be empty: bytes of an incomplete character wait for the next piece.

        Args:
          text: the input.
          every: number of forward passes per piece.
          **options: fields of config.Decode; None for that of the session's `decode`.

        Raises:
          ValueError: beam search, which has its text only at the end, or an unknown option.
        """
        from t5x_lite.evaluation import streaming

        (text,) = list_texts(text, one=True)
        every = check_argument("every", every, Count)
        pieces = streaming.stream_text(self.predictor, text, self.settings(options), every)
        return (piece.text for piece in pieces)

    @takes_decode_options
    def chat(self, messages: str | Sequence[dict[str, str]], **options: Any) -> Any:
        """Answers a question, or a conversation; with n_best, returns a list of answers.

        Args:
          messages: a question, or a list such as [{"role": "user", "content": "..."}].
          **options: fields of config.Decode; None for that of the session's `decode`.

        Raises:
          ValueError: the model has no chat template, or the template rejects these messages.
        """
        return self.generate(self.prompt(messages), **options)

    def prompt(self, messages: str | Sequence[dict[str, str]]) -> str:
        """Formats messages with the model's chat template: the input of `chat`."""
        from t5x_lite.tokenizers import chat

        if self.template is None:
            raise ValueError("The model has no chat template: give generate the text to continue")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        check_messages(messages)
        template, tokens = self.template
        return chat.render_chat(template, messages, add_generation_prompt=True, **tokens)

    def score(self, inputs: str | Sequence[str], targets: str | Sequence[str]) -> Any:
        """Log-probability in nats of each target given its input, or that both belong together
        (Readout.matching); a float for a single pair."""
        from t5x_lite.evaluation import embed

        pairs = list_pairs("score", inputs, targets)
        scores = embed.score_pairs(self.predictor.for_compute(self.decode.compute), *pairs)
        return scores[0] if isinstance(inputs, str) else scores

    def choose(self, inputs: Any, choices: Any, normalize: str = "none", prior: str = "") -> Any:
        """Finds the most likely choice; Args: inputs, choices, normalize and prior are those of
        `evaluation.multiple_choice.choose`."""
        from t5x_lite.evaluation import multiple_choice

        return multiple_choice.choose(self.predictor, inputs, choices, normalize, prior)

    def embed(
        self,
        texts: str | Sequence[str],
        pooling: str | None = None,
        on_progress: Any = None,
        prompt: str | None = None,
    ) -> Any:
        """Embeds texts as float32 vectors [n d], or one text as [d].

        Args:
          texts: a text or a list of texts.
          pooling: "mean", "first" or "last" token; None for the readout's own, or else the mean.
          on_progress: callback with the number of texts that are done; None for no reports.
          prompt: "query" or "document", whose prompt of the readout begins each text; or None.

        Raises:
          ValueError: texts are not texts, or an unknown pooling.
        """
        from t5x_lite.evaluation import embed

        check_argument("pooling", pooling, str | None)
        check_argument("prompt", prompt, str | None)
        check_callback("on_progress", on_progress)
        reader = self.predictor.for_compute(self.decode.compute)
        vectors = embed.embed(reader, list_texts(texts), pooling, on_progress, prompt)
        return vectors[0] if isinstance(texts, str) else vectors

    @takes_decode_options
    def explain(
        self, input: str, target: str | None = None, *, top: int = 5, **options: Any
    ) -> Any:
        """Analyzes the model on input and target, or on the target that it generates.

        Returns an `analysis.Explanation`, whose views render in a notebook and in a terminal:

        alternatives  each token, its probability and the top most probable ones
        lens          the next token predicted from each layer (the logit lens)
        attention     attention probabilities of every layer and head
        decoder_lens  the decoder's output given each layer of the encoder
        blocks        tokens of each forward pass, and those a drafter had proposed
        positions     T5's position bias, by head and distance

        Args:
          input: the input text.
          target: the target text; None to generate it.
          top: number of alternatives of each token.
          **options: fields of config.Decode; None for that of the session's `decode`.

        Raises:
          ValueError: the model has no decoder, or the text is too long for one forward pass.
        """
        from t5x_lite import analysis

        decode = self.settings(options)
        top = check_argument("top", top, Count)
        (input,) = list_texts(input, one=True)
        if target is not None:
            (target,) = list_texts(target, one=True)
        return analysis.explain(self.predictor, input, target, decode=decode, top=top)

    def train_step(
        self, inputs: str | Sequence[str], targets: str | Sequence[str], learning_rate: float = 1e-3
    ) -> float:
        """One step of Adam; it changes the weights of this session only, and nothing on disk.

        Args:
          inputs: a text or a list of texts.
          targets: as many texts.
          learning_rate: step size of Adam.

        Returns:
          The loss before the step, in nats per target token.

        Raises:
          ValueError: inputs and targets do not pair up or are empty, learning_rate is not
            positive, or the loss is not finite.
        """
        from t5x_lite.training import fit_in_memory

        learning_rate = check_argument("learning_rate", learning_rate, Positive)
        input_texts, target_texts = list_pairs("train_step", inputs, targets)
        if not input_texts:
            raise ValueError("train_step needs at least one pair of texts; inputs is empty")
        pairs = input_texts, target_texts
        self.learner, loss = fit_in_memory.teach(self.predictor, self.learner, pairs, learning_rate)
        return loss

    def with_adapters(self, path: str | Path) -> "Session":
        """Returns a session with adapters of this model (LoRA), which shares its weights."""
        from t5x_lite.evaluation.adapters import attach_adapters

        more = self.decode, self.step, self.template, f"{self.source} with {path}"
        return Session(attach_adapters(self.predictor, path), *more)

    def settings(self, options: dict[str, Any]) -> config.Decode:
        """Returns the default options with those replaced that are not None.

        An option temperature 0 is greedy, and puts the defaults that narrow a sample out of use.

        Raises:
          ValueError: an option is unknown, of another type or out of range, or two contradict each
            other.
        """
        return merge_options(self.decode, options)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    mesh: config.Mesh | None = None,
    quantize: str | None = None,
) -> Session:
    """Loads a run, a Hugging Face folder, a .gguf file, or a model of the hub.

    Args:
      path: a MODEL_DIR, a Hugging Face folder, a .gguf file, a checkpoint that is packaged with
        t5x_lite by its name, or a model of the Hugging Face hub: "owner/name",
        "owner/name@revision", "owner/name:file.gguf".
      step: checkpoint of a run; None for the newest.
      best: loads the best checkpoint of a run by the run's metric.
      mesh: sets the mesh of the process; None shards the batch over all devices.
      quantize: quantizes the matrices of layers: int8, int4; with _activations activations too,
        with :32 in groups of 32. None for no quantization.

    Raises:
      ValueError: path is not a checkpoint, or a run without the requested one; or an argument is of
        another type.
    """
    from t5x_lite.checkpoints.opening import open_checkpoint
    from t5x_lite.evaluation import predict
    from t5x_lite.training import host

    check_argument("path", path, str | os.PathLike)
    check_argument("step", step, CountOrZero | None)
    check_argument("best", best, bool)
    check_argument("mesh", mesh, config.Mesh | None)
    check_argument("quantize", quantize, str | None)
    if best and step is not None:
        raise ValueError("step and best both choose a checkpoint: leave one out")
    host.prepare_jax()
    restored = open_checkpoint(path, step, best).load(mesh, quantize)
    run, ended = restored.run, predict.has_inputs(restored.run)
    parts = run.model, restored.params, restored.vocabularies
    predictor = predict.Predictor(*parts, ended=ended, batch_size=run.evaluate.batch_size)
    return Session(predictor, run.decode, restored.step, restored.chat, str(path))


def pipeline(task: str, model: str | Path | Session, **defaults: Any) -> Any:
    """A pipeline as transformers had them: pipeline("summarization", "t5-small")(text).

    Args:
      task: text2text-generation, summarization, translation or such as translation_en_to_de.
      model: what `load` takes, or a session.
      **defaults: arguments of every call, as of `evaluation.pipeline.TextPipeline`.
    """
    from t5x_lite.evaluation import pipeline as pipelines

    pipelines.result_name(task)
    session = model if isinstance(model, Session) else load(model)
    parameters = pipelines.task_parameters(session.source)
    return pipelines.TextPipeline(task, session.predictor, session.settings, parameters, defaults)
