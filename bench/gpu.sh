#!/usr/bin/env bash
# Everything worth knowing about a GPU, in one call of under nine minutes: bench/gpu.sh [OPTIONS of bench/gpu.py]
# Needs paceline installed with the extras cuda and plot, and transformers, pytest and hypothesis for their parts.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && found=.venv/bin/python || found=python3
PYTHON="${PYTHON:-$found}"
if ! "$PYTHON" -c "import paceline.backends.torch.load" 2> /dev/null; then
  echo "gpu.sh: $PYTHON cannot import paceline with PyTorch; pip install '.[cuda,plot]' there, or set PYTHON" >&2
  exit 2
fi
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" # for the tests
exec "$PYTHON" bench/gpu.py "$@"
