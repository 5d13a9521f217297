#!/usr/bin/env bash
# What GGUF files of an official shape cost, in one call: bench/gguf.sh FOLDER [SHAPE] > results.jsonl
# Writes random files of 3.4 GB each (e2b) to FOLDER unless they are there, and measures starts, decoding, passes of two
# mixes and kernels, one JSON line each. Leave the machine alone meanwhile. Needs paceline installed, and gguf.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && found=.venv/bin/python || found=python3
PYTHON="${PYTHON:-$found}"
if [ $# -lt 1 ] || ! "$PYTHON" -c "import paceline, gguf" 2> /dev/null; then
  echo "gguf.sh: give a folder, and a Python that has paceline and gguf: pip install . gguf there, or set PYTHON" >&2
  exit 2
fi
shape="${2:-e2b}"
folder="$1/$shape"
mkdir -p "$folder"
export PACELINE_CACHE="$folder/cache"
for mix in Q4_K_M Q4_0; do
  file="$folder/$shape-$mix.gguf"
  [ -f "$file" ] || "$PYTHON" bench/random_gguf.py "$shape" "$file" --mix "$mix" --drafter "$folder/mtp-$shape.gguf"
done
"$PYTHON" bench/gguf_load.py "$folder/$shape-Q4_K_M.gguf" --starts 5
"$PYTHON" bench/gguf_passes.py "$folder/$shape-Q4_K_M.gguf" "$folder/$shape-Q4_0.gguf"
for mix in Q4_K_M Q4_0; do
  "$PYTHON" -m paceline bench decode -m "$folder/$shape-$mix.gguf" --acceptance 0.8,0.65,0.5
done
"$PYTHON" -m paceline bench kernels
