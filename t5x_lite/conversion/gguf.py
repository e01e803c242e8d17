# SPDX-License-Identifier: Apache-2.0
""".gguf files as checkpoints: a config like Hugging Face's, tensors one by one, the family's table.

What llama.cpp's converter changes on the way is undone here: other names, rotary halves interleaved
in Llama's queries and keys, Gemma's norms with one added, GPT-2's matrices transposed.
"""

import math
import re
from types import ModuleType
from typing import Any

import numpy as np

from t5x_lite import config
from t5x_lite.conversion import gguf_file, huggingface
from t5x_lite.conversion.gguf_file import GgufError
from t5x_lite.conversion.tables import Entry

# general.architecture -> model_type of Hugging Face.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}

# Hugging Face's names, without "model." or "transformer.", and GGUF's.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.{layer}.input_layernorm": "blk.{layer}.attn_norm",
    "layers.{layer}.self_attn.q_proj": "blk.{layer}.attn_q",
    "layers.{layer}.self_attn.k_proj": "blk.{layer}.attn_k",
    "layers.{layer}.self_attn.v_proj": "blk.{layer}.attn_v",
    "layers.{layer}.self_attn.o_proj": "blk.{layer}.attn_output",
    "layers.{layer}.self_attn.q_norm": "blk.{layer}.attn_q_norm",
    "layers.{layer}.self_attn.k_norm": "blk.{layer}.attn_k_norm",
    "layers.{layer}.post_attention_layernorm": "blk.{layer}.ffn_norm",
    "layers.{layer}.mlp.gate_proj": "blk.{layer}.ffn_gate",
    "layers.{layer}.mlp.up_proj": "blk.{layer}.ffn_up",
    "layers.{layer}.mlp.down_proj": "blk.{layer}.ffn_down",
}
SANDWICH = NAMES | {
    "layers.{layer}.post_attention_layernorm": "blk.{layer}.post_attention_norm",
    "layers.{layer}.pre_feedforward_layernorm": "blk.{layer}.ffn_norm",
    "layers.{layer}.post_feedforward_layernorm": "blk.{layer}.post_ffw_norm",
}
GPT2 = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "h.{layer}.ln_1": "blk.{layer}.attn_norm",
    "h.{layer}.attn.c_attn": "blk.{layer}.attn_qkv",
    "h.{layer}.attn.c_proj": "blk.{layer}.attn_output",
    "h.{layer}.ln_2": "blk.{layer}.ffn_norm",
    "h.{layer}.mlp.c_fc": "blk.{layer}.ffn_up",
    "h.{layer}.mlp.c_proj": "blk.{layer}.ffn_down",
}
TABLES = {"gemma2": SANDWICH, "gemma3": SANDWICH, "gpt2": GPT2}
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}


