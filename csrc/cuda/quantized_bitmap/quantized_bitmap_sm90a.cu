// Y = act(X . W^T + bias) for a weight in the quantised bitmap format and up to 64 tokens, on
// Hopper. One decoding of the weight serves all tokens. Two kernels:
//   * the first writes X to the workspace as it will lie in shared memory, rounded if X is
//     quantised, and clears the workspace where the second one adds
//   * in the second each warpgroup of a CTA multiplies a group of four strips (64 rows), column of
//     chunks by column. A warp copies the chunks of one strip into a ring of its own and decodes
//     them into A fragments (decode.cuh), which wgmma multiplies by X. The CTA's warpgroups share
//     stages of X, which one more warp copies
//
//             W                                        X
//             |  each warp its strip's                 |  one thread
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
// several CTAs then have sums of the same strip. All but the last one leave theirs in the
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
#include "cuda/quantized_bitmap/int8_x.cuh"
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
  int* token_biases;  // what the bytes' 128 add to the sums
  Epilogue epilogue;
  RunSteps steps;
  StreamK schedule;       // a row is an output tile
  int slots;              // of sums
  int64_t cleared_bytes;  // from `counts` on
  int ring_bytes;         // of each warp
};

using Plane = QuantPlane<1>;

// How X is multiplied. Each struct has
//   kQuantized     whether tokens have scales
//   kElementBytes  of X
//   Sum            of the sums
//   kBatches       parts of a chunk, each of which is decoded into A fragments of two products
//   decode()       decodes batch kBatch, the next one of its run
//   multiply()     starts a product
//   add()          adds a sum to one in the workspace

// X as it is. A batch is half a word: a product for each of two fragments.
template <ValueType kType, int kTileN>
struct WideTileX {
  static constexpr bool kQuantized = false;
  static constexpr int kElementBytes = 2;
  static constexpr int kBatches = 2 * kQuantWords;
  using Values = QuantValues<kType>;
  using Sum = float;

  template <int kBatch, bool kUp>
  __device__ __forceinline__ static void decode(const Plane& plane, RunReader<kUp>& run,
                                                const RunSteps& steps, uint32_t (&a)[8]) {
    using Bytes = typename Values::Bytes;
    const uint32_t word = plane.bits[kBatch / 2];
    uint32_t low[2], high[2];
    run.template take<kBatch % 2 * 2, Bytes>(word, steps, low[0], high[0]);
    run.template take<kBatch % 2 * 2 + 1, Bytes>(word, steps, low[1], high[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i * 4] = Values::template widen<0>(low[i]);
      a[i * 4 + 1] = Values::template widen<0>(high[i]);
      a[i * 4 + 2] = Values::template widen<1>(low[i]);
      a[i * 4 + 3] = Values::template widen<1>(high[i]);
    }
  }
#ifdef FLASH_LLM_SM90A
  __device__ __forceinline__ static void multiply(Sum (&sums)[kTileN / 2], const uint32_t* a,
                                                  uint64_t x) {
    ptx::wgmma<Values::kDense, kTileN>(sums, a, x);
  }
#endif
  // No other CTA's sum is in the same place.
  __device__ __forceinline__ static void add(Sum* to, Sum sum) { *to = sum; }
};

// X quantised to int8. The weight's bytes are value + 128, so the sums of products contain 128
// times the sum of X. A batch is a word: a product for two fragments together.
template <ValueType kType, int kTileN>
struct Int8TileX {
  static constexpr bool kQuantized = true;
  static constexpr int kElementBytes = 1;
  static constexpr int kBatches = kQuantWords;
  using Sum = int;

