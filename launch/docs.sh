#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the documentation site: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

usage() {
  cat <<'EOT'
Builds the documentation as pages in site/ or FOLDER: guides, config reference, benchmarks, and the API
from docstrings. Installs t5x_lite with its docs extra into .venv-docs or the active environment. The
generated pages of docs/ are renewed first (python launch/pages.py).

  launch/docs.sh [--unpinned] [FOLDER]

flags
  --unpinned  with the newest versions that pyproject.toml allows, tested or not; otherwise with the
              newest tested ones

environment
  PYTHON      interpreter for a new .venv-docs (default python3)

examples
  launch/docs.sh
  launch/docs.sh /tmp/site
EOT
}

versions=newest
case "${1:-}" in
  --unpinned) versions=unpinned; shift ;;
  --help | -h) usage; exit ;;
  -*) refuse "unknown flag $1" ;;
esac
site=$(realpath --canonicalize-missing "${1:-site}")
use_environment .venv-docs
install "$versions" --editable ".[docs]"

"$python" launch/pages.py
# Dead links and broken pages end the build.
"$python" -m mkdocs build --quiet --strict --site-dir "$site"
echo "The site: $site/index.html"
