#!/usr/bin/env bash
# Runs all checks: lint, format, tests. Arguments go to pytest, as in ./test.sh -k dense
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
prepare_environment requirements.txt requirements-dev.txt requirements-backbone.txt requirements-onnx.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
