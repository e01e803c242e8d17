# SPDX-License-Identifier: Apache-2.0
"""Config of a model: all that decides its weights and its logits.

Every family (T5, T5Gemma, GPT-2, Llama, Qwen, Gemma ...) is a choice of these values, kept as a
.gin preset; there is no class per family.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from t5x_lite.config.checked import (
    FAR,
    MOST_TOKENS,
    Checked,
    Count,
    CountOrZero,
    Few,
    Length,
    LengthOrZero,
    NotNegative,
    Positive,
    Range,
    ShareBelowOne,
    Width,
    require,
)
from t5x_lite.config.draft_heads import DraftHeads
from t5x_lite.config.readout import Readout

# Two is the fewest that a softmax, or a distance, can tell apart.
VocabularySize = Annotated[int, Range(2, MOST_TOKENS)]
Buckets = Annotated[int, Range(2, FAR)]


@dataclass(frozen=True)
class RotaryScaling(Checked):
    """Rotary positions stretched for texts longer than those of pretraining.

    Attributes:
      kind: linear divides every position by `factor`; llama3 divides those of slow frequencies
        alone, and passes over gradually between `low` and `high`.
      factor: what positions are divided by.
      low: frequencies with fewer turns than this in `original` positions are divided (llama3).
      high: frequencies with more turns than this are not (llama3).
      original: positions of pretraining (llama3).
    """

    kind: Literal["linear", "llama3"]
    factor: Annotated[float, Range(1)]
    low: Positive = 1.0
    high: Positive = 4.0
    original: Count = 8192

    def check(self):
        require(self.low < self.high, "RotaryScaling.low must be below RotaryScaling.high")


@dataclass(frozen=True)
class Stack(Checked):
    """One tower of layers. T5 and GPT, encoder and decoder differ only in these values.

    Attributes:
      layers: number of layers.
      embed: width of the residual stream.
      heads: query heads.
      head_dim: width of a head.
      mlp: hidden units of the MLP.
      kv_heads: heads of keys and values (grouped-query attention); None is as many as `heads`.
      activation: nonlinearity of the MLP; gelu is the tanh approximation, gelu_exact is not.
      gated: a gated MLP (GLU) with two input projections.
      norm: T5's and Llama's (rms), Gemma's, whose scale is one plus the weight (rms_plus_one), or
        GPT-2's with mean and bias (layer).
      norm_epsilon: epsilon of the norms.
      norm_order: norms of what a sublayer reads and of the stack's output (pre), or of the sum of a
        sublayer and its residual (post), as in the first transformer and in BART.
      embedding_norm: a norm of the embeddings, positions included.
      post_norms: a norm after each sublayer too, before the residual is added.
      qk_norm: a norm over head_dim of queries and keys, before rotation.
      qkv_bias: biases of the query, key and value projections.
      out_bias: bias of attention's output projection.
      mlp_bias: biases of the MLP.
      query_scale: factor on the queries; 1.0 is T5, whose initialization carries
        1 / sqrt(head_dim). Others want head_dim ** -0.5.
      softcap: c, which turns scores x into c * tanh(x / c).
      merged: cross-attention without a layer of its own: one softmax over the past and the
        inputs, with the weights of self-attention (T5Gemma 2).
      positions: relative (T5's bias), rotary, learned embeddings, or sinusoidal ones.
      buckets: buckets of the relative bias.
      max_distance: distance from which the relative bias has one bucket.
      bias_std: standard deviation of the initial relative bias.
      bias_per_layer: a table of relative biases for each layer, not one for all.
      rotary_base: base of the rotary wavelengths.
      rotary_scaling: how rotary positions are stretched; None is not at all.
      max_length: number of learned positions; a text that needs more is refused.
      position_offset: the first token's learned or sinusoidal position; 2 in models of fairseq.
      sinusoids: the j-th wavelength of sinusoidal positions, over 2 pi: 10000 ** (2 * j / embed),
        as in the paper (vaswani), or 10000 ** (j / (embed / 2 - 1)), as in its code
        (tensor2tensor).
      pattern: full or sliding window, layer by layer, repeated over the layers.
      window: keys that a sliding layer sees: in a causal layer those at distance 0 <= d < window.
      window_form: the window of an encoder's layer: |d| < window (below), |d| <= window (within),
        or (window + 1) // 2 keys up to its own and window // 2 after it (halved).
      sliding_rotary_base: rotary base of sliding layers, never scaled; None takes `rotary_base`.
      causal: layer by layer, repeated over the layers, whether tokens attend to no later ones; None
        is every layer of a decoder, and no layer of an encoder.
    """

    layers: Few
    embed: Width
    heads: Width
    head_dim: Width
    mlp: Width
    kv_heads: Width | None = None
    activation: Literal["gelu", "gelu_exact", "relu", "silu"] = "gelu"
    gated: bool = True
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_epsilon: NotNegative = 1e-6
    norm_order: Literal["pre", "post"] = "pre"
    embedding_norm: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: Positive = 1.0
    softcap: Positive | None = None
    merged: bool = False
    positions: Literal["relative", "rotary", "learned", "sinusoidal"] = "relative"
    buckets: Buckets = 32
    max_distance: Count = 128
    bias_std: NotNegative = 0.2
    bias_per_layer: bool = False
    rotary_base: Positive = 10000.0
    rotary_scaling: RotaryScaling | None = None
    max_length: Length | None = None
    position_offset: LengthOrZero = 0
    sinusoids: Literal["vaswani", "tensor2tensor"] = "vaswani"
    pattern: tuple[Literal["full", "sliding"], ...] = ("full",)
    window: Count | None = None
    window_form: Literal["below", "within", "halved"] = "below"
    sliding_rotary_base: Positive | None = None
    causal: tuple[bool, ...] | None = None

    def check(self):
        require(
            self.heads % self.key_heads == 0,
            f"Stack.heads ({self.heads}) must be a multiple of Stack.kv_heads ({self.kv_heads})",
        )
        require(
            self.positions != "rotary" or self.head_dim % 2 == 0,
            f"Stack.head_dim must be even for rotary positions; got {self.head_dim}",
        )
        require(
            (self.positions == "learned") == (self.max_length is not None),
            "Stack.max_length belongs to learned positions: bind it there, and nowhere else",
        )
        require(
            self.position_offset == 0 or self.positions in ("learned", "sinusoidal"),
            f"Stack.position_offset is for learned or sinusoidal positions, not {self.positions}",
        )
        require(
            self.positions != "sinusoidal" or self.embed >= 4,
            f"Stack.embed must be at least 4 for sinusoidal positions; got {self.embed}",
        )
        require(
            self.norm_order == "pre" or not (self.post_norms or self.merged),
            'Stack.norm_order = "post" has one norm for each sublayer: it goes with neither '
            "Stack.post_norms nor Stack.merged",
        )
        require(len(self.pattern) > 0, 'Stack.pattern is empty: ("full",) is every layer alike')
        require(self.causal != (), "Stack.causal is empty: (True,) is every layer causal")
        require(
            ("sliding" in self.pattern) == (self.window is not None),
            'Stack.window belongs to a Stack.pattern with "sliding" layers: bind both or neither',
        )
        require(
            not (self.positions == "relative" and self.merged),
            "Stack.merged reads inputs and past in one softmax: it has no relative positions",
        )

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For each layer, whether it sees a window only."""
        cycle = len(self.pattern)
        return tuple(self.pattern[layer % cycle] == "sliding" for layer in range(self.layers))

    def causal_layers(self, both_sides: bool) -> tuple[bool, ...]:
        """For each layer, whether its tokens attend to no later ones.

        Args:
          both_sides: bidirectional unless `causal` says otherwise, as an encoder is.
        """
        cycle = (not both_sides,) if self.causal is None else self.causal
        return tuple(cycle[layer % len(cycle)] for layer in range(self.layers))


def check_buckets(name: str, stack: Stack, sides: int) -> None:
    """Raises ValueError unless a side's buckets leave some to far distances (kernels.relative).

    Args:
      name: of the stack, for the message.
      stack: a stack with relative positions.
      sides: 2 where keys before and after a query have buckets of their own, else 1.
    """
    near = stack.buckets // sides // 2
    require(near >= 1, f"{name}: Stack.buckets must be at least {2 * sides}; got {stack.buckets}")
    require(
        stack.max_distance > near,
        f"{name}: Stack.max_distance must be above {near}, the distances with buckets of their own "
        f"among Stack.buckets ({stack.buckets}); got {stack.max_distance}",
    )


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
        computes in float32 on a CPU, where that is faster, unless this is bound.
      attention: kernels (pallas), plain XLA (reference), or (auto) the faster of both on the
        devices at hand; T5X_LITE_ATTENTION in the environment overrides it.
      draft_heads: heads that draft the tokens after the next one; None has none.
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
    attention: Literal["auto", "pallas", "reference"] = "auto"
    draft_heads: DraftHeads | None = None
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
        self.check_widths()
        for name, sides in (("encoder", 2), ("decoder", 1 if self.causal_decoder else 2)):
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
