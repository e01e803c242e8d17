# SPDX-License-Identifier: Apache-2.0
"""Sentence-T5 as a sentence-transformers folder: the files beside those of a T5.

modules.json names the chain: the T5 itself, 1_Pooling, 2_Dense (a projection without bias), and
3_Normalize. `add_modules` adds their fields to config.json under KEY, for `t5.parse_config`; the
projection's tensor goes by the name PROJECTION among the T5's own.
"""

from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.utils import bounded_files

KEY = "sentence_transformers"
PROJECTION = "2_Dense.linear.weight"
KINDS = {
    "mean": "pooling_mode_mean_tokens",
    "first": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
# Fields of a readout, and the names of their prompts: ours first, then those that are read too.
PROMPTS = {"query_prompt": ("query",), "document_prompt": ("document", "passage")}
PROMPTS_FILE = "config_sentence_transformers"
# The same as values of pooling_mode, which sentence-transformers writes since version 5.4.
MODES = {"mean": "mean", "cls": "first", "lasttoken": "last"}
# Files with the length at which sentence-transformers cuts texts, the newest name first.
LENGTH_FILES = ("sentence_bert_config", "sentence_roberta_config", "sentence_xlm-roberta_config")
# model_max_length of a tokenizer that cuts no text is 1e30.
LONGEST = 10**7
STEPS = ("Transformer", "Pooling", "Dense", "Normalize")
IDENTITY = "torch.nn.modules.linear.Identity"


def parse_readout(config_json: dict) -> config.Readout | None:
    """Readout of vectors, from a config.json of `add_modules`; None for other models."""
    return config.Readout("vector", **config_json[KEY]) if KEY in config_json else None


def entries(cfg: config.Model) -> list[Entry]:
    """The projection, which lies in a file of its own."""
    if cfg.readout is None or cfg.readout.project is None:
        return []
    return [Entry("readout/projection", PROJECTION, "outputs embed")]


def add_modules(folder: Path, config_json: dict) -> dict:
    """config.json, with what the folder's modules.json adds to it under KEY, if there is one.

    Raises:
      ValueError: names a module that Sentence-T5 does not have.
    """
    if not (folder / "modules.json").is_file():
        return config_json
    chain = read_modules(folder)
    kinds = [kind for kind, _ in chain]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds != [
        kind for kind in STEPS if kind in kinds
    ]:
        raise ValueError(
            f"{folder}/modules.json: the modules {', '.join(kinds)} are not implemented; known are "
            f"{', '.join(STEPS)} in this order, Dense and Normalize only where they exist"
        )
    if chain[0][1]:
        raise ValueError(f"{folder}/modules.json: give its folder {chain[0][1]} itself to convert")
    paths = dict(chain)
    kind = pooling_kind(folder, paths["Pooling"])
    fields: dict[str, Any] = {"pooling": kind, "normalize": "Normalize" in paths}
    if "Dense" in paths:
        fields["project"] = projection_width(folder, paths["Dense"])
    fields |= {"max_length": longest_text(folder)} | read_prompts(folder)
    return config_json | {KEY: fields}


def read_prompts(folder: Path) -> dict[str, str]:
    """Texts before queries and documents, by the name of their field; {} without any.

    Raises:
      ValueError: they are no texts, or one is added to every text.
    """
    if not (folder / f"{PROMPTS_FILE}.json").is_file():
        return {}
    values = read_json_file(folder, PROMPTS_FILE)
    prompts = values.get("prompts") or {}
    texts = prompts.values() if isinstance(prompts, dict) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{folder}/{PROMPTS_FILE}.json: prompts are not texts by name")
    default = values.get("default_prompt_name")
    if default is not None and prompts.get(default):
        raise ValueError(
            f"{folder}/{PROMPTS_FILE}.json: default_prompt_name = {default!r} is not implemented; "
            "name the prompt where texts are embedded"
        )
    texts_of = {
        field: [prompts[name] for name in names if name in prompts]
        for field, names in PROMPTS.items()
    }
    return {field: known[0] for field, known in texts_of.items() if known}


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of every step in modules.json.

    Raises:
      ValueError: it is not a list of them, or one has no folder beside it.
    """
    file = folder / "modules.json"
    try:
        chain = [
            (step["type"].rsplit(".", 1)[-1], step["path"])
            for step in bounded_files.read_json(file)
        ]
        paths = [path for _, path in chain]
        # A NUL or half of a surrogate pair is in no name of a file.
        bad = [p for p in paths if Path(p).name != p or p == ".." or not p.isprintable()]
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not a list of modules with type and path: {reason}") from error
    if bad:
        raise ValueError(f"{file} names the folder {bad[0]!r:.80}, which is not one beside it")
    return chain


def read_json_file(folder: Path, name: str) -> dict:
    """The object in NAME.json of a folder."""
    return bounded_files.read_json_object(folder / f"{name}.json")


def longest_text(folder: Path) -> int | None:
    """Tokens at which sentence-transformers cuts a text, its end included; None for no cut.

    They are max_seq_length, or else model_max_length of the tokenizer.

    Raises:
      ValueError: it is not such a number, or texts are lowercased first.
    """
    names = [name for name in LENGTH_FILES if (folder / f"{name}.json").is_file()]
    values = read_json_file(folder, names[0]) if names else {}
    if values.get("do_lower_case"):
        raise ValueError(f"{folder}/{names[0]}.json: do_lower_case = true is not implemented")
    longest, place = values.get("max_seq_length"), names[0] if names else ""
    if longest is None and (folder / "tokenizer_config.json").is_file():
        place = "tokenizer_config"
        longest = read_json_file(folder, place).get("model_max_length")
    if longest is None or (isinstance(longest, int | float) and longest > LONGEST):
        return None
    if type(longest) is not int or longest < 1:
        raise ValueError(f"{folder}/{place}.json: {longest!r} is no length of a text in tokens")
    return longest


def pooling_kind(folder: Path, path: str) -> str:
    """The one of KINDS in 1_Pooling/config.json; raises ValueError for another, or several."""
    values = bounded_files.read_json_object(folder / path / "config.json")
    mode = values.get("pooling_mode")
    modes = mode if isinstance(mode, list) else [] if mode is None else [mode]
    kinds = [kind for name, kind in MODES.items() if modes == [name]]
    if not modes:
        modes = [each for each in values if each.startswith("pooling_mode_") and values[each]]
        kinds = [kind for kind, name in KINDS.items() if modes == [name]]
    if not kinds:
        listed = ", ".join(map(str, modes)) or "no pooling"
        raise ValueError(
            f"{folder}/{path}/config.json: {listed} is not implemented; one of "
            f"{', '.join([*MODES, *KINDS.values()])} is"
        )
    return kinds[0]


def projection_width(folder: Path, path: str) -> int:
    """Width of the vectors after 2_Dense."""
    values = bounded_files.read_json_object(folder / path / "config.json")
    for field, wanted in (("bias", False), ("activation_function", IDENTITY)):
        if values.get(field, wanted) != wanted:
            raise ValueError(
                f"{folder}/{path}/config.json: {field} = {values[field]!r} is not implemented; "
                f"only {wanted!r} is"
            )
    width = values.get("out_features")
    if type(width) is not int or width < 1:
        raise ValueError(f"{folder}/{path}/config.json: out_features = {width!r} is not a width")
    return width


def dense_file(folder: Path) -> Path | None:
    """The file with the projection, in which it is called linear.weight; None without one."""
    if not (folder / "modules.json").is_file():
        return None
    paths = dict(read_modules(folder))
    return folder / paths["Dense"] / "model.safetensors" if "Dense" in paths else None


def export_files(cfg: config.Model) -> dict[str, dict | list]:
    """The .json files with which sentence-transformers reads an exported encoder, by path.

    The projection belongs into 2_Dense/model.safetensors as linear.weight.
    """
    pooled = cfg.readout
    if pooled is None or pooled.kind != "vector":
        return {}
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    paths |= {"Dense": "2_Dense"} if pooled.project else {}
    paths |= {"Normalize": f"{len(paths)}_Normalize"} if pooled.normalize else {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(paths.items())
    ]
    embed = cfg.last_stack.embed
    modes = {mode: kind == pooled.pooling for kind, mode in KINDS.items()}
    files = {
        "modules.json": modules,
        f"{PROMPTS_FILE}.json": {
            "prompts": {"query": pooled.query_prompt, "document": pooled.document_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {"word_embedding_dimension": embed} | modes,
    }
    if pooled.max_length is not None:
        lengths = {"max_seq_length": pooled.max_length, "do_lower_case": False}
        files["sentence_bert_config.json"] = lengths
    if pooled.project:
        dense = {"in_features": embed, "out_features": pooled.project, "bias": False}
        files["2_Dense/config.json"] = dense | {"activation_function": IDENTITY}
    return files


def check_expressible(cfg: config.Model) -> None:
    """Raises ValueError, naming the field, for vectors that sentence-transformers lacks."""
    readout = cfg.readout
    if readout is None or readout.kind != "vector":
        return
    if readout.pooling not in KINDS:
        raise ValueError(
            f"sentence-transformers cannot express Readout.pooling = {readout.pooling!r}; it has "
            f"{', '.join(KINDS)}"
        )
    if readout.dense:
        raise ValueError("Readout.dense of a vector is not exported: Readout.project is")
    if cfg.layout == "encoder_decoder":
        raise ValueError(
            "sentence-transformers reads one stack, and this Model has two: "
            "python -m t5x_lite.adapt --to=encoder_only keeps the encoder"
        )
