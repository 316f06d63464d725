// What the producer and consumer warps of the bitmap kernel share: its parameters, its
// configurations as types, and the layout of shared memory.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/stream_k.cuh"
#include "cuda/schedule/warp_arrival.cuh"
#include "format/bitmap.h"
#include "plan/bitmap_sm90a.h"

namespace flash_llm {

struct BitmapParams {
  const uint32_t* payload;
  const int32_t* offsets;
  int payload_units;
  int chunk_rows, chunk_cols;
  int row_blocks;    // of block_m rows each
  int output_tiles;  // row blocks times token blocks
  int ring_units;    // size of each ring after its first gap, in units of 64 bytes
  // A row of the work grid is the output tile token_block * row_blocks + row_block: block_m rows of
  // W by tile_n tokens. A work unit is `unit_cols` (1 or 2) columns of chunks.
  StreamK schedule;
  int unit_cols;
  float4* partial;  // partial sums, see finish.cuh
  // For each consumer warp, whether its partial sums are in the workspace. Null if the finishing
  // kernel adds them.
  uint32_t* stored;
  Epilogue epilogue;

  // `workspace` has the size that the plan says; `block_m` is the rows of W in an output tile.
  BitmapParams(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, int block_m, int rings)
      : payload(args.weight.payload),
        offsets(args.weight.offsets),
        payload_units(static_cast<int>(args.weight.payload_words / kChunkUnitWords)),
        chunk_rows(static_cast<int>(num_chunk_rows(args.weight.m))),
        chunk_cols(static_cast<int>(num_chunk_cols(args.weight.k))),
        row_blocks(static_cast<int>((args.weight.m + block_m - 1) / block_m)),
        output_tiles(static_cast<int>(plan.work.rows)),
        ring_units(plan.ring_bytes / rings / kChunkUnitBytes - kBitmapGapUnits),
        schedule(plan.work),
        unit_cols(plan.unit_cols),
        partial(static_cast<float4*>(workspace)),
        stored(nullptr),
        epilogue{args.bias, args.y, args.weight.m, args.n, args.activation} {}
};

template <ValueType kTypeArg, int kTileNArg, int kWarpsArg, int kStripsArg, int kClusterArg,
          int kXStagesArg>
struct BitmapKernelConfig {
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kTileN = kTileNArg;
  static constexpr int kWarps = kWarpsArg;  // consumer warps
  static constexpr int kStrips = kStripsArg;
  static constexpr int kCluster = kClusterArg;
  static constexpr int kXStages = kXStagesArg;

  // Registers per thread. The producer warps have a warpgroup of their own because setmaxnreg moves
  // registers between warpgroups. An SM's 64K registers are 512 for each of the 128 threads of a
  // warpgroup. The launch divides them evenly between the 5 or 3 warpgroups, in multiples of 8 (96
  // or 168, which the spill check of setup.py prints), and setmaxnreg divides the same sum again:
  //                  launched    consumers  producer   used by them in the SASS of nvcc 13.0
  //   8, 16 and 64   5 *  96 >=   4 * 104  +  56       93 to 102, and 38 to 43
  //   32 and 128     5 *  96 >=   4 * 112  +  32       88 to 110, and 24 or 25
  //   tile_n = 256   3 * 168 >=   2 * 224  +  56       222, and 28
  // 104 is the most that leaves the producer as many as it takes; with 112 it has 32. With 104
  // ptxas spills at 32 tokens, and at 128 it serialises the wgmmas (its C7512). At 256 tokens ptxas
  // manages with 184 for plain chunks; expanding 2:4 chunks takes more.
  static constexpr int kAllWarps = kWarps + 4;
  static constexpr int kThreads = kAllWarps * 32;
  static constexpr int kLaunchRegisters = 512 / (kWarps / 4 + 1) / 8 * 8;
  static constexpr bool kFewForProducer = kTileN == 32 || kTileN == 128;
  static constexpr int kProducerRegisters = kFewForProducer ? 32 : 56;
  static constexpr int kConsumerRegisters = kTileN == 256 ? 224 : kFewForProducer ? 112 : 104;
  static_assert(kWarps / 4 * kConsumerRegisters + kProducerRegisters <=
                    (kWarps / 4 + 1) * kLaunchRegisters,
                "setmaxnreg.inc waits forever for registers that the launch did not allocate");
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
  static constexpr int kXBoxes = bitmap_x_boxes(kTileN);  // per stage
  static constexpr int kXBoxBytes = kTileN * kXBoxK * 2;
  static constexpr int kXStageBytes = kXBoxes * kXBoxBytes;
  static constexpr int kXStageK = kXBoxes * kXBoxK;

  static_assert(kStrips == 1 || kStrips == 2, "a chunk has two strips");
  static_assert(kWarps % 4 == 0, "wgmma takes four warps");
  static_assert(kBandChunkRows % (kCluster * kChunks) == 0,
                "a cluster reads part of one column of a band");
  static_assert(kChunks % kGroupChunks == 0 && kGroups % kRings == 0 && kRings <= 2,
                "each ring has one producer warp");
  static_assert(kXBoxBytes / kCluster % 1024 == 0,
                "a CTA loads whole 8-row groups of a swizzled box");
  static_assert(kXStages * kXStageK >= kTwoFourK && kChunkK % kXStageK == 0,
                "a 2:4 chunk needs all of its X at once");
};

// Flags of a column of chunks. They are part of the chunk descriptor, the two words that the
// producer leaves for each chunk: word 0 is the chunk's address in shared memory; word 1 has the
// flags from bit 16 on and, below, the bytes of its values (plain) or its size in units (2:4).
enum ColumnFlags : uint32_t {
  kColumnIsTwoFour = 1,
  kColumnEndsTile = 2,  // the last column of its output tile
  kColumnIsLast = 4,    // the last column of the cluster's work range
};

// The layout of shared memory, in bytes from a 1024-byte boundary. The decoder may read up to two
// rows of values before or after a chunk, and up to 33 rows if the chunk's bits are malformed: the
// regions before the rings and the guard after them keep these reads within shared memory.
template <typename C>
struct BitmapSmem {
  uint32_t base;
  int rank;  // of the CTA in its cluster

