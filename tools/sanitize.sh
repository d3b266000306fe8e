#!/usr/bin/env bash
# Builds the native module with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests that
# reach it. Usage: tools/sanitize.sh VENV_BIN [pytest arguments]
set -euo pipefail
bin=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
build=build/sanitize
cmake -S . -B "$build" -DJAX_MOE_CUDA=OFF -DJAX_MOE_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DPython_EXECUTABLE="$bin/python" -Dnanobind_ROOT="$("$bin/python" -m nanobind --cmake_dir)"
cmake --build "$build" --target _native
package=$build/package/jax_moe
rm -rf "$build/package"
mkdir -p "$package"
cp -r jax_moe/. "$package"
cp "$build"/ffi/_native*.so "$package"

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[^=]*=//p' "$build/CMakeCache.txt")
# JAX and LLVM keep memory until the process ends; only our own errors count, not leaks.
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$bin/python" - "$build/package" "$@" <<'PY'
import sys

# An editable install's import hook would win over the sanitised package.
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, sys.argv[1])
import jax_moe
import pytest

assert jax_moe.__file__.startswith(__import__("os").path.abspath(sys.argv[1])), jax_moe.__file__
names = ["formats", "routing", "moe_gemm", "moe_ffn", "bad_input", "tiled"]
sys.exit(pytest.main([*(sys.argv[2:] or [f"tests/test_{name}.py" for name in names]), "-x"]))
PY
