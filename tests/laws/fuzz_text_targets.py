# SPDX-License-Identifier: Apache-2.0
"""Readers of texts: configs, data files, tokenizers, vocabularies and chat templates."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_formats import pack_zstd
from fuzz_target import WORDS, Target, write_json, write_jsonl

from t5x_lite import config
from t5x_lite.checkpoints import text_settings
from t5x_lite.config import gin_file
from t5x_lite.data import files, hub_datasets
from t5x_lite.tokenizers import chat, vocabularies

HAS_DATASETS = importlib.util.find_spec("datasets") is not None
BOUND = 'MODEL_DIR="runs/a"\nTRAIN_STEPS=10\nconfig.Run.seed=3\nconfig.Schedule.peak=0.1\n'
BOUND += "config.Data.lengths={'inputs': 4, 'targets': 4}\nencoder/config.Stack.layers = 2\n"


def make_gin(folder: Path) -> None:
    """Writes a run's gin file that includes another one."""
    text = gin_file.to_text(gin_file.load_run(["configs/runs/adapt_stdlib_tiny.gin"]))
    (folder / "part.gin").write_text(text.partition("\n\n")[2])
    (folder / "run.gin").write_text('SEED = 3\ninclude "part.gin"\nconfig.Run.seed = %SEED\n')


def read_gin(folder: Path) -> None:
    """Loads the run, and writes it down again."""
    gin_file.to_text(gin_file.load_run([str(folder / "run.gin")]))


def read_bindings(folder: Path) -> None:
    """Loads a run with bindings of the command line, one on each line."""
    content = (folder / "bindings.txt").read_text("utf-8", "surrogateescape")
    gin_file.load_run(["configs/runs/g2p.gin"], [*filter(None, content.splitlines())])


def of_files(suffix: str, write: Callable[[Path], Any], **fields: Any) -> Target:
    """A target for the user's own data files of one format.

    Args:
      suffix: suffix of the file.
      write: writes the file.
      **fields: further fields of `config.Files`.
    """

    def read(folder: Path) -> None:
        vocabulary = config.Vocabulary("bytes")
        cfg = config.Files("mine", f"{folder}/*{suffix}", vocabulary, **fields)
        for broken in ("skip", "stop"):
            chosen = config.Files(**{**vars(cfg), "broken": broken})
            for row in files.read_rows(chosen, "train", {}):
                assert isinstance(row.targets, str)

    return Target(lambda folder: write(folder / f"data{suffix}"), read)


CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: train.jsonl}]
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': 'no', '1': 'yes'}}}}
---
"""


def make_hub_dataset(folder: Path) -> None:
    """Writes a dataset as the hub lays it out, with its card."""
    write_jsonl(folder / "train.jsonl", [{"text": word, "label": 1} for word in WORDS])
    (folder / "README.md").write_text(CARD)


def read_hub_dataset(folder: Path) -> None:
    """Reads the dataset, and what decides whether a run on it goes on."""
    vocabulary = config.Vocabulary("bytes")
    cfg = config.HubDataset(str(folder), vocabulary, inputs="text", targets="label", numbers=True)
    hub_datasets.list_paths(cfg, "train")
    hub_datasets.remote_identity(cfg, "train")
    for row in hub_datasets.read_rows(cfg, "train", {}):
        assert isinstance(row.targets, str)


def write_examples(path: Path) -> None:
    """Writes examples as JSON lines."""
    write_jsonl(path, [{"inputs": word, "targets": [word, "b"], "n": 1} for word in WORDS])


def write_array(path: Path) -> None:
    """Writes examples as a JSON array."""
    rows = [{"inputs": word, "targets": [word, "b"], "n": 1} for word in WORDS]
    path.write_text(json.dumps(rows, indent=1))


def write_nested(path: Path) -> None:
    """Writes examples with fields in fields."""
    write_jsonl(path, [{"a": {"b": word, "c": 0}, "n": 1.5} for word in WORDS])


def write_table(path: Path) -> None:
    """Writes examples as a table."""
    path.write_text('a\ttargets\n1\tx y\n2\té\n"3"\t"quoted"\n')


def packed_writer(pack: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Function that writes lines of text, packed."""
    content = "".join(f"{word}\n" for word in 50 * WORDS).encode()
    return lambda path: path.write_bytes(pack(content))


def write_parquet(path: Path) -> None:
    """Writes examples as a Parquet table."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"inputs": WORDS, "targets": WORDS, "n": list(range(len(WORDS)))})
    pyarrow.parquet.write_table(table, path)


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


def byte_level() -> Any:
    """A trained byte-level BPE tokenizer."""
    import tokenizers as library

    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFC(), library.normalizers.Replace(library.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(r"\s+(?!\S)|\d{1,3}"), "isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=280, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    tokenizer.train_from_iterator(20 * WORDS, trainer)
    return tokenizer


GPT2_FILES = {
    "tokenizer_config": {"eos_token": "<|endoftext|>", "add_bos_token": False},
    "config": {"model_type": "gpt2", "vocab_size": 300, "eos_token_id": 0},
    "generation_config": {"eos_token_id": [0, 1]},
}
T5_FILES = {
    "tokenizer_config": {"tokenizer_class": "T5Tokenizer", "extra_ids": 5, "eos_token": "</s>"},
    "config": {"model_type": "t5", "decoder_start_token_id": 0, "eos_token_id": 1},
    "special_tokens_map": {"pad_token": {"content": "<pad>"}},
    "added_tokens": {"<new>": 200},
}
CHAT = """\
{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{% endif %}
{{ m['role'] }}: {{ m.content | tojson | trim }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}
"""
TABLE = '1,"x\ny"\n2,é\n"3, a","quo""ted"\n'
CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\n"}]


def make_tokenizer(folder: Path) -> None:
    """Writes a tokenizer.json with a chat template."""
    fields = GPT2_FILES["tokenizer_config"] | {"chat_template": CHAT}
    write_json(folder, **GPT2_FILES | {"tokenizer_config": fields})
    (folder / "tokenizer.json").write_text(byte_level().to_str())


def make_merges(folder: Path) -> None:
    """Writes vocab.json and merges.txt."""
    write_json(folder, **GPT2_FILES)
    byte_level().model.save(str(folder))


def make_pieces(folder: Path) -> None:
    """Writes T5's spiece.model."""
    write_json(folder, **T5_FILES)
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (folder / "spiece.model").write_bytes(trained_pieces(vocab_size=90, **ids))


def make_bytes(folder: Path) -> None:
    """Writes the tokenizer of a ByT5."""
    fields = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 3}
    fields["added_tokens_decoder"] = {"259": {"content": "<a>", "special": True}}
    write_json(folder, tokenizer_config=fields, config={"model_type": "byt5", "vocab_size": 384})


