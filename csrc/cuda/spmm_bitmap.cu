// The bitmap kernel, for Hopper: weights stream in as bulk copies, are decoded in registers, and go
// to the tensor cores from there.
//
//   X        [n, x_stride] fp16/bf16, see launch.h
//   offsets  int32[chunks + 1], payload: Bitmap, see core/bitmap.h
//   Y        [n, m]; fp32 partial sums in a workspace
//
// One persistent CTA per SM, 16 warps in 4 warpgroups. Its stretch of the work (stream_k.cuh) is a
// line of units: 512 rows x 128 columns of W, one chunk of 32 rows for each warp.
//
//   * Weights: each warp owns a ring of two chunks in shared memory and refills it itself, one bulk
//     copy and one mbarrier per chunk. Warps never wait for each other's weights.
//   * X: a ring of stages [tile_n, 128] that all warps share, loaded through a tensor map in the
//     128-byte swizzle that wgmma reads. Whichever warp is the last to finish with a stage refills
//     it, so nobody waits for a stage to become free.
//   * Decode (bitmap_decode.cuh): a warp's two strips of 16 rows become the A fragments of two
//     wgmma.m64nNk16, which run while the next fragments are decoded into the other registers. The
//     B operand, X, is read from shared memory once per warpgroup and strip.
//   * Sums of every row of blocks that the CTA touched go to the workspace in fragment order; a
//     second, small kernel adds them in the order of K, so results are repeatable bit for bit, and
//     applies the epilogue.
//
// Dependent launches overlap the start of one kernel with the end of the one before: weights may be
// fetched at once, X only after the wait.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "core/bitmap.h"
#include "cuda/bitmap_decode.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx_sm80.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/stream_k.cuh"

namespace flash_llm {
namespace {

constexpr int kThreads = kBitmapWarps * 32;
constexpr int kXBoxK = 64;  // columns of a box of the tensor map: 128 bytes, one swizzle span
constexpr int kXBoxes = kChunkK / kXBoxK;

struct BitmapParams {
  const uint32_t* payload;
  const int32_t* offsets;
  int payload_units;
  int chunk_rows, chunk_cols;
  int row_blocks;     // of kBitmapBlockM rows
  int schedule_rows;  // row blocks times token blocks
  int slot_bytes;
  StreamK schedule;  // rows: token block after token block, row block after row block
  float4* partial;
  Epilogue epilogue;
};

template <ValueType kTypeArg, int kTileNArg, int kXStagesArg>
struct Bitmap {
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kXStages = kXStagesArg;
  static constexpr int kBlocksN = kTileN / 8;
  static constexpr int kXBoxBytes = kTileN * kXBoxK * 2;
  static constexpr int kXStageBytes = kXBoxes * kXBoxBytes;
  static_assert(kXBoxBytes % 1024 == 0, "a swizzled box is a whole number of 8-row groups");
};

// Where the float4 sums of (slot, warp, strip, 8-token block) begin; a lane's follow at [lane]. The
// slot of `cta`'s sums of a row is cta + row: with every next CTA or row it grows by one, and no
// CTA meets a row twice.
__device__ __forceinline__ float4* partial_block(float4* partial, int slot, int warp, int strip,
                                                 int blocks_n, int block_n) {
  const int64_t index = ((int64_t{slot} * kBitmapWarps + warp) * 2 + strip) * blocks_n + block_n;
  return partial + index * 32;
}

#ifdef FLASH_LLM_SM90A

// Shared memory, offsets in bytes from a 1024-byte boundary: X stages, then the warps' rings, then
// barriers and counters. The decoder may read a few rows before and after a chunk (and malformed
// bits send it 33 rows away), which the neighbours on both sides allow.
struct SmemMap {
  uint32_t x;
  uint32_t ring;
  uint32_t x_full;     // mbarrier per X stage
  uint32_t x_done;     // uint32 per X stage: how many warps have finished with it, ever
  uint32_t ring_full;  // this warp's mbarriers, one per slot
};

template <typename C>
__device__ __forceinline__ SmemMap map_smem(uint32_t base, int slot_bytes, int warp) {
  SmemMap map;
  map.x = (base + 1023) / 1024 * 1024;
  const uint32_t rings = map.x + C::kXStages * C::kXStageBytes;
  const uint32_t ring_bytes = static_cast<uint32_t>(kBitmapSlots * slot_bytes);
  map.ring = rings + warp * ring_bytes;
  map.x_full = rings + kBitmapWarps * ring_bytes;
  map.x_done = map.x_full + C::kXStages * 8;
  map.ring_full = map.x_done + C::kXStages * 8 + warp * kBitmapSlots * 8;
  return map;
}

// Where a unit lies: its row of blocks (token block after token block) and its column of chunks.
struct UnitPosition {
  int row, col;

