# SPDX-License-Identifier: Apache-2.0
"""config.json of Hugging Face, and the config of the model, from the metadata of a .gguf file."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints.formats.gguf import ARCHITECTURES, GgufTensors, gguf_names
from t5x_lite.checkpoints.formats.huggingface.fields import alternate_layer_types
from t5x_lite.tokenizers.errors import GgufError

# Metadata of an architecture, without its name: what is read, what no logit depends on, and what
# changes the computation, with the only values that are computed here.
READ = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
)
READ_OF_GEMMA = ("attention.sliding_window", "attention.sliding_window_pattern")
READ_OF_GEMMA += ("attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa")
READ_OF_T5 = ("decoder_block_count", "decoder_start_token_id", "attention.relative_buckets_count")
READ_OF = {"gemma2": READ_OF_GEMMA, "gemma3": READ_OF_GEMMA, "t5": READ_OF_T5}
READ_OF["t5encoder"] = READ_OF_T5
# Stacks of a T5: beginning of their tensors' names, and the field with their number of layers.
STACKS = {"enc.blk.": "block_count", "dec.blk.": "decoder_block_count"}
UNUSED = ("context_length", "vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
UNUSED += ("expert_used_count", "pooling_type")
VALUES = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (1.0,),
}


def read_gguf_config(source: GgufTensors) -> config.Model:
    """The config of the model in a file.

    Raises:
      GgufError: a field is missing, or the file has an attention that is not known here.
    """
    try:
        return source.family().parse_config(hugging_face_config(source), hugging_face_names(source))
    except ValueError as error:
        raise GgufError(f"{source.path}: {error}") from error


def hugging_face_names(source: GgufTensors) -> set[str]:
    """The names that the tensors have in a Hugging Face checkpoint of the family."""
    prefixes = {"gpt2": "transformer.", "t5": "", "t5encoder": ""}
    prefix = prefixes.get(source.architecture, "model.")
    theirs = {gguf: name for name, gguf in gguf_names(source.architecture).items()}
    names = set()
    for name in source.names:
        stem, _, kind = name.rpartition(".")
        layer = re.search(r"\bblk\.(\d+)\.", stem)
        stem = re.sub(r"\bblk\.\d+\.", "blk.{layer}.", stem)
        if stem in theirs:
            plain = theirs[stem].replace("{layer}", layer[1] if layer else "")
            names.add(f"{'' if plain == 'lm_head' else prefix}{plain}.{kind}")
    return names


def hugging_face_config(source: GgufTensors) -> dict[str, Any]:
    """config.json of Hugging Face for the model in a file.

    Raises:
      GgufError: a field is missing, or the file has an attention that is not known here.
    """
    architecture, metadata = source.architecture, source.metadata
    check_metadata(source)
    field = GgufFields(source)
    pair = STACKS if architecture in ("t5", "t5encoder") else {"blk.": "block_count"}
    for prefix, name in pair.items():
        check_layers(source, prefix, count_layers(field, name))
    embedding = source.names.get("token_embd.weight", ((0, 0), None))[0]
    if embedding[1:] != (field.count("embedding_length"),):
        raise GgufError(
            f"{source.path}: {architecture}.embedding_length is {field('embedding_length')}, but "
            f"token_embd.weight is {list(embedding)}"
        )
    shared: dict[str, Any] = {"model_type": ARCHITECTURES[architecture], "vocab_size": embedding[0]}
    shared |= {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"))
    }
    shared["tie_word_embeddings"] = "output.weight" not in source.names
    if architecture in ("t5", "t5encoder"):
        return shared | t5_fields(source, field)
    if architecture == "gpt2":
        return shared | {
            "n_embd": field.count("embedding_length"),
            "n_layer": field.count("block_count"),
            "n_head": field.count("attention.head_count"),
            "n_positions": source.names.get("position_embd.weight", ((0,), None))[0][0],
            "n_inner": field.count("feed_forward_length"),
            "layer_norm_epsilon": field("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
    return (
        shared
        | decoder_fields(source, field)
        | GEMMA.get(architecture, llama_fields)(source, field)
    )


def check_metadata(source: GgufTensors) -> None:
    """Raises GgufError, naming the field, for metadata that may mean another computation."""
    prefix = f"{source.architecture}."
    read = READ + READ_OF.get(source.architecture, ())
    for key, value in source.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in read or name in UNUSED or value in VALUES.get(name, ()):
            continue
        values = " or ".join(map(repr, VALUES.get(name, ())))
        known = f"only {values} is computed here" if values else "it may change what is computed"
        raise GgufError(
            f"{source.path}: metadata field {key} = {value!r:.80} is not implemented: {known}. "
            "Where it changes nothing, remove it: gguf-new-metadata --remove-metadata "
            f"{key} IN.gguf OUT.gguf"
        )


def check_layers(source: GgufTensors, prefix: str, count: Any) -> None:
    """Checks that a file has tensors of as many layers as it says.

    Args:
      source: the file.
      prefix: beginning of the names of a stack's layers.
      count: its number of layers.

    Raises:
      GgufError: it does not.
    """
    layers = {
        name.removeprefix(prefix).split(".")[0] for name in source.names if name.startswith(prefix)
    }
    if count != len(layers):
        field = STACKS.get(prefix, "block_count")
        raise GgufError(
            f"{source.path}: {source.architecture}.{field} is {count}, but there are tensors "
            f"of {len(layers)} layers"
        )


class GgufFields:
    """Metadata of a file's architecture; a list of equal values per layer is one value."""

    def __init__(self, source: GgufTensors):
        self.source = source

    def __call__(self, name: str, *default: Any) -> Any:
        """A field without its prefix, or the default where it is missing.

        Raises:
          GgufError: it is missing and has no default, or differs from layer to layer.
        """
        key = f"{self.source.architecture}.{name}"
        if key not in self.source.metadata:
            if default:
                return default[0]
            raise GgufError(f"{self.source.path} has no metadata field {key}")
        value = self.source.metadata[key]
        if not isinstance(value, list):
            return shortest_decimal(value)
        if len(set(value)) != 1:
            raise GgufError(f"{self.source.path}: {key} differs from layer to layer: {value}")
        return shortest_decimal(value[0])

    def count(self, name: str, *default: Any) -> Any:
        """A field that counts something, no more than there are bytes in the file.

        Raises:
          GgufError: it is missing and has no default, or is not such a number.
        """
        value, most = self(name, *default), len(self.source.file.content)
        if value is not None and not (type(value) is int and 0 < value <= most):
            key = f"{self.source.architecture}.{name}"
            raise GgufError(
                f"{self.source.path}: {key} is {value!r}, not a number from 1 to {most:,}"
            )
        return value


