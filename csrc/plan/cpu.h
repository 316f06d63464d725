// The plans of the CPU's kernel families.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/spmm_plan.h"

namespace flash_llm {

// Rows that kRowBitmapBlocks decodes before each dense product, for a weight of k columns.
int64_t cpu_block_rows(int64_t k);

// The longest K of quantised X: sums of products of magnitudes up to 127 fit 32 bits.
inline constexpr int64_t kCpuMaxInt8K = INT32_MAX / (127 * 127);

// The functions of these families' rows in plan/kernel_family.cpp.
bool takes_tiled_csl_cpu(const PlanRequest& request, std::string* reason);
bool takes_row_bitmap_int8x(const PlanRequest& request, std::string* reason);
Status plan_row_bitmap_int8x(const PlanRequest& request, SpmmPlan* out);
bool takes_row_bitmap_cpu(const PlanRequest& request, std::string* reason);
bool takes_row_bitmap_blocks(const PlanRequest& request, std::string* reason);

}  // namespace flash_llm