  __device__ __forceinline__ void advance(int units, int chunk_cols) {
    col += units;
    while (col >= chunk_cols) {
      col -= chunk_cols;
      ++row;
    }
  }
  __device__ __forceinline__ void step(int chunk_cols) {
    if (++col == chunk_cols) {
      col = 0;
      ++row;
    }
  }
};

// The chunks that one warp works on, unit after unit, and their way into its ring.
class ChunkStream {
 public:
  __device__ __forceinline__ ChunkStream(const BitmapParams& p, const SmemMap& smem,
                                         UnitPosition first, int num_units, int warp, int lane)
      : p_(p), smem_(smem), num_units_(num_units), warp_(warp), lane_(lane), unread_(first) {
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kBitmapSlots; ++i) ptx::mbarrier_init(smem.ring_full + 8 * i, 1);
      ptx::mbarrier_init_fence();
    }
    window_ = load_window(0);
    current_ = chunk_at(0);
    next_ = chunk_at(1);
    if (current_.bytes >= 0) start(0, current_.begin, current_.bytes);
    if (current_.bytes >= 0 && next_.bytes >= 0) start(1, next_.begin, next_.bytes);
    smem_current_ = address(0, current_.bytes);
    next_window_ = load_window(32);
  }

  // Waits for chunk i, which must be the one after the last released.
  __device__ __forceinline__ ChunkCursor wait(int i) {
    if (current_.bytes < 0) {  // larger than a slot; the ring is empty now
      start(i, current_.begin, -current_.bytes);
    }
    ptx::mbarrier_wait(smem_.ring_full + 8 * (i % kBitmapSlots), i / kBitmapSlots & 1);
    return ChunkCursor(smem_current_, max(abs(current_.bytes) - kChunkFixedBytes, 0),
                       current_.bytes != 0, lane_);
  }

  // Chunk i has been read: its memory may be filled again.
  __device__ __forceinline__ void release(int i) {
    __syncwarp();
    const bool next_waits = current_.bytes < 0 || next_.bytes < 0;
    current_ = next_;
    next_ = chunk_at(i + 2);
    if (next_waits) {
      // Chunk i or i + 1 takes the whole ring. What follows one is not started before it has been
      // read: then as much as the ring holds.
      if (current_.bytes >= 0) start(i + 1, current_.begin, current_.bytes);
      if (current_.bytes >= 0 && next_.bytes >= 0) start(i + 2, next_.begin, next_.bytes);
    } else if (next_.bytes >= 0) {
      start(i + 2, next_.begin, next_.bytes);
    }
    smem_current_ = address(i + 1, current_.bytes);
    if (i % 32 == 31) {
      window_ = next_window_;
      next_window_ = load_window(i + 33);
    }
  }

 private:
  // A chunk's place in the payload, in units, and its size; negative if it does not fit a slot, 0
  // if it stores nothing (or lies beyond the last unit).
  struct Chunk {
    int begin, bytes;
  };

  // This lane's of the 32 chunks from `first` on, which nobody has looked up yet. Clamped:
  // malformed offsets lead neither outside the payload nor past the ring.
  __device__ __forceinline__ Chunk load_window(int first) {
    UnitPosition unit = unread_;
    unit.advance(lane_, p_.chunk_cols);
    unread_.advance(32, p_.chunk_cols);
    if (first + lane_ >= num_units_) return {0, 0};
    const int row_block = p_.schedule_rows == p_.row_blocks ? unit.row : unit.row % p_.row_blocks;
    const int chunk_row = row_block * kBandChunkRows + warp_;
    if (chunk_row >= p_.chunk_rows) return {0, 0};
    const int32_t* offset =
        p_.offsets + chunk_index(chunk_row, unit.col, p_.chunk_rows, p_.chunk_cols);
    const int begin = max(0, min(__ldg(offset), p_.payload_units));
    const int units = min(__ldg(offset + 1), p_.payload_units) - begin;
    const int bytes = chunk_value_rows(units) < 0 ? 0 : units * kChunkUnitBytes;
    return {begin, bytes > p_.slot_bytes ? -bytes : bytes};
  }

