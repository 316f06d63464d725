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
//   name; tokens per CTA; planes of chunks per warp, X of which stays in its registers; what X is
//   multiplied as: config="auto" chooses rounded X only if SpmmProblem::rounds_x allows it
// clang-format off
#define FLASH_LLM_QUANTIZED_CONFIGS(row)       \
  row(quantized8, 8, 2, XValues::kUnrounded)   \
  row(quantized16, 16, 1, XValues::kUnrounded) \
  row(quantized8_int8x, 8, 2, XValues::kInt8)  \
  row(quantized16_int8x, 16, 2, XValues::kInt8)
// clang-format on

struct QuantizedBitmapConfig {
  const char* name;
  int tile_n;
  int warp_planes;
  XValues x;

  // Whether it multiplies such values: chunks have all of their planes in one warp, and there are
  // no products of fp8 values and int8 X.
  constexpr bool multiplies(ValueType type) const {
    return warp_planes % quant_planes(type) == 0 &&
           (x == XValues::kUnrounded || value_traits(type).kind != ValueKind::kFp8E4m3);
  }
  constexpr int warp_chunks(ValueType type) const { return warp_planes / quant_planes(type); }
  // Whether every CTA rounds X for itself, so that no kernel has to do so first.
  constexpr bool ctas_round(int64_t n, int64_t sections) const {
    return n == 1 && tile_n == 8 && sections == 1;
  }

  // CTAs that share the tokens.
  constexpr int64_t passes(int64_t n) const { return (n + tile_n - 1) / tile_n; }
  // Bytes of a strip's sums.
  constexpr int sums_bytes() const { return kQuantStripM * tile_n * 4; }
  // Places for them in shared memory, of each strip: integers are added there, but not those that
  // scales of groups have made fp32.
  constexpr int sums_places(ValueType type, int warps) const {
    return x == XValues::kInt8 && value_traits(type).scales == ScaleGroup::kRow ? 1 : warps;
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
// are two words and two for each token there, and the bits and columns of a chunk without values.
inline constexpr int kQuantGuardBytes = 18 * kQuantRowBytes;
inline constexpr int kQuantTokenBytes = ((2 + 2 * kQuantMaxTokens) * 4 + 127) / 128 * 128;
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

// Left free so that a CTA of the kernel that rounds X becomes resident beside those of this kernel.
inline constexpr int kQuantSpareSmemBytes = 2 * 1024;

// The longest K of X in int8: sums of products of bytes of 255 and 127 fit 32 bits.
inline constexpr int64_t kQuantMaxInt8K = 65536;

// The workspace. If there are several sections of K, the sums of each: all of Y in fp32. And X in
// int8 in the order of B fragments, the scale of each token, and for each section the sum of its
// integers; but every CTA rounds a single token for itself.
struct QuantRowsWorkspace {
  int64_t sums_bytes = 0, x_bytes = 0, scales_bytes = 0, token_sums_bytes = 0;

  QuantRowsWorkspace(const QuantizedBitmapConfig& config, ValueType type, int64_t m, int64_t n,
                     int64_t k, int64_t sections) {
    const int64_t tokens = config.passes(n) * config.tile_n;
    if (sections > 1) sums_bytes = sections * num_quant_strips(m) * kQuantStripM * tokens * 4;
    if (config.x == XValues::kUnrounded || config.ctas_round(n, sections)) return;
    x_bytes = tokens * num_quant_chunks(type, k) * quant_chunk_k(type);
    scales_bytes = tokens * 4;
    token_sums_bytes = sections * tokens * 4;
  }
  int64_t bytes() const { return sums_bytes + x_bytes + scales_bytes + token_sums_bytes; }
};

// Refuses a configuration, of any family for this format, that does not multiply the problem's
// values or takes no K as long.
template <typename Config>
Status check_quant_config(const Config& config, const SpmmProblem& problem) {
  const std::string name = "config \"" + std::string(config.name) + "\"";
  if (!config.multiplies(problem.value_type)) {
    return Status::invalid_value(name + " does not multiply " +
                                 value_traits(problem.value_type).values + " values");
  }
  if (config.x == XValues::kInt8 && problem.k > kQuantMaxInt8K) {
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
