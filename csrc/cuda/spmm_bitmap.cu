// The bitmap kernel, for Hopper: weights stream in as bulk copies, are decoded in registers, and go
// to the tensor cores from there.
//
//   X        [n, x_stride] fp16/bf16, see launch.h
//   offsets  int32[chunks + 1], payload: Bitmap, see core/bitmap.h
//   Y        [n, m]; fp32 partial sums in a workspace
//
// One persistent CTA per SM, of whole warpgroups. Its stretch of the work (stream_k.cuh) is a line
// of units, each a column of chunks: 512 rows x 128 columns of W where each of 16 warps has a chunk
// of its own (up to 64 tokens), half or a quarter of that where two warps share one.
//
//   * Weights: each chunk comes through a ring of two slots that its readers refill themselves, one
//     bulk copy and one mbarrier per chunk. Warps never wait for other chunks.
//   * X: a ring of stages [tile_n, 128] that all warps share, loaded through a tensor map in the
//     128-byte swizzle that wgmma reads. Whichever warp is the last to finish with a stage refills
//     it, so nobody waits for a stage to become free.
//   * Decode (bitmap_decode.cuh): a warp's strips of 16 rows become the A fragments of one or two
//     wgmma.m64nNk16, which run while the next fragments are decoded into other registers. The B
//     operand, X, is read from shared memory once per warpgroup and strip.
//   * Sums of the rows of blocks that CTAs share (up to 64 tokens: of all) go to the workspace in
//     fragment order; a second, small kernel adds them in the order of K, so results are repeatable
//     bit for bit, and applies the epilogue.
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

constexpr int kXBoxK = 64;  // columns of a box of the tensor map: 128 bytes, one swizzle span
constexpr int kXBoxes = kChunkK / kXBoxK;

struct BitmapParams {
  const uint32_t* payload;
  const int32_t* offsets;
  int payload_units;
  int chunk_rows, chunk_cols;
  int row_blocks;     // of block_m rows
  int schedule_rows;  // row blocks times token blocks
  int slot_bytes;
  StreamK schedule;  // rows: token block after token block, row block after row block
  float4* partial;
  Epilogue epilogue;
};

template <ValueType kTypeArg, int kTileNArg, int kWarpsArg, int kStripsArg, int kXStagesArg>
struct Bitmap {
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kWarps = kWarpsArg;
  static constexpr int kStrips = kStripsArg;
  static constexpr int kXStages = kXStagesArg;

  static constexpr int kThreads = kWarps * 32;
  static constexpr int kReaders = 2 / kStrips;  // warps that share a chunk
  static constexpr int kChunks = kWarps / kReaders;
  static constexpr int kBlockM = kChunks * kChunkM;
  static constexpr int kBlocksN = kTileN / 8;
  // Whether a unit's multiplication may go on while the next is decoded: sums and fragments then
  // live across the loop, in at most 80 of 128 registers, or ptxas serialises every wgmma.
  static constexpr bool kOverlapsUnits = kStrips * (kTileN / 2 + 16) * kWarps <= 80 * 16;
  static constexpr bool kStoresRows = bitmap_stores_rows(kTileN);
  static constexpr int kXBoxBytes = kTileN * kXBoxK * 2;
  static constexpr int kXStageBytes = kXBoxes * kXBoxBytes;

  static_assert(kStrips == 1 || kStrips == 2, "a chunk has two strips");
  static_assert(kWarps % 4 == 0, "wgmma takes four warps");
  static_assert(kBandChunkRows % kChunks == 0, "a CTA reads part of one column of a band");
  static_assert(kXBoxBytes % 1024 == 0, "a swizzled box is a whole number of 8-row groups");
};

// The fp32 sums of a strip in a slot of the workspace, in fragment order: a slot holds
// float4[block_m / 16 strips][8-token blocks][32 lanes].
__device__ __forceinline__ float4* partial_strip(float4* partial, int slot, int strips, int strip,
                                                 int blocks_n) {
  return partial + (int64_t{slot} * strips + strip) * blocks_n * 32;
}

