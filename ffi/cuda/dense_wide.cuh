// Dense 16-bit weights times many tokens of an expert, on Hopper: both operands in shared memory.
//
// The grid is persistent: an item is a tile of tokens and 256 weight rows (128 of gate and the same
// 128 of up). One warpgroup brings the operands in chunks of 64 columns, through a ring that runs
// on across items: one thread's tensor copies of four times 64 weight rows, and token rows gathered
// by index, both in the 128-byte swizzle. Two warpgroups multiply, each 2 x 64 rows by as many
// columns as the tile has tokens, rounded up to 8. While they store an item's results, the next
// item's operands arrive.
//
// float32 activations of bf16 weights are two bf16 parts, whose products have the same weights: one
// bf16 is too coarse for h, whose rounding would add to that of y, and f16 has not the range of
// bf16 weights.
#pragma once

#include "ffi/cuda/dense_wide.h"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/store.cuh"
#include "ffi/cuda/tiled_activation.cuh"
#include "ffi/cuda/wgmma_shared.cuh"

namespace jax_moe::cuda {

struct DenseWideParams {
  CUtensorMap map[2];  // of the two weights, boxes of 64 rows and 64 columns
  DenseWideArgs args;
  int32_t bands;  // items of a tile
  int32_t paired;
  int32_t stores_two;  // y is aligned to two elements everywhere
};

template <int kParts>
struct DenseWideShape {
  static constexpr int kTokens = kDenseWideTokens;
  static constexpr int kGroups = 2;  // warpgroups that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr int kChunk = 64;               // columns: 128 bytes, a row of the swizzle
  static constexpr int kSlots = 2 * kGroups;      // of 64 weight rows
  static constexpr int kSlotBytes = 64 * 2 * kChunk;
  static constexpr int kPartBytes = kTokens * 2 * kChunk;
  static constexpr int kTokensAt = kSlots * kSlotBytes;
  static constexpr int kStageBytes = kTokensAt + kParts * kPartBytes;
  static constexpr int kStages = kParts == 1 ? 4 : 3;
  // Chunks of tokens on their way; with one place more, none waits for a consumer that waits for
  // it.
  static constexpr int kLookahead = 2;
  // Consumers may be behind by as many items as there are stages, and store one more's results.
  static constexpr int kInfos = kStages + 1;
  static constexpr int kPass = 16;  // tokens whose results are stored at a time
  static constexpr int kGroupTiles = 8;

  struct Info {
    int32_t expert, count, band;
    int32_t pair[kTokens];
    float factor[kTokens];
  };
  struct Memory {
    alignas(1024) uint8_t stage[kStages][kStageBytes];
    // A warpgroup's sums; the padding spreads a quad's tokens over the banks.
    alignas(16) float staged[kGroups][2][kPass][64 + 4];
    Info info[kInfos];
    uint64_t full[kStages], empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Memory) + 1024;  // for its alignment
  static_assert(kSharedBytes <= 232448);
  static_assert(kLookahead < kStages && kTokens % kPass == 0);
  static_assert(kSlotBytes % 1024 == 0 && kPartBytes % 1024 == 0);
  static_assert(kSlots * 64 == kDenseWideRows);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T, int kParts>
class DenseWideBlock {
 public:
  using Shape = DenseWideShape<kParts>;
  using Memory = typename Shape::Memory;
  using Info = typename Shape::Info;

  __device__ __forceinline__ DenseWideBlock(const DenseWideParams& params, Memory& memory)
      : params_(params),
        args_(params.args),
        m_(memory),
        tiles_(min(static_cast<int64_t>(*params.args.lists.num_tiles),
                   params.args.lists.max_tiles)),
        items_(tiles_ * params.bands),
        chunks_(static_cast<int>((params.args.k + Shape::kChunk - 1) / Shape::kChunk)) {}

