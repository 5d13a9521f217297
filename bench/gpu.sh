#!/usr/bin/env bash
# Everything worth knowing about a GPU, in one call of under nine minutes: bench/gpu.sh [OPTIONS of bench/gpu.py]
# Needs paceline with the extras cuda and plot, and transformers and pytest for what they take part in.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" bench/gpu.py "$@"
