#!/usr/bin/env bash
# One process of a job step: tells PyTorch in its own words which one it is, and becomes the command.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
exec "$@"
