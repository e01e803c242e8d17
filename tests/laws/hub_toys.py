# SPDX-License-Identifier: Apache-2.0
"""A tiny T5 as folders of every kind, to be served by `hub_server`."""

from pathlib import Path

from conversion_toys import T5, Drawn, write_ours

from t5x_lite import convert
from t5x_lite.tokenizers import vocabularies


def write_folders(folder: Path) -> Path:
    """Writes the same T5, whose ids are letters, as `ours`, a run folder, as `hf`, a Hugging Face
    folder, and as `shards`, one of several files."""
    ours = write_ours(folder / "ours", T5, Drawn(T5))
    symbols = vocabularies.SymbolVocabulary([chr(97 + i) for i in range(26)])
    vocabularies.save_pair(ours / "vocabulary", symbols, symbols)
    words = [f"--from={ours}", "--format=huggingface"]
    convert.main([*words, f"--to={folder / 'hf'}"])
    convert.main([*words, f"--to={folder / 'shards'}", "--shard_size=8KB"])
    return folder


def read_contents(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a folder by path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def list_cached(cache: Path) -> set[str]:
    """Files of all snapshots of a cache, by their paths in them."""
    every = (path for path in cache.glob("hub/models--*/snapshots/*/**/*") if path.is_file())
    return {"/".join(path.parts[path.parts.index("snapshots") + 2 :]) for path in every}