  static constexpr uint32_t kTransposed = C::kXStages * C::kXStageBytes;
  static constexpr uint32_t kEmpty =
      kTransposed + bitmap_transposed_x_bytes(C::kTileN) + kDecodeReachBytes;
  static constexpr uint32_t kDescriptors = kEmpty + kTwoFourFixedBytes + kDecodeReachBytes;
  static constexpr uint32_t kOffsets =
      kDescriptors + C::kGroups * kBitmapGroupStages * C::kGroupChunks * 8;
  static constexpr uint32_t kBarriers = kOffsets + C::kRings * kBitmapPairsAhead * 32 * 8;
  static constexpr uint32_t kXBarriers = 2 * C::kGroups * kBitmapGroupStages;
  static constexpr uint32_t kTransposedBarriers = kXBarriers + 2 * C::kXStages;
  static constexpr uint32_t kBarrierCount = kTransposedBarriers + 2;
  static constexpr uint32_t kRing = (kBarriers + kBarrierCount * 8 + 127) / 128 * 128;
  static_assert(kRing >= 34 * kChunkRowBytes, "the regions before the rings serve as a guard");
  static_assert(kRing + 1024 <= bitmap_fixed_smem_bytes(C::kTileN, C::kXStages) - kBitmapGuardBytes,
                "the plan reserves fewer bytes than the layout takes");

  __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * C::kXStageBytes; }
  // The wgmma descriptor of the same stage, from column 16 * k16 on.
  __device__ __forceinline__ uint64_t x_descriptor(int stage, int k16) const {
    return ptx::wgmma_descriptor(base,
                                 stage * C::kXStageBytes + k16 / 4 * C::kXBoxBytes + k16 % 4 * 32);
  }
  // X of a 2:4 chunk's 256 columns, transposed: [block of 8 tokens][column][token], 16 bytes per
  // column, up to 64 tokens at a time. None if 2:4 chunks are expanded.
  __device__ __forceinline__ uint32_t transposed_x() const { return base + kTransposed; }
  // All zeros: stands for any chunk, plain or 2:4, that has no nonzeros. There is a gap around it,
  // too.
  __device__ __forceinline__ uint32_t empty_chunk() const { return base + kEmpty; }
  // The chunk descriptor (see ColumnFlags) of chunk `chunk` of a group.
  __device__ __forceinline__ uint32_t descriptor(int group, int stage, int chunk) const {
    return base + kDescriptors +
           ((group * kBitmapGroupStages + stage) * C::kGroupChunks + chunk) * 8;
  }
  // Two prefetched entries of `offsets` for lane `lane` of the ring's producer warp: where its
  // chunk begins and where it ends.
  __device__ __forceinline__ uint32_t offsets(int ring, int stage, int lane) const {
    return base + kOffsets + ((ring * kBitmapPairsAhead + stage) * 32 + lane) * 8;
  }
  __device__ __forceinline__ uint32_t ring() const { return base + kRing; }

  // Full and empty barriers. A full barrier completes when the stage's data have arrived, an empty
  // one when all warps that read the stage have released it.
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
  // How many arrivals complete a phase of barrier i.
  __device__ __forceinline__ static int arrivals(int i) {
    if (i >= kTransposedBarriers) return C::kWarps * kWarpArrivals;
    if (i >= kXBarriers) {
      return i < kXBarriers + C::kXStages ? 1 : C::kCluster * C::kWarps * kWarpArrivals;
    }
    return (i < C::kGroups * kBitmapGroupStages ? 1 : C::kGroupWarps) * kWarpArrivals;
  }
};

// A position in a pipeline of kStages stages, counted from the first one ever used.
template <int kStages>
struct PipelineState {
  uint32_t count = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(count % kStages); }
  // The parity of the phase that this use of the stage completes on its full and empty barriers.
  __device__ __forceinline__ uint32_t phase() const { return count / kStages & 1; }
  __device__ __forceinline__ PipelineState operator+(int stages) const { return {count + stages}; }
};

// The cluster's index among the workers of the schedule. A kernel whose clusters may wait for those
// after them (finish.cuh) counts from the grid's end, because CTAs are launched in the grid's
// order: a cluster then waits only for clusters that were launched before it.
template <typename C>
__device__ __forceinline__ int cluster_idx() {
  const int idx = static_cast<int>(blockIdx.x) / C::kCluster;
  return C::kFinishesAll ? idx : static_cast<int>(gridDim.x) / C::kCluster - 1 - idx;
}

// A position in the schedule: an output tile and one of its columns of chunks.
struct ColumnPosition {
  int tile, col;

  __device__ __forceinline__ ColumnPosition(int tile, int col) : tile(tile), col(col) {}
  // The first column of work unit `unit`.
  __device__ __forceinline__ ColumnPosition(const BitmapParams& p, int unit)
      : tile(unit / p.schedule.units_per_row), col(unit % p.schedule.units_per_row * p.unit_cols) {}

  __device__ __forceinline__ bool before(const ColumnPosition& other) const {
    return tile < other.tile || (tile == other.tile && col < other.col);
  }
  // Moves on by `cols` columns, which must not reach beyond the end of this output tile.
  __device__ __forceinline__ void advance(int cols, int chunk_cols) {
    col += cols;
    if (col == chunk_cols) {
      col = 0;
      ++tile;
    }
  }
};

}  // namespace flash_llm
