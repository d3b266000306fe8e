// A buffer's shape in words, for the messages of the FFI handlers.
#pragma once

#include <cstdint>
#include <string>

namespace jax_moe {

template <typename Buffer>
std::string ShapeText(const Buffer& buffer) {
  std::string text = "[";
  for (const int64_t dim : buffer.dimensions()) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dim);
  }
  return text + "]";
}

}  // namespace jax_moe