  // Chunk i, which lies in this window or the next.
  __device__ __forceinline__ Chunk chunk_at(int i) const {
    // By value: choosing between two structs would put them into memory.
    const bool next = i % 32 < 2 && i >= 2;
    return {__shfl_sync(~0U, next ? next_window_.begin : window_.begin, i % 32),
            __shfl_sync(~0U, next ? next_window_.bytes : window_.bytes, i % 32)};
  }

  __device__ __forceinline__ uint32_t address(int i, int bytes) const {
    return smem_.ring + (bytes < 0 || i % kBitmapSlots == 0 ? 0 : p_.slot_bytes);
  }

  // Chunks are started in order. One without bytes completes its barrier at once.
  __device__ __forceinline__ void start(int i, int begin, int bytes) const {
    if (lane_ != 0) return;
    const uint32_t full = smem_.ring_full + 8 * (i % kBitmapSlots);
    ptx::mbarrier_expect(full, bytes);
    if (bytes == 0) return;
    const uint32_t smem = bytes > p_.slot_bytes ? smem_.ring : address(i, bytes);
    ptx::bulk_copy_streaming(smem, p_.payload + int64_t{begin} * kChunkUnitWords, bytes, full);
  }

  static_assert(kBitmapSlots == 2, "current_ and next_ are what the ring holds");
  static_assert(kBitmapWarps == kBandChunkRows, "a CTA reads a column of a band at a time");

  const BitmapParams& p_;
  const SmemMap& smem_;
  int num_units_;
  int warp_, lane_;
  UnitPosition unread_;         // the first chunk of the window after next_window_
  Chunk window_, next_window_;  // lane l's are those of chunk l of 32
  Chunk current_, next_;
  uint32_t smem_current_;
};

// X for the units of a CTA.
template <typename C>
class XRing {
 public:
  __device__ __forceinline__ XRing(const BitmapParams& p, const CUtensorMap& map,
                                   const SmemMap& smem, UnitPosition first, int num_units)
      : p_(p), map_(map), smem_(smem), num_units_(num_units), next_(first) {}

  // One thread makes the barriers.
  __device__ __forceinline__ void init_barriers() const {
#pragma unroll
    for (int i = 0; i < C::kXStages; ++i) {
      ptx::mbarrier_init(smem_.x_full + 8 * i, 1);
      ptx::store_shared_u32(smem_.x_done + 4 * i, 0);
    }
  }

  // Asks for the first stages; every warp must call it.
  __device__ __forceinline__ void start(bool elected) {
    for (int i = 0; i < C::kXStages; ++i) {
      if (elected && i < num_units_) fill(i);
      next_.step(p_.chunk_cols);
    }
  }

  __device__ __forceinline__ uint32_t address(int i) const {
    return smem_.x + i % C::kXStages * C::kXStageBytes;
  }

  __device__ __forceinline__ void wait(int i) const {
    ptx::mbarrier_wait(smem_.x_full + 8 * (i % C::kXStages), i / C::kXStages & 1);
  }

  // This warp has read unit i's stage; the last warp to say so refills it.
  __device__ __forceinline__ void release(int i, int lane) {
    if (lane == 0) {
      const uint32_t before = ptx::fetch_add_shared(smem_.x_done + 4 * (i % C::kXStages), 1);
      if (before % kBitmapWarps == kBitmapWarps - 1 && i + C::kXStages < num_units_) fill(i);
    }
    next_.step(p_.chunk_cols);
  }

