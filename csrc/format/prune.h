// Magnitude pruning of a 16-bit matrix: the p smallest magnitudes of each group become +0.
//
// Magnitudes are compared as the low 15 bits of the raw pattern, which orders fp16 and bf16 alike
// (finite < Inf < NaN) and exactly. Of equal magnitudes the first in row-major order is pruned
// first. So CPU and CUDA agree bit for bit.
#pragma once

#include <cstdint>
#include <string>

#include "base/parallel.h"
#include "base/status.h"

namespace flash_llm {

enum class PruneScope {
  kRow,    // sparsity holds in every row
  kLayer,  // sparsity holds over the matrix
  kGroup,  // in every aligned group of `group` columns the `keep` largest stay (N:M); a shorter
           // last group of g columns keeps min(keep, g)
};

struct PruneTarget {
  PruneScope scope = PruneScope::kRow;
  double sparsity = 0.0;  // fraction of zeros, for kRow and kLayer
  int keep = 0;           // N of N:M
  int group = 0;          // M of N:M
};

inline constexpr int kMaxPruneGroup = 64;

// Elements to prune out of `count`: sparsity * count, rounded half up.
int64_t num_pruned(double sparsity, int64_t count);

// Parses scope "row", "layer" or "N:M" (such as "2:4") with its sparsity. For N:M the sparsity may
// be left out (has_sparsity = false) and otherwise must equal 1 - N/M.
Status parse_prune_target(const std::string& scope, bool has_sparsity, double sparsity,
                          PruneTarget* out);

inline constexpr int kNumMagnitudes = 0x8000;

// Prunes every magnitude below `threshold`, and the first `ties` elements (row-major) equal to it.
struct PruneCut {
  int threshold = 0;
  int64_t ties = 0;
};

// The cut that prunes `count` elements, given the number of elements of each of the kNumMagnitudes
// magnitudes.
PruneCut find_prune_cut(const int64_t* histogram, int64_t count);

// out[m, k] (contiguous) = dense[m, k] (row stride `ld`) with the pruned elements set to +0.
void prune_magnitude(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                     const PruneTarget& target, const ParallelFor& parallel_for, uint16_t* out);

}  // namespace flash_llm
