// A whole layer for up to 8 tokens and 32 pairs in one cooperative kernel, Hopper's.
//
// With so few tokens launches, prologues and the first bytes' way add up to more than the memory's
// time. Here weights are on their way as soon as the ids are known, and keep coming until the last
// ones of down are there.
//
// A block of 16 warps a multiprocessor, each of which prepares x for itself in shared memory. A
// block has every gridDim.x-th item, a tile of one or two tokens and 16 rows of gate and up. A
// group is 16 rows of one matrix of one expert. The steps of all groups of a block, 256 columns
// each, are shared out evenly among its warps; their bytes come through a ring a warp, across the
// borders of groups and from up to down. The block adds what its warps found of each group, in
// their order, and h goes to global memory. Then all blocks wait for each other (a cooperative
// launch runs them at the same time), with rings full of down's weights, and the same steps make y.
//
// A band of down is 16 columns of y: a group of each tile. The groups of all bands, one after
// another, are shared out evenly among the blocks. So a block may begin with a band's last tiles:
// what it found of these it gives, through global memory, to the block that has the first ones.
#pragma once

#include <type_traits>

#include "ffi/cuda/grid_barrier.cuh"
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
    uint32_t max[kWarps];       // of each warp's part of a row of x: the bits of its maximum
    float squares[kWarps][32];  // of each thread's
    // Of a pair: what its sums of gate and up are multiplied by, h, what undoes the latter, and the
    // sums of down.
    float factor[kPairs], h_factor[kPairs], h_scale[kPairs], weight[kPairs];
    float of_pair[4][kPairs];  // row norms of gate and up, the weight before them, the one of down
    // The biases that a thread adds first: to h, and to a pair's part of y.
    float bias[2][32 * kWarps];
    // GridBarrier's word, and what it was before this block had arrived.
    uint32_t* barrier;
    uint32_t barrier_before;
  };
};

template <typename Up, typename Down>
class LayerWarp {
 public:
  using Shape = TiledLayerShape<Up, Down>;
  using Memory = typename Shape::Memory;

  // more: x and sums (plan::CudaLayerShape).
  __device__ __forceinline__ LayerWarp(const TiledLayerArgs& args, Memory& memory, uint8_t* more)
      : args_(args),
        m_(memory),
        warp_(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32),
        matrices_(args.matrices),
        bands_(args.bands[0]),
        pairs_(args.pairs),
        x_row_(Quotient(warp_, args.inverse_x_warps)),
        x_unit_(threadIdx.x - 32 * args.x_warps * x_row_),
        x_end_(x_row_ < args.tokens ? args.x_units : 0),
        ring_(memory.warp[warp_].ring, memory.warp[warp_].full),
        id_(lane_ < pairs_ ? args.expert_ids[lane_] : -1),
        x_first_{LoadX(x_unit_), LoadX(x_unit_ + 32 * args.x_warps)},
        tiles_(id_, args.experts, args.log_tokens, memory.warp[warp_].tiles),
        x_(reinterpret_cast<half*>(more)),
        sums_(reinterpret_cast<float*>(more + args.x_bytes)) {}