 private:
  // Asks for the next unit's 128 columns of X, into the stage of unit i.
  __device__ __forceinline__ void fill(int i) const {
    const int token = p_.schedule_rows == p_.row_blocks ? 0 : next_.row / p_.row_blocks * C::kTileN;
    const uint32_t full = smem_.x_full + 8 * (i % C::kXStages);
    ptx::mbarrier_expect(full, C::kXStageBytes);
#pragma unroll
    for (int box = 0; box < kXBoxes; ++box) {
      ptx::tensor_copy_2d(address(i) + box * C::kXBoxBytes, &map_,
                          next_.col * kChunkK + box * kXBoxK, token, full);
    }
  }

  const BitmapParams& p_;
  const CUtensorMap& map_;
  const SmemMap& smem_;
  int num_units_;
  UnitPosition next_;  // the unit whose X takes the place of the current one's
};

// Registers of two fragments of both strips: [fragment][strip].
using Fragments = uint32_t[2][2][4];

template <int kFirst, int kStep>
__device__ __forceinline__ void decode_fragments(const uint32_t (&bits)[2], uint32_t (&position)[2],
                                                 Fragments& a) {
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    decode_fragment<kFirst, kStep>(bits[strip], position[strip], a[0][strip]);
  }
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    decode_fragment<kFirst + 1, kStep>(bits[strip], position[strip], a[1][strip]);
  }
}

// Starts the four wgmma of two fragments; `x` describes the first fragment's 16 columns of X.
template <typename C>
__device__ __forceinline__ void multiply_fragments(float (&sums)[2][C::kTileN / 2],
                                                   const Fragments& a, uint64_t x) {
  ptx::wgmma_fence();
#pragma unroll
  for (int fragment = 0; fragment < 2; ++fragment) {
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      ptx::wgmma<C::kType, C::kTileN>(sums[strip], a[fragment][strip], x + fragment * 2);
    }
  }
  ptx::wgmma_commit();
}

