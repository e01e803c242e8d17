# SPDX-License-Identifier: Apache-2.0
"""What a model is made of: the part of the config tree that decides its weights and its logits.

Every family (T5, T5Gemma, GPT-2, Llama, Qwen, Gemma ...) is a choice of these values, kept as a
.gin preset; there is no class per family.
"""

from dataclasses import dataclass
from typing import Literal

from t5x_lite.heading import Heads
from t5x_lite.typed import Checked, require

# Ids and places in a weight are int32.
INDICES = 2**31


@dataclass(frozen=True)
class RotaryScaling(Checked):
    """Rotary positions stretched for texts longer than those of pretraining.

    `linear` divides every position by `factor`. `llama3` divides slow frequencies only: those that
    turn less than `low` times in `original` positions; up to `high` turns it goes over gradually.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def check(self):
        require(self.factor >= 1, f"RotaryScaling.factor must be at least 1; got {self.factor}")
        require(self.low < self.high, "RotaryScaling.low must be below RotaryScaling.high")


@dataclass(frozen=True)
class Stack(Checked):
    """One tower of layers. T5 and GPT, encoder and decoder differ only in these values.

    Norms: `norm` is T5's and Llama's (rms), Gemma's whose scale is one plus the weight
    (rms_plus_one), or GPT-2's with a bias (layer); `post_norms` adds one after each sublayer,
    before the residual; `qk_norm` one over the head dimension of queries and keys, before rotation.

    Attention: `query_scale` multiplies the queries: 1.0 is T5, whose initialisation carries
    1/sqrt(head_dim); others want head_dim ** -0.5. `softcap` c turns scores x into c tanh(x / c).
    `qkv_bias`, `out_bias` and `mlp_bias` say which projections have biases. In a `merged` decoder
    cross-attention is no layer of its own: one softmax goes over the past and the inputs, with the
    weights of self-attention (T5Gemma 2).

    Positions: `buckets`, `max_distance` and `bias_std` (of the bias table at the start) belong to
    relative ones, one table for all layers unless `bias_per_layer`; `rotary_base` and
    `rotary_scaling` to rotary ones; `max_length` to learned ones.

    Windows: `pattern` is repeated over the layers; its sliding layers see `window` keys and turn by
    `sliding_rotary_base` where it is given, never scaled. A causal layer sees a key at distance
    0 <= d < window. What an encoder sees is `window_form`: below is |d| < window, within is
    |d| <= window, halved is (window + 1) // 2 keys up to its own and window // 2 after it.
    """

    layers: int
    embed: int
    heads: int
    head_dim: int
    mlp: int
    kv_heads: int | None = None
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    gated: bool = True
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float = 1.0
    softcap: float | None = None
    merged: bool = False
    positions: Literal["relative", "rotary", "learned"] = "relative"
    buckets: int = 32
    max_distance: int = 128
    bias_std: float = 0.2
    bias_per_layer: bool = False
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    max_length: int | None = None
    pattern: tuple[Literal["full", "sliding"], ...] = ("full",)
    window: int | None = None
    window_form: Literal["below", "within", "halved"] = "below"
    sliding_rotary_base: float | None = None

    def check(self):
        for name in ("layers", "embed", "heads", "head_dim", "mlp"):
            require(getattr(self, name) >= 1, f"Stack.{name} must be at least 1")
        sizes = (self.layers, self.embed, self.heads, self.key_heads, self.head_dim, self.mlp)
        sizes += (self.buckets, self.max_length or 1, self.window or 1)
        require(max(sizes) < INDICES, f"Stack has a size of {max(sizes):,}: no array has")
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
        require(len(self.pattern) > 0, 'Stack.pattern is empty: ("full",) is every layer alike')
        require(
            ("sliding" in self.pattern) == (self.window is not None),
            'Stack.window belongs to a Stack.pattern with "sliding" layers: bind both or neither',
        )
        require(self.window is None or self.window >= 1, "Stack.window must be at least 1")
        require(
            not (self.positions == "relative" and self.merged),
            "Stack.merged reads inputs and past in one softmax: it has no relative positions",
        )

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Which layers see a window only."""
        cycle = len(self.pattern)
        return tuple(self.pattern[layer % cycle] == "sliding" for layer in range(self.layers))


