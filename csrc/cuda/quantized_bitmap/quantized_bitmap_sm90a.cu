// Y = act(X . W^T + bias) for a weight in the quantised bitmap format and more than a few tokens,
// on Hopper. One decoding of the weight serves up to 128 tokens. Two kernels:
//   * the first writes X to the workspace as it will lie in shared memory, rounded if X is
//     quantised, and clears the workspace where the second one adds
//   * in the second each warpgroup of a CTA multiplies a group of four strips (64 rows), column of
//     chunks by column. A warp copies the chunks of one strip into a ring of its own and decodes
//     them into A fragments (decode.cuh), which wgmma multiplies by X. The CTA's warpgroups share
//     stages of X
//
//             W                                        X
//             |  each warp its strip's                 |  the warps in turns
//             v                                        v
//   +----------------------------------+     +-------------------------------+
//   | a ring of chunks for each warp   |     | stages: 256 columns by tile_n |
//   | full: per chunk                  |     | full, empty: per stage        |
//   +----------------------------------+     +-------------------------------+
//             |                                        |
//             v                                        v
//   decode to A fragments in registers  ->  wgmma  ->  sums  ->  Y
//
// An output tile is the strips of a CTA's warps by tile_n tokens. A work range (stream_k.cuh) is a
// sequence of columns of chunks of such tiles, which may begin and end within a tile. Warps of
// several CTAs then have sums of the same strip. The CTAs of a cluster, which have equal parts of a
// tile, exchange them through shared memory. Otherwise all but the last one leave theirs in the
// workspace, and the last one, which a count of multiplied columns tells, adds these to its own and
// stores Y. Integer sums are exact in any order, so they are added in one place. In fp32 each CTA's
// have a place of their own, and are added in the order of K. So results are repeatable bit for
// bit. With dependent launches the second kernel copies weights while the first one runs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/quantized_bitmap/chunk_ring.cuh"
#include "cuda/quantized_bitmap/decode.cuh"
#include "cuda/quantized_bitmap/rounded_x.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/stream_k.cuh"
#include "cuda/schedule/warp_arrival.cuh"
#include "plan/quantized_bitmap_sm90a.h"

namespace flash_llm {
namespace {

struct WgmmaParams {
  QuantWeight weight;
  const uint16_t* x;
  int64_t x_stride;
  // The workspace, see QuantWgmmaWorkspace.
  uint32_t* counts;  // [passes][strips] columns of chunks whose products are in `sums`
  void* sums;        // a strip: [tile_n / 2][32 lanes], in the order of wgmma's accumulators
  uint8_t* x_tiles;  // [passes][chunk_cols] stages, see WgmmaConfig
  float* token_scales;
  int* token_biases;  // what the bytes' 128 add to the sums, if these are integers
  Epilogue epilogue;
  RunSteps steps;
  StreamK schedule;  // a row is an output tile, a unit `unit_cols` columns of chunks
  int unit_cols;
  int cluster;  // CTAs in a cluster, which have equal parts of one output tile; 1: no clusters
  int slots;    // of sums
  int counts_bytes;
  int ring_bytes;  // of each warp
};

// What decoding a run of a plane takes besides: the scales of the lane's low and high elements, of
// types with scales for groups of columns, which a run is.
template <ValueType kType, bool kGroupScales = value_traits(kType).scales == ScaleGroup::kRowGroup>
struct RunScales {};
template <ValueType kType>
struct RunScales<kType, true> {
  typename QuantValues<kType>::GroupScale low, high;
};

// How X is multiplied. Each struct has
//   kValues        what X is multiplied as; if it is rounded, tokens have scales
//   kElementBytes  of X
//   Sum            of the sums
//   kIntegers      whether these are integers, which several CTAs add up in one place, and which
//                  contain what the 128 in the weight's bytes adds
//   kUnit          a sum is the sum of products divided by it and by the scales that it lacks
//   kProducts      products of a batch, the part of a plane that is decoded at a time
//   kBatches       batches of a plane
//   decode()       decodes batch kBatch, the next one of its run
//   multiply()     starts a product

// X as it is. A product is for a fragment, and a batch is half a word.
template <ValueType kType, int kTileN>
struct WideTileX {
  static constexpr XValues kValues = XValues::kUnrounded;
  static constexpr bool kIntegers = false;
  static constexpr int kElementBytes = 2;
  static constexpr int kProducts = 2;
  static constexpr int kBatches = 2 * kQuantWords;
  using Values = QuantValues<kType>;
  using Sum = float;
  static constexpr bool kGroupScales = value_traits(kType).scales == ScaleGroup::kRowGroup;
  static constexpr float kUnit = kGroupScales ? 1.0F : Values::kUnit;

