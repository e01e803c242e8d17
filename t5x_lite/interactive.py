# SPDX-License-Identifier: Apache-2.0
"""A trained run in one line, for notebooks and scripts: load it, then generate and score.

    from t5x_lite import interactive

    g2p = interactive.load("runs/g2p")
    g2p.generate("photograph")                              # 'F OW T AH G R AE F'
    g2p.generate(["cat", "hats"], beams=4, n_best=2)        # two texts for each
    g2p.generate(5 * ["cat"], temperature=1.0, seed=7)      # five draws, the same for a seed
    g2p.score("cat", "K AE T")                              # log-probability, in nats
    g2p.embed(["cat", "hats"])                              # a vector for each, numpy [2 d]

A Hugging Face folder and a .gguf file are loaded as they are:

    smol = interactive.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    smol.generate("The capital of France is", length=32)
    smol.chat("What is the capital of France?")             # with the model's own chat template

Importing this module imports neither JAX nor TensorFlow; loading a run never imports TensorFlow.
"""

import dataclasses
import difflib
from collections.abc import Sequence
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

    def generate(self, texts: str | Sequence[str], **options: Any) -> Any:
        """What the model writes: a text for a text, a list for a list; with n_best lists of texts.

        options are the fields of `config.Decode`: length, temperature, top_k, top_p, seed, beams,
        alpha, n_best.

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
) -> Session:
    """The run in a MODEL_DIR, with its newest weights unless a step or the best is asked for.

    path may also be a Hugging Face folder or a .gguf file. Sets the mesh for the process: all
    devices share the batch unless another one is given.

    Raises:
      ValueError: path is no checkpoint, or a run folder that has no such one.
    """
    from t5x_lite.evaluation import predict
    from t5x_lite.training import compilation, restore

    compilation.keep_compiled()
    restored = restore.restore(path, step=step, best=best, mesh=mesh)
    run = restored.run
    predictor = predict.Predictor(
        run.model,
        restored.params,
        restored.vocabularies,
        ended=predict.has_inputs(run),
        batch_size=run.evaluate.batch_size,
    )
    return Session(predictor, run.decode, restored.step, restored.chat)
