#!/usr/bin/env bash
# Evaluate runs on query sets on one GPU. From the checkout's root:
#   RUNS="runs/a runs/b" QUERIES="data/sf-xl/test/queries_v1" sbatch launch/evaluate.sh [ARGUMENT OF evaluation/evaluate.py ...]
# After a training job: sbatch --dependency=afterok:JOB launch/evaluate.sh
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/fast-b0}
QUERIES=${QUERIES:-data/sf-xl/test/queries_v1 data/sf-xl/test/queries_v2}
OUT=${OUT:-runs/evaluation}

cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from elsewhere
read -ra runs <<<"$RUNS"
read -ra queries <<<"$QUERIES"
# Minutes of work: a preempted job is requeued by Slurm (--requeue) and begins again.
"$PYTHON" evaluation/evaluate.py --checkpoints "${runs[@]}" --queries "${queries[@]}" --out "$OUT" "$@"