  template <int kBatch, typename Run>
  __device__ __forceinline__ static void decode(const uint32_t (&bits)[kQuantWords], Run& run,
                                                const RunSteps& steps,
                                                const RunScales<kType>& scales, uint32_t (&a)[8]) {
    using Bytes = typename Values::Bytes;
    const uint32_t word = bits[kBatch / 2];
    uint32_t low[2], high[2];
    run.template take<kBatch % 2 * 2, Bytes>(word, steps, low[0], high[0]);
    run.template take<kBatch % 2 * 2 + 1, Bytes>(word, steps, low[1], high[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kGroupScales) {
        a[i * 4] = Values::template widen_scaled<0>(low[i], scales.low);
        a[i * 4 + 1] = Values::template widen_scaled<0>(high[i], scales.high);
        a[i * 4 + 2] = Values::template widen_scaled<1>(low[i], scales.low);
        a[i * 4 + 3] = Values::template widen_scaled<1>(high[i], scales.high);
      } else {
        a[i * 4] = Values::template widen<0>(low[i]);
        a[i * 4 + 1] = Values::template widen<0>(high[i]);
        a[i * 4 + 2] = Values::template widen<1>(low[i]);
        a[i * 4 + 3] = Values::template widen<1>(high[i]);
      }
    }
  }
#ifdef FLASH_LLM_SM90A
  __device__ __forceinline__ static void multiply(Sum (&sums)[kTileN / 2], const uint32_t* a,
                                                  uint64_t x) {
    ptx::wgmma<Values::kDense, kTileN>(sums, a, x);
  }
#endif
};

// X rounded to bytes. A product is for two fragments together, and a batch is a word, or half a
// word where the sums of many tokens leave too few registers for a whole one. For int8 the weight's
// bytes are value + 128, so the sums of products contain 128 times the sum of X.
template <ValueType kType, int kTileN, XValues kX>
struct ByteTileX {
  static constexpr XValues kValues = kX;
  static constexpr bool kIntegers = kX == XValues::kInt8;
  static constexpr int kElementBytes = 1;
  static constexpr int kProducts = kTileN < 128 ? 2 : 1;
  static constexpr int kBatches = 2 * kQuantWords / kProducts;
  using Sum = std::conditional_t<kIntegers, int, float>;
  static constexpr float kUnit = 1.0F;

  template <int kBatch, typename Run>
  __device__ __forceinline__ static void decode(const uint32_t (&bits)[kQuantWords], Run& run,
                                                const RunSteps& steps,
                                                const RunScales<kType>& /*scales*/,
                                                uint32_t (&a)[4 * kProducts]) {
    using Bytes = typename QuantValues<kType>::Bytes;
    constexpr int kFirst = kBatch * kProducts % 2 * 2;
    const uint32_t word = bits[kBatch * kProducts / 2];
    run.template take<kFirst, Bytes>(word, steps, a[0], a[1]);
    run.template take<kFirst + 1, Bytes>(word, steps, a[2], a[3]);
    if constexpr (kProducts == 2) {
      run.template take<2, Bytes>(word, steps, a[4], a[5]);
      run.template take<3, Bytes>(word, steps, a[6], a[7]);
    }
  }
#ifdef FLASH_LLM_SM90A
  __device__ __forceinline__ static void multiply(Sum (&sums)[kTileN / 2], const uint32_t* a,
                                                  uint64_t x) {
    if constexpr (kIntegers) {
      ptx::wgmma_u8_s8<kTileN>(sums, a, x);
    } else {
      ptx::wgmma_e4m3<kTileN>(sums, a, x);
    }
  }
#endif
};

// The chunks of a warp: those of one strip of the output tiles that its CTA multiplies.
struct TileChunks {
  uint32_t first_col, cols;  // counted through the output tiles; of a tile
  int tile_strips, strip;    // of a tile; in it
  uint32_t total;

  __device__ __forceinline__ TileChunks(const WgmmaParams& p, int worker, int tile_strips,
                                        int strip)
      : first_col(p.schedule.first_unit(worker) * p.unit_cols),
        cols(p.weight.chunk_cols),
        tile_strips(tile_strips),
        strip(strip),
        total(p.schedule.first_unit(worker + 1) * p.unit_cols - first_col) {}

  __device__ __forceinline__ ChunkPlace operator[](uint32_t chunk) const {
    const uint32_t col = first_col + chunk, tile = col / cols;
    return {int64_t{tile} * tile_strips + strip, static_cast<int>(col - tile * cols)};
  }
};

// Of a CTA of the first kernel. Few, so that a CTA of the second one can begin beside it and copy
// weights.
constexpr int kTokenThreads = 128;

template <ValueType kTypeArg, int kTileNArg, int kWarpgroupsArg, XValues kX, int kXStagesArg>
struct WgmmaConfig {
  using Chunks = TileChunks;
  using WeightCopy = BulkCopy;
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kPlanes = quant_planes(kType);  // of a chunk
  static constexpr int kFixedUnits = quant_fixed_units(kType);
  static constexpr bool kGroupScales = value_traits(kType).scales == ScaleGroup::kRowGroup;
  static constexpr ValueType kDense = QuantValues<kType>::kDense;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kXStages = kXStagesArg;
  static constexpr int kWarps = 4 * kWarpgroupsArg;
  // A separate warp that copies X would cost the registers of four warps: each of an SM's four
  // schedulers has a quarter of them, and one would have a fifth warp.
  static constexpr int kThreads = 32 * kWarps;
  using X = std::conditional_t<kX == XValues::kUnrounded, WideTileX<kType, kTileN>,
                               ByteTileX<kType, kTileN, kX>>;
  using Sum = typename X::Sum;
  // The compiler may use the registers of an SM for so many threads: those of a CTA of the first
  // kernel are left, except where the accumulators need them.
  static constexpr bool kLeavesRegisters = kWarps == 16 && kTileN < (X::kIntegers ? 128 : 64);
  static constexpr int kBoundThreads = kThreads + (kLeavesRegisters ? kTokenThreads : 0);
  static constexpr int kXColBytes = kQuantPlaneK * kTileN * X::kElementBytes;
  static constexpr int kTokenParts = quant_wgmma_token_parts(kTileN);
  static constexpr int kStripSums = kQuantStripM * kTileN;
  static constexpr int kTileSums = kWarps * kStripSums;