  __device__ __forceinline__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        InitBarrier(m_.full + i, 128 + 1);  // every producer, and the thread that copies weights
        InitBarrier(m_.empty + i, 4 * Shape::kGroups);
      }
      FenceBarrierInit();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      GiveRegisters<Shape::kProducerRegisters>();
      Produce();
    } else {
      TakeRegisters<Shape::kConsumerRegisters>();
      Consume();
    }
  }

 private:
  using Position = RingPosition<Shape::kStages>;
  struct Item {
    int64_t tile;
    int band;
  };

  // Items that run at the same time share tokens and weights: a few tiles, which often are of one
  // expert, go through the bands together.
  __device__ __forceinline__ Item FindItem(int64_t index) const {
    const int64_t first = index / (Shape::kGroupTiles * params_.bands) * Shape::kGroupTiles;
    const int rest = static_cast<int>(index - first * params_.bands);
    const int tiles = static_cast<int>(min(tiles_ - first, int64_t{Shape::kGroupTiles}));
    return {first + rest % tiles, rest / tiles};
  }

  static __device__ __forceinline__ void ProducersMeet() {
    asm volatile("bar.sync 3, 128;" ::: "memory");
  }
  // The threads of this consumer's warpgroup meet.
  __device__ __forceinline__ void GroupMeets() const {
    asm volatile("bar.sync %0, 128;" ::"r"(Group() + 1) : "memory");
  }
  static __device__ __forceinline__ int Group() { return threadIdx.x / 128 - 1; }

  __device__ __forceinline__ void Produce() {
    // A thread copies one of the eight 16-byte pieces of a chunk of every 16th token.
    const int first = threadIdx.x / 8, piece = threadIdx.x % 8;
    const int to = Shape::kTokensAt + first * 128 + (piece ^ first % 8) * 16;
    Position place, arrived;
    int waiting = 0;  // chunks of which the consumers have not been told
    int info = 0;
    int64_t index = blockIdx.x;
    if (index >= items_) return;
    TokenTile next = args_.lists.tiles[FindItem(index).tile];
    for (; index < items_; index += gridDim.x) {
      const TokenTile tile = next;
      const int band = FindItem(index).band;
      if (index + gridDim.x < items_) {
        next = args_.lists.tiles[FindItem(index + gridDim.x).tile];
      }
      if (waiting == Shape::kLookahead) Tell(arrived, waiting);
      // Once the first chunk has a place, the consumers are done with what `info` held before.
      WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
      WriteInfo(m_.info[info], tile, band);
      ProducersMeet();
      const T* from[Shape::kTokens / 16];
#pragma unroll
      for (int i = 0; i < Shape::kTokens / 16; ++i) {
        const int token = min(first + 16 * i, tile.count - 1);
        const int64_t row = m_.info[info].pair[token] / args_.pairs_a_row;
        from[i] = static_cast<const T*>(args_.x.values) + row * args_.x.pitch * kParts + piece * 8;
      }
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        // Told before any place is waited for: consumers leave a chunk's place when they have the
        // next chunk.
        if (waiting == Shape::kLookahead) Tell(arrived, waiting);
        WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
        uint8_t* stage = m_.stage[place.stage];
        if (threadIdx.x == 0) CopyWeights(stage, m_.full + place.stage, tile.expert, band, chunk);
#pragma unroll
        for (int i = 0; i < Shape::kTokens / 16; ++i) {
          if (first + 16 * i >= tile.count) break;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            CopyAsync16(stage + to + part * Shape::kPartBytes + 2048 * i,
                        from[i] + part * args_.x.pitch);
          }
          from[i] += Shape::kChunk;
        }
        CommitCopies();
        ++waiting;
        place.Next();
      }
      if (++info == Shape::kInfos) info = 0;
    }
    WaitCopies<0>();
    FenceAsyncProxy();
    for (; waiting > 0; --waiting) {
      Arrive(m_.full + arrived.stage);
      arrived.Next();
    }
  }

  // The oldest of the chunks on their way has arrived.
  __device__ __forceinline__ void Tell(Position& arrived, int& waiting) {
    WaitCopies<Shape::kLookahead - 1>();
    FenceAsyncProxy();
    Arrive(m_.full + arrived.stage);
    arrived.Next();
    --waiting;
  }

  __device__ __forceinline__ void WriteInfo(Info& info, const TokenTile& tile, int band) const {
    if (threadIdx.x == 0) info.expert = tile.expert, info.count = tile.count, info.band = band;
    for (int token = threadIdx.x; token < tile.count; token += 128) {
      const int pair = args_.lists.pairs[tile.begin + token];
      float factor = args_.pair_weight == nullptr ? 1.0f : args_.pair_weight[pair];
      if constexpr (std::is_same_v<T, half>) factor *= args_.x.scales[pair / args_.pairs_a_row];
      info.pair[token] = pair;
      info.factor[token] = factor;
    }
  }

  __device__ __forceinline__ void CopyWeights(uint8_t* stage, uint64_t* full, int expert, int band,
                                              int chunk) const {
    ArriveExpectBytes(full, Shape::kSlots * Shape::kSlotBytes);
#pragma unroll
    for (int slot = 0; slot < Shape::kSlots; ++slot) {
      TensorCopy(stage + slot * Shape::kSlotBytes,
                 params_.map + (params_.paired ? slot % 2 : 0), chunk * Shape::kChunk,
                 FirstRow(band, slot), expert, full);
    }
  }

  // Of the 64 of a slot. A warpgroup's two slots have the same rows of gate and of up.
  __device__ __forceinline__ int FirstRow(int band, int slot) const {
    return params_.paired ? (band * Shape::kGroups + slot / 2) * 64
                          : (band * Shape::kSlots + slot) * 64;
  }

  __device__ __forceinline__ void Consume() {
    Position place;
    int info = 0;
    for (int64_t index = blockIdx.x; index < items_; index += gridDim.x) {
      WaitBarrier(m_.full + place.stage, place.parity);
      MultiplyTile<1>(m_.info[info].count, place);
      StoreResults(m_.info[info]);
      if (++info == Shape::kInfos) info = 0;
    }
  }

  // With as many columns of products as the tile's tokens need.
  template <int kEights>
  __device__ __forceinline__ void MultiplyTile(int count, Position& place) {
    if constexpr (8 * kEights < Shape::kTokens) {
      if (count > 8 * kEights) return MultiplyTile<kEights + 1>(count, place);
    }
    Multiply<8 * kEights>(place);
  }

  template <int kColumns>
  __device__ __forceinline__ void Multiply(Position& place) {
    using Product = WarpgroupShared<T, kColumns>;
    const int lane = threadIdx.x % 32;
    int last = 0;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      WaitBarrier(m_.full + place.stage, place.parity);
      const uint8_t* stage = m_.stage[place.stage];
      const uint64_t a = SwizzledOperand(stage + 2 * Group() * Shape::kSlotBytes);
      const uint64_t b = SwizzledOperand(stage + Shape::kTokensAt);
      FenceWarpgroup();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int adds = step > 0 || part > 0 || chunk > 0;
          const uint64_t tokens = b + (part * Shape::kPartBytes + step * 32) / 16;
          Product::Multiply(sum_[0], a + step * 32 / 16, tokens, adds);
          Product::Multiply(sum_[1], a + (Shape::kSlotBytes + step * 32) / 16, tokens, adds);
        }
      }
      CommitWarpgroup();
      // The last chunk's products have ended.
      WaitWarpgroup<1>();
      if (chunk > 0 && lane == 0) Arrive(m_.empty + last);
      last = place.stage;
      place.Next();
    }
    WaitWarpgroup<0>();
    if (lane == 0) Arrive(m_.empty + last);
  }

  // Sums go through shared memory, so that a warp stores 64 columns of a token at a time.
  __device__ __forceinline__ void StoreResults(const Info& info) {
    for (int pass = 0; pass * Shape::kPass < info.count; ++pass) {
      StagePass<0>(pass);
      GroupMeets();
      const int count = min(Shape::kPass, info.count - pass * Shape::kPass);
      if (args_.activate) {
        for (int tile = params_.paired ? 1 : 0; tile < 2; ++tile) {
          StoreActivated(info, pass, count, tile);
        }
      } else {
        for (int tile = 0; tile < 2; ++tile) StoreSums(info, pass, count, tile);
      }
      GroupMeets();
    }
  }

  // The sums of a pass, whose registers have to be known to the compiler.
  template <int kPass>
  __device__ __forceinline__ void StagePass(int pass) {
    if constexpr ((kPass + 1) * Shape::kPass < Shape::kTokens) {
      if (pass > kPass) return StagePass<kPass + 1>(pass);
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    auto& staged = m_.staged[Group()];
#pragma unroll
    for (int i = 0; i < Shape::kPass / 2; ++i) {
      const int token = i / 4 * 8 + 2 * t + i % 2, row = 16 * warp + g + i / 2 % 2 * 8;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        staged[tile][token][row] = sum_[tile][kPass * Shape::kPass / 2 + i];
      }
    }
  }

  // Calls f(token of the pass, pair, factor) for every fourth token.
  template <typename F>
  __device__ __forceinline__ void ForTokens(const Info& info, int pass, int count, F f) const {
#pragma unroll
    for (int i = 0; i < Shape::kPass / 4; ++i) {
      const int token = threadIdx.x / 32 % 4 + 4 * i, of_tile = pass * Shape::kPass + token;
      if (token < count) f(token, info.pair[of_tile], info.factor[of_tile]);
    }
  }
  // A lane's two sums of a token.
  __device__ __forceinline__ float2 Sums(int tile, int token) const {
    return *reinterpret_cast<const float2*>(
        &m_.staged[Group()][tile][token][threadIdx.x % 32 * 2]);
  }

  __device__ __forceinline__ void StoreSums(const Info& info, int pass, int count, int tile) const {
    if (args_.y_scales != nullptr) return StoreScaled(info, pass, count, tile);
    switch (args_.y_type) {
      case Element::kF32:
        return StoreSumsAs<Element::kF32>(info, pass, count, tile);
      case Element::kF16:
        return StoreSumsAs<Element::kF16>(info, pass, count, tile);
      case Element::kBF16:
        return StoreSumsAs<Element::kBF16>(info, pass, count, tile);
    }
  }

  template <Element kType>
  __device__ __forceinline__ void StoreSumsAs(const Info& info, int pass, int count,
                                              int tile) const {
    const int row = FirstRow(info.band, 2 * Group() + tile) + threadIdx.x % 32 * 2;
    ForTokens(info, pass, count, [&](int token, int pair, float factor) {
      const float2 sum = Sums(tile, token);
      StoreRows<kType>(pair, row, sum.x * factor, sum.y * factor);
    });
  }

  // The results of rows `row` and row + 1, as far as the matrix has them.
  template <Element kType>
  __device__ __forceinline__ void StoreRows(int pair, int row, float first, float second) const {
    const int64_t at = pair * args_.y_pitch + row;
    if (params_.stores_two) {
      if (row < args_.rows) StoreTwo(args_.y, at, kType, first, second);
    } else {
      if (row < args_.rows) Store(args_.y, at, kType, first);
      if (row + 1 < args_.rows) Store(args_.y, at + 1, kType, second);
    }
  }

  // f16 times a power of two that brings the largest magnitude of 64 columns to 2^14 .. 2^15.
  __device__ __forceinline__ void StoreScaled(const Info& info, int pass, int count,
                                              int tile) const {
    const int begin = FirstRow(info.band, 2 * Group() + tile), lane = threadIdx.x % 32;
    const int row = begin + 2 * lane;
    if (begin >= args_.rows) return;
    const int64_t groups = (args_.rows + 63) / 64;
    ForTokens(info, pass, count, [&](int token, int pair, float factor) {
      float2 sum = Sums(tile, token);
      sum = row < args_.rows ? float2{sum.x * factor, sum.y * factor} : float2{};
      // Finite or infinite: the maximum leaves NaN out.
      float max = fmaxf(fabsf(sum.x), fabsf(sum.y));
      for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
      const int exponent = __float_as_int(max) >> 23;  // with its bias of 127
      const int scale = max == 0 ? 127 : ::max(exponent - 14, 1);
      const float inverse = __int_as_float((254 - scale) << 23);
      if (lane == 0) args_.y_scales[pair * groups + begin / 64] = __int_as_float(scale << 23);
      if (row < args_.rows) {
        StoreTwo(args_.y, pair * args_.y_pitch + row, Element::kF16, sum.x * inverse,
                 sum.y * inverse);
      }
    });
  }

  // Columns of h past the end are zeros: the next product reads whole chunks.
  __device__ __forceinline__ void StoreActivated(const Info& info, int pass, int count,
                                                 int tile) const {
    const int row = FirstRow(info.band, 2 * Group() + tile) + threadIdx.x % 32 * 2;
    if (row >= (args_.h_pair ? args_.y_pitch : args_.rows)) return;
    const int rows = static_cast<int>(args_.rows);
    const RowFinish first(args_, info.expert, min(row, rows - 1));
    const RowFinish second(args_, info.expert, min(row + 1, rows - 1));
    WithActivation(args_.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      ForTokens(info, pass, count, [&](int token, int pair, float factor) {
        const float2 gate = Sums(0, token), up = Sums(tile, token);
        float2 h = {
            first.Activate<kActivation>(args_, gate.x * factor, up.x * factor),
            second.Activate<kActivation>(args_, gate.y * factor, up.y * factor)};
        if (!args_.h_pair) return StoreRows<Element::kF32>(pair, row, h.x, h.y);
        if (row >= rows) h.x = 0;
        if (row + 1 >= rows) h.y = 0;
        StorePair(pair, row, h);
      });
    });
  }

  __device__ __forceinline__ void StorePair(int pair, int row, float2 h) const {
    auto* y = static_cast<__nv_bfloat16*>(args_.y) + pair * args_.y_pitch * 2 + row;
    const __nv_bfloat162 high = __floats2bfloat162_rn(h.x, h.y);
    const float2 rounded = __bfloat1622float2(high);
    *reinterpret_cast<__nv_bfloat162*>(y) = high;
    *reinterpret_cast<__nv_bfloat162*>(y + args_.y_pitch) =
        __floats2bfloat162_rn(h.x - rounded.x, h.y - rounded.y);
  }

  const DenseWideParams& params_;
  const DenseWideArgs& args_;
  Memory& m_;
  const int64_t tiles_, items_;
  const int chunks_;
  float sum_[2][Shape::kTokens / 2] = {};
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, int kParts>
__global__ void __launch_bounds__(DenseWideShape<kParts>::kThreads, 1)
    DenseWide(const __grid_constant__ DenseWideParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Block = DenseWideBlock<T, kParts>;
  extern __shared__ uint8_t shared[];
  LetNextKernelStart();
  WaitForEarlierKernels();
  const uint32_t address = SharedAddress(shared);
  auto& memory =
      *reinterpret_cast<typename Block::Memory*>(shared + ((1024 - address % 1024) % 1024));
  Block(params, memory).Run();
#endif
}

}  // namespace jax_moe::cuda
