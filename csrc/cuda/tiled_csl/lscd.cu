// The LSCD kernel: load W as sparse, compute as dense (Flash-LLM, arXiv 2309.10285, section 4.3).
//
//   X        [n, x_stride] fp16/bf16, see launch.h
//   offsets  int32[tiles + 1], entries uint32[...]: Tiled-CSL, see format/tiled_csl.h
//   Y        [n, m]; fp32 partial sums in a workspace, see stream_k.cuh
//
// A CTA has 4 warps. 1, 2 or 4 of them form a group that works on one tile (128 rows x 64 columns
// of W) at a time, so a CTA has 4, 2 or 1 groups, each with 16 KB of shared memory. A CTA's work
// range (stream_k.cuh) consists of segments of tile rows, and its groups split each segment along
// K:
//
//              K ->   group 0    group 1    group 2    group 3
//   segment        | . . . . . | . . . . . | . . . . . | . . . . . |   a dot is a tile
//
// For each tile a group
//   1. scatters the tile's entries from registers into its zeroed tile in shared memory, and issues
//      the loads of the next tile's entries (extract.cuh);
//   2. multiplies by mma.m16n8k16: A fragments from ldmatrix, B fragments of X straight from global
//      memory (the permutation of a tile's columns makes them 16-byte loads);
//   3. clears the tile: only the positions of its entries, if they were kept.
//
// The paper overlaps extraction and multiplication by two tiles per CTA and CTA-wide barriers. Here
// groups are independent and an SM runs up to 12 of them, so that while one extracts, another
// multiplies and a third waits for memory. With one warp per group the main loop has no barrier.
//
// At the end of a segment the groups' sums are added in shared memory, in a fixed order. They go to
// Y through the epilogue or, if the tile row is shared with another CTA, to the workspace.
//
// With dependent launches the start of a kernel overlaps with the end of the previous one: entries
// are loaded at once, X only after the wait.
//
// setup.py prints the registers and shared memory of each configuration after every build.
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/stream_k.cuh"
#include "cuda/tiled_csl/extract.cuh"
#include "plan/tiled_csl_sm80.h"

namespace flash_llm {
namespace {

constexpr int kCtaThreads = kLscdCtaWarps * 32;

// The partial sums in slot `slot` of `cta`, fp32 [tile_n][kTileM].
__device__ __forceinline__ float* partial_sums(float* workspace, int cta, int slot, int tile_n) {
  return workspace + (int64_t{cta} * 2 + slot) * tile_n * kTileM;
}

struct LscdParams {
  const uint16_t* x;
  int64_t x_stride;
  const int32_t* offsets;
  const uint32_t* entries;
  int num_vectors;
  int tile_rows;
  int64_t k;
  uint4* packed_x;
  // A work unit is a tile. A row of the work grid is a tile row by tile_n tokens, numbered
  // token_block * tile_rows + tile_row.
  StreamK schedule;
  float* workspace;
  Epilogue epilogue;
};

template <ValueType kTypeArg, int kWarpsPerTileArg, int kTileNArg, int kCtasPerSmArg,
          bool kPackedXArg>
struct LscdKernelConfig {
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kWarpsPerTile = kWarpsPerTileArg;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kCtasPerSm = kCtasPerSmArg;
  static constexpr bool kPackedX = kPackedXArg;

  static constexpr int kGroups = kLscdCtaWarps / kWarpsPerTile;
  static constexpr int kGroupThreads = kWarpsPerTile * 32;
  static constexpr int kWarpRows = kTileM / kWarpsPerTile;
  static constexpr int kBlocksM = kWarpRows / 16;  // 16-row blocks of a warp
  static constexpr int kBlocksN = kTileN / 8;
  static constexpr int kSmemBytes = kGroups * kTileBytes;
  // Vectors in flight per thread (512 bytes each per warp), as many as the registers allow. 7 is 1
  // to 2 % faster than 8 on an H200 because less of a tile's last batch is empty.
  static constexpr int kBatch = kTileN <= 16 ? 7 : 4;
  // Vectors per thread whose positions are kept, in two registers each. A tile with no more vectors
  // (from 70 % zeros on at N = 8, from 90 % at N = 16) is cleared by as many wavefronts as its
  // scatter takes (80, 58 and 34 at 70, 80 and 90 %), any other tile by 128.
  static constexpr int kKept = kTileN == 8 ? 21 : kTileN == 16 ? 7 : 0;
  // Whether a tile's X fragments are loaded before its extraction, which hides their latency. If
  // they are too many for the registers, each is loaded where it is used.
  static constexpr bool kXResident = kBlocksN <= 4;
  // Tokens whose sums fit a tile's shared memory, as fp32 [tokens][128].
  static constexpr int kCombineN = kTileN < 32 ? kTileN : 32;

