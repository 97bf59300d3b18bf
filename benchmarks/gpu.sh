#!/usr/bin/env bash
# Pretraining on one GPU compared with a plain compiled transformers loop: 124M/1024, 350M/2048 and 1.2B/2048; a JSON line each.
#   bash benchmarks/gpu.sh                          # needs torch with CUDA, transformers and what benchmarks/gpu.py imports; no installation, no deepspeed
#   bash benchmarks/gpu.sh --device cpu --tiny      # does the code run?
set -euo pipefail
cd "$(dirname "$0")/.."
# What lacks in the image and is pure Python, into a folder of its own; what the image has stays as it is.
if ! python3 -c "import pydantic, ruamel.yaml" 2>/dev/null; then
  python3 -m pip install -q --target .bench "pydantic>=2.11" "ruamel.yaml>=0.18"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$PWD/.bench"
for model in 124M 350M 1.2B; do
  python3 benchmarks/gpu.py --model "$model" "$@"
done
