// Y = act(X . W^T + bias) for a weight in the quantised bitmap format and 8 tokens at a time, on
// GPUs with bulk copies. Each CTA multiplies whole strips of 16 rows, every one by all of its
// warps:
//   * a warp always has the same columns of chunks, so X of them stays in its registers
//   * it copies one chunk after the other into stages of its own, decodes it into A fragments
//     (decode.cuh) and multiplies these by mma.m16n8k16, or by mma.m16n8k32 if X is quantised
//   * the warps' sums of a strip meet in shared memory, where they take turns in adding them
// A long K is cut into sections whose X fits the registers. Their sums go through the workspace to
// a finishing kernel. All sums are added in a fixed order, so results are repeatable bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/bitmap/weight_copy.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/quantized_bitmap/decode.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "plan/quantized_bitmap_sm90.h"

namespace flash_llm {
namespace {

struct QuantParams {
  const uint32_t* payload;
  const int32_t* offsets;
  const uint16_t* x;
  int64_t x_stride;
  float4* partial;  // null if there is one section
  Epilogue epilogue;
  RunSteps steps;
  int payload_units;
  int k;
  int strips, chunk_cols;
  int section_cols;  // columns of chunks in a section
  int sections;
  int stages;  // of each warp
};

// Where things are in a CTA's shared memory.
struct QuantSmem {
  uint32_t base;
  int warps, stages;

  __device__ __forceinline__ uint32_t stage(int warp, int i) const {
    return base + kQuantGuardBytes + (warp * stages + i) * kQuantStageBytes;
  }
  // The word with the rows of values of a stage's chunk.
  __device__ __forceinline__ uint32_t rows(int warp, int i) const {
    return stage(warp, i) + kQuantStageBytes - 4;
  }
  __device__ __forceinline__ uint32_t sums(int i, int warp) const {
    return stage(warps, 0) + (i * warps + warp) * kQuantSumsBytes;
  }
  __device__ __forceinline__ uint32_t barrier(int i) const {
    return sums(kQuantSumsStages, 0) + i * 8;
  }
  __device__ __forceinline__ uint32_t full(int warp, int i) const {
    return barrier(warp * stages + i);
  }
  __device__ __forceinline__ uint32_t sums_full(int i) const { return barrier(warps * stages + i); }
  __device__ __forceinline__ uint32_t sums_empty(int i) const {
    return barrier(warps * stages + kQuantSumsStages + i);
  }
};

// The chunks of a warp: those of its columns in each of the CTA's strips.
class ChunkCopies {
 public:
  __device__ __forceinline__ ChunkCopies(const QuantParams& p, const QuantSmem& smem, int first_col,
                                         int columns, int strips, int warp, int lane)
      : p_(p),
        smem_(smem),
        first_col_(first_col),
        columns_(columns),
        total_(strips * columns),
        warp_(warp),
        lane_(lane) {}

  // Starts to copy the next chunk, if there is one, to a stage that the warp has read.
  __device__ __forceinline__ void copy_next(int stage) {
    if (next_ >= total_) return;
    if (next_ % 32 == 0) find_chunks();
    const int begin = __shfl_sync(~0U, begin_, next_ % 32);
    const int rows = __shfl_sync(~0U, rows_, next_ % 32);
    ++next_;
    if (lane_ != 0) return;
    ptx::store_shared_u32(smem_.rows(warp_, stage), rows);
    const uint32_t full = smem_.full(warp_, stage);
    if (rows == 0) {
      ptx::mbarrier_arrive(full);
      return;
    }
    const uint32_t bytes = rows * kQuantRowBytes + kQuantBitsBytes + kQuantColumnsBytes;
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    ptx::bulk_copy_streaming(smem_.stage(warp_, stage),
                             p_.payload + int64_t{begin} * kQuantUnitWords, bytes, full);
  }

 private:
  // Each lane finds one of the next 32 chunks. Malformed offsets give a chunk without values.
  __device__ __forceinline__ void find_chunks() {
    const int chunk = next_ + lane_;
    begin_ = rows_ = 0;
    if (chunk >= total_) return;
    const int strip = blockIdx.x + chunk / columns_ * gridDim.x;
    const int col = first_col_ + chunk % columns_ * smem_.warps;
    const int32_t* offsets = p_.offsets + int64_t{strip} * p_.chunk_cols + col;
    const int begin = offsets[0], end = offsets[1];
    if (begin < 0 || end <= begin || end > p_.payload_units) return;
    begin_ = begin + (col == 0 ? kQuantScaleUnits : 0);
    rows_ = max(quant_value_rows(end - begin_), 0);
  }