  // The slot of a CTA's sums of an output tile, which begins in the CTA's work range or before it.
  __device__ __forceinline__ static int slot(int worker, bool begins_tile) {
    return X::kIntegers ? worker : 2 * worker + (begins_tile ? 1 : 0);
  }

  // A stage, X of a column of planes, is kXColBytes / kBoxBytes K-major operands of wgmma with a
  // 128-byte swizzle: a row of 128 bytes for each token. Returns where 16 bytes of a token are.
  static constexpr int kBoxBytes = kTileN * 128;
  __device__ __forceinline__ static int x_offset(int token, int sixteen) {
    return sixteen / 8 * kBoxBytes + token * 128 + (sixteen % 8 ^ token % 8) * 16;
  }
};

// The grid: C::kTokenParts CTAs for each token, which write a part of its columns each, and others,
// which clear a part each.
template <typename C>
__global__ void __launch_bounds__(kTokenThreads)
    write_tokens_kernel(const __grid_constant__ WgmmaParams p, int tokens) {
  allow_next_kernel();
  wait_for_previous_kernel();  // it may write X, and use the workspace
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int token = block / C::kTokenParts, part = block % C::kTokenParts;
  if (token >= tokens) {
    const int ctas = static_cast<int>(gridDim.x) - tokens * C::kTokenParts;
    const int cta = block - tokens * C::kTokenParts;
    const int4 zeros = make_int4(0, 0, 0, 0);
    for (int i = cta * kTokenThreads + thread; i < p.counts_bytes / 16; i += ctas * kTokenThreads) {
      reinterpret_cast<int4*>(p.counts)[i] = zeros;
    }
    if constexpr (C::X::kIntegers) {
      for (int i = cta; i < tokens / C::kTileN * p.slots; i += ctas) {
        // The slot is used only if an output tile begins in the CTA's work range and ends after it.
        const int end = p.schedule.first_unit(i % p.slots + 1);
        const int tile_begin = end / p.schedule.units_per_row * p.schedule.units_per_row;
        if (end == tile_begin || tile_begin < p.schedule.first_unit(i % p.slots)) continue;
        auto* sums = reinterpret_cast<int4*>(static_cast<typename C::Sum*>(p.sums) +
                                             int64_t{i} * C::kTileSums);
        for (int j = thread; j < C::kTileSums / 4; j += kTokenThreads) sums[j] = zeros;
      }
    }
    return;
  }
  const uint16_t* row = p.x + token * p.x_stride;
  // Each row of X is followed by zeros up to the next multiple of 8 columns.
  const auto eight = [&](int i) {
    return token < p.epilogue.n && i * 8 < p.weight.k ? reinterpret_cast<const uint4*>(row)[i]
                                                      : make_uint4(0, 0, 0, 0);
  };
  constexpr int kUnits = kQuantPlaneK / 16;
  const int x_cols = p.weight.chunk_cols * C::kPlanes;
  uint8_t* tile = p.x_tiles + int64_t{token / C::kTileN} * x_cols * C::kXColBytes;
  const auto store = [&](int unit, int half, uint4 sixteen_bytes) {
    constexpr int kHalves = C::X::kElementBytes;
    const int in_col = unit % kUnits * kHalves + half;
    uint8_t* col = tile + int64_t{unit / kUnits} * C::kXColBytes;
    *reinterpret_cast<uint4*>(col + C::x_offset(token % C::kTileN, in_col)) = sixteen_bytes;
  };
  if constexpr (C::X::kValues == XValues::kUnrounded) {
    // A fragment's columns 4 t + 2 and 4 t + 3 stand for columns 2 t + 8 and 2 t + 9 of A.
    for (int i = part * kTokenThreads + thread; i < x_cols * kUnits;
         i += C::kTokenParts * kTokenThreads) {
      const uint4 first = eight(2 * i), second = eight(2 * i + 1);
      store(i, 0, make_uint4(first.x, first.z, second.x, second.z));
      store(i, 1, make_uint4(first.y, first.w, second.y, second.w));
    }
  } else {
    uint32_t largest = 0;
    for (int i = thread; i * 8 < p.weight.k; i += kTokenThreads) {
      largest = larger_magnitudes<C::kDense>(largest, eight(i));
    }
    const TokenScale scale = scale_of_token<C::X::kValues, C::kDense>(largest);
    const auto rounded = [&](uint32_t low, uint32_t high) {
      return round_elements<C::X::kValues, C::kDense>(make_uint2(low, high), scale.inverse);
    };
    int sum = 0;
    for (int i = part * kTokenThreads + thread; i < x_cols * kUnits;
         i += C::kTokenParts * kTokenThreads) {
      const uint4 first = eight(2 * i), second = eight(2 * i + 1);
      const uint4 bytes = make_uint4(rounded(first.x, first.y), rounded(first.z, first.w),
                                     rounded(second.x, second.y), rounded(second.z, second.w));
      if constexpr (C::X::kIntegers) {
        sum = add_bytes(bytes.x, add_bytes(bytes.y, sum));
        sum = add_bytes(bytes.z, add_bytes(bytes.w, sum));
      }
      store(i, 0, bytes);
    }
    if (thread == 0 && part == 0) p.token_scales[token] = scale.scale;
    if constexpr (C::X::kIntegers) {
      sum = add_threads(sum);
      if (thread == 0) p.token_biases[part * tokens + token] = kQuantZero * sum;
    }
  }
}

#ifdef FLASH_LLM_SM90A

// Where things are in a CTA's shared memory.
struct WgmmaSmem {
  uint32_t base;
  int ring_bytes;

