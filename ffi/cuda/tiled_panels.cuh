// Tiled weights times tiles of 32 to 128 tokens of an expert, on Hopper.
//
// A block has a tile of tokens and goes through one or more panels of weight rows, of 128 rows a
// consumer warpgroup (64 of gate and the same 64 of up, or 128 of one matrix). One warpgroup brings
// the operands: a warp by bulk copies of weight bands, three warps by gathering token rows by index
// in the tensor cores' 128-byte swizzle. The others decode weights in registers, which are the A
// operand of warpgroup products whose B operand are the tokens in shared memory, with as many
// columns as the tile has tokens, rounded up to 16. Every weight is decoded once a token tile.
// While one warpgroup decodes, the products of another, of this block or of the multiprocessor's
// other blocks, keep the tensor cores busy. The rings run on from one panel to the next, so that
// operands arrive while results are stored.
//
// Results go from registers to y a warp at a time, 16 rows of 16 tokens in a pass: a lane's sums of
// a row are of several tokens, and a transposition through 1 KB of shared memory, in which only the
// warp takes part, puts 8 rows of a token together. Which rows of a panel a warp has is chosen so
// that they are neighbours in y: with an activation, h has an order of its own.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ffi/cuda/cluster.cuh"
#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_chunk.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_unit.cuh"

namespace jax_moe::cuda {

template <typename Format, int kTokens>
struct TiledPanelsShape {
  static constexpr int kGroups = kTokens >= 96 ? 2 : 1;  // warpgroups that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kBlocks = kTokens >= 96 ? 1 : kTokens >= 64 ? 2 : 3;  // a multiprocessor
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kTokens >= 96 ? 232 : kTokens >= 64 ? 216 : 120;
  static constexpr int kTokenThreads = 96;  // that gather tokens: the producers' last three warps
  // Columns of a product: a multiple of kColumnStep, and no fewer than kFewestColumns.
  static constexpr int kColumnStep = 16;
  static constexpr int kFewestColumns = kTokens >= 128 ? 32 : 16;
  static constexpr int kBands = 8 * kGroups;  // of a panel
  static constexpr int kChunk = 128;          // columns
  // Steps whose products start together: fewer waits, where registers suffice.
  static constexpr int kSteps = kTokens == 64 && LaneUnit<Format>::kGroups == 1 ? 2 : 1;
  static constexpr int kAtomChunks = TiledUnit<Format>::kChunks;
  static constexpr int kAtomBytes =
      16 * kAtomChunks * kChunk / Format::kBlock * tiled::Sizes<Format>::kBytes;
  // An odd multiple of 32: lanes that read neighbouring rows of four bands do not meet in the
  // banks.
  static constexpr int kBandBytes = (kAtomBytes + 31) / 64 * 64 + 32;
  static constexpr int kWeightBytes = kBands * kBandBytes;  // a stage
  static constexpr int kTokenBytes = kTokens * 2 * kChunk;  // a chunk, at most
  static constexpr int kTurnedBytes = 1024;                 // a warp
  static constexpr int kMostShared = 233472 / kBlocks - 1024;
  static constexpr int kBudget = kMostShared - 4 * kGroups * kTurnedBytes - 12 * kTokens - 256;
  // Weights of 4 chunks ahead where tensor cores are the limit, more where memory is; then tokens.
  static constexpr int kMostWeightStages = kTokens >= 64 ? 4 / kAtomChunks : 4;
  static constexpr int kWeightStages =
      std::max(2, std::min(kMostWeightStages, (kBudget - 3 * kTokenBytes) / kWeightBytes));
  static constexpr int kTokenStages =
      std::max(2, std::min(4, (kBudget - kWeightStages * kWeightBytes) / kTokenBytes));
  // Chunks of tokens on their way; with one place more, none waits for a consumer that waits for
  // it.
  static constexpr int kLookahead = std::min(2, kTokenStages - 1);
  static constexpr int kPass = 16;  // tokens whose results are stored at a time

