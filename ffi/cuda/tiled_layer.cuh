// A whole layer for up to 4 tokens and 32 pairs in one cooperative kernel, Hopper's.
//
// With so few tokens launches, prologues and the first bytes' way add up to more than the memory's
// time. Here weights are on their way as soon as the ids are known, and keep coming until the last
// ones of down are there.
//
// A block of 16 warps a multiprocessor, each of which prepares x for itself in shared memory. A
// block has every gridDim.x-th item, a tile of one or two tokens and 16 rows of gate and up, and of
// down every gridDim.x-th 16 columns of y, for all tiles. A group is 16 rows of one matrix of one
// expert. The steps of all groups of a block, 256 columns each, are shared out evenly among its
// warps; their bytes come through a ring a warp, across the borders of groups and from up to down.
// The block adds what its warps found of each group, in their order, and h goes to global memory.
// Then all blocks wait for each other (a cooperative launch runs them at the same time), with rings
// full of down's weights, and the same steps make y.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "ffi/cuda/layer_tiles.cuh"
#include "ffi/cuda/row_layouts.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_layer.h"
#include "ffi/cuda/two_token_step.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

template <typename Up, typename Down>
struct TiledLayerShape {
  static constexpr bool kDownIsLarger =
      TiledNarrowShape<Down>::kStageBytes > TiledNarrowShape<Up>::kStageBytes;
  using Larger = std::conditional_t<kDownIsLarger, Down, Up>;
  using Ring = WarpRing<Larger>;
  using Narrow = TiledNarrowShape<Larger>;
  static constexpr int kWarps = plan::kCudaLayerWarps, kRows = Narrow::kRows, kStep = Narrow::kStep;
  static constexpr int kTokens = LayerTiles::kTokens, kPairs = LayerTiles::kPairs;

  struct alignas(16) Warp {
    typename Narrow::Stage ring[Narrow::kStages];
    uint64_t full[Narrow::kStages];
    LayerTiles::Table tiles;
  };
  struct alignas(16) Memory {
    Warp warp[kWarps];
    // Of each warp's part of a row of x: the bits of its maximum, and its sum of squares.
    uint32_t max[kWarps];
    float squares[kWarps];
    // Of a pair: what its sums of gate and up are multiplied by, h, what undoes the latter, and the
    // sums of down.
    float factor[kPairs], h_factor[kPairs], h_scale[kPairs], weight[kPairs];
    float of_pair[4][kPairs];  // row norms of gate and up, the weight before them, the one of down
  };
};

__device__ __forceinline__ float Reciprocal(float x) { return __fdividef(1.0f, x); }

template <typename Up, typename Down>
class LayerWarp {
 public:
  using Shape = TiledLayerShape<Up, Down>;
  using Memory = typename Shape::Memory;

  // more: x, sums and pairs' results (plan::CudaLayerShape).
  __device__ __forceinline__ LayerWarp(const TiledLayerArgs& args, Memory& memory, uint8_t* more)
      : args_(args),
        m_(memory),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        matrices_(args.up.gated ? 2 : 1),
        bands_(args.up.rows / Shape::kRows),
        pairs_(args.down.tokens * args.down.top_k),
        id_(lane_ < pairs_ ? args.down.expert_ids[lane_] : -1),
        x_row_(Quotient(warp_, args.inverse_x_warps)),
        x_unit_(threadIdx.x - 32 * args.x_warps * x_row_),
        x_end_(x_row_ < args.down.tokens ? args.x_units : 0),
        x_first_{LoadX(x_unit_), LoadX(x_unit_ + 32 * args.x_warps)},
        ring_(memory.warp[warp_].ring, memory.warp[warp_].full),
        tiles_(id_, args.down.experts, args.log_tokens, memory.warp[warp_].tiles),
        x_(reinterpret_cast<half*>(more)),
        sums_(reinterpret_cast<float*>(more + args.x_bytes)),
        done_(reinterpret_cast<float*>(more + args.x_bytes + args.sum_bytes)) {}

