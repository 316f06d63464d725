// Y = act(X . W^T + bias) for a weight in the quantised bitmap format and few tokens. Each CTA
// multiplies whole strips of 16 rows, every one by all of its warps:
//   * a warp always has the same columns of chunks, so X of them stays in its registers
//   * it copies one chunk after the other into a ring of its own, decodes it into A fragments
//     (decode.cuh) and multiplies these by mma.m16n8k16, or by mma.m16n8k32 if X is quantised
//   * the warps' sums of a strip meet in shared memory, and the warps take turns in storing Y
// If X is quantised, another kernel rounds it first and writes it to the workspace as fragments;
// with dependent launches weights are copied meanwhile. Every CTA rounds a single token for itself.
// A long K is cut into sections whose X fits the registers. Their sums go through the workspace to
// a finishing kernel. Sums in fp32 are added in a fixed order, and integers are exact in any order,
// so results are repeatable bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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
#include "cuda/schedule/warp_arrival.cuh"
#include "cuda/schedule/weight_copy.cuh"
#include "plan/quantized_bitmap.h"

namespace flash_llm {

struct QuantParams {
  QuantWeight weight;
  const uint16_t* x;
  int64_t x_stride;
  // The workspace, see QuantRowsWorkspace. A pointer is null if it has no such part.
  float4* partial;
  uint4* x_fragments;  // [blocks of tokens][planes of K][words][lanes]
  float* token_scales;
  int* token_sums;  // [sections][tokens]
  Epilogue epilogue;
  RunSteps steps;
  unsigned cta_strips, longer_ctas;  // strips of a CTA; the first longer_ctas have one more
  int section_cols;                  // columns of chunks in a section
  int sections;
  int ring_bytes;    // of each warp
  int token_blocks;  // of 8 tokens, in all CTAs
};

// The two families: how they copy weights.
struct QuantSm80 {
  static constexpr KernelFamily kFamily = KernelFamily::kQuantizedBitmapSm80;
  using WeightCopy = AsyncCopy;
};
struct QuantSm90 {
  static constexpr KernelFamily kFamily = KernelFamily::kQuantizedBitmapSm90;
  using WeightCopy = BulkCopy;
};

// A strip's sums are added when the warp that does so has multiplied this many more, so that it
// need not wait for the others.
inline constexpr int kQuantSumsLag = kQuantSumsStages / 2;

// Where things are in a CTA's shared memory.
struct QuantSmem {
  uint32_t base;
  int warps, ring_bytes;
  int sums_bytes;  // of a strip

  // The guard before the rings has no other use, so what the quantisation of X needs lies there:
  // the largest magnitude of a single token; the sum of each token's integers in the CTA's columns,
  // and its scale; and then zeros, the bits and columns of a chunk without values.
  __device__ __forceinline__ uint32_t magnitude() const { return base; }
  __device__ __forceinline__ uint32_t token_sums() const { return base + 8; }
  __device__ __forceinline__ uint32_t token_scales() const {
    return token_sums() + kQuantMaxTokens * 4;
  }
  __device__ __forceinline__ uint32_t zeros() const { return base + kQuantTokenBytes; }
  __device__ __forceinline__ uint32_t barrier(int i) const {
    return base + kQuantGuardBytes + i * 8;
  }
  // kQuantRingChunks barriers, which are complete when a chunk has been copied.
  __device__ __forceinline__ uint32_t full(int warp) const {
    return barrier(warp * kQuantRingChunks);
  }
  __device__ __forceinline__ uint32_t sums_full(int i) const {
    return barrier(kQuantMaxWarps * kQuantRingChunks + i);
  }
  __device__ __forceinline__ uint32_t sums_empty(int i) const {
    return sums_full(kQuantSumsStages + i);
  }
  // The sums of the i-th strip of kQuantSumsStages.
  __device__ __forceinline__ uint32_t sums(int i) const {
    return barrier(0) + kQuantBarriersBytes + i * sums_bytes;
  }
  __device__ __forceinline__ uint32_t ring(int warp) const {
    return sums(kQuantSumsStages) + warp * ring_bytes;
  }
};

// How X is multiplied. Each struct has
//   kQuantized  whether its tokens have scales; then
//   kBiased     whether the sums of products contain kQuantZero times the sum of X
//   Bytes       how the weight's values are read (decode.cuh)
//   kUnit       a sum is the sum of products divided by it and by the tokens' scales
//   Sum         of the sums
//   PlaneX      X of a plane of chunks and 8 tokens as B fragments, for fragment j of word q
//   Fragments   A fragments of two neighbouring fragments of a plane, made of them as decoded
//   multiply()  adds their products; `x` is that of the first

// X as it is. A fragment is columns 4 t and 4 t + 1 in .x, 4 t + 2 and 4 t + 3 in .y.
template <ValueType kWeight>
struct WideX {
  static constexpr bool kQuantized = false;
  using Values = QuantValues<kWeight>;
  using Bytes = typename Values::Bytes;
  static constexpr float kUnit = Values::kUnit;
  using Sum = float;
  using PlaneX = uint2[kQuantWords][kQuantFragments];

  struct Fragments {
    uint32_t a[2][4];