  __device__ __forceinline__ void Run() {
    const int items = tiles_.Number() * bands_, block = blockIdx.x;
    items_ = Quotient(items - block + args_.blocks - 1, args_.inverse_blocks);
    fetch_ = Begin(0);
    if (FindsFactors()) FetchOfPair();
    // A copy keeps a warp from issuing the next one for some time, in which x is prepared and down
    // is shared out; so the first one is none of down.
    static_assert(Shape::Narrow::kStages >= 2);
#pragma unroll 1
    for (int i = 0; i < Shape::Narrow::kStages; ++i) {
      if (i > 0 || fetch_.left > 0) FetchStep();
      if (i == 0) FindMaxOfX(), ShareOutDown();
      if (i == 1) ScaleX();
    }
    __syncthreads();
    if (FindsFactors()) FindFactors();
    if (__builtin_expect(args_.biased, false)) FetchBiases();
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      Multiply(phase);
      if (phase == 0) {
        FinishH();
        __syncthreads();
        if (threadIdx.x == 0) GridBarrier::Arrive(m_.barrier);
      }
    }
    __syncthreads();
    FinishY();
  }

 private:
  // n / d where n d is below 2^31, from 2^31 / d rounded up.
  static __device__ __forceinline__ int Quotient(int n, uint32_t inverse_of_d) {
    return static_cast<int>(__umulhi(2u * static_cast<uint32_t>(n), inverse_of_d));
  }

  // Where a part of down begins. The parts are args_.down_blocks, one a block.
  struct DownPlace {
    int band, tile;
  };
  __device__ __forceinline__ DownPlace BeginOfDown(int part) const {
    const int parts = args_.down_blocks, bands = min(part, parts) * args_.bands[1];
    const int band = Quotient(bands, args_.inverse_down_blocks);
    const int rest = (bands - band * parts) * tiles_.Number();
    return {band, Quotient(rest, args_.inverse_down_blocks)};
  }
  // There are no more parts than bands, so a band has one border of parts at most.
  __device__ __forceinline__ void ShareOutDown() {
    const int part = DownPart();
    const DownPlace begin = BeginOfDown(part), end = BeginOfDown(part + 1);
    down_band_ = begin.band;
    down_tile_ = begin.tile;
    down_bands_ = end.band - begin.band + (end.tile > 0 ? 1 : 0);
    down_groups_ = (end.band - begin.band) * tiles_.Number() + end.tile - begin.tile;
    if (down_tile_ > 0 && lane_ < pairs_) *Given(part) = __uint_as_float(kNotGiven);
  }
  // Blocks with one item less have the first ones.
  __device__ __forceinline__ int DownPart() const {
    return args_.blocks - 1 - static_cast<int>(blockIdx.x);
  }

  // Groups of equally many steps, one after another, and how many a warp has of the steps: the
  // first `chunk`, the next, and so on.
  struct Spread {
    int total, chunk;
    __device__ __forceinline__ Spread(int groups, int steps)
        : total(groups * steps),
          chunk(static_cast<unsigned>(total + Shape::kWarps - 1) / Shape::kWarps) {}
  };
  __device__ __forceinline__ Spread SpreadOf(int phase) const {
    const int groups = phase == 0 ? items_ * matrices_ : down_groups_;
    return Spread(groups, args_.rows[phase].steps);
  }

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
      const int item = blockIdx.x + (matrices_ == 2 ? group >> 1 : group) * args_.blocks;
      const int tile = Quotient(item, args_.inverse_bands);
      return {matrices_ == 2 ? group & 1 : 1, tile, item - tile * bands_};
    }
    int band = down_band_;
    for (group += down_tile_; group >= tiles_.Number(); ++band) group -= tiles_.Number();
    return {2, group, band};
  }

  // Bytes of 256 columns of a band.
  static __device__ __forceinline__ int StageBytes(int phase) {
    constexpr int kUp = TiledNarrowShape<Up>::kStageBytes;
    constexpr int kDown = TiledNarrowShape<Down>::kStageBytes;
    return kUp == kDown || phase == 0 ? kUp : kDown;
  }

  __device__ __forceinline__ bool FetchStep() {
    if (fetch_.left <= 0) {
      if (fetch_phase_ == 1) return false;
      fetch_phase_ = 1;
      fetch_ = Begin(1);
      if (fetch_.left <= 0) return false;
    }
    const int stage_bytes = StageBytes(fetch_phase_);
    if (fetch_.begins) {
      const auto& rows = args_.rows[fetch_phase_];
      const Group group = Locate(fetch_phase_, fetch_.group);
      const TiledMatrix& matrix = args_.matrix[group.matrix];
      const int at = fetch_.step * stage_bytes;
      fetch_from_ = matrix.data + tiles_.Expert(group.tile) * matrix.expert_bytes +
                    int64_t{group.band} * rows.band_bytes + at;
      fetch_bytes_ = rows.band_bytes - at;
      ++fetch_.group;
      fetch_.step = 0;
    }
    ring_.Fetch(fetch_from_, min(stage_bytes, fetch_bytes_));
    fetch_from_ += stage_bytes;
    fetch_bytes_ -= stage_bytes;
    --fetch_.left;
    fetch_.begins = fetch_bytes_ <= 0;
    return true;
  }

  // The last warp, which has the fewest steps, finds the pairs' factors while weights are on their
  // way.
  __device__ __forceinline__ bool FindsFactors() const { return warp_ == Shape::kWarps - 1; }

  // Of pair lane: what FindFactors needs, to shared memory. Loads that follow those of weights come
  // late.
  __device__ __forceinline__ void FetchOfPair() {
    if (lane_ == 0) {
      m_.barrier = GridBarrier::Word();
      CopyAsync4(&m_.barrier_before, m_.barrier);
    }
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

  // Loads that are waited for when h and y are finished take as long as a step.
  __device__ __forceinline__ void FetchBiases() {
    const Projection& up = args_.up.projection[lane_ / Shape::kRows];
    const Projection& down = args_.down.projection;
    if (up.bias != nullptr) {
      ForEachOfH([&](int i, int, int tile, int, int n) {
        if (i != warp_) return;
        CopyAsync4(&m_.bias[0][threadIdx.x], up.bias + tiles_.Expert(tile) * up.bias_pitch + n);
      });
    }
    const int place = tiles_.Place(lane_);
    if (down.bias != nullptr && place != LayerTiles::kNone && down_bands_ > 0) {
      CopyAsync4(&m_.bias[1][threadIdx.x],
                 down.bias + tiles_.Expert(place / Shape::kTokens) * down.bias_pitch +
                     down_band_ * Shape::kRows + warp_);
    }
    CommitCopies();
  }
  // As tiled_epilogue.cuh's; the bias is here where it is the thread's first one.
  __device__ __forceinline__ float FinishProjection(const Projection& p, float value, int expert,
                                                    int row, int matrix, bool is_first) const {
    if (p.scale != nullptr) value *= p.scale[expert];
    if (p.bias != nullptr) {
      value += is_first ? m_.bias[matrix][threadIdx.x] : p.bias[expert * p.bias_pitch + row];
    }
    return value;
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
  template <Element kType>
  static __device__ __forceinline__ Eight ToFloat(const uint4& unit) {
    const uint32_t words[] = {unit.x, unit.y, unit.z, unit.w};
    Eight eight;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kType == Element::kBF16) {
        eight.v[2 * i] = __uint_as_float(words[i] << 16);
        eight.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else if (kType == Element::kF16) {
        const float2 two = __half22float2(Halves(words[i]));
        eight.v[2 * i] = two.x, eight.v[2 * i + 1] = two.y;
      } else {
        eight.v[i] = __uint_as_float(words[i]);
        eight.v[4 + i] = 0;
      }
    }
    return eight;
  }
  // The larger magnitudes of both, in float32 or in the halves of words.
  template <Element kType>
  static __device__ __forceinline__ uint32_t Larger(uint32_t max, const uint4& unit) {
    const uint32_t words[] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (const uint32_t word : words) {
      max = kType == Element::kF32 ? ::max(max, word & 0x7fffffffu)
                                   : __vmaxu2(max, word & 0x7fff7fffu);
    }
    return max;
  }
  // Such a maximum as that of float32.
  template <Element kType>
  static __device__ __forceinline__ uint32_t MaxBits(uint32_t max) {
    if (kType == Element::kF32) return max;
    max = ::max(max & 0xffffu, max >> 16);
    return kType == Element::kBF16 ? max << 16 : __float_as_uint(HalfBits(max));
  }
  // f(unit, its bits) for the units of this thread.
  template <typename F>
  __device__ __forceinline__ void ForEachUnit(F f) const {
#pragma unroll 1
    for (int n = 0, unit = x_unit_; unit < x_end_; ++n, unit += 32 * args_.x_warps) {
      uint4 bits = n == 0 ? x_first_[0] : x_first_[1];
      if (n > 1) bits = LoadX(unit);
      f(unit, bits);
    }
  }

  __device__ __forceinline__ int ExponentOfX(int token) const {
    const uint32_t max = lane_ < args_.x_warps ? m_.max[token * args_.x_warps + lane_] : 0;
    return ExponentOfBits(__reduce_max_sync(0xffffffffu, max));
  }

  // f(std::integral_constant<Element, type of x>)
  template <typename F>
  __device__ __forceinline__ void WithTypeOfX(F f) const {
    if (__builtin_expect(args_.x_type == Element::kBF16, true)) {
      f(std::integral_constant<Element, Element::kBF16>());
    } else if (args_.x_type == Element::kF16) {
      f(std::integral_constant<Element, Element::kF16>());
    } else {
      f(std::integral_constant<Element, Element::kF32>());
    }
  }
  __device__ __forceinline__ void FindMaxOfX() {
    uint32_t max = 0;
    WithTypeOfX([&](auto type) {
      constexpr Element kType = decltype(type)::value;
      ForEachUnit([&](int, const uint4& bits) { max = Larger<kType>(max, bits); });
      max = MaxBits<kType>(max);
    });
    max = __reduce_max_sync(0xffffffffu, max);
    if (lane_ == 0) m_.max[warp_] = max;
  }
  // As PrepareTiledRow in Layout::kF16Narrow but for the order of eight columns.
  __device__ __forceinline__ void ScaleX() {
    __syncthreads();
    if (x_row_ >= args_.tokens) return;
    float squares = 0;
    const float factor = PowerOfTwo(ExponentOfX(x_row_));
    auto* to = reinterpret_cast<uint4*>(x_ + x_row_ * args_.x_pitch);
    WithTypeOfX([&](auto type) {
      constexpr Element kType = decltype(type)::value;
      ForEachUnit([&](int unit, const uint4& bits) {
        const Eight eight = ToFloat<kType>(bits);
        uint32_t halves[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = eight.v[2 * i] * factor, high = eight.v[2 * i + 1] * factor;
          squares = fmaf(low, low, fmaf(high, high, squares));
          halves[i] = PackTwo<half2>(low, high);
        }
        if (kType == Element::kF32) {
          auto* words = reinterpret_cast<uint32_t*>(to + PlaceOfGroup(unit / 2)) + unit % 2;
          words[0] = halves[0], words[2] = halves[1];
        } else {
          to[PlaceOfGroup(unit)] = {halves[0], halves[2], halves[1], halves[3]};
        }
      });
    });
    m_.squares[warp_][lane_] = squares;
  }

  // Of pair lane, by the warp that has fetched what it needs.
  __device__ __forceinline__ void FindFactors() {
    const int place = tiles_.Place(lane_);
    const bool exists = place != LayerTiles::kNone;
    const int own = TokenOf(min(lane_, pairs_ - 1));
    BoundOfH known = {};
#pragma unroll 1
    for (int token = 0; token < args_.tokens; ++token) {
      const int exponent = ExponentOfX(token);
      float squares = 0;
#pragma unroll 1
      for (int i = 0; i < args_.x_warps; ++i) {
        squares += m_.squares[token * args_.x_warps + i][lane_];
      }
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
    for (pair -= args_.top_k; pair >= 0; pair -= args_.top_k) ++token;
    return token;
  }

  __device__ __forceinline__ void Multiply(int phase) {
    Walk at = Begin(phase);
    const int columns = args_.rows[phase].columns, steps = args_.rows[phase].steps;
    StepOfTwo x(columns);
    int tile = 0;
    if (at.left > 0) {
      tile = Locate(phase, at.group).tile;
      x.MoveTo(RowOf(phase, tile), phase == 0);
    }
    if (phase == 1) {
      if (threadIdx.x == 0) GridBarrier::Wait(m_.barrier, m_.barrier_before);
      __syncthreads();
    }
    if (at.left > 0) {
      x.Load(0, at.step * Shape::kStep);
      x.Load(1, at.step * Shape::kStep);
    }
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
          x.MoveTo(RowOf(phase, tile), phase == 0);
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
  // Of a token's row of a group.
  __device__ __forceinline__ float SumOf(int phase, uint32_t inverse_chunk, int group, int token,
                                         int row) const {
    const int begin = group * args_.rows[phase].steps;
    const int last = WarpOf(begin + args_.rows[phase].steps - 1, inverse_chunk);
    float sum = 0;
#pragma unroll 1
    for (int warp = WarpOf(begin, inverse_chunk); warp <= last; ++warp) {
      sum += Sums(group, warp)[token * Shape::kRows + row];
    }
    return sum;
  }
  // The warp that has a step, step / chunk, from 2^31 / chunk, nearly.
  static __device__ __forceinline__ int WarpOf(int step, uint32_t inverse_chunk) {
    return static_cast<int>(__umulhi(2u * static_cast<uint32_t>(step) + 1, inverse_chunk));
  }
  __device__ __forceinline__ uint32_t InverseChunk(int phase) const {
    return __float2uint_rn(__fdividef(0x1p31f, static_cast<float>(SpreadOf(phase).chunk)));
  }

  // A warp has a token of an item at a time, lanes below 16 the rows of gate and the others those
  // of up: f(i, group, tile, token, row).
  template <typename F>
  __device__ __forceinline__ void ForEachOfH(F f) const {
    const int log_tokens = args_.log_tokens;
#pragma unroll 1
    for (int i = warp_; i < items_ << log_tokens; i += Shape::kWarps) {
      const int token = i & ((1 << log_tokens) - 1), group = (i >> log_tokens) * matrices_;
      const Group at = Locate(0, group);
      if (token >= tiles_.Count(at.tile)) continue;
      f(i, group, at.tile, token, at.band * Shape::kRows + lane_ % Shape::kRows);
    }
  }
  __device__ __forceinline__ void FinishH() const {
    const int is_up = lane_ / Shape::kRows, row = lane_ % Shape::kRows;
    const Projection& projection = args_.up.projection[is_up];
    const uint32_t inverse_chunk = InverseChunk(0);
    if (args_.biased) WaitCopies<0>();
    WithActivation(args_.up.activation, [&](auto activation) {
      __syncthreads();
      ForEachOfH([&](int i, int group, int tile, int token, int n) {
        const int pair = tiles_.Pair(tile, token);
        if (matrices_ == 2) group += is_up;
        const float sum = SumOf(0, inverse_chunk, group, token, row) * m_.factor[pair];
        const float value =
            FinishProjection(projection, sum, tiles_.Expert(tile), n, 0, i == warp_);
        const float gate = __shfl_xor_sync(0xffffffffu, value, Shape::kRows);
        if (is_up) {
          const float h = FastActivate<decltype(activation)::value>(
              gate, value, args_.up.limit, args_.up.beta, args_.up.linear_beta);
          static_cast<half*>(args_.up.y)[pair * args_.up.y_pitch + n / 128 * 128 +
                                         NarrowPlace(TwoTokenPlace(n % 128))] =
              __float2half_rn(h * m_.h_factor[pair]);
        }
      });
    });
  }

  // What a part of down finds of its first band, where another part begins that: of row warp_ and
  // pair lane. Until it is there it is a NaN that no arithmetic gives, set before the grid's
  // barrier.
  static constexpr uint32_t kNotGiven = 0xffffffffu;
  __device__ __forceinline__ float* Given(int part) const {
    return args_.given + (part * Shape::kRows + warp_) * pairs_ + lane_;
  }
  static __device__ __forceinline__ void Give(float* to, float y) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(y) : "memory");
  }
  static __device__ __forceinline__ float WaitForGiven(const float* from) {
    uint32_t bits;
    do {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    } while (bits == kNotGiven);
    return __uint_as_float(bits);
  }

  // Warp r has row r of a band of down and its lanes the pairs, whose results come together in the
  // lane of their token's first one.
  __device__ __forceinline__ void FinishY() const {
    static_assert(Shape::kPairs == 32 && Shape::kRows == Shape::kWarps);
    const int place = tiles_.Place(lane_), top_k = args_.top_k;
    const int token = TokenOf(min(lane_, pairs_ - 1)), slot = lane_ - token * top_k;
    const uint32_t inverse_chunk = InverseChunk(1);
#pragma unroll 1
    for (int n = 0; n < down_bands_; ++n) {
      const int row = (down_band_ + n) * Shape::kRows + warp_;
      const int tile = place / Shape::kTokens, group = n * tiles_.Number() + tile - down_tile_;
      const bool gives = n == 0 && down_tile_ > 0;
      float y = 0;
      if (place == LayerTiles::kNone || group < 0) {
        // Nobody's, or of the part that has the band's beginning.
      } else if (group < down_groups_) {
        y = SumOf(1, inverse_chunk, group, place % Shape::kTokens, warp_);
        y = FinishProjection(args_.down.projection, y * m_.h_scale[lane_], tiles_.Expert(tile),
                             row, 1, n == 0) *
            m_.weight[lane_];
        if (gives) Give(Given(DownPart()), y);
      } else {
        y = WaitForGiven(Given(DownPart() + 1));
      }
      if (gives) continue;
      // In slot order, a few at a time, for a shuffle takes as long as several additions.
      constexpr int kAtOnce = 4;
      float sum = 0;
#pragma unroll 1
      for (int s = 0; s < top_k; s += kAtOnce) {
        float parts[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          parts[i] = __shfl_sync(0xffffffffu, y, lane_ - slot + s + i);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (s + i < top_k) sum += parts[i];
        }
      }
      if (slot == 0) Store(args_.down.y, token * args_.down.y_pitch + row, args_.down.y_type, sum);
    }
  }

  const TiledLayerArgs& args_;
  Memory& m_;
  const int warp_, lane_, matrices_, bands_, pairs_;
  const int x_row_, x_unit_, x_end_;  // of this thread: a row of x, its first unit, the row's end
  typename Shape::Ring ring_;
  const int id_;  // of pair lane
  const uint4 x_first_[2];
  LayerTiles tiles_;
  half* const x_;      // [tokens, x_pitch]
  float* const sums_;  // of StoreSums, a place for each warp's part of a group
  int items_;  // of this block
  // Of down: so many groups from a tile of a band on, in so many bands. Zeros first, for the
  // compiler takes what may be undefined to differ between lanes.
  int down_band_ = 0, down_tile_ = 0, down_groups_ = 0, down_bands_ = 0;
  Walk fetch_;
  int fetch_phase_ = 0;
  const uint8_t* fetch_from_ = nullptr;
  int fetch_bytes_ = 0;  // from there on, of the group
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
