#include "plan/tiled_csl_sm80.h"

#include <algorithm>
#include <cstddef>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// The LSCD kernel against unpacking and cuBLAS on an H200, 28672x7168, fp16, in microseconds
// (2026-11-23):
//   N = 64    50 % 200 / 352   70 % 170 / 339   80 % 127 / 314   90 % 119 / 295
//   N = 128   50 % 392 / 362   70 % 329 / 349   80 % 243 / 322   90 % 228 / 304
//   N = 256   50 % 741 / 405   70 % 624 / 383   80 % 469 / 354   90 % 440 / 333
constexpr int64_t kMaxTokens = 128;
constexpr int64_t kMaxTokensLowSparsity = 64;
constexpr double kLowSparsity = 0.65;

}  // namespace

const std::vector<LscdConfig>& lscd_configs() {
  static const std::vector<LscdConfig> configs = {
#define FLASH_LLM_ROW(name, warps_per_tile, tile_n, ctas_per_sm, packed_x) \
  {#name, warps_per_tile, tile_n, ctas_per_sm, packed_x},
      FLASH_LLM_LSCD_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return configs;
}

std::vector<KernelConfig> describe_lscd_configs() {
  std::vector<KernelConfig> rows;
  for (const LscdConfig& config : lscd_configs()) {
    rows.push_back({config.name,
                    {{"tile_n", config.tile_n},
                     {"warps_per_tile", config.warps_per_tile},
                     {"ctas_per_sm", config.ctas_per_sm},
                     {"packed_x", config.packed_x ? 1 : 0},
                     {"smem_bytes", lscd_smem_bytes(config)}}});
  }
  return rows;
}

bool takes_lscd(const PlanRequest& request, std::string* reason) {
  const SpmmProblem& problem = request.problem;
  const bool low_sparsity =
      static_cast<double>(problem.nnz) >
      (1.0 - kLowSparsity) * static_cast<double>(problem.m) * static_cast<double>(problem.k);
  if (problem.n > (low_sparsity ? kMaxTokensLowSparsity : kMaxTokens)) {
    explain(reason, low_sparsity ? "N > 64 below 65 % zeros: unpacking and cuBLAS cost less"
                                 : "N > 128: unpacking and cuBLAS cost less");
    return false;
  }
  explain(reason, "the narrowest tile that covers N decodes each weight once");
  return true;
}

Status plan_lscd(const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  const DeviceInfo& device = request.device;
  out->config = request.forced() ? config_named(lscd_configs(), request.config)
                                 : config_covering(lscd_configs(), problem.n);
  const LscdConfig& config = lscd_configs()[static_cast<size_t>(out->config)];
  if (problem.k > kMaxLscdStride) {
    return Status::invalid_value(shape_text(problem) + " exceeds the kernel's limit K <= 2^29");
  }
  const int64_t col_blocks = (problem.n + config.tile_n - 1) / config.tile_n;
  out->work.rows = col_blocks * num_tile_rows(problem.m);
  out->work.cols = num_tile_cols(problem.k);
  if (out->work.units() > INT32_MAX) {
    return Status::invalid_value(shape_text(problem) + " needs " +
                                 std::to_string(out->work.units()) +
                                 " tiles of work, more than 32-bit indices can count");
  }
  int64_t ctas = request.ctas;
  if (ctas == 0) {
    const int smem_ctas = device.smem_per_sm_bytes / (lscd_smem_bytes(config) + kReservedSmemBytes);
    const int ctas_per_sm = std::max(1, std::min(config.ctas_per_sm, smem_ctas));
    ctas = int64_t{device.num_sms} * ctas_per_sm;
  }
  out->ctas = std::clamp<int64_t>(ctas, 1, std::max<int64_t>(out->work.units(), 1));
  out->work.workers = out->ctas;
  out->packed_x_bytes = lscd_packed_x_bytes(config, problem.n, problem.k);
  out->workspace_bytes = lscd_sums_bytes(config, out->work) + out->packed_x_bytes;
  out->x_multiple = kTileK;
  return Status::success();
}

}  // namespace flash_llm
