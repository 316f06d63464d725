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
//               N = 128      256        512       1024       2048         4096         8192
//   28672x7168  63 (294)  133 (337)  293 (455)  482 (725)  958 (1290)  2056 (2389)  4494 (4739)
//   14336x4096  29  (92)   40 (102)   77 (145)  170 (215)  288  (374)   587  (675)
//    7168x7168  28  (84)   42  (88)   67 (123)  133 (200)  285  (329)   498  (600)
//    4096x4096  18  (32)   21  (33)   29  (42)   41  (62)   77  (107)   176  (200)
// X as it is, passes of 64 / of 128 tokens, and unpacking:
//               N = 128                 256            512        1024
//   28672x7168   146 / 111 (294)  206 / 202 (337)  392 (455)  774 (714)
//   with int4          122 (296)                   462 (468)
//   14336x4096  48.7 / 42.8 (92)   83 /  72 (102)  128 (142)  246 (213)
//    7168x7168         41.1 (84)         61  (87)  117 (122)  210 (199)
//    4096x4096  23.1 / 30.9 (32)   31 /  35  (33)   51  (42)
//
// N = 16: with X in int8, the kernel for whole rows takes 39.7 / 15.9 / 15.9 / 8.2 us for the four
// weights above, and this one 41.9 / 18.1 / 17.9 / 9.9. The former has no products of fp8 X, so at
// N = 8 it takes 45.2 / 19.3 / 18.5 us for fp8 values, and this one 41.9 / 18.1 / 17.5.
constexpr int64_t kLeastTokens = 9, kLeastTokensInt8X = 17, kLeastTokensFp8X = 5;
constexpr int64_t kLeastElems = int64_t{16} << 20, kLeastElemsWideX = int64_t{32} << 20;
constexpr int64_t kLeastElemsFewTokens = int64_t{48} << 20;  // N <= 8
constexpr int64_t kMostTokens = 8192;
// The dense FP8 GEMM multiplies more tokens of fp8 values where it can. Times in us: this kernel /
// unpacking with that GEMM (that GEMM on dense weights):
//               N = 512             1024              2048              4096
//   28672x7168  271 / 276 (150)  514 / 453 (324)  1029 / 768 (632)   1452 (1292)
//   14336x4096   77 /  89  (48)  168 / 137  (85)   286 / 230 (174)    443  (366)
//    7168x7168   70 /  75  (38)  138 / 125  (82)   283 / 198 (140)    384  (311)
//    4096x4096   29 /  28  (14)   41 /  42  (25)    85 /  78  (50)    141  (103)
constexpr int64_t kMostTokensFp8X = 512;
// Of weights with fewer than kLeastElemsWideX elements, and of larger ones.
constexpr int64_t kMostTokensWideX = 384, kMostTokensLargeWideX = 512;

// What X is multiplied as, unless a configuration is forced.
XValues x_values_of(const SpmmProblem& problem) {
  const ValueKind kind = value_traits(problem.value_type).kind;
  if (!problem.rounds_x) return XValues::kUnrounded;
  if (kind == ValueKind::kInt8 && problem.k <= kQuantMaxInt8K) return XValues::kInt8;
  return kind == ValueKind::kFp8E4m3 ? XValues::kFp8E4m3 : XValues::kUnrounded;
}

// The fewest tokens that this kernel takes. The kernel for whole rows multiplies fewer; it also
// rounds X to int8 for int4 values.
int64_t least_tokens(const SpmmProblem& problem) {
  if (!problem.rounds_x) return kLeastTokens;
  if (x_values_of(problem) == XValues::kFp8E4m3) return kLeastTokensFp8X;
  return problem.k <= kQuantMaxInt8K ? kLeastTokensInt8X : kLeastTokens;
}

// How the output tiles of a pass are divided: into work units of so many columns of chunks, which
// are divided between so many CTAs; and the estimated time, in us.
struct Division {
  int64_t unit_cols, ctas;
  double us;
};