  struct Memory {
    alignas(1024) uint8_t tokens[kTokenStages][kTokenBytes];
    alignas(128) uint8_t weights[kWeightStages][kBands][kBandBytes];
    alignas(16) uint8_t turned[4 * kGroups][kTurnedBytes];
    int32_t pair[kTokens];
    alignas(8) float factor[kTokens], h_factor[kTokens];
    uint64_t weights_full[kWeightStages], weights_empty[kWeightStages];
    uint64_t tokens_full[kTokenStages], tokens_empty[kTokenStages];
  };
  static constexpr int kSharedBytes = sizeof(Memory);
  static_assert(kSharedBytes <= kMostShared);

  // Blocks of a cluster. What they give each other stands where operands were.
  static constexpr int kWarpSums = 32 * kTokens;
  static constexpr bool CanSplit(int splits) {
    const int warps = (4 * kGroups + splits - 1) / splits;  // whose sums a block gathers, at most
    return warps * (splits - 1) * kWarpSums * 4 <=
           kTokenStages * kTokenBytes + kWeightStages * kWeightBytes;
  }
  // With more sums a lane has no registers for others' too.
  static constexpr int kMostSplits = kTokens > 64 ? 1 : CanSplit(8) ? 8 : 4;
  // Three blocks, one of which gathers two warps, take more than four.
  static_assert(kMostSplits == 1 || (CanSplit(3) && CanSplit(kMostSplits)));
};

// Formats for which this kernel is the faster one of 128 tokens. With 128 sums a lane, the loop
// over panels leaves few registers for decoding; tiled_wide.cuh has none.
template <typename Format>
inline constexpr bool kPanelsForMost = std::is_same_v<Format, MXFP4>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Format, int kTokens>
class TiledPanelsBlock {
 public:
  using Shape = TiledPanelsShape<Format, kTokens>;
  using Memory = typename Shape::Memory;
  using Tiled = TiledUnit<Format>;

  __device__ __forceinline__ TiledPanelsBlock(const TiledArgs& args, Memory& memory,
                                              const TokenTile& tile)
      : args_(args),
        m_(memory),
        tile_(tile),
        first_chunk_(ClusterRank() * args.split_chunks),
        chunks_(min(args.split_chunks,
                    (args.columns + Shape::kChunk - 1) / Shape::kChunk - first_chunk_)),
        first_panel_(ClusterIndex() * args.panels),
        end_panel_(min(first_panel_ + args.panels, args.all_panels)) {}

