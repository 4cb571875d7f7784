# Functions of the Slurm job files, which source this file from the checkout's root.
# shellcheck shell=bash

# run_or_requeue SIGNAL LOG COMMAND...: run the command with its output in LOG. When Slurm sends SIGUSR1 to the job
# file (#SBATCH --signal=B:USR1@120: before the time limit, and before preemption where the cluster sets
# PreemptParameters=send_user_signal), pass SIGNAL on, wait until the command has left, and requeue the job.
# Preemption without that setting sends SIGTERM to the processes themselves. Slurm requeues the job when its grace time
# is over, but a job that ends before would be over for good: it requeues itself too.
run_or_requeue() {
  local signal=$1 log=$2 asked=no code command
  shift 2
  mkdir -p "$(dirname "$log")"
  echo "$(date -u +%FT%TZ) start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID, output in $log"
  "$@" >"$log" 2>&1 &
  command=$!
  trap 'asked=yes; kill -s "$signal" "$command" || true' USR1
  while
    code=0
    wait "$command" || code=$?
    kill -0 "$command" 2>/dev/null # a signal ends `wait`, not the command
  do :; done
  trap - USR1
  # Training that was told to stop leaves with 0, but has not done all.
  if ((code == 0)) && grep -q '^stopped by ' "$log"; then
    code=143
  fi
  if [[ $asked == yes ]] || { ((code)) && is_preempted; }; then
    echo "$(date -u +%FT%TZ) stopped by Slurm; requeued"
    scontrol requeue "$SLURM_JOB_ID" # last: it ends this very job
    exit 0
  fi
  # Here it failed or was cancelled: jobs that wait for this one with --dependency=afterok must not take it for done.
  if ((code)); then
    echo "$(date -u +%FT%TZ) failed or stopped with exit code $code; the end of $log:"
    tail -n 20 "$log"
  fi
  return "$code"
}

# Whether Slurm has told this job to make room for another.
is_preempted() {
  scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

# train_on_all_tasks ARGUMENT...: one training process for each task of the job. They are started by srun itself:
# torchrun and accelerate launch die of SIGUSR1, and exit with 1 after SIGTERM. The environment may name SHARDS, RUN,
# PRESET, PYTHON and LOGS.
train_on_all_tasks() {
  local shards=${SHARDS:-data/sf-xl-shards} run=${RUN:-runs/fast-b0} preset=${PRESET:-fast-b0}
  local logs=${LOGS:-runs/logs} python=${PYTHON:-.venv/bin/python}
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node do not meet
  export MASTER_ADDR MASTER_PORT
  # One failed process ends all: the others would wait for it. Binding is off, since every process picks its GPU by
  # its local rank and its decoding threads by its share of the node's cores. SIGUSR1 passes through srun; SIGTERM
  # would make srun kill the tasks.
  # --resume starts anew where there is no checkpoint yet, so that the first start and the later ones are one command.
  run_or_requeue USR1 "$logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.log" \
    srun --kill-on-bad-exit=1 --cpu-bind=none --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash launch/slurm_task.sh "$python" training/train.py \
    --preset "$preset" --shards "$shards" --out "$run" --resume "$@"
}