// Units of one column of chunks, or of more if each CTA then has one.
Division of_equal_parts(int64_t tiles, int64_t columns, int64_t ctas) {
  const int64_t cta_cols = tiles * columns / ctas;
  const bool equal = tiles * columns % ctas == 0 && columns % cta_cols == 0;
  return {equal ? cta_cols : 1, ctas, 0.0};
}

// Times in us on an H200 whose SMs all work (2026-11-30, 50 % zeros). `plane`: a CTA multiplies a
// column of planes. The others: sums are brought together, if clusters of two or of four CTAs share
// each output tile, or if CTAs have parts of any tiles, whose sums go through L2.
struct Times {
  double plane, pair, four, through_l2;
};
Times times_of(const QuantWgmmaConfig& config) {
  const auto by_tile_n = [&](const Times& by_16, const Times& by_32, const Times& by_64,
                             const Times& by_128) {
    return config.tile_n == 16   ? by_16
           : config.tile_n == 32 ? by_32
           : config.tile_n == 64 ? by_64
                                 : by_128;
  };
  switch (config.x) {
    case XValues::kInt8:
      return by_tile_n({1.3, 2.0, 3.7, 5.1}, {1.35, 2.0, 3.8, 5.3}, {1.6, 3.0, 4.5, 6.2},
                       {2.1, 5.5, 8.5, 35.0});
    case XValues::kFp8E4m3:
      return by_tile_n({1.25, 2.2, 3.7, 6.6}, {1.35, 2.4, 4.1, 8.0}, {1.5, 2.8, 4.8, 16.0},
                       {1.85, 3.8, 5.6, 26.0});
    case XValues::kUnrounded:
      break;
  }
  return by_tile_n({1.85, 2.0, 4.0, 6.0}, {1.9, 2.2, 3.2, 7.2}, {1.8, 1.9, 3.3, 7.7},
                   {2.2, 1.7, 3.8, 16.6});
}

// The fastest of: CTAs with whole output tiles, clusters that share each, and even work.
Division divide(const QuantWgmmaConfig& config, const SpmmProblem& problem, int num_sms) {
  const Times times = times_of(config);
  const int64_t tiles = config.tiles(problem.m);
  const int64_t columns = num_quant_chunks(problem.value_type, problem.k);
  const int64_t most = std::clamp<int64_t>(num_sms / config.passes(problem.n), 1, tiles * columns);
  Division best = {};
  const auto consider = [&](int64_t unit_cols, int64_t ctas, double sharing_us) {
    const int64_t units = tiles * columns / unit_cols;
    const int64_t most_planes =
        (units + ctas - 1) / ctas * unit_cols * quant_planes(problem.value_type);
    const double us = times.plane * static_cast<double>(most_planes) + sharing_us;
    if (best.ctas == 0 || us < best.us) best = {unit_cols, ctas, us};
  };
  consider(columns, std::min(tiles, most), 0.0);
  if (columns % 2 == 0 && 2 * tiles <= most) consider(columns / 2, 2 * tiles, times.pair);
  // The SMs of a GPU come in groups, which a cluster cannot cross, so clusters of four leave some
  // SMs idle: 28 of them ran at a time on an H200, but not 32.
  if (columns % 4 == 0 && 4 * tiles <= most * 7 / 8) consider(columns / 4, 4 * tiles, times.four);
  consider(1, most, times.through_l2);
  return best;
}

int config_for(const SpmmProblem& problem, int num_sms) {
  const std::vector<QuantWgmmaConfig>& configs = quant_wgmma_configs();
  const XValues x = x_values_of(problem);
  // A weight with few output tiles has little work for each CTA, so passes of 64 tokens may be
  // faster, which have half as many sums.
  const auto covering = [&](int most_tile_n) {
    return static_cast<size_t>(
        config_covering(configs, problem.n, [&](const QuantWgmmaConfig& config) {
          return config.x == x && config.tile_n <= most_tile_n;
        }));
  };
  const size_t narrow = covering(64), wide = covering(128);
  const bool wider =
      divide(configs[wide], problem, num_sms).us <= divide(configs[narrow], problem, num_sms).us;
  return static_cast<int>(wider ? wide : narrow);
}