  __device__ __forceinline__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kWeightStages; ++i) {
        InitBarrier(m_.weights_full + i, 1);
        InitBarrier(m_.weights_empty + i, 4 * Shape::kGroups);
      }
      for (int i = 0; i < Shape::kTokenStages; ++i) {
        InitBarrier(m_.tokens_full + i, Shape::kTokenThreads);
        InitBarrier(m_.tokens_empty + i, 4 * Shape::kGroups);
      }
      FenceBarrierInit();
    }
    const int token = static_cast<int>(threadIdx.x) - 128;
    if (token >= 0 && token < tile_.count) {
      m_.pair[token] = args_.lists.pairs[tile_.begin + token];
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      GiveRegisters<Shape::kProducerRegisters>();
      if (threadIdx.x < 32) {
        ProduceWeights();
      } else {
        ProduceTokens();
      }
    } else {
      TakeRegisters<Shape::kConsumerRegisters>();
      Consume();
    }
  }

 private:
  using TokenPosition = RingPosition<Shape::kTokenStages>;

  // Of the products, as many as the tile's tokens need.
  __device__ __forceinline__ int Columns() const {
    constexpr int kStep = Shape::kColumnStep;
    return max((tile_.count + kStep - 1) / kStep * kStep, Shape::kFewestColumns);
  }

  __device__ __forceinline__ bool Paired() const { return args_.activate && args_.gated; }
  static __device__ __forceinline__ int Group() { return threadIdx.x / 128 - 1; }
  static __device__ __forceinline__ int Warp() { return threadIdx.x / 32 % 4; }
  static __device__ __forceinline__ int Lane() { return threadIdx.x % 32; }

  // A warpgroup has 8 of a stage's bands, 4 for each of its two tiles of 64 rows. With an
  // activation, a tile has the 64 columns of half a chunk of h, which come from half of the rows of
  // each of the chunk's four units.
  __device__ __forceinline__ int HalfChunk(int panel, int group, int tile) const {
    const int first = panel * Shape::kGroups + group;
    return Paired() ? first : 2 * first + tile;
  }
  // Which matrix and which of its bands stands in place `slot` of a stage; bands past the end
  // repeat the last one.
  __device__ __forceinline__ int MatrixOf(int slot) const {
    return Paired() ? slot / 4 % 2 : args_.activate ? 1 : 0;
  }
  __device__ __forceinline__ int BandOf(int panel, int slot) const {
    int band = panel * Shape::kBands + slot / 8 * 8 + slot % 4 * 2 + slot / 4 % 2;
    if (args_.activate) {
      const int half = HalfChunk(panel, slot / 8, slot / 4 % 2);
      band = half / 2 * 8 + slot % 4 * 2 + half % 2;
    }
    return min(band, args_.rows / 16 - 1);
  }
  // Where a lane's rows of a tile are, r = 0 and 1 for its rows g and g + 8 of the operand. Of y, a
  // warp has 32 neighbours, of h two times 8.
  __device__ __forceinline__ int SlotOf(int tile) const {
    return Group() * 8 + tile * 4 + (args_.activate ? Lane() / 8 : Warp());
  }
  __device__ __forceinline__ int RowOf(int r) const {
    const int g = Lane() / 4;
    return (args_.activate ? 2 * Warp() + g % 2 : g) + 8 * r;
  }

  __device__ __forceinline__ void ProduceWeights() {
    const int lane = Lane();
    RingPosition<Shape::kWeightStages> w;
    for (int panel = first_panel_; panel < end_panel_; ++panel) {
      const uint8_t* band = nullptr;
      if (lane < Shape::kBands) {
        const TiledMatrix& matrix = args_.matrix[MatrixOf(lane)];
        band = matrix.data + tile_.expert * matrix.expert_bytes +
               BandOf(panel, lane) * 16 * args_.row_bytes +
               TiledRow<Format>::BandBytes(first_chunk_ * Shape::kChunk);
      }
      for (int chunk = first_chunk_; chunk < first_chunk_ + chunks_; chunk += Shape::kAtomChunks) {
        WaitBarrier(m_.weights_empty + w.stage, w.parity ^ 1);
        const int bytes = TiledRow<Format>::BandBytes(
            min(Shape::kAtomChunks * Shape::kChunk, args_.columns - chunk * Shape::kChunk));
        if (lane == 0) ArriveExpectBytes(m_.weights_full + w.stage, Shape::kBands * bytes);
        __syncwarp();
        if (lane < Shape::kBands) {
          BulkCopyOnce(m_.weights[w.stage][lane], band, bytes, m_.weights_full + w.stage);
        }
        band += bytes;
        w.Next();
      }
    }
  }

  __device__ __forceinline__ void ProduceTokens() {
    // A thread copies one of the eight 16-byte pieces of every half row of each 12th token.
    constexpr int kStep = Shape::kTokenThreads / 8, kMost = (kTokens + kStep - 1) / kStep;
    const int first = (threadIdx.x - 32) / 8, piece = threadIdx.x % 8;
    const auto* x = static_cast<const uint4*>(args_.x.values);
    const int count = tile_.count, half_bytes = Columns() * 128;
    uint32_t from[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int token = min(first + kStep * i, count - 1);
      const int row = m_.pair[token] / args_.pairs_a_row;
      from[i] = static_cast<uint32_t>(row) * static_cast<uint32_t>(args_.x.pitch / 8) + piece;
    }
    TokenPosition place, arrived;
    const int number = chunks_ * (end_panel_ - first_panel_);
    for (int chunk = 0, in_panel = 0; chunk < number + Shape::kLookahead; ++chunk) {
      // Told before any place is waited for: consumers leave a chunk's place when they have the
      // next chunk.
      if (chunk >= Shape::kLookahead) {
        WaitCopies<Shape::kLookahead - 1>();
        FenceAsyncProxy();
        Arrive(m_.tokens_full + arrived.stage);
        arrived.Next();
      }
      if (chunk < number) {
        WaitBarrier(m_.tokens_empty + place.stage, place.parity ^ 1);
        uint8_t* stage = m_.tokens[place.stage];
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          const int token = first + kStep * i;
          if (token >= count) break;
          uint8_t* to = stage + token * 128 + (piece ^ token % 8) * 16;
          const uint4* at = x + from[i] + (first_chunk_ + in_panel) * (Shape::kChunk / 8);
          CopyAsync16(to, at);
          CopyAsync16(to + half_bytes, at + 8);
        }
        if (++in_panel == chunks_) in_panel = 0;
        place.Next();
      }
      CommitCopies();
    }
  }

  // By a consumer a token.
  __device__ __forceinline__ void MakeFactors() {
    const int token = static_cast<int>(threadIdx.x) - 128;
    if (token >= tile_.count) return;
    const int pair = m_.pair[token];
    float factor = PairFactor(args_, pair);
    if (args_.activate) {
      m_.h_factor[token] = ScaleOfH(args_, tile_.expert, pair, blockIdx.x == 0);
    } else if (args_.y_scales != nullptr) {
      factor *= ScaleOfY(args_, tile_.expert, pair, blockIdx.x == 0);
    }
    m_.factor[token] = factor;
  }

  // Of the lane's rows.
  __device__ __forceinline__ void LoadNormalisers(int panel, float (&normaliser)[2][2]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int slot = SlotOf(tile);
      const TiledMatrix& matrix = args_.matrix[MatrixOf(slot)];
      const int64_t first = tile_.expert * matrix.expert_rows + BandOf(panel, slot) * 16;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        normaliser[tile][r] = matrix.aux[(first + RowOf(r)) * 2];
      }
    }
  }

  __device__ __forceinline__ void Consume() {
    float normaliser[2][2];
    LoadNormalisers(first_panel_, normaliser);
    MakeFactors();
    asm volatile("bar.sync 1, %0;" ::"n"(128 * Shape::kGroups) : "memory");
    RingPosition<Shape::kWeightStages> w;
    TokenPosition x;
    for (int panel = first_panel_; panel < end_panel_; ++panel) {
      float inverse[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        inverse[i / 2][i % 2] = InverseNormaliser(normaliser[i / 2][i % 2]);
      }
      MultiplyTile<Shape::kFewestColumns>(inverse, w, x);
      if constexpr (Shape::kMostSplits > 1) {
        if (ClusterSize() > 1 && !GatherSums()) return;
      }
      float scale[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scale[i / 2][i % 2] = InverseNormaliser(inverse[i / 2][i % 2]);
      }
      // On their way while results are stored.
      LoadNormalisers(min(panel + 1, end_panel_ - 1), normaliser);
      StoreResults(panel, scale);
    }
  }

  // A warp's sums to the block that stores its rows, and there together in the order of ranks; false
  // elsewhere. Blocks of clusters have one panel.
  __device__ __forceinline__ bool GatherSums() {
    const int splits = ClusterSize(), rank = ClusterRank();
    const int warp = Group() * 4 + Warp(), owner = warp % splits;
    float* sums = reinterpret_cast<float*>(&m_) +
                  warp / splits * (splits - 1) * Shape::kWarpSums + Lane();
    const auto of = [&](int other) {
      return sums + (other < owner ? other : other - 1) * Shape::kWarpSums;
    };
    // All have used their operands.
    ArriveInCluster();
    WaitInCluster();
    if (rank != owner) {
      float* to = of(rank);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) StoreToCluster(to + 32 * i, owner, sum_[i % 2][i / 2]);
    }
    ArriveInCluster();
    WaitInCluster();
    if (rank != owner) return false;
    float total[2][kTokens / 2] = {};