  // The bits and columns of a chunk without values.
  static constexpr int kZerosBytes = kQuantMaxPlanes * (kQuantBitsBytes + kQuantColumnsBytes);
  static constexpr int kBarriers = (kZerosBytes + 127) / 128 * 128;
  static constexpr int kMaxStages = 8;
  static_assert(kBarriers + (2 * kMaxStages + kQuantMaxWarps * kQuantRingChunks) * 8 <=
                kQuantWgmmaFixedBytes);

  __device__ __forceinline__ uint32_t zeros() const { return base; }
  __device__ __forceinline__ uint32_t x_full(int stage) const {
    return base + kBarriers + stage * 8;
  }
  __device__ __forceinline__ uint32_t x_empty(int stage) const {
    return x_full(kMaxStages + stage);
  }
  // kQuantRingChunks barriers.
  __device__ __forceinline__ uint32_t full(int warp) const {
    return x_full(2 * kMaxStages + warp * kQuantRingChunks);
  }
  __device__ __forceinline__ uint32_t ring(int warp) const {
    return base + kQuantWgmmaFixedBytes + warp * ring_bytes;
  }
  __device__ __forceinline__ uint32_t x(int warps) const {
    return base + quant_wgmma_x_offset(warps * ring_bytes);
  }
};

// Decodes batch kBatch of a plane into `a` and starts its products with X of its columns at `x`.
// The wait is for all products but the latest ones, so for those that have read `a`.
template <typename C, int kBatch, typename Run>
__device__ __forceinline__ void multiply_batch(const uint32_t (&bits)[kQuantWords], Run& run,
                                               const RunSteps& steps,
                                               const RunScales<C::kType>& scales, uint32_t x,
                                               uint32_t (&a)[4 * C::X::kProducts],
                                               typename C::Sum (&sums)[C::kTileN / 2]) {
  // A product takes 32 bytes of each token.
  constexpr int kByte = kBatch * C::X::kProducts * 32;
  constexpr int kOffset = kByte / 128 * C::kBoxBytes + kByte % 128;
  ptx::wgmma_wait<1>();
  C::X::template decode<kBatch>(bits, run, steps, scales, a);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::X::kProducts; ++i) {
    C::X::multiply(sums, a + 4 * i, ptx::wgmma_descriptor(x, kOffset + 32 * i));
  }
  ptx::wgmma_commit();
}

// The batches of a run, from kBatch to the one before kEnd.
template <typename C, int kBatch, int kEnd, typename Run>
__device__ __forceinline__ void multiply_run(const uint32_t (&bits)[kQuantWords], Run& run,
                                             const RunSteps& steps,
                                             const RunScales<C::kType>& scales, uint32_t x,
                                             uint32_t (&a)[2][4 * C::X::kProducts],
                                             typename C::Sum (&sums)[C::kTileN / 2]) {
  if constexpr (kBatch < kEnd) {
    multiply_batch<C, kBatch>(bits, run, steps, scales, x, a[kBatch % 2], sums);
    multiply_run<C, kBatch + 1, kEnd>(bits, run, steps, scales, x, a, sums);
  }
}

// The scales of a run, the columns of group `group` of a chunk: `two` are those that
// ChunkRing::load_group_scales() returned.
template <typename C>
__device__ __forceinline__ RunScales<C::kType> run_scales(uint32_t two, int group) {
  if constexpr (C::kGroupScales) {
    const uint32_t pair = __shfl_sync(~0U, two, group, 4);
    using Scale = typename QuantValues<C::kType>::GroupScale;
    return {Scale(static_cast<uint16_t>(pair)), Scale(static_cast<uint16_t>(pair >> 16))};
  } else {
    return {};
  }
}

// The stages of X, which all warps read: one column of planes after the other. They take turns in
// filling them, because a warp that always did so would come last. All lanes must call its
// functions.
template <typename C>
class XStages {
 public:
  // Starts to fill the stages. The columns are `count` ones from `first` on, of the `cols` columns
  // at `x`, round and round. X must have been written.
  __device__ __forceinline__ XStages(const WgmmaSmem& smem, const uint8_t* x, int cols, int first,
                                     int count, int warp, int lane)
      : smem_(smem), x_(x), cols_(cols), lane_(lane) {
    if (warp == 0) {
      for (int i = 0; i < min(C::kXStages, count); ++i) fill(i, (first + i) % cols);
    }
    // With the i-th column it is the turn of warp i % kWarps.
    until_turn_ = warp < kLag ? warp + C::kWarps : warp;
    const int nth = until_turn_ - kLag + C::kXStages;
    next_ = (first + nth) % cols;
    left_ = count - nth;
  }

