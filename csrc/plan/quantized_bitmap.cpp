#include "plan/quantized_bitmap.h"

#include <algorithm>
#include <cstdint>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

using Configs = std::vector<QuantizedBitmapConfig>;

// Every pass decodes the weight again, so on Hopper another kernel takes large weights from 9
// tokens on (plan/quantized_bitmap_sm90a.cpp). Measured on an H200, fp16, 50 % zeros, in us
// (2026-11-30): 16 and 64 tokens, and unpacking with cuBLAS's product, for any N up to 64.
//   28672x7168   59   208   285
//   14336x4096   21    56    91
//    7168x7168   23    58    81
//    4096x4096   12    21    28
// int4 values and X as it is have passes of 8 tokens: 28672x7168 takes 173 us with 32 tokens, 348
// with 64 and 285 unpacked; 14336x4096 49, 92 and 91.
constexpr int64_t kMostTokens = 64, kMostTokensBy8 = 48;

int config_for(const Configs& configs, ValueType type, int64_t n, XValues x) {
  return config_covering(configs, n, [&](const QuantizedBitmapConfig& config) {
    return config.x == x && config.multiplies(type);
  });
}

// What X is multiplied as, unless a configuration is forced. int8 is faster for every weight, N = 1
// included. Measured on an H200, fp16, 50 % zeros, in us (2026-11-30), X as it is / int8:
//                  N = 1         N = 8        N = 16
//   28672x7168   41.1 / 35.8   44.9 / 36.9   60.2 / 39.7
//   14336x4096   16.9 / 12.8   19.3 / 13.8   22.6 / 15.9
//    7168x7168   14.7 / 12.6   18.0 / 13.1   23.0 / 15.9
//    4096x4096    7.3 /  6.2    9.3 /  6.8   12.5 /  8.2
//    1024x1024    2.9 /  2.7    3.7 /  3.3    5.5 /  3.9
XValues x_values_of(const SpmmProblem& problem) {
  const bool rounds = problem.rounds_x && problem.k <= kQuantMaxInt8K &&
                      value_traits(problem.value_type).kind != ValueKind::kFp8E4m3;
  return rounds ? XValues::kInt8 : XValues::kUnrounded;
}

// The most warps of a CTA.
int most_warps_of(const QuantizedBitmapConfig& config, ValueType type, const DeviceInfo& device) {
  const int ring_bytes = quant_min_ring_bytes(type), smem = smem_per_cta_bytes(device);
  int warps = kQuantMaxWarps;
  while (quant_smem_bytes(config, type, warps, ring_bytes) > smem) --warps;
  // A multiple of 4, so that the schedulers of an SM have the same work; but few warps wait for
  // memory instead.
  return warps > 8 ? warps / 4 * 4 : warps;
}

// Whether two CTAs on each SM, with half of `warps` warps each and two columns of chunks for every
// warp, are faster than one CTA with a column for every warp. One CTA multiplies while the other
// begins or ends, and a warp adds its sums to the others' half as often. But both CTAs load X, and
// more CTAs may divide the strips less evenly.
// Measured on an H200, int8 values, 50 % zeros, K = 4096, in us (2026-11-30), one CTA / two:
//             X in int8, N = 1 / 8 / 16                    X as it is, N = 1 / 8
//   M = 3072   5.7,  5.1 /  5.9,  5.7 /  7.2,  6.8          5.9,  5.6 /  8.0, 10.1
//       5120   7.9,  7.5 /  8.0,  9.1 /  9.8, 10.0          8.2,  8.3 / 10.5, 11.8
//      14336  14.6, 12.9 / 14.6, 13.9 / 18.1, 15.9
//      28672  22.4, 21.6 / 22.9, 22.8 / 26.7, 25.2         26.9, 24.6 / 29.1, 29.0
bool two_ctas_are_faster(const QuantizedBitmapConfig& config, const SpmmProblem& problem, int warps,
                         const DeviceInfo& device) {
  const ValueType type = problem.value_type;
  const int smem_bytes =
      quant_smem_bytes(config, type, (warps + 1) / 2, quant_min_ring_bytes(type));
  const bool possible = config.warp_chunks(type) == 2 && warps > kQuantMaxWarps / 2 &&
                        warps == num_quant_chunks(type, problem.k) &&
                        2 * (smem_bytes + kReservedSmemBytes) <= device.smem_per_sm_bytes;
  const int64_t sms = std::max<int64_t>(device.num_sms, 1), strips = num_quant_strips(problem.m);
  const int64_t by_one = (strips + sms - 1) / sms, by_two = (strips + 2 * sms - 1) / (2 * sms) * 2;
  return possible && strips > sms && 7 * by_two <= 8 * by_one && config.passes(problem.n) == 1 &&
         (problem.n == 1 || config.x == XValues::kInt8);
}

std::vector<KernelConfig> describe(const Configs& configs) {
  std::vector<KernelConfig> rows;
  for (const QuantizedBitmapConfig& config : configs) {
    rows.push_back(
        {config.name,
         {{"tile_n", config.tile_n},
          {"warps", kQuantMaxWarps},
          {"ctas_per_sm", 1},
          {"smem_bytes", quant_smem_bytes(config, ValueType::kInt8Float16, 1,
                                          quant_min_ring_bytes(ValueType::kInt8Float16))}}});
  }
  return rows;
}

