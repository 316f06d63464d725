// What the warps of the bitmap kernel share: its parameters, the configurations as types, and where
// everything lies in shared memory.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/stream_k.cuh"
#include "format/bitmap.h"
#include "plan/bitmap_sm90a.h"

namespace flash_llm {

struct BitmapParams {
  const uint32_t* payload;
  const int32_t* offsets;
  int payload_units;
  int chunk_rows, chunk_cols;
  int row_blocks;     // of block_m rows, which a cluster has
  int schedule_rows;  // row blocks times token blocks
  int ring_units;     // of each ring
  // Rows: token block after token block, row block after row block. Columns: stretches of
  // `unit_cols` (1 or 2) columns of chunks.
  StreamK schedule;
  int unit_cols;
  float4* partial;  // sums that are to be finished, see finish.cuh
  Epilogue epilogue;
};

template <ValueType kTypeArg, int kTileNArg, int kWarpsArg, int kStripsArg, int kClusterArg,
          int kXStagesArg>
struct Bitmap {
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kWarps = kWarpsArg;  // that multiply; one more feeds them
  static constexpr int kStrips = kStripsArg;
  static constexpr int kCluster = kClusterArg;
  static constexpr int kXStages = kXStagesArg;

  // The feeding warps are a warpgroup, because registers are handed from one warpgroup to another:
  // what the launch gives every thread, a multiple of 8, is divided anew.
  static constexpr int kAllWarps = kWarps + 4;
  static constexpr int kThreads = kAllWarps * 32;
  static constexpr int kLaunchRegisters = 512 / (kWarps / 4 + 1) / 8 * 8;
  static constexpr int kProducerRegisters = kTileN == 128 ? 32 : 56;
  static constexpr int kConsumerRegisters = kTileN == 256 ? 208 : kTileN == 128 ? 112 : 104;
  static_assert(kWarps / 4 * kConsumerRegisters + kProducerRegisters <=
                    (kWarps / 4 + 1) * kLaunchRegisters,
                "more than the launch gives would be waited for in vain");
  static constexpr int kReaders = 2 / kStrips;  // warps that share a chunk
  static constexpr int kChunks = kWarps / kReaders;
  static constexpr int kRings = kChunks > 8 ? kChunks / 8 : 1;
  static constexpr int kGroupChunks = bitmap_group_chunks(kChunks);
  static constexpr int kGroups = kChunks / kGroupChunks;
  static constexpr int kGroupWarps = kWarps / kGroups;
  static constexpr int kRingGroups = kGroups / kRings;
  static constexpr int kStripsOfCta = kWarps * kStrips;
  static constexpr int kBlockM = kCluster * kChunks * kChunkM;
  static constexpr int kBlocksN = kTileN / 8;
  static constexpr bool kFinishesAll = bitmap_finishes_all(kTileN);
  static constexpr int kXBoxes = bitmap_x_boxes(kTileN);  // of a stage
  static constexpr int kXBoxBytes = kTileN * kXBoxK * 2;
  static constexpr int kXStageBytes = kXBoxes * kXBoxBytes;
  static constexpr int kXStageK = kXBoxes * kXBoxK;

  static_assert(kStrips == 1 || kStrips == 2, "a chunk has two strips");
  static_assert(kWarps % 4 == 0, "wgmma takes four warps");
  static_assert(kBandChunkRows % (kCluster * kChunks) == 0,
                "a cluster reads part of one column of a band");
  static_assert(kChunks % kGroupChunks == 0 && kGroups % kRings == 0 && kRings <= 2,
                "one feeding warp each");
  static_assert(kXBoxBytes / kCluster % 1024 == 0,
                "what a CTA brings of a swizzled box is a whole number of 8-row groups");
  static_assert(kXStages * kXStageK >= kTwoFourK && kChunkK % kXStageK == 0,
                "a 2:4 chunk needs all of its X at once");
};

// What the feeding warp says of a chunk in the ring: two words, where it lies in shared memory, and
// from bit 16 on these flags of its column, below that the bytes of its values (plain) or its units
// (2:4).
enum ColumnFlags : uint32_t {
  kColumnIsTwoFour = 1,
  kColumnEndsRow = 2,  // of blocks
  kColumnIsLast = 4,
};

// Shared memory in bytes from a 1024-byte boundary. Stages are those of groups of chunks, or of X.
// The decoder may read a few rows before and after a chunk (and malformed bits send it 33 rows
// away), which what lies before the ring and the guard after it allow.
template <typename C>
struct BitmapSmem {
  uint32_t base;
  int rank;  // of the CTA in its cluster

