// Magnitude pruning against an oracle that sorts: slow, but simple.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "format/prune.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

// Zeroes the `count` smallest of `group` (indices into values): by magnitude, then by position.
void prune_smallest(std::vector<size_t> group, int64_t count, std::vector<uint16_t>& values) {
  std::stable_sort(group.begin(), group.end(),
                   [&](size_t a, size_t b) { return (values[a] & 0x7FFF) < (values[b] & 0x7FFF); });
  for (int64_t i = 0; i < count; ++i) values[group[static_cast<size_t>(i)]] = 0;
}

std::vector<size_t> index_range(int64_t first, int64_t count) {
  std::vector<size_t> indices(static_cast<size_t>(count));
  std::iota(indices.begin(), indices.end(), static_cast<size_t>(first));
  return indices;
}

std::vector<uint16_t> oracle(const DenseMatrix& dense, const PruneTarget& target) {
  std::vector<uint16_t> out;
  for (int64_t row = 0; row < dense.m; ++row) {
    for (int64_t col = 0; col < dense.k; ++col) out.push_back(dense.at(row, col));
  }
  switch (target.scope) {
    case PruneScope::kLayer: {
      const int64_t count = dense.m * dense.k;
      prune_smallest(index_range(0, count), num_pruned(target.sparsity, count), out);
      break;
    }
    case PruneScope::kRow:
      for (int64_t row = 0; row < dense.m; ++row) {
        prune_smallest(index_range(row * dense.k, dense.k), num_pruned(target.sparsity, dense.k),
                       out);
      }
      break;
    case PruneScope::kGroup:
      for (int64_t row = 0; row < dense.m; ++row) {
        for (int64_t col = 0; col < dense.k; col += target.group) {
          const int64_t count = std::min<int64_t>(target.group, dense.k - col);
          prune_smallest(index_range(row * dense.k + col, count),
                         count - std::min<int64_t>(target.keep, count), out);
        }
      }
      break;
  }
  return out;
}

std::vector<uint16_t> prune(const DenseMatrix& dense, const PruneTarget& target,
                            const ParallelFor& parallel_for) {
  std::vector<uint16_t> out(static_cast<size_t>(dense.m * dense.k), 0xDEAD);
  prune_magnitude(dense.values.data(), dense.ld, dense.m, dense.k, target, parallel_for,
                  out.data());
  return out;
}

// Few distinct magnitudes of both signs, so that nearly every cut has ties.
DenseMatrix tied_patterns(int64_t m, int64_t k, uint32_t seed) {
  DenseMatrix dense = random_patterns(m, k, 0.2, seed, 2);
  for (auto& value : dense.values) value &= 0x8003;
  return dense;
}

TEST(PruneMagnitude, AgreesWithTheOracle) {
  std::vector<PruneTarget> targets;
  for (const double sparsity : {0.0, 0.01, 0.3, 0.5, 0.66, 0.999, 1.0}) {
    targets.push_back({PruneScope::kRow, sparsity, 0, 0});
    targets.push_back({PruneScope::kLayer, sparsity, 0, 0});
  }
  for (const auto& [keep, group] : std::vector<std::pair<int, int>>{
           {2, 4}, {1, 4}, {4, 8}, {1, 1}, {1, 64}, {64, 64}, {3, 5}}) {
    targets.push_back({PruneScope::kGroup, 0.0, keep, group});
  }
  const std::vector<DenseMatrix> matrices = {random_patterns(0, 0, 0.0, 1),
                                             random_patterns(0, 7, 0.0, 1),
                                             random_patterns(7, 0, 0.0, 1),
                                             random_patterns(1, 1, 0.0, 1),
                                             random_patterns(17, 130, 0.1, 2, 5),
                                             random_patterns(40, 33, 0.6, 3),
                                             tied_patterns(13, 70, 4),
                                             tied_patterns(9, 4, 5)};
  for (const DenseMatrix& dense : matrices) {
    for (const PruneTarget& target : targets) {
      const auto expected = oracle(dense, target);
      const std::string what = std::to_string(dense.m) + "x" + std::to_string(dense.k) + " scope " +
                               std::to_string(static_cast<int>(target.scope)) + " sparsity " +
                               std::to_string(target.sparsity) + " keep " +
                               std::to_string(target.keep) + ":" + std::to_string(target.group);
      EXPECT_EQ(prune(dense, target, serial_for), expected) << what;
      EXPECT_EQ(prune(dense, target, threaded_for), expected) << what << ", threaded";
    }
  }
}

TEST(PruneMagnitude, OfEqualMagnitudesTheFirstGoes) {
  const DenseMatrix dense{1, 5, 5, {0x3C00, 0xBC00, 0x3C00, 0x4000, 0xBC00}};
  const std::vector<uint16_t> expected = {0, 0, 0x3C00, 0x4000, 0xBC00};
  EXPECT_EQ(prune(dense, {PruneScope::kRow, 0.4, 0, 0}, serial_for), expected);
  EXPECT_EQ(prune(dense, {PruneScope::kLayer, 0.4, 0, 0}, serial_for), expected);
  EXPECT_EQ(prune(dense, {PruneScope::kGroup, 0.0, 3, 5}, serial_for), expected);
}

TEST(PruneMagnitude, LayerTiesGoInRowMajorOrderAcrossRows) {
  const DenseMatrix dense{3, 2, 2, std::vector<uint16_t>(6, kHalfOne)};
  const std::vector<uint16_t> expected = {0, 0, 0, kHalfOne, kHalfOne, kHalfOne};
  EXPECT_EQ(prune(dense, {PruneScope::kLayer, 0.5, 0, 0}, serial_for), expected);
  EXPECT_EQ(prune(dense, {PruneScope::kLayer, 0.5, 0, 0}, threaded_for), expected);
}

