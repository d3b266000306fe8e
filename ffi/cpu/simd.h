// Vectors of floats of the width that this translation unit is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ffi/blocks/decoder.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// GCC's and Clang's vector extension: arithmetic lane by lane, contracted to FMA where there is
// one.
typedef float Vec __attribute__((vector_size(4 * kLanes)));

JM_HD Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

JM_HD Vec Broadcast(float f) {
#if defined(__AVX512F__)
  return Vec(_mm512_set1_ps(f));
#elif defined(__AVX2__)
  return Vec(_mm256_set1_ps(f));
#else
  return Vec{f, f, f, f};
#endif
}

// kLanes 8-bit integers as floats.
JM_HD Vec LoadInt8(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vec(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)));
#elif defined(__AVX2__)
  const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return Vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
#else
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
#endif
}

JM_HD float Sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// out[i] += the sum of v[i]'s lanes, i = 0 .. 3.
JM_HD void AddSums(const Vec (&v)[4], float* out) {
#if defined(__AVX2__)
  __m256 half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(__m512(v[i])),
                            _mm512_extractf32x8_ps(__m512(v[i]), 1));
#else
    half[i] = __m256(v[i]);
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]),
                                     _mm256_hadd_ps(half[2], half[3]));
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), total));
#else
  for (int i = 0; i < 4; ++i) out[i] += Sum(v[i]);
#endif
}

}  // namespace
}  // namespace jax_moe::cpu
