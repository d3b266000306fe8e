// Dense 16-bit weights times many tokens of an expert, on Hopper: both operands in shared memory.
//
// The grid is persistent: an item is a tile of tokens and 256 weight rows (128 of gate and the same
// 128 of up). One warpgroup brings the operands in chunks of 64 columns, through a ring that runs
// on across items: one thread's tensor copies of four times 64 weight rows, and token rows gathered
// by index, both in the 128-byte swizzle. Two warpgroups multiply, each 2 x 64 rows by as many
// columns as the tile has tokens, rounded up to 8. While they store an item's results, the next
// item's operands arrive.
//
// Where experts have several tiles, two blocks form a cluster and have the same weight rows of two
// tiles: each copies half of the weights to both. A place of the ring is free once the consumers of
// both blocks have left it, so that the two go through their items at one pace.
//
// Results go from registers to y a warp at a time, 16 rows of 16 tokens in a pass: a lane's sums of
// a row are of several tokens, and a transposition through 1 KB of shared memory, in which only the
// warp takes part, makes whole sectors of a token's row of them.
//
// float32 activations of bf16 weights are two bf16 parts, whose products have the same weights: one
// bf16 is too coarse for h, whose rounding would add to that of y, and f16 has not the range of
// bf16 weights.
#pragma once