  static_assert(kLscdCtaWarps % kWarpsPerTile == 0, "groups must fill the CTA");
  static_assert(kWarpRows % 32 == 0, "a warp multiplies pairs of 16-row blocks");
  static_assert(kTileN % 8 == 0 && kTileN % kCombineN == 0, "tokens come in blocks of 8");
  static_assert(kKept == 0 || kWarpsPerTile == 1,
                "one warp must not clear what another one still reads");
  static_assert(kCombineN * kTileM * 4 <= kTileBytes, "sums must fit the tile that they overwrite");

  using Sums = float[kBlocksM][kBlocksN][4];
};

// Which of a block's 8 tokens is column g of B and of the sums, see XFragments.
__device__ __forceinline__ int token_of_column(int g) { return (g & 1) * 4 + (g >> 1); }

// A thread's B fragments of X. For the two k-steps of half u of a tile, lane (g, t) needs columns
// 32 u + 8 t to 32 u + 8 t + 7, or 16 bytes, of one token in each block of 8 tokens.
//
// L1 takes about one wavefront per cache line for a warp's load, even if little of the line is
// read. So one load reads whole lines, all 64 columns of four tokens:
//
//   load i    lane (g, t) gets the 16 bytes t of half g % 2 of token 4 i + g / 2
//
// Load 0 has half of what the lanes of even g need (tokens 0..3), and load 1 half of what those of
// odd g need (tokens 4..7). The other half is in the neighbour lane ^ 4, whose g has the other
// parity: four shuffles exchange it.
//
// For more tokens, where several warps share a tile and each reads all of X, pack_x_kernel reorders
// X first, so that a load reads 4 whole lines:
//   packed X  uint4[column block][tile column][half][8-token block][lane]
template <typename C>
class XFragments {
 public:
  __device__ __forceinline__ XFragments(const LscdParams& p, int col_block, int tile_col, int lane)
      : odd_((lane & 4) != 0) {
    if constexpr (C::kPackedX) {
      tile_ = p.packed_x +
              (int64_t{col_block} * p.schedule.units_per_row + tile_col) * kTileVectors + lane;
    } else {
      const int64_t n0 = int64_t{col_block} * C::kTileN;
      const int token = lane >> 3;
      tile_ = reinterpret_cast<const uint4*>(p.x + (n0 + token) * p.x_stride) +
              tile_col * (kTileK / 8) + (lane & 7);
      stride_ = static_cast<int>(p.x_stride / 8);
      tokens_ = static_cast<int>(min(p.epilogue.n - n0, int64_t{C::kTileN})) - token;
    }
  }

  // Issues the loads of the tile's fragments, if they are kept in registers.
  __device__ __forceinline__ void begin_tile() {
    if constexpr (C::kXResident) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < C::kBlocksN; ++j) reg_[half][j] = fetch(half, j);
      }
    }
  }

  // Waits for these loads and exchanges halves between lanes. All lanes must call it.
  __device__ __forceinline__ void finish_loads() {
    if constexpr (!C::kPackedX) {
#pragma unroll
      for (int j = 0; j < C::kBlocksN; ++j) exchange(reg_[0][j], reg_[1][j]);
    }
  }

  __device__ __forceinline__ void end_tile() { tile_ += C::kPackedX ? kTileVectors : kTileK / 8; }

  __device__ __forceinline__ uint4 get(int half, int j) const {
    if constexpr (C::kXResident) {
      return reg_[half][j];
    } else {
      return fetch(half, j);
    }
  }

 private:
  static constexpr int kTileVectors = C::kTileN * kTileK / 8;
  static_assert(C::kXResident || C::kPackedX, "lanes exchange what they hold in registers");

  // No __ldg: the previous kernel may have written X after this one began.
  __device__ __forceinline__ uint4 fetch(int half, int j) const {
    if constexpr (C::kPackedX) {
      return tile_[(half * C::kBlocksN + j) * 32];
    } else {
      const int token = j * 8 + half * 4;
      return token < tokens_ ? tile_[token * stride_] : make_uint4(0, 0, 0, 0);
    }
  }

  // Turns the results of loads 0 and 1 into halves 0 and 1 of this lane's token.
  __device__ __forceinline__ void exchange(uint4& first, uint4& second) const {
    exchange(first.x, second.x);
    exchange(first.y, second.y);
    exchange(first.z, second.z);
    exchange(first.w, second.w);
  }
  __device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second) const {
    const uint32_t received = __shfl_xor_sync(~0U, odd_ ? first : second, 4);
    if (odd_) {
      first = received;
    } else {
      second = received;
    }
  }

  bool odd_;
  const uint4* tile_;  // this lane's first vector of the tile
  int stride_;         // between tokens, in 16-byte units; at most kMaxLscdStride elements
  int tokens_;         // how many there are from this lane's first token on
  uint4 reg_[C::kXResident ? 2 : 1][C::kXResident ? C::kBlocksN : 1];
};