    __device__ __forceinline__ Fragments(const uint32_t (&low)[2], const uint32_t (&high)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i][0] = Values::template widen<0>(low[i]);
        a[i][1] = Values::template widen<0>(high[i]);
        a[i][2] = Values::template widen<1>(low[i]);
        a[i][3] = Values::template widen<1>(high[i]);
      }
    }
  };

  __device__ __forceinline__ static void multiply(const Fragments& fragments, const uint2* x,
                                                  float (&sums)[4]) {
    ptx::mma_m16n8k16<Values::kDense>(sums, fragments.a[0], x[0].x, x[0].y);
    ptx::mma_m16n8k16<Values::kDense>(sums, fragments.a[1], x[1].x, x[1].y);
  }
};

// X quantised to int8, with a scale for each token. Bytes of int8 values are value + 128, so the
// sums of products contain 128 times the sum of X; nibbles become signed bytes.
template <ValueType kWeight>
struct Int8X {
  static constexpr bool kQuantized = true;
  static constexpr bool kNibbles = value_traits(kWeight).kind == ValueKind::kInt4;
  using Bytes = std::conditional_t<kNibbles, StoredNibbles<4, 8>, StoredBytes<kQuantZero>>;
  static constexpr bool kBiased = !kNibbles;
  static constexpr float kUnit = kNibbles ? 1.0F / 16 : 1.0F;
  using Sum = int;
  using PlaneX = uint32_t[kQuantWords][kQuantFragments];

  struct Fragments {
    uint32_t a[4];

    __device__ __forceinline__ Fragments(const uint32_t (&low)[2], const uint32_t (&high)[2])
        : a{low[0], high[0], low[1], high[1]} {}
  };

  __device__ __forceinline__ static void multiply(const Fragments& fragments, const uint32_t* x,
                                                  int (&sums)[4]) {
    ptx::mma_m16n8k32_int8<!kNibbles>(sums, fragments.a, x[0], x[1]);
  }
};

// How the warps' sums of a strip and 8 tokens meet in shared memory. Each struct has
//   Sum        of the sums
//   kWarpSums  whether each warp stores its sums for itself, and not to a common place
//   give()     adds a warp's sums
//   take()     returns the sums of all warps; the place is ready for another strip
struct FloatSums {
  using Sum = float;
  static constexpr bool kWarpSums = true;
  __device__ __forceinline__ static void give(uint32_t smem, int warp, int warp_bytes, int lane,
                                              const float (&sums)[4]) {
    ptx::store_shared_v4(smem + warp * warp_bytes + lane * 16, sums);
  }
  __device__ __forceinline__ static void take(uint32_t smem, int warps, int warp_bytes, int lane,
                                              float (&sums)[4]) {
    for (int warp = 0; warp < warps; ++warp) {
      const uint4 four = ptx::load_shared_v4(smem + warp * warp_bytes + lane * 16);
      sums[0] += __uint_as_float(four.x);
      sums[1] += __uint_as_float(four.y);
      sums[2] += __uint_as_float(four.z);
      sums[3] += __uint_as_float(four.w);
    }
  }
};

// Lanes are next to each other, so that their additions go to different banks.
struct IntSums {
  using Sum = int;
  static constexpr bool kWarpSums = false;
  __device__ __forceinline__ static void give(uint32_t smem, int /*warp*/, int /*warp_bytes*/,
                                              int lane, const int (&sums)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) ptx::add_shared(smem + e * 128 + lane * 4, sums[e]);
  }
  __device__ __forceinline__ static void take(uint32_t smem, int /*warps*/, int /*warp_bytes*/,
                                              int lane, int (&sums)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[e] = static_cast<int>(ptx::load_shared_u32(smem + e * 128 + lane * 4));
      ptx::store_shared_u32(smem + e * 128 + lane * 4, 0);
    }
  }
};

// The chunks of a warp: those of its columns in each of the CTA's strips.
struct RowsChunks {
  int first_col, columns, warps;
  uint32_t total;

  __device__ __forceinline__ RowsChunks(int first_col, int columns, unsigned strips, int warps)
      : first_col(first_col), columns(columns), warps(warps), total(strips * columns) {}

  __device__ __forceinline__ ChunkPlace operator[](uint32_t chunk) const {
    const uint32_t nth = columns == 1 ? chunk : chunk / kQuantMaxWarpPlanes;  // strip of the CTA
    return {static_cast<int64_t>(blockIdx.x + nth * gridDim.x),
            first_col + static_cast<int>(chunk - nth * columns) * warps};
  }
};

template <typename Family, ValueType kWeight, int kTokens, int kXPlanes, XValues kX>
struct QuantConfig {
  static_assert(kX != XValues::kFp8E4m3);
  using Chunks = RowsChunks;
  using WeightCopy = typename Family::WeightCopy;
  static constexpr ValueType kType = kWeight;
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kPlanes = quant_planes(kWeight);  // of a chunk
  static constexpr int kWarpPlanes = kXPlanes;
  static constexpr int kWarpChunks = kXPlanes / kPlanes;
  static_assert(kXPlanes <= kQuantMaxWarpPlanes && kXPlanes % kPlanes == 0);
  static constexpr int kFixedUnits = quant_fixed_units(kWeight);
  static constexpr int kBlockSumsBytes = kQuantStripM * 8 * 4;
  static constexpr int kSumsBytes = kBlocks * kBlockSumsBytes;  // of a warp
  using X = std::conditional_t<kX == XValues::kInt8, Int8X<kWeight>, WideX<kWeight>>;
  // Whether the upward run of a plane and the downward one have scales of their own.
  static constexpr bool kGroupScales = value_traits(kWeight).scales == ScaleGroup::kRowGroup;
  // One block has few sums, so upward and downward runs have sums of their own and take turns.
  static constexpr int kSumSets = kBlocks == 1 && !kGroupScales ? 2 : 1;
  // The compiler may use the registers of an SM for so many threads. Where it can, it leaves those
  // of a CTA of the kernel that rounds X, which then begins beside a CTA of the kernel before it. X
  // of two blocks and scales of groups need all registers: X is then rounded later, by more
  // threads.
  static constexpr bool kLeavesRegisters = kX == XValues::kInt8 && kBlocks == 1 && !kGroupScales;
  static constexpr int kRoundThreads = kLeavesRegisters ? 128 : 256;
  static constexpr int kBoundThreads = kQuantMaxWarps * 32 + (kLeavesRegisters ? kRoundThreads : 0);
  // Of a warp's chunks of a strip.
  using StripSums = std::conditional_t<kX == XValues::kInt8 && !kGroupScales, IntSums, FloatSums>;
};

