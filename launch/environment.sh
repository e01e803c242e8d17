# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced in the clone's folder by the scripts that install: the environment, and versions in it.

# major.minor of an interpreter.
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Sets `python` to that of the active virtual environment, or of FOLDER, which is created if missing.
use_environment() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
    return
  fi
  [ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
  python="$PWD/$1/bin/python"
  if [ -n "${PYTHON:-}" ] && [ "$(python_version "$PYTHON")" != "$(python_version "$python")" ]; then
    refuse "$1 has Python $(python_version "$python"), not that of PYTHON=$PYTHON: remove $1"
  fi
}

# Refuses an interpreter that launch/constraints/VERSIONS.txt is not for.
#   check_python VERSIONS
check_python() {
  local pins="launch/constraints/$1.txt" supported
  [ "$1" != unpinned ] || return 0
  supported=$(sed -n 's/^# Python: //p' "$pins")
  case " $supported " in
    *" $(python_version "$python") "*) ;;
    *) refuse "$pins is for Python $supported, and this is $(python_version "$python"): choose" \
      "one of these with PYTHON=python${supported##* }, or untested versions with --unpinned" ;;
  esac
}

# Installs ARGUMENTS of pip in the versions of launch/constraints/VERSIONS.txt; the newest that
# pyproject.toml allows if VERSIONS is "unpinned".
#   install VERSIONS ARGUMENTS
install() {
  local pins="launch/constraints/$1.txt"
  check_python "$1"
  if [ "$1" = unpinned ]; then
    set -- "$1" --upgrade --upgrade-strategy=eager "${@:2}"
  else
    # Not as --constraint: pip builds packages that have no wheel by a pip of its own, which reads
    # these variables (the second one from pip 25.3 on).
    export PIP_CONSTRAINT="$pins" PIP_BUILD_CONSTRAINT="$pins"
  fi
  "$python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}