TEST(PruneMagnitude, NanIsLargestThenInfinity) {
  // max finite, Inf, NaN, -NaN with another payload
  const DenseMatrix dense{1, 4, 4, {0xFE01, 0x7C00, 0x7BFF, 0x7E00}};
  const std::vector<std::vector<uint16_t>> expected = {
      {0xFE01, 0x7C00, 0, 0x7E00}, {0xFE01, 0, 0, 0x7E00}, {0xFE01, 0, 0, 0}};
  for (size_t i = 0; i < expected.size(); ++i) {
    const double sparsity = 0.25 * static_cast<double>(i + 1);
    EXPECT_EQ(prune(dense, {PruneScope::kRow, sparsity, 0, 0}, serial_for), expected[i]);
    EXPECT_EQ(prune(dense, {PruneScope::kLayer, sparsity, 0, 0}, serial_for), expected[i]);
  }
}

TEST(PruneMagnitude, GroupsAreAlignedAndAShortLastGroupKeepsUpToN) {
  const DenseMatrix dense{1, 6, 6, {1, 2, 3, 4, 6, 5}};
  EXPECT_EQ(prune(dense, {PruneScope::kGroup, 0.0, 2, 4}, serial_for),
            (std::vector<uint16_t>{0, 0, 3, 4, 6, 5}));
  EXPECT_EQ(prune(dense, {PruneScope::kGroup, 0.0, 1, 4}, serial_for),
            (std::vector<uint16_t>{0, 0, 0, 4, 6, 0}));
}

TEST(NumPruned, RoundsHalfUpAndStaysInRange) {
  EXPECT_EQ(num_pruned(0.5, 3), 2);
  EXPECT_EQ(num_pruned(0.5, 5), 3);
  EXPECT_EQ(num_pruned(0.25, 5), 1);
  EXPECT_EQ(num_pruned(0.0, 5), 0);
  EXPECT_EQ(num_pruned(1.0, 5), 5);
  EXPECT_EQ(num_pruned(0.8, 0), 0);
  EXPECT_EQ(num_pruned(0.8, int64_t{28672} * 7168), 164416717);
  EXPECT_EQ(num_pruned(1.0, int64_t{1} << 40), int64_t{1} << 40);
}

TEST(FindPruneCut, SplitsTheLevelWhereTheCountIsReached) {
  std::vector<int64_t> histogram(kNumMagnitudes);
  histogram[3] = 4;
  histogram[kNumMagnitudes - 1] = 2;
  const auto cut = [&](int64_t count) {
    const PruneCut found = find_prune_cut(histogram.data(), count);
    return std::pair<int, int64_t>{found.threshold, found.ties};
  };
  EXPECT_EQ(cut(1), (std::pair<int, int64_t>{3, 1}));
  EXPECT_EQ(cut(4), (std::pair<int, int64_t>{3, 4}));
  EXPECT_EQ(cut(5), (std::pair<int, int64_t>{kNumMagnitudes - 1, 1}));
  EXPECT_EQ(cut(6), (std::pair<int, int64_t>{kNumMagnitudes - 1, 2}));
  EXPECT_EQ(cut(0).second, 0);
}

TEST(ParsePruneTarget, AcceptsEveryScope) {
  PruneTarget target;
  ASSERT_TRUE(parse_prune_target("row", true, 0.8, &target).ok());
  EXPECT_EQ(target.scope, PruneScope::kRow);
  EXPECT_EQ(target.sparsity, 0.8);
  ASSERT_TRUE(parse_prune_target("layer", true, 1.0, &target).ok());
  EXPECT_EQ(target.scope, PruneScope::kLayer);
  ASSERT_TRUE(parse_prune_target("2:4", false, 0.0, &target).ok());
  EXPECT_EQ(target.scope, PruneScope::kGroup);
  EXPECT_EQ(target.keep, 2);
  EXPECT_EQ(target.group, 4);
  EXPECT_EQ(target.sparsity, 0.5);
  EXPECT_TRUE(parse_prune_target("1:4", true, 0.75, &target).ok());
  EXPECT_TRUE(parse_prune_target("1:3", true, 1.0 - 1.0 / 3.0, &target).ok());
  EXPECT_TRUE(parse_prune_target("64:64", false, 0.0, &target).ok());
}

TEST(ParsePruneTarget, RefusesWhatItCannotMean) {
  PruneTarget target;
  for (const double sparsity :
       {-0.1, 1.0000001, std::numeric_limits<double>::quiet_NaN(),
        std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    for (const char* scope : {"row", "layer", "2:4"}) {
      const Status status = parse_prune_target(scope, true, sparsity, &target);
      EXPECT_EQ(status.code, StatusCode::kInvalidValue) << scope << " " << sparsity;
      EXPECT_TRUE(mentions(status.message, {"sparsity ", "[0, 1]"})) << status.message;
    }
  }
  EXPECT_TRUE(
      mentions(parse_prune_target("row", false, 0.0, &target).message, {"sparsity ", "row"}));
  EXPECT_TRUE(mentions(parse_prune_target("2:4", true, 0.6, &target).message,
                       {"sparsity ", "0.5", "2:4", "0.6"}));
  for (const char* scope : {"", "rows", "Row", ":", "2:", ":4", "5:4", "0:4", "2:65", "-1:4",
                            "+2:4", "2:4:8", " 2:4", "2 :4", "100:200", "2:4 ", "a:b"}) {
    const Status status = parse_prune_target(scope, false, 0.0, &target);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue) << "scope \"" << scope << "\"";
    EXPECT_TRUE(mentions(status.message, {"scope ", "\"" + std::string(scope) + "\""}))
        << status.message;
  }
}

}  // namespace
}  // namespace flash_llm::testing
