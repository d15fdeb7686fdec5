#!/usr/bin/env bash
# Tests and benchmarks on a GPU, on a machine with PyTorch only, in at most 8 minutes; nothing is downloaded.
# Usage: benchmarks/gpu.sh [DIR]    writes DIR/*.json (default results/gpu) and prints one table.
# With PYTHON set, as in `PYTHON=python3 benchmarks/gpu.sh`, that interpreter is used. On a machine without a GPU it is a
# dry run on the CPU, with smaller sizes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${1:-results/gpu}
python=${PYTHON:-python3}
mkdir -p "$output"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    size=(--image-size 256) batch=(--batch-size 8) compile=(--compile) fit=() steps=3000 limit=200
else
    size=(--image-size 48 --precision float32 --repeat 1) batch=(--matrix-size 512) compile=()
    fit=(--images 12 --batch-size 1 --repeat 1) steps=1 limit=300
fi

failed=0
step() {  # NAME COMMAND...: if a step fails, the others still run
    local name=$1
    shift
    echo "== $name ($SECONDS s): $*"
    timeout "$limit" "$@" 2>"$output/$name.log" && return
    failed=1
    echo "$name FAILED"
    tail -c 3000 "$output/$name.log"
}

step tests "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py
step detector "$python" benchmarks/detector_speed.py "${fit[@]}" "${compile[@]}" --output "$output/detector.json"
step descriptors "$python" benchmarks/dense_extraction.py --stride 1 "${size[@]}" "${batch[@]}" "${compile[@]}" --output "$output/descriptors.json"
step maps "$python" benchmarks/anomaly_map.py --stride 1 4 "${size[@]}" --output "$output/maps.json"
step students "$python" benchmarks/students_training.py --stride 4 "${size[@]}" --output "$output/students.json"
# A patch teacher, trained on the demo's images; the GPU draws the views.
data=$output/data
step pictures "$python" demo_dataset.py --data "$data" --train 24 --test-good 1 --test-per-kind 1
step index "$python" mvtec_dataset.py demo_carpet --data "$data"
begun=$SECONDS
step teacher "$python" src/teacher_training.py demo_carpet --data "$data" --model "$output/model" --patch-size 33 \
    --backbone efficientnet_lite0 --steps "$steps" --restart
echo "{\"steps\": $steps, \"seconds\": $((SECONDS - begun))}" >"$output/teacher.json"
echo
"$python" benchmarks/gpu_table.py "$output"
exit "$failed"