  // Waits for the column to be multiplied next. Returns its address.
  __device__ __forceinline__ uint32_t wait() const {
    ptx::mbarrier_wait(smem_.x_full(stage_), phase_);
    return address(stage_);
  }

  __device__ __forceinline__ void advance() {
    if (++stage_ == C::kXStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
    released_ = false;
  }

  // The warp has multiplied the columns before the one that wait() returns.
  __device__ __forceinline__ void release() {
    if (released_) return;
    released_ = true;
    arrive_for_warp(smem_.x_empty(stage_ == 0 ? C::kXStages - 1 : stage_ - 1), lane_);
  }

  // Fills the stage of the column that was multiplied kLag columns ago, when all warps have
  // released it, if it is this warp's turn. The lag keeps it from waiting for slower ones. To be
  // called once for each column.
  __device__ __forceinline__ void refill() {
    if (--until_turn_ >= 0) return;
    until_turn_ = C::kWarps - 1;
    if (left_ <= 0) return;
    const uint32_t stage = stage_ >= kLag ? stage_ - kLag : stage_ + C::kXStages - kLag;
    if (lane_ == 0) {
      ptx::mbarrier_wait(smem_.x_empty(stage), stage_ >= kLag ? phase_ : phase_ ^ 1);
    }
    fill(stage, next_);
    next_ = (next_ + C::kWarps) % cols_;
    left_ -= C::kWarps;
  }

 private:
  __device__ __forceinline__ uint32_t address(uint32_t stage) const {
    return smem_.x(C::kWarps) + stage * C::kXColBytes;
  }

  __device__ __forceinline__ void fill(uint32_t stage, int col) const {
    if (lane_ == 0) {
      ptx::mbarrier_arrive_expect_tx(smem_.x_full(stage), C::kXColBytes);
      ptx::bulk_copy(address(stage), x_ + int64_t{col} * C::kXColBytes, C::kXColBytes,
                     smem_.x_full(stage));
    }
    __syncwarp();
  }

  static constexpr int kLag = C::kXStages > 2 ? C::kXStages / 2 : 1;

  const WgmmaSmem& smem_;
  const uint8_t* x_;
  int cols_, lane_;
  int until_turn_;   // columns before this warp's turn
  int next_, left_;  // the column that it copies then, and the columns from there on
  int stage_ = 0;
  uint32_t phase_ = 0;
  bool released_ = true;
};

// Multiplies plane kPlane of a chunk by the next column of X. When the second batch is decoded, the
// products with the column before it are complete.
template <typename C, int kPlane>
__device__ __forceinline__ void multiply_plane(uint32_t chunk, uint32_t top, uint32_t two_scales,
                                               const RunSteps& steps, XStages<C>& stages, int lane,
                                               uint32_t (&a)[2][4 * C::X::kProducts],
                                               typename C::Sum (&sums)[C::kTileN / 2]) {
  constexpr int kFirstBit = QuantValues<C::kType>::Bytes::first_bit(kPlane);
  constexpr int kEnd = C::X::kBatches;
  const QuantPlane<C::kPlanes> plane(top, kPlane, lane);
  RunReader<true> up(chunk, lane * steps.column, kFirstBit);
  const auto up_scales = run_scales<C>(two_scales, 2 * kPlane);
  const uint32_t x = stages.wait();
  multiply_run<C, 0, 2>(plane.bits, up, steps, up_scales, x, a, sums);
  stages.release();
  multiply_run<C, 2, kEnd / 2>(plane.bits, up, steps, up_scales, x, a, sums);
  // Half a column later the other warps have most often released it too.
  stages.refill();
  RunReader<false> down(top, plane.column, kFirstBit);
  const auto down_scales = run_scales<C>(two_scales, 2 * kPlane + 1);
  multiply_run<C, kEnd / 2, kEnd>(plane.bits, down, steps, down_scales, x, a, sums);
  stages.advance();
}

// How many columns of chunks of a strip have their sums in the workspace.
__device__ __forceinline__ uint32_t* count_of(const WgmmaParams& p, int strip) {
  return p.counts + int64_t{blockIdx.y} * p.weight.strips + strip;
}

// Brings the sums of a strip together: `sums` are those of `cols` columns of chunks, which worker
// `worker` has multiplied, and warps of other CTAs have the others. Lane 0 has seen the count
// `seen`. Returns whether this warp is the last one of them, and `sums` all sums; else they are in
// the workspace.
template <typename C>
__device__ __forceinline__ bool meet(const WgmmaParams& p, int worker, int strip, int cols,
                                     int lane, uint32_t seen,
                                     typename C::Sum (&sums)[C::kTileN / 2]) {
  const auto all_cols = static_cast<uint32_t>(p.weight.chunk_cols);
  const auto own_cols = static_cast<uint32_t>(cols);
  const int first_unit = strip / C::kWarps * p.schedule.units_per_row;
  const int first = p.schedule.worker_of(first_unit);
  const auto place_of = [&](int owner) {
    const int64_t slot = int64_t{blockIdx.y} * p.slots + C::slot(owner, owner == first);
    return static_cast<typename C::Sum*>(p.sums) + slot * C::kTileSums +
           strip % C::kWarps * C::kStripSums + lane;
  };
  bool left = false;
  if (__shfl_sync(~0U, seen, 0) + own_cols != all_cols) {
    typename C::Sum* to = place_of(C::X::kIntegers ? first : worker);
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) {
      if constexpr (C::X::kIntegers) {
        ptx::add_global(to + i * 32, sums[i]);
      } else {
        to[i * 32] = sums[i];  // no other CTA's sum is in the same place
      }
    }
    __syncwarp();
    uint32_t before = 0;
    if (lane == 0) before = ptx::add_acq_rel(count_of(p, strip), own_cols);
    if (__shfl_sync(~0U, before, 0) + own_cols != all_cols) return false;
    left = true;
  }
  __syncwarp();  // lane 0 has seen the others' sums
  if constexpr (C::X::kIntegers) {
    const typename C::Sum* from = place_of(first);
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) {
      sums[i] = __ldcg(from + i * 32) + (left ? 0 : sums[i]);
    }
  } else {
    const int last = p.schedule.worker_of(first_unit + p.schedule.units_per_row - 1);
    // So many loads at a time; more would spill.
    constexpr int kAtOnce = C::kTileN < 32 ? C::kTileN / 2 : C::kTileN < 128 ? 16 : 8;
    constexpr int kAhead = 4;
#pragma unroll
    for (int begin = 0; begin < C::kTileN / 2; begin += kAtOnce) {
      typename C::Sum total[kAtOnce] = {};
#pragma unroll 1
      for (int other = first; other <= last; other += kAhead) {
        typename C::Sum stored[kAhead][kAtOnce];
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          const typename C::Sum* from = place_of(min(other + ahead, last)) + begin * 32;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) stored[ahead][i] = __ldcg(from + i * 32);
        }
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          if (other + ahead > last) break;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            total[i] += other + ahead == worker ? sums[begin + i] : stored[ahead][i];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[begin + i] = total[i];
    }
  }
  return true;
}

