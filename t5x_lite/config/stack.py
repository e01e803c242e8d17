# SPDX-License-Identifier: Apache-2.0
"""Config of a stack of layers, encoder or decoder."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from t5x_lite.config.checked import (
    FAR,
    Checked,
    Count,
    Few,
    Length,
    LengthOrZero,
    NotNegative,
    Positive,
    Range,
    Width,
    require,
)

Buckets = Annotated[int, Range(2, FAR)]


@dataclass(frozen=True)
class RotaryScaling(Checked):
    """Rotary positions stretched for texts longer than those of pretraining.

    Attributes:
      kind: linear divides every position by `factor`; llama3 divides those of slow frequencies
        alone, and passes over gradually between `low` and `high`; yarn does so between `beta_slow`
        and `beta_fast`, along the frequencies (Peng et al., 2023); dynamic raises the base with
        each position beyond `original` (NTK), as transformers does that generates from a cache.
      factor: what positions are divided by; of dynamic, how fast the base rises.
      low: frequencies with fewer turns than this in `original` positions are divided (llama3).
      high: frequencies with more turns than this are not (llama3).
      original: positions of pretraining (llama3, yarn, dynamic).
      beta_slow: frequencies with fewer turns than this in `original` positions are divided (yarn).
      beta_fast: frequencies with more turns than this are not (yarn).
      attention_factor: factor on rotated queries and on rotated keys; None is
        0.1 * ln(factor) + 1 (yarn).
      truncate: the frequencies between which it passes over are rounded outward (yarn).
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: Annotated[float, Range(1)]
    low: Positive = 1.0
    high: Positive = 4.0
    original: Count = 8192
    beta_slow: Positive = 1.0
    beta_fast: Positive = 32.0
    attention_factor: Positive | None = None
    truncate: bool = True

    def check(self):
        require(self.low < self.high, "RotaryScaling.low must be below RotaryScaling.high")
        require(
            self.beta_slow < self.beta_fast,
            "RotaryScaling.beta_slow must be below RotaryScaling.beta_fast",
        )


class PositionFunctions(NamedTuple):
    """The functions of positions in a stack; None is without.

    Attributes:
      added: embeddings that are added to those of the tokens.
      rotated: rotation of queries and keys.
      biased: bias that is added to the scores of attention.
    """

    added: Literal["learned", "sinusoidal"] | None = None
    rotated: Literal["rotary"] | None = None
    biased: Literal["relative", "alibi"] | None = None