  template <int kBatch, bool kUp>
  __device__ __forceinline__ static void decode(const Plane& plane, RunReader<kUp>& run,
                                                const RunSteps& steps, uint32_t (&a)[8]) {
    using Bytes = typename QuantValues<kType>::Bytes;
    const uint32_t word = plane.bits[kBatch];
    run.template take<0, Bytes>(word, steps, a[0], a[1]);
    run.template take<1, Bytes>(word, steps, a[2], a[3]);
    run.template take<2, Bytes>(word, steps, a[4], a[5]);
    run.template take<3, Bytes>(word, steps, a[6], a[7]);
  }
#ifdef FLASH_LLM_SM90A
  __device__ __forceinline__ static void multiply(Sum (&sums)[kTileN / 2], const uint32_t* a,
                                                  uint64_t x) {
    ptx::wgmma_u8_s8<kTileN>(sums, a, x);
  }
#endif
  __device__ __forceinline__ static void add(Sum* to, Sum sum) { ptx::add_global(to, sum); }
};

// The chunks of a warp: those of one strip of the output tiles that its CTA multiplies.
struct TileChunks {
  uint32_t first_unit, cols;
  int tile_strips, strip;  // of an output tile; in it
  uint32_t total;

  __device__ __forceinline__ TileChunks(const StreamK& schedule, int worker, int tile_strips,
                                        int strip)
      : first_unit(schedule.first_unit(worker)),
        cols(schedule.units_per_row),
        tile_strips(tile_strips),
        strip(strip),
        total(schedule.first_unit(worker + 1) - first_unit) {}

  __device__ __forceinline__ ChunkPlace operator[](uint32_t chunk) const {
    const uint32_t unit = first_unit + chunk, tile = unit / cols;
    return {int64_t{tile} * tile_strips + strip, static_cast<int>(unit - tile * cols)};
  }
};

template <ValueType kTypeArg, int kTileNArg, int kWarpgroupsArg, bool kInt8X, int kXStagesArg>
struct WgmmaConfig {
  using Chunks = TileChunks;
  using WeightCopy = BulkCopy;
  static constexpr ValueType kType = kTypeArg;
  static_assert(quant_planes(kType) == 1);
  static constexpr int kFixedUnits = quant_fixed_units(kType);
  static constexpr bool kGroupScales = false;
  static constexpr ValueType kDense = QuantValues<kType>::kDense;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kWarpgroups = kWarpgroupsArg;
  static constexpr int kXStages = kXStagesArg;
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 32 * (kWarps + 1);  // and a warp that copies X
  using X = std::conditional_t<kInt8X, Int8TileX<kType, kTileN>, WideTileX<kType, kTileN>>;
  using Sum = typename X::Sum;
  static constexpr int kXColBytes = kQuantPlaneK * kTileN * X::kElementBytes;
  static constexpr int kStripSums = kQuantStripM * kTileN;
  static constexpr int kSlotSums = kQuantGroupStrips * kStripSums;

  // Where sums of a CTA and a group of strips are in the workspace, in units of kSlotSums.
  __device__ __forceinline__ static int64_t slot(int worker, int group) {
    return X::kQuantized ? group : group + int64_t{worker} * kWarpgroups;
  }

  __device__ __forceinline__ static uint32_t previous(uint32_t stage) {
    return stage == 0 ? kXStages - 1 : stage - 1;
  }

  // A stage, X of a column of chunks, is kXColBytes / kBoxBytes K-major operands of wgmma with a
  // 128-byte swizzle: a row of 128 bytes for each token. Returns where 16 bytes of a token are.
  static constexpr int kBoxBytes = kTileN * 128;
  __device__ __forceinline__ static int x_offset(int token, int sixteen) {
    return sixteen / 8 * kBoxBytes + token * 128 + (sixteen % 8 ^ token % 8) * 16;
  }
};

// Few, so that a CTA of the kernel that multiplies can begin beside it and copy weights.
constexpr int kTokenThreads = 128;