constexpr int kPackXThreads = 256;

// One thread per 16 bytes of packed X; tokens and columns outside X are zero.
__global__ void __launch_bounds__(kPackXThreads)
    pack_x_kernel(const __grid_constant__ LscdParams p, int tile_n, int64_t num_vectors) {
  allow_next_kernel();
  wait_for_previous_kernel();  // it may have written X or read the workspace
  const int64_t i = int64_t{blockIdx.x} * kPackXThreads + threadIdx.x;
  if (i >= num_vectors) return;
  const unsigned lane = i % 32, blocks_n = tile_n / 8, tile_cols = p.schedule.units_per_row;
  const auto block = static_cast<unsigned>(i / 32);
  const unsigned half = block / blocks_n % 2;
  const unsigned tile = block / blocks_n / 2;
  const int64_t token = int64_t{tile / tile_cols} * tile_n + block % blocks_n * 8 +
                        token_of_column(static_cast<int>(lane / 4));
  const int64_t col = int64_t{tile % tile_cols} * kTileK + half * 32 + lane % 4 * 8;
  uint4 v = make_uint4(0, 0, 0, 0);
  if (token < p.epilogue.n && col < p.k) {
    const uint16_t* row = p.x + token * p.x_stride + col;
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0 && col + 8 <= p.k) {
      v = *reinterpret_cast<const uint4*>(row);
    } else {
      uint32_t word[4] = {};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (col + c < p.k) word[c / 2] |= static_cast<uint32_t>(row[c]) << (c % 2 * 16);
      }
      v = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
  p.packed_x[i] = v;
}

template <typename C>
__device__ __forceinline__ void group_sync(int group) {
  if constexpr (C::kWarpsPerTile == 1) {
    __syncwarp();
  } else {
    ptx::named_barrier_sync(1 + group, C::kGroupThreads);
  }
}

// Multiplies the warp's rows of the dense tile by X. Lane l gives ldmatrix the address of row l % 8
// of 8x8 matrix l / 8: matrices 0 and 1 are rows 0..7 and 8..15 of the first chunk (16 bytes) of a
// k-step, matrices 2 and 3 those of the second chunk.
template <typename C>
__device__ __forceinline__ void multiply_rows(uint32_t smem_warp_rows, int lane,
                                              const XFragments<C>& x, typename C::Sums& sums) {
  const uint32_t row = (lane & 7) + ((lane >> 3) & 1) * 8;
  const uint32_t chunk = static_cast<uint32_t>(lane >> 4) ^ (lane & 7);
  uint32_t smem_step[4];  // address of k-step s, which has chunks 2 s and 2 s + 1
#pragma unroll
  for (int s = 0; s < 4; ++s) smem_step[s] = smem_warp_rows + row * 128 + (chunk ^ (2 * s)) * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < C::kBlocksM; i += 2) {
      uint32_t a[2][2][4];  // [16-row block][k-step]
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        ptx::ldmatrix_x4(a[q / 2][q % 2], smem_step[half * 2 + q % 2] + (i + q / 2) * 2048);
      }
#pragma unroll
      for (int j = 0; j < C::kBlocksN; ++j) {
        const uint4 b = x.get(half, j);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          ptx::mma_m16n8k16<C::kType>(sums[i + block][j], a[block][0], b.x, b.y);
          ptx::mma_m16n8k16<C::kType>(sums[i + block][j], a[block][1], b.z, b.w);
        }
      }
    }
  }
}

