#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a Cloud TPU slice of any number of hosts: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh

usage() {
  cat <<'EOF'
Trains on a Cloud TPU slice, all hosts of it, and begins again after a preemption.

  launch/tpu_vm.sh WHAT --name=NAME --zone=ZONE --type=TYPE [flags] -- TRAINING FLAGS

what
  run      all of: up, train, watch, delete
  up       ask for the slice (a queued resource), wait until it is there, install this clone on it
  train    start python -m t5x_lite.train on every host, in the background
  watch    tell the newest line of its log until it ends; after a preemption: up, train, watch
  logs     follow the log of host 0
  stop     let it save and end (SIGTERM)
  delete   give the slice back: until then it costs

flags
  --name=NAME        of the queued resource and of the slice
  --zone=ZONE        where the slice is
  --type=TYPE        v5litepod-16, v6e-64, v5p-128, v4-32
  --runtime=VERSION  software of the machines (default: the one for TYPE)
  --project=PROJECT  default: that of gcloud
  --bucket=BUCKET    mounted as ~/shared on every host, for data; MODEL_DIR may be gs://BUCKET/NAME
  --spot             cheaper, and may be taken away at any time
  --poll=SECONDS     between looks (default 60)
  --starts=N         starts in a row without a new checkpoint until watch gives up (default 5)
  --dry_run          print the commands, run none

examples
  launch/tpu_vm.sh run --name=pod --zone=us-west4-a --type=v5litepod-16 --spot --bucket=mine -- \
      --gin_file=configs/runs/pretrain.gin --gin.MODEL_DIR=gs://mine/pretrain --gin.config.Mesh.fsdp=-1
  launch/tpu_vm.sh logs --name=pod --zone=us-west4-a --type=v5litepod-16
  launch/tpu_vm.sh delete --name=pod --zone=us-west4-a --type=v5litepod-16
EOF
}

runtime_of() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) refuse "no software is known for --type=$1: name it with --runtime=VERSION" ;;
  esac
}

read_flags() {
  name="" zone="" type="" runtime="" project="" bucket="" spot="" poll=60 starts=5 dry_run=""
  training=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --name=*) name=$(value "$1") ;;
      --zone=*) zone=$(value "$1") ;;
      --type=*) type=$(value "$1") ;;
      --runtime=*) runtime=$(value "$1") ;;
      --project=*) project=$(value "$1") ;;
      --bucket=*) bucket=$(value "$1") ;;
      --poll=*) poll=$(value "$1") ;;
      --starts=*) starts=$(value "$1") ;;
      --spot) spot=--spot ;;
      --dry_run) dry_run=yes ;;
      --) shift; training=("$@"); break ;;
      *) refuse "unknown flag $1" ;;
    esac
    shift
  done
  [ -n "$name" ] || refuse "--name=NAME is missing"
  [ -n "$zone" ] || refuse "--zone=ZONE is missing"
  [ -n "$type" ] || refuse "--type=TYPE is missing"
  [ -n "$runtime" ] || runtime=$(runtime_of "$type")
  place=(--zone="$zone" ${project:+--project="$project"})
}

queue() { step gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }

# On one host ("0") or on all of them ("all").
on() {
  step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

# The request's state: NOT_FOUND only if gcloud says so, UNKNOWN if it does not answer.
state() {
  local answer errors
  errors=$(mktemp)
  if answer=$(queue describe --format='value(state.state)' 2> "$errors"); then
    answer=${answer:-UNKNOWN}
  elif grep -q NOT_FOUND "$errors"; then
    answer=NOT_FOUND
  else
    say "gcloud does not answer: $(tail -n 1 "$errors")"
    answer=UNKNOWN
  fi
  rm -f "$errors"
  printf '%s\n' "$answer"
}

wait_for_slice() {
  local now
  if [ "$dry_run" ]; then
    queue describe --format='value(state.state)'
    return
  fi
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING | NOT_FOUND)
        say "the request for $name is $now"
        return 1
        ;;
    esac
    say "$name is $now; looking again in $poll s"
    sleep "$poll"
  done
}

# Asks for the slice unless there is a request already, which only a clear answer can rule out.
ask_for_slice() {
  local now=NOT_FOUND
  if [ -z "$dry_run" ]; then
    while now=$(state) && [ "$now" = UNKNOWN ]; do sleep "$poll"; done
  fi
  [ "$now" != NOT_FOUND ] ||
    queue create --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" ${spot:+"$spot"}
}