POSITION_FUNCTIONS = {
    "relative": PositionFunctions(biased="relative"),
    "rotary": PositionFunctions(rotated="rotary"),
    "learned": PositionFunctions(added="learned"),
    "sinusoidal": PositionFunctions(added="sinusoidal"),
    "alibi": PositionFunctions(biased="alibi"),
    "bipe": PositionFunctions(added="sinusoidal", rotated="rotary"),
    "none": PositionFunctions(),
}


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
      qkv_norm: a norm without weights over head_dim of queries, keys and values, before rotation.
      output_norm: a norm without weights of attention's output, all heads together, before its
        projection.
      qkv_bias: biases of the query, key and value projections.
      out_bias: bias of attention's output projection.
      mlp_bias: biases of the MLP.
      query_scale: factor on the queries; 1.0 is T5, whose initialization carries
        1 / sqrt(head_dim). Others want head_dim ** -0.5.
      softcap: c, which turns scores x into c * tanh(x / c).
      merged: cross-attention without a layer of its own: one softmax over the past and the
        inputs, with the weights of self-attention (T5Gemma 2).
      positions: what tells tokens their order: relative (T5's bias), rotary, learned embeddings or
        sinusoidal ones; alibi, a bias that falls with distance (Press et al., 2022); bipe, in
        segments of `segment_length` tokens: sinusoidal in a segment, rotary by its number (BiPE,
        He et al., 2024, with segments of equal length); or none but the causal mask.
      buckets: buckets of the relative bias.
      max_distance: distance from which the relative bias has one bucket.
      bias_std: standard deviation of the initial relative bias.
      bias_per_layer: a table of relative biases for each layer, not one for all.
      bias_vectors: a vector of each bucket too, in each layer: the bias adds its products with
        the query and with the key (Huang et al., 2020, method 4). It has no kernel: plain XLA.
      rotary_base: base of the rotary wavelengths.
      rotary_scaling: how rotary positions are stretched; None is not at all.
      cross_rotary: cross-attention rotates too: keys by the positions of the inputs, queries by
        those of the targets, counted on from the inputs (RedLLM, Zhang et al., 2025).
      rotary_span: frequencies that turn less than once in so many positions do not turn at all
        (HoPE, Chen et al., 2024); None turns them all.
      max_length: number of learned positions; a text that needs more is refused.
      interpolation: places between two learned positions, so that as many rows serve texts that are
        longer by this factor; 1 is none.
      random_positions: in training, the positions of a text are a random increasing choice from
        this many (Ruoss et al., 2023), as in segments of longer texts; None counts them.
      segment_length: tokens of a segment of bipe.
      chunk: an encoder reads its inputs in chunks of this many tokens, which attend to one another
        alone, and positions begin anew in each (fusion-in-decoder, Izacard and Grave, 2021; CEPE,
        Yen et al., 2024). The decoder attends to all. None reads all at once.
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
    qkv_norm: bool = False
    output_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: Positive = 1.0
    softcap: Positive | None = None
    merged: bool = False
    positions: Literal["relative", "rotary", "learned", "sinusoidal", "alibi", "bipe", "none"] = (
        "relative"
    )
    buckets: Buckets = 32
    max_distance: Count = 128
    bias_std: NotNegative = 0.2
    bias_per_layer: bool = False
    bias_vectors: bool = False
    rotary_base: Positive = 10000.0
    rotary_scaling: RotaryScaling | None = None
    cross_rotary: bool = False
    rotary_span: Count | None = None
    max_length: Length | None = None
    interpolation: Annotated[float, Range(1)] = 1.0
    random_positions: Length | None = None
    segment_length: Length | None = None
    chunk: Length | None = None
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
        self.check_positions()
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

    def check_positions(self):
        functions, named = self.position_functions, f"not {self.positions}"
        require(
            (self.positions == "learned") == (self.max_length is not None),
            "Stack.max_length belongs to learned positions: bind it there, and nowhere else",
        )
        require(
            self.interpolation == 1 or self.positions == "learned",
            f"Stack.interpolation is for learned positions, {named}",
        )
        require(
            (self.positions == "bipe") == (self.segment_length is not None),
            'Stack.segment_length belongs to Stack.positions = "bipe": bind both or neither',
        )
        require(
            self.position_offset == 0 or self.positions in ("learned", "sinusoidal"),
            f"Stack.position_offset is for learned or sinusoidal positions, {named}",
        )
        require(
            functions.added != "sinusoidal" or self.embed >= 4,
            f"Stack.embed must be at least 4 for sinusoidal positions; got {self.embed}",
        )
        require(
            functions.biased is None or not self.merged,
            f"Stack.merged reads inputs and past in one softmax: it has no {self.positions} "
            "positions",
        )
        self.check_rotation()
        self.check_bias_vectors()
        require(
            self.random_positions is None or (functions.biased is None and any(functions)),
            "Stack.random_positions is for positions that are added or rotated, "
            f"{named}: a bias counts the tokens between two",
        )
        require(
            self.longest is None or (self.random_positions or 0) <= self.longest,
            f"Stack.random_positions must be at most {self.longest}, the learned positions",
        )

    def check_rotation(self):
        rotates = self.position_functions.rotated is not None
        require(
            not rotates or self.head_dim % 2 == 0,
            f"Stack.head_dim must be even for rotary positions; got {self.head_dim}",
        )
        require(
            rotates or self.rotary_span is None,
            f"Stack.rotary_span is for rotary positions, not {self.positions}",
        )
        require(
            not self.cross_rotary or (self.positions == "rotary" and not self.merged),
            "Stack.cross_rotary is for rotary positions and cross-attention of its own: leave out "
            f"Stack.merged, and bind Stack.positions, {self.positions!r} here, to rotary",
        )
        require(
            not (self.qk_norm and self.qkv_norm),
            "Stack.qk_norm and Stack.qkv_norm normalize the same queries: bind one of them",
        )
        require(
            self.rotary_scaling is None
            or self.rotary_scaling.kind != "dynamic"
            or (self.head_dim > 2 and self.rotary_span is None),
            "dynamic RotaryScaling needs Stack.head_dim above 2 and no Stack.rotary_span",
        )

    def check_bias_vectors(self):
        require(
            not self.bias_vectors or self.positions == "relative",
            f"Stack.bias_vectors are those of relative positions, not {self.positions}",
        )
        require(
            not self.bias_vectors or self.key_heads == self.heads,
            "Stack.bias_vectors has as many key heads as heads: leave Stack.kv_heads out",
        )

    @property
    def position_functions(self) -> PositionFunctions:
        """The functions that its positions are."""
        return POSITION_FUNCTIONS[self.positions]

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text that it has positions for; None if there is no limit."""
        if self.max_length is None:
            return None
        return int((self.max_length - 1) * self.interpolation) + 1

    @property
    def lacks_kernel(self) -> str:
        """The binding for which attention has no kernel, so that plain XLA computes it; or ""."""
        if self.positions == "alibi":
            return 'Stack.positions = "alibi"'
        return "Stack.bias_vectors = True" if self.bias_vectors else ""

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