// Clears all of the warp's rows.
template <typename C>
__device__ __forceinline__ void clear_rows(uint32_t smem_warp_rows, int lane) {
#pragma unroll
  for (int i = 0; i < C::kWarpRows * kTileK * 2; i += 32 * 16) {
    ptx::store_shared_zero16(smem_warp_rows + i + lane * 16);
  }
}

// The part of a CTA's work range that lies in one row of the work grid: tile columns
// [k_begin, k_begin + length) of a tile row, by the tokens of a column block.
struct Segment {
  int tile_row, col_block, k_begin, length;

  __device__ __forceinline__ Segment(const LscdParams& p, int unit, int end_unit) {
    const int row = unit / p.schedule.units_per_row;
    tile_row = row % p.tile_rows;
    col_block = row / p.tile_rows;
    k_begin = unit - row * p.schedule.units_per_row;
    length = min(p.schedule.units_per_row - k_begin, end_unit - unit);
  }

  // The first tile column of group `group` of `groups`. If the length is not divisible, the last
  // groups get one tile more in a segment that begins its row, and the first groups in any other:
  // most CTAs have one segment of each kind, and no group should get more tiles in both.
  __device__ __forceinline__ int group_begin(int group, int groups) const {
    return k_begin + (length * group + (k_begin > 0 ? groups - 1 : 0)) / groups;
  }
  __device__ __forceinline__ int group_length(int group, int groups) const {
    return group_begin(group + 1, groups) - group_begin(group, groups);
  }
};

// Where a segment's sums are in a group's tile, as fp32 [token][row ^ swizzle]. The swizzle puts
// the sums of four neighbouring threads, which hold different tokens, into different banks.
__device__ __forceinline__ int combine_index(int token, int row) {
  return token * kTileM + (row ^ ((token & 3) << 3));
}

// Adds the groups' sums of a segment and stores them: to Y if the segment covers all of K, else to
// the workspace. Leaves the tiles zeroed.
template <typename C>
__device__ __forceinline__ void store_segment(const LscdParams& p, float* smem,
                                              const Segment& segment, typename C::Sums& sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own = smem + warp / C::kWarpsPerTile * (kTileBytes / 4);
  const int warp_row = warp % C::kWarpsPerTile * C::kWarpRows;
  const int64_t row0 = int64_t{segment.tile_row} * kTileM;
  const int64_t n0 = int64_t{segment.col_block} * C::kTileN;
  float* partial = partial_sums(p.workspace, blockIdx.x, segment.k_begin > 0 ? 0 : 1, C::kTileN);
#pragma unroll
  for (int col0 = 0; col0 < C::kTileN; col0 += C::kCombineN) {
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < C::kCombineN / 8; ++j) {
        const auto& sum = sums[i][col0 / 8 + j];
        const int row = warp_row + i * 16 + (lane >> 2);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int token = j * 8 + token_of_column((lane & 3) * 2 + c % 2);
          own[combine_index(token, row + c / 2 * 8)] = sum[c];
        }
      }
    }
    __syncthreads();  // all groups' sums are in shared memory
    const int row = lane * 4;
    for (int col = warp; col < C::kCombineN; col += kLscdCtaWarps) {
      float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll
      for (int g = 0; g < C::kGroups; ++g) {
        const float4 part =
            *reinterpret_cast<const float4*>(smem + g * (kTileBytes / 4) + combine_index(col, row));
        total.x += part.x;
        total.y += part.y;
        total.z += part.z;
        total.w += part.w;
      }
      if (segment.length == p.schedule.units_per_row) {
        p.epilogue.store<C::kType>(n0 + col0 + col, row0 + row, total);
      } else {
        *reinterpret_cast<float4*>(partial + (col0 + col) * kTileM + row) = total;
      }
    }
    __syncthreads();  // all sums have been read and may be overwritten
  }
  for (int i = threadIdx.x; i < C::kGroups * C::kCombineN * kTileM / 4; i += kCtaThreads) {
    const int group = i / (C::kCombineN * kTileM / 4), rest = i % (C::kCombineN * kTileM / 4);
    reinterpret_cast<float4*>(smem + group * (kTileBytes / 4))[rest] =
        make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  }
  __syncthreads();  // all tiles are zero again
}