bool takes(const PlanRequest& request, std::string* reason) {
  const Configs& configs = quantized_bitmap_configs(KernelFamily::kQuantizedBitmapSm90);
  const SpmmProblem& problem = request.problem;
  const int config = config_for(configs, problem.value_type, problem.n, x_values_of(problem));
  const bool by_8 = configs[static_cast<size_t>(config)].tile_n == 8;
  const int64_t most = by_8 ? kMostTokensBy8 : kMostTokens;
  const std::string border = std::to_string(most);
  if (problem.n > most) {
    // The family for wgmma may have said it, with its own border.
    if (reason != nullptr && reason->empty()) *reason = quant_dense_is_faster(most);
    return false;
  }
  const std::string why = "N <= " + border + ": the weight is decoded once per 8 or 16 tokens;";
  explain(reason, (why + " timed on a Hopper GPU only").c_str());
  return true;
}

Status plan(const Configs& configs, const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  const ValueType type = problem.value_type;
  out->config = request.forced() ? config_named(configs, request.config)
                                 : config_for(configs, type, problem.n, x_values_of(problem));
  const QuantizedBitmapConfig& config = configs[static_cast<size_t>(out->config)];
  if (Status fits = check_quant_config(config, problem); !fits.ok()) return fits;
  const int min_ring_bytes = quant_min_ring_bytes(type);
  if (Status fits = check_smem(config.name, quant_smem_bytes(config, type, 1, min_ring_bytes),
                               request.device);
      !fits.ok()) {
    return fits;
  }
  // X of a section of K fits the registers of a CTA. The warps of all CTAs of an SM share its
  // registers.
  const int most_warps = most_warps_of(config, type, request.device);
  const int64_t columns = std::max<int64_t>(num_quant_chunks(type, problem.k), 1);
  const int64_t most_columns = int64_t{config.warp_chunks(type)} * most_warps;
  const int64_t sections = (columns + most_columns - 1) / most_columns;
  out->unit_cols = static_cast<int>((columns + sections - 1) / sections);
  int warps = std::min(out->unit_cols, most_warps);
  // Chunks of two planes can be split between two warps. With all warps the schedulers of an SM
  // have the same work: 14 warps for 14 columns of chunks would give two of them four warps, and
  // two three.
  if (quant_planes(type) == 2 && 2 * warps > most_warps) warps = most_warps;
  if (two_ctas_are_faster(config, problem, warps, request.device)) warps = (warps + 1) / 2;
  const int fixed_bytes = quant_smem_bytes(config, type, warps, 0) + kReservedSmemBytes;
  const int sm_bytes =
      request.device.smem_per_sm_bytes - (config.x == XValues::kInt8 ? kQuantSpareSmemBytes : 0);
  const int ctas_per_sm = std::clamp(sm_bytes / (fixed_bytes + warps * min_ring_bytes), 1,
                                     std::max(kQuantMaxWarps / warps, 1));
  const int room = (sm_bytes / ctas_per_sm - fixed_bytes) / warps / 128 * 128;
  out->warps = warps;
  out->ring_bytes = warps * std::clamp(room, min_ring_bytes, quant_max_ring_bytes(type));
  const int64_t strips = std::max<int64_t>(num_quant_strips(problem.m), 1);
  const int64_t passes = sections * config.passes(std::max<int64_t>(problem.n, 1));
  // CTAs of one pass. The passes run at the same time, so that the weight is read from L2 again.
  const int64_t ctas = request.ctas != 0
                           ? request.ctas
                           : std::max<int64_t>(request.device.num_sms, 1) * ctas_per_sm / passes;
  out->ctas = std::clamp<int64_t>(ctas, 1, strips);
  out->work = {strips, sections, out->ctas};
  out->x_multiple = 8;
  out->workspace_bytes =
      QuantRowsWorkspace(config, type, problem.m, problem.n, problem.k, sections).bytes();
  return Status::success();
}

}  // namespace

const std::vector<QuantizedBitmapConfig>& quantized_bitmap_configs(KernelFamily family) {
  static const Configs sm80 = {
#define FLASH_LLM_ROW(name, tokens, warp_planes, x) {"sm80_" #name, tokens, warp_planes, x},
      FLASH_LLM_QUANTIZED_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  static const Configs sm90 = {
#define FLASH_LLM_ROW(name, tokens, warp_planes, x) {#name, tokens, warp_planes, x},
      FLASH_LLM_QUANTIZED_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return family == KernelFamily::kQuantizedBitmapSm80 ? sm80 : sm90;
}

std::vector<KernelConfig> describe_quantized_bitmap_sm80_configs() {
  return describe(quantized_bitmap_configs(KernelFamily::kQuantizedBitmapSm80));
}

std::vector<KernelConfig> describe_quantized_bitmap_sm90_configs() {
  return describe(quantized_bitmap_configs(KernelFamily::kQuantizedBitmapSm90));
}

// On GPUs that have bulk copies the other family is taken, which then gives the reason.
bool takes_quantized_bitmap_sm80(const PlanRequest& request, std::string* reason) {
  return !request.device.features.contains(GpuFeature::kBulkCopy) && takes(request, reason);
}

bool takes_quantized_bitmap_sm90(const PlanRequest& request, std::string* reason) {
  return takes(request, reason);
}

Status plan_quantized_bitmap_sm80(const PlanRequest& request, SpmmPlan* out) {
  return plan(quantized_bitmap_configs(KernelFamily::kQuantizedBitmapSm80), request, out);
}

Status plan_quantized_bitmap_sm90(const PlanRequest& request, SpmmPlan* out) {
  return plan(quantized_bitmap_configs(KernelFamily::kQuantizedBitmapSm90), request, out);
}

}  // namespace flash_llm
