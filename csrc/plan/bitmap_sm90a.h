// The plan of the bitmap kernel for Hopper (cuda/bitmap/bitmap_sm90a.cu), and the sizes in that
// kernel's shared memory that the plan depends on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/bitmap.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The kernel's configurations, with one CTA per SM each. For some numbers of tokens there are two:
// the second one has lower tiles, see takes_low_tiles() in bitmap_sm90a.cpp.
//   name; tokens per CTA; consumer warps; strips of 16 rows per consumer warp (2 are a whole chunk;
//   with 1 two warps share a chunk, which leaves registers for more tokens); CTAs per cluster,
//   which read X from L2 once for all of them; stages of X in shared memory, of 64 or 128 columns
//   of K each
// clang-format off
#define FLASH_LLM_BITMAP_CONFIGS(row) \
  row(n8, 8, 16, 2, 1, 8)             \
  row(n16, 16, 16, 2, 1, 8)           \
  row(n32, 32, 16, 2, 1, 8)           \
  row(n32_low, 32, 16, 1, 1, 8)       \
  row(n64, 64, 16, 1, 1, 8)           \
  row(n128, 128, 16, 1, 2, 4)         \
  row(n256, 256, 8, 1, 2, 4)
// clang-format on

struct BitmapConfig {
  const char* name;
  int tile_n;
  int warps;
  int strips;
  int cluster;
  int x_stages;

  // Chunks of a column that a CTA works on at a time.
  constexpr int chunks() const { return warps * strips * kStripM / kChunkM; }
  // Rows of W in a cluster's output tile.
  constexpr int block_m() const { return cluster * chunks() * kChunkM; }
  // Rings of bytes that the chunks go through, at most 8 chunks of a column each.
  constexpr int rings() const { return chunks() > 8 ? chunks() / 8 : 1; }
};

const std::vector<BitmapConfig>& bitmap_configs();

// Whether all sums go through the workspace to the finishing kernel. For many tokens that would
// take too long: the main kernel itself then stores the output tiles that no other cluster shares.
// It has no registers left for the activation, so the caller applies that to the rounded sums by a
// kernel of its own, as after the dense GEMM.
constexpr bool bitmap_finishes_all(int tile_n) { return tile_n <= 64; }

// Bytes of partial sums in the workspace. A slot holds a cluster's sums of one output tile. If all
// tiles go to the finishing kernel, slots are numbered along the work: from one to the next either
// the cluster or the tile changes, so there are fewer than workers + rows. Otherwise a cluster has
// partial sums of at most two tiles, its first and its last.
constexpr int64_t bitmap_sums_bytes(const BitmapConfig& config, const WorkGrid& work) {
  const int64_t slots =
      bitmap_finishes_all(config.tile_n) ? work.workers + work.rows : 2 * work.workers;
  return slots * config.block_m() * config.tile_n * static_cast<int64_t>(sizeof(float));
}

// Whether a cluster adds the partial sums of an output tile that several share, instead of the
// finishing kernel: where there are at most 1.5 clusters for each tile. The finishing kernel adds
// those of more clusters faster, because it does so on all SMs. Times with such sums over those
// with the finishing kernel, by clusters for each tile (H200, fp16, 50 %, 2026-11-30):
//   0.6        0.93 (28672x7168, N = 256), 0.89 (14336x4096, N = 512), 0.96 (7168x7168, N = 1024)
//   1.0 … 1.2  0.87 (4096x4096, N = 1024), 0.87 (14336x4096, N = 256), 0.95 (7168x7168, N = 512)
//   2.1, 2.4   1.05 (4096x4096, N = 512), 1.06 (7168x7168, N = 256), 0.98 (14336x4096, N = 128)
//   4.1, 4.7   1.31 (4096x4096, N = 256), 1.23 (7168x7168, N = 128)
constexpr bool bitmap_adds_shared(int tile_n, const WorkGrid& work) {
  return !bitmap_finishes_all(tile_n) && 2 * work.workers <= 3 * work.rows;
}

// Bytes of the workspace: the partial sums, and a word for each consumer warp if clusters add them.
constexpr int64_t bitmap_workspace_bytes(const BitmapConfig& config, const WorkGrid& work) {
  return bitmap_sums_bytes(config, work) + (bitmap_adds_shared(config.tile_n, work)
                                                ? work.workers * config.cluster * config.warps * 4
                                                : 0);
}

