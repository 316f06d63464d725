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
// X quantised, and unpacking with cuBLAS's product:
//               N = 128      256        512       1024        2048         4096         8192
//   28672x7168  69 (294)  136 (337)  286 (455)  509 (725)  1041 (1290)  2125 (2389)  4494 (4739)
//   14336x4096  32  (92)   43 (102)   84 (145)  180 (215)   314  (374)   659  (675)
//    7168x7168  35  (84)   51  (88)   70 (123)  137 (200)   308  (329)   536  (600)
//    4096x4096  20  (32)   32  (33)   34  (42)   46  (62)    92  (107)   193  (200)
// X as it is, passes of 64 / of 128 tokens, and unpacking:
//               N = 128                 256            512        1024
//   28672x7168   146 / 111 (294)  206 / 202 (337)  392 (455)  774 (714)
//   with int4          122 (296)                   462 (468)
//   14336x4096  48.7 / 42.8 (92)   83 /  72 (102)  128 (142)  246 (213)
//    7168x7168         41.1 (84)         61  (87)  117 (122)  210 (199)
//    4096x4096  23.1 / 30.9 (32)   31 /  35  (33)   51  (42)
constexpr int64_t kLeastTokens = 9;
constexpr int64_t kLeastElems = int64_t{16} << 20, kLeastElemsWideX = int64_t{32} << 20;
constexpr int64_t kMostTokens = 8192;
// Of weights with fewer than kLeastElemsWideX elements, and of larger ones.
constexpr int64_t kMostTokensWideX = 256, kMostTokensLargeWideX = 512;

bool takes_int8_x(const SpmmProblem& problem) {
  return problem.int8_x && value_traits(problem.value_type).kind == ValueKind::kInt8 &&
         problem.k <= kQuantMaxInt8K;
}

// How the output tiles of a pass are divided: into work units of so many columns of chunks, which
// are divided between so many CTAs. `us` is the time; 0 if it is not known.
struct Division {
  int64_t unit_cols, ctas;
  double us;
};

// All CTAs have the same work, and most have parts of two output tiles.
Division divide_evenly(const QuantWgmmaConfig& config, const SpmmProblem& problem, int64_t ctas) {
  const int64_t columns = num_quant_chunks(problem.value_type, problem.k);
  const int64_t units = config.tiles(problem.m) * columns;
  ctas = std::clamp<int64_t>(ctas, 1, units);
  // If the CTAs with most work can each have a part of one output tile, none has parts of two.
  const int64_t most_units = (units + ctas - 1) / ctas;
  if (columns % most_units == 0) ctas = units / most_units;
  return {1, ctas, 0.0};
}

// The sums of many tokens cost more where CTAs share an output tile, because they go through L2,
// than even work saves. On an H200, int8 X, a column of chunks takes 1.65 us with 64 tokens and 2.3
// us with 128, and each CTA's sums of a shared tile add 0.05 and 0.16 us: 28672x7168 with 128
// tokens takes 95 us on 132 CTAs, but 69 us if 112 of them have an output tile each.
Division divide_by_time(const QuantWgmmaConfig& config, const SpmmProblem& problem, int64_t ctas) {
  const double column_us = config.tile_n < 128 ? 1.65 : 2.3;
  const double shared_us = config.tile_n < 128 ? 0.05 : 0.16;
  const int64_t columns = num_quant_chunks(problem.value_type, problem.k);
  const int64_t tiles = config.tiles(problem.m);
  Division best = {};
  const auto consider = [&](int64_t unit_cols, int64_t most_ctas, int64_t shared_parts) {
    const int64_t units = tiles * columns / unit_cols;
    const int64_t workers = std::clamp<int64_t>(most_ctas, 1, units);
    const int64_t most_units = (units + workers - 1) / workers;
    const double us = column_us * static_cast<double>(most_units * unit_cols) +
                      shared_us * static_cast<double>(config.passes(problem.n) * shared_parts);
    if (best.ctas == 0 || us < best.us) best = {unit_cols, workers, us};
  };
  consider(columns, ctas, 0);  // whole tiles
  for (int64_t sharing = 2; sharing * tiles <= ctas; ++sharing) {
    if (columns % sharing == 0) consider(columns / sharing, sharing * tiles, sharing * tiles);
  }
  consider(1, ctas, ctas + std::min(tiles, ctas));
  return best;
}