  const QuantParams& p_;
  const QuantSmem& smem_;
  int first_col_, columns_, total_, warp_, lane_;
  int next_ = 0;
  int begin_ = 0, rows_ = 0;  // of chunk next_ / 32 * 32 + lane
};

// How X is multiplied. Each struct has
//   kType            the type of the weight
//   Sum              of the sums
//   ChunkX           X of a column of chunks as B fragments, for fragment j of word q
//   multiply_pair()  adds the products of two neighbouring fragments, given as they are decoded

// X as it is. A fragment is columns 4 t and 4 t + 1 in .x, 4 t + 2 and 4 t + 3 in .y.
template <ValueType kWeight>
struct WideX {
  static constexpr ValueType kType = kWeight;
  using Sum = float;
  using ChunkX = uint2[kQuantWords][kQuantFragments];

  __device__ __forceinline__ static void multiply_pair(const uint32_t (&low)[2],
                                                       const uint32_t (&high)[2], const uint2* x,
                                                       float (&sums)[4]) {
    using Values = QuantValues<kType>;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a[4] = {Values::template widen<0>(low[i]), Values::template widen<0>(high[i]),
                             Values::template widen<1>(low[i]), Values::template widen<1>(high[i])};
      ptx::mma_m16n8k16<Values::kDense>(sums, a, x[i].x, x[i].y);
    }
  }
};

// X quantised to int8, with a scale for each token. The weight's bytes are value + 128, so the sums
// begin at -128 times the sum of X.
template <ValueType kWeight>
struct Int8X {
  static constexpr ValueType kType = kWeight;
  using Sum = int;
  using ChunkX = uint32_t[kQuantWords][kQuantFragments];

  __device__ __forceinline__ static void multiply_pair(const uint32_t (&low)[2],
                                                       const uint32_t (&high)[2], const uint32_t* x,
                                                       int (&sums)[4]) {
    const uint32_t a[4] = {low[0], high[0], low[1], high[1]};
    ptx::mma_m16n8k32_u8(sums, a, x[0], x[1]);
  }
};

using WideChunkX = WideX<ValueType::kInt8Float16>::ChunkX;

__device__ __forceinline__ void load_x(const QuantParams& p, int chunk_col, int lane,
                                       WideChunkX& x) {
  const int64_t token = int64_t{blockIdx.z} * kQuantTokens + lane / 4;
  const uint16_t* row = p.x + token * p.x_stride;
#pragma unroll
  for (int q = 0; q < kQuantWords; ++q) {
#pragma unroll
    for (int j = 0; j < kQuantFragments; ++j) {
      const int col = chunk_col * kQuantChunkK + quant_col(q, j, lane, 0);
      const bool inside = token < p.epilogue.n && col < p.k;
      x[q][j] = inside ? *reinterpret_cast<const uint2*>(row + col) : make_uint2(0, 0);
    }
  }
}

// The largest magnitude of a lane's elements, as an integer in each half. As integers magnitudes
// have the order of the numbers, Inf above all of them and NaN above Inf.
__device__ __forceinline__ uint32_t largest_magnitudes(const WideChunkX& x, uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kQuantWords * kQuantFragments; ++i) {
    const uint2 four = x[i / kQuantFragments][i % kQuantFragments];
    largest = __vmaxu2(largest, four.x & 0x7FFF7FFFU);
    largest = __vmaxu2(largest, four.y & 0x7FFF7FFFU);
  }
  return largest;
}

// The scale of a token, and its inverse: the largest magnitude divided by 127. The scale of a token
// that is not finite is NaN, and so is its row of Y.
struct TokenScale {
  float scale, inverse;

  template <ValueType kDense>
  __device__ __forceinline__ static TokenScale of(uint32_t magnitude) {
    constexpr uint32_t kInfinity = kDense == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
    const float largest = element_to_float<kDense>(static_cast<uint16_t>(magnitude));
    // The bound keeps the inverse finite; all elements of such a token become 0.
    return {magnitude < kInfinity ? largest / 127.0F : __uint_as_float(0x7FFFFFFF),
            127.0F / fmaxf(largest, 0x1p-100F)};
  }
};

