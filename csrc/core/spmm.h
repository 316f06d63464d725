// SpMM: Y[N, M] = act(X[N, K] . W[M, K]^T + bias), W packed. Plain structs that cross from the
// torch layer to the kernels, and the CPU kernels.
#pragma once

#include <cstdint>
#include <string>

#include "core/cpu_isa.h"
#include "core/packed_format.h"
#include "core/packed_header.h"
#include "core/parallel.h"
#include "core/status.h"

namespace flash_llm {

// Applied to the fp32 sum after the bias. kGelu is the exact (erf) form, as torch's default.
enum class Activation { kNone, kRelu, kGelu, kSilu };

Status parse_activation(const std::string& name, Activation* out);

struct SpmmProblem {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t nnz = 0;
  Format format = Format::kTiledCsl;
  ValueType value_type = ValueType::kFloat16;
};

struct SpmmArgs {
  const uint16_t* x = nullptr;  // [n, x_stride], row-major
  int64_t x_stride = 0;         // elements between rows of x; see each kernel for what it needs
  Format format = Format::kTiledCsl;
  PackedView weight;
  const uint16_t* bias = nullptr;  // [m] or null
  uint16_t* y = nullptr;           // [n, m], contiguous
  int64_t n = 0;
  ValueType value_type = ValueType::kFloat16;
  Activation activation = Activation::kNone;
};

// Oracle for any format: unpacks a tile row at a time, accumulates in fp64, rounds once.
// x_stride >= k.
void spmm_cpu_reference(const SpmmArgs& args, const ParallelFor& parallel_for);

// Tiled-CSL only. Vectorised and multi-threaded over tile rows, fp32 accumulation; N is walked in
// blocks of up to 8, decoding the weight once per block. x_stride >= k. Results do not depend on
// the thread count.
void spmm_cpu_tiles(const SpmmArgs& args, const ParallelFor& parallel_for);

// Row bitmap only. As above, with the kernels of `isa`, which this CPU must have: over row blocks,
// in blocks of as many tokens as a kernel's registers hold.
void spmm_cpu_rows(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for);

// Row bitmap only. Decodes rows first_row ... last_row (multiples of 4, the last may be m) with the
// kernels of `isa` into dense[rows, k], contiguous.
void row_bitmap_decode(const PackedView& weight, int64_t first_row, int64_t last_row, CpuIsa isa,
                       const ParallelFor& parallel_for, uint16_t* dense);

}  // namespace flash_llm