using WidePlaneX = WideX<ValueType::kInt8Float16>::PlaneX;

// X of a block of 8 tokens and the columns of a plane from `first` on. Tokens that X does not have
// are its last one again: nobody reads their sums.
__device__ __forceinline__ void load_x(const QuantParams& p, int64_t token_block, int first,
                                       int lane, WidePlaneX& x) {
  const int64_t token = min(token_block * 8 + lane / 4, p.epilogue.n - 1);
  first += quant_col(0, 0, lane, 0);
  const uint16_t* from = p.x + token * p.x_stride + first;
  const auto load = [&](int columns) {
#pragma unroll
    for (int i = 0; i < kQuantWords * kQuantFragments; ++i) {
      const int q = i / kQuantFragments, j = i % kQuantFragments, col = quant_col(q, j, 0, 0);
      x[q][j] = col < columns ? *reinterpret_cast<const uint2*>(from + col) : make_uint2(0, 0);
    }
  };
  if (first + quant_col(kQuantWords - 1, kQuantFragments - 1, 0, 3) < p.weight.k) {
    load(kQuantPlaneK);  // no comparisons
  } else {
    load(p.weight.k - first);
  }
}

// What a warp multiplies of each strip: columns of chunks that lie as far apart as the CTA has
// warps. If a section has fewer columns than the CTA has warps, and chunks have two planes, two
// warps share each of the section's last columns: both copy its chunks, and each multiplies one
// plane of them.
template <typename C>
struct WarpColumns {
  int first;                                     // the first column
  int columns = 0;                               // their number
  int first_plane = 0, planes = C::kWarpPlanes;  // of the chunks

  __device__ __forceinline__ WarpColumns(const QuantParams& p, int warp, int warps) : first(warp) {
    if constexpr (C::kGroupScales) {
      static_assert(C::kWarpChunks == 1);
      const int split = max(warps - p.section_cols, 0);
      const bool second = warp >= p.section_cols;
      first -= second ? split : 0;
      first_plane = second ? 1 : 0;
      planes = first >= p.section_cols - split ? 1 : 2;
    }
    first += static_cast<int>(blockIdx.y) * p.section_cols;
    const int end = min(static_cast<int>(blockIdx.y + 1) * p.section_cols, p.weight.chunk_cols);
#pragma unroll
    for (int c = 0; c < C::kWarpChunks; ++c) columns += first + c * warps < end;
  }

  __device__ __forceinline__ bool has_plane(int plane) const {
    return plane / C::kPlanes < columns && plane < planes;
  }
};

// X of a warp's columns, in registers.
template <typename C>
struct WarpX {
  using X = typename C::X;
  static constexpr int kBlocks = C::kBlocks, kWarpPlanes = C::kWarpPlanes;

  typename X::PlaneX planes[kWarpPlanes][kBlocks] = {};

  // All warps of the CTA must call it.
  __device__ __forceinline__ void load(const QuantParams& p, const QuantSmem& smem,
                                       const WarpColumns<C>& columns, int warp, int lane) {
    const int64_t first_block = int64_t{blockIdx.z} * kBlocks;
    if constexpr (!X::kQuantized) {
#pragma unroll
      for (int i = 0; i < kWarpPlanes * kBlocks; ++i) {
        const int c = i / kBlocks, b = i % kBlocks;
        if (columns.has_plane(c)) {
          load_x(p, first_block + b, first_of(c, columns, smem.warps), lane, planes[c][b]);
        }
      }
    } else {
      if constexpr (kBlocks == 1) {
        if (p.x_fragments == nullptr) return round_one_token(p, smem, columns, lane);
      }
      load_rounded(p, smem, columns, warp, lane);
    }
  }

 private:
  // The first column of the warp's plane `plane`.
  __device__ __forceinline__ static int first_of(int plane, const WarpColumns<C>& columns,
                                                 int warps) {
    return (columns.first + plane / C::kPlanes * warps) * quant_chunk_k(C::kType) +
           (columns.first_plane + plane % C::kPlanes) * kQuantPlaneK;
  }

