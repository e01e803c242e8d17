#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Writes the API reference: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

usage() {
  cat <<'EOT'
Writes the API reference, from docstrings, as pages in site/ or FOLDER. Installs t5x_lite with its docs
extra into .venv-docs or the active environment.

  launch/docs.sh [--unpinned] [FOLDER]

flags
  --unpinned  with the newest versions that pyproject.toml allows, tested or not; otherwise with the
              newest tested ones

environment
  PYTHON      interpreter for a new .venv-docs (default python3)

examples
  launch/docs.sh
  launch/docs.sh /tmp/reference
EOT
}

versions=newest
case "${1:-}" in
  --unpinned) versions=unpinned; shift ;;
  --help | -h) usage; exit ;;
  -*) refuse "unknown flag $1" ;;
esac
site="${1:-site}"
use_environment .venv-docs
install "$versions" --editable ".[docs,gguf,demo,plan]"

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
