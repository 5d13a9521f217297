#!/usr/bin/env bash
# Everything worth knowing about a GPU, in one call of under nine minutes: bench/gpu.sh [OPTIONS of bench/gpu.py]
# Needs paceline installed with the extras cuda and plot, and transformers, pytest and hypothesis for their parts.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"  # for the tests
exec "${PYTHON:-python3}" bench/gpu.py "$@"
