#!/usr/bin/env bash
# Trains recipes of configs/train/cifar10 and probes the results: tools/cifar10_study.sh DATA OUT [RECIPE ...]
# DATA holds cifar-10-batches-py, or train.parquet and test.parquet. No recipe named: all of them. Two runs at a time,
# one core each. Finished runs and probes are not repeated.
set -euo pipefail
data=$(realpath "$1") out=$2
shift 2
export data out OMP_NUM_THREADS=1
mkdir -p "$out"

study() {
    local run=$out/$1 train=CIFAR10:split=TRAIN:root=$data val=CIFAR10:split=TEST:root=$data
    dinov2-eq train --config-file "cifar10/$1" --output-dir "$run" train.dataset_path="$train"
    [[ -e $run/results_eval_knn.json ]] || dinov2-eq eval knn --pretrained-weights "$run" --num-workers 0 \
        --train-dataset "$train" --val-dataset "$val" --max-images 10000 --nb_knn 10 20 --precision bf16
    local random=--no-random-init
    [[ $1 == disabled ]] && random=--random-init
    [[ -e $run/results_eval_equivariance.json ]] || dinov2-eq eval equivariance --pretrained-weights "$run" --num-workers 0 \
        --train-dataset "$train" --val-dataset "$val" --max-train-images 10000 --max-val-images 2000 \
        --hidden-dim 256 --epochs 15 --max-shift 0.125 --precision bf16 "$random"
}
export -f study

if (($# == 0)); then
    for recipe in configs/train/cifar10/*.yaml; do set -- "$@" "$(basename "$recipe" .yaml)"; done
fi
printf '%s\n' "$@" | grep -vx base | xargs -P 2 -I NAME bash -c \
    'set -e; study NAME >"$out/NAME.log" 2>&1 || { echo "NAME failed, see $out/NAME.log"; exit 255; }'