// The slot of what `cta` leaves of a row of blocks. Where it stores the rows that it does alone, it
// has two: one for a row that began before it, one for a row that begins in it. Else all rows go
// through the workspace: cta + row grows by one with every next CTA or row.
template <bool kStoresRows>
__device__ __forceinline__ int partial_slot(int cta, int row, bool begins_row) {
  return kStoresRows ? 2 * cta + (begins_row ? 1 : 0) : cta + row;
}

#ifdef FLASH_LLM_SM90A

// Shared memory, offsets in bytes from a 1024-byte boundary: X stages, then the warps' rings, then
// barriers and counters. The decoder may read a few rows before and after a chunk (and malformed
// bits send it 33 rows away), which the neighbours on both sides allow.
struct SmemMap {
  uint32_t x;
  uint32_t x_full;     // mbarrier per stage
  uint32_t x_done;     // uint32 per stage: how many warps have finished with it, ever
  uint32_t ring;       // of this warp's chunk
  uint32_t ring_full;  // mbarrier per slot
  uint32_t ring_read;  // mbarrier per slot, where two warps share the ring
};

template <typename C>
__device__ __forceinline__ SmemMap map_smem(uint32_t base, int slot_bytes, int warp) {
  const int chunk = warp / C::kReaders;
  SmemMap map;
  map.x = (base + 1023) / 1024 * 1024;
  const uint32_t rings = map.x + C::kXStages * C::kXStageBytes;
  map.ring = rings + chunk * kBitmapSlots * slot_bytes;
  map.x_full = rings + C::kChunks * kBitmapSlots * slot_bytes;
  map.x_done = map.x_full + C::kXStages * 8;
  const uint32_t ring_barriers = map.x_done + C::kXStages * 8;
  map.ring_full = ring_barriers + chunk * kBitmapSlots * 8;
  map.ring_read = ring_barriers + (C::kChunks + chunk) * kBitmapSlots * 8;
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

// The chunks that one warp works on, unit after unit, and their way into the ring. Where two warps
// share a ring both keep the same books, and the first of them starts what comes next, once the
// other has released its chunk too.
template <typename C>
class ChunkStream {
 public:
  __device__ __forceinline__ ChunkStream(const BitmapParams& p, const SmemMap& smem,
                                         UnitPosition first, int num_units, int warp, int lane)
      : p_(p), smem_(smem), num_units_(num_units), warp_(warp), lane_(lane), unread_(first) {
    const bool starts = lane == 0 && warp % C::kReaders == 0;
    if (starts) {
#pragma unroll
      for (int i = 0; i < kBitmapSlots; ++i) {
        ptx::mbarrier_init(smem.ring_full + 8 * i, 1);
        ptx::mbarrier_init(smem.ring_read + 8 * i, 1);
      }
      ptx::mbarrier_init_fence();
    }
    window_ = load_window(0);
    current_ = chunk_at(0);
    next_ = chunk_at(1);
    if (starts) start_empty_ring(0);
    smem_current_ = address(0, current_.bytes);
    next_window_ = load_window(32);
  }

  // Waits for chunk i, which must be the one after the last released.
  __device__ __forceinline__ ChunkCursor wait(int i) const {
    ptx::mbarrier_wait(smem_.ring_full + 8 * (i % kBitmapSlots), i / kBitmapSlots & 1);
    return ChunkCursor(smem_current_, max(abs(current_.bytes) - kChunkFixedBytes, 0),
                       current_.bytes != 0, lane_);
  }

  // Chunk i has been read: its memory may be filled again.
  __device__ __forceinline__ void release(int i) {
    __syncwarp();
    // A chunk that takes the whole ring is alone in it.
    const bool ring_is_empty = current_.bytes < 0 || next_.bytes < 0;
    current_ = next_;
    next_ = chunk_at(i + 2);
    smem_current_ = address(i + 1, current_.bytes);
    if (lane_ == 0 && may_refill(i)) {
      if (ring_is_empty) {
        start_empty_ring(i + 1);
      } else if (next_.bytes >= 0) {
        start(i + 2, next_.begin, next_.bytes);
      }
    }
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
    const int chunk_row = row_block * C::kChunks + warp_ / C::kReaders;
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

  // One thread: says that this warp has read chunk i. Whether it is the one to fill the memory
  // again, which then waits for the other reader.
  __device__ __forceinline__ bool may_refill(int i) const {
    if constexpr (C::kReaders == 1) return true;
    const uint32_t read = smem_.ring_read + 8 * (i % kBitmapSlots);
    if (warp_ % C::kReaders != 0) {
      ptx::mbarrier_arrive(read);
      return false;
    }
    ptx::mbarrier_wait(read, i / kBitmapSlots & 1);
    return true;
  }

  // One thread: fills an empty ring with chunk i, which is current_, and the next if both fit.
  __device__ __forceinline__ void start_empty_ring(int i) const {
    start(i, current_.begin, abs(current_.bytes));
    if (current_.bytes >= 0 && next_.bytes >= 0) start(i + 1, next_.begin, next_.bytes);
  }

  // One thread: asks for a chunk; in order. One without bytes completes its barrier at once.
  __device__ __forceinline__ void start(int i, int begin, int bytes) const {
    const uint32_t full = smem_.ring_full + 8 * (i % kBitmapSlots);
    ptx::mbarrier_expect(full, bytes);
    if (bytes == 0) return;
    const uint32_t smem = bytes > p_.slot_bytes ? smem_.ring : address(i, bytes);
    ptx::bulk_copy_streaming(smem, p_.payload + int64_t{begin} * kChunkUnitWords, bytes, full);
  }

  static_assert(kBitmapSlots == 2, "current_ and next_ are what the ring holds");

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
      if (before % C::kWarps == C::kWarps - 1 && i + C::kXStages < num_units_) fill(i);
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

// Registers of two fragments of a warp's strips: [fragment][strip].
template <typename C>
using Fragments = uint32_t[2][C::kStrips][4];

// Decodes fragments kFirst and kFirst + 1 of a half.
template <typename C, int kFirst, int kStep>
__device__ __forceinline__ void decode_fragments(const uint32_t (&bits)[C::kStrips],
                                                 uint32_t (&position)[C::kStrips],
                                                 Fragments<C>& a) {
#pragma unroll
  for (int strip = 0; strip < C::kStrips; ++strip) {
    decode_fragment<kFirst, kStep>(bits[strip], position[strip], a[0][strip]);
  }
#pragma unroll
  for (int strip = 0; strip < C::kStrips; ++strip) {
    decode_fragment<kFirst + 1, kStep>(bits[strip], position[strip], a[1][strip]);
  }
}

// Starts the wgmma of two fragments; `x` describes the first fragment's 16 columns of X. Sums begin
// anew where `accumulate` is 0: clearing them would take registers from the pipeline.
template <typename C>
__device__ __forceinline__ void multiply_fragments(float (&sums)[C::kStrips][C::kTileN / 2],
                                                   const Fragments<C>& a, uint64_t x,
                                                   int accumulate = 1) {
  ptx::wgmma_fence();
#pragma unroll
  for (int fragment = 0; fragment < 2; ++fragment) {
#pragma unroll
    for (int strip = 0; strip < C::kStrips; ++strip) {
      ptx::wgmma<C::kType, C::kTileN>(sums[strip], a[fragment][strip], x + fragment * 2,
                                      fragment == 0 ? accumulate : 1);
    }
  }
  ptx::wgmma_commit();
}

// Stores a warp's sums of a row of blocks.
template <typename C>
__device__ __forceinline__ void store_sums(const BitmapParams& p, int row, bool begins_row,
                                           bool complete, int warp, int lane,
                                           const float (&sums)[C::kStrips][C::kTileN / 2]) {
  const int slot = partial_slot<C::kStoresRows>(blockIdx.x, row, begins_row);
#pragma unroll
  for (int s = 0; s < C::kStrips; ++s) {
    const int strip = warp * C::kStrips + s;
    if (C::kStoresRows && complete) {
      p.epilogue.store_rows<C::kType, C::kTileN>(
          int64_t{row / p.row_blocks} * C::kTileN + lane % 4 * 2,
          int64_t{row % p.row_blocks} * C::kBlockM + strip * kStripM + lane / 4, sums[s]);
    } else {
      float4* out =
          partial_strip(p.partial, slot, C::kWarps * C::kStrips, strip, C::kBlocksN) + lane;
#pragma unroll
      for (int b = 0; b < C::kBlocksN; ++b) {
        const float* sum = &sums[s][4 * b];
        out[b * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
  }
}

#endif  // FLASH_LLM_SM90A

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
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
  ChunkStream<C> chunks(p, smem, position, num_units, warp, lane);
  wait_for_previous_kernel();  // which may have written X; it did not write the weight
  x.start(threadIdx.x == 0);
  __syncthreads();  // all barriers and counters are initialised

  float sums[C::kStrips][C::kTileN / 2];
  int accumulate = 0;
  Fragments<C> even, odd;
  bool begins_row = position.col == 0;
  bool x_in_use = false;  // whether the unit before is still being multiplied
  for (int i = 0; i < num_units; ++i) {
    const ChunkCursor cursor = chunks.wait(i);
    uint32_t bits[2][C::kStrips], up[C::kStrips], down[C::kStrips];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      const bool second = C::kStrips == 2 ? s == 1 : warp % 2 == 1;
      bits[0][s] = second ? cursor.bits[1] : cursor.bits[0];
      bits[1][s] = second ? cursor.bits[3] : cursor.bits[2];
      up[s] = second ? cursor.up[1] : cursor.up[0];
      down[s] = second ? cursor.down[1] : cursor.down[0];
    }
    // While one pair of fragments is multiplied the next is decoded into other registers, across
    // the border between units too.
    const uint64_t x0 = ptx::wgmma_descriptor(x.address(i));
    const uint64_t x1 = ptx::wgmma_descriptor(x.address(i) + C::kXBoxBytes);
    decode_fragments<C, 0, kChunkRowBytes>(bits[0], up, even);
    x.wait(i);
    multiply_fragments<C>(sums, even, x0, accumulate);
    accumulate = 1;
    ptx::wgmma_wait<1>();  // all of the unit before is done, so `odd` may be overwritten
    if (x_in_use) x.release(i - 1, lane);
    decode_fragments<C, 2, kChunkRowBytes>(bits[0], up, odd);
    multiply_fragments<C>(sums, odd, x0 + 4);
    ptx::wgmma_wait<1>();
    decode_fragments<C, 0, -kChunkRowBytes>(bits[1], down, even);
    multiply_fragments<C>(sums, even, x1);
    ptx::wgmma_wait<1>();
    decode_fragments<C, 2, -kChunkRowBytes>(bits[1], down, odd);
    multiply_fragments<C>(sums, odd, x1 + 4);
    chunks.release(i);
    ptx::wgmma_wait<C::kOverlapsUnits ? 1 : 0>();

    const bool row_ends = position.col == p.chunk_cols - 1;
    const bool stores = row_ends || i == num_units - 1;
    x_in_use = C::kOverlapsUnits && !stores;
    if (stores) ptx::wgmma_wait<0>();
    if (!x_in_use) x.release(i, lane);
    if (stores) {
      store_sums<C>(p, position.row, begins_row, begins_row && row_ends, warp, lane, sums);
      begins_row = true;
      accumulate = 0;
    }
    position.step(p.chunk_cols);
  }
  allow_next_kernel();
#endif
}

constexpr int kFinishWarps = 8;

// Adds the sums of each row of blocks in the order of K and stores Y: one warp per 16 rows and 8
// tokens, blocks with equal x per row. With kStoresRows only the rows that CTAs share are left:
// blocks with x = b look at the cut before CTA b + 1, and act if it is the first within its row.
template <ValueType kType, bool kStoresRows>
__global__ void __launch_bounds__(kFinishWarps * 32)
    bitmap_finish_kernel(const __grid_constant__ BitmapParams p, int strips) {
  allow_next_kernel();
  int row = blockIdx.x;
  if constexpr (kStoresRows) {
    const int unit = p.schedule.first_unit(blockIdx.x + 1);
    row = unit / p.chunk_cols;
    const int row_begin = row * p.chunk_cols;
    if (unit == row_begin || p.schedule.first_unit(blockIdx.x) > row_begin) return;
  }
  const int row_begin = row * p.chunk_cols;
  const int first = p.schedule.cta_of(row_begin);
  int end = first + 1;  // one past the last CTA of this row
  while (p.schedule.first_unit(end) < row_begin + p.chunk_cols) ++end;

  const int lane = threadIdx.x % 32, strip = blockIdx.y * kFinishWarps + threadIdx.x / 32;
  const int block_n = blockIdx.z, blocks_n = gridDim.z;
  const auto sums_of = [&](int cta) {
    const int slot = partial_slot<kStoresRows>(cta, row, cta == first);
    return partial_strip(p.partial, slot, strips, strip, blocks_n) + block_n * 32 + lane;
  };
  wait_for_previous_kernel();  // the sums are complete

  constexpr int kInFlight = 4;
  float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  for (int cta = first; cta < end; cta += kInFlight) {
    float4 sums[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      sums[i] = cta + i < end ? __ldcg(sums_of(cta + i)) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      total.x += sums[i].x;
      total.y += sums[i].y;
      total.z += sums[i].z;
      total.w += sums[i].w;
    }
  }
  const int64_t row0 = (int64_t{row % p.row_blocks} * strips + strip) * kStripM + lane / 4;
  const int64_t token0 = (int64_t{row / p.row_blocks} * blocks_n + block_n) * 8 + lane % 4 * 2;
  p.epilogue.store_fragment<kType>(token0, row0, total);
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
                                          static_cast<unsigned>(params.schedule.ctas), C::kThreads,
                                          smem_bytes, prefetch, stream, params, map);
  if (!multiplied.ok()) return multiplied;
  if (C::kStoresRows && !params.schedule.cuts_rows()) return multiplied;
  constexpr int kStripsOfCta = C::kWarps * C::kStrips;
  static_assert(kStripsOfCta % kFinishWarps == 0, "a warp of the finish kernel takes one strip");
  const int rows = C::kStoresRows ? params.schedule.ctas - 1 : params.schedule_rows;
  const dim3 grid(static_cast<unsigned>(rows), kStripsOfCta / kFinishWarps, C::kBlocksN);
  return launch_kernel("bitmap_finish_kernel launch",
                       bitmap_finish_kernel<C::kType, C::kStoresRows>, grid, kFinishWarps * 32, 0,
                       true, stream, params, kStripsOfCta);
}

template <ValueType kType>
Status launch_config(int config, const BitmapParams& params, const SpmmArgs& args, int smem_bytes,
                     bool prefetch, cudaStream_t stream) {
  int idx = 0;
#define FLASH_LLM_ROW(name, tile_n, warps, strips, x_stages)                                \
  if (config == idx++) {                                                                    \
    return launch<Bitmap<kType, tile_n, warps, strips, x_stages>>(params, args, smem_bytes, \
                                                                  prefetch, stream);        \
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
  const int64_t row_blocks = (weight.m + config.block_m() - 1) / config.block_m();
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