def round_trip(vocabulary: Any) -> None:
    """Texts to ids and back."""
    for word in WORDS:
        vocabulary.decode(vocabularies.encode_with_ends(vocabulary, word))


def read_tokenizer(folder: Path) -> None:
    """Reads the tokenizer of a Hugging Face folder."""
    for vocabulary in text_settings.read_hugging_face(folder).vocabularies:
        round_trip(vocabulary)


def make_gguf_tokenizer(folder: Path) -> None:
    """Writes a tokenizer as a .gguf file."""
    import gguf

    fields = json.loads(byte_level().to_str())["model"]
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


def make_gguf_t5_tokenizer(folder: Path) -> None:
    """Writes a T5's tokenizer as a .gguf file."""
    import gguf
    import gguf_toys

    writer = gguf.GGUFWriter(folder / "toy.gguf", "t5")
    model = trained_pieces(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    gguf_toys.add_t5_tokenizer(model)(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_tokenizer(folder: Path) -> None:
    """Reads the tokenizer of a .gguf file."""
    from t5x_lite.checkpoints.formats import gguf

    round_trip(text_settings.read_gguf(gguf.GgufTensors(folder / "toy.gguf")).vocabularies[0])


def make_vocabularies(folder: Path) -> None:
    """Writes the vocabularies of a run, with a chat template."""
    model = trained_pieces(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    targets = {"kind": "symbols", "symbols": ["a", "b"], "separator": " "}
    grown = vocabularies.extended_vocabulary(inner=targets, names=["[X]"], extra_ids=2)
    pair = vocabularies.SentencePieceVocabulary(model, extra_ids=3), grown
    vocabularies.save_pair(folder / "vocabulary", *pair)
    (folder / "vocabulary" / text_settings.CHAT_FILE).write_text(CHAT)


def read_vocabularies(folder: Path) -> None:
    """Reads the vocabularies of a run."""
    for vocabulary in text_settings.read_vocabulary_folder(folder / "vocabulary").vocabularies:
        round_trip(vocabulary)


def make_chat(folder: Path) -> None:
    """Writes a chat template with the settings that it needs."""
    write_json(folder, tokenizer_config=GPT2_FILES["tokenizer_config"] | {"bos_token": "<s>"})
    (folder / "chat_template.jinja").write_text(CHAT)


def read_chat(folder: Path) -> None:
    """Writes a conversation as a prompt by a folder's template."""
    template = chat.read_chat_template(folder)
    if template is not None:
        prompt = chat.render_chat(
            template.template, CONVERSATION, add_generation_prompt=True, **template.tokens
        )
        prompt.encode("utf-8", "surrogatepass")


TARGETS = {
    "gin": Target(make_gin, read_gin),
    "bindings": Target(
        lambda folder: (folder / "bindings.txt").write_text(BOUND),
        read_bindings,
        ("--gin.", ".gin"),
    ),
    "jsonl": of_files(".jsonl", write_examples, inputs="inputs"),
    "nested": of_files(
        ".jsonl", write_nested, inputs="to {n}: {a.b}", targets="a.c", numbers=True, labels=("x",)
    ),
    "json": of_files(".json", write_array, inputs="inputs"),
    "tsv": of_files(".tsv", write_table, quotes=False),
    "csv": of_files(".csv", lambda path: path.write_text(f"a,targets\n{TABLE}")),
    "quoted_tsv": of_files(".tsv", write_table, quotes=True),
    "text": of_files(".txt", lambda path: path.write_text("\n".join(WORDS))),
    "gzip": of_files(".txt.gz", packed_writer(gzip.compress)),
    "bz2": of_files(".txt.bz2", packed_writer(bz2.compress)),
    "xz": of_files(".txt.xz", packed_writer(lzma.compress)),
    "zstd": of_files(".txt.zst", packed_writer(pack_zstd)),
    "parquet": of_files(".parquet", write_parquet, inputs="inputs"),
    **({"hub_dataset": Target(make_hub_dataset, read_hub_dataset)} if HAS_DATASETS else {}),
    "tokenizer_json": Target(make_tokenizer, read_tokenizer),
    "merges": Target(make_merges, read_tokenizer),
    "sentencepiece": Target(make_pieces, read_tokenizer),
    "byt5": Target(make_bytes, read_tokenizer),
    "gguf_tokenizer": Target(make_gguf_tokenizer, read_gguf_tokenizer),
    "gguf_t5_tokenizer": Target(make_gguf_t5_tokenizer, read_gguf_tokenizer),
    "vocabulary": Target(make_vocabularies, read_vocabularies),
    "chat": Target(make_chat, read_chat, ("chat template",)),
}
