#!/usr/bin/env bash
# The whole job on generated images and a CPU: two runs (the task; the control that reconstructs nothing), probes, report.
set -euo pipefail
out=${1:-demo}
program=${BIN:-$(dirname "$(command -v dinov2-eq)")}/dinov2-eq
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# One process on each core finishes sooner than two processes that share both.
run_both() {
    OMP_NUM_THREADS=1 "$1" "$out/task" & local task=$!
    OMP_NUM_THREADS=1 "$1" "$out/control" & local control=$!
    wait "$task" || fail "$1 $out/task"
    wait "$control" || fail "$1 $out/control"
}
fail() {
    echo "$0: '$1' failed, see above" >&2
    exit 1
}

# Each replaces the shell it runs in, so that the trap reaches the program itself.
train() {
    local settings=() && [[ $1 == */control ]] && settings=(equivariance.loss_weight=0)
    exec "$program" train --config-file demo --output-dir "$1" --no-resume ${settings[@]+"${settings[@]}"}
}
probe() {
    exec "$program" eval "$1" --pretrained-weights "$2" --output-dir "$2" --num-workers 0 \
        --train-dataset Shapes:split=TRAIN:size=48 --val-dataset Shapes:split=VAL:size=48 "${@:3}"
}
knn() {
    probe knn "$1" --nb_knn 20
}
equivariance() {
    probe equivariance "$1" --tasks rotation translation --tokens both grid2 \
        --max-train-images 2000 --max-val-images 1000 --max-shift 0.125 --hidden-dim 256 --epochs 20
}

run_both train
run_both knn
run_both equivariance
"$program" report "$out/task" "$out/control" --output "$out/report.html"
echo "$out/report.html"