// cuBLASLt multiplies FP8 matrices of such sizes only.
bool suits_fp8_gemm(const SpmmProblem& problem) {
  return problem.m % 16 == 0 && problem.k % 16 == 0;
}

}  // namespace

const std::vector<QuantWgmmaConfig>& quant_wgmma_configs() {
  static const std::vector<QuantWgmmaConfig> configs = {
#define FLASH_LLM_ROW(name, tile_n, warpgroups, x, x_stages) \
  {#name, tile_n, warpgroups, x, x_stages},
      FLASH_LLM_QUANT_WGMMA_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return configs;
}

QuantWgmmaWorkspace::QuantWgmmaWorkspace(const QuantWgmmaConfig& config, const SpmmPlan& plan) {
  const int64_t tokens = config.passes(plan.problem.n) * config.tile_n;
  const bool in_clusters = quant_wgmma_cluster(plan.work) > 1;
  slots = in_clusters ? 0 : plan.work.workers * (config.integer_sums() ? 1 : 2);
  const int64_t counts =
      in_clusters ? 0 : config.passes(plan.problem.n) * num_quant_strips(plan.problem.m);
  counts_bytes = (counts * 4 + 15) / 16 * 16;
  sums_bytes = slots * config.warps() * kQuantStripM * tokens * 4;
  const int64_t columns = plan.work.cols * plan.unit_cols;
  const int64_t x_cols = columns * quant_planes(plan.problem.value_type);
  x_bytes = x_cols * config.passes(plan.problem.n) * config.x_col_bytes();
  token_bytes = tokens * 4;
  bias_bytes = config.integer_sums() ? quant_wgmma_token_parts(config.tile_n) * token_bytes : 0;
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
  const bool rounds_x = x_values_of(problem) != XValues::kUnrounded;
  const int64_t elems = problem.m * problem.k;
  const int64_t least = problem.n < kLeastTokens     ? kLeastElemsFewTokens
                        : rounds_x || problem.n > 16 ? kLeastElems
                                                     : kLeastElemsWideX;
  if (problem.n < least_tokens(problem) || elems < least) return false;
  const int64_t most = rounds_x                    ? kMostTokens
                       : elems >= kLeastElemsWideX ? kMostTokensLargeWideX
                                                   : kMostTokensWideX;
  if (problem.n > most) {
    explain(reason, quant_dense_is_faster(most).c_str());
    return false;
  }
  explain(reason, "many tokens and a large weight: it is decoded once for up to 128 of them");
  return true;
}

bool takes_dense_fp8x(const PlanRequest& request, std::string* reason) {
  const SpmmProblem& problem = request.problem;
  if (problem.n <= kMostTokensFp8X || x_values_of(problem) != XValues::kFp8E4m3 ||
      !suits_fp8_gemm(problem)) {
    return false;
  }
  if (reason != nullptr) {
    *reason = "N > " + std::to_string(kMostTokensFp8X) +
              ": the dense FP8 GEMM is faster, although it unpacks the weight";
  }
  return true;
}

Status plan_dense_fp8x(const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  if (!suits_fp8_gemm(problem)) {
    return Status::invalid_value("config \"" + request.config +
                                 "\" needs M and K that are multiples of 16, got " +
                                 shape_text(problem));
  }
  out->config = 0;
  out->workspace_bytes = (problem.m + problem.n) * (problem.k + 4);
  out->x_multiple = 8;
  out->rounds_before_activation = true;
  return Status::success();
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
  const Division division =
      request.ctas == 0 ? divide(config, problem, request.device.num_sms)
                        : of_equal_parts(tiles, columns, std::min(request.ctas, tiles * columns));
  out->ctas = division.ctas;
  out->unit_cols = static_cast<int>(division.unit_cols);
  out->work = {tiles, columns / division.unit_cols, division.ctas};
  out->x_multiple = 8;
  out->workspace_bytes = QuantWgmmaWorkspace(config, *out).bytes();
  return Status::success();
}

}  // namespace flash_llm
