# SPDX-License-Identifier: Apache-2.0
"""Everything that reads a user's bytes, each with small whole files to begin with."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from conversion_toys import GPT2, LLAMA, T5, Drawn, ignore_progress, write_hugging_face, write_ours
from flax import serialization

from t5x_lite import config, model
from t5x_lite.checkpoints import manager as run_folders
from t5x_lite.checkpoints import (
    run_folder,
    tensors,
    text_settings,
    transfer,
)
from t5x_lite.checkpoints.formats import t5x, t5x_files
from t5x_lite.checkpoints.formats.huggingface import gpt2, llama, t5
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.weights import layer_numbers, place_arrays
from t5x_lite.cli import records
from t5x_lite.config import gin_file
from t5x_lite.data import files
from t5x_lite.tokenizers import vocabularies

WORDS = ["the dog", "naïve café 東京", "numbers 12 67.8", "a  b\tc", ""]


class Target(NamedTuple):
    """make(folder) writes whole files there; read(folder) reads them as a command would."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def make_gin(folder: Path) -> None:
    """Writes a run's gin file that includes another one."""
    text = gin_file.to_text(gin_file.load_run(["configs/runs/adapt_stdlib_tiny.gin"]))
    (folder / "part.gin").write_text(text.partition("\n\n")[2])
    (folder / "run.gin").write_text('SEED = 3\ninclude "part.gin"\nconfig.Run.seed = %SEED\n')


def read_gin(folder: Path) -> None:
    """Loads the run."""
    gin_file.load_run([str(folder / "run.gin")])


def of_files(ending: str, write: Callable[[Path], Any], **fields: Any) -> Target:
    """A target for the user's own data files of one format.

    Args:
      ending: suffix of the file.
      write: writes the file.
      **fields: further fields of `config.Files`.
    """

    def read(folder: Path) -> None:
        vocabulary = config.Vocabulary("bytes")
        cfg = config.Files("mine", f"{folder}/*{ending}", vocabulary, **fields)
        for broken in ("skip", "stop"):
            chosen = config.Files(**{**vars(cfg), "broken": broken})
            for row in files.read_rows(chosen, "train", {}):
                assert isinstance(row.targets, str)

    return Target(lambda folder: write(folder / f"data{ending}"), read)


def write_jsonl(path: Path) -> None:
    """Writes examples as JSON lines."""
    rows = [{"inputs": word, "targets": [word, "b"], "n": 1} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path) -> None:
    """Writes lines of text, compressed."""
    import gzip

    path.write_bytes(gzip.compress("".join(f"{word}\n" for word in 50 * WORDS).encode()))


def write_parquet(path: Path) -> None:
    """Writes examples as a Parquet table."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"inputs": WORDS, "targets": WORDS, "n": list(range(len(WORDS)))})
    pyarrow.parquet.write_table(table, path)


def make_infer(folder: Path) -> None:
    """Writes input files of `t5x_lite.infer`, and an unfinished output file."""
    write_jsonl(folder / "in.jsonl")
    (folder / "in.txt").write_text("\n".join(WORDS))
    (folder / "out.jsonl").write_text('{"a": 1}\n{"b"')
    (folder / "out.jsonl.settings.json").write_text(json.dumps({"input_digest": "x", "n": 1}))


def read_infer(folder: Path) -> None:
    """Reads the inputs, and compares the output with its settings."""
    for name, jsonl in (("in.jsonl", True), ("in.txt", False)):
        source = records.Source(str(folder / name), jsonl, "inputs")
        assert source.count() == sum(1 for _ in source.records())
        for record in source.records():
            json.dumps(record.fields).encode()
    records.Sink(str(folder / "out.jsonl"), {"input_digest": "x", "n": 1}).compare()


def trained_pieces(**options: Any) -> bytes:
    """A trained SentencePiece model, serialized."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * WORDS),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


def written(folder: Path, **objects: dict) -> None:
    """Writes each keyword as a JSON file."""
    for name, content in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def byte_level() -> Any:
    """A trained byte-level BPE tokenizer."""
    import tokenizers as library

    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=280, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    tokenizer.train_from_iterator(20 * WORDS, trainer)
    return tokenizer