#endif  // FLASH_LLM_SM90A

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    bitmap_kernel(const __grid_constant__ BitmapParams p, const __grid_constant__ CUtensorMap map) {
#ifdef FLASH_LLM_SM90A
  extern __shared__ uint8_t smem_bytes[];
  const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  const SmemMap smem = map_smem<C>(ptx::opaque(ptx::smem_address(smem_bytes)), p.slot_bytes, warp);
  const int first_unit = p.schedule.first_unit(blockIdx.x);
  const int num_units = p.schedule.first_unit(blockIdx.x + 1) - first_unit;
  UnitPosition position = {first_unit / p.chunk_cols, first_unit % p.chunk_cols};
  XRing<C> x(p, map, smem, position, num_units);
  if (threadIdx.x == 0) x.init_barriers();
  ChunkStream chunks(p, smem, position, num_units, warp, lane);
  wait_for_previous_kernel();  // which may have written X; it did not write the weight
  x.start(threadIdx.x == 0);
  __syncthreads();  // X's barriers and counters are initialised

  float sums[2][C::kTileN / 2] = {};
  for (int i = 0; i < num_units; ++i) {
    ChunkCursor cursor = chunks.wait(i);
    // While one pair of fragments is multiplied the next is decoded into other registers.
    Fragments even, odd;
    const uint64_t x0 = ptx::wgmma_descriptor(x.address(i));
    const uint64_t x1 = ptx::wgmma_descriptor(x.address(i) + C::kXBoxBytes);
    const uint32_t bits0[2] = {cursor.bits[0], cursor.bits[1]};
    decode_fragments<0, kChunkRowBytes>(bits0, cursor.up, even);
    x.wait(i);
    multiply_fragments<C>(sums, even, x0);
    decode_fragments<2, kChunkRowBytes>(bits0, cursor.up, odd);
    multiply_fragments<C>(sums, odd, x0 + 4);
    ptx::wgmma_wait<1>();  // `even` may be overwritten
    const uint32_t bits1[2] = {cursor.bits[2], cursor.bits[3]};
    decode_fragments<0, -kChunkRowBytes>(bits1, cursor.down, even);
    multiply_fragments<C>(sums, even, x1);
    ptx::wgmma_wait<1>();  // `odd` may be overwritten
    decode_fragments<2, -kChunkRowBytes>(bits1, cursor.down, odd);
    multiply_fragments<C>(sums, odd, x1 + 4);
    chunks.release(i);
    ptx::wgmma_wait<0>();
    x.release(i, lane);

    if (position.col == p.chunk_cols - 1 || i == num_units - 1) {  // the row or the work ends
#pragma unroll
      for (int strip = 0; strip < 2; ++strip) {
        float4* out =
            partial_block(p.partial, blockIdx.x + position.row, warp, strip, C::kBlocksN, 0);
#pragma unroll
        for (int b = 0; b < C::kBlocksN; ++b) {
          float* sum = &sums[strip][4 * b];
          out[b * 32 + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
          sum[0] = sum[1] = sum[2] = sum[3] = 0.0F;
        }
      }
    }
    position.step(p.chunk_cols);
  }
  allow_next_kernel();
#endif
}

constexpr int kFinishWarps = 8;
constexpr int kFinishCtasPerRow = 2 * kBitmapWarps / kFinishWarps;

// Adds the CTAs' sums in the order of K and stores Y: one warp per 16 rows and 8 tokens.
template <ValueType kType>
__global__ void __launch_bounds__(kFinishWarps * 32)
    bitmap_finish_kernel(const __grid_constant__ BitmapParams p) {
  allow_next_kernel();
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x / kFinishCtasPerRow;
  const int strip = blockIdx.x % kFinishCtasPerRow * kFinishWarps + threadIdx.x / 32;
  const int block_n = blockIdx.y, blocks_n = gridDim.y;
  const int64_t row0 = int64_t{row % p.row_blocks} * kBitmapBlockM + strip * kStripM + lane / 4;
  const int64_t token = (int64_t{row / p.row_blocks} * blocks_n + block_n) * 8 + lane % 4 * 2;
  const int first_unit = row * p.chunk_cols;
  const int first = p.schedule.cta_of(first_unit);
  int last = first;
  while (p.schedule.first_unit(last + 1) < first_unit + p.chunk_cols) ++last;
  const float4* part =
      partial_block(p.partial, first + row, strip / 2, strip % 2, blocks_n, block_n) + lane;
  const int64_t slot_vectors = int64_t{kBitmapWarps} * 2 * blocks_n * 32;
  wait_for_previous_kernel();  // the sums are complete

  constexpr int kInFlight = 4;
  float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  for (int left = last - first + 1; left > 0; left -= kInFlight) {
    float4 sums[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      sums[i] = i < left ? __ldcg(part + i * slot_vectors) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      total.x += sums[i].x;
      total.y += sums[i].y;
      total.z += sums[i].z;
      total.w += sums[i].w;
    }
    part += kInFlight * slot_vectors;
  }
  p.epilogue.store<kType>(token, row0, total.x);
  p.epilogue.store<kType>(token + 1, row0, total.y);
  p.epilogue.store<kType>(token, row0 + 8, total.z);
  p.epilogue.store<kType>(token + 1, row0 + 8, total.w);
}

// cuTensorMapEncodeTiled, found at run time: a direct call would make the library need a driver.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Status find_encode_tiled(EncodeTiled* out) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult result;
  const Status found =
      cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                                   cudaEnableDefault, &result),
                  "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
  if (!found.ok()) return found;
  if (result != cudaDriverEntryPointSuccess) {
    return Status::unsupported("the NVIDIA driver has no cuTensorMapEncodeTiled: CUDA 12 needed");
  }
  *out = reinterpret_cast<EncodeTiled>(symbol);
  return Status::success();
}

// X as boxes of 64 columns and tile_n tokens, zero outside the matrix.
Status map_x(const SpmmArgs& args, int tile_n, CUtensorMap* map) {
  EncodeTiled encode = nullptr;
  const Status found = find_encode_tiled(&encode);
  if (!found.ok()) return found;
  const int64_t k = args.weight.k;
  // A single token needs no stride, but the map does.
  const int64_t stride = args.n > 1 ? args.x_stride : (k + 7) / 8 * 8;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(args.n)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kXBoxK, static_cast<cuuint32_t>(tile_n)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUtensorMapDataType type = args.value_type == ValueType::kFloat16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<uint16_t*>(args.x), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::success();
  return Status::runtime("cuTensorMapEncodeTiled failed with error " + std::to_string(result) +
                         " for x of " + std::to_string(args.n) + "x" + std::to_string(k));
}

