// The operands of the FFI targets, read and checked in one place for the CPU and CUDA: what a call may
// hold, in words.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "ffi/plan/plan.h"
#include "ffi/targets.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

namespace ffi = xla::ffi;

template <typename Buffer>
std::string ShapeText(const Buffer& buffer) {
  std::string text = "[";
  for (const int64_t dim : buffer.dimensions()) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dim);
  }
  return text + "]";
}

// Elements and bytes of a block of a ggml_type, block formats and dense ones; false: not known.
bool BlockSize(int format, int64_t* elements, int64_t* bytes);

// Collects the first complaint about a call.
class Checker {
 public:
  explicit Checker(const char* target) : target_(target) {}

  // True where the condition holds.
  bool Require(bool condition, const std::string& message);
  bool RequireShape(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                    std::initializer_list<int64_t> shape);
  // An operand that may be absent: its data, or null.
  const float* OptionalFloats(const char* name, const ffi::AnyBuffer& buffer,
                              std::initializer_list<int64_t> shape);
  void RequireWorkspace(int64_t bytes, int64_t expected);

  bool ok() const { return message_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(message_);
  }

 private:
  const char* target_;
  std::string message_;
};

// Weights [experts, rows, columns]: dense, or packed blocks in either layout.
struct Weight {
  const uint8_t* data = nullptr;
  const float* aux = nullptr;  // [experts, rows, 2] of the tiled layout, null otherwise
  int format = -1;             // ggml_type
  bool packed = false, tiled = false;
  int64_t experts = 0, rows = 0, columns = 0, row_bytes = 0;
};

struct GemmOperands {
  plan::GemmProblem problem;
  int64_t tokens, pairs;
  Variant variant;
  const void* x;
  int x_type, y_type;  // DenseType
  Weight weight;
  const int32_t *sorted_token_ids, *flat_expert_ids;
  const float* topk_weights;  // null: 1
  void* y;
  uint8_t* workspace;
  int64_t workspace_bytes;
};

struct FfnOperands {
  plan::FfnProblem problem;
  int64_t tokens, pairs;
  const void* x;
  int type;  // DenseType of x and y
  const int32_t* expert_ids;
  const float* weights;
  std::optional<Weight> gate, up;  // merged: gate alone, with the rows of both
  Weight down;
  bool merged, weights_before;
  const float *gate_bias, *up_bias, *down_bias, *gate_scale, *up_scale, *down_scale;  // or null
  float beta, linear_beta;
  void* y;
  uint8_t* workspace;
  int64_t workspace_bytes;
};

// The call of a target as ffi/targets.h has it. Where `check` has a complaint, the answer means nothing.
GemmOperands ReadGemm(Checker& check, const ffi::RemainingArgs& arguments,
                      const ffi::RemainingRets& results, const ffi::Dictionary& attributes);
FfnOperands ReadFfn(Checker& check, const ffi::RemainingArgs& arguments,
                    const ffi::RemainingRets& results, const ffi::Dictionary& attributes);

}  // namespace jax_moe
