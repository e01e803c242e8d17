# SPDX-License-Identifier: Apache-2.0
"""Local copies of checkpoints in stores, for the libraries that read files of a disk alone."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from t5x_lite.cli.progress import Progress
from t5x_lite.utils.paths import cache_folder, is_address

# Weights of other libraries, which no format here reads.
LEFT_OUT = (".bin", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".onnx", ".tflite")
# Files that stand for themselves.
SINGLE = (".gguf", ".model", ".json")


def fetch_checkpoint(path: Any, weights: bool = True) -> Path:
    """The path of a checkpoint or of a tokenizer, as its readers take it.

    A run folder and a T5X checkpoint are read where they are. Of a Hugging Face folder and of a
    file in a store it is a local copy, which stays in the cache under the names, sizes and times of
    what was copied: a checkpoint that is written anew is copied anew.

    Args:
      path: a path of this machine, which is returned as it is, or an address.
      weights: false to leave out those of a folder.

    Raises:
      OSError: the store does not answer, or the disk is full.
    """
    if not is_address(path):
        return path
    if path.suffix not in SINGLE and not (path / "config.json").exists():
        return path
    left_out = LEFT_OUT if weights else (*LEFT_OUT, ".safetensors")
    files = {each: size for each, size in path.list_files().items() if each.suffix not in left_out}
    if not files:
        return path
    listing = repr([(str(each), size, each.stat().st_mtime) for each, size in files.items()])
    root = cache_folder() / "downloads"
    copy = root / hashlib.sha256(listing.encode()).hexdigest()[:16]
    if not copy.exists():
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{copy.name}-", dir=root))
        try:
            with Progress("MB", max(1, sum(files.values()) // 10**6)) as progress:
                done = 0
                for each, size in files.items():
                    each.download(partial / each.parent.relative_to(path.parent))
                    done += size
                    progress(done // 10**6)
            os.rename(partial, copy)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if not copy.exists():  # or another process was faster
                raise
    return copy / path.name