template <typename C>
__global__ void __launch_bounds__(kCtaThreads, C::kCtasPerSm)
    lscd_kernel(const __grid_constant__ LscdParams p) {
  extern __shared__ __align__(128) float smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / C::kWarpsPerTile;
  const uint32_t smem_tile = ptx::smem_address(smem) + group * kTileBytes;
  const uint32_t smem_warp_rows = smem_tile + warp % C::kWarpsPerTile * C::kWarpRows * (kTileK * 2);

  const int end_unit = p.schedule.first_unit(blockIdx.x + 1);
  int unit = p.schedule.first_unit(blockIdx.x);
  EntryStream<C::kWarpsPerTile, C::kBatch, C::kKept> stream(p.offsets, p.entries, p.num_vectors,
                                                            threadIdx.x % C::kGroupThreads);
  const auto start_stream = [&](const Segment& segment) {
    stream.start(
        segment.tile_row * p.schedule.units_per_row + segment.group_begin(group, C::kGroups),
        segment.group_length(group, C::kGroups));
  };
  start_stream(Segment(p, unit, end_unit));
  for (int i = threadIdx.x; i < C::kSmemBytes / 16; i += kCtaThreads) {
    reinterpret_cast<float4*>(smem)[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  }
  __syncthreads();
  wait_for_previous_kernel();  // it may have written X, but not the weight
  allow_next_kernel();

  while (unit < end_unit) {
    // Computed again after the main loop, which has no registers to keep it in.
    const Segment segment(p, unit, end_unit);
    if (C::kGroups == 2 && segment.group_length(group, 2) < segment.group_length(1 - group, 2)) {
      // The other group has one tile more. This group passes as many barriers as the other one
      // will, as otherwise racecheck reports accesses that a __syncthreads separates.
      group_sync<C>(group);
      group_sync<C>(group);
    }
    XFragments<C> x(p, segment.col_block, segment.group_begin(group, C::kGroups), lane);
    typename C::Sums sums = {};
    while (stream.tiles_left() > 0) {
      x.begin_tile();
      stream.extract(smem_tile);
      x.finish_loads();
      group_sync<C>(group);  // the tile is complete
      multiply_rows<C>(smem_warp_rows, lane, x, sums);
      x.end_tile();
      __syncwarp();  // all lanes have read the warp's rows
      if (!stream.clear(smem_tile)) clear_rows<C>(smem_warp_rows, lane);
      group_sync<C>(group);  // the tile is zero again
    }
    const Segment done(p, static_cast<int>(ptx::opaque(unit)), end_unit);
    unit += done.length;
    if (unit < end_unit) start_stream(Segment(p, unit, end_unit));  // while the sums are stored
    store_segment<C>(p, smem, done, sums);
  }
}

// Adds the partial sums of the tile rows that CTAs share, in the order of K. Block b looks at the
// boundary between the work ranges of CTAs b and b + 1: if it is the first one within a tile row,
// the block adds that row's sums.
template <ValueType kType>
__global__ void __launch_bounds__(kCtaThreads)
    lscd_finish_kernel(const __grid_constant__ LscdParams p, int tile_n) {
  allow_next_kernel();
  const int second = blockIdx.x + 1;  // the CTA after the boundary, the second one of the row
  const int tile_cols = p.schedule.units_per_row;
  const int unit = p.schedule.first_unit(second);
  const int row = unit / tile_cols;
  const int row_begin = row * tile_cols;
  if (unit == row_begin || p.schedule.first_unit(second - 1) > row_begin) return;
  int end = second + 1;  // one past the last CTA of this row
  while (end < p.schedule.workers && p.schedule.first_unit(end) < row_begin + tile_cols) ++end;

  const int64_t row0 = int64_t{row % p.tile_rows} * kTileM + threadIdx.x % 32 * 4;
  const int64_t n0 = int64_t{row / p.tile_rows} * tile_n;
  const int col = blockIdx.y * kLscdCtaWarps + threadIdx.x / 32;
  const int idx = col * kTileM + threadIdx.x % 32 * 4;
  const auto sums_of = [&](int cta) {
    return reinterpret_cast<const float4*>(
        partial_sums(p.workspace, cta, cta < second ? 1 : 0, tile_n) + idx);
  };
  wait_for_previous_kernel();  // the main kernel, which writes the partial sums

  constexpr int kInFlight = 4;
  float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  for (int cta = second - 1; cta < end; cta += kInFlight) {
    float4 part[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      part[i] = cta + i < end ? __ldcg(sums_of(cta + i)) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      total.x += part[i].x;
      total.y += part[i].y;
      total.z += part[i].z;
      total.w += part[i].w;
    }
  }
  p.epilogue.store<kType>(n0 + col, row0, total);
}

template <typename C>
Status launch(const LscdParams& params, bool prefetch, cudaStream_t stream) {
  const Status sized =
      allow_smem("cudaFuncSetAttribute(lscd_kernel)", lscd_kernel<C>, C::kSmemBytes);
  if (!sized.ok()) return sized;
  bool dependent = false;
  const Status described =
      waits_for_previous_kernel("cudaFuncGetAttributes(lscd_kernel)", lscd_kernel<C>, &dependent);
  if (!described.ok()) return described;
  if constexpr (C::kPackedX) {
    const int64_t col_blocks = (params.epilogue.n + C::kTileN - 1) / C::kTileN;
    const int64_t vectors = col_blocks * params.schedule.units_per_row * (C::kTileN * kTileK / 8);
    const Status packed =
        launch_kernel("pack_x_kernel launch", pack_x_kernel,
                      static_cast<unsigned>((vectors + kPackXThreads - 1) / kPackXThreads),
                      kPackXThreads, 0, dependent && prefetch, stream, params, C::kTileN, vectors);
    if (!packed.ok()) return packed;
  }
  const Status multiplied = launch_kernel(
      "lscd_kernel launch", lscd_kernel<C>, static_cast<unsigned>(params.schedule.workers),
      kCtaThreads, C::kSmemBytes, dependent && C::kPackedX, stream, params);
  if (!multiplied.ok() || !params.schedule.shares_rows()) return multiplied;
  const dim3 grid(static_cast<unsigned>(params.schedule.workers - 1), C::kTileN / kLscdCtaWarps);
  return launch_kernel("lscd_finish_kernel launch", lscd_finish_kernel<C::kType>, grid, kCtaThreads,
                       0, dependent, stream, params, C::kTileN);
}

template <ValueType kType>
Status launch_config(int config, const LscdParams& params, bool prefetch, cudaStream_t stream) {
  int idx = 0;
#define FLASH_LLM_ROW(name, warps_per_tile, tile_n, ctas_per_sm, packed_x)                 \
  if (config == idx++) {                                                                   \
    return launch<LscdKernelConfig<kType, warps_per_tile, tile_n, ctas_per_sm, packed_x>>( \
        params, prefetch, stream);                                                         \
  }
  FLASH_LLM_LSCD_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no LSCD configuration has index " + std::to_string(config));
}

}  // namespace

