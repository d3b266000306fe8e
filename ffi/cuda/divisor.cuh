// Division of numbers below 2^31 by one that is known only at run time.
#pragma once

namespace jax_moe::cuda {

class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(unsigned divisor)
      : divisor_(divisor), inverse_(divisor > 1 ? 0xffffffffu / divisor + 1 : 0) {}

  __device__ __forceinline__ int Quotient(unsigned x) const {
    if (divisor_ == 1) return static_cast<int>(x);
    // At most one too large.
    const unsigned quotient = __umulhi(x, inverse_);
    return static_cast<int>(quotient * divisor_ > x ? quotient - 1 : quotient);
  }

 private:
  unsigned divisor_, inverse_;
};

}  // namespace jax_moe::cuda
