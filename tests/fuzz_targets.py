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
from conversion_toys import GPT2, LLAMA, QUIET, T5, Drawn, write_hugging_face, write_ours
from flax import serialization

from t5x_lite import config, config_file
from t5x_lite.conversion import checkpoint, moving, origins, run_folder, t5x, t5x_files, tensors
from t5x_lite.conversion.huggingface import gpt2, llama, t5
from t5x_lite.conversion.weights import layers
from t5x_lite.data import files, vocabularies
from t5x_lite.evaluation import records
from t5x_lite.training import checkpoint as own
from t5x_lite.training import restore

WORDS = ["the dog", "naïve café 東京", "numbers 12 67.8", "a  b\tc", ""]


class Target(NamedTuple):
    """make(folder) writes whole files there; read(folder) reads them as a command would."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def make_gin(folder: Path) -> None:
    text = config_file.text(config_file.load(["configs/runs/adapt_stdlib_tiny.gin"]))
    (folder / "part.gin").write_text(text.partition("\n\n")[2])
    (folder / "run.gin").write_text('SEED = 3\ninclude "part.gin"\nconfig.Run.seed = %SEED\n')


def read_gin(folder: Path) -> None:
    config_file.load([str(folder / "run.gin")])


def of_files(ending: str, write: Callable[[Path], Any], **fields: Any) -> Target:
    """A target for the user's own data files of one format."""

    def read(folder: Path) -> None:
        vocabulary = config.Vocabulary("bytes")
        cfg = config.Files("mine", f"{folder}/*{ending}", vocabulary, **fields)
        for broken in ("skip", "stop"):
            chosen = config.Files(**{**vars(cfg), "broken": broken})
            for row in files.rows(chosen, "train", {}):
                assert isinstance(row.targets, str)

    return Target(lambda folder: write(folder / f"data{ending}"), read)


def write_jsonl(path: Path) -> None:
    rows = [{"inputs": word, "targets": [word, "b"], "n": 1} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress("".join(f"{word}\n" for word in 50 * WORDS).encode()))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"inputs": WORDS, "targets": WORDS, "n": list(range(len(WORDS)))})
    pyarrow.parquet.write_table(table, path)


def make_infer(folder: Path) -> None:
    write_jsonl(folder / "in.jsonl")
    (folder / "in.txt").write_text("\n".join(WORDS))
    (folder / "out.jsonl").write_text('{"a": 1}\n{"b"')
    (folder / "out.jsonl.settings.json").write_text(json.dumps({"input_digest": "x", "n": 1}))


def read_infer(folder: Path) -> None:
    for name, jsonl in (("in.jsonl", True), ("in.txt", False)):
        source = records.Source(str(folder / name), jsonl, "inputs")
        assert source.count() == sum(1 for _ in source.records())
        for record in source.records():
            json.dumps(record.fields).encode()
    records.Sink(str(folder / "out.jsonl"), {"input_digest": "x", "n": 1}).compare()


def trained_pieces(**options: Any) -> bytes:
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
    for name, content in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def byte_level() -> Any:
    import tokenizers as library

    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=280, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    made.train_from_iterator(20 * WORDS, trainer)
    return made


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
    told = SAID["tokenizer_config"] | {"chat_template": CHAT}
    written(folder, **SAID | {"tokenizer_config": told})
    (folder / "tokenizer.json").write_text(byte_level().to_str())


def make_merges(folder: Path) -> None:
    written(folder, **SAID)
    byte_level().model.save(str(folder))


def make_pieces(folder: Path) -> None:
    written(folder, **T5_SAID)
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (folder / "spiece.model").write_bytes(trained_pieces(vocab_size=90, **ids))


def make_bytes(folder: Path) -> None:
    told = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 3}
    told["added_tokens_decoder"] = {"259": {"content": "<a>", "special": True}}
    written(folder, tokenizer_config=told, config={"model_type": "byt5", "vocab_size": 384})


def through(vocabulary: Any) -> None:
    """Texts to ids and back."""
    for word in WORDS:
        vocabulary.decode(vocabularies.encode_ended(vocabulary, word))


def read_tokenizer(folder: Path) -> None:
    told = checkpoint.told_by_hugging_face(folder)
    for vocabulary in told.vocabularies:
        through(vocabulary)


