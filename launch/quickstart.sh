#!/usr/bin/env bash
# Render a city, build shards, train and evaluate: the whole way on two CPU cores, from random weights.
# Usage: launch/quickstart.sh [FOLDER]   (FOLDER: quickstart below the checkout)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-quickstart}
begin=$SECONDS

echo "1/4  rendering a city"
python preprocessing/make_city.py --out "$out/city" --seed 0 --blocks 3 --years 4 --size 128

echo "2/4  cutting it into classes and groups, writing shards"
python preprocessing/build_shards.py --source "$out/city/train/database" --out "$out/shards" --image-size 96

echo "3/4  training from random weights"
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process "$(nproc)" training/train.py --preset quickstart \
  --shards "$out/shards" --val-queries "$out/city/val/queries" --out "$out/run"

echo "4/4  evaluating on queries from a year and from positions that training never saw"
python evaluation/evaluate.py --checkpoints "$out/run" --queries "$out/city/test/queries" --shards "$out/shards" --out "$out/evaluation"

echo
echo "curves       tensorboard --logdir $out/run"
echo "report       $out/evaluation/report.html"
echo "one photo    python evaluation/predict.py --checkpoint $out/run PHOTO.jpg"
echo "the whole way took $((SECONDS - begin)) s"
