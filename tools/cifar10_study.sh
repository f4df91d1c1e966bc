#!/usr/bin/env bash
# Trains every recipe of configs/train/cifar10 on CIFAR-10 and probes the results: tools/cifar10_study.sh DATA OUT [JOBS]
# DATA holds cifar-10-batches-py, or train.parquet and test.parquet. Finished runs and probes are not repeated.
set -euo pipefail
data=$(realpath "$1") out=$2 jobs=${3:-2}
export data out OMP_NUM_THREADS=1
mkdir -p "$out"

study() {
    local run=$out/$1 train=CIFAR10:split=TRAIN:root=$data val=CIFAR10:split=TEST:root=$data
    dinov2-eq train --config-file "cifar10/$1" --output-dir "$run" train.dataset_path="$train"
    [[ -e $run/results_eval_knn.json ]] || dinov2-eq eval knn --pretrained-weights "$run" --num-workers 0 \
        --train-dataset "$train" --val-dataset "$val" --max-images 10000 --nb_knn 10 20
    local random=--no-random-init
    [[ $1 == disabled ]] && random=--random-init
    [[ -e $run/results_eval_equivariance.json ]] || dinov2-eq eval equivariance --pretrained-weights "$run" --num-workers 0 \
        --train-dataset "$train" --val-dataset "$val" --max-train-images 4000 --max-val-images 2000 \
        --hidden-dim 512 --epochs 30 --max-shift 0.125 "$random"
}
export -f study

for recipe in configs/train/cifar10/*.yaml; do
    name=$(basename "$recipe" .yaml)
    [[ $name == base ]] || echo "$name"
done | xargs -P "$jobs" -I NAME bash -c 'set -e; study NAME >"$out/NAME.log" 2>&1 || { echo "NAME failed, see $out/NAME.log"; exit 255; }'