#pragma unroll 1
    for (int other = 0; other < splits; ++other) {
      const float* from = of(other);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        total[i % 2][i / 2] += other == rank ? sum_[i % 2][i / 2] : from[32 * i];
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) sum_[i % 2][i / 2] = total[i % 2][i / 2];
    return true;
  }

  // With as many columns of products as the tile's tokens need.
  template <int kColumns>
  __device__ __forceinline__ void MultiplyTile(const float (&inverse)[2][2],
                                               RingPosition<Shape::kWeightStages>& w,
                                               TokenPosition& x) {
    if constexpr (kColumns < kTokens) {
      constexpr int kNext = kColumns + Shape::kColumnStep;
      if (Columns() > kColumns) return MultiplyTile<kNext>(inverse, w, x);
    }
    Multiply<kColumns>(inverse, w, x);
  }

  template <int kColumns>
  __device__ __forceinline__ void Multiply(const float (&inverse)[2][2],
                                           RingPosition<Shape::kWeightStages>& w,
                                           TokenPosition& x) {
    const int lane = Lane();
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sum_[0][i] = sum_[1][i] = 0;
    int last = 0, units_left = args_.columns / 32 - 4 * first_chunk_;
    int row = RowOf(0), slot = SlotOf(0);
    // Else the compiler finds them again for every chunk. With 32 tokens, atoms of two chunks leave
    // no registers for that.
    if constexpr (kTokens > 32 || Shape::kAtomChunks == 1) {
      asm volatile("" : "+r"(row), "+r"(slot));
    }
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      const int part = chunk % Shape::kAtomChunks;
      if (part == 0) WaitBarrier(m_.weights_full + w.stage, w.parity);
      LaneUnit<Format> unit[2][2];
      // Rows of blocks of 256 weights have no partial chunks.
      const int units = Shape::kAtomChunks == 2 ? 4 : min(4, units_left);
      units_left -= 4;
      // A unit past the end is another one, for x and h have zeros there.
      typename Tiled::Place place = {units, part, 0, min(lane % 4, units - 1)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        place.row = row + 8 * (i % 2);
        unit[i / 2][i % 2].template Load<true>(m_.weights[w.stage][slot + 4 * (i / 2)], place,
                                               inverse[i / 2][i % 2]);
      }
      if (part == Shape::kAtomChunks - 1 || chunk == chunks_ - 1) {
        __syncwarp();
        if (lane == 0) Arrive(m_.weights_empty + w.stage);
        w.Next();
      }
      // The compiler cannot know that all lanes agree.
      const int stage = __shfl_sync(0xffffffffu, x.stage, 0);
      WaitBarrier(m_.tokens_full + stage, x.parity);
      const uint64_t tokens = SwizzledOperand(m_.tokens[stage]);
      uint32_t a[2][Shape::kSteps][2][4];
      Steps<kColumns, 0, Shape::kSteps>(unit, tokens, a);
      // The last chunk's products have ended, and only now: its last ones ran while this chunk's
      // weights were loaded.
      if (chunk > 0 && lane == 0) Arrive(m_.tokens_empty + last);
      last = x.stage;
      Steps<kColumns, Shape::kSteps, 8>(unit, tokens, a);
      x.Next();
    }
    WaitWarpgroup<0>();
    if (lane == 0) Arrive(m_.tokens_empty + last);
    // So that what the last panel left here is not kept in registers while this one is multiplied.
