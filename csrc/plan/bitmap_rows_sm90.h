// The plan of the bitmap kernel whose CTAs multiply whole rows (cuda/bitmap/rows_sm90.cu).
#pragma once

#include <string>
#include <vector>

#include "format/bitmap.h"
#include "plan/bitmap_sm90a.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The kernel's configurations, with one CTA per SM each: name; tokens per CTA; teams of 4 consumer
// warps. With 16 tokens, X and the sums of 4 teams would leave no room for the ring.
// clang-format off
#define FLASH_LLM_BITMAP_ROWS_CONFIGS(row) \
  row(rows8, 8, 4)                         \
  row(rows16, 16, 3)
// clang-format on

struct BitmapRowsConfig {
  const char* name;
  int tile_n;
  int teams;

  constexpr int warps() const { return 4 * teams; }
};

const std::vector<BitmapRowsConfig>& bitmap_rows_configs();

inline constexpr int kBitmapRowsStepChunks = 4;  // chunks that are copied and released together
inline constexpr int kBitmapRowsMinRingBytes = bitmap_least_ring_bytes(kBitmapRowsStepChunks);
// Shared memory without the ring: X of a pair of columns for each warp; its sums; chunk
// descriptors, barriers and alignment; the guard after the ring.
constexpr int bitmap_rows_fixed_smem_bytes(int tokens, int teams) {
  return 4 * teams * tokens * 2 * (kTwoFourK + kChunkM * 2) + 3 * 1024 + kBitmapGuardBytes;
}

// The functions of this family's row in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_bitmap_rows_configs();
bool takes_bitmap_rows(const PlanRequest& request, std::string* reason);
Status plan_bitmap_rows(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
