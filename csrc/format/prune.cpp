#include "format/prune.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace flash_llm {
namespace {

void apply_cut(const uint16_t* in, int64_t count, PruneCut cut, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int level = magnitude(in[i]);
    const bool pruned = level < cut.threshold || (level == cut.threshold && cut.ties-- > 0);
    out[i] = pruned ? uint16_t{0} : in[i];
  }
}

PruneCut row_cut(const uint16_t* row, int64_t k, int64_t count, std::vector<uint16_t>& scratch) {
  if (count == 0) return {0, 0};
  std::transform(row, row + k, scratch.begin(), magnitude);
  const auto nth = scratch.begin() + (count - 1);
  std::nth_element(scratch.begin(), nth, scratch.begin() + k);
  const int threshold = *nth;
  const int64_t below =
      std::count_if(row, row + k, [&](uint16_t value) { return magnitude(value) < threshold; });
  return {threshold, count - below};
}

void prune_group(const uint16_t* in, int count, int keep, uint16_t* out) {
  for (int i = 0; i < count; ++i) {
    out[i] = kept_in_group(in, count, keep, i) ? in[i] : uint16_t{0};
  }
}

void prune_layer(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, double sparsity,
                 const ParallelFor& parallel_for, uint16_t* out) {
  std::vector<int64_t> histogram(kNumMagnitudes);
  std::mutex mutex;
  parallel_for(m, 64, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> part(kNumMagnitudes);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < k; ++col) ++part[magnitude(dense[row * ld + col])];
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t level = 0; level < part.size(); ++level) histogram[level] += part[level];
  });
  const PruneCut cut = find_prune_cut(histogram.data(), num_pruned(sparsity, m * k));

  // Ties are pruned in row-major order: each row prunes ties until cut.ties are used up.
  std::vector<int64_t> ties(static_cast<size_t>(m));
  parallel_for(m, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      ties[static_cast<size_t>(row)] =
          std::count_if(dense + row * ld, dense + row * ld + k,
                        [&](uint16_t value) { return magnitude(value) == cut.threshold; });
    }
  });
  int64_t left = cut.ties;
  for (int64_t& row_ties : ties) {
    row_ties = std::min(left, row_ties);
    left -= row_ties;
  }
  parallel_for(m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      apply_cut(dense + row * ld, k, {cut.threshold, ties[static_cast<size_t>(row)]},
                out + row * k);
    }
  });
}

// The shortest text that reads back as the same number.
std::string to_text(double value) {
  char text[32];
  for (int digits = 6; digits <= 17; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}

// Reads "N:M", one or two digits each, without signs or spaces.
bool parse_group(const std::string& text, int* keep, int* group) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos) return false;
  const auto parse = [](const std::string& digits, int* out) {
    if (digits.empty() || digits.size() > 2) return false;
    *out = 0;
    for (const char digit : digits) {
      if (digit < '0' || digit > '9') return false;
      *out = *out * 10 + (digit - '0');
    }
    return true;
  };
  return parse(text.substr(0, colon), keep) && parse(text.substr(colon + 1), group) && *keep >= 1 &&
         *group >= *keep && *group <= kMaxPruneGroup;
}

}  // namespace

int64_t num_pruned(double sparsity, int64_t count) {
  const auto pruned = static_cast<int64_t>(std::floor(sparsity * static_cast<double>(count) + 0.5));
  return std::clamp<int64_t>(pruned, 0, count);
}

PruneCut find_prune_cut(const int64_t* histogram, int64_t count) {
  int64_t left = count;
  for (int level = 0; level < kNumMagnitudes; ++level) {
    if (histogram[level] >= left) return {level, left};
    left -= histogram[level];
  }
  return {kNumMagnitudes, 0};
}

Status parse_prune_target(const std::string& scope, bool has_sparsity, double sparsity,
                          PruneTarget* out) {
  if (has_sparsity && !(sparsity >= 0.0 && sparsity <= 1.0)) {  // false for NaN too
    return Status::invalid_value("sparsity must lie in [0, 1], got " + to_text(sparsity));
  }
  if (scope == "row" || scope == "layer") {
    if (!has_sparsity) {
      return Status::invalid_value("sparsity must be given for scope \"" + scope + "\"");
    }
    *out = {scope == "row" ? PruneScope::kRow : PruneScope::kLayer, sparsity, 0, 0};
    return Status::success();
  }
  int keep = 0, group = 0;
  if (!parse_group(scope, &keep, &group)) {
    return Status::invalid_value(
        "scope must be \"row\", \"layer\" or \"N:M\" with 1 <= N <= M <= " +
        std::to_string(kMaxPruneGroup) + ", got \"" + scope + "\"");
  }
  const double implied = 1.0 - static_cast<double>(keep) / group;
  if (has_sparsity && std::abs(sparsity - implied) > 1e-9) {
    return Status::invalid_value("sparsity must be " + to_text(implied) + " for scope \"" + scope +
                                 "\" (or left out), got " + to_text(sparsity));
  }
  *out = {PruneScope::kGroup, implied, keep, group};
  return Status::success();
}

void prune_magnitude(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                     const PruneTarget& target, const ParallelFor& parallel_for, uint16_t* out) {
  if (target.scope == PruneScope::kLayer) {
    prune_layer(dense, ld, m, k, target.sparsity, parallel_for, out);
    return;
  }
  parallel_for(m, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> scratch(static_cast<size_t>(k));
    for (int64_t row = begin; row < end; ++row) {
      const uint16_t* in = dense + row * ld;
      if (target.scope == PruneScope::kRow) {
        const PruneCut cut = row_cut(in, k, num_pruned(target.sparsity, k), scratch);
        apply_cut(in, k, cut, out + row * k);
      } else {
        for (int64_t col = 0; col < k; col += target.group) {
          prune_group(in + col, static_cast<int>(std::min<int64_t>(target.group, k - col)),
                      target.keep, out + row * k + col);
        }
      }
    }
  });
}

}  // namespace flash_llm