#include "ffi/cuda/cluster.cuh"
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
  int32_t stores_eight;  // y has 16-bit elements, eight of which can be stored at once everywhere
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
    alignas(8) float factor[kTokens];
  };
  struct Memory {
    alignas(1024) uint8_t stage[kStages][kStageBytes];
    // On their way from a warp's registers to rows of y: 16 tokens with two times 16 values.
    alignas(16) uint8_t turned[4 * kGroups][kPass * 64];
    // Of a warpgroup's two tiles, for two tokens each, from its four warps.
    alignas(16) uint32_t maxima[kGroups][2][kTokens / 2][4];
    alignas(16) float inverses[kGroups][2][kTokens];  // of their scales
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
        cluster_(ClusterSize()),
        rank_(ClusterRank()),
        tiles_(min(static_cast<int64_t>(*params.args.lists.num_tiles),
                   params.args.lists.max_tiles)),
        steps_((tiles_ + cluster_ - 1) / cluster_),
        items_(steps_ * params.bands),
        chunks_(static_cast<int>((params.args.k + Shape::kChunk - 1) / Shape::kChunk)) {}

  __device__ __forceinline__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        InitBarrier(m_.full + i, 128 + 1);  // every producer, and the thread that copies weights
        InitBarrier(m_.empty + i, 4 * Shape::kGroups * cluster_);
      }
      FenceBarrierInit();
    }
    ArriveInCluster();
    WaitInCluster();
    if (threadIdx.x < 128) {
      GiveRegisters<Shape::kProducerRegisters>();
      Produce();
    } else {
      TakeRegisters<Shape::kConsumerRegisters>();
      Consume();
    }
    // The other block may still write here.
    __syncwarp();
    ArriveInCluster();
    WaitInCluster();
  }

 private:
  using Position = RingPosition<Shape::kStages>;
  // A tile of tokens and the weight rows of a band, which the blocks of a cluster may share.
  struct Item {
    TokenTile tile;
    int band;
    bool shared;
  };

  // Items that run at the same time share tokens and weights: a few tiles, which often are of one
  // expert, go through the bands together. The blocks of a cluster have a band of neighbouring
  // tiles; past the last one there is an empty tile.
  __device__ __forceinline__ Item FindItem(int64_t index) const {
    const int64_t group = Shape::kGroupTiles / cluster_;
    const int64_t first = index / (group * params_.bands) * group;
    const int rest = static_cast<int>(index - first * params_.bands);
    const int steps = static_cast<int>(min(steps_ - first, group));
    const int64_t tile = (first + rest % steps) * cluster_, last = tiles_ - 1;
    const TokenTile* tiles = args_.lists.tiles;
    Item item = {tiles[min(tile + rank_, last)], rest / steps, false};
    if (tile + rank_ > last) item.tile.count = 0;
    if (cluster_ > 1) item.shared = tiles[tile].expert == tiles[min(tile + 1, last)].expert;
    return item;
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
    const int64_t stride = gridDim.x / cluster_;
    int64_t index = blockIdx.x / cluster_;
    if (index >= items_) return;
    Item next = FindItem(index);
    for (; index < items_; index += stride) {
      const Item item = next;
      const TokenTile& tile = item.tile;
      if (index + stride < items_) next = FindItem(index + stride);
      if (waiting == Shape::kLookahead) Tell(arrived, waiting);
      // Once the first chunk has a place, the consumers are done with what `info` held before.
      WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
      WriteInfo(m_.info[info], tile, item.band);
      ProducersMeet();
      const T* from[Shape::kTokens / 16];
#pragma unroll
      for (int i = 0; i < Shape::kTokens / 16; ++i) {
        const int token = max(min(first + 16 * i, tile.count - 1), 0);
        const int64_t row = m_.info[info].pair[token] / args_.pairs_a_row;
        from[i] = static_cast<const T*>(args_.x.values) + row * args_.x.pitch * kParts + piece * 8;
      }
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        // Told before any place is waited for: consumers leave a chunk's place when they have the
        // next chunk.
        if (waiting == Shape::kLookahead) Tell(arrived, waiting);
        WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
        uint8_t* stage = m_.stage[place.stage];
        if (threadIdx.x == 0) CopyWeights(stage, m_.full + place.stage, item, chunk);
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

  // Of weights that the cluster shares, a block brings two of four slots, to both blocks.
  __device__ __forceinline__ void CopyWeights(uint8_t* stage, uint64_t* full, const Item& item,
                                              int chunk) const {
    ArriveExpectBytes(full, Shape::kSlots * Shape::kSlotBytes);
#pragma unroll
    for (int slot = 0; slot < Shape::kSlots; ++slot) {
      if (item.shared && slot / 2 != rank_) continue;
      TensorCopy(stage + slot * Shape::kSlotBytes, params_.map + (params_.paired ? slot % 2 : 0),
                 chunk * Shape::kChunk, FirstRow(item.band, slot), item.tile.expert, full,
                 item.shared ? 3 : 1 << rank_);
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
    const int64_t stride = gridDim.x / cluster_;
    for (int64_t index = blockIdx.x / cluster_; index < items_; index += stride) {
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
      if (chunk > 0) Leave(last);
      last = place.stage;
      place.Next();
    }
    WaitWarpgroup<0>();
    Leave(last);
  }

  // A warp needs a place no longer: any block of the cluster may write there.
  __device__ __forceinline__ void Leave(int place) const {
    if (Lane() < cluster_) ArriveInBlock(m_.empty + place, Lane());
  }

  static __device__ __forceinline__ int Lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int Warp() { return threadIdx.x / 32 % 4; }

  __device__ __forceinline__ void StoreResults(const Info& info) {
    if (args_.activate) {
      WithActivation(args_.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        if (!params_.paired) StoreActivated<kActivation, 0>(info);
        StoreActivated<kActivation, 1>(info);
      });
    } else if (args_.y_scales != nullptr) {
      StoreScaled(info);
    } else {
      StoreSums(info);
    }
  }

  // What a lane holds of a pass's tokens: of each of its two tiles, element i is of row Row(i) of
  // the tile and of token Token(i).
  static constexpr int kElements = Shape::kPass / 2;
  struct Pass {
    float sum[2][kElements];
    float factor[kElements / 2];  // of the tokens
    __device__ __forceinline__ float Sum(int tile, int i) const {
      return sum[tile][i] * factor[i / 4 * 2 + i % 2];
    }
  };
  static __device__ __forceinline__ int Row(int i) {
    return 16 * Warp() + Lane() / 4 + i / 2 % 2 * 8;
  }
  static __device__ __forceinline__ int Token(int i) {
    return i / 4 * 8 + Lane() % 4 * 2 + i % 2;
  }

  // Calls f(first token, pass) for all passes, in a loop: unrolled for every activation and number
  // of tokens it would be too much code.
  template <typename F>
  __device__ __forceinline__ void ForPasses(const Info& info, F f) const {
#pragma unroll 1
    for (int begin = 0; begin < info.count; begin += Shape::kPass) {
      Pass pass;
      TakeSums(begin, pass);
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
        const float2 two = *reinterpret_cast<const float2*>(info.factor + begin + Token(i));
        pass.factor[i / 2] = two.x;
        pass.factor[i / 2 + 1] = two.y;
      }
      f(begin, pass);
    }
  }

  // From registers that have to be known to the compiler: of passes kFirst .. kEnd - 1.
  template <int kFirst = 0, int kEnd = Shape::kTokens / Shape::kPass>
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

  // Words [2 p] and [2 p + 1] are of the two halves of 16 rows in plane p, for 8 tokens each: two
  // tokens of a row a word. A warp transposes them, so that a lane stores 16 bytes of a token and
  // two lanes a sector; to(pair, plane) is where the token's 16 rows begin, stores(plane) tells
  // whether the lane's half is wanted.
  using Words = uint32_t[kElements / 4][4];
  template <typename Stores, typename To>
  __device__ __forceinline__ void StoreTransposed(const Info& info, int begin, const Words& words,
                                                  Stores stores, To to) const {
    uint8_t* turned = m_.turned[threadIdx.x / 32 - 4];
    // Pieces of 16 bytes, four a token, exchanged so that they do not meet in the banks.
    const auto place = [&](int token, int piece) {
      return turned + token * 64 + (piece ^ token / 2 % 4) * 16;
    };
    const int piece = Lane() % 4;
    const bool wanted = stores(piece / 2);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      StoreMatrices(place(8 * i + Lane() % 8, Lane() / 8), words[i]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * i + Lane() / 4;
      const uint4 values = *reinterpret_cast<const uint4*>(place(token, piece));
      auto* row = reinterpret_cast<uint4*>(to(info.pair[begin + token], piece / 2));
      if (wanted && begin + token < info.count) row[piece % 2] = values;
    }
  }

  // Four 8 x 8 matrices of 16-bit values, of which a lane gives two of a column each, to rows of 16
  // bytes, the addresses of which eight lanes give for each.
  static __device__ __forceinline__ void StoreMatrices(void* row, const uint32_t (&words)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
            SharedAddress(row)),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
  }

  // Where a pair's row of y begins; sizes fit 31 bits (RequireLimits of check.h).
  __device__ __forceinline__ int64_t RowBegin(int pair) const {
    return static_cast<int64_t>(pair) * static_cast<int>(args_.y_pitch);
  }

  // The first of a tile's 64 rows.
  __device__ __forceinline__ int TileRow(const Info& info, int tile) const {
    return FirstRow(info.band, 2 * Group() + tile);
  }

  __device__ __forceinline__ void StoreSums(const Info& info) const {
    switch (args_.y_type) {
      case Element::kF32:
        return StoreSumsAs<float, float2>(info);
      case Element::kF16:
        return StoreSumsAs<half, half2>(info);
      case Element::kBF16:
        return StoreSumsAs<__nv_bfloat16, __nv_bfloat162>(info);
    }
  }

  template <typename Y, typename Y2>
  __device__ __forceinline__ void StoreSumsAs(const Info& info) const {
    const int rows[2] = {TileRow(info, 0), TileRow(info, 1)};
    ForPasses(info, [&](int begin, const Pass& pass) {
      if constexpr (sizeof(Y) == 2) {
        if (params_.stores_eight) {
          Words words;
#pragma unroll
          for (int i = 0; i < kElements; i += 2) {
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
              words[i / 4][2 * tile + i / 2 % 2] =
                  PackTwo<Y2>(pass.Sum(tile, i), pass.Sum(tile, i + 1));
            }
          }
          return StoreEights<Y>(info, begin, words, rows);
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          StoreOne<Y>(info, begin, i, rows[tile], pass.Sum(tile, i));
        }
      }
    });
  }

  // The warp's 16 rows of each of two tiles, to y.
  template <typename Y>
  __device__ __forceinline__ void StoreEights(const Info& info, int begin, const Words& words,
                                              const int (&rows)[2]) const {
    const auto row = [&](int tile) { return (tile == 0 ? rows[0] : rows[1]) + 16 * Warp(); };
    StoreTransposed(
        info, begin, words,
        [&](int tile) { return row(tile) + Lane() % 2 * 8 < args_.rows; },
        [&](int pair, int tile) {
          return static_cast<Y*>(args_.y) + RowBegin(pair) + row(tile);
        });
  }

  // Element i of a tile that begins at `row`. Eight lanes have consecutive rows.
  template <typename Y>
  __device__ __forceinline__ void StoreOne(const Info& info, int begin, int i, int row,
                                           float value) const {
    const int token = begin + Token(i);
    row += Row(i);
    if (token >= info.count || row >= args_.rows) return;
    static_cast<Y*>(args_.y)[RowBegin(info.pair[token]) + row] = static_cast<Y>(value);
  }

  // f16 times a power of two that brings the largest magnitude of 64 columns to 2^14 .. 2^15.
  __device__ __forceinline__ void StoreScaled(const Info& info) const {
    FindMaxima<0>(info);
    FindMaxima<1>(info);
    GroupMeets();
    StoreScales(info);
    GroupMeets();
    const int rows[2] = {TileRow(info, 0), TileRow(info, 1)};
    ForPasses(info, [&](int begin, const Pass& pass) {
      Words words;
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const float2 inverse =
              *reinterpret_cast<const float2*>(m_.inverses[Group()][tile] + begin + Token(i));
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int at = i + 2 * r;
            words[i / 4][2 * tile + r] = PackTwo<half2>(pass.Sum(tile, at) * inverse.x,
                                                           pass.Sum(tile, at + 1) * inverse.y);
          }
        }
      }
      StoreEights<half>(info, begin, words, rows);
    });
  }

  // From the maxima: a thread has a token.
  __device__ __forceinline__ void StoreScales(const Info& info) const {
    const int64_t groups = (args_.rows + 63) / 64;
    for (int token = threadIdx.x % 128; token < info.count; token += 128) {
      float* scales = args_.y_scales + info.pair[token] * groups;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 of = *reinterpret_cast<const uint4*>(m_.maxima[Group()][tile][token / 2]);
        const uint32_t both = __vmaxu2(__vmaxu2(of.x, of.y), __vmaxu2(of.z, of.w));
        const int max = token % 2 == 0 ? both & 0xffff : both >> 16;
        // With the exponents' bias of 127.
        const int scale = max == 0 ? 127 : ::max((max >> 7) - 14, 1);
        m_.inverses[Group()][tile][token] = __int_as_float((254 - scale) << 23);
        const int row = TileRow(info, tile);
        if (row < args_.rows) scales[row / 64] = __int_as_float(scale << 23);
      }
    }
  }

  // The largest magnitudes over the warp's 16 rows, the high halves of two tokens' float32
  // together. Finite or infinite: they leave NaN out. Several at a time, as exchanges take long.
  template <int kTile>
  __device__ __forceinline__ void FindMaxima(const Info& info) const {
    constexpr int kEights = Shape::kTokens / 8, kBatch = 6;
    static_assert(kEights % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kEights; first += kBatch) {
      if (8 * first >= info.count) break;
      uint32_t max[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float* sum = sum_[kTile] + 4 * (first + i);
        const float2 factor =
            *reinterpret_cast<const float2*>(info.factor + 8 * (first + i) + Token(0));
        const float one = fmaxf(fabsf(sum[0] * factor.x), fabsf(sum[2] * factor.x));
        const float two = fmaxf(fabsf(sum[1] * factor.y), fabsf(sum[3] * factor.y));
        max[i] = __byte_perm(__float_as_uint(fmaxf(one, 0.0f)), __float_as_uint(fmaxf(two, 0.0f)),
                             0x7632);
      }
#pragma unroll
      for (int d = 4; d < 32; d *= 2) {
        uint32_t other[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) other[i] = __shfl_xor_sync(0xffffffffu, max[i], d);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) max[i] = __vmaxu2(max[i], other[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (Lane() < 4) {
          m_.maxima[Group()][kTile][4 * (first + i) + Lane()][Warp()] = max[i];
        }
      }
    }
  }

  // Of a pair of gate and up, or of tile kTile of up alone. Columns of h past the end are zeros:
  // the next product reads whole chunks.
  template <Activation kActivation, int kTile>
  __device__ __forceinline__ void StoreActivated(const Info& info) const {
    const int begin_row = TileRow(info, kTile);
    if (begin_row >= (args_.h_pair ? args_.y_pitch : args_.rows)) return;
    const int rows = static_cast<int>(args_.rows);
    const RowFinish finish[2] = {{args_, info.expert, min(begin_row + Row(0), rows - 1)},
                                 {args_, info.expert, min(begin_row + Row(2), rows - 1)}};
    ForPasses(info, [&](int begin, const Pass& pass) {
      float h[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        h[i] = finish[i / 2 % 2].template Activate<kActivation>(args_, pass.Sum(0, i),
                                                                pass.Sum(kTile, i));
        if (begin_row + Row(i) >= rows) h[i] = 0;
      }
      if (args_.h_pair) return StorePair(info, begin, begin_row, h);
#pragma unroll
      for (int i = 0; i < kElements; ++i) StoreOne<float>(info, begin, i, begin_row, h[i]);
    });
  }

  __device__ __forceinline__ void StorePair(const Info& info, int begin, int begin_row,
                                            const float (&h)[kElements]) const {
    Words words;
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      const uint32_t high = PackTwo<__nv_bfloat162>(h[i], h[i + 1]);
      const float2 rounded = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&high));
      words[i / 4][i / 2 % 2] = high;
      words[i / 4][2 + i / 2 % 2] =
          PackTwo<__nv_bfloat162>(h[i] - rounded.x, h[i + 1] - rounded.y);
    }
    StoreTransposed(
        info, begin, words, [](int) { return true; },
        [&](int pair, int part) {
          return static_cast<__nv_bfloat16*>(args_.y) + 2 * RowBegin(pair) +
                 part * args_.y_pitch + begin_row + 16 * Warp();
        });
  }

  template <typename Y2>
  static __device__ __forceinline__ uint32_t PackTwo(float first, float second) {
    Y2 two;
    if constexpr (std::is_same_v<Y2, half2>) {
      two = __floats2half2_rn(first, second);
    } else {
      two = __floats2bfloat162_rn(first, second);
    }
    return *reinterpret_cast<const uint32_t*>(&two);
  }

  const DenseWideParams& params_;
  const DenseWideArgs& args_;
  Memory& m_;
  const int cluster_, rank_;
  const int64_t tiles_, steps_, items_;
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