#pragma unroll
    for (int i = kColumns / 2; i < kTokens / 2; ++i) sum_[0][i] = sum_[1][i] = 0;
  }

  template <int kColumns, int kFirst, int kEnd>
  __device__ __forceinline__ void Steps(const LaneUnit<Format> (&unit)[2][2], uint64_t tokens,
                                        uint32_t (&a)[2][Shape::kSteps][2][4]) {
    if constexpr (kFirst < kEnd) {
      MultiplyDecoded<kColumns, kColumns * 128, kFirst>(unit, tokens, a, sum_);
      Steps<kColumns, kFirst + Shape::kSteps, kEnd>(unit, tokens, a);
    }
  }

  // What a lane holds of a pass's tokens: of each of its two tiles, element i is of its row r =
  // Row(i) and of token Token(i).
  static constexpr int kElements = Shape::kPass / 2;
  struct Pass {
    float sum[2][kElements];
    float factor[kElements / 2];  // of the tokens
    __device__ __forceinline__ float Sum(int tile, int i, const float (&scale)[2][2]) const {
      return sum[tile][i] * scale[tile][Row(i)] * factor[i / 4 * 2 + i % 2];
    }
  };
  static __device__ __forceinline__ constexpr int Row(int i) { return i / 2 % 2; }
  static __device__ __forceinline__ int Token(int i) { return i / 4 * 8 + Lane() % 4 * 2 + i % 2; }

  __device__ __forceinline__ void StoreResults(int panel, const float (&scale)[2][2]) {
    if (args_.activate) {
      WithActivation(args_.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        if (!Paired()) StoreActivated<kActivation, 0>(panel, scale);
        StoreActivated<kActivation, 1>(panel, scale);
      });
      return;
    }
    switch (args_.y_type) {
      case Element::kF32:
        return StoreSums<float, float2>(panel, scale);
      case Element::kF16:
        return StoreSums<half, half2>(panel, scale);
      case Element::kBF16:
        return StoreSums<__nv_bfloat16, __nv_bfloat162>(panel, scale);
    }
  }

  // Calls f(first token, pass) for all passes, in a loop: unrolled for every activation and number
  // of tokens it would be too much code.
  template <typename F>
  __device__ __forceinline__ void ForPasses(F f) const {
#pragma unroll 1
    for (int begin = 0; begin < tile_.count; begin += Shape::kPass) {
      Pass pass;
      TakeSums(begin, pass);
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
        const float2 two = *reinterpret_cast<const float2*>(m_.factor + begin + Token(i));
        pass.factor[i / 2] = two.x;
        pass.factor[i / 2 + 1] = two.y;
      }
      f(begin, pass);
    }
  }

  // From registers that have to be known to the compiler: of passes kFirst .. kEnd - 1.
  template <int kFirst = 0, int kEnd = kTokens / Shape::kPass>
  __device__ __forceinline__ void TakeSums(int begin, Pass& pass) const {
    if constexpr (kEnd - kFirst > 1) {
      constexpr int kMiddle = (kFirst + kEnd) / 2;
      if (begin < kMiddle * Shape::kPass) {
        TakeSums<kFirst, kMiddle>(begin, pass);
      } else {
        TakeSums<kMiddle, kEnd>(begin, pass);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        pass.sum[0][i] = sum_[0][kFirst * kElements + i];
        pass.sum[1][i] = sum_[1][kFirst * kElements + i];
      }
    }
  }

  // 16 rows of each of kPlanes planes, for 16 tokens: words[plane] are, for 8 tokens each, of the
  // first and the last 8 rows, two tokens of a row a word. A warp transposes them, so that a lane
  // stores 16 bytes of a token: piece i of 8 rows at y + row + kStride i.
  template <int kPlanes, int kStride, typename Y>
  __device__ __forceinline__ void StoreTransposed(int begin, const uint32_t (&words)[kPlanes][4],
                                                  int row, bool wanted) const {
    constexpr int kPieces = 2 * kPlanes;  // of 16 bytes, a token
    uint8_t* turned = m_.turned[threadIdx.x / 32 - 4];
    // Exchanged so that they do not meet in the banks.
    const auto place = [&](int token, int piece) {
      return turned + token * 16 * kPieces + (piece ^ token / (8 / kPieces) % kPieces) * 16;
    };
    const int lane = Lane();
    __syncwarp();
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      StoreMatrices(place(lane / 16 * 8 + lane % 8, 2 * plane + lane / 8 % 2), words[plane]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      const int token = i * (16 / kPlanes) + lane / kPieces, piece = lane % kPieces;
      if (!wanted || begin + token >= tile_.count) continue;
      const uint4 values = *reinterpret_cast<const uint4*>(place(token, piece));
      auto* to = static_cast<Y*>(args_.y) + RowBegin(m_.pair[begin + token]) + row;
      reinterpret_cast<uint4*>(to)[piece * (kStride / 8)] = values;
    }
  }

  // Where a pair's row of y begins; sizes fit 31 bits (RequireLimits of check.h).
  __device__ __forceinline__ int64_t RowBegin(int pair) const {
    return static_cast<int64_t>(pair) * static_cast<int>(args_.y_pitch);
  }

  template <typename Y, typename Y2>
  __device__ __forceinline__ void StoreSums(int panel, const float (&scale)[2][2]) const {
    // The warp has 16 rows of each tile, 32 together.
    const int row = panel * Shape::kBands * 16 + (Group() * 4 + Warp()) * 32;
    if (row >= args_.rows) return;
    ForPasses([&](int begin, const Pass& pass) {
      if constexpr (sizeof(Y) == 2) {
        uint32_t words[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int i = 0; i < kElements; i += 2) {
            words[tile][i / 2] =
                PackTwo<Y2>(pass.Sum(tile, i, scale), pass.Sum(tile, i + 1, scale));
          }
        }
        StoreTransposed<2, 8, Y>(begin, words, row, row + Lane() % 4 / 2 * 16 < args_.rows);
      } else {
        // Eight lanes have consecutive rows.
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int token = begin + Token(i);
          if (token >= tile_.count) continue;
          Y* to = static_cast<Y*>(args_.y) + RowBegin(m_.pair[token]) + row + RowOf(Row(i));
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            if (row + 16 * tile < args_.rows) to[16 * tile] = pass.Sum(tile, i, scale);
          }
        }
      }
    });
  }

  // Of gate and up, or of tile kTile of up alone. Columns of h past the end are zeros: the next
  // product reads whole chunks.
  template <Activation kActivation, int kTile>
  __device__ __forceinline__ void StoreActivated(int panel, const float (&scale)[2][2]) const {
    const int half_chunk = HalfChunk(panel, Group(), kTile);
    const int place = half_chunk * 64 + Warp() * 8;  // in h
    if (place >= args_.y_pitch) return;
    // The lane's rows are this one and the one 8 further on.
    const int first = half_chunk / 2 * 128 + Lane() / 8 * 32 + half_chunk % 2 * 16 + RowOf(0);
    const bool present = first < args_.rows;
    const int known = present ? first : 0;
    const RowFinish finish[2] = {{args_, tile_.expert, known}, {args_, tile_.expert, known + 8}};
    ForPasses([&](int begin, const Pass& pass) {
      uint32_t words[1][4];
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        const float2 h_factor = *reinterpret_cast<const float2*>(m_.h_factor + begin + Token(i));
        float h[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          h[j] = (j == 0 ? h_factor.x : h_factor.y) *
                 finish[Row(i)].template Activate<kActivation>(args_, pass.Sum(0, i + j, scale),
                                                               pass.Sum(kTile, i + j, scale));
        }
        words[0][i / 2] = present ? PackTwo<half2>(h[0], h[1]) : 0;
      }
      StoreTransposed<1, 32, half>(begin, words, place, true);
    });
  }

  const TiledArgs& args_;
  Memory& m_;
  const TokenTile tile_;
  const int first_chunk_, chunks_;  // this block's part of the columns
  const int first_panel_, end_panel_;
  float sum_[2][kTokens / 2];
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename Format, int kTokens>
__global__ void __launch_bounds__(TiledPanelsShape<Format, kTokens>::kThreads,
                                  TiledPanelsShape<Format, kTokens>::kBlocks)
    TiledPanels(const __grid_constant__ TiledArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Block = TiledPanelsBlock<Format, kTokens>;
  extern __shared__ __align__(1024) uint8_t panels_shared[];
  LetNextKernelStart();
  WaitForEarlierKernels();
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  Block(args, *reinterpret_cast<typename Block::Memory*>(panels_shared), tile).Run();
#endif
}

}  // namespace jax_moe::cuda
