// The plans of the bitmap kernels for GPUs without wgmma (cuda/bitmap/mma_sync_kernel.cuh). There
// are two families of one kernel source, which differ in how weights are copied: from sm_90 on by
// bulk copies, from sm_80 on by cp.async. Both multiply by mma.sync.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/bitmap_sm90a.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// One configuration of a family, with one CTA per SM.
struct MmaSyncPlanConfig {
  const char* name;
  int tile_n;        // tokens per CTA
  int warps;         // consumer warps, each with a chunk at a time
  int rings;         // of bytes that the chunks go through, each with a producer warp
  int group_chunks;  // chunks of a column that are copied and released together
  int x_stages;      // of 128 columns of K up to 16 tokens, else of 64

  // Rows of W in an output tile.
  constexpr int block_m() const { return warps * kChunkM; }
};

// Of configurations with equal tile_n the first one that fits a GPU is the fastest there.
//
// With 16 consumer warps a thread has 96 registers, too few for the sums of 64 tokens; with 8, 168.
// (With two warps for a chunk both would load the same X.) Each ring must hold a group of full
// chunks, so two rings of groups of 8 chunks need 182 KB and more, two of 4 chunks 107 KB, and one
// of 4 chunks is all that fits into 99 KB. The fewer and smaller they are, the more work the
// producer warps have: on an H200, 28672x7168, N = 8, 50 / 70 / 90 % zeros (2026-11-29), the kernel
// for sm_90 takes 71 / 46 / 36 us with two rings of 8, 66 / 50 / 37 with two of 4 and 64 / 63 / 43
// with one (64 / 60 / 42 since copies take fewer instructions).
inline constexpr MmaSyncPlanConfig kBitmapSm80Configs[] = {
    {"sm80_n8", 8, 16, 2, 4, 8},       {"sm80_n16", 16, 16, 2, 4, 8},
    {"sm80_n32", 32, 16, 2, 4, 8},     {"sm80_n64", 64, 8, 1, 4, 8},
    {"sm80_n16_99k", 16, 16, 1, 4, 8}, {"sm80_n32_99k", 32, 16, 1, 4, 8},
};
inline constexpr MmaSyncPlanConfig kBitmapSm90Configs[] = {
    {"sm90_n8", 8, 16, 2, 8, 8},       {"sm90_n16", 16, 16, 2, 8, 8},
    {"sm90_n32", 32, 16, 2, 8, 8},     {"sm90_n64", 64, 8, 1, 8, 8},
    {"sm90_n16_99k", 16, 16, 1, 4, 8}, {"sm90_n32_99k", 32, 16, 1, 4, 8},
};

// The configurations of kBitmapSm80 or kBitmapSm90.
const std::vector<MmaSyncPlanConfig>& mma_sync_configs(KernelFamily family);

// Bytes of partial sums in the workspace: as in bitmap_sums_bytes, all sums go there.
constexpr int64_t mma_sync_sums_bytes(const MmaSyncPlanConfig& config, const WorkGrid& work) {
  return (work.workers + work.rows) * config.block_m() * config.tile_n *
         static_cast<int64_t>(sizeof(float));
}

constexpr int mma_sync_smem_bytes(const MmaSyncPlanConfig& config, int ring_bytes) {
  return bitmap_fixed_smem_bytes(config.tile_n, config.x_stages) + ring_bytes;
}
// Of all rings together.
constexpr int mma_sync_min_ring_bytes(const MmaSyncPlanConfig& config) {
  return config.rings * bitmap_least_ring_bytes(config.group_chunks);
}

// The functions of these families' rows in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_bitmap_sm80_configs();
std::vector<KernelConfig> describe_bitmap_sm90_configs();
bool takes_bitmap_sm80(const PlanRequest& request, std::string* reason);
bool takes_bitmap_sm90(const PlanRequest& request, std::string* reason);
Status plan_bitmap_sm80(const PlanRequest& request, SpmmPlan* out);
Status plan_bitmap_sm90(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
