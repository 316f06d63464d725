// Magnitude pruning of a 16-bit matrix: the p smallest magnitudes of each group become +0.
//
// Magnitudes are compared as the low 15 bits of the raw pattern, whose order as integers is that of
// the magnitudes for fp16 and bf16 (finite < Inf < NaN). Of equal magnitudes the first in row-major
// order is pruned first. So CPU and CUDA agree bit for bit.
//
// Masks in Python (prune/criteria.py) follow the same rules for scores of any floating-point type.
// They do not replace this file: packing by a mask takes 4 to 14 times as long (the lab book in
// benchmarks/README.md).
#pragma once

#include <cstdint>
#include <string>

#include "base/host_device.h"
#include "base/parallel.h"
#include "base/status.h"
#include "format/element.h"

namespace flash_llm {

enum class PruneScope {
  kRow,    // the sparsity holds in every row
  kLayer,  // the sparsity holds over the matrix
  kGroup,  // the `keep` largest of every aligned group of `group` columns stay (N:M); a shorter
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

// Parses scope "row", "layer" or "N:M" (such as "2:4") with its sparsity. For N:M the sparsity is
// optional (has_sparsity = false) and must otherwise equal 1 - N/M.
Status parse_prune_target(const std::string& scope, bool has_sparsity, double sparsity,
                          PruneTarget* out);

inline constexpr int kNumMagnitudes = kMagnitudeMask + 1;

// Integers in [0, kNumMagnitudes) in the order of the absolute values.
FLASH_LLM_HOST_DEVICE constexpr uint16_t magnitude(uint16_t value) {
  return static_cast<uint16_t>(value & kMagnitudeMask);
}

// Prunes every magnitude below `threshold`, and the first `ties` elements (row-major) equal to it.
struct PruneCut {
  int threshold = 0;
  int64_t ties = 0;
};

// Whether element i of a group of `count` columns is among the `keep` largest.
FLASH_LLM_HOST_DEVICE constexpr bool kept_in_group(const uint16_t* group, int count, int keep,
                                                   int i) {
  int preferred = 0;  // larger elements, and later ones of the same magnitude
  for (int j = 0; j < count; ++j) {
    preferred += magnitude(group[j]) > magnitude(group[i]) ||
                 (magnitude(group[j]) == magnitude(group[i]) && j > i);
  }
  return preferred < keep;
}

// The cut that prunes `count` elements, given the number of elements of each of the kNumMagnitudes
// magnitudes.
PruneCut find_prune_cut(const int64_t* histogram, int64_t count);

// out[m, k] (contiguous) = dense[m, k] (row stride `ld`) with the pruned elements set to +0.
void prune_magnitude(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                     const PruneTarget& target, const ParallelFor& parallel_for, uint16_t* out);

}  // namespace flash_llm