  // The lanes share the token: each rounds every eighth fragment and gives it to the others.
  __device__ __forceinline__ void round_one_token(const QuantParams& p, const QuantSmem& smem,
                                                  const WarpColumns<C>& columns, int lane) {
    constexpr ValueType kDense = QuantValues<C::kType>::kDense;
    constexpr int kFragments = kQuantWords * kQuantFragments, kShare = kFragments / 8;
    uint2 wide[kWarpPlanes][kShare] = {};
    uint32_t magnitude = 0;
#pragma unroll
    for (int i = 0; i < kWarpPlanes * kShare; ++i) {
      const int c = i / kShare, share = i % kShare;
      const int col =
          first_of(c, columns, smem.warps) + quant_col(0, share * 8 + lane / 4, lane, 0);
      if (columns.has_plane(c) && col < p.weight.k) {
        wide[c][share] = *reinterpret_cast<const uint2*>(p.x + col);
      }
      magnitude = larger_magnitudes<kDense>(magnitude, wide[c][share].x);
      magnitude = larger_magnitudes<kDense>(magnitude, wide[c][share].y);
    }
    magnitude = __reduce_max_sync(~0U, max(magnitude >> 16, magnitude & 0xFFFFU));
    if (lane == 0) ptx::max_shared(smem.magnitude(), magnitude);
    __syncthreads();
    const auto token =
        TokenScale::of<XValues::kInt8, kDense>(ptx::load_shared_u32(smem.magnitude()));
    if (threadIdx.x == 0) {
      ptx::store_shared_u32(smem.token_scales(), __float_as_uint(token.scale));
    }
    int sum = 0;
#pragma unroll
    for (int c = 0; c < kWarpPlanes; ++c) {
      uint32_t fours[kShare];
#pragma unroll
      for (int share = 0; share < kShare; ++share) {
        fours[share] = round_elements<XValues::kInt8, kDense>(wide[c][share], token.inverse);
        sum = add_bytes(fours[share], sum);
      }
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        planes[c][0][i / kQuantFragments][i % kQuantFragments] =
            __shfl_sync(~0U, fours[i / 8], i % 8 * 4 + lane % 4);
      }
    }
    if constexpr (X::kBiased) {
      sum = __reduce_add_sync(~0U, sum);
      if (lane == 0) ptx::add_shared(smem.token_sums(), sum);
    }
  }

  // Loads what round_tokens_kernel has written.
  __device__ __forceinline__ void load_rounded(const QuantParams& p, const QuantSmem& smem,
                                               const WarpColumns<C>& columns, int warp, int lane) {
    const int64_t first_block = int64_t{blockIdx.z} * kBlocks;
    const int x_planes = p.weight.chunk_cols * C::kPlanes;
#pragma unroll
    for (int i = 0; i < kWarpPlanes * kBlocks; ++i) {
      const int c = i / kBlocks, b = i % kBlocks;
      if (!columns.has_plane(c)) continue;
      const int plane = first_of(c, columns, smem.warps) / kQuantPlaneK;
      const uint4* from =
          p.x_fragments + ((first_block + b) * x_planes + plane) * kQuantWords * 32 + lane;
#pragma unroll
      for (int q = 0; q < kQuantWords; ++q) {
        const uint4 four = __ldcg(from + q * 32);
        planes[c][b][q][0] = four.x;
        planes[c][b][q][1] = four.y;
        planes[c][b][q][2] = four.z;
        planes[c][b][q][3] = four.w;
      }
    }
    if (warp == 0 && lane < kBlocks * 8) {
      const int64_t token = first_block * 8 + lane;
      ptx::store_shared_u32(smem.token_scales() + lane * 4,
                            __float_as_uint(__ldcg(p.token_scales + token)));
      const int64_t in_section = int64_t{blockIdx.y} * p.token_blocks * 8 + token;
      ptx::store_shared_u32(smem.token_sums() + lane * 4,
                            static_cast<uint32_t>(__ldcg(p.token_sums + in_section)));
    }
  }
};

// A lane's sums of a strip, by block of 8 tokens.
template <typename C>
using Sums = typename C::X::Sum[C::kBlocks][4];

// Multiplies the fragments of word kWord of a run by X of a plane of chunks.
template <typename C, int kWord, typename Run>
__device__ __forceinline__ void multiply_word(uint32_t word, Run& run, const RunSteps& steps,
                                              const typename C::X::PlaneX (&x)[C::kBlocks],
                                              Sums<C>& sums) {
  using X = typename C::X;
  using Bytes = typename X::Bytes;
  uint32_t low[kQuantFragments], high[kQuantFragments];
  run.template take<0, Bytes>(word, steps, low[0], high[0]);
  run.template take<1, Bytes>(word, steps, low[1], high[1]);
  const typename X::Fragments first({low[0], low[1]}, {high[0], high[1]});
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) X::multiply(first, &x[b][kWord][0], sums[b]);
  run.template take<2, Bytes>(word, steps, low[2], high[2]);
  run.template take<3, Bytes>(word, steps, low[3], high[3]);
  const typename X::Fragments second({low[2], low[3]}, {high[2], high[3]});
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) X::multiply(second, &x[b][kWord][2], sums[b]);
}

template <typename C>
__device__ __forceinline__ void multiply_chunk(uint32_t chunk, uint32_t top, const RunSteps& steps,
                                               const typename C::X::PlaneX (&x)[C::kBlocks],
                                               int lane, uint32_t lane_column, Sums<C>& up_sums,
                                               Sums<C>& down_sums) {
  const QuantPlane<1> parts(top, 0, lane);
  RunReader<true> up(chunk, lane_column);
  multiply_word<C, 0>(parts.bits[0], up, steps, x, up_sums);
  if constexpr (C::kSumSets == 1) multiply_word<C, 1>(parts.bits[1], up, steps, x, up_sums);
  RunReader<false> down(top, parts.column);
  multiply_word<C, 2>(parts.bits[2], down, steps, x, down_sums);
  if constexpr (C::kSumSets == 2) multiply_word<C, 1>(parts.bits[1], up, steps, x, up_sums);
  multiply_word<C, 3>(parts.bits[3], down, steps, x, down_sums);
}

