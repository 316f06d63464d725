// Y = act(X . W^T + bias) for a weight in the quantised bitmap format and 8 tokens at a time, on
// GPUs with bulk copies. Each CTA multiplies whole strips of 16 rows, every one by all of its
// warps:
//   * a warp always has the same columns of chunks, so X of them stays in its registers
//   * it copies one chunk after the other into stages of its own, decodes it into A fragments
//     (decode.cuh) and multiplies these by mma.m16n8k16
//   * the warps' sums of a strip meet in shared memory, where they take turns in adding them
// A long K is cut into sections whose X fits the registers. Their sums go through the workspace to
// a finishing kernel. All sums are added in a fixed order, so results are repeatable bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

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

// X of a column of chunks as B fragments: the two registers for fragment j of word q.
using ChunkX = uint2[kQuantWords][kQuantFragments];

template <ValueType kType>
__device__ __forceinline__ void load_x(const QuantParams& p, int chunk_col, int lane, ChunkX& x) {
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

template <ValueType kType, int kFragment, bool kUp>
__device__ __forceinline__ void multiply_fragment(uint32_t word, RunReader<kUp>& run,
                                                  const RunSteps& steps, uint2 x,
                                                  float (&sums)[4]) {
  using Values = QuantValues<kType>;
  uint32_t low, high;
  run.template take<kFragment>(word, steps, Values::kZero, low, high);
  const uint32_t a[4] = {Values::template widen<0>(low), Values::template widen<0>(high),
                         Values::template widen<1>(low), Values::template widen<1>(high)};
  ptx::mma_m16n8k16<Values::kDense>(sums, a, x.x, x.y);
}

template <ValueType kType, bool kUp>
__device__ __forceinline__ void multiply_word(uint32_t word, RunReader<kUp>& run,
                                              const RunSteps& steps,
                                              const uint2 (&x)[kQuantFragments], float (&sums)[4]) {
  multiply_fragment<kType, 0>(word, run, steps, x[0], sums);
  multiply_fragment<kType, 1>(word, run, steps, x[1], sums);
  multiply_fragment<kType, 2>(word, run, steps, x[2], sums);
  multiply_fragment<kType, 3>(word, run, steps, x[3], sums);
}

template <ValueType kType>
__device__ __forceinline__ void multiply_chunk(uint32_t chunk, int rows, const RunSteps& steps,
                                               const ChunkX& x, int lane, float (&up_sums)[4],
                                               float (&down_sums)[4]) {
  const QuantChunk parts(chunk, rows, lane);
  RunReader<true> up(chunk, lane * 4);
  RunReader<false> down(parts.top, parts.column);
  multiply_word<kType>(parts.bits[0], up, steps, x[0], up_sums);
  multiply_word<kType>(parts.bits[2], down, steps, x[2], down_sums);
  multiply_word<kType>(parts.bits[1], up, steps, x[1], up_sums);
  multiply_word<kType>(parts.bits[3], down, steps, x[3], down_sums);
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

// The grid: CTAs that share the strips; sections; blocks of tokens.
template <ValueType kType>
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
    ChunkX x[kQuantWarpChunks];
#pragma unroll
    for (int c = 0; c < kQuantWarpChunks; ++c) {
      if (c < columns) load_x<kType>(p, first_col + c * warps, lane, x[c]);
    }
    __syncthreads();
    int stage = 0;
    uint32_t phase = 0;
#pragma unroll 1
    for (int i = 0; i < strips; ++i) {
      const int strip = static_cast<int>(blockIdx.x + i * gridDim.x);
      const bool adds = i % warps == warp;
      const float2 scales = adds ? load_scales(p, strip, lane) : make_float2(1.0F, 1.0F);
      float up_sums[4] = {}, down_sums[4] = {};
#pragma unroll
      for (int c = 0; c < kQuantWarpChunks; ++c) {
        if (c >= columns) break;
        ptx::mbarrier_wait(smem.full(warp, stage), phase);
        const int rows = static_cast<int>(ptx::load_shared_u32(smem.rows(warp, stage)));
        multiply_chunk<kType>(smem.stage(warp, stage), rows, p.steps, x[c], lane, up_sums,
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
      ptx::store_shared_v4(smem.sums(buffer, warp) + lane * 16, up_sums);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(smem.sums_full(buffer));
      if (!adds) continue;
      ptx::mbarrier_wait(smem.sums_full(buffer), use);
      float4 sum = make_float4(0, 0, 0, 0);
      for (int w = 0; w < warps; ++w) {
        sum = add(sum, ptx::load_shared_v4(smem.sums(buffer, w) + lane * 16));
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(smem.sums_empty(buffer));
      if (p.partial == nullptr) {
        store_strip<kType>(p, strip, static_cast<int>(blockIdx.z), lane, scales, sum);
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

template <ValueType kType>
Status launch(const QuantParams& params, const SpmmPlan& plan, int warps, int smem_bytes,
              bool prefetch, cudaStream_t stream) {
  const Status sized = allow_smem("cudaFuncSetAttribute(quantized_rows_kernel)",
                                  quantized_rows_kernel<kType>, smem_bytes);
  if (!sized.ok()) return sized;
  const auto token_blocks = static_cast<unsigned>(quant_token_blocks(params.epilogue.n));
  const dim3 grid(static_cast<unsigned>(plan.ctas), static_cast<unsigned>(params.sections),
                  token_blocks);
  const Status multiplied =
      launch_kernel("quantized_rows_kernel launch", quantized_rows_kernel<kType>, grid, warps * 32,
                    smem_bytes, prefetch, stream, params);
  if (!multiplied.ok() || params.sections == 1) return multiplied;
  const auto ctas = static_cast<unsigned>((params.strips + kFinishWarps - 1) / kFinishWarps);
  return launch_kernel("quantized_finish_kernel launch", quantized_finish_kernel<kType>,
                       dim3(ctas, token_blocks), kFinishWarps * 32, 0, true, stream, params);
}

}  // namespace

Status cuda::spmm_quantized_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                                   bool prefetch, cudaStream_t stream) {
  const Status fits = check_plan(plan, KernelFamily::kQuantizedBitmapSm90, args);
  if (!fits.ok()) return fits;
  const int warps = quant_warps(plan.unit_cols);
  const int stages = warps < 1 ? 0 : plan.ring_bytes / (warps * kQuantStageBytes);
  const int64_t chunk_cols = num_quant_chunks(args.weight.k);
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
      return launch<ValueType::kInt8Float16>(params, plan, warps, smem_bytes, prefetch, stream);
    case ValueType::kInt8Bfloat16:
      return launch<ValueType::kInt8Bfloat16>(params, plan, warps, smem_bytes, prefetch, stream);
    case ValueType::kFloat16:
    case ValueType::kBfloat16:
      break;
  }
  return Status::invalid_type("the quantised bitmap kernel has no code for this value type");
}

}  // namespace flash_llm