// The same in a cluster, whose CTAs have equal parts of one output tile: each CTA owns some of the
// strips, and the others store their sums of these in its shared memory, where the rings and stages
// have been read. Returns whether this CTA owns the warp's strip, so that `sums` are all sums.
template <typename C>
__device__ __forceinline__ bool meet_in_cluster(const WgmmaSmem& smem, int cluster, int warp,
                                                int lane, typename C::Sum (&sums)[C::kTileN / 2]) {
  const int rank = static_cast<int>(ptx::cluster_rank()), owned = C::kWarps / cluster;
  const int owner = warp / owned;
  // Where the owner has the sums of the strip, those of one CTA after the other.
  const uint32_t place =
      smem.ring(0) + warp % owned * (cluster - 1) * C::kStripSums * 4 + lane * 16;
  ptx::cluster_sync();  // all warps have read their rings and stages
  if (rank != owner) {
    const int other = rank - (rank > owner ? 1 : 0);
    const uint32_t to = ptx::cluster_address(place + other * C::kStripSums * 4, owner);
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; i += 4) {
      const auto bits = [&](int e) { return reinterpret_cast<const uint32_t&>(sums[i + e]); };
      ptx::store_cluster_v4(to + i * 128, make_uint4(bits(0), bits(1), bits(2), bits(3)));
    }
  }
  ptx::cluster_sync();
  if (rank != owner) return false;
#pragma unroll 1
  for (int other = 0; other < cluster - 1; ++other) {
    const uint32_t from = place + other * C::kStripSums * 4;
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; i += 4) {
      const uint4 four = ptx::load_shared_v4(from + i * 128);
      const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i + e] += reinterpret_cast<const typename C::Sum&>(bits[e]);
      }
    }
  }
  return true;
}

// Stores Y of a strip from all of its sums.
template <typename C, bool kActivates>
__device__ __forceinline__ void store_strip(const WgmmaParams& p, int strip, int lane,
                                            const typename C::Sum (&sums)[C::kTileN / 2]) {
  float2 rows = make_float2(1.0F, 1.0F);
  if constexpr (!C::kGroupScales) {
    const float* scales = p.weight.row_scales(strip);
    if (scales != nullptr) rows = make_float2(scales[lane / 4], scales[lane / 4 + 8]);
  }
  // Otherwise addresses would be kept in registers from tile to tile.
  const auto token = static_cast<int>(ptx::opaque(blockIdx.y * C::kTileN));
  const int tokens = static_cast<int>(gridDim.y) * C::kTileN;
  // So many tokens at a time; more would spill.
  constexpr int kAtOnce = C::kTileN < 32 ? C::kTileN : C::kTileN < 128 ? 32 : 16;
#pragma unroll
  for (int first = 0; first < C::kTileN; first += kAtOnce) {
    float scaled[kAtOnce / 2];
#pragma unroll
    for (int i = 0; i < kAtOnce / 2; i += 4) {
      float2 factors = make_float2(C::X::kUnit, C::X::kUnit);
      typename C::Sum biases[2] = {};
      const int pair = token + lane % 4 * 2 + first + i * 2;
      if constexpr (C::X::kValues != XValues::kUnrounded) {
        factors = *reinterpret_cast<const float2*>(p.token_scales + pair);
      }
#pragma unroll
      for (int part = 0; C::X::kIntegers && part < C::kTokenParts; ++part) {
        const int2 both = *reinterpret_cast<const int2*>(p.token_biases + part * tokens + pair);
        biases[0] += both.x;
        biases[1] += both.y;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scaled[i + e] = static_cast<float>(sums[first / 2 + i + e] - biases[e % 2]) *
                        (e % 2 == 0 ? factors.x : factors.y) * (e < 2 ? rows.x : rows.y);
      }
    }
    p.epilogue.store_strip<C::kDense, kAtOnce, kActivates>(
        token + first, int64_t{strip} * kQuantStripM, lane, scaled);
  }
}

