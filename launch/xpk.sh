#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on GKE through xpk, one or several slices: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh

usage() {
  cat <<'EOF'
Trains on Google Kubernetes Engine through xpk (pip install xpk), on one slice or several. GKE starts
the job again after a preemption and after a host was lost, and it goes on from its checkpoint.

  launch/xpk.sh WHAT --cluster=CLUSTER --zone=ZONE --type=TYPE [flags] -- TRAINING FLAGS

what
  create   make the cluster with its slices: from here on it costs
  train    submit python -m t5x_lite.train as a workload
  list     what runs, waits or has ended
  wait     return when the workload has ended
  stop     end the workload (it saves first)
  delete   remove the cluster

flags
  --cluster=CLUSTER  the GKE cluster
  --zone=ZONE        where it is
  --type=TYPE        of a slice: v5litepod-16, v6e-64, v5p-128
  --name=NAME        of the workload (train, wait, stop)
  --slices=N         default 1; MODEL_DIR and data are shared by all of them
  --project=PROJECT  default: that of gcloud
  --bucket=BUCKET    mounted as /shared in every pod: put MODEL_DIR there
  --spot             cheaper, and may be taken away at any time
  --restarts=N       how often GKE starts the workload again (default 50)
  --image=IMAGE      with t5x_lite installed; otherwise this clone goes onto --base
  --base=IMAGE       default python:3.13
  --dry_run          print the commands, run none

examples
  launch/xpk.sh create --cluster=ours --zone=us-east5-b --type=v6e-16 --slices=2 --spot --bucket=mine
  launch/xpk.sh train --cluster=ours --zone=us-east5-b --type=v6e-16 --slices=2 --name=pretrain \
      --bucket=mine -- --gin_file=configs/runs/pretrain.gin --gin.MODEL_DIR=/shared/pretrain
  launch/xpk.sh delete --cluster=ours --zone=us-east5-b --type=v6e-16
EOF
}

read_flags() {
  cluster="" zone="" type="" name="" slices=1 project="" bucket="" tier=--on-demand restarts=50
  image="" base=python:3.13 dry_run=""
  training=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --cluster=*) cluster=$(value "$1") ;;
      --zone=*) zone=$(value "$1") ;;
      --type=*) type=$(value "$1") ;;
      --name=*) name=$(value "$1") ;;
      --slices=*) slices=$(value "$1") ;;
      --project=*) project=$(value "$1") ;;
      --bucket=*) bucket=$(value "$1") ;;
      --restarts=*) restarts=$(value "$1") ;;
      --image=*) image=$(value "$1") ;;
      --base=*) base=$(value "$1") ;;
      --spot) tier=--spot ;;
      --dry_run) dry_run=yes ;;
      --) shift; training=("$@"); break ;;
      *) refuse "unknown flag $1" ;;
    esac
    shift
  done
  [ -n "$cluster" ] || refuse "--cluster=CLUSTER is missing"
  [ -n "$zone" ] || refuse "--zone=ZONE is missing"
  [ -n "$type" ] || refuse "--type=TYPE is missing"
  place=(--cluster="$cluster" --zone="$zone" ${project:+--project="$project"})
}

needs_name() { [ -n "$name" ] || refuse "--name=NAME of the workload is missing"; }

create() {
  local driver=()
  [ -z "$bucket" ] || driver=(--enable-gcsfuse-csi-driver)
  step xpk cluster create "${place[@]}" --tpu-type="$type" --num-slices="$slices" "$tier" "${driver[@]}"
  if [ -n "$bucket" ]; then
    step xpk storage attach shared "${place[@]}" --type=gcsfuse --bucket="$bucket" \
      --mount-point=/shared --readonly=false --auto-mount=true
  fi
}

train() {
  needs_name
  [ ${#training[@]} -gt 0 ] || refuse "no training flags: put them behind --"
  local command="python -m t5x_lite.train ${training[*]@Q}" source=(--docker-image="$image")
  if [ -z "$image" ]; then
    source=(--base-docker-image="$base" --script-dir=.)
    command="pip install --quiet '.[tpu,buckets]' && $command"
  fi
  # A pod has two minutes to save after SIGTERM; 75 says that another host was lost.
  step xpk workload create "${place[@]}" --workload="$name" --tpu-type="$type" \
    --num-slices="$slices" "${source[@]}" --max-restarts="$restarts" \
    --restart-on-exit-codes=75 --termination-grace-period-seconds=120 --command="$command"
}

list() { step xpk workload list "${place[@]}"; }

wait_for() {
  needs_name
  step xpk workload list "${place[@]}" --wait-for-job-completion="$name"
}

stop() {
  needs_name
  step xpk workload delete "${place[@]}" --workload="$name"
}

delete() { step xpk cluster delete "${place[@]}"; }

case "${1:-}" in
  create | train | list | stop | delete)
    what=$1
    shift
    read_flags "$@"
    "$what"
    ;;
  wait)
    shift
    read_flags "$@"
    wait_for
    ;;
  --help | -h) usage ;;
  *) refuse "the first word says what to do: create, train, list, wait, stop or delete" ;;
esac
