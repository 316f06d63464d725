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

int config_for(const Configs& configs, ValueType type, int64_t n, bool int8_x) {
  return config_covering(configs, n, [&](const QuantizedBitmapConfig& config) {
    return config.int8_x == int8_x && config.multiplies(type);
  });
}

// Whether X is quantised, unless a configuration is forced: where rounding it in every CTA takes
// less time than it saves. Measured on an H200, fp16, 50 % zeros, in us (2026-11-30), X as it is /
// int8:
//                  N = 1         N = 8        N = 16
//   28672x7168   41.2 / 37.1   44.8 / 41.1   59.0 / 45.8
//   14336x4096   16.7 / 15.2   18.2 / 16.6   21.4 / 21.2
//    7168x7168   14.6 / 14.2   18.4 / 18.1   22.8 / 23.7
//    4096x4096    7.1 /  7.5    8.7 /  9.2   12.4 / 12.6
bool takes_int8_x(const PlanRequest& request) {
  const SpmmProblem& problem = request.problem;
  const int64_t least = problem.n <= 8 ? int64_t{32} << 20 : int64_t{128} << 20;
  return problem.int8_x && value_traits(problem.value_type).kind != ValueKind::kFp8E4m3 &&
         problem.k <= kQuantMaxInt8K && problem.m * problem.k >= least;
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
  const int config = config_for(configs, problem.value_type, problem.n, takes_int8_x(request));
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
                                 : config_for(configs, type, problem.n, takes_int8_x(request));
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
  const int fixed_bytes = quant_smem_bytes(config, type, warps, 0) + kReservedSmemBytes;
  const int sm_bytes = request.device.smem_per_sm_bytes;
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
  out->workspace_bytes = quant_sums_bytes(config, problem.m, problem.n, sections);
  return Status::success();
}

}  // namespace

const std::vector<QuantizedBitmapConfig>& quantized_bitmap_configs(KernelFamily family) {
  static const Configs sm80 = {
#define FLASH_LLM_ROW(name, tokens, warp_planes, int8_x) \
  {"sm80_" #name, tokens, warp_planes, int8_x},
      FLASH_LLM_QUANTIZED_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  static const Configs sm90 = {
#define FLASH_LLM_ROW(name, tokens, warp_planes, int8_x) {#name, tokens, warp_planes, int8_x},
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