def shortest_decimal(value: Any) -> Any:
    """A float32 read as the decimal number that was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def count_layers(field: GgufFields, name: str) -> Any:
    """Layers of a stack; a T5's decoder has by default as many as its encoder, and an encoder
    alone has none."""
    if name == "block_count":
        return field(name)
    if field.source.architecture == "t5encoder":
        return 0
    return field(name, field("block_count"))


def t5_fields(source: GgufTensors, field: GgufFields) -> dict[str, Any]:
    """Fields of config.json of a T5. llama.cpp takes 128 for the largest distance of every T5, the
    tanh form of GELU where the feed-forward layer is gated, and ReLU where it is not."""
    per_layer = "enc.blk.1.attn_rel_b.weight" in source.names
    gated = "enc.blk.0.ffn_gate.weight" in source.names
    return {
        "model_type": "umt5" if per_layer else "t5",
        "d_model": field.count("embedding_length"),
        "d_kv": field.count("attention.key_length"),
        "d_ff": field.count("feed_forward_length"),
        "num_heads": field.count("attention.head_count"),
        "num_layers": field.count("block_count"),
        "num_decoder_layers": count_layers(field, "decoder_block_count"),
        "relative_attention_num_buckets": field.count("attention.relative_buckets_count"),
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": field("attention.layer_norm_rms_epsilon"),
        "decoder_start_token_id": field("decoder_start_token_id", 0),
    }


def decoder_fields(source: GgufTensors, field: GgufFields) -> dict[str, Any]:
    """Fields of config.json that Llama, Qwen and Gemma share."""
    heads, embed = field.count("attention.head_count"), field.count("embedding_length")
    head_dim = field.count(
        "attention.key_length", field.count("rope.dimension_count", embed // heads)
    )
    if field.count("rope.dimension_count", head_dim) != head_dim:
        raise GgufError(f"{source.path}: rotary positions on a part of each head are not known")
    if field.count("attention.value_length", head_dim) != head_dim:
        raise GgufError(f"{source.path}: values of another width than keys are not known here")
    fields = {
        "hidden_size": embed,
        "num_hidden_layers": field.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": field.count("feed_forward_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in source.names,
    }
    scaling = rope_scaling(source, field, fields)
    return fields | ({"rope_scaling": scaling} if scaling else {})


def rope_scaling(
    source: GgufTensors, field: GgufFields, fields: Mapping[str, Any]
) -> dict[str, Any] | None:
    """rope_scaling of config.json: how positions are stretched; None for not at all.

    Args:
      source: the file, which has a tensor of factors if it is a Llama 3.
      field: metadata of its architecture.
      fields: the other fields of config.json.
    """
    if "rope_freqs.weight" in source.names:
        return llama3_scaling(source, field, fields)
    # As llama.cpp reads it: linear where no type is written, and the factor under two names.
    kind = field("rope.scaling.type", "linear")
    factor = float(field("rope.scaling.factor", field("rope.scale_linear", 0.0)) or 1.0)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = field.count(
            "rope.scaling.original_context_length"
        )
    return scaling


def llama3_scaling(
    source: GgufTensors, field: GgufFields, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """rope_scaling of Llama 3: the four numbers behind the factors that divide frequencies.

    Files carry the factors only; all Llamas since 3.1 share low 1, high 4 and 8192 positions.

    Args:
      source: the file.
      field: metadata of its architecture.
      fields: the other fields of config.json.

    Raises:
      GgufError: the factors are others.
    """
    factors = source.read("rope_freqs.weight")
    original = int(field("rope.scaling.original_context_length", 8192))
    scaling = {
        "rope_type": "llama3",
        "factor": shortest_decimal(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = llama3_factors(scaling, fields["rope_theta"], fields["head_dim"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise GgufError(f"{source.path}: rope_freqs.weight does not hold Llama 3's factors")
    return scaling


def llama3_factors(scaling: Mapping[str, Any], base: float, head_dim: int) -> np.ndarray:
    """Factors that divide the rotary frequencies of Llama 3.1.

    Args:
      scaling: its rope_scaling.
      base: its rope_theta.
      head_dim: width of a head.

    Returns:
      A factor for each frequency, [head_dim / 2].
    """
    turns = base ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    turns = turns * scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def llama_fields(source: GgufTensors, field: GgufFields) -> dict[str, Any]:
    """Fields of config.json that Llama and Qwen add."""
    return {"hidden_act": "silu", "mlp_bias": "blk.0.ffn_up.bias" in source.names}


def gemma_fields(source: GgufTensors, field: GgufFields) -> dict[str, Any]:
    """Fields of config.json that all Gemmas add."""
    return {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}


def gemma2_fields(source: GgufTensors, field: GgufFields) -> dict[str, Any]:
    """Fields of config.json that Gemma 2 adds."""
    # llama.cpp knows the 27B by its 46 layers: its queries are scaled by width / heads.
    width = field.count("embedding_length") // field.count("attention.head_count")
    layers = field.count("block_count")
    return gemma_fields(source, field) | {
        "query_pre_attn_scalar": width if layers == 46 else field.count("attention.key_length"),
        "attn_logit_softcapping": field("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": field("final_logit_softcapping", 30.0),
        "sliding_window": field.count("attention.sliding_window", 4096),
        "layer_types": alternate_layer_types(layers, window_cycle(field, 2)),
    }


def gemma3_fields(source: GgufTensors, field: GgufFields) -> dict[str, Any]:
    """Fields of config.json that Gemma 3 adds."""
    # Likewise, the 27B by its 62 layers. Sliding layers turn by the base of Gemma 2.
    width = field.count("embedding_length") // field.count("attention.head_count")
    layers = field.count("block_count")
    return gemma_fields(source, field) | {
        "query_pre_attn_scalar": width if layers == 62 else field.count("attention.key_length"),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": field("final_logit_softcapping", None),
        "sliding_window": field.count("attention.sliding_window"),
        "layer_types": alternate_layer_types(layers, window_cycle(field, 6)),
        "rope_local_base_freq": field("rope.freq_base_swa", 10000.0),
    }


def window_cycle(field: GgufFields, cycle: int) -> int:
    """Layers from one without a window to the next, by default `cycle`."""
    return field.count("attention.sliding_window_pattern", cycle)


GEMMA = {"gemma": gemma_fields, "gemma2": gemma2_fields, "gemma3": gemma3_fields}
