# SPDX-License-Identifier: Apache-2.0
"""Fields of a Hugging Face folder on which no logit depends: how it generates, and what readers of
an export want.

They stand in a run folder as FILE, from a conversion until the next one. What a conversion writes
itself is never replaced by them.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite import config
from t5x_lite.config.checked import field_types
from t5x_lite.utils import bounded_files
from t5x_lite.utils.atomic_files import write_atomically
from t5x_lite.utils.bounded_files import UnreadableFileError

FILE = "huggingface.json"
GENERATION = "generation_config.json"
# Fields of config.json, at any depth; servers read the lengths, pipelines the prefixes of tasks.
KEPT = ("max_position_embeddings", "n_positions", "n_ctx", "attention_dropout", "hidden_dropout")
KEPT += ("attn_pdrop", "summary_type", "task_specific_params", "use_cache", "pretraining_tp")
# Fields of generation_config.json that an export writes itself, or that change no text.
WRITTEN = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
WRITTEN += ("_from_model_config", "transformers_version")
SILENT = ("use_cache", "cache_implementation", "cache_config", "return_dict_in_generate")
SILENT += ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Values with which a field changes no text; without do_sample the fields of SAMPLING never do.
NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "min_length": 0,
    "early_stopping": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h")
SAMPLING += ("epsilon_cutoff", "eta_cutoff")
# Fields of ids, and all that config.Decode has in the same meaning, whether it samples or not.
IDS = ("bad_words_ids", "suppress_tokens", "forced_bos_token_id")
FOLLOWED = ("max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", *IDS)


class KeptFields(NamedTuple):
    """Fields of the two files of a Hugging Face folder.

    Attributes:
      config: of config.json; fields of its parts lie in objects, as there.
      generation: of generation_config.json.
    """

    config: dict[str, Any] = {}
    generation: dict[str, Any] = {}


def pick_config(config_json: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that are kept."""
    picked = {name: value for name, value in config_json.items() if name in KEPT}
    for name, value in config_json.items():
        if isinstance(value, dict) and name not in KEPT and (inner := pick_config(value)):
            picked[name] = inner
    return picked


def read_kept(folder: Path, config_json: dict[str, Any]) -> KeptFields:
    """The fields of a Hugging Face folder that are kept.

    Args:
      folder: the folder, whose generation_config.json may be missing.
      config_json: its config.json.

    Raises:
      UnreadableFileError: a file is not a JSON object.
    """
    path = folder / GENERATION
    generation = bounded_files.read_json_object(path) if path.exists() else {}
    kept = {name: value for name, value in generation.items() if name not in WRITTEN}
    return KeptFields(pick_config(config_json), kept)


def merge_config(config_json: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """A config.json with kept fields that it lacks, in the parts that it has."""
    merged = dict(config_json)
    for name, value in kept.items():
        if name in KEPT:
            merged.setdefault(name, value)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge_config(merged[name], value)
    return merged


def load_kept(folder: Path) -> KeptFields:
    """The fields that `save_kept` wrote into a run folder; none where there is no file.

    Raises:
      UnreadableFileError: the file is broken.
    """
    path = folder / FILE
    if not path.exists():
        return KeptFields()
    content = bounded_files.read_json_object(path)
    parts = [content.get(name, {}) for name in KeptFields._fields]
    if not all(isinstance(part, dict) for part in parts):
        raise UnreadableFileError(f"{path} does not hold fields of a Hugging Face folder")
    return KeptFields(*parts)


def find_kept(path: Path) -> KeptFields:
    """The fields of a Hugging Face folder or of a run folder; none of anything else."""
    file = path / "config.json"
    if file.is_file():
        return read_kept(path, bounded_files.read_json_object(file))
    return load_kept(path)


def save_kept(folder: Path, kept: KeptFields) -> None:
    """Writes kept fields into a run folder, if there are any."""
    if any(kept):
        text = json.dumps(kept._asdict(), indent=1, ensure_ascii=False)
        write_atomically(folder / FILE, text + "\n")


def follow_generation(generation: dict[str, Any], vocab: int) -> config.Decode:
    """config.Decode as a generation_config.json has it, in the fields that mean the same in both.

    A value that Decode refuses is left out: `describe_ignored` names it. Beams are not followed,
    for the penalties of their length are other formulas.

    Args:
      generation: the fields of the file.
      vocab: number of ids of the model.
    """
    decode = config.Decode()
    for name, value in generation_fields(generation).items():
        if name not in IDS or largest_id(value) < vocab:
            with contextlib.suppress(ValueError):
                decode = dataclasses.replace(decode, **{name: value})
    return decode


def generation_fields(generation: dict[str, Any]) -> dict[str, Any]:
    """Fields of a generation_config.json that config.Decode has too; temperature before filters."""
    sampled = generation.get("do_sample") is True
    fields = {"temperature": 1.0} if sampled else {}
    for name in (*(SAMPLING if sampled else ()), *FOLLOWED):
        if generation.get(name) is not None and name in field_types(config.Decode):
            fields[name] = generation[name]
    return fields


def largest_id(ids: Any) -> int:
    """The largest id in lists of any depth; -1 where there is none."""
    if isinstance(ids, list):
        return max(map(largest_id, ids), default=-1)
    return ids if isinstance(ids, int) else -1


def describe_ignored(generation: dict[str, Any], vocab: int) -> str:
    """Fields of a generation_config.json that would change texts and are not followed here.

    Args:
      generation: the fields of the file.
      vocab: number of ids of the model.

    Returns:
      "num_beams = 4, begin_suppress_tokens = [3]"; "" where there are none.
    """
    sampled = generation.get("do_sample") is True
    decode, fields = follow_generation(generation, vocab), generation_fields(generation)
    ignored = []
    for name, value in generation.items():
        idle = name in SAMPLING and not sampled or name == "do_sample" and sampled
        followed = name in fields and listed(getattr(decode, name)) == value
        if value is None or idle or followed or name in SILENT or value == NEUTRAL.get(name):
            continue
        ignored.append(f"{name} = {value!r:.60}")
    return ", ".join(ignored)


def listed(value: Any) -> Any:
    """A value with lists for tuples, as JSON has it."""
    return [listed(each) for each in value] if isinstance(value, tuple) else value
