// The plans of the two quantised bitmap kernels
// (cuda/quantized_bitmap/quantized_bitmap_kernel.cuh): for GPUs with bulk copies, and for every GPU
// from sm_80 on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/quantized_bitmap.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The configurations of both families:
//   name; tokens per CTA; planes of chunks per warp, X of which stays in its registers; whether X
//   is quantised to int8 with a scale for each token, which config="auto" chooses only if
//   SpmmProblem::int8_x allows it
// clang-format off
#define FLASH_LLM_QUANTIZED_CONFIGS(row) \
  row(quantized8, 8, 2, false)           \
  row(quantized16, 16, 1, false)         \
  row(quantized8_int8x, 8, 2, true)      \
  row(quantized16_int8x, 16, 2, true)
// clang-format on

struct QuantizedBitmapConfig {
  const char* name;
  int tile_n;
  int warp_planes;
  bool int8_x;

  // Whether it multiplies such values: chunks have all of their planes in one warp, and there are
  // no products of fp8 values and int8 X.
  constexpr bool multiplies(ValueType type) const {
    return warp_planes % quant_planes(type) == 0 &&
           !(int8_x && value_traits(type).kind == ValueKind::kFp8E4m3);
  }
  constexpr int warp_chunks(ValueType type) const { return warp_planes / quant_planes(type); }

  // CTAs that share the tokens.
  constexpr int64_t passes(int64_t n) const { return (n + tile_n - 1) / tile_n; }
  // Bytes of a strip's sums.
  constexpr int sums_bytes() const { return kQuantStripM * tile_n * 4; }
  // Places for them in shared memory, of each strip: integers are added there, but not those that
  // scales of groups have made fp32.
  constexpr int sums_places(ValueType type, int warps) const {
    return int8_x && value_traits(type).scales == ScaleGroup::kRow ? 1 : warps;
  }
};

// The families differ in the configurations' names only: "quantized8" and "sm80_quantized8".
const std::vector<QuantizedBitmapConfig>& quantized_bitmap_configs(KernelFamily family);

inline constexpr int kQuantMaxTokens = 16;  // of a CTA
inline constexpr int kQuantSumsStages = 4;  // strips whose sums are in shared memory at a time
// With all 16 warps the schedulers of an SM have the same work.
inline constexpr int kQuantMaxWarps = 16;
inline constexpr int kQuantMaxWarpPlanes = 2;
// Each warp has a ring that its chunks are copied to, at most kQuantRingChunks at a time. It holds
// two of the largest that the format allows; they begin at multiples of 128 bytes.
inline constexpr int kQuantRingChunks = 4;
FLASH_LLM_HOST_DEVICE constexpr int quant_max_chunk_bytes(ValueType type) {
  return (quant_max_units(type) * kQuantUnitBytes + 127) / 128 * 128;
}
constexpr int quant_min_ring_bytes(ValueType type) { return 2 * quant_max_chunk_bytes(type); }
constexpr int quant_max_ring_bytes(ValueType type) {
  return kQuantRingChunks * quant_max_chunk_bytes(type);
}

// Before the rings: a malformed chunk is read from up to 17 rows before its begin. Besides, there
// are three words for each token there, and the bits and columns of a chunk without values.
inline constexpr int kQuantGuardBytes = 18 * kQuantRowBytes;
inline constexpr int kQuantTokenBytes = (3 * kQuantMaxTokens * 4 + 127) / 128 * 128;
static_assert(kQuantGuardBytes >=
              kQuantTokenBytes + kQuantMaxPlanes * (kQuantBitsBytes + kQuantColumnsBytes));

// Barriers of the rings and of the sums.
inline constexpr int kQuantBarriersBytes =
    (8 * (kQuantMaxWarps * kQuantRingChunks + 2 * kQuantSumsStages) + 127) / 128 * 128;

// A CTA's shared memory, from a 128-byte boundary on: the guard, barriers, the sums of some strips,
// the rings.
constexpr int quant_smem_bytes(const QuantizedBitmapConfig& config, ValueType type, int warps,
                               int ring_bytes) {
  return 128 + kQuantGuardBytes + kQuantBarriersBytes +
         kQuantSumsStages * config.sums_places(type, warps) * config.sums_bytes() +
         warps * ring_bytes;
}

// The longest K of quantised X: sums of products of bytes of 255 and 127 fit 32 bits.
inline constexpr int64_t kQuantMaxInt8K = 65536;

// Partial sums in the workspace: all of Y in fp32, for each section of K.
constexpr int64_t quant_sums_bytes(const QuantizedBitmapConfig& config, int64_t m, int64_t n,
                                   int64_t sections) {
  return sections == 1 ? 0
                       : sections * config.passes(n) * num_quant_strips(m) * config.sums_bytes();
}

// Refuses a configuration, of any family for this format, that does not multiply the problem's
// values or takes no K as long.
template <typename Config>
Status check_quant_config(const Config& config, const SpmmProblem& problem) {
  const std::string name = "config \"" + std::string(config.name) + "\"";
  if (!config.multiplies(problem.value_type)) {
    return Status::invalid_value(name + " does not multiply " +
                                 value_traits(problem.value_type).values + " values");
  }
  if (config.int8_x && problem.k > kQuantMaxInt8K) {
    return Status::invalid_value(name + " takes K up to " + std::to_string(kQuantMaxInt8K) +
                                 ", got " + std::to_string(problem.k));
  }
  return Status::success();
}

// Why a family does not take more than `most` tokens.
inline std::string quant_dense_is_faster(int64_t most) {
  return "N > " + std::to_string(most) +
         ": the dense GEMM is faster, although it unpacks the weight";
}

// The functions of these families' rows in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_quantized_bitmap_sm80_configs();
std::vector<KernelConfig> describe_quantized_bitmap_sm90_configs();
bool takes_quantized_bitmap_sm80(const PlanRequest& request, std::string* reason);
bool takes_quantized_bitmap_sm90(const PlanRequest& request, std::string* reason);
Status plan_quantized_bitmap_sm80(const PlanRequest& request, SpmmPlan* out);
Status plan_quantized_bitmap_sm90(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
