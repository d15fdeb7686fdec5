#!/usr/bin/env bash
# Students and detection on a small category of our own making, with the backbone that ships. Needs package registries alone, no GPU.
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
# The backbone ships with the project, so there are no stages 1 and 2.
stage src/students_training.py "$category"
stage src/anomaly_detection.py "$category"
