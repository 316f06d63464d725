// The plan of the quantised bitmap kernel for Hopper
// (cuda/quantized_bitmap/quantized_bitmap_sm90a.cu).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/host_device.h"
#include "format/quantized_bitmap.h"
#include "plan/quantized_bitmap.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// The kernel's configurations, which have one CTA per SM:
//   name; tokens per CTA; warpgroups of a CTA; what X is multiplied as: config="auto" chooses
//   rounded X only if SpmmProblem::rounds_x allows it; stages of X
// clang-format off
#define FLASH_LLM_QUANT_WGMMA_CONFIGS(row)                 \
  row(quantized16_wgmma, 16, 4, XValues::kUnrounded, 4)    \
  row(quantized32_wgmma, 32, 4, XValues::kUnrounded, 4)    \
  row(quantized64_wgmma, 64, 3, XValues::kUnrounded, 3)    \
  row(quantized128_wgmma, 128, 3, XValues::kUnrounded, 2)  \
  row(quantized16_wgmma_int8x, 16, 4, XValues::kInt8, 8)   \
  row(quantized32_wgmma_int8x, 32, 4, XValues::kInt8, 6)   \
  row(quantized64_wgmma_int8x, 64, 4, XValues::kInt8, 4)   \
  row(quantized128_wgmma_int8x, 128, 4, XValues::kInt8, 3) \
  row(quantized16_wgmma_fp8x, 16, 4, XValues::kFp8E4m3, 8) \
  row(quantized32_wgmma_fp8x, 32, 4, XValues::kFp8E4m3, 6) \
  row(quantized64_wgmma_fp8x, 64, 4, XValues::kFp8E4m3, 4) \
  row(quantized128_wgmma_fp8x, 128, 4, XValues::kFp8E4m3, 3)
// clang-format on

// CTAs of the kernel that writes X, for each token: up to 64 tokens are written by 64 or more CTAs.
constexpr int quant_wgmma_token_parts(int tile_n) { return tile_n < 64 ? 64 / tile_n : 1; }

struct QuantWgmmaConfig {
  const char* name;
  int tile_n;
  int warpgroups;
  XValues x;
  int x_stages;

  // Whether it multiplies such values. X is rounded to the values' own type; products of int4
  // values would need a scale for each group of columns.
  constexpr bool multiplies(ValueType type) const {
    const ValueKind kind = value_traits(type).kind;
    return x == XValues::kUnrounded || (x == XValues::kInt8 && kind == ValueKind::kInt8) ||
           (x == XValues::kFp8E4m3 && kind == ValueKind::kFp8E4m3);
  }
  // Whether sums are integers, which are exact in any order.
  constexpr bool integer_sums() const { return x == XValues::kInt8; }
  constexpr int warps() const { return 4 * warpgroups; }
  // Output tiles of a pass.
  constexpr int64_t tiles(int64_t m) const { return (num_quant_strips(m) + warps() - 1) / warps(); }
  // CTAs that share the tokens.
  constexpr int64_t passes(int64_t n) const { return (n + tile_n - 1) / tile_n; }
  // X of a column of planes, in shared memory and in the workspace.
  constexpr int x_col_bytes() const {
    return kQuantPlaneK * tile_n * (x == XValues::kUnrounded ? 2 : 1);
  }
};

const std::vector<QuantWgmmaConfig>& quant_wgmma_configs();

// A CTA's shared memory, from a 1024-byte boundary on: a guard, which a malformed chunk may be read
// from and which holds the barriers and the bits of a chunk without values; the rings, one for each
// warp; and stages of X, from another 1024-byte boundary on.
inline constexpr int kQuantWgmmaFixedBytes = 3072;
FLASH_LLM_HOST_DEVICE constexpr int quant_wgmma_x_offset(int ring_bytes) {
  return (kQuantWgmmaFixedBytes + ring_bytes + 1023) / 1024 * 1024;
}
constexpr int quant_wgmma_smem_bytes(const QuantWgmmaConfig& config, int ring_bytes) {
  return 1024 + quant_wgmma_x_offset(ring_bytes) + config.x_stages * config.x_col_bytes();
}
// Left free so that CTAs of the kernel that writes X become resident beside one of this kernel.
inline constexpr int kQuantWgmmaSpareSmemBytes = 3 * 1024;
// A ring holds at least one of the largest chunks.
constexpr int quant_wgmma_min_ring_bytes(const QuantWgmmaConfig& config, ValueType type) {
  return config.warps() * quant_max_chunk_bytes(type);
}

// CTAs in a cluster: if each CTA has one part of an output tile, and two or four have the whole
// tile, these bring their sums together in shared memory.
constexpr int quant_wgmma_cluster(const WorkGrid& work) {
  const bool suits = work.cols == 2 || work.cols == 4;
  return suits && work.workers == work.units() ? static_cast<int>(work.cols) : 1;
}

// The workspace: counts, sums, X, the scale of each token, and for each part of a token's columns
// what the 128 in the weight's bytes adds to its sums. Counts are uint32 [passes][strips]. Sums are
// int32 or fp32 [passes][slots] output tiles, of those that CTAs share, but not in a cluster: a CTA
// has a slot for the tile that begins in its work range and ends after it, to which the others add
// integers. In fp32 each has another one for its own sums of the tile that began before its range.
struct QuantWgmmaWorkspace {
  int64_t slots;  // for each pass
  int64_t counts_bytes, sums_bytes, x_bytes, token_bytes, bias_bytes;

  QuantWgmmaWorkspace(const QuantWgmmaConfig& config, const SpmmPlan& plan);
  int64_t bytes() const { return counts_bytes + sums_bytes + x_bytes + token_bytes + bias_bytes; }
};

// The functions of this family's row in plan/kernel_family.cpp.
std::vector<KernelConfig> describe_quant_wgmma_configs();
bool takes_quant_wgmma(const PlanRequest& request, std::string* reason);
Status plan_quant_wgmma(const PlanRequest& request, SpmmPlan* out);

// Those of the row of the dense FP8 product.
bool takes_dense_fp8x(const PlanRequest& request, std::string* reason);
Status plan_dense_fp8x(const PlanRequest& request, SpmmPlan* out);

}  // namespace flash_llm