# Copies the commit that is checked out to every host.
copy_clone() {
  local folder=/tmp status=0
  [ "$dry_run" ] || folder=$(mktemp -d)
  step git archive --format=tar.gz --output="$folder/t5x_lite.tar.gz" HEAD || status=$?
  [ "$status" != 0 ] ||
    step gcloud compute tpus tpu-vm scp "$folder/t5x_lite.tar.gz" "$name:t5x_lite.tar.gz" "${place[@]}" --worker=all ||
    status=$?
  [ "$dry_run" ] || rm -rf "$folder"
  return "$status"
}

up() {
  ask_for_slice || return
  wait_for_slice || return
  say "installing on every host"
  copy_clone || return
  on all "mkdir -p t5x_lite && tar -xzf t5x_lite.tar.gz -C t5x_lite" || return
  # The machines' own Python may be older than 3.11, and 3.11 has no newer JAX than 0.10.2.
  on all "python3 -m pip install --quiet --user uv && cd t5x_lite && ~/.local/bin/uv venv --quiet --allow-existing --python 3.13 && ~/.local/bin/uv pip install --quiet '.[tpu,buckets]'" || return
  if [ -n "$bucket" ]; then
    on all "mkdir -p shared && (mountpoint -q shared || gcsfuse --implicit-dirs ${bucket@Q} shared)"
  fi
}

train() {
  [ ${#training[@]} -gt 0 ] || refuse "no training flags: put them behind --"
  say "starting on every host"
  # From the home folder, so that shared/... names the bucket; configs are found by the package.
  local inner="t5x_lite/.venv/bin/python -m t5x_lite.train ${training[*]@Q} > train.log 2>&1"
  inner="$inner; echo \$? > status"
  on all "rm -f status; setsid nohup bash -c ${inner@Q} > /dev/null 2>&1 & echo \$! > pid"
}

# What host 0 says: the exit status, or nothing while it trains.
ended() { on 0 "cat status 2>/dev/null || true"; }

# The checkpoint that the newest start went on from, as its log names it.
resumed() { on 0 "grep -o 'Going on from the checkpoint of step [0-9]*' train.log | tail -n 1 || true" || true; }

# Starts training again after `status`, unless that happened $starts times without a new checkpoint.
start_again() {
  local now
  now=$(resumed)
  [ "$now" = "$before" ] || count=1
  before=$now count=$((count + 1))
  [ "$count" -le "$starts" ] ||
    refuse "training ended with status $1 after $starts starts without a new checkpoint: see $0 logs"
  say "training ended with status $1: starting it again"
  train
}

# Succeeds if training has ended well; starts it again where the same command goes on.
look_at_training() {
  local status
  status=$(ended) || status=""
  if [ -z "$status" ]; then
    on 0 "tail -n 1 train.log" || say "host 0 does not answer"
    return 1
  fi
  on 0 "tail -n 3 train.log" || true
  [ "$status" != 0 ] || return 0
  goes_on "$status" || refuse "training ended with status $status: fix it, then train again"
  start_again "$status" || say "that failed; trying again in $poll s"
  return 1
}

watch() {
  local now absent="" before="" count=1
  if [ "$dry_run" ]; then
    on 0 "cat status 2>/dev/null || true"
    on 0 "tail -n 1 train.log"
    return
  fi
  while true; do
    now=$(state)
    case "$now" in
      # Nothing else is a loss: not an error of gcloud, and no state on the way to one of these.
      SUSPENDED | FAILED | NOT_FOUND)
        say "$name was taken away ($now): asking for it again"
        absent=yes
        [ "$now" = NOT_FOUND ] || queue delete --force --quiet || say "it could not be deleted"
        ;;
    esac
    if [ "$absent" ]; then
      if up && train; then absent=""; else say "that failed; trying again in $poll s"; fi
    elif [ "$now" = ACTIVE ]; then
      look_at_training && return
    else
      say "$name is $now; looking again in $poll s"
    fi
    sleep "$poll"
  done
}

logs() { on 0 "tail -n 100 -F train.log"; }

stop() { on all "pkill -TERM -P \$(cat pid) || true"; }

delete() { queue delete --force --quiet; }

run() {
  up
  train
  watch
  delete
}

case "${1:-}" in
  run | up | train | watch | logs | stop | delete)
    what=$1
    shift
    read_flags "$@"
    "$what"
    ;;
  --help | -h) usage ;;
  *) refuse "the first word says what to do: run, up, train, watch, logs, stop or delete" ;;
esac
