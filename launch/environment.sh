# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced in a clone's folder: sets `python` to that of the environment in force, or of the folder
# that is named, which is made where it is not there.
# shellcheck disable=SC2034  # read by who sources this
use_environment() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
  else
    [ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
    python="$PWD/$1/bin/python"
  fi
}
