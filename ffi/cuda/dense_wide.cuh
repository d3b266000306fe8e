// Dense 16-bit weights times many tokens of an expert, on Hopper: both operands in shared memory.
//
// The grid is persistent: an item is a tile of tokens and 256 weight rows (128 of gate and the same
// 128 of up). One warpgroup brings the operands in chunks of 64 columns, through a ring that runs
// on across items: one thread's tensor copies of four times 64 weight rows, and token rows that two
// warps gather by index, both in the 128-byte swizzle. Gatherers wait for free places only; when
// their copies are done, a thread of its own makes them visible to the tensor cores. Two warpgroups
// multiply, each 2 x 64 rows by as many columns as the tile has tokens, rounded up to 8. While they
// store an item's results, the next item's operands arrive. Copies of weights need the lists alone:
// where these are older than the kernel before this one, they do not wait for its end.
//
// Where experts have several tiles, two blocks form a cluster and have the same weight rows of two
// tiles: each copies half of the weights to both. A place of the ring is free once the consumers of
// both blocks have left it, so that the two go through their items at one pace.
//
// Results go from registers to y a warpgroup and 16 tokens at a time: a lane's sums of a row are of
// several tokens, and a transposition through 4 KB of shared memory makes 64 or 128 consecutive
// values of a token's row of them.
//
// float32 activations of bf16 weights are two bf16 parts, whose products have the same weights: one
// bf16 is too coarse for them, and f16 has not the range of bf16 weights. With bf16 weights of down h
// is one part where y is bf16, and two elsewhere.
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
  int32_t once;          // nearly all weights are read by one block
  int32_t plain;         // with activate: gate and up come without factors and biases
  int32_t stores_eight;  // y has 16-bit elements, eight of which can be stored at once everywhere
};

template <int kParts>
struct DenseWideShape {
  static constexpr int kTokens = kDenseWideTokens;
  static constexpr int kGroups = 2;  // warpgroups that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static constexpr int kChunk = 64;               // columns: 128 bytes, a row of the swizzle
  static constexpr int kSlots = 2 * kGroups;      // of 64 weight rows
  static constexpr int kSlotBytes = 64 * 2 * kChunk;
  static constexpr int kPartBytes = kTokens * 2 * kChunk;
  static constexpr int kTokensAt = kSlots * kSlotBytes;
  static constexpr int kStageBytes = kTokensAt + kParts * kPartBytes;
  static constexpr int kStages = kParts == 1 ? 4 : 3;
  // Consumers may be behind by as many items as there are stages, and store one more's results.
  static constexpr int kInfos = kStages + 1;
  static constexpr int kPass = 16;  // tokens whose results are stored at a time
  static constexpr int kBuffers = kParts == 1 ? 2 : 1;  // of these
  // That go through the bands together: tiles, or pairs of them where blocks have pairs.
  static constexpr int kGroupTiles = 2, kGroupPairs = 4;

  struct Info {
    int32_t expert, count, band;
    int32_t pair[kTokens];
    alignas(8) float factor[kTokens];
  };
  struct Memory {
    alignas(1024) uint8_t stage[kStages][kStageBytes];
    // On their way from a warpgroup's registers to rows of y: a pass's tokens with 128 values.
    alignas(16) uint8_t staged[kGroups][kBuffers][kPass * 256];
    // Of a warpgroup's rows, for two tokens each, from its four warps.
    alignas(16) uint32_t maxima[kGroups][kTokens / 2][4];
    alignas(16) float factors[kGroups][kTokens];  // of tokens, with the inverses of their scales
    Info info[kInfos];
    int32_t row[kTokens];  // of x, of an item's tokens
    uint64_t full[kStages], empty[kStages];
    uint64_t copied[kStages];  // the tokens are there
  };
  static constexpr int kSharedBytes = sizeof(Memory) + 1024;  // for its alignment
  static_assert(kSharedBytes <= 232448);
  static_assert(kTokens % kPass == 0);
  static_assert(kSlotBytes % 1024 == 0 && kPartBytes % 1024 == 0);
  static_assert(kSlots * 64 == kDenseWideRows);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// kCluster: blocks of a cluster, 1 or 2.
template <typename T, int kParts, int kCluster>
class DenseWideBlock {
 public:
  using Shape = DenseWideShape<kParts>;
  using Memory = typename Shape::Memory;
  using Info = typename Shape::Info;