  static constexpr uint32_t kTransposed = C::kXStages * C::kXStageBytes;
  static constexpr uint32_t kEmpty = kTransposed + bitmap_transposed_x_bytes(C::kTileN);
  static constexpr uint32_t kDescriptors = kEmpty + kTwoFourFixedBytes;
  static constexpr uint32_t kOffsets =
      kDescriptors + C::kGroups * kBitmapGroupStages * C::kGroupChunks * 8;
  static constexpr uint32_t kBarriers = kOffsets + C::kRings * kBitmapPairsAhead * 32 * 8;
  static constexpr uint32_t kXBarriers = 2 * C::kGroups * kBitmapGroupStages;
  static constexpr uint32_t kTransposedBarriers = kXBarriers + 2 * C::kXStages;
  static constexpr uint32_t kBarrierCount = kTransposedBarriers + 2;
  static constexpr uint32_t kRing = (kBarriers + kBarrierCount * 8 + 127) / 128 * 128;
  static_assert(kRing >= 34 * kChunkRowBytes, "what lies before the ring is a guard too");
  static_assert(kRing + 1024 <= bitmap_fixed_smem_bytes(C::kTileN, C::kXStages) - kBitmapGuardBytes,
                "the plan counts on it");

  __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * C::kXStageBytes; }
  // The same for wgmma, from fragment `k16` on, 16 columns each.
  __device__ __forceinline__ uint64_t x_descriptor(int stage, int k16) const {
    return ptx::wgmma_descriptor(base,
                                 stage * C::kXStageBytes + k16 / 4 * C::kXBoxBytes + k16 % 4 * 32);
  }
  // X once more, of a 2:4 unit, as [8 tokens of up to 64][column of 256][8]: 16 bytes per column.
  __device__ __forceinline__ uint32_t transposed_x() const { return base + kTransposed; }
  // Zeros: a chunk of either kind without nonzeros.
  __device__ __forceinline__ uint32_t empty_chunk() const { return base + kEmpty; }
  // What is said of a chunk of a group.
  __device__ __forceinline__ uint32_t descriptor(int group, int stage, int chunk) const {
    return base + kDescriptors +
           ((group * kBitmapGroupStages + stage) * C::kGroupChunks + chunk) * 8;
  }
  // Offsets of a lane's chunk and of the next one, by feeding warp.
  __device__ __forceinline__ uint32_t offsets(int ring, int stage, int lane) const {
    return base + kOffsets + ((ring * kBitmapPairsAhead + stage) * 32 + lane) * 8;
  }
  __device__ __forceinline__ uint32_t ring() const { return base + kRing; }

  // mbarriers: full when the copies have arrived, empty when all warps have read.
  __device__ __forceinline__ uint32_t group_full(int group, int stage) const {
    return barrier(group * kBitmapGroupStages + stage);
  }
  __device__ __forceinline__ uint32_t group_empty(int group, int stage) const {
    return barrier((C::kGroups + group) * kBitmapGroupStages + stage);
  }
  __device__ __forceinline__ uint32_t x_full(int stage) const {
    return barrier(kXBarriers + stage);
  }
  __device__ __forceinline__ uint32_t x_empty(int stage) const {
    return barrier(kXBarriers + C::kXStages + stage);
  }
  __device__ __forceinline__ uint32_t transposed_full() const {
    return barrier(kTransposedBarriers);
  }
  __device__ __forceinline__ uint32_t transposed_empty() const {
    return barrier(kTransposedBarriers + 1);
  }

  __device__ __forceinline__ uint32_t barrier(int i) const { return base + kBarriers + i * 8; }
  // Arrivals that complete a phase of barrier i.
  __device__ __forceinline__ static int arrivals(int i) {
    if (i >= kTransposedBarriers) return C::kWarps;
    if (i >= kXBarriers) return i < kXBarriers + C::kXStages ? 1 : C::kCluster * C::kWarps;
    return i < C::kGroups * kBitmapGroupStages ? 1 : C::kGroupWarps;
  }
};

// A place in a ring of stages, by how many came before.
template <int kStages>
struct PipelineState {
  uint32_t count = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(count % kStages); }
  // Of the lap.
  __device__ __forceinline__ uint32_t phase() const { return count / kStages & 1; }
  __device__ __forceinline__ PipelineState operator+(int stages) const { return {count + stages}; }
};

// The cluster, by its number in the grid.
template <typename C>
__device__ __forceinline__ int cluster_idx() {
  return static_cast<int>(blockIdx.x) / C::kCluster;
}

// A column of chunks: its row of blocks (token block after token block) and its number.
struct ColumnPosition {
  int row, col;

  __device__ __forceinline__ ColumnPosition(int row, int col) : row(row), col(col) {}
  // Where unit `unit` of the schedule begins.
  __device__ __forceinline__ ColumnPosition(const BitmapParams& p, int unit)
      : row(unit / p.schedule.tile_cols), col(unit % p.schedule.tile_cols * p.unit_cols) {}

  __device__ __forceinline__ bool before(const ColumnPosition& other) const {
    return row < other.row || (row == other.row && col < other.col);
  }
  // Moves on by `cols` columns, which end in this row or with it.
  __device__ __forceinline__ void advance(int cols, int chunk_cols) {
    col += cols;
    if (col == chunk_cols) {
      col = 0;
      ++row;
    }
  }
};

}  // namespace flash_llm