#endif  // FLASH_LLM_SM90A

// The grid: CTAs that share the output tiles; blocks of tokens.
template <typename C>
__global__ void __launch_bounds__(C::kBoundThreads, 1)
    quantized_wgmma_kernel(const __grid_constant__ WgmmaParams p) {
#ifdef FLASH_LLM_SM90A
  extern __shared__ uint8_t smem_bytes[];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
  const WgmmaSmem smem = {(ptx::smem_address(smem_bytes) + 1023) / 1024 * 1024, p.ring_bytes};
  allow_next_kernel();
  if (lane == 0) {
    for (int i = 0; i < kQuantRingChunks; ++i) {
      ptx::mbarrier_init(smem.full(warp) + i * 8, BulkCopy::kArrivals);
    }
    if (warp == 0) {
      for (int i = 0; i < C::kXStages; ++i) {
        ptx::mbarrier_init(smem.x_full(i), 1);
        ptx::mbarrier_init(smem.x_empty(i), C::kWarps * kWarpArrivals);
      }
    }
    ptx::mbarrier_init_fence();
  }
  for (int i = static_cast<int>(threadIdx.x); i < WgmmaSmem::kZerosBytes / 4; i += C::kThreads) {
    ptx::store_shared_u32(smem.zeros() + i * 4, 0);
  }
  __syncthreads();
  const int worker = static_cast<int>(blockIdx.x);
  const TileChunks chunks(p, worker, C::kWarps, warp);
  ChunkRing<C> ring(p.weight, chunks, smem.full(warp), smem.ring(warp), p.ring_bytes, lane);
  LaneScales next_scales;
  if constexpr (C::kGroupScales) next_scales = ring.template load_group_scales<0>();
  wait_for_previous_kernel();  // kernels before it may use the workspace
  int left = static_cast<int>(chunks.total);
  int tile = static_cast<int>(chunks.first_col) / p.weight.chunk_cols;
  int col = static_cast<int>(chunks.first_col) - tile * p.weight.chunk_cols;
  const int x_cols = p.weight.chunk_cols * C::kPlanes;
  XStages<C> stages(smem, p.x_tiles + int64_t{blockIdx.y} * x_cols * C::kXColBytes, x_cols,
                    col * C::kPlanes, left * C::kPlanes, warp, lane);
  const RunSteps steps = p.steps;
  uint32_t a[2][4 * C::X::kProducts];
#pragma unroll 1
  while (left > 0) {
    typename C::Sum sums[C::kTileN / 2] = {};
    const int cols = min(p.weight.chunk_cols - col, left);
    const int strip = tile * C::kWarps + warp;
    uint32_t seen = 0;
    left -= cols;
#pragma unroll 1
    for (int i = 0; i < cols; ++i) {
      int rows;
      const uint32_t chunk = ring.wait(&rows);
      // Absent values are multiplied too: X may be infinite there.
      const uint32_t top = rows == 0 ? smem.zeros() : chunk + rows * kQuantRowBytes;
      // The others are most often there before the last column: those of later columns began with
      // this tile.
      if (i == cols - 1 && cols < p.weight.chunk_cols && p.cluster == 1 &&
          strip < p.weight.strips) {
        seen = ptx::load_acquire(count_of(p, strip));
      }
      const uint32_t two_scales = next_scales.low | next_scales.high << 16;
      if constexpr (C::kGroupScales) next_scales = ring.template load_group_scales<1>();
      multiply_plane<C, 0>(chunk, top, two_scales, steps, stages, lane, a, sums);
      if constexpr (C::kPlanes == 2) {
        multiply_plane<C, 1>(chunk, top, two_scales, steps, stages, lane, a, sums);
      }
      ring.release();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_complete(sums);
    stages.release();
    bool all = cols == p.weight.chunk_cols;
    if (p.cluster > 1) {
      all = meet_in_cluster<C>(smem, p.cluster, warp, lane, sums);
    } else if (!all && strip < p.weight.strips) {
      all = meet<C>(p, worker, strip, cols, lane, seen, sums);
    }
    // Chosen once for all sums: the activations' code is long, and most calls would have to fetch
    // it into the instruction cache.
    if (all && strip < p.weight.strips) {
      if (p.epilogue.activation == Activation::kNone) {
        store_strip<C, false>(p, strip, lane, sums);
      } else {
        store_strip<C, true>(p, strip, lane, sums);
      }
    }
    col = 0;
    ++tile;
  }
#endif
}

template <typename C>
Status launch(const WgmmaParams& params, int smem_bytes, bool prefetch, cudaStream_t stream) {
  const Status sized = allow_smem("cudaFuncSetAttribute(quantized_wgmma_kernel)",
                                  quantized_wgmma_kernel<C>, smem_bytes);
  if (!sized.ok()) return sized;
  const auto passes = static_cast<unsigned>((params.epilogue.n + C::kTileN - 1) / C::kTileN);
  const unsigned tokens = passes * C::kTileN, token_ctas = tokens * C::kTokenParts;
  // Two CTAs for each SM in all, which fit beside a CTA of the second kernel, or more.
  const unsigned sms = static_cast<unsigned>(params.schedule.workers) * passes;
  const unsigned clearing = 2 * sms > token_ctas + sms ? 2 * sms - token_ctas : sms;
  const Status written =
      launch_kernel("write_tokens_kernel launch", write_tokens_kernel<C>, token_ctas + clearing,
                    kTokenThreads, 0, prefetch, stream, params, static_cast<int>(tokens));
  if (!written.ok()) return written;
  // Without `prefetch` it begins, and reads the weight, when the previous call has finished,
  // because the first kernel does.
  return launch_clusters("quantized_wgmma_kernel launch", quantized_wgmma_kernel<C>,
                         static_cast<unsigned>(params.cluster),
                         dim3(static_cast<unsigned>(params.schedule.workers), passes), C::kThreads,
                         smem_bytes, true, stream, params);
}

template <ValueType kType>
Status launch_config(int config, const WgmmaParams& params, int smem_bytes, bool prefetch,
                     cudaStream_t stream) {
  int index = 0;
#define FLASH_LLM_ROW(name, tile_n, warpgroups, x, x_stages)                                 \
  if (config == index++) {                                                                   \
    constexpr QuantWgmmaConfig kConfig = {#name, tile_n, warpgroups, x, x_stages};           \
    if constexpr (kConfig.multiplies(kType)) {                                               \
      return launch<WgmmaConfig<kType, tile_n, warpgroups, x, x_stages>>(params, smem_bytes, \
                                                                         prefetch, stream);  \
    }                                                                                        \
  }
  FLASH_LLM_QUANT_WGMMA_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no quantised bitmap configuration for wgmma has index " +
                               std::to_string(config));
}

}  // namespace