class Source:
    """A .gguf file: names -> (shape, dtype), config_json, and every tensor when it is asked for.

    A quantised tensor is float32 when it is read. kinds says how each one lies in the file.

    Raises:
      GgufError: the file is broken, or of an architecture that is not known here.
    """

    def __init__(self, path):
        self.file = gguf_file.open_file(path)
        self.path, self.metadata = self.file.path, self.file.metadata
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise GgufError(
                f"{path}: general.architecture is {self.architecture!r}; those that can be read "
                f"are {', '.join(ARCHITECTURES)}"
            )
        self.kinds = {name: tensor.kind for name, tensor in self.file.tensors.items()}
        self.names = {
            name: (tensor.shape, self.dtype(name)) for name, tensor in self.file.tensors.items()
        }

    def dtype(self, name: str) -> np.dtype:
        """What `read` gives: the dtype of the file, float32 for what is quantised."""
        kind = self.kinds[name]
        if kind == "BF16" and not self.adds_one(name):
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(np.float32) if self.adds_one(name) else FLOATS.get(kind, np.dtype("f4"))

    def adds_one(self, name: str) -> bool:
        """Whether the file has one plus the weight there."""
        return self.architecture.startswith("gemma") and name.endswith("norm.weight")

    def read(self, name: str, at: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor, dequantised, as Hugging Face has its values; of a stack one layer.

        Raises:
          GgufError: the gguf package cannot dequantise it.
        """
        array = dequantised(self.file, name)
        array = array if at is None else array.take(at[1], at[0])
        if self.adds_one(name):
            return array.astype(np.float32) - np.float32(1)
        return array.astype(self.dtype(name), copy=False)

    def config_json(self) -> dict:
        """What Hugging Face's config.json would say of this model.

        Raises:
          GgufError: a field is missing, or the file has an attention that is not known here.
        """
        return described(self)

    def family(self) -> ModuleType:
        return huggingface.family(ARCHITECTURES[self.architecture])

    def model(self) -> config.Model:
        """The config of the model in the file."""
        try:
            return self.family().model(self.config_json(), self.hugging_face_names())
        except ValueError as error:
            raise GgufError(f"{self.path}: {error}") from error

    def hugging_face_names(self) -> set[str]:
        """The names that the tensors have in a Hugging Face checkpoint of the family."""
        prefix = "transformer." if self.architecture == "gpt2" else "model."
        theirs = {gguf: name for name, gguf in names_of(self.architecture).items()}
        found = set()
        for name in self.names:
            stem, _, kind = name.rpartition(".")
            layer = re.match(r"blk\.(\d+)\.", stem)
            stem = re.sub(r"^blk\.\d+\.", "blk.{layer}.", stem)
            if stem in theirs:
                plain = theirs[stem].replace("{layer}", layer[1] if layer else "")
                found.add(f"{'' if plain == 'lm_head' else prefix}{plain}.{kind}")
        return found

    def entries(self, cfg: config.Model) -> list[Entry]:
        """The family's table with the names and the layout of the file."""
        return [renamed(entry, self.architecture) for entry in self.family().entries(cfg)]

    def ignored(self) -> tuple[str, ...]:
        """Tensors that are no weights: they were read into the config."""
        return ("rope_freqs.weight",)


def names_of(architecture: str) -> dict[str, str]:
    return TABLES.get(architecture, NAMES)


def tensor_name(name: str, architecture: str) -> str:
    """What a tensor of a Hugging Face checkpoint is called in a .gguf file."""
    stem, _, kind = re.sub(r"^(model|transformer)\.", "", name).rpartition(".")
    names = names_of(architecture)
    if stem not in names:
        raise GgufError(f"{name} has no name in a GGUF file of architecture {architecture}")
    return f"{names[stem]}.{kind}"


def renamed(entry: Entry, architecture: str) -> Entry:
    """A line of the Hugging Face family's table as it is for a .gguf file."""
    theirs = tensor_name(entry.theirs, architecture)
    axes, paired = entry.axes, entry.paired
    if architecture == "llama" and re.search(r"\.attn_[qk]\.", theirs):
        paired = True
    if architecture == "gpt2" and theirs.endswith(".weight") and ".c_" in entry.theirs:
        axes = " ".join(reversed(re.findall(r"\([^)]*\)|\S+", axes)))
    return entry._replace(theirs=theirs, axes=axes, paired=paired)


def dequantised(file: gguf_file.File, name: str) -> np.ndarray:
    """The values of a tensor in the dtype of the file, or in float32."""
    tensor = file.tensors[name]
    raw = np.frombuffer(file.content, np.uint8, tensor.size, tensor.begin)
    if tensor.kind in FLOATS:
        return raw.view(FLOATS[tensor.kind]).reshape(tensor.shape)
    if tensor.kind == "BF16":
        import ml_dtypes

        return raw.view(ml_dtypes.bfloat16).reshape(tensor.shape)
    constants, quants = gguf_file.package("constants"), gguf_file.package("quants")
    kind = constants.GGMLQuantizationType[tensor.kind]
    rows = raw.reshape(quants.quant_shape_to_byte_shape(tensor.shape, kind))
    try:
        return quants.dequantize(rows, kind)
    except NotImplementedError as error:
        raise GgufError(
            f"{file.path}: tensor {name} is {tensor.kind}, which the gguf package cannot "
            "dequantise. Take a file with another quantisation, such as Q8_0"
        ) from error


def described(source: Source) -> dict:
    """config.json of the source."""
    architecture, metadata = source.architecture, source.metadata
    field = Fields(source)
    check_layers(source, field("block_count"))
    if metadata.get(f"{architecture}.expert_count"):
        raise GgufError(f"{source.path}: {architecture}.expert_count: mixtures are not known here")
    embedding = source.names.get("token_embd.weight", ((0, 0), None))[0]
    shared = {"model_type": ARCHITECTURES[architecture], "vocab_size": embedding[0]}
    shared |= {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"))
    }
    shared["tie_word_embeddings"] = "output.weight" not in source.names
    if architecture == "gpt2":
        return shared | {
            "n_embd": field("embedding_length"),
            "n_layer": field("block_count"),
            "n_head": field("attention.head_count"),
            "n_positions": source.names.get("position_embd.weight", ((0,), None))[0][0],
            "n_inner": field("feed_forward_length"),
            "layer_norm_epsilon": field("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
    return shared | decoder(source, field) | GEMMA.get(architecture, llama)(source, field)


def check_layers(source: Source, said: Any) -> None:
    """GgufError unless the file has as many layers as it says, before anything counts on them."""
    found = {name.split(".")[1] for name in source.names if name.startswith("blk.")}
    if said != len(found):
        raise GgufError(
            f"{source.path}: {source.architecture}.block_count is {said}, but there are tensors of "
            f"{len(found)} layers"
        )


class Fields:
    """The metadata of the source's architecture; lists of equal values per layer are one value."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self, name: str, *default: Any) -> Any:
        key = f"{self.source.architecture}.{name}"
        if key not in self.source.metadata:
            if default:
                return default[0]
            raise GgufError(f"{self.source.path} has no metadata field {key}")
        value = self.source.metadata[key]
        if not isinstance(value, list):
            return shortest(value)
        if len(set(value)) != 1:
            raise GgufError(f"{self.source.path}: {key} differs from layer to layer: {value}")
        return shortest(value[0])


def shortest(value: Any) -> Any:
    """A float32 read as the decimal number that was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def decoder(source: Source, field: Fields) -> dict:
    """What all of Llama's kind have."""
    heads, embed = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", field("rope.dimension_count", embed // heads))
    if field("rope.dimension_count", head_dim) != head_dim:
        raise GgufError(f"{source.path}: rotary positions on a part of each head are not known")
    if field("attention.value_length", head_dim) != head_dim:
        raise GgufError(f"{source.path}: values of another width than keys are not known here")
    found = {
        "hidden_size": embed,
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": field("feed_forward_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in source.names,
    }
    scaling = rope_scaling(source, field, found)
    return found | ({"rope_scaling": scaling} if scaling else {})


def rope_scaling(source: Source, field: Fields, found: dict) -> dict | None:
    """How positions are stretched; Llama 3's way is a tensor of factors in the file."""
    if "rope_freqs.weight" in source.names:
        return llama3_scaling(source, field, found)
    kind = field("rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": float(field("rope.scaling.factor", 1.0))}


def llama3_scaling(source: Source, field: Fields, found: dict) -> dict:
    """The four numbers behind the factors by which frequencies are divided.

    Files carry the factors only; all Llamas since 3.1 share low 1, high 4 and 8192 positions.

    Raises:
      GgufError: the factors are others.
    """
    factors = source.read("rope_freqs.weight")
    original = int(field("rope.scaling.original_context_length", 8192))
    scaling = {
        "rope_type": "llama3",
        "factor": shortest(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = llama3_factors(scaling, found["rope_theta"], found["head_dim"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise GgufError(f"{source.path}: rope_freqs.weight holds none of Llama 3's factors")
    return scaling


def llama3_factors(scaling: dict, base: float, head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by [head_dim / 2]."""
    turns = base ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    turns = turns * scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def llama(source: Source, field: Fields) -> dict:
    return {"hidden_act": "silu", "mlp_bias": "blk.0.ffn_up.bias" in source.names}


def gemma(source: Source, field: Fields) -> dict:
    return {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}


def gemma2(source: Source, field: Fields) -> dict:
    # llama.cpp knows the 27B by its 46 layers: its queries are scaled by width / heads.
    width = field("embedding_length") // field("attention.head_count")
    layers = field("block_count")
    return gemma(source, field) | {
        "query_pre_attn_scalar": width if layers == 46 else field("attention.key_length"),
        "attn_logit_softcapping": field("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": field("final_logit_softcapping", 30.0),
        "sliding_window": field("attention.sliding_window", 4096),
        "layer_types": layer_types(layers, 2),
    }


def gemma3(source: Source, field: Fields) -> dict:
    # Likewise, the 27B by its 62 layers. Sliding layers turn by the base of Gemma 2.
    width = field("embedding_length") // field("attention.head_count")
    layers = field("block_count")
    return gemma(source, field) | {
        "query_pre_attn_scalar": width if layers == 62 else field("attention.key_length"),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": field("final_logit_softcapping", None),
        "sliding_window": field("attention.sliding_window"),
        "layer_types": layer_types(layers, 6),
        "rope_local_base_freq": field("rope.freq_base_swa", 10000.0),
    }


GEMMA = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}


def layer_types(layers: int, cycle: int) -> list[str]:
    """Every cycle-th layer sees everything, the others a window."""
    return [
        "sliding_attention" if (layer + 1) % cycle else "full_attention" for layer in range(layers)
    ]
