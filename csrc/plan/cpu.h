// The plans of the CPU's kernel families.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/spmm_plan.h"

namespace flash_llm {

// Rows that kRowBitmapBlocks decodes before each dense product, for a weight of k columns.
int64_t cpu_block_rows(int64_t k);

// The functions of these families' rows in plan/kernel_family.cpp.
bool takes_tiled_csl_cpu(const PlanRequest& request, std::string* reason);
bool takes_row_bitmap_cpu(const PlanRequest& request, std::string* reason);
bool takes_row_bitmap_blocks(const PlanRequest& request, std::string* reason);

}  // namespace flash_llm
