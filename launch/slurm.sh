#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a SLURM cluster with GPUs: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh

usage() {
  cat <<'EOF'
Submits a job of one process for each GPU; JAX finds the others through SLURM. Before the time limit
and at a preemption the run saves and the job queues itself again, until training has ended.

  launch/slurm.sh --nodes=N --gpus=G [flags] -- TRAINING FLAGS

flags
  --nodes=N          machines
  --gpus=G           of each machine
  --name=NAME        of the job (default t5x_lite)
  --time=LIMIT       of one stay in the cluster (default 24:00:00)
  --cpus=C           of each process (default 8)
  --partition=P      --account=A     where they are needed
  --python=PYTHON    of the environment with t5x_lite[cuda] (default .venv/bin/python)
  --starts=N         starts in a row without a new checkpoint until the job gives up (default 5)
  --grace=SECONDS    for saving before the limit (default 120)
  --dry_run          print the job and the command, submit nothing

examples
  launch/slurm.sh --nodes=4 --gpus=8 --partition=a100 -- --gin_file=configs/runs/pretrain.gin \
      --gin.MODEL_DIR=/scratch/pretrain
  squeue --name=t5x_lite; tail -F t5x_lite-JOB.log; scancel --signal=TERM JOB
EOF
}

read_flags() {
  nodes="" gpus="" name=t5x_lite limit=24:00:00 cpus=8 partition="" account="" grace=120 starts=5 dry_run=""
  python=.venv/bin/python
  training=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --nodes=*) nodes=$(value "$1") ;;
      --gpus=*) gpus=$(value "$1") ;;
      --name=*) name=$(value "$1") ;;
      --time=*) limit=$(value "$1") ;;
      --cpus=*) cpus=$(value "$1") ;;
      --partition=*) partition=$(value "$1") ;;
      --account=*) account=$(value "$1") ;;
      --python=*) python=$(value "$1") ;;
      --grace=*) grace=$(value "$1") ;;
      --starts=*) starts=$(value "$1") ;;
      --dry_run) dry_run=yes ;;
      --help | -h) usage; exit ;;
      --) shift; training=("$@"); break ;;
      *) refuse "unknown flag $1" ;;
    esac
    shift
  done
  [ -n "$nodes" ] || refuse "--nodes=N is missing"
  [ -n "$gpus" ] || refuse "--gpus=G is missing"
  [ ${#training[@]} -gt 0 ] || refuse "no training flags: put them behind --"
}

# The job: srun's status is that of the process that ended worst. Its log has all starts: those are
# counted that went into the queue again since one went on from a new checkpoint.
job() {
  cat <<EOF
#!/usr/bin/env bash
srun --kill-on-bad-exit=0 ${python@Q} -m t5x_lite.train ${training[*]@Q}
status=\$?
again=\$(awk '
  /Going on from the checkpoint of step/ { if (\$0 != last) again = 0; last = \$0 }
  /: in the queue again\$/ { again++ }
  END { print again + 0 }' ${name@Q}-"\$SLURM_JOB_ID".log)
case " $GOES_ON " in
  *" \$status "*)
    if [ "\$((again + 1))" -ge $starts ]; then
      echo "status \$status after $starts starts without a new checkpoint: not started again"
    else
      echo "status \$status: in the queue again"
      scontrol requeue "\$SLURM_JOB_ID"
    fi
    ;;
esac
exit "\$status"
EOF
}

# TERM goes to the processes, not to the job's shell, which waits for their status.
submit() {
  step sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --cpus-per-task="$cpus" --time="$limit" --signal="TERM@$grace" \
    --requeue --open-mode=append --output="$name-%j.log" \
    ${partition:+--partition="$partition"} ${account:+--account="$account"}
}

read_flags "$@"
if [ "$dry_run" ]; then
  submit
  job
else
  job | submit
fi
