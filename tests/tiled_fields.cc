// Compiled and run by test_tiled_fields.py: that the fields which the CUDA kernels take out of tiled
// units are, read as f16, the integers that the blocks' own decoders give, times a power of two.

#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <utility>

#include "ffi/blocks/tiled.h"
#include "ffi/blocks/tiled_fields.h"

namespace jax_moe {
namespace {

double HalfValue(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
  if (exponent == 31) return NAN;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24)
                                         : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// Less the plus or minus one that is no part of a field of IQ1, a multiple of 8.
template <typename Format>
int WithoutShift(int field) {
  return FieldsOf<Format>::kShifts == 0 ? field : (field + 4) & ~7;
}

template <typename Format, int i>
bool PairMatches(const uint32_t* words, const uint32_t (&q)[8]) {
  using Fields = FieldsOf<Format>;
  const uint32_t pair = Fields::template Pair<i>(words);
  const int exponent = Fields::kExponent + Fields::kShift * Fields::template kPosition<i>;
  for (int half = 0; half < 2; ++half) {
    const int weight = 2 * i + half;
    const int value = static_cast<int8_t>(q[weight / 4] >> 8 * (weight % 4));
    const int expected = WithoutShift<Format>(value + Fields::kBias);
    // Equal as a whole: no bit of another field is left beside it.
    if (HalfValue(pair >> 16 * half & 0xffff) != std::ldexp(expected, exponent)) return false;
  }
  return true;
}

template <typename Format, int... i>
bool UnitMatches(const uint32_t* words, const uint32_t (&q)[8], std::integer_sequence<int, i...>) {
  return (PairMatches<Format, i>(words, q) && ...);
}

template <typename Format>
bool Check(const char* name) {
  using Sizes = tiled::Sizes<Format>;
  std::mt19937 random(7);
  for (int round = 0; round < 500; ++round) {
    uint8_t source[Sizes::kSourceBytes], record[Sizes::kBytes] = {};
    const uint8_t* block = source;
    for (int i = 0; i < Format::kBytes; ++i) source[i] = static_cast<uint8_t>(random());
    if constexpr (tiled::kDerivedBytes<Format> > 0) {
      for (int unit = 0; unit < Sizes::kUnits; ++unit) {
        Tiling<Format>::Derive(block, unit, source + Format::kBytes);
      }
    }
    for (int bit = 0; bit < 8 * Sizes::kBytes; ++bit) {
      const int from = tiled::SourceBit<Format>(bit);
      record[bit / 8] |= static_cast<uint8_t>((source[from / 8] >> from % 8 & 1) << bit % 8);
    }
    for (int unit = 0; unit < Sizes::kUnits; ++unit) {
      uint32_t words[FieldsOf<Format>::kWords], q[8];
      std::memcpy(words, record + unit * Sizes::kUnitBytes, sizeof words);
      Format::Unit(block, unit, q);
      if (!UnitMatches<Format>(words, q, std::make_integer_sequence<int, 16>())) {
        std::printf("%s: unit %d of round %d differs\n", name, unit, round);
        return false;
      }
    }
  }
  std::printf("%s\n", name);
  return true;
}

}  // namespace
}  // namespace jax_moe

int main() {
  bool ok = true;
#define JAX_MOE_CHECK(FORMAT) ok = jax_moe::Check<jax_moe::FORMAT>(#FORMAT) && ok;
  JAX_MOE_FORMATS(JAX_MOE_CHECK)
  return ok ? 0 : 1;
}
