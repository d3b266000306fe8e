// Checks of FFI operands, shared by the handlers: what a call may hold, in words.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "ffi/cpu/moe.h"
#include "ffi/cpu/parallel.h"
#include "ffi/shape_text.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cpu {

namespace ffi = xla::ffi;

inline bool Absent(const ffi::AnyBuffer& buffer) { return buffer.element_count() == 0; }

inline bool HasShape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  if (dims.size() != shape.size()) return false;
  size_t i = 0;
  for (int64_t dim : shape) {
    if (dims[i++] != dim) return false;
  }
  return true;
}

// DenseType of a float element type, -1 for any other.
inline int DenseTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return kF32;
    case ffi::DataType::F16: return kF16;
    case ffi::DataType::BF16: return kBF16;
    default: return -1;
  }
}

// Collects the first complaint about a call.
class Checker {
 public:
  explicit Checker(const char* target) : target_(target) {}

  // True where the condition holds.
  bool Require(bool condition, const std::string& message) {
    if (!condition && message_.empty()) message_ = std::string(target_) + ": " + message;
    return condition;
  }

  bool RequireShape(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                    std::initializer_list<int64_t> shape) {
    std::string wanted;
    for (int64_t dim : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(dim);
    return Require(buffer.element_type() == type && HasShape(buffer, shape),
                   std::string(name) + " has shape " + ShapeText(buffer) + ", expected [" + wanted +
                       "] of the type in the target's signature");
  }

  // An operand that may be absent: its data, or null.
  const float* OptionalFloats(const char* name, const ffi::AnyBuffer& buffer,
                              std::initializer_list<int64_t> shape) {
    if (Absent(buffer)) return nullptr;
    if (!RequireShape(name, buffer, ffi::DataType::F32, shape)) return nullptr;
    return static_cast<const float*>(buffer.untyped_data());
  }

  // The aux of a tiled weight, which the CPU's kernels do not take.
  void RequireNoAux(const char* name, const ffi::AnyBuffer& buffer) {
    Require(Absent(buffer), std::string(name) + " must be absent");
  }

  // A weight operand of a format. Dense: [E, N, K]; packed: bytes [E, N, row_bytes].
  Weights RequireWeights(const char* name, const ffi::AnyBuffer& buffer, int format) {
    Weights weights;
    int64_t elements = 0, bytes = 0;
    if (!Require(format < 0 || (format & kTiledFormat) == 0,
                 std::string(name) + " is tiled, expected GGUF's layout on the CPU") ||
        !Require(BlockSize(format, &elements, &bytes),
                 std::string(name) + " has unknown format " + std::to_string(format)) ||
        !Require(buffer.dimensions().size() == 3,
                 std::string(name) + " has shape " + ShapeText(buffer) + ", expected rank 3")) {
      return weights;
    }
    const bool dense = elements == 1;
    const int64_t last = buffer.dimensions()[2];
    const bool type_matches = dense ? DenseTypeOf(buffer.element_type()) == format
                                    : buffer.element_type() == ffi::DataType::U8;
    Require(type_matches, std::string(name) + " has an element type that is not its format's");
    Require(dense || last % bytes == 0,
            std::string(name) + " has rows of " + std::to_string(last) +
                " bytes, expected a multiple of " + std::to_string(bytes));
    weights.data = static_cast<const uint8_t*>(buffer.untyped_data());
    weights.format = format;
    weights.experts = buffer.dimensions()[0];
    weights.n = buffer.dimensions()[1];
    weights.k = dense ? last : last / bytes * elements;
    weights.row_bytes = dense ? last * bytes : last;
    return weights;
  }

  void RequireWorkspace(const ffi::AnyBuffer& buffer, int64_t bytes) {
    Require(buffer.element_type() == ffi::DataType::U8 &&
                static_cast<int64_t>(buffer.element_count()) >= bytes,
            "workspace has " + std::to_string(buffer.element_count()) + " bytes, expected " +
                std::to_string(bytes));
  }

  bool ok() const { return message_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(message_);
  }

 private:
  const char* target_;
  std::string message_;
};

// The pool lives in the call's context; jobs that start late do not touch it.
inline Executor ExecutorOf(ffi::ThreadPool& pool) {
  Executor executor;
  executor.threads = pool.num_threads();
  executor.schedule = [&pool](std::function<void()> job) { pool.Schedule(std::move(job)); };
  return executor;
}

}  // namespace jax_moe::cpu