Division divide(const QuantWgmmaConfig& config, const SpmmProblem& problem, int num_sms) {
  const int64_t ctas = num_sms / config.passes(problem.n);
  return config.int8_x && problem.n > 64 ? divide_by_time(config, problem, ctas)
                                         : divide_evenly(config, problem, ctas);
}

int config_for(const SpmmProblem& problem, int num_sms) {
  const std::vector<QuantWgmmaConfig>& configs = quant_wgmma_configs();
  const bool int8_x = takes_int8_x(problem);
  // A weight with few output tiles has little work for each CTA, so passes of 64 tokens may be
  // faster, which have half as many sums.
  const auto narrow =
      static_cast<size_t>(config_covering(configs, problem.n, [&](const QuantWgmmaConfig& config) {
        return config.int8_x == int8_x && config.tile_n < 128;
      }));
  const auto widest = static_cast<size_t>(config_covering(
      configs, problem.n, [&](const QuantWgmmaConfig& config) { return config.int8_x == int8_x; }));
  if (narrow == widest) return static_cast<int>(widest);
  const bool wide = int8_x ? divide(configs[widest], problem, num_sms).us <=
                                 divide(configs[narrow], problem, num_sms).us
                           : problem.m * problem.k >= kLeastElemsWideX;
  return static_cast<int>(wide ? widest : narrow);
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
  slots = plan.work.workers * (config.int8_x ? 1 : 2);
  const int64_t counts = config.passes(plan.problem.n) * num_quant_strips(plan.problem.m);
  counts_bytes = (counts * 4 + 15) / 16 * 16;
  sums_bytes = slots * config.warps() * kQuantStripM * tokens * 4;
  const int64_t columns = plan.work.cols * plan.unit_cols;
  const int64_t x_cols = columns * quant_planes(plan.problem.value_type);
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
  const int64_t elems = problem.m * problem.k;
  const int64_t least = int8_x || problem.n > 16 ? kLeastElems : kLeastElemsWideX;
  if (problem.n < kLeastTokens || elems < least) return false;
  const int64_t most = int8_x                      ? kMostTokens
                       : elems >= kLeastElemsWideX ? kMostTokensLargeWideX
                                                   : kMostTokensWideX;
  if (problem.n > most) {
    explain(reason, quant_dense_is_faster(most).c_str());
    return false;
  }
  explain(reason, "N >= 9 and a large weight: it is decoded once for up to 128 tokens");
  return true;
}

Status plan_quant_wgmma(const PlanRequest& request, SpmmPlan* out) {
  SpmmProblem problem = request.problem;  // an empty one is planned as if it had one element
  problem.m = std::max<int64_t>(problem.m, 1);
  problem.n = std::max<int64_t>(problem.n, 1);
  problem.k = std::max<int64_t>(problem.k, 1);
  out->config = request.forced() ? config_named(quant_wgmma_configs(), request.config)
                                 : config_for(problem, request.device.num_sms);
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
  const int64_t tiles = config.tiles(problem.m);
  const int64_t columns = num_quant_chunks(problem.value_type, problem.k);
  const Division division = request.ctas == 0
                                ? divide(config, problem, request.device.num_sms)
                                : Division{1, std::min(request.ctas, tiles * columns), 0.0};
  out->ctas = division.ctas;
  out->unit_cols = static_cast<int>(division.unit_cols);
  out->work = {tiles, columns / division.unit_cols, division.ctas};
  out->x_multiple = 8;
  out->workspace_bytes = QuantWgmmaWorkspace(config, *out).bytes();
  return Status::success();
}

}  // namespace flash_llm