// The scales of rows lane / 4 and lane / 4 + 8 for a group of the chunk: `two` are those that
// ChunkRing::load_group_scales() returned.
__device__ __forceinline__ float2 group_scales(uint32_t two, int group) {
  const uint32_t pair = __shfl_sync(~0U, two, group, 4);
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Sums of a lane in fp32, by block of 8 tokens.
template <typename C>
using FloatTotals = float[C::kBlocks][4];

template <typename C>
__device__ __forceinline__ void add_scaled(const Sums<C>& sums, float2 scales,
                                           FloatTotals<C>& totals) {
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = e < 2 ? scales.x : scales.y;
      totals[b][e] = __fmaf_rn(static_cast<float>(sums[b][e]), scale, totals[b][e]);
    }
  }
}

// Multiplies a plane of a chunk, each of whose runs has its own scales.
template <typename C>
__device__ __forceinline__ void multiply_plane(int plane, uint32_t chunk, uint32_t top,
                                               const RunSteps& steps,
                                               const typename C::X::PlaneX (&x)[C::kBlocks],
                                               int lane, uint32_t lane_column, uint32_t two_scales,
                                               FloatTotals<C>& totals) {
  const QuantPlane<C::kPlanes> parts(top, plane, lane);
  const int first_bit = C::X::Bytes::first_bit(plane);
  RunReader<true> up(chunk, lane_column, first_bit);
  RunReader<false> down(top, parts.column, first_bit);
  Sums<C> up_sums = {}, down_sums = {};
  multiply_word<C, 0>(parts.bits[0], up, steps, x, up_sums);
  multiply_word<C, 2>(parts.bits[2], down, steps, x, down_sums);
  multiply_word<C, 1>(parts.bits[1], up, steps, x, up_sums);
  add_scaled<C>(up_sums, group_scales(two_scales, 2 * plane), totals);
  multiply_word<C, 3>(parts.bits[3], down, steps, x, down_sums);
  add_scaled<C>(down_sums, group_scales(two_scales, 2 * plane + 1), totals);
}

// The scales of rows lane / 4 and lane / 4 + 8 of a strip; 1 if groups of columns have scales,
// which the sums contain.
template <ValueType kType>
__device__ __forceinline__ float2 load_row_scales(const QuantParams& p, int strip, int lane) {
  if constexpr (value_traits(kType).scales == ScaleGroup::kRow) {
    const float* scales = p.weight.row_scales(strip);
    if (scales != nullptr) return make_float2(scales[lane / 4], scales[lane / 4 + 8]);
  }
  return make_float2(1.0F, 1.0F);
}

