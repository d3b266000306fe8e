// Hopper's warpgroup products with both operands in shared memory, and the copies of a tensor map's
// tiles that feed them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/cuda/hopper.cuh"

namespace jax_moe::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Copies the map's box at (column, row, matrix) to shared memory and tells the barrier. What is
// past the end of the tensor is zeros.
__device__ __forceinline__ void TensorCopy(void* shared, const CUtensorMap* map, int column,
                                           int row, int matrix, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(barrier))
      : "memory");
}

// The same with OncePolicy.
__device__ __forceinline__ void TensorCopyOnce(void* shared, const CUtensorMap* map, int column,
                                               int row, int matrix, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(barrier)), "l"(OncePolicy())
      : "memory");
}

// The same to, and with barriers at, the same addresses in all of the cluster's blocks whose bits
// are set.
__device__ __forceinline__ void TensorCopyToBlocks(void* shared, const CUtensorMap* map,
                                                   int column, int row, int matrix,
                                                   uint64_t* barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(barrier)),
      "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// D [64, kColumns] += A [64, 16] B [16, kColumns] with float32 sums; D = A B where `add` is 0. Both
// operands are K-major in the 128-byte swizzle (SwizzledOperand). Of D a lane holds, for every 8
// columns, what it holds of mma's 16 x 8 tile; a tile may be longer than the columns in use.
template <typename T, int kColumns>
struct WarpgroupShared;

// The registers of n times 8 columns, as operands and in the text of the instruction.
#define JM_S1(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define JM_S2(d) JM_S1(d), JM_S1((d + 4))
#define JM_S4(d) JM_S2(d), JM_S2((d + 8))
#define JM_S8(d) JM_S4(d), JM_S4((d + 16))
#define JM_S16(d) JM_S8(d), JM_S8((d + 32))
#define JM_S3(d) JM_S2(d), JM_S1((d + 8))
#define JM_S5(d) JM_S4(d), JM_S1((d + 16))
#define JM_S6(d) JM_S4(d), JM_S2((d + 16))
#define JM_S7(d) JM_S4(d), JM_S3((d + 16))
#define JM_S9(d) JM_S8(d), JM_S1((d + 32))
#define JM_S10(d) JM_S8(d), JM_S2((d + 32))
#define JM_S11(d) JM_S8(d), JM_S3((d + 32))
#define JM_S12(d) JM_S8(d), JM_S4((d + 32))
#define JM_S13(d) JM_S8(d), JM_S5((d + 32))
#define JM_S14(d) JM_S8(d), JM_S6((d + 32))
#define JM_S15(d) JM_S8(d), JM_S7((d + 32))
#define JM_S17(d) JM_S16(d), JM_S1((d + 64))
#define JM_S18(d) JM_S16(d), JM_S2((d + 64))

#define JM_R1 "%0,%1,%2,%3"
#define JM_R2 JM_R1 ",%4,%5,%6,%7"
#define JM_R3 JM_R2 ",%8,%9,%10,%11"
#define JM_R4 JM_R3 ",%12,%13,%14,%15"
#define JM_R5 JM_R4 ",%16,%17,%18,%19"
#define JM_R6 JM_R5 ",%20,%21,%22,%23"
#define JM_R7 JM_R6 ",%24,%25,%26,%27"
#define JM_R8 JM_R7 ",%28,%29,%30,%31"
#define JM_R9 JM_R8 ",%32,%33,%34,%35"
#define JM_R10 JM_R9 ",%36,%37,%38,%39"
#define JM_R11 JM_R10 ",%40,%41,%42,%43"
#define JM_R12 JM_R11 ",%44,%45,%46,%47"
#define JM_R13 JM_R12 ",%48,%49,%50,%51"
#define JM_R14 JM_R13 ",%52,%53,%54,%55"
#define JM_R15 JM_R14 ",%56,%57,%58,%59"
#define JM_R16 JM_R15 ",%60,%61,%62,%63"
#define JM_R17 JM_R16 ",%64,%65,%66,%67"
#define JM_R18 JM_R17 ",%68,%69,%70,%71"

// `a`, `b` and `add` are the numbers of the operands that follow the sums.
#define JM_PRODUCT(T, type, columns, n, a, b, add)                                              \
  template <>                                                                                   \
  struct WarpgroupShared<T, columns> {                                                          \
    static __device__ __forceinline__ void Multiply(float* d, uint64_t x, uint64_t y, int adds) { \
      asm volatile(                                                                             \
          "{\n"                                                                                 \
          ".reg .pred p;\n"                                                                     \
          "setp.ne.b32 p, %" #add ", 0;\n"                                                      \
          "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" JM_R##n    \
          "}, %" #a ", %" #b ", p, 1, 1, 0, 0;\n"                                               \
          "}\n"                                                                                 \
          : JM_S##n(d)                                                                          \
          : "l"(x), "l"(y), "r"(adds));                                                         \
    }                                                                                           \
  };
#define JM_PRODUCTS(columns, n, a, b, add)                    \
  JM_PRODUCT(half, "f16", columns, n, a, b, add)              \
  JM_PRODUCT(__nv_bfloat16, "bf16", columns, n, a, b, add)

JM_PRODUCTS(8, 1, 4, 5, 6)
JM_PRODUCTS(16, 2, 8, 9, 10)
JM_PRODUCTS(24, 3, 12, 13, 14)
JM_PRODUCTS(32, 4, 16, 17, 18)
JM_PRODUCTS(40, 5, 20, 21, 22)
JM_PRODUCTS(48, 6, 24, 25, 26)
JM_PRODUCTS(56, 7, 28, 29, 30)
JM_PRODUCTS(64, 8, 32, 33, 34)
JM_PRODUCTS(72, 9, 36, 37, 38)
JM_PRODUCTS(80, 10, 40, 41, 42)
JM_PRODUCTS(88, 11, 44, 45, 46)
JM_PRODUCTS(96, 12, 48, 49, 50)
JM_PRODUCTS(104, 13, 52, 53, 54)
JM_PRODUCTS(112, 14, 56, 57, 58)
JM_PRODUCTS(120, 15, 60, 61, 62)
JM_PRODUCTS(128, 16, 64, 65, 66)
JM_PRODUCTS(136, 17, 68, 69, 70)
JM_PRODUCTS(144, 18, 72, 73, 74)

#undef JM_PRODUCTS
#undef JM_PRODUCT
#undef JM_R1
#undef JM_R2
#undef JM_R3
#undef JM_R4
#undef JM_R5
#undef JM_R6
#undef JM_R7
#undef JM_R8
#undef JM_R9
#undef JM_R10
#undef JM_R11
#undef JM_R12
#undef JM_R13
#undef JM_R14
#undef JM_R15
#undef JM_R16
#undef JM_R17
#undef JM_R18
#undef JM_S1
#undef JM_S2
#undef JM_S3
#undef JM_S4
#undef JM_S5
#undef JM_S6
#undef JM_S7
#undef JM_S8
#undef JM_S9
#undef JM_S10
#undef JM_S11
#undef JM_S12
#undef JM_S13
#undef JM_S14
#undef JM_S15
#undef JM_S16
#undef JM_S17
#undef JM_S18

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace jax_moe::cuda
