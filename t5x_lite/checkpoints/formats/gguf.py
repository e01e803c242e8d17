# SPDX-License-Identifier: Apache-2.0
""".gguf files as checkpoints: tensors one by one, and the table of the Hugging Face family.

Changes of llama.cpp's converter are undone here: other names, rotary halves interleaved in Llama's
queries and keys, Gemma's norms with one added, GPT-2's matrices transposed.
"""

import fnmatch
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from t5x_lite import config
from t5x_lite.checkpoints.formats import gguf_file, huggingface
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.tokenizers.errors import GgufError
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.remote_folders import RemoteBytes, RemoteFolder

# general.architecture -> model_type of Hugging Face.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "t5": "t5",
    "t5encoder": "t5",
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
# Of one stack, with "encoder" and "enc" for its names; a feed-forward layer is its last.
T5_ATTENTION = {"layer_norm": "norm", "{kind}.q": "q", "{kind}.k": "k", "{kind}.v": "v"}
T5_ATTENTION |= {"{kind}.o": "o", "{kind}.relative_attention_bias": "rel_b"}
T5_MLP = {"layer_norm": "norm", "DenseReluDense.wo": "down"}
T5_MLP |= {f"DenseReluDense.{name}": "up" for name in ("wi", "wi_1")}
T5_MLP |= {"DenseReluDense.wi_0": "gate"}


def list_t5_names() -> dict[str, str]:
    """Hugging Face's names of a T5's tensors, and GGUF's."""
    names = {"shared": "token_embd", "lm_head": "output"}
    sublayers = {
        "encoder": (("SelfAttention", "attn", T5_ATTENTION), ("", "ffn", T5_MLP)),
        "decoder": (
            ("SelfAttention", "attn", T5_ATTENTION),
            ("EncDecAttention", "cross_attn", T5_ATTENTION),
            ("", "ffn", T5_MLP),
        ),
    }
    for stack, short in (("encoder", "enc"), ("decoder", "dec")):
        names[f"{stack}.final_layer_norm"] = f"{short}.output_norm"
        for number, (kind, sublayer, table) in enumerate(sublayers[stack]):
            names |= {
                f"{stack}.block.{{layer}}.layer.{number}.{theirs.replace('{kind}', kind)}": (
                    f"{short}.blk.{{layer}}.{sublayer}_{ours}"
                )
                for theirs, ours in table.items()
            }
    return names


T5 = list_t5_names()
TABLES = {"gemma2": SANDWICH, "gemma3": SANDWICH, "gpt2": GPT2, "t5": T5, "t5encoder": T5}
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}


class GgufTensors:
    """Tensors of a .gguf file; a quantized one is float32 when it is read.

    A remote file is downloaded when the first tensor is read; before, only its header is.

    Args:
      path: the file.
      repository: the remote folder that it is of; None for a file of this machine.

    Attributes:
      path: the file.
      metadata: its fields.
      architecture: general.architecture, such as "llama".
      kinds: how each tensor is stored, such as "Q8_0".
      names: shape and dtype of each tensor as `read` returns it.

    Raises:
      GgufError: the file is broken, or of an architecture that is not known here.
    """

    def __init__(self, path: str | Path, repository: RemoteFolder | None = None):
        self.file, self.repository = gguf_file.open_gguf(path, repository), repository
        self.path, self.metadata = self.file.path, self.file.metadata
        check_whole_model(self.path, self.metadata)
        self.architecture: str = self.metadata["general.architecture"]
        self.kinds = {name: tensor.kind for name, tensor in self.file.tensors.items()}
        self.names = {
            name: (tensor.shape, self.dtype(name)) for name, tensor in self.file.tensors.items()
        }

    @property
    def remote(self) -> bool:
        """True while the tensors are not on the disk."""
        return isinstance(self.file.content, RemoteBytes)

    def download(self) -> None:
        """Downloads the file, if that was not done yet.

        Raises:
          ValueError, OSError: it cannot be downloaded.
        """
        if self.remote:
            repository = not_none(self.repository)
            repository.fetch([self.path.relative_to(repository.folder).as_posix()])
            self.file = gguf_file.open_gguf(self.path)

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns: that of the file, float32 for a quantized tensor."""
        kind = self.kinds[name]
        if kind == "BF16" and not self.adds_one(name):
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(np.float32) if self.adds_one(name) else FLOATS.get(kind, np.dtype("f4"))

    def adds_one(self, name: str) -> bool:
        """True where the file has one plus the weight."""
        return self.architecture.startswith("gemma") and name.endswith("norm.weight")

    def read(self, name: str, position: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor, dequantized, with the values that Hugging Face has.

        Args:
          name: name of the tensor.
          position: axis of the layers in a stack, and the layer; None for all of the tensor.

        Raises:
          GgufError: the gguf package cannot dequantize it.
        """
        self.download()
        array = dequantize_tensor(self.file, name)
        array = array if position is None else array.take(position[1], position[0])
        if self.adds_one(name):
            return array.astype(np.float32) - np.float32(1)
        return array.astype(self.dtype(name), copy=False)

    def family(self) -> ModuleType:
        """The Hugging Face family of the architecture."""
        return huggingface.family_module(ARCHITECTURES[self.architecture])

    def entries(self, cfg: config.Model) -> list[Entry]:
        """The family's table with the names and the layout of the file."""
        renamed = [rename_entry(entry, self.architecture) for entry in self.family().entries(cfg)]
        return [entry._replace(change=self.describe_change(entry.theirs)) for entry in renamed]

    def describe_change(self, theirs: str) -> str:
        """The change of a tensor's values when it is read, in words; {layer} stands for any."""
        pattern = theirs.replace("{layer}", "*")
        kinds = {kind for name, kind in self.kinds.items() if fnmatch.fnmatchcase(name, pattern)}
        quantized = sorted(kinds - FLOATS.keys() - {"BF16"})
        words = [f"dequantized from {' and '.join(quantized)}"] if quantized else []
        return ", ".join([*words, *(["minus one"] if self.adds_one(theirs) else [])])

    def ignored(self) -> tuple[str, ...]:
        """Tensors that are not weights, as they were read into the config; a T5's bias of
        cross-attention, which nothing computes with."""
        return ("rope_freqs.weight", "dec.blk.*.cross_attn_rel_b.weight")