// Rounds four elements to int8, ties to even.
template <ValueType kDense>
__device__ __forceinline__ uint32_t quantize(uint2 four, float inverse) {
  uint32_t rounded[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t pair = e < 2 ? four.x : four.y;
    const float value = element_to_float<kDense>(static_cast<uint16_t>(pair >> e % 2 * 16));
    // The units of 1.5 * 2^23 are 1, so the low byte of the sum is the integer.
    rounded[e] = __float_as_uint(__fmaf_rn(value, inverse, 12582912.0F));
  }
  const uint32_t low = permute_bytes(rounded[0], rounded[1], 0x0040U);
  return permute_bytes(low, permute_bytes(rounded[2], rounded[3], 0x0040U), 0x5410U);
}

// X of a warp's columns, in registers. Sums begin at `begin`; multiplied by `scale` they are those
// of X. Both are for tokens 2 t and 2 t + 1 of lane 4 g + t.
template <typename M>
struct WarpX {
  typename M::ChunkX chunks[kQuantWarpChunks];
  typename M::Sum begin[2] = {};
  float scale[2] = {1.0F, 1.0F};

  // All warps of the CTA must call it. Its first column of chunks is `first_col`.
  __device__ __forceinline__ void load(const QuantParams& p, const QuantSmem& smem, int first_col,
                                       int columns, int warp, int lane) {
    if constexpr (sizeof(chunks) == sizeof(WideChunkX[kQuantWarpChunks])) {
#pragma unroll
      for (int c = 0; c < kQuantWarpChunks; ++c) {
        if (c < columns) load_x(p, first_col + c * smem.warps, lane, chunks[c]);
      }
      __syncthreads();
    } else {
      load_quantized(p, smem, first_col, columns, warp, lane);
    }
  }

 private:
  __device__ __forceinline__ void load_quantized(const QuantParams& p, const QuantSmem& smem,
                                                 int first_col, int columns, int warp, int lane) {
    constexpr ValueType kDense = QuantValues<M::kType>::kDense;
    WideChunkX wide[kQuantWarpChunks] = {};
    uint32_t magnitude = 0;
#pragma unroll
    for (int c = 0; c < kQuantWarpChunks; ++c) {
      if (c < columns) load_x(p, first_col + c * smem.warps, lane, wide[c]);
      magnitude = largest_magnitudes(wide[c], magnitude);
    }
    if (p.sections > 1) {  // the scale depends on the columns of the other sections too
#pragma unroll 1
      for (int col = warp; col < p.chunk_cols; col += smem.warps) {
        WideChunkX other;
        load_x(p, col, lane, other);
        magnitude = largest_magnitudes(other, magnitude);
      }
    }
    magnitude = max(magnitude >> 16, magnitude & 0xFFFFU);
    magnitude = max(magnitude, __shfl_xor_sync(~0U, magnitude, 1));
    magnitude = max(magnitude, __shfl_xor_sync(~0U, magnitude, 2));
    // The largest of each warp meet in the guard before the stages, which has no other use.
    static_assert(kQuantMaxWarps * kQuantTokens * 4 <= kQuantGuardBytes);
    const uint32_t own = smem.base + lane / 4 * 4;
    if (lane % 4 == 0) ptx::store_shared_u32(own + warp * kQuantTokens * 4, magnitude);
    __syncthreads();
    for (int w = 0; w < smem.warps; ++w) {
      magnitude = max(magnitude, ptx::load_shared_u32(own + w * kQuantTokens * 4));
    }
    const TokenScale token = TokenScale::of<kDense>(magnitude);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kQuantWarpChunks * kQuantWords * kQuantFragments; ++i) {
      const int c = i / (kQuantWords * kQuantFragments), q = i / kQuantFragments % kQuantWords;
      const int j = i % kQuantFragments;
      chunks[c][q][j] = quantize<kDense>(wide[c][q][j], token.inverse);
      sum = __dp4a(static_cast<int>(chunks[c][q][j]), 0x01010101, sum);
    }
    sum += __shfl_xor_sync(~0U, sum, 1);
    sum += __shfl_xor_sync(~0U, sum, 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int lane_of_token = (lane % 4 * 2 + i) * 4;
      begin[i] = -kQuantZero * __shfl_sync(~0U, sum, lane_of_token);
      scale[i] = __shfl_sync(~0U, token.scale, lane_of_token);
    }
  }
};

