#include "plan/quantized_bitmap_sm90a.h"

#include <algorithm>
#include <cstdint>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// The kernel that multiplies whole rows (plan/quantized_bitmap.h) decodes the weight for every
// 8 or 16 tokens. Measured on an H200, fp16, 50 % zeros, in us (2026-11-30), it / this kernel, and
// dense FP8 of cuBLAS:
//   X quantised     N = 16              N = 32              N = 64
//   28672x7168   45.8 / 44.8 (49.1)  70.2 / 47.9 (49.9)  125.6 / 54.8 (51.1)
//   14336x4096   21.2 / 19.4 (17.0)  28.2 / 24.4 (17.4)   45.4 / 25.0 (18.5)
//    7168x7168   22.7 / 17.7 (17.4)  29.7 / 23.5 (15.5)   41.7 / 23.7 (16.4)
//    4096x4096   12.3 /  9.2  (7.7)  15.7 / 10.8  (7.7)   20.2 / 14.1  (7.7)
//   X as it is
//   28672x7168   59.2 / 54.4        107.8 / 57.4         223.5 / 72.3
//   14336x4096   21.9 / 21.8         32.2 / 28.6          55.8 / 31.2
//    7168x7168   22.8 / 21.6         33.9 / 22.5          58.1 / 32.6
//    4096x4096   11.9 / 14.2         15.5 / 15.0          21.4 / 27.0
// At N = 8, 28672x7168, they take 40.5 / 44.8 (X quantised) and 44.1 / 52.0.
constexpr int64_t kLeastTokens = 9;
constexpr int64_t kMostTokens = 64;
constexpr int64_t kLeastElems = int64_t{16} << 20, kLeastElemsWideX = int64_t{32} << 20;

bool takes_int8_x(const SpmmProblem& problem) {
  return problem.int8_x && value_traits(problem.value_type).kind == ValueKind::kInt8 &&
         problem.k <= kQuantMaxInt8K;
}

// The narrowest configuration for n tokens, or the widest.
int config_for(const SpmmProblem& problem) {
  const std::vector<QuantWgmmaConfig>& configs = quant_wgmma_configs();
  const bool int8_x = takes_int8_x(problem);
  int found = -1;
  for (size_t i = 0; i < configs.size(); ++i) {
    if (configs[i].int8_x != int8_x) continue;
    found = static_cast<int>(i);
    if (problem.n <= configs[i].tile_n) break;
  }
  return found;
}

}  // namespace

const std::vector<QuantWgmmaConfig>& quant_wgmma_configs() {
  static const std::vector<QuantWgmmaConfig> configs = {
#define FLASH_LLM_ROW(name, tile_n, warpgroups, int8_x, x_stages) \
  {#name, tile_n, warpgroups, int8_x, x_stages},
      FLASH_LLM_QUANT_WGMMA_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return configs;
}

QuantWgmmaWorkspace::QuantWgmmaWorkspace(const QuantWgmmaConfig& config, const SpmmPlan& plan) {
  const int64_t tokens = config.passes(plan.problem.n) * config.tile_n;
  slots = (plan.work.rows + (config.int8_x ? 0 : plan.ctas)) * config.warpgroups;
  const int64_t counts = config.passes(plan.problem.n) * num_quant_strips(plan.problem.m);
  counts_bytes = (counts * 4 + 15) / 16 * 16;
  sums_bytes = slots * kQuantGroupStrips * kQuantStripM * tokens * 4;
  x_bytes = plan.work.cols * config.passes(plan.problem.n) * config.x_col_bytes();
  token_bytes = tokens * 4;
}

std::vector<KernelConfig> describe_quant_wgmma_configs() {
  std::vector<KernelConfig> rows;
  for (const QuantWgmmaConfig& config : quant_wgmma_configs()) {
    rows.push_back(
        {config.name,
         {{"tile_n", config.tile_n},
          {"warps", config.warps()},
          {"ctas_per_sm", 1},
          {"smem_bytes", quant_wgmma_smem_bytes(config, quant_wgmma_min_ring_bytes(config))}}});
  }
  return rows;
}

bool takes_quant_wgmma(const PlanRequest& request, std::string* reason) {
  const SpmmProblem& problem = request.problem;
  const int64_t least = takes_int8_x(problem) ? kLeastElems : kLeastElemsWideX;
  if (problem.n < kLeastTokens || problem.n > kMostTokens || problem.m * problem.k < least) {
    return false;
  }
  explain(reason, "9 <= N <= 64 and a large weight: the weight is decoded once for all tokens");
  return true;
}

Status plan_quant_wgmma(const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  out->config =
      request.forced() ? config_named(quant_wgmma_configs(), request.config) : config_for(problem);
  const QuantWgmmaConfig& config = quant_wgmma_configs()[static_cast<size_t>(out->config)];
  if (!config.multiplies(problem.value_type)) {
    return Status::invalid_value("config \"" + std::string(config.name) + "\" does not multiply " +
                                 value_traits(problem.value_type).values + " values");
  }
  if (config.int8_x && problem.k > kQuantMaxInt8K) {
    return Status::invalid_value("config \"" + std::string(config.name) + "\" takes K up to " +
                                 std::to_string(kQuantMaxInt8K) + ", got " +
                                 std::to_string(problem.k));
  }
  const int min_ring_bytes = quant_wgmma_min_ring_bytes(config);
  if (Status fits =
          check_smem(config.name, quant_wgmma_smem_bytes(config, min_ring_bytes), request.device);
      !fits.ok()) {
    return fits;
  }
  const int room = smem_per_cta_bytes(request.device) - kQuantWgmmaSpareSmemBytes -
                   quant_wgmma_smem_bytes(config, 0);
  const int step = config.warps() * 128;
  out->ring_bytes = std::clamp(room / step * step, min_ring_bytes,
                               config.warps() * quant_max_ring_bytes(problem.value_type));
  out->warps = config.warps();
  const int64_t tiles = std::max<int64_t>(config.tiles(problem.m), 1);
  const int64_t columns = std::max<int64_t>(num_quant_chunks(problem.value_type, problem.k), 1);
  const int64_t passes = std::max<int64_t>(config.passes(problem.n), 1);
  const int64_t ctas = request.ctas != 0 ? request.ctas : request.device.num_sms / passes;
  out->ctas = std::clamp<int64_t>(ctas, 1, tiles * columns);
  out->work = {tiles, columns, out->ctas};
  out->x_multiple = 8;
  out->workspace_bytes = QuantWgmmaWorkspace(config, *out).bytes();
  return Status::success();
}

}  // namespace flash_llm
