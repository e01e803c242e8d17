#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the API reference of docstrings, as pages in site/ (or the folder that is named). Installs
# the docs extra into .venv-docs, or into the environment in force.
#   launch/docs.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
site="${1:-site}"

# shellcheck source=launch/environment.sh
. launch/environment.sh
use_environment .venv-docs
"$python" -m pip install --quiet --disable-pip-version-check --editable ".[docs,gguf,demo,plan]"

# Modules are imported to be read: no device is wanted.
JAX_PLATFORMS=cpu "$python" - "$site" <<'PYTHON'
import sys
from pathlib import Path

import pdoc

import t5x_lite
import t5x_lite.kernels

# A clone stands on its package's own path, where the package would be found in itself for ever.
del t5x_lite.__path__[1:]
pdoc.render.configure(docformat="google", footer_text=f"t5x_lite {t5x_lite.__version__}")
# What imports TensorFlow is left out.
modules = "t5x_lite", "!t5x_lite.data.seqio_.*"
pdoc.pdoc(*modules, output_directory=Path(sys.argv[1]))
PYTHON
echo "The reference: $site/index.html"