@dataclass(frozen=True)
class Pooling(Checked):
    """One vector per text from an encoder's output (or a lone decoder's).

    `kind` takes the mean over the tokens, the first or the last of them. `project` is the width of
    a projection without bias after it (Sentence-T5), `normalize` divides by the Euclidean norm.
    """

    kind: Literal["mean", "first", "last"] = "mean"
    project: int | None = None
    normalize: bool = False


@dataclass(frozen=True)
class Model(Checked):
    """An encoder-decoder, a decoder alone (GPT-like) or an encoder alone: by which stacks exist.

    Embeddings: `scale_embedding` multiplies them by sqrt(embed); with `separate_embeddings` the
    encoder has a table of its own; `eoi` is an id whose row is a weight of its own, not scaled (the
    end of an image, T5Gemma 2).

    Logits: `tied` reads them through the (decoder's) embedding table, `scale_logits` multiplies
    what they are read from by embed ** -0.5 as T5 1.0 does, `logits_softcap` c turns logits x into
    c tanh(x / c).

    `prefix_lm` lets a lone decoder read its inputs in both directions. `start` begins every decoder
    input; with `starts_prompts` False a lone decoder's prompts are decoded without it, as GPT-2's
    are. `activations` is the dtype of activations; weights are kept in float32. `pooling` makes
    text embeddings, `blockwise` heads guess tokens after the next one, for faster decoding.

    `attention` is what computes attention: kernels (pallas), plain XLA (reference), or (auto) the
    faster of both on the devices at hand; T5X_LITE_ATTENTION in the environment overrides it.
    """

    vocab: int
    encoder: Stack | None = None
    decoder: Stack | None = None
    tied: bool = False
    scale_logits: bool = False
    logits_softcap: float | None = None
    scale_embedding: bool = False
    separate_embeddings: bool = False
    eoi: int | None = None
    prefix_lm: bool = False
    start: int = 0
    starts_prompts: bool = True
    dropout: float = 0.0
    embedding_std: float = 1.0
    activations: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "pallas", "reference"] = "auto"
    pooling: Pooling | None = None
    blockwise: Heads | None = None

    def check(self):
        require(self.encoder is not None or self.decoder is not None, "Model has no Stack at all")
        require(self.vocab >= 2, f"Model.vocab must be at least 2; got {self.vocab}")
        require(self.vocab < INDICES, f"Model.vocab is {self.vocab:,}: ids are int32")
        require(0 <= self.start < self.vocab, f"Model.start must be below vocab {self.vocab}")
        require(0 <= self.dropout < 1, f"Model.dropout must be in [0, 1); got {self.dropout}")
        require(
            self.eoi is None or 0 <= self.eoi < self.vocab,
            f"Model.eoi must be below vocab {self.vocab}",
        )
        require(
            not self.prefix_lm or self.layout == "joined",
            "Model.prefix_lm is for a decoder alone: an encoder reads in both directions anyway",
        )
        require(
            not self.separate_embeddings or self.layout == "pair",
            "Model.separate_embeddings is for an encoder-decoder",
        )
        require(
            self.blockwise is None or self.decoder is not None,
            "Model.blockwise guesses what a decoder writes: an encoder alone writes nothing",
        )
        self.check_widths()

    def check_widths(self):
        merged = self.decoder is not None and self.decoder.merged
        require(
            not merged or self.layout == "pair",
            "Stack.merged is for the decoder of an encoder-decoder",
        )
        require(
            self.layout != "pair"
            or self.encoder.embed == self.decoder.embed
            or (self.separate_embeddings and not merged),
            "Model.encoder.embed and Model.decoder.embed must agree: they share one embedding "
            "(or bind Model.separate_embeddings = True)",
        )

    @property
    def layout(self) -> Literal["pair", "joined", "aligned"]:
        """What a batch looks like: inputs and targets apart, one after the other, or in step."""
        if self.decoder is None:
            return "aligned"
        return "joined" if self.encoder is None else "pair"
