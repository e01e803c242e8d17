# SPDX-License-Identifier: Apache-2.0
"""T5-like encoder-decoders and their GPT-like twins: train, adapt, decode and compare them."""

from pathlib import Path

__version__ = "0.1.0"

# In a clone, kernels/ and configs/ stand beside this package; once installed they are inside it.
# Without this line, running from a clone's folder would hide them behind the folder's own t5x_lite.
clone = Path(__file__).resolve().parent.parent
if (clone / "pyproject.toml").is_file():
    __path__.append(str(clone))
del clone, Path
