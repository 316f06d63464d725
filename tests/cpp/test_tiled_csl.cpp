// Tiled-CSL: positions, the stored order, golden bytes, and that validate refuses every broken
// invariant of this format. What holds for every format is in test_packed_format.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "format/packed_header.h"
#include "format/tiled_csl.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

uint32_t entry(int position, uint16_t value) {
  return static_cast<uint32_t>(position) << 16 | static_cast<uint32_t>(value);
}

Packed pack_tiled(const DenseMatrix& dense) { return pack_or_die(dense, Format::kTiledCsl); }

TEST(Position, IsABijectionThatInverts) {
  std::bitset<kTileElems> seen;
  for (int row = 0; row < kTileM; ++row) {
    for (int col = 0; col < kTileK; ++col) {
      const int position = position_of(row, col);
      ASSERT_GE(position, 0);
      ASSERT_LT(position, kTileElems);
      ASSERT_FALSE(seen.test(static_cast<size_t>(position))) << "row " << row << " column " << col;
      seen.set(static_cast<size_t>(position));
      ASSERT_EQ(row_of_position(position), row);
      ASSERT_EQ(col_of_position(position), col);
    }
  }
  EXPECT_TRUE(seen.all());
}

TEST(Position, LdmatrixReadsEightRowsWithoutBankConflicts) {
  // ldmatrix reads 16 bytes from each of eight rows. They must be the same eight columns in every
  // row, in the same order, and all 128 bytes must lie in different banks. Row 0 is not swizzled,
  // so it gives the columns.
  for (int row0 = 0; row0 < kTileM; row0 += 8) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      std::set<int> banks;
      for (int row = row0; row < row0 + 8; ++row) {
        const int first = position_of(row, col_of_position(8 * chunk));
        EXPECT_EQ(first % 8, 0) << "row " << row << ", chunk " << chunk;
        for (int i = 0; i < 8; ++i) {
          EXPECT_EQ(position_of(row, col_of_position(8 * chunk + i)), first + i);
          banks.insert(bank_of_position(first + i));
        }
      }
      EXPECT_EQ(banks.size(), 32U) << "rows from " << row0 << ", chunk " << chunk;
    }
  }
}

TEST(Position, AThreadOfTheQuadOwnsEightConsecutiveColumnsInEachHalf) {
  // In the fragments of two k-steps (four chunks), thread t holds values 2 t and 2 t + 1 of each
  // chunk: eight consecutive columns, so that it loads 16 contiguous bytes of X, and a quad 64.
  for (int half = 0; half < 2; ++half) {
    for (int thread = 0; thread < 4; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const int chunk = 4 * half + i / 2;
        EXPECT_EQ(col_of_position(8 * chunk + 2 * thread + i % 2), 32 * half + 8 * thread + i);
      }
    }
  }
}

TEST(StorageIndex, IsAPermutationForEveryLength) {
  for (int num_entries = 0; num_entries <= kTileElems; num_entries += kVectorEntries) {
    std::vector<bool> used(static_cast<size_t>(num_entries));
    for (int pos = 0; pos < num_entries; ++pos) {
      const int index = storage_index(pos, num_entries);
      ASSERT_GE(index, 0);
      ASSERT_LT(index, num_entries);
      ASSERT_FALSE(used[static_cast<size_t>(index)]) << pos << " of " << num_entries;
      used[static_cast<size_t>(index)] = true;
    }
  }
}

TEST(StorageIndex, ConsecutivePositionsAreStoredByOneInstruction) {
  // In a full block lane l holds entries 4 l to 4 l + 3. Store e takes entry e of every lane.
  for (int pos = 0; pos < 2 * kWarpEntries; ++pos) {
    const int index = storage_index(pos, 2 * kWarpEntries) % kWarpEntries;
    EXPECT_EQ(index / kVectorEntries, pos % 32) << "lane of position " << pos;
    EXPECT_EQ(index % kVectorEntries, pos / 32 % kVectorEntries) << "store of position " << pos;
  }
}