template <typename M, int kPair, bool kUp, typename X>
__device__ __forceinline__ void multiply_pair(uint32_t word, RunReader<kUp>& run,
                                              const RunSteps& steps, const X* x,
                                              typename M::Sum (&sums)[4]) {
  uint32_t low[2], high[2];
  constexpr uint32_t kZero = QuantValues<M::kType>::kZero;
  run.template take<2 * kPair>(word, steps, kZero, low[0], high[0]);
  run.template take<2 * kPair + 1>(word, steps, kZero, low[1], high[1]);
  M::multiply_pair(low, high, x + 2 * kPair, sums);
}

template <typename M, bool kUp, typename X>
__device__ __forceinline__ void multiply_word(uint32_t word, RunReader<kUp>& run,
                                              const RunSteps& steps, const X* x,
                                              typename M::Sum (&sums)[4]) {
  multiply_pair<M, 0>(word, run, steps, x, sums);
  multiply_pair<M, 1>(word, run, steps, x, sums);
}

template <typename M>
__device__ __forceinline__ void multiply_chunk(uint32_t chunk, int rows, const RunSteps& steps,
                                               const typename M::ChunkX& x, int lane,
                                               typename M::Sum (&up_sums)[4],
                                               typename M::Sum (&down_sums)[4]) {
  const QuantChunk parts(chunk, rows, lane);
  RunReader<true> up(chunk, lane * 4);
  RunReader<false> down(parts.top, parts.column);
  multiply_word<M>(parts.bits[0], up, steps, x[0], up_sums);
  multiply_word<M>(parts.bits[2], down, steps, x[2], down_sums);
  multiply_word<M>(parts.bits[1], up, steps, x[1], up_sums);
  multiply_word<M>(parts.bits[3], down, steps, x[3], down_sums);
}

// The scales of rows lane / 4 and lane / 4 + 8 of a strip; 1 if it has none.
__device__ __forceinline__ float2 load_scales(const QuantParams& p, int strip, int lane) {
  const int32_t* offsets = p.offsets + int64_t{strip} * p.chunk_cols;
  const int begin = offsets[0], end = offsets[p.chunk_cols];
  if (begin < 0 || end <= begin || begin + kQuantScaleUnits > p.payload_units) {
    return make_float2(1.0F, 1.0F);
  }
  const uint32_t* scales = p.payload + int64_t{begin} * kQuantUnitWords + lane / 4;
  return make_float2(__uint_as_float(scales[0]), __uint_as_float(scales[8]));
}

