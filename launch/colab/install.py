# SPDX-License-Identifier: Apache-2.0
"""The first cell of the notebooks: %run install.py EXTRA installs this clone, if none is there."""

import glob
import importlib.util
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]


def requirement(extra: str) -> str:
    """The clone with an extra, and with that of the runtime's chips.

    Without importing the jax that is there: it is to be replaced together with its plugin, by one
    version of both.
    """
    chips = "cuda" if shutil.which("nvidia-smi") else ""
    chips = "tpu" if glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*") else chips
    return f"{CLONE}[{','.join(filter(None, [extra, chips]))}]"


def install(extra: str) -> None:
    """Installs the package, unless it is installed."""
    if importlib.util.find_spec("t5x_lite") is not None:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", requirement(extra)]
    subprocess.run(command, check=True)
    loaded = [name for name in ("jax", "numpy") if name in sys.modules]
    if any(sys.modules[name].__version__ != metadata.version(name) for name in loaded):
        print("Runtime > Restart session, then go on below: an older jax or numpy is loaded.")


if __name__ == "__main__":
    install(sys.argv[1])
