# SPDX-License-Identifier: Apache-2.0
"""Names of earlier versions: the one table from old to new, and the notice where one is read.

Configs, checkpoints and command lines that were written with an old name still load. `gin_aliases`
renames in .gin text, `rename_options` on a command line, `rename_keys` in settings kept as JSON.
A row stays for as long as a checkpoint may hold the name; to rename another field, add a row.
"""

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from t5x_lite.utils.nearest import near_names, suggest

CLASSES = {
    "HeadLoss": "DraftHeadLoss",
    "Heads": "DraftHeads",
    "Part": "ParamGroup",
    "Pooling": "Readout",
}

# (class, old field): new field. The class by its new name, unless both had such a field.
FIELDS = {
    ("Pooling", "kind"): "pooling",
    ("Compare", "quantised"): "quantized",
    ("Decode", "decoder"): "drafter",
    ("Decode", "length"): "max_new_tokens",
    ("Decode", "width"): "draft_length",
    ("DraftHeadLoss", "own"): "main_loss_weight",
    ("Model", "activations"): "dtype",
    ("Model", "blockwise"): "draft_heads",
    ("Model", "pooling"): "readout",
    ("Model", "start"): "decoder_start_token_id",
    ("Model", "starts_prompts"): "add_bos",
    ("Train", "heads"): "draft_head_loss",
    ("Train", "parts"): "param_groups",
    ("Train", "patience"): "max_consecutive_skips",
}

# (class, field): old value to new value. Both by their new names.
VALUES = {
    ("Train", "cross_entropy"): {"pieces": "chunked", "whole": "full"},
    ("Train", "remat"): {"layers": "full", "products": "minimal"},
}

MACROS = {"INITIAL_CHECKPOINT": "INITIAL_CHECKPOINT_PATH"}

# (class, new field): the value, as .gin text, by which a saved config without it goes on as before.
FORMER_VALUES = {
    ("Readout", "kind"): "'vector'",
    ("FillInTheMiddle", "join"): "'nothing'",
    ("SpanCorruption", "join"): "'nothing'",
}

# Folders of configs/.
FOLDERS = {"adapting": "adaptation"}

OPTIONS = {"--decoder": "--drafter", "--length": "--max_new_tokens", "--width": "--draft_length"}

LAYOUTS = {"aligned": "encoder_only", "joined": "decoder_only", "pair": "encoder_decoder"}
OPTION_VALUES = {"--layout": LAYOUTS}


# Names that transformers, vLLM, CTranslate2 and T5X have for a field: (class, theirs): ours. They
# are named in messages and not taken, for what they count is not always the same.
ELSEWHERE = {
    ("Decode", "assistant_model"): "drafter (draft:PATH)",
    ("Decode", "best_of"): "n_best (with choose=score)",
    ("Decode", "output_scores"): "logprobs (so many alternatives of each token)",
    ("Decode", "beam_size"): "beams",
    ("Decode", "decode_length"): "max_new_tokens",
    ("Decode", "do_sample"): "temperature (0 is greedy, 1 samples)",
    ("Decode", "max_decode_len"): "max_new_tokens",
    ("Decode", "max_decoding_length"): "max_new_tokens",
    ("Decode", "max_length"): "max_new_tokens (the prompt is not counted)",
    ("Decode", "max_tokens"): "max_new_tokens",
    ("Decode", "n"): "n_best",
    ("Decode", "num_assistant_tokens"): "draft_length",
    ("Decode", "num_beam_groups"): "beam_groups",
    ("Decode", "num_beams"): "beams",
    ("Decode", "num_decodes"): "n_best",
    ("Decode", "num_hypotheses"): "n_best",
    ("Decode", "num_return_sequences"): "n_best",
    ("Decode", "num_speculative_tokens"): "draft_length",
    ("Decode", "prompt_lookup_num_tokens"): "draft_length (with drafter lookup)",
    ("Decode", "sampling_temperature"): "temperature",
    ("Decode", "sampling_topk"): "top_k",
    ("Decode", "sampling_topp"): "top_p",
}
# Options that have no counterpart, with the reason.
ABSENT = {
    ("Decode", "eos_token_id"): "the checkpoint's tokenizer says which tokens end a text",
    ("Decode", "pad_token_id"): "rows are padded without one",
    ("Decode", "bos_token_id"): "the checkpoint's tokenizer says how a text begins",
    ("Decode", "use_cache"): "keys and values are always cached",
    ("Decode", "generator"): "bind seed: the same seed gives the same text",
    ("Decode", "stopping_criteria"): "max_new_tokens, regex and choices bound a text",
    ("Decode", "logits_processor"): "logit_bias, bad_words and regex steer a text",
}