// Stores Y of a strip and 8 tokens from a warp's sums, in fragment order.
template <ValueType kType>
__device__ __forceinline__ void store_strip(const QuantParams& p, int strip, int token_block,
                                            int lane, float2 scales, float4 sums) {
  sums = make_float4(sums.x * scales.x, sums.y * scales.x, sums.z * scales.y, sums.w * scales.y);
  p.epilogue.store_fragment<QuantValues<kType>::kDense>(
      int64_t{token_block} * 8 + lane % 4 * 2, int64_t{strip} * kQuantStripM + lane / 4, sums);
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Where a section's sums of a strip and 8 tokens are in the workspace.
__device__ __forceinline__ float4* partial_sums(const QuantParams& p, int section, int token_block,
                                                int strip) {
  return p.partial +
         ((int64_t{section} * p.token_blocks + token_block) * p.weight.strips + strip) * 32;
}

// A strip whose sums a warp adds: the nth of the CTA, with the scales of the lane's rows, which are
// loaded long before they are used.
struct Turn {
  unsigned nth;
  int strip;
  float2 scales = make_float2(1.0F, 1.0F);

  __device__ __forceinline__ Turn(unsigned nth_strip)
      : nth(nth_strip), strip(static_cast<int>(blockIdx.x + nth * gridDim.x)) {}
};

// Adds the warps' sums of a strip and stores them.
template <typename C>
__device__ __forceinline__ void add_strip(const QuantParams& p, const QuantSmem& smem,
                                          const Turn& turn, int lane) {
  const unsigned buffer = turn.nth % kQuantSumsStages;
  ptx::mbarrier_wait(smem.sums_full(buffer), turn.nth / kQuantSumsStages & 1);
#pragma unroll
  for (int b = 0; b < C::kBlocks; ++b) {
    typename C::StripSums::Sum total[4] = {};
    C::StripSums::take(smem.sums(buffer) + b * C::kBlockSumsBytes, smem.warps, C::kSumsBytes, lane,
                       total);
    float2 tokens = make_float2(1.0F, 1.0F);
    if constexpr (C::X::kQuantized) {
      const uint32_t pair = (b * 8 + lane % 4 * 2) * 4;
      if constexpr (C::X::kBiased) {
        const uint2 sums = ptx::load_shared_v2(smem.token_sums() + pair);
        total[0] -= kQuantZero * static_cast<int>(sums.x);
        total[1] -= kQuantZero * static_cast<int>(sums.y);
        total[2] -= kQuantZero * static_cast<int>(sums.x);
        total[3] -= kQuantZero * static_cast<int>(sums.y);
      }
      const uint2 factors = ptx::load_shared_v2(smem.token_scales() + pair);
      tokens = make_float2(__uint_as_float(factors.x), __uint_as_float(factors.y));
    }
    tokens.x *= C::X::kUnit;
    tokens.y *= C::X::kUnit;
    const float4 sum = make_float4(
        static_cast<float>(total[0]) * tokens.x, static_cast<float>(total[1]) * tokens.y,
        static_cast<float>(total[2]) * tokens.x, static_cast<float>(total[3]) * tokens.y);
    const int token_block = static_cast<int>(blockIdx.z) * C::kBlocks + b;
    if (p.partial == nullptr) {
      store_strip<C::kType>(p, turn.strip, token_block, lane, turn.scales, sum);
    } else {
      partial_sums(p, static_cast<int>(blockIdx.y), token_block, turn.strip)[lane] = sum;
    }
  }
  arrive_for_warp(smem.sums_empty(buffer), lane);
}

// Rounds X to int8 and writes it to the workspace. The grid: tokens, including those that fill the
// last block; sections, of `section_k` columns.
template <ValueType kDense, int kRoundThreads>
__global__ void __launch_bounds__(kRoundThreads)
    round_tokens_kernel(const __grid_constant__ QuantParams p, int section_k, int x_planes) {
  allow_next_kernel();
  wait_for_previous_kernel();  // it may write X, and use the workspace
  // Groups of eight elements that a thread rounds.
  constexpr int kRoundedOctets =
      kQuantMaxWarps * kQuantMaxWarpPlanes * kQuantPlaneK / (8 * kRoundThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int token = static_cast<int>(blockIdx.x);
  const int begin = static_cast<int>(blockIdx.y) * section_k;
  const int end = min(begin + section_k, x_planes * kQuantPlaneK);
  const int stored = token < p.epilogue.n ? p.weight.k : 0;
  const uint16_t* row = p.x + token * p.x_stride;
  // Each row of X is followed by zeros up to the next multiple of 8 columns.
  const auto eight = [&](int col) {
    return col < stored ? *reinterpret_cast<const uint4*>(row + col) : make_uint4(0, 0, 0, 0);
  };
  uint4 octets[kRoundedOctets];
  uint32_t pairs = 0;
#pragma unroll
  for (int i = 0; i < kRoundedOctets; ++i) {
    const int col = begin + (i * kRoundThreads + thread) * 8;
    octets[i] = col < end ? eight(col) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (const uint4& octet : octets) pairs = larger_magnitudes<kDense>(pairs, octet);
  for (int col = thread * 8; p.sections > 1 && col < stored; col += kRoundThreads * 8) {
    pairs = larger_magnitudes<kDense>(pairs, eight(col));
  }
  const TokenScale scale = scale_of_token<XValues::kInt8, kDense>(pairs);
  auto* block = reinterpret_cast<uint32_t*>(p.x_fragments) +
                int64_t{token / 8} * x_planes * kQuantWords * 32 * kQuantFragments;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kRoundedOctets; ++i) {
    const int col = begin + (i * kRoundThreads + thread) * 8;
    if (col >= end) break;
    // The lane's columns 4 t + e of a fragment, with t = 0 or 2, and those of its neighbour.
    const int lane = token % 8 * 4 + col % 16 / 4, fragment = col / 16 % kQuantFragments;
    uint32_t* word = block + (col / 64 * 32 + lane) * kQuantFragments + fragment;
    const uint32_t low =
        round_elements<XValues::kInt8, kDense>(make_uint2(octets[i].x, octets[i].y), scale.inverse);
    const uint32_t high =
        round_elements<XValues::kInt8, kDense>(make_uint2(octets[i].z, octets[i].w), scale.inverse);
    word[0] = low;
    word[kQuantFragments] = high;
    sum = add_bytes(low, add_bytes(high, sum));
  }
  sum = add_threads(sum);
  if (thread == 0) {
    p.token_sums[blockIdx.y * gridDim.x + token] = sum;
    if (blockIdx.y == 0) p.token_scales[token] = scale.scale;
  }
}

// The grid: CTAs that share the strips; sections; blocks of tokens.
template <typename C>
__global__ void __launch_bounds__(C::kBoundThreads, 1)
    quantized_rows_kernel(const __grid_constant__ QuantParams p) {
  if constexpr (kHasSm90 || !C::WeightCopy::kNeedsSm90) {
    extern __shared__ uint8_t smem_bytes[];
    const int warps = static_cast<int>(blockDim.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
    const QuantSmem smem = {(ptx::smem_address(smem_bytes) + 127) / 128 * 128, warps, p.ring_bytes,
                            (C::StripSums::kWarpSums ? warps : 1) * C::kSumsBytes};
    allow_next_kernel();
    const WarpColumns<C> columns(p, warp, warps);
    const unsigned strips = p.cta_strips + (blockIdx.x < p.longer_ctas);
    if (lane == 0) {
      for (int i = 0; i < kQuantRingChunks; ++i) {
        ptx::mbarrier_init(smem.full(warp) + i * 8, C::WeightCopy::kArrivals);
      }
      if (warp == 0) {
        for (int i = 0; i < kQuantSumsStages; ++i) {
          ptx::mbarrier_init(smem.sums_full(i), warps * kWarpArrivals);
          ptx::mbarrier_init(smem.sums_empty(i), kWarpArrivals);
        }
      }
      C::WeightCopy::fence_barriers();
    }
    __syncwarp();
    ChunkRing<C> ring(p.weight, RowsChunks(columns.first, columns.columns, strips, warps),
                      smem.full(warp), smem.ring(warp), p.ring_bytes, lane);
    constexpr int kZerosBytes = C::kPlanes * (kQuantBitsBytes + kQuantColumnsBytes);
    for (int i = static_cast<int>(threadIdx.x); i < kZerosBytes / 4; i += warps * 32) {
      ptx::store_shared_u32(smem.zeros() + i * 4, 0);
    }
    if (threadIdx.x == 0) {  // of a single token
      ptx::store_shared_u32(smem.magnitude(), 0);
      ptx::store_shared_u32(smem.token_sums(), 0);
    }
    if constexpr (!C::StripSums::kWarpSums) {
      for (int i = static_cast<int>(threadIdx.x); i < kQuantSumsStages * C::kSumsBytes / 4;
           i += warps * 32) {
        ptx::store_shared_u32(smem.sums(0) + i * 4, 0);
      }
    }
    const auto take_turn = [&](unsigned nth) {
      Turn turn(nth);
      if (nth < strips) turn.scales = load_row_scales<C::kType>(p, turn.strip, lane);
      return turn;
    };
    Turn turn = take_turn(warp);
    LaneScales next_scales;
    if constexpr (C::kGroupScales) next_scales = ring.template load_group_scales<0>();
    __syncthreads();
    wait_for_previous_kernel();  // it may have written X
    WarpX<C> x;
    x.load(p, smem, columns, warp, lane);
    const uint32_t lane_column = lane * p.steps.column;
    // For sm_120 ptxas spills registers of int8 kernels without a copy, and of int4 ones with it.
    std::conditional_t<C::kGroupScales, const RunSteps&, const RunSteps> steps = p.steps;
#pragma unroll 1
    for (unsigned i = 0; i < strips + kQuantSumsLag; ++i) {
      if (i < strips) {
        // A strip's sums, or of types with scales for groups their scaled sums.
        std::conditional_t<C::kGroupScales, FloatTotals<C>, Sums<C>> sums[C::kSumSets] = {};
#pragma unroll
        for (int c = 0; c < C::kWarpChunks; ++c) {
          if (c >= columns.columns) break;
          const uint32_t two_scales = next_scales.low | next_scales.high << 16;
          if constexpr (C::kGroupScales) next_scales = ring.template load_group_scales<1>();
          int rows;
          const uint32_t chunk = ring.wait(&rows);
          // Absent values are multiplied too: X may be infinite there.
          const uint32_t top = rows == 0 ? smem.zeros() : chunk + rows * kQuantRowBytes;
          if constexpr (C::kGroupScales) {
            static_assert(C::kPlanes == 2);
            if (columns.planes == 2) {
              multiply_plane<C>(0, chunk, top, steps, x.planes[0], lane, lane_column, two_scales,
                                sums[0]);
              multiply_plane<C>(1, chunk, top, steps, x.planes[1], lane, lane_column, two_scales,
                                sums[0]);
            } else {
              multiply_plane<C>(columns.first_plane, chunk, top, steps, x.planes[0], lane,
                                lane_column, two_scales, sums[0]);
            }
          } else {
            multiply_chunk<C>(chunk, top, steps, x.planes[c], lane, lane_column, sums[0],
                              sums[C::kSumSets - 1]);
          }
          ring.release();
        }
        const int buffer = i % kQuantSumsStages;
        ptx::mbarrier_wait(smem.sums_empty(buffer), (i / kQuantSumsStages & 1) ^ 1);
#pragma unroll
        for (int b = 0; b < C::kBlocks; ++b) {
#pragma unroll
          for (int e = 0; C::kSumSets == 2 && e < 4; ++e) sums[0][b][e] += sums[1][b][e];
          C::StripSums::give(smem.sums(buffer) + b * C::kBlockSumsBytes, warp, C::kSumsBytes, lane,
                             sums[0][b]);
        }
        arrive_for_warp(smem.sums_full(buffer), lane);
      }
      if (i == turn.nth + kQuantSumsLag) {
        add_strip<C>(p, smem, turn, lane);
        turn = take_turn(turn.nth + warps);
      }
    }
  }
}

inline constexpr int kQuantFinishWarps = 4;

// Adds the sections' sums. The grid: strips, kQuantFinishWarps at a time; blocks of tokens. Eight
// CTAs per SM leave 64 registers to a thread; ptxas otherwise aims at fewer, and spills for sm_100.
template <ValueType kType>
__global__ void __launch_bounds__(kQuantFinishWarps * 32, 8)
    quantized_finish_kernel(const __grid_constant__ QuantParams p) {
  allow_next_kernel();
  const int strip = static_cast<int>(blockIdx.x * kQuantFinishWarps + threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (strip >= p.weight.strips) return;
  const float2 scales = load_row_scales<kType>(p, strip, lane);
  wait_for_previous_kernel();
  float4 sum = make_float4(0, 0, 0, 0);
  for (int section = 0; section < p.sections; ++section) {
    sum = add(sum, partial_sums(p, section, static_cast<int>(blockIdx.y), strip)[lane]);
  }
  store_strip<kType>(p, strip, static_cast<int>(blockIdx.y), lane, scales, sum);
}

template <typename C>
Status launch_quantized(const QuantParams& params, const SpmmPlan& plan, int warps, int smem_bytes,
                        bool prefetch, cudaStream_t stream) {
  const Status sized = allow_smem("cudaFuncSetAttribute(quantized_rows_kernel)",
                                  quantized_rows_kernel<C>, smem_bytes);
  if (!sized.ok()) return sized;
  const dim3 grid(static_cast<unsigned>(plan.ctas), static_cast<unsigned>(params.sections),
                  static_cast<unsigned>(params.token_blocks / C::kBlocks));
  bool dependent = C::WeightCopy::kNeedsSm90;
  if (!dependent) {
    const Status described = waits_for_previous_kernel(
        "cudaFuncGetAttributes(quantized_rows_kernel)", quantized_rows_kernel<C>, &dependent);
    if (!described.ok()) return described;
  }
  bool dependent_rows = dependent && prefetch;
  if constexpr (C::X::kQuantized) {
    if (params.x_fragments != nullptr) {
      const dim3 round_grid(static_cast<unsigned>(params.token_blocks * 8), grid.y);
      const Status rounded = launch_kernel(
          "round_tokens_kernel launch",
          round_tokens_kernel<QuantValues<C::kType>::kDense, C::kRoundThreads>, round_grid,
          C::kRoundThreads, 0, dependent_rows, stream, params,
          params.section_cols * quant_chunk_k(C::kType), params.weight.chunk_cols * C::kPlanes);
      if (!rounded.ok()) return rounded;
      // Without `prefetch` it begins, and reads the weight, when the previous call has finished,
      // because the first kernel does.
      dependent_rows = dependent;
    }
  }
  const Status multiplied =
      launch_kernel("quantized_rows_kernel launch", quantized_rows_kernel<C>, grid, warps * 32,
                    smem_bytes, dependent_rows, stream, params);
  if (!multiplied.ok() || params.sections == 1) return multiplied;
  const dim3 finish_grid(
      static_cast<unsigned>((params.weight.strips + kQuantFinishWarps - 1) / kQuantFinishWarps),
      static_cast<unsigned>(params.token_blocks));
  return launch_kernel("quantized_finish_kernel launch", quantized_finish_kernel<C::kType>,
                       finish_grid, kQuantFinishWarps * 32, 0, dependent, stream, params);
}

template <typename Family, ValueType kType>
Status launch_quantized_config(const QuantParams& params, const SpmmPlan& plan, int warps,
                               int smem_bytes, bool prefetch, cudaStream_t stream) {
  int index = 0;
#define FLASH_LLM_ROW(name, tokens, planes, x)                                \
  if (plan.config == index++) {                                               \
    constexpr QuantizedBitmapConfig kConfig = {#name, tokens, planes, x};     \
    if constexpr (kConfig.multiplies(kType)) {                                \
      return launch_quantized<QuantConfig<Family, kType, tokens, planes, x>>( \
          params, plan, warps, smem_bytes, prefetch, stream);                 \
    }                                                                         \
  }
  FLASH_LLM_QUANTIZED_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no quantised bitmap configuration has index " +
                               std::to_string(plan.config));
}

// Runs a plan of a family.
template <typename Family>
Status spmm_quantized_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                             bool prefetch, cudaStream_t stream) {
  if (Status fits = check_plan(plan, Family::kFamily, args); !fits.ok()) return fits;
  const auto& configs = quantized_bitmap_configs(Family::kFamily);
  if (plan.config < 0 || plan.config >= static_cast<int>(configs.size())) {
    return Status::invalid_value("no quantised bitmap configuration has index " +
                                 std::to_string(plan.config));
  }
  const QuantizedBitmapConfig& config = configs[static_cast<size_t>(plan.config)];
  const ValueType type = args.weight.value_type;
  const int64_t chunk_cols = num_quant_chunks(type, args.weight.k);
  const int warps = plan.warps;
  const int ring_bytes = warps < 1 ? 0 : plan.ring_bytes / warps;
  if (!config.multiplies(type) || warps < 1 || warps > kQuantMaxWarps ||
      plan.unit_cols > warps * config.warp_chunks(type) ||
      warps > plan.unit_cols * quant_planes(type) || ring_bytes < quant_min_ring_bytes(type) ||
      ring_bytes % 128 != 0 || plan.ctas != plan.work.workers ||
      plan.work.cols != (chunk_cols + plan.unit_cols - 1) / plan.unit_cols) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  const QuantRowsWorkspace parts(config, type, args.weight.m, args.n, args.weight.k,
                                 plan.work.cols);
  if (Status enough = cuda::check_launch(plan, parts.bytes()); !enough.ok()) return enough;
  QuantParams params = {};
  params.weight = QuantWeight::of(args.weight);
  params.x = args.x;
  params.x_stride = args.x_stride;
  auto* bytes = static_cast<uint8_t*>(workspace);
  params.partial = parts.sums_bytes == 0 ? nullptr : reinterpret_cast<float4*>(bytes);
  bytes += parts.sums_bytes;
  params.x_fragments = parts.x_bytes == 0 ? nullptr : reinterpret_cast<uint4*>(bytes);
  params.token_scales = reinterpret_cast<float*>(bytes + parts.x_bytes);
  params.token_sums = reinterpret_cast<int*>(bytes + parts.x_bytes + parts.scales_bytes);
  params.epilogue = {args.bias, args.y, args.weight.m, args.n, args.activation};
  params.steps = RunSteps{};
  params.cta_strips = static_cast<unsigned>(params.weight.strips / plan.ctas);
  params.longer_ctas = static_cast<unsigned>(params.weight.strips % plan.ctas);
  params.section_cols = plan.unit_cols;
  params.sections = static_cast<int>(plan.work.cols);
  params.ring_bytes = ring_bytes;
  params.token_blocks = static_cast<int>(config.passes(args.n)) * config.tile_n / 8;
  const int smem_bytes = quant_smem_bytes(config, type, warps, ring_bytes);
  return run_for_type(type, [&](auto typed) {
    return launch_quantized_config<Family, decltype(typed)::value>(params, plan, warps, smem_bytes,
                                                                   prefetch, stream);
  });
}

}  // namespace flash_llm