namespace cuda {

Status spmm_lscd(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                 cudaStream_t stream) {
  const PackedView& weight = args.weight;
  if (plan.config < 0 || plan.config >= static_cast<int>(lscd_configs().size())) {
    return Status::invalid_value("no LSCD configuration has index " + std::to_string(plan.config));
  }
  const LscdConfig& config = lscd_configs()[static_cast<size_t>(plan.config)];
  if (Status fits = check_plan(plan, KernelFamily::kTiledCslSm80, args); !fits.ok()) return fits;
  const int64_t sums_bytes = lscd_sums_bytes(config, plan.work);
  if (Status fits = check_launch(plan, sums_bytes + plan.packed_x_bytes); !fits.ok()) return fits;
  LscdParams params;
  params.x = args.x;
  params.x_stride = args.x_stride;
  params.offsets = weight.offsets;
  params.entries = weight.payload;
  params.num_vectors = static_cast<int>(weight.payload_words / kVectorEntries);
  params.tile_rows = static_cast<int>(num_tile_rows(weight.m));
  params.schedule = StreamK(plan.work);
  params.k = weight.k;
  params.workspace = static_cast<float*>(workspace);
  params.packed_x = reinterpret_cast<uint4*>(static_cast<char*>(workspace) + sums_bytes);
  params.epilogue = {args.bias, args.y, weight.m, args.n, args.activation};
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return launch_config<ValueType::kFloat16>(plan.config, params, prefetch, stream);
    case ValueType::kBfloat16:
      return launch_config<ValueType::kBfloat16>(plan.config, params, prefetch, stream);
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
    case ValueType::kFp8Float16:
    case ValueType::kFp8Bfloat16:
    case ValueType::kInt4Float16:
    case ValueType::kInt4Bfloat16:
      break;
  }
  return Status::invalid_type("the LSCD kernel has no code for this value type");
}

}  // namespace cuda
}  // namespace flash_llm