// The grid: a CTA for each token, and for each of the others a part of what is to be cleared.
template <typename C>
__global__ void __launch_bounds__(kTokenThreads)
    write_tokens_kernel(const __grid_constant__ WgmmaParams p, int tokens) {
  allow_next_kernel();
  wait_for_previous_kernel();  // it may write X, and use the workspace
  const int thread = static_cast<int>(threadIdx.x), token = static_cast<int>(blockIdx.x);
  if (token >= tokens) {
    const int64_t ctas = gridDim.x - tokens, cta = token - tokens;
    for (int64_t i = cta * kTokenThreads + thread; i < p.cleared_bytes / 16;
         i += ctas * kTokenThreads) {
      reinterpret_cast<int4*>(p.counts)[i] = make_int4(0, 0, 0, 0);
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
  uint8_t* tile = p.x_tiles + int64_t{token / C::kTileN} * p.weight.chunk_cols * C::kXColBytes;
  const auto store = [&](int unit, int half, uint4 sixteen_bytes) {
    constexpr int kHalves = C::X::kElementBytes;
    const int in_col = unit % kUnits * kHalves + half;
    uint8_t* col = tile + int64_t{unit / kUnits} * C::kXColBytes;
    *reinterpret_cast<uint4*>(col + C::x_offset(token % C::kTileN, in_col)) = sixteen_bytes;
  };
  if constexpr (!C::X::kQuantized) {
    // A fragment's columns 4 t + 2 and 4 t + 3 stand for columns 2 t + 8 and 2 t + 9 of A.
    for (int i = thread; i < p.weight.chunk_cols * kUnits; i += kTokenThreads) {
      const uint4 first = eight(2 * i), second = eight(2 * i + 1);
      store(i, 0, make_uint4(first.x, first.z, second.x, second.z));
      store(i, 1, make_uint4(first.y, first.w, second.y, second.w));
    }
  } else {
    __shared__ uint32_t shared_magnitude;
    __shared__ int shared_sum;
    if (thread == 0) {
      shared_magnitude = 0;
      shared_sum = 0;
    }
    __syncthreads();
    uint32_t largest = 0;
    for (int i = thread; i * 8 < p.weight.k; i += kTokenThreads) {
      const uint4 pairs = eight(i);
      largest = larger_magnitudes<C::kDense>(largest, pairs.x);
      largest = larger_magnitudes<C::kDense>(largest, pairs.y);
      largest = larger_magnitudes<C::kDense>(largest, pairs.z);
      largest = larger_magnitudes<C::kDense>(largest, pairs.w);
    }
    const uint32_t magnitude = __reduce_max_sync(~0U, max(largest >> 16, largest & 0xFFFFU));
    if (thread % 32 == 0) atomicMax(&shared_magnitude, magnitude);
    __syncthreads();
    const TokenScale scale = TokenScale::of<C::kDense>(shared_magnitude);
    int sum = 0;
    for (int i = thread; i < p.weight.chunk_cols * kUnits; i += kTokenThreads) {
      const uint4 first = eight(2 * i), second = eight(2 * i + 1);
      const uint4 bytes =
          make_uint4(quantize<C::kDense>(make_uint2(first.x, first.y), scale.inverse),
                     quantize<C::kDense>(make_uint2(first.z, first.w), scale.inverse),
                     quantize<C::kDense>(make_uint2(second.x, second.y), scale.inverse),
                     quantize<C::kDense>(make_uint2(second.z, second.w), scale.inverse));
      sum = __dp4a(static_cast<int>(bytes.x), 0x01010101, sum);
      sum = __dp4a(static_cast<int>(bytes.y), 0x01010101, sum);
      sum = __dp4a(static_cast<int>(bytes.z), 0x01010101, sum);
      sum = __dp4a(static_cast<int>(bytes.w), 0x01010101, sum);
      store(i, 0, bytes);
    }
    sum = __reduce_add_sync(~0U, sum);
    if (thread % 32 == 0) atomicAdd(&shared_sum, sum);
    __syncthreads();
    if (thread == 0) {
      p.token_scales[token] = scale.scale;
      p.token_biases[token] = kQuantZero * shared_sum;
    }
  }
}

#ifdef FLASH_LLM_SM90A

// Where things are in a CTA's shared memory.
struct WgmmaSmem {
  uint32_t base;
  int ring_bytes;

  // The bits and columns of a chunk without values.
  static constexpr int kZerosBytes = kQuantBitsBytes + kQuantColumnsBytes;
  static constexpr int kBarriers = (kZerosBytes + 127) / 128 * 128;
  static constexpr int kMaxStages = 4;
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

// Decodes batch kBatch of a chunk into `a` and starts its products with X of its column at `x`. The
// wait is for all products but the latest ones, so for those that have read `a`.
template <typename C, int kBatch, bool kUp>
__device__ __forceinline__ void multiply_batch(const Plane& plane, RunReader<kUp>& run,
                                               const RunSteps& steps, uint32_t x, uint32_t (&a)[8],
                                               typename C::Sum (&sums)[C::kTileN / 2]) {
  constexpr int kOffset = kBatch / 2 * C::kBoxBytes + kBatch % 2 * 64;
  ptx::wgmma_wait<1>();
  C::X::template decode<kBatch>(plane, run, steps, a);
  ptx::wgmma_fence();
  C::X::multiply(sums, a, ptx::wgmma_descriptor(x, kOffset));
  C::X::multiply(sums, a + 4, ptx::wgmma_descriptor(x, kOffset + 32));
  ptx::wgmma_commit();
}

// The batches of a run, from kBatch to the one before kEnd.
template <typename C, int kBatch, int kEnd, bool kUp>
__device__ __forceinline__ void multiply_run(const Plane& plane, RunReader<kUp>& run,
                                             const RunSteps& steps, uint32_t x, uint32_t (&a)[2][8],
                                             typename C::Sum (&sums)[C::kTileN / 2]) {
  if constexpr (kBatch < kEnd) {
    multiply_batch<C, kBatch>(plane, run, steps, x, a[kBatch % 2], sums);
    multiply_run<C, kBatch + 1, kEnd>(plane, run, steps, x, a, sums);
  }
}

// Brings the sums of a strip together: `sums` are those of `cols` columns of chunks, which worker
// `worker` has multiplied, and warps of other CTAs have the others. Returns whether this warp is
// the last one of them, and `sums` all sums; else they are in the workspace.
template <typename C>
__device__ __forceinline__ bool meet(const WgmmaParams& p, int worker, int strip, int cols,
                                     int lane, typename C::Sum (&sums)[C::kTileN / 2]) {
  const auto all_cols = static_cast<uint32_t>(p.weight.chunk_cols);
  const auto own_cols = static_cast<uint32_t>(cols);
  const int group = strip / kQuantGroupStrips, tile = strip / C::kWarps;
  const auto place_of = [&](int owner) {
    const int64_t slot = int64_t{blockIdx.y} * p.slots + C::slot(owner, group);
    return static_cast<typename C::Sum*>(p.sums) + slot * C::kSlotSums +
           strip % kQuantGroupStrips * C::kStripSums + lane;
  };
  uint32_t* count = p.counts + int64_t{blockIdx.y} * p.weight.strips + strip;
  // The others are most often there already: those of later columns began with this tile.
  bool left = false;
  if (__shfl_sync(~0U, ptx::load_acquire(count), 0) + own_cols != all_cols) {
    typename C::Sum* to = place_of(worker);
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) C::X::add(to + i * 32, sums[i]);
    __syncwarp();
    uint32_t before = 0;
    if (lane == 0) before = ptx::add_acq_rel(count, own_cols);
    if (__shfl_sync(~0U, before, 0) + own_cols != all_cols) return false;
    left = true;
  }
  __syncwarp();  // lane 0 has seen the others' sums
  if constexpr (C::X::kQuantized) {
    const typename C::Sum* from = place_of(worker);
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) {
      sums[i] = __ldcg(from + i * 32) + (left ? 0 : sums[i]);
    }
  } else {
    const int first_unit = tile * p.weight.chunk_cols;
    const int last = p.schedule.worker_of(first_unit + p.weight.chunk_cols - 1);
    const int first = p.schedule.worker_of(first_unit);
    constexpr int kAtOnce = 8;  // more would spill
#pragma unroll
    for (int begin = 0; begin < C::kTileN / 2; begin += kAtOnce) {
      typename C::Sum total[kAtOnce] = {};
      for (int other = first; other <= last; ++other) {
        const typename C::Sum* from = place_of(other);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          total[i] += other == worker ? sums[begin + i] : __ldcg(from + (begin + i) * 32);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[begin + i] = total[i];
    }
  }
  return true;
}

// Stores Y of a strip from all of its sums.
template <typename C>
__device__ __forceinline__ void store_strip(const WgmmaParams& p, int strip, int lane,
                                            const typename C::Sum (&sums)[C::kTileN / 2]) {
  const float* scales = p.weight.row_scales(strip);
  float2 rows = make_float2(1.0F, 1.0F);
  if (scales != nullptr) rows = make_float2(scales[lane / 4], scales[lane / 4 + 8]);
  const int token = static_cast<int>(blockIdx.y) * C::kTileN + lane % 4 * 2;
  float scaled[C::kTileN / 2];
#pragma unroll
  for (int i = 0; i < C::kTileN / 2; i += 4) {
    constexpr float kUnit = QuantValues<C::kType>::kUnit;
    float2 factors = make_float2(kUnit, kUnit);
    typename C::Sum biases[2] = {};
    if constexpr (C::X::kQuantized) {
      factors = *reinterpret_cast<const float2*>(p.token_scales + token + i * 2);
      const int2 pair = *reinterpret_cast<const int2*>(p.token_biases + token + i * 2);
      biases[0] = pair.x;
      biases[1] = pair.y;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scaled[i + e] = static_cast<float>(sums[i + e] - biases[e % 2]) *
                      (e % 2 == 0 ? factors.x : factors.y) * (e < 2 ? rows.x : rows.y);
    }
  }
  p.epilogue.store_rows<C::kDense, C::kTileN, true>(token, int64_t{strip} * kQuantStripM + lane / 4,
                                                    scaled);
}

#endif  // FLASH_LLM_SM90A

// The grid: CTAs that share the output tiles; blocks of tokens.
template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    quantized_wgmma_kernel(const __grid_constant__ WgmmaParams p) {
#ifdef FLASH_LLM_SM90A
  extern __shared__ uint8_t smem_bytes[];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
  const WgmmaSmem smem = {(ptx::smem_address(smem_bytes) + 1023) / 1024 * 1024, p.ring_bytes};
  allow_next_kernel();
  if (lane == 0) {
    if (warp < C::kWarps) {
      for (int i = 0; i < kQuantRingChunks; ++i)
        ptx::mbarrier_init(smem.full(warp) + i * 8, BulkCopy::kArrivals);
    } else {
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
  const uint32_t first_x = smem.x(C::kWarps);
  const TileChunks chunks(p.schedule, worker, C::kWarps, warp);
  if (warp == C::kWarps) {
    if (lane != 0) return;
    int col = static_cast<int>(chunks.first_unit % chunks.cols);
    const uint8_t* x = p.x_tiles + int64_t{blockIdx.y} * p.weight.chunk_cols * C::kXColBytes;
    wait_for_previous_kernel();  // it writes X
    for (uint32_t i = 0; i < chunks.total; ++i) {
      const int stage = i % C::kXStages;
      ptx::mbarrier_wait(smem.x_empty(stage), (i / C::kXStages & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(smem.x_full(stage), C::kXColBytes);
      ptx::bulk_copy(first_x + stage * C::kXColBytes, x + int64_t{col} * C::kXColBytes,
                     C::kXColBytes, smem.x_full(stage));
      if (++col == p.weight.chunk_cols) col = 0;
    }
    return;
  }
  ChunkRing<C> ring(p.weight, chunks, smem.full(warp), smem.ring(warp), p.ring_bytes, lane);
  wait_for_previous_kernel();  // kernels before it may use the workspace
  const uint32_t lane_column = lane * p.steps.column;
  int left = static_cast<int>(chunks.total);
  int tile = static_cast<int>(chunks.first_unit) / p.weight.chunk_cols;
  int col = static_cast<int>(chunks.first_unit) - tile * p.weight.chunk_cols;
  uint32_t stage = 0, phase = 0;
  uint32_t a[2][8];
#pragma unroll 1
  while (left > 0) {
    typename C::Sum sums[C::kTileN / 2] = {};
    const int cols = min(p.weight.chunk_cols - col, left);
    left -= cols;
#pragma unroll 1
    for (int i = 0; i < cols; ++i) {
      int rows;
      const uint32_t chunk = ring.wait(&rows);
      // Absent values are multiplied too: X may be infinite there.
      const uint32_t top = rows == 0 ? smem.zeros() : chunk + rows * kQuantRowBytes;
      const Plane plane(top, 0, lane);
      RunReader<true> up(chunk, lane_column);
      const uint32_t x = first_x + stage * C::kXColBytes;
      ptx::mbarrier_wait(smem.x_full(stage), phase);
      multiply_run<C, 0, 2>(plane, up, p.steps, x, a, sums);
      // The products of the column before this one are complete.
      if (i > 0) arrive_for_warp(smem.x_empty(C::previous(stage)), lane);
      multiply_run<C, 2, C::X::kBatches / 2>(plane, up, p.steps, x, a, sums);
      RunReader<false> down(top, plane.column);
      multiply_run<C, C::X::kBatches / 2, C::X::kBatches>(plane, down, p.steps, x, a, sums);
      ring.release();
      if (++stage == C::kXStages) {
        stage = 0;
        phase ^= 1;
      }
    }
    ptx::wgmma_wait<0>();
    arrive_for_warp(smem.x_empty(C::previous(stage)), lane);
    const int strip = tile * C::kWarps + warp;
    if (strip < p.weight.strips &&
        (cols == p.weight.chunk_cols || meet<C>(p, worker, strip, cols, lane, sums))) {
      store_strip<C>(p, strip, lane, sums);
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
  const unsigned tokens = passes * C::kTileN;
  // At most one CTA for each SM in all.
  const unsigned sms = static_cast<unsigned>(params.schedule.workers) * passes;
  const auto rounds =
      static_cast<unsigned>((params.cleared_bytes / 16 + kTokenThreads - 1) / kTokenThreads);
  const unsigned clearing = std::min(rounds, sms > tokens + 16 ? sms - tokens : 16);
  const Status written =
      launch_kernel("write_tokens_kernel launch", write_tokens_kernel<C>, tokens + clearing,
                    kTokenThreads, 0, prefetch, stream, params, static_cast<int>(tokens));
  if (!written.ok()) return written;
  // Without `prefetch` it begins, and reads the weight, when the previous call has finished,
  // because the first kernel does.
  return launch_kernel("quantized_wgmma_kernel launch", quantized_wgmma_kernel<C>,
                       dim3(static_cast<unsigned>(params.schedule.workers), passes), C::kThreads,
                       smem_bytes, true, stream, params);
}

template <ValueType kType>
Status launch_config(int config, const WgmmaParams& params, int smem_bytes, bool prefetch,
                     cudaStream_t stream) {
  int index = 0;
#define FLASH_LLM_ROW(name, tile_n, warpgroups, int8_x, x_stages)                                 \
  if (config == index++) {                                                                        \
    constexpr QuantWgmmaConfig kConfig = {#name, tile_n, warpgroups, int8_x, x_stages};           \
    if constexpr (kConfig.multiplies(kType)) {                                                    \
      return launch<WgmmaConfig<kType, tile_n, warpgroups, int8_x, x_stages>>(params, smem_bytes, \
                                                                              prefetch, stream);  \
    }                                                                                             \
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
      plan.ring_bytes < quant_wgmma_min_ring_bytes(config) ||
      plan.ring_bytes % (plan.warps * 128) != 0 || plan.ctas != plan.work.workers ||
      plan.work.rows != config.tiles(args.weight.m) ||
      plan.work.cols != num_quant_chunks(type, args.weight.k)) {
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
  params.slots = static_cast<int>(parts.slots);
  params.cleared_bytes = parts.counts_bytes + (config.int8_x ? parts.sums_bytes : 0);
  params.ring_bytes = plan.ring_bytes / plan.warps;
  const int smem_bytes = quant_wgmma_smem_bytes(config, plan.ring_bytes);
  return run_for_type(type, [&](auto typed) {
    return launch_config<decltype(typed)::value>(plan.config, params, smem_bytes, prefetch, stream);
  });
}

}  // namespace flash_llm
