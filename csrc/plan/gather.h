// The plans of the two gather kernels (cuda/gather/gather_kernel.cuh): for GPUs with bulk copies,
// and for every GPU from sm_80 on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "base/host_device.h"
#include "format/gather.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The configurations of both families: name; tokens per CTA; the most warps of a CTA that leaves
// half of the registers to another, 0 for the one whose X leaves no room for that.
// clang-format off
#define FLASH_LLM_GATHER_CONFIGS(row) \
  row(gather1, 1, 12)                 \
  row(gather2, 2, 12)                 \
  row(gather4, 4, 12)                 \
  row(gather8, 8, 0)
// clang-format on

struct GatherConfig {
  const char* name;
  int tile_n;
  int pair_warps;
};

// The families differ in the configurations' names only: "gather8" and "sm80_gather8".
const std::vector<GatherConfig>& gather_configs(KernelFamily family);

inline constexpr int kGatherMinWarps = 4, kGatherMaxWarps = 16;
inline constexpr int kGatherStages = 2;  // segments in the ring of a warp
inline constexpr int kGatherSegmentBytes =
    kGatherHeadBytes + kGatherSegmentQuads * kGatherQuadBytes;  // of a whole one
// A CTA multiplies its slices in batches of at most this many: a lane looks after two.
inline constexpr int kGatherMaxBatch = 64;
// Static shared memory: the table of a batch's slices, barriers. Two CTAs for 4 tokens and 7168
// columns then fit into an SM, with 256 bytes to spare.
inline constexpr int kGatherTableBytes = 2304;

// Bytes of a column of X in shared memory: 16 bits per token, or fp32 of the only token.
constexpr int gather_column_bytes(int tokens) { return tokens == 1 ? 4 : 2 * tokens; }

// Columns of X in shared memory.
constexpr int gather_x_columns(int64_t k) {
  return static_cast<int>(std::min<int64_t>((k + 7) / 8 * 8, kGatherTileK));
}

// Dynamic shared memory: the rings, X, then the sums of the warps, of which slices that two warps
// share have one more. A malformed weight can take a lane this far beyond X, either way.
constexpr int gather_guard_bytes(int tokens) {
  return kGatherQuadSteps * (kGatherReach + 1) * gather_column_bytes(tokens);
}
constexpr int gather_ring_bytes(int warps) { return warps * kGatherStages * kGatherSegmentBytes; }
constexpr int gather_smem_bytes(const GatherConfig& config, int64_t k, int warps, int batch) {
  const int sums = (warps + batch) * config.tile_n * kGatherSliceRows * 4;
  return gather_ring_bytes(warps) + gather_x_columns(k) * gather_column_bytes(config.tile_n) +
         std::max(sums, gather_guard_bytes(config.tile_n));
}

// Tiles of 8192 columns, whose sums a second kernel adds if there are several.
constexpr int gather_parts(int64_t k) {
  return static_cast<int>((k + kGatherTileK - 1) / kGatherTileK);
}

// The first of `ctas` CTAs that work on part `part`: in proportion to the columns, at least one.
FLASH_LLM_HOST_DEVICE constexpr int gather_first_cta(int part, int parts, int ctas, int64_t k) {
  if (part == parts) return ctas;
  const int64_t even = (int64_t{ctas} * part * kGatherTileK + k / 2) / k;
  const int64_t least = part, most = ctas - (parts - part);
  return static_cast<int>(even < least ? least : even > most ? most : even);
}

// The slices of a batch: more than the mean of a CTA, so that most CTAs have one batch. `work` has
// a row for each slice and a column for each part.
inline int gather_batch(const WorkGrid& work) {
  const int64_t mean = work.units() / work.workers;
  return static_cast<int>(std::clamp<int64_t>(mean + mean / 4 + 3, 8, kGatherMaxBatch));
}

// Bytes of the sums of several parts in the workspace: fp32 [parts][n][m].
constexpr int64_t gather_sums_bytes(int64_t m, int64_t n, int64_t k) {
  return gather_parts(k) > 1 ? gather_parts(k) * n * m * static_cast<int64_t>(sizeof(float)) : 0;
}

constexpr int64_t gather_passes(const GatherConfig& config, int64_t n) {
  return (n + config.tile_n - 1) / config.tile_n;
}

// Whether format="auto" should take this format because most calls have at most `expected_tokens`
// tokens (0: unknown), and why.
bool gather_suits_few_tokens(const DeviceInfo& device, int64_t m, int64_t k, double density,
                             int64_t expected_tokens, std::string* reason);

// The functions of these families' rows in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_gather_sm80_configs();
std::vector<KernelConfig> describe_gather_sm90_configs();
bool takes_gather_sm80(const PlanRequest& request, std::string* reason);
bool takes_gather_sm90(const PlanRequest& request, std::string* reason);
Status plan_gather_sm80(const PlanRequest& request, SpmmPlan* out);
Status plan_gather_sm90(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