  __device__ __forceinline__ DenseWideBlock(const DenseWideParams& params, Memory& memory)
      : params_(params),
        args_(params.args),
        m_(memory),
        rank_(ClusterRank()),
        tiles_(min(*params.args.lists.num_tiles,
                   static_cast<int>(params.args.lists.max_tiles))),
        steps_((tiles_ + kCluster - 1) / kCluster),
        items_(steps_ * params.bands),
        chunks_(static_cast<int>((params.args.k + Shape::kChunk - 1) / Shape::kChunk)) {}

  __device__ __forceinline__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        InitBarrier(m_.full + i, 2);  // for the weights and for the tokens
        InitBarrier(m_.empty + i, 4 * Shape::kGroups * kCluster);
        InitBarrier(m_.copied + i, kGatherers + 1);
      }
      FenceBarrierInit();
    }
    ArriveInCluster();
    WaitInCluster();
    if (threadIdx.x < 128) {
      GiveRegisters<Shape::kProducerRegisters>();
      if (threadIdx.x > 0) WaitForEarlierKernels();  // as far as has not been done
      if (threadIdx.x >= 64) {
        GatherTokens(threadIdx.x - 64);
      } else if (threadIdx.x == 32) {
        PassTokensOn();
      } else if (threadIdx.x == 0) {
        CopyWeights();
      }
    } else {
      TakeRegisters<Shape::kConsumerRegisters>();
      WaitForEarlierKernels();
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
  __device__ __forceinline__ Item FindItem(int index) const {
    const int group = kCluster == 1 ? Shape::kGroupTiles : Shape::kGroupPairs;
    const int first = index / (group * params_.bands) * group;
    const int rest = index - first * params_.bands;
    const int steps = min(steps_ - first, group);
    const int tile = (first + rest % steps) * kCluster, last = tiles_ - 1;
    const TokenTile* tiles = args_.lists.tiles;
    Item item = {tiles[min(tile + rank_, last)], rest / steps, false};
    if (tile + rank_ > last) item.tile.count = 0;
    if (kCluster > 1) item.shared = tiles[tile].expert == tiles[min(tile + 1, last)].expert;
    return item;
  }

  // The threads of this consumer's warpgroup meet.
  __device__ __forceinline__ void GroupMeets() const {
    asm volatile("bar.sync %0, 128;" ::"r"(Group() + 1) : "memory");
  }
  static __device__ __forceinline__ int Group() { return threadIdx.x / 128 - 1; }

  // Items of this cluster: every `Stride()`th, from Begin() on.
  __device__ __forceinline__ int Begin() const { return blockIdx.x / kCluster; }
  __device__ __forceinline__ int Stride() const { return gridDim.x / kCluster; }

  // By one thread, for which it is enough that the lists are there. Of weights that the cluster
  // shares, a block brings two of four slots, to both blocks.
  __device__ __forceinline__ void CopyWeights() {
    Position place;
    int index = Begin();
    if (index >= items_) return;
    Item next = FindItem(index);
    for (; index < items_; index += Stride()) {
      const Item item = next;
      if (index + Stride() < items_) next = FindItem(index + Stride());
      for (int chunk = 0; chunk < chunks_; ++chunk, place.Next()) {
        uint64_t* full = m_.full + place.stage;
        WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
        ArriveExpectBytes(full, Shape::kSlots * Shape::kSlotBytes);
#pragma unroll
        for (int slot = 0; slot < Shape::kSlots; ++slot) {
          uint8_t* to = m_.stage[place.stage] + slot * Shape::kSlotBytes;
          const CUtensorMap* map = params_.map + (params_.paired ? slot % 2 : 0);
          const int column = chunk * Shape::kChunk, row = FirstRow(item.band, slot);
          if (item.shared) {
            if (slot / 2 != rank_) continue;
            TensorCopyToBlocks(to, map, column, row, item.tile.expert, full, 3);
          } else if (params_.once) {
            TensorCopyOnce(to, map, column, row, item.tile.expert, full);
          } else {
            TensorCopy(to, map, column, row, item.tile.expert, full);
          }
        }
      }
    }
  }

  // By two warps: a thread copies one of the eight 16-byte pieces of a chunk of every 8th token.
  static constexpr int kGatherers = 64, kRows = Shape::kTokens / 8;
  __device__ __forceinline__ void GatherTokens(int thread) {
    const int first = thread / 8, piece = thread % 8;
    const int to = Shape::kTokensAt + first * 128 + (piece ^ first) * 16;
    const int part_pieces = static_cast<int>(args_.x.pitch / 8);
    Position place;
    int info = 0;
    int index = Begin();
    if (index >= items_) return;
    Item next = FindItem(index);
    Pairs next_pairs = FindPairs(next, thread);
    for (; index < items_; index += Stride()) {
      const Item item = next;
      const Pairs pairs = next_pairs;
      const bool more = index + Stride() < items_;
      if (more) next = FindItem(index + Stride());
      // Once the first chunk has a place, the consumers are done with what `info` held before.
      WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
      WriteInfo(m_.info[info], item, pairs, thread);
      GatherersMeet();
      uint32_t from[kRows];  // in pieces of 16 bytes
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int token = max(min(first + 8 * i, item.tile.count - 1), 0);
        from[i] = static_cast<uint32_t>(m_.row[token]) * (part_pieces * kParts);
      }
      GatherersMeet();  // who has the next item writes new rows
      const auto* values = static_cast<const uint4*>(args_.x.values) + piece;
      for (int chunk = 0; chunk < chunks_; ++chunk, place.Next()) {
        WaitBarrier(m_.empty + place.stage, place.parity ^ 1);
        uint8_t* stage = m_.stage[place.stage] + to;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (first + 8 * i >= item.tile.count) break;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            CopyAsync16(stage + part * Shape::kPartBytes + 1024 * i,
                        values + from[i] + part * part_pieces);
          }
        }
        ArriveWhenCopied(m_.copied + place.stage);
        // Nothing but an arrival of this kind comes after what the gatherers wrote to `info`.
        if (thread == 0) Arrive(m_.copied + place.stage);
        values += Shape::kChunk / 8;
        // The tile is there by now, and nothing waits for its pairs before the next item does.
        if (chunk == 0 && more) next_pairs = FindPairs(next, thread);
      }
      if (++info == Shape::kInfos) info = 0;
    }
  }
  static __device__ __forceinline__ void GatherersMeet() {
    asm volatile("bar.sync 3, %0;" ::"n"(kGatherers) : "memory");
  }

  // By one thread: makes tokens that have been copied visible to the tensor cores. Gatherers, which
  // would have to wait for their copies, are further ahead so.
  __device__ __forceinline__ void PassTokensOn() {
    Position place;
    for (int index = Begin(); index < items_; index += Stride()) {
      for (int chunk = 0; chunk < chunks_; ++chunk, place.Next()) {
        WaitBarrier(m_.copied + place.stage, place.parity);
        FenceAsyncProxy();
        Arrive(m_.full + place.stage);
      }
    }
  }

  // Of an item's tokens, every 64th.
  struct Pairs {
    int pair[(Shape::kTokens + kGatherers - 1) / kGatherers];
  };
  __device__ __forceinline__ Pairs FindPairs(const Item& item, int thread) const {
    Pairs pairs = {};
    int token = thread;
    for (int& pair : pairs.pair) {
      if (token < item.tile.count) pair = args_.lists.pairs[item.tile.begin + token];
      token += kGatherers;
    }
    return pairs;
  }

  __device__ __forceinline__ void WriteInfo(Info& info, const Item& item, const Pairs& pairs,
                                            int thread) {
    if (thread == 0) {
      info.expert = item.tile.expert, info.count = item.tile.count, info.band = item.band;
    }
    int token = thread;
    for (const int pair : pairs.pair) {
      if (token < item.tile.count) {
        const int row = pair / args_.pairs_a_row;
        float factor = args_.pair_weight == nullptr ? 1.0f : args_.pair_weight[pair];
        if constexpr (std::is_same_v<T, half>) factor *= args_.x.scales[row];
        m_.row[token] = row;
        info.pair[token] = pair;
        info.factor[token] = factor;
      }
      token += kGatherers;
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
    for (int index = Begin(); index < items_; index += Stride()) {
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
      uint64_t* full = m_.full + place.stage;
      bool left = chunk == 0;
      // Who shares no weights mostly waits for memory: the last chunk's place is not to wait too.
      if (kCluster == 1 && !left && !__all_sync(0xffffffffu, TestBarrier(full, place.parity))) {
        WaitWarpgroup<0>();
        Leave(last);
        left = true;
      }
      WaitBarrier(full, place.parity);
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
      if (!left) Leave(last);
      last = place.stage;
      place.Next();
    }
    WaitWarpgroup<0>();
    Leave(last);
  }

  // A warp needs a place no longer: any block of the cluster may write there.
  __device__ __forceinline__ void Leave(int place) const {
    if (Lane() < kCluster) ArriveInBlock(m_.empty + place, Lane());
  }

  static __device__ __forceinline__ int Lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int Warp() { return threadIdx.x / 32 % 4; }

  template <Activation kActivation>
  static constexpr bool kGated = IsGated(kActivation);  // params_.paired

  __device__ __forceinline__ void StoreResults(const Info& info) {
    if (args_.activate) {
      WithActivation(args_.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        if constexpr (!kGated<kActivation>) StoreActivated<kActivation, 0>(info);
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
  static __device__ __forceinline__ int Row(int i) {
    return 16 * Warp() + Lane() / 4 + i / 2 % 2 * 8;
  }
  static __device__ __forceinline__ int Token(int i) {
    return i / 4 * 8 + Lane() % 4 * 2 + i % 2;
  }
  // Of the tokens Token(0), Token(1), Token(4) and Token(5), from `factors` on.
  struct Factors {
    float of[4];
    __device__ __forceinline__ explicit Factors(const float* factors) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = *reinterpret_cast<const float2*>(factors + Token(4 * i));
        of[2 * i] = two.x, of[2 * i + 1] = two.y;
      }
    }
    __device__ __forceinline__ float operator[](int i) const { return of[i / 4 * 2 + i % 2]; }
  };

  // Calls f(first token, sums of the two tiles) for all passes, in a loop: unrolled for every
  // activation and number of tokens it would be too much code.
  template <typename F>
  __device__ __forceinline__ void ForPasses(int count, F f) const {
#pragma unroll 1
    for (int begin = 0; begin < count; begin += Shape::kPass) {
      float sum[2][kElements];
      TakeSums(begin, sum);
      f(begin, sum);
    }
  }

  // From registers that have to be known to the compiler: of passes kFirst .. kEnd - 1.
  template <int kFirst = 0, int kEnd = Shape::kTokens / Shape::kPass>
  __device__ __forceinline__ void TakeSums(int begin, float (&sum)[2][kElements]) const {
    if constexpr (kEnd - kFirst > 1) {
      constexpr int kMiddle = (kFirst + kEnd) / 2;
      if (begin < kMiddle * Shape::kPass) {
        TakeSums<kFirst, kMiddle>(begin, sum);
      } else {
        TakeSums<kMiddle, kEnd>(begin, sum);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sum[0][i] = sum_[0][kFirst * kElements + i];
        sum[1][i] = sum_[1][kFirst * kElements + i];
      }
    }
  }

  // The way of a warpgroup's results to rows of y, 64 values in each of kPlanes planes (tiles, or
  // parts of h). Words [2 p] and [2 p + 1] are of the two halves of a warp's 16 rows in plane p,
  // for 8 tokens each: two tokens of a row a word. The warps transpose a pass's together, in pieces
  // of 16 bytes, so that neighbouring lanes store the values of a token.
  template <int kPlanes>
  class Exit {
   public:
    using Words = uint32_t[kElements / 4][2 * kPlanes];

    // The values of plane p begin at begin[p] of a pair's row of `pitch` elements, and those from
    // `end` on are not stored.
    __device__ __forceinline__ Exit(DenseWideBlock& block, const Info& info, int64_t pitch,
                                    const int64_t (&begin)[kPlanes], int64_t end) {
      uint8_t* staged = block.m_.staged[Group()][0];
      const int thread = threadIdx.x % 128, piece = thread % kPieces;
      const int own = 2 * Warp() + Lane() / 8 % 2;
      write_ = staged + (kPlanes == 1 ? Place(Lane() / 16 * 8 + Lane() % 8, own)
                                      : Place(Lane() % 8, Lane() / 16 * 8 + own));
      token_ = thread / kPieces;
      read_ = staged + Place(token_, piece);
      const int64_t column = (piece < 8 ? begin[0] : begin[kPlanes - 1]) + piece % 8 * 8;
      y_ = static_cast<uint8_t*>(block.args_.y) + 2 * column;
      pitch_ = static_cast<uint32_t>(2 * pitch);
      pair_ = info.pair + token_;
      stored_ = column < end ? info.count - token_ : 0;
    }

    // Of a pass whose first token is `begin`.
    __device__ __forceinline__ void Store(const DenseWideBlock& block, int begin,
                                          const Words& words) const {
      // Of two buffers in turn, who fills one has met all that have emptied it.
      const int buffer =
          Shape::kBuffers == 1 ? 0 : begin / Shape::kPass % 2 * (Shape::kPass * 256);
      if (Shape::kBuffers == 1) block.GroupMeets();
      if constexpr (kPlanes == 1) {
        const uint32_t all[4] = {words[0][0], words[0][1], words[1][0], words[1][1]};
        StoreMatrices(write_ + buffer, all);
      } else {
        StoreMatrices(write_ + buffer, words[0]);
        StoreMatrices(write_ + buffer + 8 * kPieces * 16, words[1]);
      }
      uint8_t* row[kPlanes];
#pragma unroll
      for (int i = 0; i < kPlanes; ++i) {
        const uint32_t pair = pair_[begin + kStep * i];
        row[i] = y_ + static_cast<uint64_t>(pair) * pitch_;
      }
      block.GroupMeets();
#pragma unroll
      for (int i = 0; i < kPlanes; ++i) {
        const uint4 values =
            *reinterpret_cast<const uint4*>(read_ + buffer + kStep * kPieces * 16 * i);
        if (begin + kStep * i < stored_) *reinterpret_cast<uint4*>(row[i]) = values;
      }
    }

   private:
    static constexpr int kPieces = 8 * kPlanes, kStep = 128 / kPieces;
    static_assert(kStep % 8 == 0 && kStep * kPlanes == Shape::kPass);
    // Pieces are exchanged so that they do not meet in the banks.
    static __device__ __forceinline__ int Place(int token, int piece) {
      return (token * kPieces + (piece ^ token % 8)) * 16;
    }

    uint8_t *write_, *y_;
    const uint8_t* read_;
    const int32_t* pair_;
    uint32_t pitch_;
    int token_, stored_;
  };

  // Where a pair's row of y begins; sizes fit 31 bits (RequireLimits of check.h).
  __device__ __forceinline__ int64_t RowBegin(int pair) const {
    return static_cast<int64_t>(pair) * static_cast<int>(args_.y_pitch);
  }

  // The first of a tile's 64 rows.
  __device__ __forceinline__ int TileRow(const Info& info, int tile) const {
    return FirstRow(info.band, 2 * Group() + tile);
  }

  __device__ __forceinline__ void StoreSums(const Info& info) {
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
  __device__ __forceinline__ void StoreSumsAs(const Info& info) {
    if constexpr (sizeof(Y) == 2) {
      if (params_.stores_eight) return StoreEights<Y2>(info, info.factor);
    }
    const int rows[2] = {TileRow(info, 0), TileRow(info, 1)};
    ForPasses(info.count, [&](int begin, const float (&sum)[2][kElements]) {
      const Factors factor(info.factor + begin);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          StoreOne<Y>(info, begin, i, rows[tile], sum[tile][i] * factor[i]);
        }
      }
    });
  }

  // Sums times the tokens' factors. Unrolled: there is little to do for a pass.
  template <typename Y2>
  __device__ __forceinline__ void StoreEights(const Info& info, const float* factors) {
    GroupMeets();  // the buffers are free, also where the last item was short
    const Exit<2> exit(*this, info, args_.y_pitch, {TileRow(info, 0), TileRow(info, 1)},
                       args_.rows);
#pragma unroll
    for (int pass = 0; pass < Shape::kTokens / Shape::kPass; ++pass) {
      const int begin = pass * Shape::kPass;
      if (begin >= info.count) break;
      const Factors factor(factors + begin);
      typename Exit<2>::Words words;
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const float* sum = sum_[tile] + pass * kElements + i;
          words[i / 4][2 * tile + i / 2 % 2] =
              PackTwo<Y2>(sum[0] * factor[i], sum[1] * factor[i + 1]);
        }
      }
      exit.Store(*this, begin, words);
    }
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

  // f16 times a power of two that brings the largest magnitude of 128 columns to 2^14 .. 2^15.
  __device__ __forceinline__ void StoreScaled(const Info& info) {
    FindMaxima(info);
    GroupMeets();
    StoreScales(info);
    StoreEights<half2>(info, m_.factors[Group()]);
  }

  // From the maxima: a thread has a token.
  __device__ __forceinline__ void StoreScales(const Info& info) {
    const int row = TileRow(info, 0);
    const int64_t groups = (args_.rows + kDenseWideScaleColumns - 1) / kDenseWideScaleColumns;
    for (int token = threadIdx.x % 128; token < info.count; token += 128) {
      const uint4 of = *reinterpret_cast<const uint4*>(m_.maxima[Group()][token / 2]);
      const uint32_t both = MaxTwo(MaxTwo(of.x, of.y), MaxTwo(of.z, of.w));
      const float max = fmaxf(__uint_as_float(token % 2 == 0 ? both << 16 : both & 0xffff0000u) *
                                  fabsf(info.factor[token]),
                              0.0f);
      // With the exponents' bias of 127.
      const int scale = max == 0 ? 127 : ::max((__float_as_int(max) >> 23) - 14, 1);
      m_.factors[Group()][token] = info.factor[token] * __int_as_float((254 - scale) << 23);
      if (row >= args_.rows) continue;
      args_.y_scales[info.pair[token] * groups + row / kDenseWideScaleColumns] =
          __int_as_float(scale << 23);
    }
  }

  // The largest magnitudes over the warp's 2 x 16 rows, of two tokens together. Rounded to bf16,
  // which costs the scale one bit at most; NaN is left out. Several at a time, as exchanges take
  // long.
  __device__ __forceinline__ void FindMaxima(const Info& info) {
    constexpr int kEights = Shape::kTokens / 8, kBatch = 6;
    static_assert(kEights % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kEights; first += kBatch) {
      if (8 * first >= info.count) break;
      uint32_t max[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float *a = sum_[0] + 4 * (first + i), *b = sum_[1] + 4 * (first + i);
        max[i] = MaxTwo(MaxTwo(Magnitudes(a[0], a[1]), Magnitudes(a[2], a[3])),
                        MaxTwo(Magnitudes(b[0], b[1]), Magnitudes(b[2], b[3])));
      }
#pragma unroll
      for (int d = 4; d < 32; d *= 2) {
        uint32_t other[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) other[i] = __shfl_xor_sync(0xffffffffu, max[i], d);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) max[i] = MaxTwo(max[i], other[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (Lane() < 4) m_.maxima[Group()][4 * (first + i) + Lane()][Warp()] = max[i];
      }
    }
  }
  static __device__ __forceinline__ uint32_t Magnitudes(float a, float b) {
    return PackTwo<__nv_bfloat162>(a, b) & 0x7fff7fffu;
  }
  static __device__ __forceinline__ uint32_t MaxTwo(uint32_t a, uint32_t b) {
    uint32_t max;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
  }

  // Of a pair of gate and up, or of tile kTile of up alone. Columns of h past the end are zeros:
  // the next product reads whole chunks.
  template <Activation kActivation, int kTile>
  __device__ __forceinline__ void StoreActivated(const Info& info) {
    const int begin_row = TileRow(info, kTile);
    if (begin_row >= (args_.h_parts > 0 ? args_.y_pitch : args_.rows)) return;
    if (args_.h_parts == 0) {
      ForActivated<kActivation, kTile>(
          info, begin_row, [&](int begin, const float (&h)[kElements]) {
#pragma unroll
            for (int i = 0; i < kElements; ++i) StoreOne<float>(info, begin, i, begin_row, h[i]);
          });
    } else if (args_.h_parts == 1) {
      StoreParts<kActivation, kTile, 1>(info, begin_row);
    } else {
      StoreParts<kActivation, kTile, 2>(info, begin_row);
    }
  }

  // Calls f(first token, values of h) for all passes.
  template <Activation kActivation, int kTile, typename F>
  __device__ __forceinline__ void ForActivated(const Info& info, int begin_row, F f) const {
    const int rows = static_cast<int>(args_.rows);
    const RowFinish finish[2] = {{args_, info.expert, min(begin_row + Row(0), rows - 1)},
                                 {args_, info.expert, min(begin_row + Row(2), rows - 1)}};
    ForPasses(info.count, [&](int begin, const float (&sum)[2][kElements]) {
      float h[kElements];
      if (params_.plain) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          h[i] = FastActivate<kActivation>(sum[0][i], sum[kTile][i], args_.limit, args_.beta,
                                           args_.linear_beta);
        }
      } else {
        const Factors factor(info.factor + begin);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          h[i] = finish[i / 2 % 2].template Activate<kActivation>(args_, sum[0][i] * factor[i],
                                                                  sum[kTile][i] * factor[i]);
        }
      }
      if (begin_row + 64 > rows) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (begin_row + Row(i) >= rows) h[i] = 0;
        }
      }
      f(begin, h);
    });
  }

  template <Activation kActivation, int kTile, int kHParts>
  __device__ __forceinline__ void StoreParts(const Info& info, int begin_row) {
    GroupMeets();  // as in StoreEights
    int64_t begins[kHParts];
#pragma unroll
    for (int part = 0; part < kHParts; ++part) begins[part] = begin_row + part * args_.y_pitch;
    const Exit<kHParts> exit(*this, info, kHParts * args_.y_pitch, begins,
                             kHParts * args_.y_pitch);
    ForActivated<kActivation, kTile>(info, begin_row, [&](int begin, const float (&h)[kElements]) {
      typename Exit<kHParts>::Words words;
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        const uint32_t high = PackTwo<__nv_bfloat162>(h[i], h[i + 1]);
        words[i / 4][i / 2 % 2] = high;
        if constexpr (kHParts == 2) {
          const float2 rounded =
              __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&high));
          words[i / 4][2 + i / 2 % 2] =
              PackTwo<__nv_bfloat162>(h[i] - rounded.x, h[i + 1] - rounded.y);
        }
      }
      exit.Store(*this, begin, words);
    });
  }

  const DenseWideParams& params_;
  const DenseWideArgs& args_;
  Memory& m_;
  const int rank_;
  const int tiles_, steps_, items_, chunks_;
  float sum_[2][Shape::kTokens / 2] = {};
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, int kParts, int kCluster>
__global__ void __launch_bounds__(DenseWideShape<kParts>::kThreads, 1)
    DenseWide(const __grid_constant__ DenseWideParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Block = DenseWideBlock<T, kParts, kCluster>;
  extern __shared__ uint8_t shared[];
  // With older lists, weights are on their way before the kernel before this one has ended.
  if (!params.args.lists.older) WaitForEarlierKernels();
  LetNextKernelStart();  // which may then read the lists at once: Lists::older
  const uint32_t address = SharedAddress(shared);
  auto& memory =
      *reinterpret_cast<typename Block::Memory*>(shared + ((1024 - address % 1024) % 1024));
  Block(params, memory).Run();
#endif
}

}  // namespace jax_moe::cuda