SAID = {
    "tokenizer_config": {"eos_token": "<|endoftext|>", "add_bos_token": False},
    "config": {"model_type": "gpt2", "vocab_size": 300, "eos_token_id": 0},
    "generation_config": {"eos_token_id": [0, 1]},
}
T5_SAID = {
    "tokenizer_config": {"tokenizer_class": "T5Tokenizer", "extra_ids": 5, "eos_token": "</s>"},
    "config": {"model_type": "t5", "decoder_start_token_id": 0, "eos_token_id": 1},
    "special_tokens_map": {"pad_token": {"content": "<pad>"}},
    "added_tokens": {"<new>": 200},
}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m.content | tojson }}\n{% endfor %}"


def make_tokenizer(folder: Path) -> None:
    """Writes a tokenizer.json with a chat template."""
    fields = SAID["tokenizer_config"] | {"chat_template": CHAT}
    written(folder, **SAID | {"tokenizer_config": fields})
    (folder / "tokenizer.json").write_text(byte_level().to_str())


def make_merges(folder: Path) -> None:
    """Writes vocab.json and merges.txt."""
    written(folder, **SAID)
    byte_level().model.save(str(folder))


def make_pieces(folder: Path) -> None:
    """Writes T5's spiece.model."""
    written(folder, **T5_SAID)
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (folder / "spiece.model").write_bytes(trained_pieces(vocab_size=90, **ids))


def make_bytes(folder: Path) -> None:
    """Writes the tokenizer of a ByT5."""
    fields = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 3}
    fields["added_tokens_decoder"] = {"259": {"content": "<a>", "special": True}}
    written(folder, tokenizer_config=fields, config={"model_type": "byt5", "vocab_size": 384})


def through(vocabulary: Any) -> None:
    """Texts to ids and back."""
    for word in WORDS:
        vocabulary.decode(vocabularies.encode_with_ends(vocabulary, word))


def read_tokenizer(folder: Path) -> None:
    """Reads the tokenizer of a Hugging Face folder."""
    for vocabulary in text_settings.read_hugging_face(folder).vocabularies:
        through(vocabulary)


def every(weights: Any) -> None:
    """Reads every weight of a checkpoint."""
    for path, leaf in weights.leaves.items():
        for layer in layer_numbers(leaf):
            np.asarray(weights.read(path, layer)).sum()


def of_family(family: Any, cfg: config.Model) -> Target:
    """A target for Hugging Face's folders of one family."""
    return Target(
        lambda folder: refill(folder, lambda new: write_hugging_face(new, family, cfg, Drawn(cfg))),
        lambda folder: every(tensors.open_hugging_face_tensors(folder).weights()),
    )