// The number of shared-memory wavefronts that a warp needs to store a tile's entries: for each of
// the four stores of a block of 32 vectors, the number of different words in the bank that it hits
// most.
int wavefronts(const std::vector<uint32_t>& entries) {
  int total = 0;
  for (size_t block = 0; block < entries.size(); block += kWarpEntries) {
    for (size_t store = 0; store < kVectorEntries; ++store) {
      std::array<std::set<int>, kNumBanks> words;
      size_t most = 0;
      for (size_t i = block + store; i < std::min(block + kWarpEntries, entries.size());
           i += kVectorEntries) {
        const auto position = static_cast<int>(entries[i] >> 16);
        auto& bank = words[static_cast<size_t>(bank_of_position(position))];
        bank.insert(position / 2);
        most = std::max(most, bank.size());
      }
      total += static_cast<int>(most);
    }
  }
  return total;
}

TEST(StoreRoom, CountsThePositionsThatOneStoreTakes) {
  for (const int num_entries : {4, 8, 52, 124, 128, 132, 1640, kTileElems}) {
    for (int pos = 0; pos < num_entries; ++pos) {
      const auto store_of = [&](int p) {
        const int index = storage_index(p, num_entries);
        return index / kWarpEntries * kVectorEntries + index % kVectorEntries;
      };
      int room = 1;
      while (pos + room < num_entries && store_of(pos + room) == store_of(pos)) ++room;
      ASSERT_EQ(store_room(pos, num_entries), room) << pos << " of " << num_entries;
    }
  }
}

TEST(PackTiledCsl, FullTileStoresWithoutBankConflicts) {
  const Packed packed = pack_tiled(random_patterns(kTileM, kTileK, 0.0, 1));
  ASSERT_EQ(packed.payload.size(), static_cast<size_t>(kTileElems));
  EXPECT_EQ(wavefronts(packed.payload), kTileElems / 32);
}

TEST(PackTiledCsl, StoresTakeAsFewWavefrontsAsTheFullestBankAllows) {
  // The order exists to need few wavefronts. Any order needs at least one for each store, and one
  // for each word of a bank; padding may add a few. Entries in row-major order need 1.5 times as
  // many.
  for (const double zeros : {0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98}) {
    for (uint32_t seed = 0; seed < 5; ++seed) {
      std::mt19937 rng(seed);
      std::uniform_real_distribution<double> uniform(0.0, 1.0);
      DenseMatrix dense = testing::zeros(kTileM, kTileK);
      std::array<int, kNumBanks> words{};
      for (int position = 0; position < kTileElems; position += 2) {
        bool any = false;
        for (int i = position; i < position + 2; ++i) {
          if (uniform(rng) < zeros) continue;
          dense.at(row_of_position(i), col_of_position(i)) = kHalfOne;
          any = true;
        }
        words[static_cast<size_t>(bank_of_position(position))] += any;
      }
      const Packed packed = pack_tiled(dense);
      const auto vectors = static_cast<int>(packed.payload.size()) / kVectorEntries;
      const int stores = (vectors + 31) / 32 * kVectorEntries;
      const int least = std::max(stores, *std::max_element(words.begin(), words.end()));
      const int taken = wavefronts(packed.payload);
      EXPECT_GE(taken, least);
      EXPECT_LE(taken, least + kVectorEntries - 1) << zeros << " zeros, seed " << seed;

      std::vector<uint32_t> row_major;
      for (int row = 0; row < kTileM; ++row) {
        for (int col = 0; col < kTileK; ++col) {
          if (dense.at(row, col) != 0) row_major.push_back(entry(position_of(row, col), kHalfOne));
        }
      }
      EXPECT_GT(wavefronts(row_major), 1.5 * taken) << zeros << " zeros, seed " << seed;
    }
  }
}

