#!/usr/bin/env bash
# Train on the eight GPUs of one node. At the time limit, or when the job is preempted, it saves, goes back into the
# queue and resumes from there. From the checkout's root:
#   SHARDS=data/sf-xl-shards RUN=runs/fast sbatch launch/train_one_node.sh [ARGUMENT OF training/train.py ...]
# Another number of GPUs: sbatch --ntasks-per-node=4 --gpus-per-node=4 launch/train_one_node.sh
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from elsewhere
source launch/slurm_functions.sh
train_on_all_tasks "$@"
