// The plan of the bitmap kernel for Hopper (cuda/bitmap/bitmap_sm90a.cu), and what it needs to know
// of that kernel's shared memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/bitmap.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// One built instantiation of the kernel, one CTA per SM:
//   name, columns of X per CTA, consumer warps, strips of 16 rows per consumer warp (2 is a whole
//   chunk; with 1 two warps share a chunk, which leaves registers for more columns), CTAs in a
//   cluster (which read X from L2 once for all of them), and stages of X in shared memory, of 64 or
//   128 columns of K
// clang-format off
#define FLASH_LLM_BITMAP_CONFIGS(row) \
  row(n8, 8, 16, 2, 1, 8)             \
  row(n16, 16, 16, 2, 1, 8)           \
  row(n32, 32, 16, 2, 1, 8)           \
  row(n64, 64, 16, 1, 2, 8)           \
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

  // A CTA works on so many chunks at a time, and a cluster on so many rows of W.
  constexpr int chunks() const { return warps * strips * kStripM / kChunkM; }
  constexpr int block_m() const { return cluster * chunks() * kChunkM; }
  // Chunks pass through rings of bytes, at most 8 chunks of a column through one ring.
  constexpr int rings() const { return chunks() > 8 ? chunks() / 8 : 1; }
};

const std::vector<BitmapConfig>& bitmap_configs();

// Whether all sums go through the workspace to the finishing kernel. For many tokens that is too
// much: the main kernel itself then stores the rows that no other cluster shares, and because it
// has no registers left for the activation, a kernel of the caller's applies that to the rounded
// sums, as after the dense GEMM.
constexpr bool bitmap_finishes_all(int tile_n) { return tile_n <= 64; }

// Bytes of sums in the workspace. A slot holds those of a row of blocks: where all sums are
// finished elsewhere, from one slot to the next either the cluster or the row is another; else a
// cluster leaves at most two rows behind, its first and its last.
constexpr int64_t bitmap_sums_bytes(const BitmapConfig& config, const WorkGrid& work) {
  const int64_t slots =
      bitmap_finishes_all(config.tile_n) ? work.workers + work.rows : 2 * work.workers;
  return slots * config.block_m() * config.tile_n * static_cast<int64_t>(sizeof(float));
}

// Whether plain chunks are multiplied by wgmma or by mma.sync. A wgmma with its A in registers
// takes 30 cycles of the tensor cores however few the columns of B; at 8 that made 45 us of 57 us
// at 70 % zeros. (wgmma.sp, which takes twice the columns of A at once, costs no more than mma.sp.)
constexpr bool bitmap_uses_wgmma(int tile_n) { return tile_n > 16; }

// Where everything lies in the shared memory of a CTA, in bytes from a 1024-byte boundary: X, X
// transposed, an empty chunk, descriptions of the chunks in the rings, offsets that were fetched
// ahead, barriers, and the rings, which take all the rest. The kernel's own view of it is
// cuda/bitmap/smem.cuh.
// Chunks of a column that are fetched together and released together, at most.
inline constexpr int kBitmapGroupChunks = 8;
constexpr int bitmap_group_chunks(int chunks) {
  return chunks < kBitmapGroupChunks ? chunks : kBitmapGroupChunks;
}
inline constexpr int kBitmapGroupStages = 8;  // columns of a group in the ring, at most
inline constexpr int kBitmapPairsAhead = 8;   // pairs of columns whose offsets are fetched ahead
inline constexpr int kXBoxK = 64;  // columns of a box of X's tensor map: 128 bytes, a swizzle span
inline constexpr int kBitmapGuardBytes = 34 * kChunkRowBytes;  // after the ring
// Left free, so that CTAs of the finishing kernel are resident before the main kernel ends.
inline constexpr int kBitmapSpareSmemBytes = 3 * 1024;

// Boxes of a stage of X. (With two, ptxas no longer follows which wgmma is still under way.)
constexpr int bitmap_x_boxes(int tile_n) { return bitmap_uses_wgmma(tile_n) ? 1 : 2; }
constexpr int bitmap_transposed_x_bytes(int tile_n) {
  return kTwoFourK * 2 * (tile_n < 64 ? tile_n : 64);
}

// Everything but the rings.
constexpr int bitmap_fixed_smem_bytes(int tile_n, int x_stages) {
  return 1024 + x_stages * bitmap_x_boxes(tile_n) * tile_n * kXBoxK * 2 +
         bitmap_transposed_x_bytes(tile_n) + kTwoFourFixedBytes + 16 * kBitmapGroupStages * 8 +
         2 * kBitmapPairsAhead * 32 * 8 +
         8 * (2 * 16 / kBitmapGroupChunks * kBitmapGroupStages + 2 * x_stages + 2) + 128 +
         kBitmapGuardBytes;
}
constexpr int bitmap_smem_bytes(const BitmapConfig& config, int ring_bytes) {
  return bitmap_fixed_smem_bytes(config.tile_n, config.x_stages) + ring_bytes;
}
// Every ring must hold a group of the fullest chunks.
constexpr int bitmap_min_ring_bytes(const BitmapConfig& config) {
  return config.rings() * bitmap_group_chunks(config.chunks()) * kMaxChunkUnits * kChunkUnitBytes;
}

// The family's entries in the table.
std::vector<KernelConfig> describe_bitmap_configs();
bool takes_bitmap(const PlanRequest& request, std::string* reason);
Status plan_bitmap(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
