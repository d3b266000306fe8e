#!/usr/bin/env bash
# Compiles the CUDA module with the nvcc on the PATH, or else with PyPI's nvidia-cuda-nvcc; quickly,
# for a check, and so most of it unoptimised.
# Usage: tools/compile_cuda.sh VENV_BIN
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
  "$bin/pip" install -q 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
    'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*'
  cuda=$("$bin/python" -c "import nvidia.cu13 as m; print(list(m.__path__)[0])")
  export PATH="$cuda/bin:$PATH" LIBRARY_PATH="$cuda/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
fi
nvcc --version | tail -n 2
cmake -S . -B build/cuda -DJAX_MOE_CUDA=ON -DJAX_MOE_CUDA_CHECK=ON -DPython_EXECUTABLE="$bin/python" \
  -Dnanobind_ROOT="$("$bin/python" -m nanobind --cmake_dir)"
# Of unoptimised kernels ptxas has much to say that is not so of optimised ones.
time cmake --build build/cuda --target _cuda 2>&1 |
  grep -vP 'ptxas info +: \(C75\d\d\)(?!.*FP4)'