def refill(folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes into a folder that is there, by way of one that is not."""
    write(folder / "made")
    for path in (folder / "made").iterdir():
        path.rename(folder / path.name)
    (folder / "made").rmdir()


def make_gguf(folder: Path) -> None:
    """Writes a GPT-2 as a .gguf file."""
    import gguf_toys

    drawn = gguf_toys.converted("gpt2", gguf_toys.draw("gpt2"))
    gguf_toys.write(folder / "toy.gguf", "gpt2", drawn)


def make_quantized(folder: Path) -> None:
    """Writes a quantized Llama as a .gguf file."""
    import gguf
    import gguf_toys

    drawn = gguf_toys.converted("llama", gguf_toys.draw("llama"))
    gguf_toys.write(folder / "toy.gguf", "llama", drawn, gguf.GGMLQuantizationType.Q8_0)


def read_gguf(folder: Path) -> None:
    """Reads config and weights of a .gguf file."""
    from t5x_lite.checkpoints.formats import gguf, gguf_config

    source = gguf.GgufTensors(folder / "toy.gguf")
    cfg = gguf_config.read_gguf_config(source)
    mapped = tensors.MappedTensors(source.path, cfg, source, source.entries(cfg), source.ignored())
    every(mapped.weights())


def make_gguf_tokenizer(folder: Path) -> None:
    """Writes a tokenizer as a .gguf file."""
    import gguf

    tokenizer = byte_level()
    fields = json.loads(tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(folder / "toy.gguf", "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(fields["vocab"], key=fields["vocab"].get)])
    writer.add_token_types([3] + (len(fields["vocab"]) - 1) * [1])
    writer.add_token_merges([" ".join(pair) for pair in fields["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_tokenizer(folder: Path) -> None:
    """Reads the tokenizer of a .gguf file."""
    from t5x_lite.checkpoints.formats import gguf

    through(text_settings.read_gguf(gguf.GgufTensors(folder / "toy.gguf")).vocabularies[0])


def make_t5x(folder: Path) -> None:
    """Writes a T5X checkpoint."""
    pieces = transfer.group_by_tensor(Drawn(T5), T5, t5x.entries_to_write(T5, True))
    names = transfer.describe_tensors(Drawn(T5), pieces, None)
    transfer.write_t5x(Drawn(T5), pieces, folder, names, 7, ignore_progress)


def t5x_tree(folder: Path) -> dict:
    """The weights of a T5X checkpoint, which is removed."""
    make_t5x(folder)
    source = t5x_files.T5XTensors(folder)
    tree: dict = {}
    for name in source.names:
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = np.array(source.read(name))
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"version": 3, "optimizer": {"target": tree}}


def make_t5x_inline(folder: Path) -> None:
    """Writes a T5X checkpoint with its weights in one msgpack file."""
    tree = t5x_tree(folder)
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def make_t5x_orbax(folder: Path) -> None:
    """Writes a T5X checkpoint with OCDBT."""
    tree = t5x_tree(folder)["optimizer"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as writer:
        writer.save(folder.absolute() / "state", args=ocp.args.PyTreeSave(tree))


def read_t5x(folder: Path) -> None:
    """Reads the weights of a T5X checkpoint."""
    source = t5x_files.T5XTensors(folder)
    for name in source.names:
        source.read(name).sum()
    every(open_checkpoint(folder, options=WEIGHTS_ONLY).weights())


def make_run(folder: Path) -> None:
    """Writes a run folder."""
    refill(folder, lambda new: write_ours(new, T5, Drawn(T5)))


def make_vocabularies(folder: Path) -> None:
    """Writes the vocabularies of a run."""
    model = trained_pieces(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    targets = {"kind": "symbols", "symbols": ["a", "b"], "separator": " "}
    grown = vocabularies.extended_vocabulary(inner=targets, names=["[X]"], extra_ids=2)
    pair = vocabularies.SentencePieceVocabulary(model, extra_ids=3), grown
    vocabularies.save_pair(folder / "vocabulary", *pair)


def read_run(folder: Path) -> None:
    """Reads weights, config and params of a run folder."""
    every(run_folder.SavedWeights(folder))
    run = run_folder.read_run_config(folder)
    params, _ = run_folders.load_params(folder)
    place_arrays(model.shapes(run.model), params, folder)


def read_vocabularies(folder: Path) -> None:
    """Reads the vocabularies of a run."""
    for vocabulary in vocabularies.load_pair(folder / "vocabulary"):
        through(vocabulary)


TARGETS = {
    "gin": Target(make_gin, read_gin),
    "jsonl": of_files(".jsonl", write_jsonl, inputs="inputs"),
    "tsv": of_files(".tsv", lambda path: path.write_text("a\ttargets\n1\tx y\n2\té\n")),
    "text": of_files(".txt", lambda path: path.write_text("\n".join(WORDS))),
    "gzip": of_files(".txt.gz", write_gzip),
    "parquet": of_files(".parquet", write_parquet, inputs="inputs"),
    "infer": Target(make_infer, read_infer),
    "tokenizer_json": Target(make_tokenizer, read_tokenizer),
    "merges": Target(make_merges, read_tokenizer),
    "sentencepiece": Target(make_pieces, read_tokenizer),
    "byt5": Target(make_bytes, read_tokenizer),
    "llama": of_family(llama, LLAMA),
    "t5": of_family(t5, T5),
    "gpt2": of_family(gpt2, GPT2),
    "gguf": Target(make_gguf, read_gguf),
    "gguf_quantized": Target(make_quantized, read_gguf),
    "gguf_tokenizer": Target(make_gguf_tokenizer, read_gguf_tokenizer),
    "t5x": Target(make_t5x, read_t5x),
    "t5x_inline": Target(make_t5x_inline, read_t5x),
    "t5x_orbax": Target(make_t5x_orbax, read_t5x),
    "run": Target(make_run, read_run),
    "vocabulary": Target(make_vocabularies, read_vocabularies),
}
