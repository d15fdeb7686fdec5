#!/usr/bin/env bash
# The whole pipeline on a small category of our own making. Needs package registries alone, no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
prepare_environment

category=demo_carpet
stage() {
    echo
    echo "== $*"
    "$PYTHON" "$@"
}

stage demo_dataset.py
echo
echo "== ./mvtec_dataset.sh $category"
./mvtec_dataset.sh "$category"
# Small images and short trainings, so that two CPU cores finish while you wait. With a GPU or patience, leave the
# options out: the defaults are better.
stage src/resnet18_training.py "$category" --backbone-weights random --image-size 128 --epochs 5
stage src/teacher_training.py "$category" --patch-size 33 --steps 25 --batch-size 32
stage src/students_training.py "$category" --patch-size 33 --image-size 128 --epochs 5 --batch-size 1
stage src/anomaly_detection.py "$category"
