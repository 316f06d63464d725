// The plan of the LSCD kernel (cuda/tiled_csl/lscd.cu): Tiled-CSL, from compute capability 8.0 on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/tiled_csl.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// One built instantiation of the kernel. The kernel source, the launch table, the test matrix and
// Python's list of configurations all expand this list.
//   name, warps that share a tile, columns of X per CTA, CTAs that fit an SM's registers, and
//   whether X is first reordered into fragments (pays off once several warps or many columns read
//   it)
// clang-format off
#define FLASH_LLM_LSCD_CONFIGS(row) \
  row(w1n8, 1, 8, 3, false)         \
  row(w1n16, 1, 16, 3, false)       \
  row(w2n32, 2, 32, 3, true)        \
  row(w4n64, 4, 64, 2, true)
// clang-format on

struct LscdConfig {
  const char* name;
  int warps_per_tile;
  int tile_n;
  int ctas_per_sm;  // by registers; shared memory may allow fewer
  bool packed_x;
};

inline constexpr int kLscdCtaWarps = 4;
// Elements between rows of X (and so K) that the kernel can address: 16 rows, in units of 16 bytes,
// must fit 31 bits.
inline constexpr int64_t kMaxLscdStride = int64_t{1} << 29;

const std::vector<LscdConfig>& lscd_configs();

// Shared memory of one CTA: a decoded tile for each group of warps that share one.
constexpr int lscd_smem_bytes(const LscdConfig& config) {
  return kLscdCtaWarps / config.warps_per_tile * kTileBytes;
}

// Bytes of sums in the workspace: a CTA leaves at most two partial tile rows behind, its first and
// its last.
constexpr int64_t lscd_sums_bytes(const LscdConfig& config, const WorkGrid& work) {
  return 2 * work.workers * kTileM * config.tile_n * static_cast<int64_t>(sizeof(float));
}

// Bytes of X in fragment order, which follow the sums.
constexpr int64_t lscd_packed_x_bytes(const LscdConfig& config, int64_t n, int64_t k) {
  const int64_t tokens = (n + config.tile_n - 1) / config.tile_n * config.tile_n;
  return config.packed_x ? tokens * num_tile_cols(k) * kTileK * 2 : 0;
}

// The family's entries in the table.
std::vector<KernelConfig> describe_lscd_configs();
bool takes_lscd(const PlanRequest& request, std::string* reason);
Status plan_lscd(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
