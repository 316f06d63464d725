// The plan of the quantised bitmap kernel (cuda/quantized_bitmap/rows_sm90.cu).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/quantized_bitmap.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The kernel's configurations, most of which have one CTA per SM:
//   name; tokens per CTA; columns of chunks per warp, X of which stays in its registers; whether X
//   is quantised to int8 with a scale for each token, which only config="auto_int8x" chooses
// clang-format off
#define FLASH_LLM_QUANTIZED_CONFIGS(row) \
  row(quantized8, 8, 2, false)           \
  row(quantized16, 16, 1, false)         \
  row(quantized8_int8x, 8, 2, true)      \
  row(quantized16_int8x, 16, 2, true)    \
  row(quantized32_int8x, 32, 1, true)
// clang-format on

// With 32 tokens there is no room for more.
constexpr int quant_sums_stages(int tile_n) { return tile_n <= 16 ? 4 : 2; }

struct QuantizedBitmapConfig {
  const char* name;
  int tile_n;
  int warp_chunks;
  bool int8_x;

  // Strips whose sums are in shared memory at a time.
  constexpr int sums_stages() const { return quant_sums_stages(tile_n); }
  // CTAs that share the tokens.
  constexpr int64_t passes(int64_t n) const { return (n + tile_n - 1) / tile_n; }
  // Bytes of a strip's sums.
  constexpr int sums_bytes() const { return kQuantStripM * tile_n * 4; }
};

const std::vector<QuantizedBitmapConfig>& quantized_bitmap_configs();

inline constexpr int kQuantMaxTokens = 32;  // of a CTA
// With all 16 warps the schedulers of an SM have the same work.
inline constexpr int kQuantMaxWarps = 16;
inline constexpr int kQuantMinStages = 2, kQuantMaxStages = 4;

// A stage holds the largest chunk and, in its last word, the chunk's rows of values.
inline constexpr int kQuantStageBytes = 37 * 128;
static_assert(kQuantStageBytes >= kQuantMaxUnits * kQuantUnitBytes + 4);
// Before the stages: a malformed chunk is read from up to 17 rows before its begin. Besides, there
// is a word for each token and warp there, and two for each token.
inline constexpr int kQuantGuardBytes = 18 * kQuantRowBytes;
static_assert(kQuantGuardBytes >= (kQuantMaxWarps + 2) * kQuantMaxTokens * 4);

// A CTA's shared memory, from a 128-byte boundary on: the guard, the stages of each warp, the sums
// of each warp, barriers.
constexpr int quant_smem_bytes(const QuantizedBitmapConfig& config, int warps, int stages) {
  const int barriers = 8 * (warps * stages + 2 * config.sums_stages());
  return 128 + kQuantGuardBytes + warps * stages * kQuantStageBytes +
         config.sums_stages() * warps * config.sums_bytes() + barriers;
}

// The longest K of quantised X: sums of products of bytes of 255 and 127 fit 32 bits.
inline constexpr int64_t kQuantMaxInt8K = 65536;

// Partial sums in the workspace: all of Y in fp32, for each section of K.
constexpr int64_t quant_sums_bytes(const QuantizedBitmapConfig& config, int64_t m, int64_t n,
                                   int64_t sections) {
  return sections == 1 ? 0
                       : sections * config.passes(n) * num_quant_strips(m) * config.sums_bytes();
}

// The functions of this family's row in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_quantized_bitmap_configs();
bool takes_quantized_bitmap(const PlanRequest& request, std::string* reason);
Status plan_quantized_bitmap(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
