#!/usr/bin/env bash
# Build a data set of shards on many nodes: an array of tasks that share nothing, then one job that finishes.
# From a login node (this submits both jobs, nothing runs there):
#   SOURCE=data/sf-xl/train/database SHARDS=data/sf-xl-shards launch/preprocess_array.sh [ARGUMENT OF build_shards.py ...]
# Where a task failed, run the same line again: shards that are done are kept.
# sbatch takes what the cluster asks for from its own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT,
# SBATCH_MEM_PER_NODE (each task plans the whole data set: 41 million names take 7.2 GB).
#SBATCH --job-name=shards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
SOURCE=${SOURCE:-data/sf-xl/train/database}
SHARDS=${SHARDS:-data/sf-xl-shards}
TASKS=${TASKS:-16}
LOGS=${LOGS:-runs/logs}

submit() {
  cd "$(dirname "$0")/.."
  # TASKS decides which shards are whose, so it travels with the jobs; Slurm's own count would change when a part of
  # the array is submitted again.
  export PYTHON SOURCE SHARDS TASKS LOGS
  local array finish
  array=$(ROLE=task sbatch --parsable --array="0-$((TASKS - 1))" launch/preprocess_array.sh "$@")
  array=${array%%;*} # on a federation of clusters the name of this one follows
  finish=$(ROLE=finish sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes \
    launch/preprocess_array.sh "$@")
  echo "submitted: array $array of $TASKS tasks, then ${finish%%;*} to finish $SHARDS"
}

run() {
  cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from elsewhere
  source launch/slurm_functions.sh
  run_or_requeue TERM "$LOGS/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.log" \
    "$PYTHON" preprocessing/build_shards.py --source "$SOURCE" --out "$SHARDS" --task-count "$TASKS" "$@"
}

case ${ROLE:-submit} in
  submit) submit "$@" ;;
  task) run --task-index "$SLURM_ARRAY_TASK_ID" "$@" ;;
  finish) run --finish "$@" ;;
esac
