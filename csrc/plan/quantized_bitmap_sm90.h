// The plan of the quantised bitmap kernel (cuda/quantized_bitmap/rows_sm90.cu).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/quantized_bitmap.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The kernel's configurations: X as it is, or X quantised to int8 with a scale for each token,
// which config="auto" never chooses.
struct QuantizedBitmapConfig {
  const char* name;
  bool int8_x;
};

const std::vector<QuantizedBitmapConfig>& quantized_bitmap_configs();

// The tokens that a CTA multiplies.
inline constexpr int kQuantTokens = 8;
// Columns of chunks of each warp, whose X stays in its registers.
inline constexpr int kQuantWarpChunks = 2;
inline constexpr int kQuantMaxWarps = 16;
inline constexpr int kQuantMinStages = 2, kQuantMaxStages = 4;

// A stage holds the largest chunk and, in its last word, the chunk's rows of values.
inline constexpr int kQuantStageBytes = 37 * 128;
static_assert(kQuantStageBytes >= kQuantMaxUnits * kQuantUnitBytes + 4);
// Before the stages: a malformed chunk is read from up to 17 rows before its begin.
inline constexpr int kQuantGuardBytes = 17 * kQuantRowBytes;
inline constexpr int kQuantSumsBytes = kQuantStripM * kQuantTokens * 4;  // of a warp
inline constexpr int kQuantSumsStages = 2;

// A CTA's shared memory, from a 128-byte boundary on: the guard, the stages of each warp, the sums
// of each warp, barriers.
constexpr int quant_smem_bytes(int warps, int stages) {
  const int barriers = 8 * (warps * stages + 2 * kQuantSumsStages);
  return 128 + kQuantGuardBytes + warps * stages * kQuantStageBytes +
         kQuantSumsStages * warps * kQuantSumsBytes + barriers;
}

// Warps of a CTA that multiplies `columns` columns of chunks.
constexpr int quant_warps(int columns) {
  return (columns + kQuantWarpChunks - 1) / kQuantWarpChunks;
}

// The longest K of quantised X: sums of products of bytes of 255 and 127 fit 32 bits.
inline constexpr int64_t kQuantMaxInt8K = 65536;

constexpr int64_t quant_token_blocks(int64_t n) { return (n + kQuantTokens - 1) / kQuantTokens; }

// Partial sums in the workspace: all of Y in fp32, for each section of K.
constexpr int64_t quant_sums_bytes(int64_t m, int64_t n, int64_t sections) {
  return sections == 1 ? 0
                       : sections * quant_token_blocks(n) * num_quant_strips(m) * kQuantSumsBytes;
}

// The functions of this family's row in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_quantized_bitmap_configs();
bool takes_quantized_bitmap(const PlanRequest& request, std::string* reason);
Status plan_quantized_bitmap(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
