// The CPU's kernels. They require x_stride >= k. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "base/cpu_isa.h"
#include "base/parallel.h"
#include "base/status.h"
#include "plan/problem.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

// Runs the plan's kernel family. Refuses kDense and kRowBitmapBlocks: they need a dense GEMM, so
// the caller runs them.
Status run_spmm(const SpmmPlan& plan, const SpmmArgs& args, CpuIsa isa,
                const ParallelFor& parallel_for);

// Oracle for any format: unpacks a tile row at a time, accumulates in fp64, rounds once.
void spmm_cpu_reference(const SpmmArgs& args, const ParallelFor& parallel_for);

// Tiled-CSL only. Vectorised, multi-threaded over tile rows, fp32 accumulation. Tokens are
// processed in blocks of up to 8; each block decodes the weight once.
void spmm_cpu_tiled_csl(const SpmmArgs& args, const ParallelFor& parallel_for);

// Row bitmap only. Uses the kernels of `isa`, which this CPU must have. Multi-threaded over blocks
// of rows, fp32 accumulation; a block of tokens has as many as a kernel's registers hold.
void spmm_cpu_row_bitmap(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for);

// The same with X quantised to int8, token by token, so that sums of products are exact. int8
// values only, and k up to kCpuMaxInt8K. A token with an element that is not finite gives NaN.
void spmm_cpu_row_bitmap_int8x(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for);

// Row bitmap only. Decodes rows first_row ... last_row (multiples of 4; last_row may also be m)
// with the kernels of `isa` into dense[rows, k], contiguous.
void row_bitmap_decode(const PackedView& weight, int64_t first_row, int64_t last_row, CpuIsa isa,
                       const ParallelFor& parallel_for, uint16_t* dense);

}  // namespace flash_llm
