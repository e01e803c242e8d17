# SPDX-License-Identifier: Apache-2.0
"""Config of a model: all that decides its weights and its logits.

Every family (T5, T5Gemma, GPT-2, Llama, Qwen, Gemma ...) is a choice of these values, kept as a
.gin preset; there is no class per family.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from t5x_lite.config.canvas import Canvas, check_canvas
from t5x_lite.config.checked import (
    MOST_TOKENS,
    Checked,
    CountOrZero,
    NotNegative,
    Positive,
    Range,
    ShareBelowOne,
    require,
)
from t5x_lite.config.draft_heads import DraftHeads
from t5x_lite.config.readout import Readout
from t5x_lite.config.stack import Stack, check_buckets

# Two is the fewest that a softmax, or a distance, can tell apart.
VocabularySize = Annotated[int, Range(2, MOST_TOKENS)]


@dataclass(frozen=True)
class Model(Checked):
    """An encoder-decoder, a decoder alone (GPT-like) or an encoder alone: by which stacks exist.

    Attributes:
      vocab: number of ids. A .gin file of a run with data may leave it out: it is then the size of
        their vocabulary, rounded up to a multiple of 128.
      encoder: the encoder's stack; None for a decoder alone.
      decoder: the decoder's stack; None for an encoder alone.
      tied: reads the logits through the (decoder's) embedding table.
      scale_logits: multiplies the state that logits are read from by embed ** -0.5, as T5 1.0.
      logits_softcap: c, which turns logits x into c * tanh(x / c).
      logits_bias: a bias of each id, added to its logit.
      scale_embedding: multiplies embeddings by sqrt(embed).
      separate_embeddings: an embedding table of the encoder's own.
      eoi: id whose embedding is a weight of its own, not scaled (end of image, T5Gemma 2).
      prefix_lm: a lone decoder reads its inputs in both directions.
      decoder_start_token_id: id that begins every decoder input.
      add_bos: a lone decoder's prompts begin with `decoder_start_token_id`; GPT-2's do not.
      dropout: rate of dropout.
      embedding_std: standard deviation of the initial embeddings.
      dtype: dtype of the computation; weights are kept in float32. A run that a command trains
        computes on a CPU in the faster of both, measured once, unless this is bound.
      attention: kernels (pallas), plain XLA (reference), or (auto) the faster of both on the
        devices at hand. With ring, kernels too, of which each device attends to one part after the
        other of rows that Mesh.context splits, instead of gathering their keys.
        T5X_LITE_ATTENTION in the environment overrides it.
      draft_heads: heads that draft the tokens after the next one; None has none.
      canvas: fills blocks of masked tokens in place of writing from left to right; None does not.
      readout: labels, a number or a vector in place of text; None writes text.
      shared_weights: patterns of weights of the decoder that are the encoder's, such as
        "decoder.layers.mlp.*" or "decoder.*", whose cross-attention remains its own. They are
        stored once, and their gradients add up.
    """

    vocab: VocabularySize
    encoder: Stack | None = None
    decoder: Stack | None = None
    tied: bool = False
    scale_logits: bool = False
    logits_softcap: Positive | None = None
    logits_bias: bool = False
    scale_embedding: bool = False
    separate_embeddings: bool = False
    eoi: CountOrZero | None = None
    prefix_lm: bool = False
    decoder_start_token_id: CountOrZero = 0
    add_bos: bool = True
    dropout: ShareBelowOne = 0.0
    embedding_std: NotNegative = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "pallas", "ring", "reference"] = "auto"
    draft_heads: DraftHeads | None = None
    canvas: Canvas | None = None
    readout: Readout | None = None
    shared_weights: tuple[str, ...] = ()

    def check(self):
        require(self.encoder is not None or self.decoder is not None, "Model has no Stack at all")
        require(
            self.decoder_start_token_id < self.vocab,
            f"Model.decoder_start_token_id must be below vocab {self.vocab}",
        )
        require(
            self.eoi is None or self.eoi < self.vocab,
            f"Model.eoi must be below vocab {self.vocab}",
        )
        require(
            not self.prefix_lm or self.layout == "decoder_only",
            "Model.prefix_lm is for a decoder alone: an encoder reads in both directions anyway",
        )
        require(
            not self.prefix_lm or self.causal_decoder,
            "Model.prefix_lm is for a decoder whose layers are all causal: leave out one of it and "
            "Stack.causal",
        )
        require(
            not self.separate_embeddings or self.layout == "encoder_decoder",
            "Model.separate_embeddings is for an encoder-decoder",
        )
        require(
            self.draft_heads is None or self.decoder is not None,
            "Model.draft_heads drafts what a decoder writes: an encoder alone writes nothing",
        )
        require(
            self.readout is None or self.draft_heads is None,
            "Model.readout writes no text for Model.draft_heads to draft: bind one of them",
        )
        require(
            not self.shared_weights or self.layout == "encoder_decoder",
            "Model.shared_weights are those of an encoder and a decoder: bind both",
        )
        check_canvas(self)
        self.check_widths()
        require(
            self.decoder is None or self.decoder.chunk is None,
            "Stack.chunk is for an encoder: leave it out of the decoder's Stack",
        )
        require(
            self.attention not in ("pallas", "ring") or not self.lacks_kernel,
            f'{self.lacks_kernel} has no kernel: leave out Model.attention = "{self.attention}"',
        )
        for name, sides in (("encoder", 2), ("decoder", 2 if self.reads_ahead else 1)):
            stack = getattr(self, name)
            if stack is not None and stack.positions == "relative":
                check_buckets(f"Model.{name}", stack, sides)

    def check_widths(self):
        merged = self.decoder is not None and self.decoder.merged
        require(
            not merged or self.layout == "encoder_decoder",
            "Stack.merged is for the decoder of an encoder-decoder",
        )
        require(
            self.encoder is None
            or self.decoder is None
            or self.encoder.embed == self.decoder.embed
            or (self.separate_embeddings and not merged),
            "Model.encoder.embed and Model.decoder.embed must agree: they share one embedding "
            "(or bind Model.separate_embeddings = True)",
        )

    @property
    def lacks_kernel(self) -> str:
        """The binding for which attention has no kernel, so that plain XLA computes it; or ""."""
        if self.canvas is not None and self.canvas.block > 1:
            return "Model.canvas"
        stacks = (self.encoder, self.decoder)
        return next((stack.lacks_kernel for stack in stacks if stack and stack.lacks_kernel), "")

    @property
    def last_stack(self) -> Stack:
        """The stack whose output the head reads: the decoder, or a lone encoder."""
        stack = self.decoder or self.encoder
        assert stack is not None
        return stack

    @property
    def causal_decoder(self) -> bool:
        """True if no layer of the decoder attends to later tokens, so that it can write text."""
        return self.decoder is None or all(self.decoder.causal_layers(both_sides=False))

    @property
    def reads_ahead(self) -> bool:
        """True if tokens of the decoder attend to later ones, in some layer or within a block."""
        return not self.causal_decoder or (self.canvas is not None and self.canvas.block > 1)

    @property
    def mask_token_id(self) -> int:
        """Id that stands for a token of a canvas that is not written yet."""
        bound = None if self.canvas is None else self.canvas.mask_token_id
        return self.vocab - 1 if bound is None else bound

    @property
    def layout(self) -> Literal["encoder_decoder", "decoder_only", "encoder_only"]:
        """Layout of a batch: inputs and targets apart, one after the other, or aligned."""
        if self.decoder is None:
            return "encoder_only"
        return "decoder_only" if self.encoder is None else "encoder_decoder"

    @property
    def batch_layout(self) -> Literal["encoder_decoder", "decoder_only", "encoder_only"]:
        """Layout of the batches that train it: `layout`, but with Model.readout labels stand beside
        the inputs, whatever the stacks: one for each token (tags), or apart. A lone decoder that
        attends to later tokens is trained as an encoder is."""
        if self.readout is None and self.layout == "decoder_only" and not self.causal_decoder:
            return "encoder_only"
        if self.readout is None:
            return self.layout
        return "encoder_only" if self.readout.kind == "tags" else "encoder_decoder"

    @property
    def writes(self) -> bool:
        """True if its outputs are logits of ids, not those of `readout`."""
        return self.readout is None
