// IEEE arithmetic for a scope. XLA's CPU threads flush subnormals to zero; block scales in binary16
// and small activations need them.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jax_moe::cpu {

class ScopedIeeeFloat {
 public:
#if defined(__x86_64__)
  ScopedIeeeFloat() : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero));
  }
  ~ScopedIeeeFloat() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  ScopedIeeeFloat() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~kFlushToZero));
  }
  ~ScopedIeeeFloat() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
  ScopedIeeeFloat() {}
#endif
  ScopedIeeeFloat(const ScopedIeeeFloat&) = delete;
  ScopedIeeeFloat& operator=(const ScopedIeeeFloat&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  uint64_t saved_;
#endif
};

}  // namespace jax_moe::cpu