// Whether plain chunks are multiplied by wgmma or by mma.sync. A wgmma with A in registers occupies
// the tensor cores for 30 cycles, however few the columns of B: with 8 tokens and 70 % zeros the
// kernel takes 57 us with wgmma and 45 with mma.sync. (wgmma.sp multiplies twice as many columns of
// A at once and takes no longer than mma.sp.)
constexpr bool bitmap_uses_wgmma(int tile_n) { return tile_n > 16; }

// Whether 2:4 chunks are decoded into plain fragments instead of those of wgmma.sp, whose residual
// costs more with each token (28672x7168, 90 % zeros, 256 tokens, H200: 199 us against 297).
// Narrower tiles leave no registers for it.
constexpr bool bitmap_expands_two_four(int tile_n) { return tile_n > 128; }

// A CTA's shared memory holds, from a 1024-byte boundary on: stages of X, X transposed, an empty
// chunk, chunk descriptors, prefetched offsets, barriers, and the rings, which take the rest. The
// layout is defined in cuda/bitmap/smem.cuh.

// Chunks of a column that are copied and released together, at most.
inline constexpr int kBitmapGroupChunks = 8;
constexpr int bitmap_group_chunks(int chunks) {
  return chunks < kBitmapGroupChunks ? chunks : kBitmapGroupChunks;
}
inline constexpr int kBitmapLeastGroupChunks = 4;  // in any configuration of any kernel
inline constexpr int kBitmapGroupStages = 8;       // columns of a group in the ring, at most
inline constexpr int kBitmapPairsAhead = 8;        // pairs of columns whose offsets are prefetched
inline constexpr int kXBoxK = 64;  // columns of a box of X's tensor map: 128 bytes, a swizzle span
inline constexpr int kBitmapGuardBytes = 34 * kChunkRowBytes;  // after the rings
// At the beginning of each ring and after each copy in it a gap stays unwritten, so that no copy
// arrives where a warp still reads beside its chunk.
inline constexpr int kBitmapGapUnits = kDecodeReachBytes / kChunkUnitBytes;
// Left free so that CTAs of the finishing kernel become resident while the main kernel runs. Each
// takes kReservedSmemBytes only, so there is room for three. The registers that the main kernel
// leaves (4096 of 64K, or 1024 with the widest configuration) have room for one, or none.
inline constexpr int kBitmapSpareSmemBytes = 3 * 1024;

// Boxes in a stage of X. (With two, ptxas can no longer track which wgmmas are in flight.)
constexpr int bitmap_x_boxes(int tile_n) { return bitmap_uses_wgmma(tile_n) ? 1 : 2; }
constexpr int bitmap_transposed_x_bytes(int tile_n) {
  return bitmap_expands_two_four(tile_n) ? 0 : kTwoFourK * 2 * (tile_n < 64 ? tile_n : 64);
}

// Shared memory of a CTA without the rings.
constexpr int bitmap_fixed_smem_bytes(int tile_n, int x_stages) {
  return 1024 + x_stages * bitmap_x_boxes(tile_n) * tile_n * kXBoxK * 2 +
         bitmap_transposed_x_bytes(tile_n) + kTwoFourFixedBytes + 2 * kDecodeReachBytes +
         16 * kBitmapGroupStages * 8 + 2 * kBitmapPairsAhead * 32 * 8 +
         8 * (2 * 16 / kBitmapLeastGroupChunks * kBitmapGroupStages + 2 * x_stages + 2) + 128 +
         kBitmapGuardBytes;
}
constexpr int bitmap_smem_bytes(const BitmapConfig& config, int ring_bytes) {
  return bitmap_fixed_smem_bytes(config.tile_n, config.x_stages) + ring_bytes;
}
// The least size of a ring that holds copies of `chunks` chunks: one of chunks of the largest size
// and the gaps around it.
constexpr int bitmap_least_ring_bytes(int chunks) {
  return chunks * kMaxChunkUnits * kChunkUnitBytes + 2 * kDecodeReachBytes;
}
// Of all rings together.
constexpr int bitmap_min_ring_bytes(const BitmapConfig& config) {
  return config.rings() * bitmap_least_ring_bytes(bitmap_group_chunks(config.chunks()));
}

// Whether a weight of this density has mostly 2:4 pairs of chunk columns (format/bitmap.h:
// prefers_two_four).
bool mostly_two_four(const SpmmProblem& problem);

// Sets the work grid of a plan for kernels whose output tiles are `block_m` rows of W by `tile_n`
// tokens, and the columns of a work unit.
Status divide_bitmap_work(const SpmmProblem& problem, int tile_n, int block_m, SpmmPlan* out);

// The functions of this family's row in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_bitmap_configs();
bool takes_bitmap(const PlanRequest& request, std::string* reason);
Status plan_bitmap(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