  __device__ __forceinline__ void Run() {
    const int blocks = gridDim.x, block = blockIdx.x;
    const int items = tiles_.Number() * bands_, down_bands = args_.down.y_pitch / Shape::kRows;
    // Blocks with one item less are the first to have one band of down more.
    items_ = Quotient(items - block + blocks - 1, args_.inverse_blocks);
    down_bands_ = Quotient(down_bands + block, args_.inverse_blocks);
    up_ = Spread(items_ * matrices_, args_.rows[0].steps);
    down_ = Spread(down_bands_ * tiles_.Number(), args_.rows[1].steps);
    fetch_ = Begin(0);
    while (ring_.HasPlace() && FetchStep()) {
    }
    if (warp_ == 0) FetchOfPair();
    PrepareX();
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == 1) cooperative_groups::this_grid().sync();
      Multiply(phase);
      if (phase == 0) {
        if (warp_ == 0) FindFactors();
        __syncthreads();
        FinishH();
      }
    }
    __syncthreads();
    FinishY();
  }

 private:
  // n / d of small numbers, where the quotient is below 2^10 and n below 2^20.
  static __device__ __forceinline__ int Quotient(int n, float inverse_of_d) {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse_of_d);
  }

  // Groups of equally many steps, one after another, and how many a warp has of the steps: the
  // first `chunk`, the next, and so on.
  struct Spread {
    int total, chunk;
    float inverse_chunk;
    Spread() = default;
    __device__ __forceinline__ Spread(int groups, int steps)
        : total(groups * steps),
          chunk((total + Shape::kWarps - 1) / Shape::kWarps),
          inverse_chunk(Reciprocal(static_cast<float>(chunk))) {}
  };
  __device__ __forceinline__ Spread SpreadOf(int phase) const { return phase == 0 ? up_ : down_; }

  // A warp's way through its steps.
  struct Walk {
    int left, group, step;
    bool begins;  // this is the warp's first step of the group
    __device__ __forceinline__ void Next(int steps) {
      --left;
      begins = ++step == steps;
      if (begins) step = 0, ++group;
    }
  };
  __device__ __forceinline__ Walk Begin(int phase) const {
    const Spread spread = SpreadOf(phase);
    const auto& rows = args_.rows[phase];
    const int begin = warp_ * spread.chunk, group = Quotient(begin, rows.inverse_steps);
    return {min(spread.chunk, spread.total - begin), group, begin - group * rows.steps, true};
  }

  // 16 rows from 16 * band on.
  struct Group {
    int matrix, tile, band;
  };
  __device__ __forceinline__ Group Locate(int phase, int group) const {
    if (phase == 0) {
      const int item = blockIdx.x + (matrices_ == 2 ? group >> 1 : group) * gridDim.x;
      const int tile = Quotient(item, args_.inverse_bands);
      return {matrices_ == 2 ? group & 1 : 1, tile, item - tile * bands_};
    }
    int n = 0;
    for (; group >= tiles_.Number(); ++n) group -= tiles_.Number();
    return {2, group, DownBand(n)};
  }
  __device__ __forceinline__ int DownBand(int n) const {
    return gridDim.x - 1 - blockIdx.x + n * gridDim.x;
  }

  __device__ __forceinline__ bool FetchStep() {
    if (fetch_.left <= 0) {
      if (fetch_phase_ == 1) return false;
      fetch_phase_ = 1;
      fetch_ = Begin(1);
      if (fetch_.left <= 0) return false;
    }
    const auto& rows = args_.rows[fetch_phase_];
    if (fetch_.begins) {
      const Group group = Locate(fetch_phase_, fetch_.group);
      const TiledMatrix& matrix = args_.matrix[group.matrix];
      fetch_from_ = matrix.data + tiles_.Expert(group.tile) * matrix.expert_bytes +
                    group.band * Shape::kRows * rows.bytes;
    }
    const int at = fetch_.step * rows.stage_bytes;
    ring_.Fetch(fetch_from_ + at, min(rows.stage_bytes, rows.band_bytes - at), nullptr);
    fetch_.Next(rows.steps);
    return true;
  }

  // Of pair lane: what FindFactors needs, to shared memory, so that no other load is waited for
  // with these.
  __device__ __forceinline__ void FetchOfPair() {
    if (tiles_.Place(lane_) != LayerTiles::kNone) {
      const auto fetch = [&](int i, const float* from) {
        CopyAsync4(&m_.of_pair[i][lane_], from);
      };
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const TiledMatrix& matrix = args_.matrix[i];
        fetch(i, matrix.aux + id_ * matrix.expert_rows * 2 + 1);
      }
      if (args_.up.pair_weight != nullptr) fetch(2, args_.up.pair_weight + lane_);
      if (args_.down.weights != nullptr) fetch(3, args_.down.weights + lane_);
    }
    CommitCopies();
  }

  // x is prepared in units of 16 bytes, eight values or four of float32. A row belongs to
  // args_.x_warps warps, whose lanes have every so many-th unit. Loads come late once weights are
  // on their way, so each thread's first two units are loaded before.
  __device__ __forceinline__ uint4 LoadX(int unit) const {
    if (unit >= x_end_) return {};
    return static_cast<const uint4*>(args_.x)[x_row_ * args_.x_units + unit];
  }
  struct Eight {
    float v[8];
  };
  __device__ __forceinline__ Eight ToFloat(const uint4& unit) const {
    const uint32_t words[] = {unit.x, unit.y, unit.z, unit.w};
    Eight eight;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (args_.x_type == Element::kBF16) {
        eight.v[2 * i] = __uint_as_float(words[i] << 16);
        eight.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else if (args_.x_type == Element::kF16) {
        const float2 two = __half22float2(Halves(words[i]));
        eight.v[2 * i] = two.x, eight.v[2 * i + 1] = two.y;
      } else {
        eight.v[i] = __uint_as_float(words[i]);
        eight.v[4 + i] = 0;
      }
    }
    return eight;
  }
  // f(unit, its values) for the units of this thread.
  template <typename F>
  __device__ __forceinline__ void ForEachUnit(F f) const {
#pragma unroll 1
    for (int n = 0, unit = x_unit_; unit < x_end_; ++n, unit += 32 * args_.x_warps) {
      uint4 bits = n == 0 ? x_first_[0] : x_first_[1];
      if (n > 1) bits = LoadX(unit);
      f(unit, ToFloat(bits));
    }
  }

  __device__ __forceinline__ int ExponentOfX(int token) const {
    const uint32_t max = lane_ < args_.x_warps ? m_.max[token * args_.x_warps + lane_] : 0;
    return ExponentOfBits(__reduce_max_sync(0xffffffffu, max));
  }

  // As PrepareTiledRow in Layout::kF16Narrow but for the order of eight columns.
  __device__ __forceinline__ void PrepareX() {
    uint32_t max = 0;
    ForEachUnit([&](int, const Eight& eight) {
#pragma unroll
      for (const float x : eight.v) max = ::max(max, __float_as_uint(x) & 0x7fffffffu);
    });
    max = __reduce_max_sync(0xffffffffu, max);
    if (lane_ == 0) m_.max[warp_] = max;
    __syncthreads();
    float squares = 0;
    if (x_row_ < args_.down.tokens) {
      const float factor = PowerOfTwo(ExponentOfX(x_row_));
      ForEachUnit([&](int unit, const Eight& eight) {
        uint32_t halves[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = eight.v[2 * i] * factor, high = eight.v[2 * i + 1] * factor;
          squares = fmaf(low, low, fmaf(high, high, squares));
          halves[i] = PackHalves(low, high);
        }
        auto* to = reinterpret_cast<uint4*>(x_ + x_row_ * args_.x_pitch);
        if (args_.x_type == Element::kF32) {
          auto* words = reinterpret_cast<uint32_t*>(to + PlaceOfGroup(unit / 2)) + unit % 2;
          words[0] = halves[0], words[2] = halves[1];
        } else {
          to[PlaceOfGroup(unit)] = {halves[0], halves[2], halves[1], halves[3]};
        }
      });
#pragma unroll
      for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, d);
    }
    if (lane_ == 0) m_.squares[warp_] = squares;
    __syncthreads();
  }

  // Of pair lane, by the warp that has fetched what it needs.
  __device__ __forceinline__ void FindFactors() {
    const bool exists = tiles_.Place(lane_) != LayerTiles::kNone;
    const int own = TokenOf(min(lane_, pairs_ - 1));
    BoundOfH known = {};
#pragma unroll 1
    for (int token = 0; token < args_.down.tokens; ++token) {
      const int exponent = ExponentOfX(token);
      float squares = lane_ < args_.x_warps ? m_.squares[token * args_.x_warps + lane_] : 0.0f;
#pragma unroll
      for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, d);
      if (token == own) known.scale = PowerOfTwo(-exponent), known.norm = 1.001f * sqrtf(squares);
    }
    WaitCopies<0>();
    __syncwarp();
    known.weight = args_.up.pair_weight != nullptr && exists ? m_.of_pair[2][lane_] : 1.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) known.row_norm[i] = exists ? m_.of_pair[i][lane_] : 0.0f;
    float scale = 0;
    m_.factor[lane_] = known.Factor();
    m_.h_factor[lane_] = ScaleOfH(args_.up, known, exists ? id_ : 0, &scale);
    m_.h_scale[lane_] = scale;
    m_.weight[lane_] = args_.down.weights != nullptr && exists ? m_.of_pair[3][lane_] : 1.0f;
  }

  // x or h of this lane's token of a tile, or of another where there is none.
  __device__ __forceinline__ const half* RowOf(int phase, int tile) const {
    const int token = StepOfTwo::Token();
    const int pair = tiles_.Pair(tile, token < tiles_.Count(tile) ? token : 0);
    if (phase == 1) return args_.down.h + pair * args_.down.h_pitch;
    return x_ + TokenOf(pair) * args_.x_pitch;
  }
  __device__ __forceinline__ int TokenOf(int pair) const {
    int token = 0;
    for (pair -= args_.down.top_k; pair >= 0; pair -= args_.down.top_k) ++token;
    return token;
  }

  __device__ __forceinline__ void Multiply(int phase) {
    Walk at = Begin(phase);
    if (at.left <= 0) return;
    const int columns = args_.rows[phase].columns, steps = args_.rows[phase].steps;
    StepOfTwo x(columns);
    int tile = Locate(phase, at.group).tile;
    x.MoveTo(RowOf(phase, tile));
    x.Load(0, at.step * Shape::kStep);
    x.Load(1, at.step * Shape::kStep);
#pragma unroll 1
    while (at.left > 0) {
      const int group = at.group, count = tiles_.Count(tile);
      float total[4] = {};
#pragma unroll 1
      do {
        const int step = at.step;
        at.Next(steps);
        if (at.begins && at.left > 0) {
          tile = Locate(phase, at.group).tile;
          x.MoveTo(RowOf(phase, tile));
        }
        const int column = step * Shape::kStep, next = at.step * Shape::kStep;
        const uint8_t* weights = ring_.Wait().weights;
        if (std::is_same_v<Up, Down> || phase == 0) {
          MultiplyTwoTokens<Up>(weights, x, column, next, columns, total);
        } else {
          MultiplyTwoTokens<Down>(weights, x, column, next, columns, total);
        }
        __syncwarp();
        FetchStep();
      } while (!at.begins && at.left > 0);
      auto* sums = reinterpret_cast<float(*)[Shape::kRows]>(Sums(group, warp_));
      StoreSums(total, sums, count, phase == 0 ? kExactUnitScale<Up> : kExactUnitScale<Down>);
    }
  }

  // A group's sums of each warp have places of their own: 2^log_tokens times 16 for each warp's
  // part of a group, and a warp has as many parts more than there are groups as there are warps
  // before it.
  __device__ __forceinline__ float* Sums(int group, int warp) const {
    return sums_ + (group + warp << args_.log_tokens) * Shape::kRows;
  }
  __device__ __forceinline__ float SumOf(int phase, int group, int token, int row) const {
    const Spread spread = SpreadOf(phase);
    const int begin = group * args_.rows[phase].steps;
    const int first = Quotient(begin, spread.inverse_chunk);
    const int last = Quotient(begin + args_.rows[phase].steps - 1, spread.inverse_chunk);
    float sum = 0;
    for (int warp = first; warp <= last; ++warp) {
      sum += Sums(group, warp)[token * Shape::kRows + row];
    }
    return sum;
  }

  // A thread has one row of a token of an item at a time.
  __device__ __forceinline__ void FinishH() const {
    const int log_tokens = args_.log_tokens;
    WithActivation(args_.up.activation, [&](auto activation) {
#pragma unroll 1
      for (int i = threadIdx.x; i < items_ * Shape::kRows << log_tokens; i += blockDim.x) {
        const int row = i % Shape::kRows, token = i / Shape::kRows & ((1 << log_tokens) - 1);
        const int group = (i / Shape::kRows >> log_tokens) * matrices_;
        const Group at = Locate(0, group);
        if (token >= tiles_.Count(at.tile)) continue;
        const int pair = tiles_.Pair(at.tile, token), n = at.band * Shape::kRows + row;
        const float factor = m_.factor[pair];
        const float first = SumOf(0, group, token, row) * factor;
        const float second =
            matrices_ == 2 ? SumOf(0, group + 1, token, row) * factor : first;
        const RowFinish finish(args_.up, tiles_.Expert(at.tile), n);
        const float h = finish.Activate<decltype(activation)::value>(args_.up, first, second);
        static_cast<half*>(args_.up.y)[pair * args_.up.y_pitch + n / 128 * 128 +
                                       NarrowPlace(TwoTokenPlace(n % 128))] =
            __float2half_rn(h * m_.h_factor[pair]);
      }
    });
  }

  // A thread has one column of a pair at a time, and then of a token.
  __device__ __forceinline__ void FinishY() const {
    static_assert(Shape::kPairs * Shape::kRows == 32 * Shape::kWarps);
    const int row = threadIdx.x % Shape::kRows, of = threadIdx.x / Shape::kRows;
    const int place = of < pairs_ ? tiles_.Place(of) : LayerTiles::kNone;
    const int tile = place == LayerTiles::kNone ? 0 : place / Shape::kTokens;
#pragma unroll 1
    for (int n = 0; n < down_bands_; ++n) {
      float value = 0;
      if (place != LayerTiles::kNone) {
        value = SumOf(1, n * tiles_.Number() + tile, place % Shape::kTokens, row);
        value = FinishProjection(args_.down.projection, value * m_.h_scale[of], tiles_.Expert(tile),
                                 DownBand(n) * Shape::kRows + row) *
                m_.weight[of];
      }
      done_[n * 32 * Shape::kWarps + threadIdx.x] = value;
    }
    __syncthreads();
    if (of >= args_.down.tokens) return;
#pragma unroll 1
    for (int n = 0; n < down_bands_; ++n) {
      const float* from = done_ + (n * Shape::kPairs + of * args_.down.top_k) * Shape::kRows + row;
      float y = 0;
      for (int slot = 0; slot < args_.down.top_k; ++slot) y += from[slot * Shape::kRows];
      Store(args_.down.y, of * args_.down.y_pitch + DownBand(n) * Shape::kRows + row,
            args_.down.y_type, y);
    }
  }

  const TiledLayerArgs& args_;
  Memory& m_;
  const int warp_, lane_, matrices_, bands_, pairs_;
  const int id_;  // of pair lane
  const int x_row_, x_unit_, x_end_;  // of this thread: a row of x, its first unit, the row's end
  const uint4 x_first_[2];
  typename Shape::Ring ring_;
  LayerTiles tiles_;
  half* const x_;      // [tokens, x_pitch]
  float* const sums_;  // of Deliver
  float* const done_;  // [bands of down, kPairs, 16]
  int items_, down_bands_;  // of this block
  Spread up_, down_;        // of gate and up, of down
  Walk fetch_;
  int fetch_phase_ = 0;
  const uint8_t* fetch_from_ = nullptr;
};

template <typename Up, typename Down>
__global__ void __launch_bounds__(32 * plan::kCudaLayerWarps, 1)
    TiledLayer(const __grid_constant__ TiledLayerArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) uint8_t shared[];
  using Memory = typename TiledLayerShape<Up, Down>::Memory;
  LayerWarp<Up, Down>(args, *reinterpret_cast<Memory*>(shared), shared + sizeof(Memory)).Run();
#endif
}

}  // namespace jax_moe::cuda
