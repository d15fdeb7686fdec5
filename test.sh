#!/usr/bin/env bash
# What must hold, on this machine: lint, format, and the tests that are quick; with --all the slow ones, too.
# Other arguments go to pytest, as in ./test.sh --all -k dense
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
prepare_environment requirements.txt requirements-dev.txt requirements-backbone.txt requirements-onnx.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
tests=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    tests=()
    shift
fi
exec "$PYTHON" -m pytest "${tests[@]}" "$@"