template <typename C>
Status launch(const BitmapParams& params, const SpmmArgs& args, int smem_bytes, bool prefetch,
              cudaStream_t stream) {
  cudaFuncAttributes code = {};
  const Status described = cuda::check(cudaFuncGetAttributes(&code, bitmap_kernel<C>),
                                       "cudaFuncGetAttributes(bitmap_kernel)");
  if (!described.ok()) return described;
  if (code.ptxVersion < 90) {
    return Status::unsupported("this build has no code for sm_90a; set FLASH_LLM_CUDA_ARCHS");
  }
  CUtensorMap map;
  const Status mapped = map_x(args, C::kTileN, &map);
  if (!mapped.ok()) return mapped;
  // Idempotent and legal during graph capture; it applies to the current device.
  const Status sized =
      cuda::check(cudaFuncSetAttribute(bitmap_kernel<C>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
                  "cudaFuncSetAttribute(bitmap_kernel)");
  if (!sized.ok()) return sized;
  const Status multiplied = launch_kernel("bitmap_kernel launch", bitmap_kernel<C>,
                                          static_cast<unsigned>(params.schedule.ctas), kThreads,
                                          smem_bytes, prefetch, stream, params, map);
  if (!multiplied.ok()) return multiplied;
  const dim3 finish_grid(static_cast<unsigned>(params.schedule_rows * kFinishCtasPerRow),
                         C::kBlocksN);
  return launch_kernel("bitmap_finish_kernel launch", bitmap_finish_kernel<C::kType>, finish_grid,
                       kFinishWarps * 32, 0, true, stream, params);
}

template <ValueType kType>
Status launch_config(int config, const BitmapParams& params, const SpmmArgs& args, int smem_bytes,
                     bool prefetch, cudaStream_t stream) {
  int idx = 0;
#define FLASH_LLM_ROW(name, tile_n, x_stages)                                                   \
  if (config == idx++) {                                                                        \
    return launch<Bitmap<kType, tile_n, x_stages>>(params, args, smem_bytes, prefetch, stream); \
  }
  FLASH_LLM_BITMAP_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no bitmap configuration has index " + std::to_string(config));
}

}  // namespace

Status cuda::spmm_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                         cudaStream_t stream) {
  const PackedView& weight = args.weight;
  if (plan.route != SpmmRoute::kBitmap || plan.config < 0 ||
      plan.config >= static_cast<int>(bitmap_configs().size())) {
    return Status::invalid_value("plan " + plan.to_string() + " names no bitmap kernel");
  }
  const BitmapConfig& config = bitmap_configs()[static_cast<size_t>(plan.config)];
  const int64_t token_blocks = (args.n + config.tile_n - 1) / config.tile_n;
  const int64_t row_blocks = (weight.m + kBitmapBlockM - 1) / kBitmapBlockM;
  const int64_t units = token_blocks * row_blocks * num_chunk_cols(weight.k);
  if (units < 1 || units > INT32_MAX || plan.ctas < 1 || plan.ctas > units ||
      plan.slot_bytes < kMinBitmapSlotBytes) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit " +
                                 std::to_string(units) + " units of work");
  }
  BitmapParams params;
  params.payload = weight.payload;
  params.offsets = weight.offsets;
  params.payload_units = static_cast<int>(weight.payload_words / kChunkUnitWords);
  params.chunk_rows = static_cast<int>(num_chunk_rows(weight.m));
  params.chunk_cols = static_cast<int>(num_chunk_cols(weight.k));
  params.row_blocks = static_cast<int>(row_blocks);
  params.schedule_rows = static_cast<int>(token_blocks * row_blocks);
  params.slot_bytes = plan.slot_bytes;
  params.schedule = StreamK(token_blocks * row_blocks, params.chunk_cols, plan.ctas);
  params.partial = static_cast<float4*>(workspace);
  params.epilogue = {args.bias, args.y, weight.m, args.n, args.activation};
  const int smem_bytes = bitmap_smem_bytes(config, plan.slot_bytes);
  return args.value_type == ValueType::kFloat16
             ? launch_config<ValueType::kFloat16>(plan.config, params, args, smem_bytes, prefetch,
                                                  stream)
             : launch_config<ValueType::kBfloat16>(plan.config, params, args, smem_bytes, prefetch,
                                                   stream);
}

}  // namespace flash_llm
