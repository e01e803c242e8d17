# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the launchers share: flags, messages, and commands that --dry_run prints instead.

# Statuses of t5x_lite.train after which the same command goes on: another process was lost, and
# saved after SIGHUP, SIGINT, SIGUSR1 or SIGTERM; 134, 137 and 255 are a coordinator that was lost,
# a kill and a broken connection.
GOES_ON="75 129 130 134 137 138 143 255"

say() { printf '%s\n' "== $*" >&2; }

refuse() {
  printf '%s: %s (see --help)\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# Runs a command, or prints it so that a shell can read it back.
step() {
  if [ -z "${dry_run:-}" ]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_.,:=/@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# The value of --name=value; refuses one that is empty.
value() {
  case "$1" in
    *=?*) printf '%s' "${1#*=}" ;;
    *) refuse "$1 needs a value: ${1%%=*}=VALUE" ;;
  esac
}

# Whether training that ended with this status is to be started again.
goes_on() {
  case " $GOES_ON " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}