TEST(PackTiledCsl, GoldenBytes) {
  // 3 x 70: two tiles side by side, the second six columns wide. Computed by hand from
  // tiled_csl.h: with c = 32 u + 8 t + 2 v + h, position = 64 r + 8 ((4 u + v) ^ r) + 2 t + h.
  DenseMatrix dense = zeros(3, 70);
  dense.at(0, 0) = 0x3C00;   //  1.0 at position 0, bank 0
  dense.at(0, 1) = 0xBC00;   // -1.0 at position 1, bank 0
  dense.at(1, 17) = 0x0001;  // smallest subnormal at position 64 + 8 (0 ^ 1) + 4 + 1 = 77, bank 6
  dense.at(2, 63) = 0x7C00;  // Inf at position 128 + 8 (7 ^ 2) + 6 + 1 = 175, bank 23
  dense.at(2, 5) = 0x7E01;   // NaN with a payload at position 128 + 8 (2 ^ 2) + 1 = 129, bank 0
  dense.at(0, 40) = 0x8000;  // -0 is dropped
  dense.at(1, 69) = 0x4000;  //  2.0 in tile 1, column 5: position 64 + 8 (2 ^ 1) + 1 = 89
  const Packed packed = pack_tiled(dense);

  EXPECT_EQ(packed.header.nnz, 6);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 2, 3}));
  // Tile 0 has five entries in two vectors, so each store takes two. Bank 0 has the longest queue:
  // both entries of its first word, at positions 0 and 1, fill the first store. Then come 129, of
  // the lowest bank, and 77; then 175 and padding at the lowest free positions 2, 3 and 4. There
  // are two lanes, so the entries of this order alternate between the two vectors.
  const std::vector<uint32_t> expected = {
      entry(0, 0x3C00),  entry(129, 0x7E01), entry(175, 0x7C00), entry(3, 0),
      entry(1, 0xBC00),  entry(77, 0x0001),  entry(2, 0),        entry(4, 0),
      entry(89, 0x4000), entry(0, 0),        entry(1, 0),        entry(2, 0),
  };
  EXPECT_EQ(packed.payload, expected);
  const std::array<int64_t, kPackedHeaderInts> header = {kPackedMagic, 1, 1, 1, 3, 70, 6, 12};
  EXPECT_EQ(packed.header.to_ints(), header);
}

TEST(PackTiledCsl, EmptyFullAndSingleTilesInOneWeight) {
  // Four tiles: an empty one, a full one, one with only its last element, and one that lacks one.
  DenseMatrix dense = zeros(kTileM, 4 * kTileK);
  for (int row = 0; row < kTileM; ++row) {
    for (int col = 0; col < kTileK; ++col) {
      dense.at(row, kTileK + col) = static_cast<uint16_t>(1 + row * kTileK + col);
      dense.at(row, 3 * kTileK + col) = static_cast<uint16_t>(1 + row * kTileK + col);
    }
  }
  dense.at(kTileM - 1, 3 * kTileK - 1) = 0xFFFF;
  dense.at(64, 3 * kTileK + 32) = 0;
  const Packed packed = pack_tiled(dense);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 0, 2048, 2049, 4097}));
  EXPECT_EQ(packed.header.nnz, 8192 + 1 + 8191);
  const Status status = check(packed);
  EXPECT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(unpack(packed, serial_for), dense.values);
}

// Each test breaks one invariant of a weight that is valid otherwise.
class MalformedTiledCsl : public ::testing::Test {
 protected:
  Packed good_ = pack_tiled(random_patterns(200, 150, 0.7, 3));

  void SetUp() override {
    const Status status = check(good_);
    ASSERT_TRUE(status.ok()) << status.message;
  }

  // Index of the first entry of the tile that is (not) padding.
  size_t find_entry(int64_t tile, bool padding) const {
    const auto [first, last] = tile_entry_range(good_.view(), tile);
    for (int64_t i = first; i < last; ++i) {
      if (((good_.payload[static_cast<size_t>(i)] & 0xFFFF) == 0) == padding) {
        return static_cast<size_t>(i);
      }
    }
    ADD_FAILURE() << "tile " << tile << " has no such entry";
    return 0;
  }

  static void expect_refused(const Packed& packed, std::initializer_list<std::string> parts) {
    const Status status = check(packed);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue) << status.message;
    EXPECT_TRUE(mentions(status.message, parts)) << status.message;
  }
};

TEST_F(MalformedTiledCsl, OffsetPastTheEnd) {
  good_.offsets.back() += 1;
  expect_refused(good_, {"offsets "});
}