class Renamed(NamedTuple):
    """One old name as it was read.

    Attributes:
      old: as it was written: config.Decode.length, --length, %INITIAL_CHECKPOINT.
      new: as it is written now.
      place: the file and line, or "" where the reader cannot change it.
    """

    old: str
    new: str
    place: str = ""


SHOWN: set[tuple[str, str]] = set()


def notify(names: Iterable[Renamed]) -> None:
    """Prints one line on stderr about the names that are new in this process."""
    fresh = {(each.old, each.new): each for each in reversed(list(names))}
    shown = []
    for pair in sorted(fresh.keys() - SHOWN):
        old, new, place = fresh[pair]
        shown.append(f"{old} is now {new}" + (f" ({place})" if place else ""))
    SHOWN.update(fresh)
    if shown:
        print(f"Old names, which still work: {', '.join(shown)}", file=sys.stderr)


def former_bindings(saved: str) -> list[str]:
    """Bindings of the fields that a saved config has not heard of, by `FORMER_VALUES`.

    Args:
      saved: the text of a resolved config, which has every field of its time.
    """
    return [
        f"config.{owner}.{field} = {value}"
        for (owner, field), value in FORMER_VALUES.items()
        if any(f"config.{name}()" in saved for name in class_names(owner))
        and f"config.{owner}.{field} =" not in saved
    ]


def class_names(owner: str) -> list[str]:
    """The name of a class, and its old names."""
    return [owner, *(old for old, new in CLASSES.items() if new == owner)]


def suggest_field(name: str, owner: str, known: Collection[str], dashes: str = "") -> str:
    """Ends a message about an unknown field: what it is called here, or near names.

    Args:
      name: the unknown name, without dashes.
      owner: the class of the config, such as "Decode".
      known: the names that exist.
      dashes: what stands before a name where it was written: "--" on a command line.
    """
    if reason := ABSENT.get((owner, name)):
        return reason
    if here := ELSEWHERE.get((owner, name)):
        return f"it is called {dashes}{here} here"
    # An old name that is misspelled is near the old name and not its new one.
    former = {old: new for (cls, old), new in FIELDS.items() if cls == owner}
    near = near_names(name, [*known, *former])
    if near and near[0] in former:
        return f"did you mean {dashes}{former[near[0]]}?"
    return suggest(name, known)


def rename_folder(path: str) -> str:
    """path with the folders of configs/ by their new names."""
    return "/".join(FOLDERS.get(part, part) for part in path.split("/"))


def rename_keys(values: dict[str, Any], owner: str, prefix: str = "") -> dict[str, Any]:
    """values with those keys renamed that are old fields of a class, in the order they were in.

    Args:
      values: fields by name, read from JSON or passed as keyword arguments.
      owner: the class of the config whose fields the keys are, such as "Decode".
      prefix: what stands before a field in a key, such as "decode.".

    Raises:
      ValueError: a field is there under both names.
    """
    renamed = {}
    for key, value in values.items():
        field = key.removeprefix(prefix)
        new = FIELDS.get((owner, field)) if key.startswith(prefix) else None
        if new and prefix + new in values:
            raise ValueError(both(key, prefix + new))
        renamed[prefix + new if new else key] = value
    return renamed


def rename_keywords(values: dict[str, Any], owner: str) -> dict[str, Any]:
    """`rename_keys` of keyword arguments, which reports the old ones on stderr."""
    renamed = rename_keys(values, owner)
    old = [name for name in values if name not in renamed]
    notify(Renamed(f"{name}=", f"{FIELDS[owner, name]}=") for name in old)
    return renamed


def rename_options(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """The arguments of a command with old options and their old values by their new names.

    Args:
      arguments: the words of the command line, as in sys.argv[1:].
      known: the options that the command has; others keep their names.

    Raises:
      ValueError: an option is there under both names.
    """
    present = {word.partition("=")[0] for word in arguments}
    renamed, names, values = [], [], {}
    for word in arguments:
        option, equals, value = word.partition("=")
        new = OPTIONS.get(option, option) if option not in known else option
        if new != option and new in known:
            if new in present:
                raise ValueError(both(option, new))
            names.append(Renamed(option, new))
            word = new + equals + value
        if word in values:
            names.append(Renamed(f"{renamed[-1]}={word}", f"{renamed[-1]}={values[word]}"))
            word = values[word]
        values = OPTION_VALUES.get(option, {}) if option in known else {}
        if equals and value in values:
            names.append(Renamed(word, f"{option}={values[value]}"))
            word = f"{option}={values[value]}"
        values = {} if equals else values
        renamed.append(word)
    notify(names)
    return renamed


def both(old: str, new: str) -> str:
    """The message for a thing that is named by its old and by its new name."""
    return f"{old} is the old name of {new}, and both are there: leave out {old}"