// Stores Y of a strip from a warp's sums, in fragment order.
template <ValueType kType>
__device__ __forceinline__ void store_strip(const QuantParams& p, int strip, int token_block,
                                            int lane, float2 scales, float4 sums) {
  sums = make_float4(sums.x * scales.x, sums.y * scales.x, sums.z * scales.y, sums.w * scales.y);
  p.epilogue.store_fragment<QuantValues<kType>::kDense>(
      int64_t{token_block} * kQuantTokens + lane % 4 * 2, int64_t{strip} * kQuantStripM + lane / 4,
      sums);
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Where a section's sums of a strip are in the workspace.
__device__ __forceinline__ float4* partial_sums(const QuantParams& p, int section, int token_block,
                                                int token_blocks, int strip) {
  return p.partial + ((int64_t{section} * token_blocks + token_block) * p.strips + strip) * 32;
}

// Four sums of a lane in shared memory.
__device__ __forceinline__ void store_sums(uint32_t smem, const float (&sums)[4]) {
  ptx::store_shared_v4(smem, sums);
}
__device__ __forceinline__ void store_sums(uint32_t smem, const int (&sums)[4]) {
  ptx::store_shared_v4(smem, {__int_as_float(sums[0]), __int_as_float(sums[1]),
                              __int_as_float(sums[2]), __int_as_float(sums[3])});
}
__device__ __forceinline__ void add_stored(uint32_t smem, float (&sums)[4]) {
  const float4 four = ptx::load_shared_v4(smem);
  sums[0] += four.x;
  sums[1] += four.y;
  sums[2] += four.z;
  sums[3] += four.w;
}
__device__ __forceinline__ void add_stored(uint32_t smem, int (&sums)[4]) {
  const float4 four = ptx::load_shared_v4(smem);
  sums[0] += __float_as_int(four.x);
  sums[1] += __float_as_int(four.y);
  sums[2] += __float_as_int(four.z);
  sums[3] += __float_as_int(four.w);
}

// The grid: CTAs that share the strips; sections; blocks of tokens.
template <typename M>
__global__ void __launch_bounds__(kQuantMaxWarps * 32, 1)
    quantized_rows_kernel(const __grid_constant__ QuantParams p) {
  if constexpr (kHasSm90) {
    extern __shared__ uint8_t smem_bytes[];
    const int warps = static_cast<int>(blockDim.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
    const QuantSmem smem = {(ptx::smem_address(smem_bytes) + 127) / 128 * 128, warps, p.stages};
    allow_next_kernel();
    const int first_col = static_cast<int>(blockIdx.y) * p.section_cols + warp;
    const int end_col = min(static_cast<int>(blockIdx.y + 1) * p.section_cols, p.chunk_cols);
    const int columns = max(0, (end_col - first_col + warps - 1) / warps);
    const int strips = (p.strips - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
                       static_cast<int>(gridDim.x);
    if (lane == 0) {
      for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(smem.full(warp, i), 1);
      if (warp == 0) {
        for (int i = 0; i < kQuantSumsStages; ++i) {
          ptx::mbarrier_init(smem.sums_full(i), warps);
          ptx::mbarrier_init(smem.sums_empty(i), 1);
        }
      }
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    ChunkCopies copies(p, smem, first_col, columns, strips, warp, lane);
    for (int i = 0; i < p.stages; ++i) copies.copy_next(i);
    wait_for_previous_kernel();  // it may have written X
    WarpX<M> x;
    x.load(p, smem, first_col, columns, warp, lane);
    int stage = 0;
    uint32_t phase = 0;
#pragma unroll 1
    for (int i = 0; i < strips; ++i) {
      const int strip = static_cast<int>(blockIdx.x + i * gridDim.x);
      const bool adds = i % warps == warp;
      const float2 scales = adds ? load_scales(p, strip, lane) : make_float2(1.0F, 1.0F);
      typename M::Sum up_sums[4] = {x.begin[0], x.begin[1], x.begin[0], x.begin[1]};
      typename M::Sum down_sums[4] = {};
#pragma unroll
      for (int c = 0; c < kQuantWarpChunks; ++c) {
        if (c >= columns) break;
        ptx::mbarrier_wait(smem.full(warp, stage), phase);
        const int rows = static_cast<int>(ptx::load_shared_u32(smem.rows(warp, stage)));
        multiply_chunk<M>(smem.stage(warp, stage), rows, p.steps, x.chunks[c], lane, up_sums,
                          down_sums);
        __syncwarp();
        copies.copy_next(stage);
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) up_sums[e] += down_sums[e];
      const int buffer = i % kQuantSumsStages;
      const uint32_t use = i / kQuantSumsStages & 1;
      ptx::mbarrier_wait(smem.sums_empty(buffer), use ^ 1);
      store_sums(smem.sums(buffer, warp) + lane * 16, up_sums);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(smem.sums_full(buffer));
      if (!adds) continue;
      ptx::mbarrier_wait(smem.sums_full(buffer), use);
      typename M::Sum sums[4] = {};
      for (int w = 0; w < warps; ++w) add_stored(smem.sums(buffer, w) + lane * 16, sums);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(smem.sums_empty(buffer));
      const float4 sum = make_float4(
          static_cast<float>(sums[0]) * x.scale[0], static_cast<float>(sums[1]) * x.scale[1],
          static_cast<float>(sums[2]) * x.scale[0], static_cast<float>(sums[3]) * x.scale[1]);
      if (p.partial == nullptr) {
        store_strip<M::kType>(p, strip, static_cast<int>(blockIdx.z), lane, scales, sum);
      } else {
        partial_sums(p, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                     static_cast<int>(gridDim.z), strip)[lane] = sum;
      }
    }
  }
}

constexpr int kFinishWarps = 4;

// Adds the sections' sums. The grid: strips, kFinishWarps at a time; blocks of tokens.
template <ValueType kType>
__global__ void __launch_bounds__(kFinishWarps * 32)
    quantized_finish_kernel(const __grid_constant__ QuantParams p) {
  allow_next_kernel();
  const int strip = static_cast<int>(blockIdx.x * kFinishWarps + threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (strip >= p.strips) return;
  const float2 scales = load_scales(p, strip, lane);
  wait_for_previous_kernel();
  float4 sum = make_float4(0, 0, 0, 0);
  for (int section = 0; section < p.sections; ++section) {
    sum = add(sum, partial_sums(p, section, static_cast<int>(blockIdx.y),
                                static_cast<int>(gridDim.y), strip)[lane]);
  }
  store_strip<kType>(p, strip, static_cast<int>(blockIdx.y), lane, scales, sum);
}

template <typename M>
Status launch(const QuantParams& params, const SpmmPlan& plan, int warps, int smem_bytes,
              bool prefetch, cudaStream_t stream) {
  const Status sized = allow_smem("cudaFuncSetAttribute(quantized_rows_kernel)",
                                  quantized_rows_kernel<M>, smem_bytes);
  if (!sized.ok()) return sized;
  const auto token_blocks = static_cast<unsigned>(quant_token_blocks(params.epilogue.n));
  const dim3 grid(static_cast<unsigned>(plan.ctas), static_cast<unsigned>(params.sections),
                  token_blocks);
  const Status multiplied = launch_kernel("quantized_rows_kernel launch", quantized_rows_kernel<M>,
                                          grid, warps * 32, smem_bytes, prefetch, stream, params);
  if (!multiplied.ok() || params.sections == 1) return multiplied;
  const auto ctas = static_cast<unsigned>((params.strips + kFinishWarps - 1) / kFinishWarps);
  return launch_kernel("quantized_finish_kernel launch", quantized_finish_kernel<M::kType>,
                       dim3(ctas, token_blocks), kFinishWarps * 32, 0, true, stream, params);
}

template <ValueType kType>
Status launch_type(const QuantParams& params, const SpmmPlan& plan, int warps, int smem_bytes,
                   bool prefetch, cudaStream_t stream) {
  return quantized_bitmap_configs()[static_cast<size_t>(plan.config)].int8_x
             ? launch<Int8X<kType>>(params, plan, warps, smem_bytes, prefetch, stream)
             : launch<WideX<kType>>(params, plan, warps, smem_bytes, prefetch, stream);
}

}  // namespace

Status cuda::spmm_quantized_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                                   bool prefetch, cudaStream_t stream) {
  const Status fits = check_plan(plan, KernelFamily::kQuantizedBitmapSm90, args);
  if (!fits.ok()) return fits;
  const int warps = quant_warps(plan.unit_cols);
  const int stages = warps < 1 ? 0 : plan.ring_bytes / (warps * kQuantStageBytes);
  const int64_t chunk_cols = num_quant_chunks(args.weight.k);
  if (plan.config < 0 || plan.config >= static_cast<int>(quantized_bitmap_configs().size())) {
    return Status::invalid_value("no quantised bitmap configuration has index " +
                                 std::to_string(plan.config));
  }
  if (warps < 1 || warps > kQuantMaxWarps || stages < kQuantMinStages || stages > kQuantMaxStages ||
      plan.ctas != plan.work.workers ||
      plan.work.cols != (chunk_cols + plan.unit_cols - 1) / plan.unit_cols) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  const int64_t sums_bytes = quant_sums_bytes(args.weight.m, args.n, plan.work.cols);
  if (Status enough = check_launch(plan, sums_bytes); !enough.ok()) return enough;
  QuantParams params = {};
  params.payload = args.weight.payload;
  params.offsets = args.weight.offsets;
  params.x = args.x;
  params.x_stride = args.x_stride;
  params.partial = plan.work.cols == 1 ? nullptr : static_cast<float4*>(workspace);
  params.epilogue = {args.bias, args.y, args.weight.m, args.n, args.activation};
  params.steps = RunSteps{};
  params.payload_units = static_cast<int>(args.weight.payload_words / kQuantUnitWords);
  params.k = static_cast<int>(args.weight.k);
  params.strips = static_cast<int>(num_quant_strips(args.weight.m));
  params.chunk_cols = static_cast<int>(chunk_cols);
  params.section_cols = plan.unit_cols;
  params.sections = static_cast<int>(plan.work.cols);
  params.stages = stages;
  const int smem_bytes = quant_smem_bytes(warps, stages);
  switch (args.weight.value_type) {
    case ValueType::kInt8Float16:
      return launch_type<ValueType::kInt8Float16>(params, plan, warps, smem_bytes, prefetch,
                                                  stream);
    case ValueType::kInt8Bfloat16:
      return launch_type<ValueType::kInt8Bfloat16>(params, plan, warps, smem_bytes, prefetch,
                                                   stream);
    case ValueType::kFloat16:
    case ValueType::kBfloat16:
      break;
  }
  return Status::invalid_type("the quantised bitmap kernel has no code for this value type");
}

}  // namespace flash_llm
