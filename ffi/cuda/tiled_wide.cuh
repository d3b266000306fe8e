// Tiled weights times tiles of 128 tokens of an expert, on Hopper: bound by the tensor cores.
// tiled_panels.cuh has fewer tokens, and 128 where it is the faster one.
//
// One warpgroup brings the operands: bulk copies of weight bands, and token rows gathered by index in
// the tensor cores' 128-byte swizzle. The other warpgroups each have 128 weight rows (64 of gate and
// the same 64 of up, or two times 64): they decode weights in registers, which are the A operand of a
// warpgroup product whose B operand are the tokens in shared memory. Every weight is decoded once a
// token tile. While one warpgroup decodes, the other's products keep the tensor cores busy.
#pragma once

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/powers.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_chunk.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_unit.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct TiledWideShape {
  static constexpr int kTokens = 128;
  static constexpr int kGroups = 2;  // warpgroups that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr int kBands = 8 * kGroups;
  static constexpr int kChunk = 128;  // columns
  static constexpr int kAtomChunks = TiledUnit<Format>::kChunks;
  static constexpr int kAtomBytes =
      16 * kAtomChunks * kChunk / Format::kBlock * tiled::Sizes<Format>::kBytes;
  static constexpr int kWeightBytes = kBands * kAtomBytes;    // a stage
  static constexpr int kTokenBytes = kTokens * 2 * kChunk;    // a stage
  static constexpr int kBudget = 232448 - 1024 - 4096;
  // Weights of 4 chunks ahead, then tokens.
  static constexpr int kMostWeightStages = 4 / kAtomChunks;
  static constexpr int kWeightStages =
      std::max(2, std::min(kMostWeightStages, (kBudget - 3 * kTokenBytes) / kWeightBytes));
  static constexpr int kTokenStages =
      std::max(2, std::min(4, (kBudget - kWeightStages * kWeightBytes) / kTokenBytes));
  // Chunks of tokens on their way; with one place more, none waits for a consumer that waits for it.
  static constexpr int kLookahead = std::min(2, kTokenStages - 1);

  struct Memory {
    alignas(1024) uint8_t tokens[kTokenStages][kTokenBytes];
    alignas(128) uint8_t weights[kWeightStages][kBands][kAtomBytes];
    uint64_t weights_full[kWeightStages], weights_empty[kWeightStages];
    uint64_t tokens_full[kTokenStages], tokens_empty[kTokenStages];
    int32_t pair[kTokens], row[kTokens];  // of every token, of its activations
    float factor[kTokens], h_factor[kTokens];
  };
  static constexpr int kSharedBytes = sizeof(Memory) + 1024;  // for its alignment

  // A warpgroup's sums, over the operands; the padding spreads a quad's tokens over the banks.
  struct Staged {
    float sum[2][kTokens][64 + 4];
  };
  static_assert(kGroups * sizeof(Staged) <= kTokenStages * kTokenBytes +
                                                kWeightStages * kWeightBytes);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kId, int kThreads>
__device__ __forceinline__ void NamedBarrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

template <typename Format>
class TiledWideBlock {
 public:
  using Shape = TiledWideShape<Format>;
  using Memory = typename Shape::Memory;
  using Tiled = TiledUnit<Format>;
  static constexpr int kTokens = Shape::kTokens;

  __device__ __forceinline__ TiledWideBlock(const TiledArgs& args, Memory& memory,
                                            const TokenTile& tile)
      : args_(args),
        m_(memory),
        tile_(tile),
        chunks_((args.columns + Shape::kChunk - 1) / Shape::kChunk) {}

  __device__ __forceinline__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kWeightStages; ++i) {
        InitBarrier(m_.weights_full + i, 1);
        InitBarrier(m_.weights_empty + i, 4 * Shape::kGroups);
      }
      for (int i = 0; i < Shape::kTokenStages; ++i) {
        InitBarrier(m_.tokens_full + i, 128);
        InitBarrier(m_.tokens_empty + i, 4 * Shape::kGroups);
      }
      FenceBarrierInit();
    }
    if (threadIdx.x < tile_.count) {
      const int pair = args_.lists.pairs[tile_.begin + threadIdx.x];
      m_.pair[threadIdx.x] = pair;
      m_.row[threadIdx.x] = pair / args_.pairs_a_row;
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
  __device__ __forceinline__ bool Paired() const { return args_.activate && args_.gated; }

  // Which matrix and which of its bands stands in place `slot` of a stage; bands past the end repeat
  // the last one.
  __device__ __forceinline__ int MatrixOf(int slot) const {
    return Paired() ? slot / 4 % 2 : args_.activate ? 1 : 0;
  }
  __device__ __forceinline__ int BandOf(int slot) const {
    if (!Paired()) return blockIdx.x * Shape::kBands + slot;
    return blockIdx.x * (Shape::kBands / 2) + slot / 8 * 4 + slot % 4;
  }
  __device__ __forceinline__ int Clamped(int band) const { return min(band, args_.rows / 16 - 1); }

  __device__ __forceinline__ void Produce() {
    const int lane = threadIdx.x % 32;
    const bool copies_weights = threadIdx.x < Shape::kBands;
    const uint8_t* band = nullptr;
    if (copies_weights) {
      const TiledMatrix& matrix = args_.matrix[MatrixOf(lane)];
      band = matrix.data + tile_.expert * matrix.expert_bytes +
             Clamped(BandOf(lane)) * 16 * args_.row_bytes;
    }
    // A thread copies one of the eight 16-byte pieces of every half row of each 16th token.
    const int first = threadIdx.x / 8, piece = threadIdx.x % 8;
    const half* from[kTokens / 16];
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
      const int token = min(first + 16 * i, tile_.count - 1);
      from[i] = static_cast<const half*>(args_.x.values) + m_.row[token] * args_.x.pitch + piece * 8;
    }
    const int to = first * 128 + (piece ^ first % 8) * 16;
    RingPosition<Shape::kWeightStages> w;
    RingPosition<Shape::kTokenStages> x, arrived;
    for (int chunk = 0; chunk < chunks_ + Shape::kLookahead; ++chunk) {
      // Told before any place is waited for: consumers leave a chunk's place when they have the next
      // chunk.
      if (chunk >= Shape::kLookahead) {
        WaitCopies<Shape::kLookahead - 1>();
        FenceAsyncProxy();
        Arrive(m_.tokens_full + arrived.stage);
        arrived.Next();
      }
      if (chunk < chunks_) {
        if (chunk % Shape::kAtomChunks == 0) {
          if (threadIdx.x < 32) {
            WaitBarrier(m_.weights_empty + w.stage, w.parity ^ 1);
            const int column = chunk * Shape::kChunk;
            const int bytes = TiledRow<Format>::BandBytes(
                min(Shape::kAtomChunks * Shape::kChunk, args_.columns - column));
            if (lane == 0) ArriveExpectBytes(m_.weights_full + w.stage, Shape::kBands * bytes);
            __syncwarp();
            if (copies_weights) {
              BulkCopyOnce(m_.weights[w.stage][lane],
                           band + TiledRow<Format>::BandBytes(column), bytes,
                           m_.weights_full + w.stage);
            }
          }
          w.Next();
        }
        WaitBarrier(m_.tokens_empty + x.stage, x.parity ^ 1);
        uint8_t* stage = m_.tokens[x.stage] + to;
#pragma unroll
        for (int i = 0; i < kTokens / 16; ++i) {
          if (first + 16 * i >= tile_.count) break;
          CopyAsync16(stage + 2048 * i, from[i]);
          CopyAsync16(stage + 2048 * i + kTokens * 128, from[i] + 64);
          from[i] += Shape::kChunk;
        }
        x.Next();
      }
      CommitCopies();
    }
    MakeFactors();
    NamedBarrier<3, Shape::kThreads>();
  }

  __device__ __forceinline__ void MakeFactors() {
    if (threadIdx.x >= tile_.count) return;
    const int pair = m_.pair[threadIdx.x];
    m_.factor[threadIdx.x] = PairFactor(args_, pair);
    if (args_.activate) {
      m_.h_factor[threadIdx.x] = ScaleOfH(args_, tile_.expert, pair, blockIdx.x == 0);
    } else if (args_.y_scales != nullptr) {
      m_.factor[threadIdx.x] *= ScaleOfY(args_, tile_.expert, pair, blockIdx.x == 0);
    }
  }

  __device__ __forceinline__ int Slot(int tile) const {
    const int warp = threadIdx.x / 32 - 4;
    return warp / 4 * 8 + tile * 4 + warp % 4;
  }
  // The row's normaliser of row `row` of a slot's band.
  __device__ __forceinline__ float RowScale(int slot, int row) const {
    const TiledMatrix& matrix = args_.matrix[MatrixOf(slot)];
    return matrix.aux[(tile_.expert * matrix.expert_rows + Clamped(BandOf(slot)) * 16 + row) * 2];
  }

  // With as many columns of products as the tile's tokens need.
  __device__ __forceinline__ void Consume() {
    if (tile_.count > 96) {
      MultiplyAll<128>();
    } else if (tile_.count > 64) {
      MultiplyAll<96>();
    } else if (tile_.count > 32) {
      MultiplyAll<64>();
    } else {
      MultiplyAll<32>();
    }
    NamedBarrier<3, Shape::kThreads>();
    StoreResults();
  }

  template <int kColumns>
  __device__ __forceinline__ void MultiplyAll() {
    const int lane = threadIdx.x % 32, g = lane / 4;
    float normaliser[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      normaliser[i / 2][i % 2] = InverseNormaliser(RowScale(Slot(i / 2), g + 8 * (i % 2)));
    }
    RingPosition<Shape::kWeightStages> w;
    RingPosition<Shape::kTokenStages> x;
    int last = 0;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      const int part = chunk % Shape::kAtomChunks;
      if (part == 0) WaitBarrier(m_.weights_full + w.stage, w.parity);
      LaneUnit<Format> unit[2][2];
      typename Tiled::Place place = {min(4, args_.columns / 32 - 4 * chunk), part, g, lane % 4};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        place.row = g + 8 * (i % 2);
        unit[i / 2][i % 2].Load(m_.weights[w.stage][Slot(i / 2)], place, normaliser[i / 2][i % 2]);
      }
      if (part == Shape::kAtomChunks - 1 || chunk == chunks_ - 1) {
        __syncwarp();
        if (lane == 0) Arrive(m_.weights_empty + w.stage);
        w.Next();
      }
      WaitBarrier(m_.tokens_full + x.stage, x.parity);
      const uint64_t tokens = SwizzledOperand(m_.tokens[x.stage]);
      uint32_t a[2][1][2][4];
      Step<kColumns, 0>(unit, tokens, a);
      // The last chunk's products have ended, and only now: its last ones ran while this chunk's
      // weights were loaded.
      if (chunk > 0 && lane == 0) Arrive(m_.tokens_empty + last);
      last = x.stage;
      Step<kColumns, 1>(unit, tokens, a);
      Step<kColumns, 2>(unit, tokens, a);
      Step<kColumns, 3>(unit, tokens, a);
      Step<kColumns, 4>(unit, tokens, a);
      Step<kColumns, 5>(unit, tokens, a);
      Step<kColumns, 6>(unit, tokens, a);
      Step<kColumns, 7>(unit, tokens, a);
      x.Next();
    }
    WaitWarpgroup<0>();
  }

  template <int kColumns, int kStep>
  __device__ __forceinline__ void Step(const LaneUnit<Format> (&unit)[2][2], uint64_t tokens,
                                       uint32_t (&a)[2][1][2][4]) {
    MultiplyDecoded<kColumns, kTokens * 128, kStep>(unit, tokens, a, sum_);
  }

  // Sums go through shared memory, which the operands no longer need, so that what follows is one
  // small loop over tokens with coalesced stores.
  __device__ __forceinline__ void StoreResults() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    auto& staged =
        *(reinterpret_cast<typename Shape::Staged*>(&m_) + (threadIdx.x / 128 - 1));
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + 2 * t + i % 2, row = 16 * warp + g + i / 2 % 2 * 8;
      staged.sum[0][token][row] = sum_[0][i];
      staged.sum[1][token][row] = sum_[1][i];
    }
    __syncwarp();
    NamedBarrier<4, 128 * Shape::kGroups>();
    if (args_.activate) {
      for (int tile = Paired() ? 1 : 0; tile < 2; ++tile) StoreActivated(staged, tile);
    } else {
      for (int tile = 0; tile < 2; ++tile) StoreSums(staged, tile);
    }
  }

  // First row of the 64 of one of this warpgroup's tiles, and what its normaliser is in lane order.
  __device__ __forceinline__ int FirstRow(int tile) const {
    return BandOf((threadIdx.x / 128 - 1) * 8 + tile * 4) * 16;
  }
  __device__ __forceinline__ float2 Normalisers(int tile, int n) const {
    const int slot = (threadIdx.x / 128 - 1) * 8 + tile * 4 + n / 16;
    return {RowScale(slot, n % 16), RowScale(slot, n % 16 + 1)};
  }

  // A warp takes every fourth token, a lane two rows.
  __device__ __forceinline__ void StoreSums(const typename Shape::Staged& staged, int tile) const {
    switch (args_.y_type) {
      case Element::kF32:
        return StoreSumsAs<Element::kF32>(staged, tile);
      case Element::kF16:
        return StoreSumsAs<Element::kF16>(staged, tile);
      case Element::kBF16:
        return StoreSumsAs<Element::kBF16>(staged, tile);
    }
  }

  template <Element kType>
  __device__ __forceinline__ void StoreSumsAs(const typename Shape::Staged& staged,
                                              int tile) const {
    const int n = threadIdx.x % 32 * 2, row = FirstRow(tile) + n;
    if (row >= args_.rows) return;
    const float2 scale = Normalisers(tile, n);
#pragma unroll 8
    for (int token = threadIdx.x / 32 % 4; token < tile_.count; token += 4) {
      const float2 sum = *reinterpret_cast<const float2*>(&staged.sum[tile][token][n]);
      const float factor = m_.factor[token];
      StoreTwo(args_.y, m_.pair[token] * args_.y_pitch + row, kType, sum.x * scale.x * factor,
               sum.y * scale.y * factor);
    }
  }

  // Rows past the end are zeros: the next product reads whole chunks.
  __device__ __forceinline__ void StoreActivated(const typename Shape::Staged& staged,
                                                 int tile) const {
    const int lane = threadIdx.x % 32;
    const int n = lane % 2 * 32 + lane / 2 * 2;  // in the order of WidePlace
    const int row = FirstRow(tile) + n;
    if (row >= args_.y_pitch) return;
    const bool present = row < args_.rows;
    const float2 gate_scale = Normalisers(0, n), up_scale = Normalisers(tile, n);
    half* y = static_cast<half*>(args_.y) + row / 128 * 128 + WidePlace(row % 128);
    const int finish_row = present ? row : 0;
    const RowFinish first(args_, tile_.expert, finish_row), second(args_, tile_.expert, finish_row + 1);
    WithActivation(args_.activation, [&](auto activation) {
#pragma unroll 4
      for (int token = threadIdx.x / 32 % 4; token < tile_.count; token += 4) {
        const float factor = m_.factor[token], h_factor = m_.h_factor[token];
        const float2 gate = *reinterpret_cast<const float2*>(&staged.sum[0][token][n]);
        const float2 up = *reinterpret_cast<const float2*>(&staged.sum[tile][token][n]);
        half2 h;
        constexpr Activation kActivation = decltype(activation)::value;
        h.x = __float2half_rn(h_factor * first.Activate<kActivation>(args_, gate.x * gate_scale.x * factor,
                                                                     up.x * up_scale.x * factor));
        h.y = __float2half_rn(h_factor * second.Activate<kActivation>(args_, gate.y * gate_scale.y * factor,
                                                                      up.y * up_scale.y * factor));
        *reinterpret_cast<half2*>(y + m_.pair[token] * args_.y_pitch) = present ? h : half2{};
      }
    });
  }

  const TiledArgs& args_;
  Memory& m_;
  const TokenTile tile_;
  const int chunks_;
  float sum_[2][kTokens / 2] = {};
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename Format>
__global__ void __launch_bounds__(TiledWideShape<Format>::kThreads, 1)
    TiledWide(const __grid_constant__ TiledArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Block = TiledWideBlock<Format>;
  extern __shared__ uint8_t shared[];
  LetNextKernelStart();
  WaitForEarlierKernels();
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  const uint32_t address = SharedAddress(shared);
  auto& memory =
      *reinterpret_cast<typename Block::Memory*>(shared + ((1024 - address % 1024) % 1024));
  Block(args, memory, tile).Run();
#endif
}

}  // namespace jax_moe::cuda