def check_whole_model(path: Path, metadata: dict[str, Any]) -> None:
    """Raises GgufError unless a file holds a whole model of an architecture that is known here."""
    architecture = metadata.get("general.architecture")
    if metadata.get("split.count", 0) not in (0, 1):
        number = metadata.get("split.no")
        part = f"{number + 1} of {metadata['split.count']}" if isinstance(number, int) else "one"
        raise GgufError(
            f"{path} is part {part} of a model that gguf-split cut up: join them with llama.cpp's "
            "llama-gguf-split"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise GgufError(
            f"{path} has general.type {kind!r}: it is no model by itself. Take the file of the "
            "model; a LoRA adapter is merged into it with llama.cpp's llama-export-lora"
        )
    if architecture not in ARCHITECTURES:
        raise GgufError(
            f"{path}: general.architecture is {architecture!r}; those that can be read are "
            f"{', '.join(ARCHITECTURES)}"
        )


def gguf_names(architecture: str) -> dict[str, str]:
    """GGUF's name for each of Hugging Face's names."""
    return TABLES.get(architecture, NAMES)


def tensor_name(name: str, architecture: str) -> str:
    """Name in a .gguf file of a tensor of a Hugging Face checkpoint."""
    theirs = find_tensor_name(name, architecture)
    if theirs is None:
        raise GgufError(f"{name} has no name in a GGUF file of architecture {architecture}")
    return theirs


def find_tensor_name(name: str, architecture: str) -> str | None:
    """`tensor_name`; None for a tensor that GGUF files of the architecture do not have."""
    stem, _, kind = re.sub(r"^(model|transformer)\.", "", name).rpartition(".")
    # A T5 has its relative bias in the first block alone.
    general = stem.replace(".block.0.", ".block.{layer}.")
    theirs = gguf_names(architecture).get(general)
    if theirs is None:
        return None
    return f"{theirs if general == stem else theirs.replace('{layer}', '0')}.{kind}"


def rename_entry(entry: Entry, architecture: str) -> Entry:
    """A line of the Hugging Face family's table as it is for a .gguf file."""
    theirs = tensor_name(entry.theirs, architecture)
    axes, paired = entry.axes, entry.paired
    if architecture == "llama" and re.search(r"\.attn_[qk]\.", theirs):
        paired = True
    if architecture == "gpt2" and theirs.endswith(".weight") and ".c_" in entry.theirs:
        axes = " ".join(reversed(re.findall(r"\([^)]*\)|\S+", axes)))
    return entry._replace(theirs=theirs, axes=axes, paired=paired)


def dequantize_tensor(file: gguf_file.GgufFile, name: str) -> np.ndarray:
    """The values of a tensor in the dtype of the file, or in float32."""
    tensor = file.tensors[name]
    raw = np.frombuffer(cast(Any, file.content), np.uint8, tensor.size, tensor.begin)
    if tensor.kind in FLOATS:
        return raw.view(FLOATS[tensor.kind]).reshape(tensor.shape)
    if tensor.kind == "BF16":
        import ml_dtypes

        return raw.view(ml_dtypes.bfloat16).reshape(tensor.shape)
    constants, quants = gguf_file.import_gguf("constants"), gguf_file.import_gguf("quants")
    kind = constants.GGMLQuantizationType[tensor.kind]
    block_bytes = constants.GGML_QUANT_SIZES[kind][1]
    # The package takes 16 rows at a time: rows of up to 512 blocks halve its time.
    row_blocks = math.gcd(tensor.size // block_bytes, 512)
    try:
        values = quants.dequantize(raw.reshape(-1, row_blocks * block_bytes), kind)
    except NotImplementedError as error:
        raise GgufError(
            f"{file.path}: tensor {name} is {tensor.kind}, which the gguf package cannot "
            "dequantize. Take a file with another quantization, such as Q8_0"
        ) from error
    return values.reshape(tensor.shape)
