# SPDX-License-Identifier: Apache-2.0
"""A trained run in one line, for notebooks and scripts: load it, then generate and score.

    from t5x_lite import interactive

    g2p = interactive.load("runs/g2p")
    g2p.generate("photograph")                              # 'F OW T AH G R AE F'
    g2p.generate(["cat", "hats"], beams=4, n_best=2)        # two texts for each
    g2p.generate(5 * ["cat"], temperature=1.0, seed=7)      # five draws, the same for a seed
    g2p.score("cat", "K AE T")                              # log-probability, in nats
    g2p.embed(["cat", "hats"])                              # a vector for each, numpy [2 d]
    for piece in g2p.stream("photograph"):                  # the same text as it is written
        print(piece, end="", flush=True)
    g2p.explain("photograph").lens                          # what each layer would have written
    g2p.train_step(["jaxon"], ["JH AE K S AH N"])           # one step of Adam: the loss before it

A Hugging Face folder and a .gguf file are loaded as they are:

    smol = interactive.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    smol.generate("The capital of France is", length=32)
    smol.chat("What is the capital of France?")             # with the model's own chat template

Importing this module imports neither JAX nor TensorFlow; loading a run never imports TensorFlow.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config


class Session:
    """A model with its weights and vocabularies. `decode` holds what generate does by default.

    template is its chat template (`conversion.chat.Chat`), None if it was taught none.
    """

    def __init__(self, predictor: Any, decode: config.Decode, step: int = 0, template: Any = None):
        self.predictor = predictor
        self.decode = decode
        self.step = step
        self.template = template
        self.learner = None

    def generate(self, texts: str | Sequence[str], **options: Any) -> Any:
        """What the model writes: a text for a text, a list for a list; with n_best lists of texts.

        options are the fields of `config.Decode`: length, temperature, top_k, top_p, seed, beams,
        alpha, n_best; decoder="lookup" and others guess ahead, which changes the speed alone.
        `predictor.tally` counts tokens per call.

        Raises:
          ValueError: an unknown option, or one that does not fit the others.
        """
        found = self.predict(texts, **options)
        several = self.settings(options).n_best > 1
        shown = lambda prediction: prediction.texts if several else prediction.texts[0]
        return shown(found) if isinstance(texts, str) else [shown(each) for each in found]

    def predict(self, texts: str | Sequence[str], **options: Any) -> Any:
        """As generate, with scores, log-probabilities and ids (`evaluation.predict.Prediction`)."""
        if isinstance(texts, str):
            return self.predictor.predict([texts], self.settings(options))[0]
        return self.predictor.predict(list(texts), self.settings(options))

    def stream(self, text: str, *, every: int = 4, **options: Any) -> Iterator[str]:
        """Pieces of the text that generate would give, one after every so many forward passes.

        options are those of generate. A piece may be empty: a letter that is not whole yet waits
        for the next one.

        Raises:
          ValueError: beams, which know their text at the end only, or an unknown option.
        """
        from t5x_lite.evaluation import streaming

        pieces = streaming.stream(self.predictor, text, self.settings(options), every)
        return (piece.text for piece in pieces)

    def chat(self, messages: str | Sequence[dict[str, str]], **options: Any) -> str:
        """The answer to a question, or to a conversation: {"role": "user", "content": "..."} ...

        options are those of generate.

        Raises:
          ValueError: the model has no chat template, or it refuses these messages.
        """
        return self.generate(self.prompt(messages), **options)

    def prompt(self, messages: str | Sequence[dict[str, str]]) -> str:
        """The text that `chat` continues: messages as the model's chat template writes them."""
        from t5x_lite.conversion import chat

        if self.template is None:
            raise ValueError("The model has no chat template: give generate the text to continue")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        template, tokens = self.template
        return chat.render_chat(template, messages, add_generation_prompt=True, **tokens)

    def score(self, inputs: str | Sequence[str], targets: str | Sequence[str]) -> Any:
        """The log-probability, in nats, of each target after its input; of one pair, a number."""
        if isinstance(inputs, str) != isinstance(targets, str):
            raise ValueError("score takes two texts, or two lists of texts")
        if isinstance(inputs, str):
            return self.predictor.score([inputs], [targets])[0][0]
        return [total for total, _ in self.predictor.score(list(inputs), list(targets))]

    def embed(
        self, texts: str | Sequence[str], pooling: str | None = None, told: Any = None
    ) -> Any:
        """The float32 vectors [n d] of texts, or [d] of one.

        pooling takes the mean, first or last of a text's tokens; without it, what the model itself
        does, or else the mean.
        """
        from t5x_lite.evaluation import embed

        if isinstance(texts, str):
            return embed.embed(self.predictor, [texts], pooling)[0]
        return embed.embed(self.predictor, list(texts), pooling, told)

    def explain(
        self,
        input: str,
        target: str | None = None,
        *,
        top: int = 5,
        **options: Any,
    ) -> Any:
        """What the model makes of input and target, or of what it writes itself
        (`analysis.Explanation`): its views draw themselves in a notebook and in a terminal.

        alternatives  each token, its probability and the top most probable ones
        lens          what each layer would have written next (the logit lens)
        attention     who looks at whom, in every layer and head
        decoder_lens  what the decoder writes when it reads each layer of the encoder
        blocks        which tokens each forward pass wrote, and which a drafter had guessed
        positions     T5's position bias, by head and distance

        options are those of generate.

        Raises:
          ValueError: the model has no decoder, or the text is too long to be looked at whole.
        """
        from t5x_lite import analysis

        given = {"decode": self.settings(options), "top": top}
        return analysis.explain(self.predictor, input, target, **given)

    def train_step(
        self,
        inputs: str | Sequence[str],
        targets: str | Sequence[str],
        learning_rate: float = 1e-3,
    ) -> float:
        """One step of Adam on these pairs; the loss before it, in nats per target token.

        For play: it changes this session's weights only, and nothing on disk.

        Raises:
          ValueError: texts that do not pair up, or a loss that is not finite.
        """
        from t5x_lite import quantization
        from t5x_lite.training import play

        if isinstance(inputs, str) != isinstance(targets, str):
            raise ValueError("train_step takes two texts, or two lists of texts")
        if isinstance(inputs, str):
            inputs, targets = [inputs], [targets]
        predictor = self.predictor
        if quantization.holds(predictor.params):
            raise ValueError("Weights in few bits cannot learn: load without quantize")
        if self.learner is None:
            self.learner = play.Learner(predictor.cfg, predictor.params)
        ids = predictor.read(list(inputs)), predictor.written(list(targets))
        loss = self.learner.step(*ids, learning_rate)
        predictor.params = predictor.drafters.params = self.learner.params
        return loss

    def settings(self, options: dict[str, Any]) -> config.Decode:
        """decode with some fields replaced."""
        known = [field.name for field in dataclasses.fields(config.Decode)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"Unknown option {name}: {hint}There are {', '.join(known)}")
        return dataclasses.replace(self.decode, **options)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    mesh: config.Mesh | None = None,
    quantize: str | None = None,
) -> Session:
    """The run in a MODEL_DIR, with its newest weights unless a step or the best is asked for.

    path may also be a Hugging Face folder or a .gguf file. Sets the mesh for the process: all
    devices share the batch unless another one is given. quantize keeps the layers' matrices in few
    bits: int8, int4, with _activations theirs too, with :32 in groups of 32.

    Raises:
      ValueError: path is no checkpoint, or a run folder that has no such one.
    """
    from t5x_lite.evaluation import predict
    from t5x_lite.training import compilation, restore

    compilation.keep_compiled()
    restored = restore.restore(path, step=step, best=best, mesh=mesh, quantize=quantize)
    run = restored.run
    predictor = predict.Predictor(
        run.model,
        restored.params,
        restored.vocabularies,
        ended=predict.has_inputs(run),
        batch_size=run.evaluate.batch_size,
    )
    return Session(predictor, run.decode, restored.step, restored.chat)
