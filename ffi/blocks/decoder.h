// What a block format is, and the helpers that its decoder is written with.
//
// A GGUF block packs kBlock weights into kBytes bytes. Every format is decoded in units of 32
// consecutive weights, as signed 8-bit integers, and in groups of kGroup weights that share one
// scale and one offset, in float32:
//
//     weight = scale * q + offset
//
// where the offset is added only if the format has one (adding +0 would lose the sign of -0). In
// every format scale * q is exact in float32, so a compiler may contract the sum into an FMA: the
// result has the bits of ggml's dequantiser either way, Inf and NaN scales included. Float, integer
// and tensor-core kernels of both platforms are derived from these two functions and nothing else:
//
//   struct FORMAT {
//     static constexpr int kType;         // ggml_type in a GGUF file
//     static constexpr int kBlock;        // weights a block, a multiple of 32
//     static constexpr int kBytes;        // bytes a block; on the device a block is aligned to its
//                                         // power-of-two part, on the host to nothing
//     static constexpr int kGroup;        // weights that share scale and offset: 16 or 32
//     static constexpr bool kHasOffset;   // false: offset is zero in every group
//     // Weights 32 * unit .. 32 * unit + 31 of the block: byte i of word j is weight 4 * j + i.
//     static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]);
//     // Scale and offset of weights kGroup * group .. kGroup * group + kGroup - 1.
//     static JM_HD Affine Group(const uint8_t* block, int group);
//   };
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define JM_HD __host__ __device__ __forceinline__
#else
#define JM_HD inline __attribute__((always_inline))
#endif

namespace jax_moe {

// One group's map from integers to weights.
struct Affine {
  float scale;
  float offset;
};

// Reads two bytes, little-endian, at an address that is a multiple of kAlign.
template <int kAlign = 1>
JM_HD uint32_t LoadU16(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  if constexpr (kAlign % 2 == 0) return *reinterpret_cast<const uint16_t*>(p);
#endif
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
}

// Reads four bytes, little-endian, at an address that is a multiple of kAlign.
template <int kAlign = 1>
JM_HD uint32_t LoadU32(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  if constexpr (kAlign % 4 == 0) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else if constexpr (kAlign % 2 == 0) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    return static_cast<uint32_t>(h[0]) | static_cast<uint32_t>(h[1]) << 16;
  } else {
    return LoadU16(p) | LoadU16(p + 2) << 16;
  }
#else
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
#endif
}

JM_HD float BitsToFloat(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// IEEE binary16 to binary32, exact, subnormals and NaN included.
JM_HD float HalfToFloat(uint32_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(h)));
#elif defined(__FLT16_MANT_DIG__) && (defined(__F16C__) || defined(__aarch64__))
  _Float16 v;
  const uint16_t bits = static_cast<uint16_t>(h);
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
#else
  // Subnormals go through an integer conversion: XLA's threads read a subnormal float as zero.
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude < 0x0400u) {
    const float value = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t rebias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;
  return BitsToFloat(sign | ((magnitude << 13) + rebias));
#endif
}

// Four bytes at once: a - b in every byte, for 0 <= a < 128 and 0 <= b <= 128.
JM_HD uint32_t SubBytes(uint32_t a, uint32_t b) {
  return ((a | 0x80808080u) - b) ^ 0x80808080u;
}

// Four bytes at once: -a where the byte of mask is 0xff, a where it is 0x00, for 0 < a < 128.
JM_HD uint32_t NegateBytes(uint32_t a, uint32_t mask) {
  // ~a is at most 0xfe, so that adding one carries nothing into the next byte.
  return (a ^ mask) + (mask & 0x01010101u);
}

// Four bits b0..b3 to four bytes 0x00 or 0xff, b0 lowest.
JM_HD uint32_t BitsToByteMask(uint32_t bits) {
  const uint32_t spread = ((bits & 0xfu) * 0x00204081u) & 0x01010101u;
  return spread * 0xffu;
}

}  // namespace jax_moe
