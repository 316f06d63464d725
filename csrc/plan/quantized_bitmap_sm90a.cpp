#include "plan/quantized_bitmap_sm90a.h"

#include <algorithm>
#include <cstdint>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// The kernel that multiplies whole rows (plan/quantized_bitmap.h) decodes the weight for every 8 or
// 16 tokens, and a dense product needs it unpacked. Measured on an H200, fp16, 50 % zeros, int8
// values, in us (2026-11-30), the kernel for whole rows (N = 128: unpacking and cuBLAS) / this one,
// and dense FP8 of cuBLAS:
//   X quantised     N = 16              N = 32              N = 64          N = 128
//   28672x7168   45.2 / 42.6 (54.6)  70.6 / 43.8 (55.8)  127.4 / 51.0 (54.7)
//   14336x4096   21.2 / 18.0 (17.8)  28.2 / 19.3 (18.4)   45.4 / 25.0 (18.9)
//    7168x7168   23.6 / 18.5 (18.8)  29.7 / 19.4 (16.4)   41.4 / 25.1 (16.5)
//    4096x4096   12.4 / 10.4  (7.5)  16.1 / 11.7  (7.6)   20.3 / 16.3  (7.6)
//   X as it is
//   28672x7168   59.5 / 51.9        107.7 / 55.4         211.2 / 69.4      296 / 102
//   14336x4096   21.9 / 21.3         32.1 / 23.1          55.8 / 28.9           41.7
//    7168x7168   22.7 / 21.0         33.1 / 23.0          57.3 / 27.7           41.1
//    6144x4096   14.3 / 15.0         19.0 / 17.3
//    4096x4096   12.3 / 13.0         16.0 / 15.5          21.8 / 19.4       32 / 30.1
// At N = 8, 28672x7168, they take 40.5 / 44.8 (X quantised) and 44.1 / 52.0.
//
// Passes of 64 / of 128 tokens, and unpacking with cuBLAS's product, also of int4 values:
//                          N = 128            N = 256          N = 512         N = 2048
//   28672x7168 quantised   94 / 103             168 (344)  396 / 305 (464)   1202 (1308)
//              as it is   146 / 111             206 (344)        418 (464)   1670 (1308)
//              int4             122 (296)                        462 (481)
//   14336x4096 quantised  33.4 / 43.5 (92)  69.3 (103)
//              as it is   48.7 / 42.8 (92)  82.8 (103)
//    4096x4096 quantised  19.6 / 31.7 (32)  29.0  (33)             48  (42)    125  (106)
//              as it is   23.1 / 30.9 (32)  31.0  (33)             51  (42)
// A small weight has few output tiles, which many CTAs would share if there were only one pass.
constexpr int64_t kLeastTokens = 9;
constexpr int64_t kLeastElems = int64_t{16} << 20, kLeastElemsWideX = int64_t{32} << 20;
constexpr int64_t kLargeElems = int64_t{128} << 20;
// With more tokens the sums would also take more memory than the unpacked weight.
constexpr int64_t kMostTokensSmall = 256, kMostTokensLargeWideX = 512, kMostTokensLarge = 2048;
// Passes of 128 tokens are for weights of so many elements.
constexpr int64_t kLeastElems128 = kLargeElems, kLeastElems128WideX = int64_t{32} << 20;

bool is_large(const SpmmProblem& problem) { return problem.m * problem.k >= kLargeElems; }

bool takes_int8_x(const SpmmProblem& problem) {
  return problem.int8_x && value_traits(problem.value_type).kind == ValueKind::kInt8 &&
         problem.k <= kQuantMaxInt8K;
}

int config_for(const SpmmProblem& problem) {
  const bool int8_x = takes_int8_x(problem);
  const int64_t least_128 = int8_x ? kLeastElems128 : kLeastElems128WideX;
  return config_covering(quant_wgmma_configs(), problem.n, [&](const QuantWgmmaConfig& config) {
    return config.int8_x == int8_x && (config.tile_n < 128 || problem.m * problem.k >= least_128);
  });
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
  const int64_t x_cols = plan.work.cols * quant_planes(plan.problem.value_type);
  x_bytes = x_cols * config.passes(plan.problem.n) * config.x_col_bytes();
  token_bytes = tokens * 4;
  bias_bytes = quant_wgmma_token_parts(config.tile_n) * token_bytes;
}

std::vector<KernelConfig> describe_quant_wgmma_configs() {
  std::vector<KernelConfig> rows;
  for (const QuantWgmmaConfig& config : quant_wgmma_configs()) {
    rows.push_back(
        {config.name,
         {{"tile_n", config.tile_n},
          {"warps", config.warps()},
          {"ctas_per_sm", 1},
          {"smem_bytes", quant_wgmma_smem_bytes(config, quant_wgmma_min_ring_bytes(
                                                            config, ValueType::kInt8Float16))}}});
  }
  return rows;
}

bool takes_quant_wgmma(const PlanRequest& request, std::string* reason) {
  const SpmmProblem& problem = request.problem;
  const bool int8_x = takes_int8_x(problem);
  const int64_t least = int8_x || problem.n > 16 ? kLeastElems : kLeastElemsWideX;
  if (problem.n < kLeastTokens || problem.m * problem.k < least) return false;
  const int64_t most_large = int8_x ? kMostTokensLarge : kMostTokensLargeWideX;
  const int64_t most = is_large(problem) ? most_large : kMostTokensSmall;
  if (problem.n > most) {
    explain(reason, quant_dense_is_faster(most).c_str());
    return false;
  }
  explain(reason, "N >= 9 and a large weight: it is decoded once for up to 128 tokens");
  return true;
}

Status plan_quant_wgmma(const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  out->config =
      request.forced() ? config_named(quant_wgmma_configs(), request.config) : config_for(problem);
  const QuantWgmmaConfig& config = quant_wgmma_configs()[static_cast<size_t>(out->config)];
  if (Status fits = check_quant_config(config, problem); !fits.ok()) return fits;
  const int min_ring_bytes = quant_wgmma_min_ring_bytes(config, problem.value_type);
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
  const int64_t units = tiles * columns;
  int64_t ctas = request.ctas;
  if (ctas == 0) {
    ctas = std::clamp<int64_t>(request.device.num_sms / passes, 1, units);
    // If the CTAs with most work can each have a part of one output tile, none has parts of two.
    const int64_t most_units = (units + ctas - 1) / ctas;
    if (columns % most_units == 0) ctas = units / most_units;
  }
  out->ctas = std::clamp<int64_t>(ctas, 1, units);
  out->work = {tiles, columns, out->ctas};
  out->x_multiple = 8;
  out->workspace_bytes = QuantWgmmaWorkspace(config, *out).bytes();
  return Status::success();
}

}  // namespace flash_llm