Status cuda::spmm_quantized_bitmap_sm90a(const SpmmPlan& plan, const SpmmArgs& args,
                                         void* workspace, bool prefetch, cudaStream_t stream) {
  const Status fits = check_plan(plan, KernelFamily::kQuantizedBitmapSm90a, args);
  if (!fits.ok()) return fits;
  if (plan.config < 0 || plan.config >= static_cast<int>(quant_wgmma_configs().size())) {
    return Status::invalid_value("no quantised bitmap configuration for wgmma has index " +
                                 std::to_string(plan.config));
  }
  const QuantWgmmaConfig& config = quant_wgmma_configs()[static_cast<size_t>(plan.config)];
  const ValueType type = args.weight.value_type;
  if (!config.multiplies(type) || plan.warps != config.warps() ||
      plan.ring_bytes < quant_wgmma_min_ring_bytes(config, type) ||
      plan.ring_bytes % (plan.warps * 128) != 0 || plan.ctas != plan.work.workers ||
      plan.work.rows != config.tiles(args.weight.m) ||
      plan.work.cols * plan.unit_cols != num_quant_chunks(type, args.weight.k)) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  const QuantWgmmaWorkspace parts(config, plan);
  if (Status enough = check_launch(plan, parts.bytes()); !enough.ok()) return enough;
  WgmmaParams params = {};
  params.weight = QuantWeight::of(args.weight);
  params.x = args.x;
  params.x_stride = args.x_stride;
  params.counts = static_cast<uint32_t*>(workspace);
  params.sums = static_cast<uint8_t*>(workspace) + parts.counts_bytes;
  params.x_tiles = static_cast<uint8_t*>(params.sums) + parts.sums_bytes;
  params.token_scales = reinterpret_cast<float*>(params.x_tiles + parts.x_bytes);
  params.token_biases = reinterpret_cast<int*>(params.x_tiles + parts.x_bytes + parts.token_bytes);
  params.epilogue = {args.bias, args.y, args.weight.m, args.n, args.activation};
  params.steps = RunSteps{};
  params.schedule = StreamK(plan.work);
  params.unit_cols = plan.unit_cols;
  params.cluster = quant_wgmma_cluster(plan.work);
  params.slots = static_cast<int>(parts.slots);
  params.counts_bytes = static_cast<int>(parts.counts_bytes);
  params.ring_bytes = plan.ring_bytes / plan.warps;
  const int smem_bytes = quant_wgmma_smem_bytes(config, plan.ring_bytes);
  return run_for_type(type, [&](auto typed) {
    return launch_config<decltype(typed)::value>(plan.config, params, smem_bytes, prefetch, stream);
  });
}

}  // namespace flash_llm
