# SPDX-License-Identifier: Apache-2.0
"""Trained models in notebooks and scripts: load one, then generate, score and inspect.

    from t5x_lite import interactive

    g2p = interactive.load("runs/g2p")
    g2p.generate("photograph")                              # 'F OW T AH G R AE F'
    g2p.generate(["cat", "hats"], beams=4, n_best=2)        # two texts for each
    g2p.generate(5 * ["cat"], temperature=1.0, seed=7)      # five draws, the same for a seed
    g2p.score("cat", "K AE T")                              # log-probability, in nats
    g2p.embed(["cat", "hats"])                              # a vector for each, numpy [2 d]
    for piece in g2p.stream("photograph"):                  # the same text, streamed
        print(piece, end="", flush=True)
    g2p.explain("photograph").lens                          # logit lens: predictions of each layer
    g2p.train_step(["jaxon"], ["JH AE K S AH N"])           # one step of Adam: the loss before it

A Hugging Face folder or a .gguf file is loaded without conversion:

    smol = interactive.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    smol.generate("The capital of France is", max_new_tokens=32)
    smol.chat("What is the capital of France?")             # with the model's own chat template

Importing this module imports neither JAX nor TensorFlow; loading a run never imports TensorFlow.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.config import aliases
from t5x_lite.utils.nearest import suggest


class Session:
    """A model with its weights and vocabularies.

    Args:
      predictor: `evaluation.predict.Predictor`, with the model, its weights and its vocabularies.
      decode: default options of `generate`.
      step: training step of the weights.
      template: its chat template (`tokenizers.chat.ChatTemplate`); None for a model without one.
    """

    def __init__(self, predictor: Any, decode: config.Decode, step: int = 0, template: Any = None):
        self.predictor = predictor
        self.decode = decode
        self.step = step
        self.template = template
        self.learner = None

    def generate(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Generates a text for a text, a list for a list; with n_best, lists of texts.

        options are the fields of `config.Decode`: length, temperature, top_k, top_p, seed, beams,
        alpha, n_best; drafter="lookup" and others speculate, which changes the speed alone.
        `predictor.tally` counts tokens per forward pass.

        Raises:
          ValueError: an unknown option, or options that contradict each other.
        """
        predictions = self.predict(texts, **options)
        several = self.settings(options).n_best > 1

        def result(prediction):
            return prediction.texts if several else prediction.texts[0]

        if isinstance(texts, str):
            return result(predictions)
        return [result(each) for each in predictions]

    def predict(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Generates texts with scores and ids, as `evaluation.predict.Prediction`."""
        if isinstance(texts, str):
            return self.predictor.predict([texts], self.settings(options))[0]
        return self.predictor.predict(list(texts), self.settings(options))

    def stream(self, text: str, *, every: int = 4, **options: Any) -> Iterator[str]:
        """Yields the text of `generate` piece by piece.

        A piece may be empty: bytes of an incomplete character wait for the next piece.

        Args:
          text: the input.
          every: number of forward passes per piece.
          **options: those of `generate`.

        Raises:
          ValueError: beam search, which has its text only at the end, or an unknown option.
        """
        from t5x_lite.evaluation import streaming

        pieces = streaming.stream_text(self.predictor, text, self.settings(options), every)
        return (piece.text for piece in pieces)

    def chat(self, messages: str | Sequence[dict[str, str]], **options: Any) -> str:
        """Answers a question, or a conversation: {"role": "user", "content": "..."} ...

        options are those of generate.

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
        template, tokens = self.template
        return chat.render_chat(template, messages, add_generation_prompt=True, **tokens)

    def score(self, inputs: str | Sequence[str], targets: str | Sequence[str]) -> Any:
        """Log-probability in nats of each target given its input; a float for a single pair."""
        if isinstance(inputs, str) != isinstance(targets, str):
            raise ValueError("score takes two texts, or two lists of texts")
        if isinstance(inputs, str):
            return self.predictor.score([inputs], [targets])[0][0]
        return [total for total, _ in self.predictor.score(list(inputs), list(targets))]

    def embed(
        self, texts: str | Sequence[str], pooling: str | None = None, on_progress: Any = None
    ) -> Any:
        """Embeds texts as float32 vectors [n d], or one text as [d].

        Args:
          texts: a text or a list of texts.
          pooling: "mean", "first" or "last" token; None for the model's own pooling, or else the
            mean.
          on_progress: callback with the number of texts that are done; None for no reports.
        """
        from t5x_lite.evaluation import embed

        if isinstance(texts, str):
            return embed.embed(self.predictor, [texts], pooling)[0]
        return embed.embed(self.predictor, list(texts), pooling, on_progress)

    def explain(
        self,
        input: str,
        target: str | None = None,
        *,
        top: int = 5,
        **options: Any,
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
          **options: those of `generate`.

        Raises:
          ValueError: the model has no decoder, or the text is too long for one forward pass.
        """
        from t5x_lite import analysis

        decode = self.settings(options)
        return analysis.explain(self.predictor, input, target, decode=decode, top=top)

    def train_step(
        self,
        inputs: str | Sequence[str],
        targets: str | Sequence[str],
        learning_rate: float = 1e-3,
    ) -> float:
        """One step of Adam; it changes the weights of this session only, and nothing on disk.

        Args:
          inputs: a text or a list of texts.
          targets: as many texts.
          learning_rate: step size of Adam.

        Returns:
          The loss before the step, in nats per target token.

        Raises:
          ValueError: inputs and targets do not pair up, or the loss is not finite.
        """
        from t5x_lite.model import quantization
        from t5x_lite.training import fit_in_memory

        if isinstance(inputs, str) != isinstance(targets, str):
            raise ValueError("train_step takes two texts, or two lists of texts")
        pairs = ([texts] if isinstance(texts, str) else list(texts) for texts in (inputs, targets))
        input_texts, target_texts = pairs
        predictor = self.predictor
        if quantization.has_quantized(predictor.params):
            raise ValueError("Quantized weights cannot be trained: load without quantize")
        if self.learner is None:
            self.learner = fit_in_memory.Learner(predictor.cfg, predictor.params)
        ids = predictor.encode_inputs(input_texts), predictor.encode_targets(target_texts)
        loss = self.learner.step(*ids, learning_rate)
        predictor.params = predictor.drafters.params = self.learner.params
        return loss

    def settings(self, options: dict[str, Any]) -> config.Decode:
        """Returns the default options with some fields replaced."""
        known = [field.name for field in dataclasses.fields(config.Decode)]
        options = aliases.rename_keywords(options, "Decode")
        for name in options:
            if name not in known:
                raise ValueError(f"Unknown option {name}: {suggest(name, known)}")
        return dataclasses.replace(self.decode, **options)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    mesh: config.Mesh | None = None,
    quantize: str | None = None,
) -> Session:
    """Loads a run, a Hugging Face folder or a .gguf file.

    Args:
      path: a MODEL_DIR, a Hugging Face folder or a .gguf file.
      step: checkpoint of a run; None for the newest.
      best: loads the best checkpoint of a run by the run's metric.
      mesh: sets the mesh of the process; None shards the batch over all devices.
      quantize: quantizes the matrices of layers: int8, int4; with _activations activations too,
        with :32 in groups of 32. None for no quantization.

    Raises:
      ValueError: path is not a checkpoint, or a run without the requested one.
    """
    from t5x_lite.checkpoints.opening import open_checkpoint
    from t5x_lite.evaluation import predict
    from t5x_lite.training import host

    host.prepare_jax()
    restored = open_checkpoint(path, step, best).load(mesh, quantize)
    run = restored.run
    predictor = predict.Predictor(
        run.model,
        restored.params,
        restored.vocabularies,
        ended=predict.has_inputs(run),
        batch_size=run.evaluate.batch_size,
    )
    return Session(predictor, run.decode, restored.step, restored.chat)
