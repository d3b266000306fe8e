// Operands as the CPU's kernels take them.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "ffi/cpu/moe.h"
#include "ffi/cpu/parallel.h"
#include "ffi/operands.h"

namespace jax_moe::cpu {

// A weight that has been read, of which the kernels know GGUF's layout and dense elements.
inline Weights GgufWeights(Checker& check, const char* name, const Weight& weight) {
  check.Require(!weight.tiled,
                std::string(name) + " is tiled, expected GGUF's layout on the CPU");
  return {weight.data, weight.format, weight.experts, weight.rows, weight.columns, weight.row_bytes};
}

// The pool lives in the call's context; jobs that start late do not touch it.
inline Executor ExecutorOf(ffi::ThreadPool& pool) {
  Executor executor;
  executor.threads = pool.num_threads();
  executor.schedule = [&pool](std::function<void()> job) { pool.Schedule(std::move(job)); };
  return executor;
}

}  // namespace jax_moe::cpu
