#!/usr/bin/env bash
# The whole job on generated images and a CPU: two runs (the task; the control that reconstructs nothing), probes, report.
set -euo pipefail
out=${1:-demo}
bin=${BIN:-$(dirname "$(command -v dinov2-eq)")}

# One process on each core finishes sooner than two processes that share both.
run_both() {
    OMP_NUM_THREADS=1 "$@" "$out/task" & local task=$!
    OMP_NUM_THREADS=1 "$@" "$out/control" & local control=$!
    wait "$task" && wait "$control"
}

train() {
    local weight=1.0 && [[ $1 == */control ]] && weight=0
    "$bin/dinov2-eq" train --config-file demo --output-dir "$1" --no-resume equivariance.loss_weight="$weight"
}
probe() {
    "$bin/dinov2-eq" eval equivariance --pretrained-weights "$1" --output-dir "$1" \
        --train-dataset Shapes:split=TRAIN --val-dataset Shapes:split=VAL \
        --max-train-images 1000 --max-val-images 500 --hidden-dim 256 --epochs 30
}

run_both train
run_both probe
"$bin/dinov2-eq" report "$out/task" "$out/control" --output "$out/report.html"
echo "Open $out/report.html in a browser."