def every(weights: Any) -> None:
    """Reads every weight of a checkpoint."""
    for path, leaf in weights.leaves.items():
        for layer in layers(leaf):
            np.asarray(weights.read(path, layer)).sum()


def of_family(family: Any, cfg: config.Model) -> Target:
    """A target for Hugging Face's folders of one family."""
    return Target(
        lambda folder: refill(folder, lambda new: write_hugging_face(new, family, cfg, Drawn(cfg))),
        lambda folder: every(tensors.of_folder(folder).weights()),
    )


def refill(folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes into a folder that is there, by way of one that is not."""
    write(folder / "made")
    for path in (folder / "made").iterdir():
        path.rename(folder / path.name)
    (folder / "made").rmdir()


def make_gguf(folder: Path) -> None:
    import gguf_toys

    drawn = gguf_toys.converted("gpt2", gguf_toys.draw("gpt2"))
    gguf_toys.write(folder / "toy.gguf", "gpt2", drawn)


def make_quantised(folder: Path) -> None:
    import gguf
    import gguf_toys

    drawn = gguf_toys.converted("llama", gguf_toys.draw("llama"))
    gguf_toys.write(folder / "toy.gguf", "llama", drawn, gguf.GGMLQuantizationType.Q8_0)


def read_gguf(folder: Path) -> None:
    from t5x_lite.conversion import gguf

    source = gguf.Source(folder / "toy.gguf")
    cfg = source.model()
    found = tensors.Tensors(source.path, cfg, source, source.entries(cfg), source.ignored())
    every(found.weights())


def make_gguf_tokenizer(folder: Path) -> None:
    import gguf

    made = byte_level()
    told = json.loads(made.to_str())["model"]
    writer = gguf.GGUFWriter(folder / "toy.gguf", "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(told["vocab"], key=told["vocab"].get)])
    writer.add_token_types([3] + (len(told["vocab"]) - 1) * [1])
    writer.add_token_merges([" ".join(pair) for pair in told["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_tokenizer(folder: Path) -> None:
    from t5x_lite.conversion import gguf

    through(checkpoint.told_by_gguf(gguf.Source(folder / "toy.gguf")).vocabularies[0])


def make_t5x(folder: Path) -> None:
    pieces = moving.by_tensor(Drawn(T5), T5, t5x.table_for(T5, True))
    names = moving.described(Drawn(T5), pieces, None)
    moving.to_t5x(Drawn(T5), pieces, folder, names, 7, QUIET)


def t5x_tree(folder: Path) -> dict:
    """The weights of a T5X checkpoint, which is removed."""
    make_t5x(folder)
    source = t5x_files.Source(folder)
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
    tree = t5x_tree(folder)
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def make_t5x_orbax(folder: Path) -> None:
    tree = t5x_tree(folder)["optimizer"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as writer:
        writer.save(folder.absolute() / "state", args=ocp.args.PyTreeSave(tree))


def read_t5x(folder: Path) -> None:
    source = t5x_files.Source(folder)
    for name in source.names:
        source.read(name).sum()
    every(origins.of_t5x(folder, origins.Asked(vocabulary="none")).weights([]))


def make_run(folder: Path) -> None:
    refill(folder, lambda new: write_ours(new, T5, Drawn(T5)))


def make_vocabularies(folder: Path) -> None:
    model = trained_pieces(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    targets = {"kind": "symbols", "symbols": ["a", "b"], "separator": " "}
    grown = vocabularies.grown(inner=targets, names=["[X]"], extra_ids=2)
    pair = vocabularies.SentencePiece(model, extra_ids=3), grown
    vocabularies.save_pair(folder / "vocabulary", *pair)


def read_run(folder: Path) -> None:
    every(run_folder.Saved(folder))
    run = restore.read_config(folder)
    params, _ = own.load_params(folder)
    restore.place(run.model, params)


def read_vocabularies(folder: Path) -> None:
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
    "gguf_quantised": Target(make_quantised, read_gguf),
    "gguf_tokenizer": Target(make_gguf_tokenizer, read_gguf_tokenizer),
    "t5x": Target(make_t5x, read_t5x),
    "t5x_inline": Target(make_t5x_inline, read_t5x),
    "t5x_orbax": Target(make_t5x_orbax, read_t5x),
    "run": Target(make_run, read_run),
    "vocabulary": Target(make_vocabularies, read_vocabularies),
}