TEST_F(MalformedTiledCsl, OffsetShortOfTheEnd) {
  good_.offsets.back() -= 1;
  expect_refused(good_, {"offsets "});
}

TEST_F(MalformedTiledCsl, HugeOffset) {
  good_.offsets.back() = INT32_MAX;
  expect_refused(good_, {"tile ", "2048"});
}

TEST_F(MalformedTiledCsl, TileWithMoreVectorsThanElements) {
  Packed packed = pack_tiled(random_patterns(2 * kTileM, kTileK, 0.0, 4));
  packed.offsets[1] += 1;
  expect_refused(packed, {"tile 0 ", "2049"});
}

TEST_F(MalformedTiledCsl, PositionOutsideTheTile) {
  const size_t i = find_entry(0, false);
  good_.payload[i] = entry(kTileElems, kHalfOne);
  expect_refused(good_, {"tile 0: ", "8192", "8192"});
}

TEST_F(MalformedTiledCsl, PaddingPositionOutsideTheTile) {
  const size_t i = find_entry(1, true);
  good_.payload[i] = entry(0xFFFF, 0);
  expect_refused(good_, {"tile 1: ", "8192", "65535"});
}

TEST_F(MalformedTiledCsl, RowOutsideTheMatrix) {
  // 200 rows: the lower tiles have 72.
  const size_t i = find_entry(3, false);
  good_.payload[i] = entry(position_of(72, 0), kHalfOne);
  expect_refused(good_, {"tile 3: ", "row 72, column 0"});
}

TEST_F(MalformedTiledCsl, ColumnOutsideTheMatrix) {
  // 150 columns: the last tile has 22.
  const size_t i = find_entry(2, false);
  good_.payload[i] = entry(position_of(5, 22), kHalfOne);
  expect_refused(good_, {"tile 2: ", "row 5, column 22"});
}

TEST_F(MalformedTiledCsl, DuplicatePosition) {
  const auto [first, last] = tile_entry_range(good_.view(), 4);
  const auto i = static_cast<size_t>(first), j = static_cast<size_t>(last - 5);
  good_.payload[j] = (good_.payload[i] & 0xFFFF0000U) | kHalfOne;
  expect_refused(good_, {"tile 4: ", " " + std::to_string(good_.payload[i] >> 16) + " "});
}

TEST_F(MalformedTiledCsl, PaddingAtThePositionOfAValue) {
  const size_t value = find_entry(1, false), padding = find_entry(1, true);
  good_.payload[padding] = good_.payload[value] & 0xFFFF0000U;
  expect_refused(good_, {"tile 1: ", " " + std::to_string(good_.payload[value] >> 16) + " "});
}

TEST_F(MalformedTiledCsl, NegativeZero) {
  const size_t i = find_entry(0, false);
  good_.payload[i] = (good_.payload[i] & 0xFFFF0000U) | 0x8000U;
  expect_refused(good_, {"tile 0: ", "-0"});
}

TEST_F(MalformedTiledCsl, StoredZeros) {
  const auto [first, last] = tile_entry_range(good_.view(), 0);
  ASSERT_GE(last - first, 4);
  for (int64_t i = first; i < first + 4; ++i) good_.payload[static_cast<size_t>(i)] &= 0xFFFF0000U;
  good_.header.nnz -= 4;
  expect_refused(good_, {"tile 0: ", "3"});
}

TEST(ValidateTiledCsl, SmallestOffendingTileIsReportedWhateverTheThreads) {
  Packed packed = pack_tiled(random_patterns(kTileM, 64 * kTileK, 0.5, 5));
  for (const int tile : {60, 41, 22}) {
    packed
        .payload[static_cast<size_t>(packed.offsets[static_cast<size_t>(tile)]) * kVectorEntries] =
        entry(9000, kHalfOne);
  }
  const std::string expected = tiled_csl_validate(packed.view(), serial_for).message;
  EXPECT_TRUE(mentions(expected, {"tile 22: ", "9000"})) << expected;
  for (int repeat = 0; repeat < 20; ++repeat) {
    EXPECT_EQ(tiled_csl_validate(packed.view(), threaded_for).message, expected);
  }
}

}  // namespace
}  // namespace flash_llm::testing
