// The plan of the LSCD kernel for Tiled-CSL (cuda/tiled_csl/lscd.cu), which needs compute
// capability 8.0 or newer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/tiled_csl.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The kernel's configurations. The kernel source, the launch table, the tests and Python's list of
// configurations all use this list.
//   name; warps that share a tile; tokens per CTA; CTAs that fit an SM's registers; whether X is
//   first reordered into fragments, which pays off if several warps share a tile or there are many
//   tokens
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
// The largest row stride of X in elements, and so the largest K, that the kernel can address: 16
// rows in units of 16 bytes must fit 31 bits.
inline constexpr int64_t kMaxLscdStride = int64_t{1} << 29;

const std::vector<LscdConfig>& lscd_configs();

// Shared memory of a CTA: a decoded tile for each group of warps.
constexpr int lscd_smem_bytes(const LscdConfig& config) {
  return kLscdCtaWarps / config.warps_per_tile * kTileBytes;
}

// Bytes of partial sums in the workspace: a CTA has those of at most two tile rows, its first and
// its last.
constexpr int64_t lscd_sums_bytes(const LscdConfig& config, const WorkGrid& work) {
  return 2 * work.workers * kTileM * config.tile_n * static_cast<int64_t>(sizeof(float));
}

// Bytes of X in fragment order, which follows the sums in the workspace.
constexpr int64_t lscd_packed_x_bytes(const LscdConfig& config, int64_t n, int64_t k) {
  const int64_t tokens = (n + config.tile_n - 1) / config.tile_n * config.tile_n;
  return config.packed_x ? tokens * num_tile_cols(k) * kTileK * 2 : 0;
}

// The functions of this family's row in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_lscd_configs();
bool takes_lscd(const PlanRequest& request, std::string* reason);
Status plan_lscd(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
