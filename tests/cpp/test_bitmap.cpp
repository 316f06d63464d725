// Bitmap: the elements of a lane, golden bytes, the pairing of runs, an independent reader of the
// format, its size, and that validate rejects every invariant of its own that is broken. What holds
// for every format is in test_packed_format.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/bitmap.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

constexpr int kLanes = 32;

Packed pack_bitmap(const DenseMatrix& dense) { return pack_or_die(dense, Format::kBitmap); }

// A chunk's bytes by the offsets in bitmap.h, to read and to damage.
struct Chunk {
  uint8_t* bytes = nullptr;
  int rows = -1;  // of values; -1 where the chunk has no bytes

  Chunk(Packed& packed, int64_t idx) {
    const auto i = static_cast<size_t>(idx);
    const int units = packed.offsets[i + 1] - packed.offsets[i];
    bytes = reinterpret_cast<uint8_t*>(packed.payload.data()) + int64_t{packed.offsets[i]} * 64;
    if (units > 0) rows = (units - 9) / 2;
  }

  uint16_t value(int byte) const {
    uint16_t out;
    std::memcpy(&out, bytes + byte, sizeof(out));
    return out;
  }
  void set_value(int byte, uint16_t value) const {
    std::memcpy(bytes + byte, &value, sizeof(value));
  }
  uint32_t bits(int lane, int half, int strip) const {
    uint32_t out;
    std::memcpy(&out, word_at(lane, half, strip), sizeof(out));
    return out;
  }
  void set_bits(int lane, int half, int strip, uint32_t word) const {
    std::memcpy(word_at(lane, half, strip), &word, sizeof(word));
  }
  uint8_t& sigma(int lane, int strip) const { return bytes[rows * 128 + 512 + 2 * lane + strip]; }

  // One element, from the text of bitmap.h: find its bit, then its rank in the run.
  uint16_t element(int row, int col) const {
    if (rows < 0) return 0;
    const int strip = row / 16, half = col / 64, quad = col % 64 / 8;
    const int lane = row % 8 * 4 + col % 8 / 2, elem = row % 16 / 8 * 2 + col % 2;
    const uint32_t word = bits(lane, half, strip);
    int rank = 0;
    for (int q = 0; q < 8; ++q) {
      for (const int j : {0, 1, 3, 2}) {
        const bool stored = (word >> (8 * j + q) & 1U) != 0;
        if (q == quad && j == elem) {
          if (!stored) return 0;
          return value(half == 0 ? 128 * rank + 4 * lane + 2 * strip
                                 : 128 * (rows - 1 - rank) + sigma(lane, strip));
        }
        rank += stored;
      }
    }
    return 0;
  }

 private:
  uint8_t* word_at(int lane, int half, int strip) const {
    return bytes + rows * 128 + 16 * lane + 4 * (2 * half + strip);
  }
};

TEST(ChunkElements, AreTheAFragmentsOfMmaM16N8K16) {
  std::bitset<kChunkM * kChunkK> seen;
  for (int strip = 0; strip < 2; ++strip) {
    for (int fragment = 0; fragment < kChunkK / 16; ++fragment) {
      for (int lane = 0; lane < kLanes; ++lane) {
        // PTX ISA: lane 4 g + t holds, in registers a0..a3 of two halves each, rows g, g + 8, g,
        // g + 8 and columns 2 t.. and again 2 t + 8...
        const int g = lane / 4, t = lane % 4;
        const int rows[] = {g, g + 8, g, g + 8};
        const int cols[] = {2 * t, 2 * t, 2 * t + 8, 2 * t + 8};
        for (int reg = 0; reg < 4; ++reg) {
          for (int part = 0; part < 2; ++part) {
            const int half = fragment / 4, quad = fragment % 4 * 2 + reg / 2;
            const int elem = reg % 2 * 2 + part;
            const int row = chunk_row(strip, lane, elem), col = chunk_col(half, lane, quad, elem);
            ASSERT_EQ(row, 16 * strip + rows[reg]);
            ASSERT_EQ(col, 16 * fragment + cols[reg] + part);
            const auto place = static_cast<size_t>(row * kChunkK + col);
            ASSERT_FALSE(seen.test(place)) << "row " << row << " column " << col;
            seen.set(place);
          }
        }
      }
    }
  }
  EXPECT_TRUE(seen.all());
}

TEST(ChunkElements, AQuadIsOneBitOfEachByte) {
  std::bitset<32> seen;
  for (int quad = 0; quad < kQuads; ++quad) {
    uint32_t mask = 0;
    for (int elem = 0; elem < 4; ++elem) {
      mask |= 1U << chunk_bit(quad, elem);
      seen.set(static_cast<size_t>(chunk_bit(quad, elem)));
    }
    EXPECT_EQ(mask, 0x01010101U << quad);
  }
  EXPECT_TRUE(seen.all());
}

TEST(ChunkElements, TheSecondRegisterOfAQuadIsReadBackwards) {
  const int expected[] = {0, 1, 3, 2};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(quad_order(i), expected[i]);
}

TEST(ChunkSize, EveryNumberOfRowsAndNothingElse) {
  std::set<int> sizes;
  for (int rows = 0; rows <= 64; ++rows) {
    EXPECT_EQ(chunk_units(rows) * 64, rows * 128 + 512 + 64);
    EXPECT_EQ(chunk_value_rows(chunk_units(rows)), rows);
    sizes.insert(chunk_units(rows));
  }
  for (int units = -300; units < 300; ++units) {
    const bool known = sizes.count(units) != 0;
    EXPECT_EQ(chunk_value_rows(units) >= 0, known) << units;
  }
  EXPECT_EQ(chunk_value_rows(INT32_MAX), -1);
  EXPECT_EQ(chunk_value_rows(INT64_MAX), -1);
}

TEST(SwapPatterns, AreParities) {
  for (int pattern = 0; pattern < kSwapPatterns; ++pattern) {
    for (unsigned column = 0; column < kLanes; ++column) {
      const auto common = std::bitset<32>(column & static_cast<unsigned>(pattern));
      EXPECT_EQ(swaps_slots(pattern, static_cast<int>(column)), common.count() % 2 == 1);
    }
  }
}

// 17 x 70: one chunk, ragged on both sides. Worked out by hand from bitmap.h, as is what follows.
DenseMatrix golden_matrix() {
  DenseMatrix dense = zeros(17, 70);
  // Lane 0 of strip 0 and half 0, quad 0: stored in the order j = 0, 1, 3, 2.
  dense.at(0, 0) = 0x3C00;
  dense.at(0, 1) = 0xBC00;
  dense.at(8, 0) = 0x4200;
  dense.at(8, 1) = 0xC200;
  dense.at(1, 17) = 0x0001;   // smallest subnormal: g = 1, t = 0, quad 2, j = 1
  dense.at(2, 5) = 0x7E01;    // NaN with a payload: g = 2, t = 2, quad 0, j = 1
  dense.at(2, 63) = 0x7C00;   // Inf: g = 2, t = 3, quad 7, j = 1
  dense.at(0, 40) = 0x8000;   // -0 is dropped
  dense.at(0, 64) = 0x4400;   // half 1, lane 0, quad 0, j = 0
  dense.at(0, 65) = 0xC400;   // the same, j = 1
  dense.at(1, 69) = 0x4000;   // half 1, g = 1, t = 2, quad 0, j = 1
  dense.at(16, 66) = 0xFFFF;  // strip 1, half 1, g = 0, t = 1, quad 0, j = 0
  return dense;
}

TEST(PackBitmap, GoldenBytes) {
  const Packed packed = pack_bitmap(golden_matrix());
  const std::array<int64_t, kPackedHeaderInts> header = {kPackedMagic, 1, 2, 1, 17, 70, 11, 272};
  EXPECT_EQ(packed.header.to_ints(), header);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 17}));

  std::vector<uint8_t> expected(17 * 64, 0);
  const auto put16 = [&](size_t row, size_t column, size_t slot, uint16_t value) {
    expected[row * 128 + column * 4 + slot * 2] = static_cast<uint8_t>(value);
    expected[row * 128 + column * 4 + slot * 2 + 1] = static_cast<uint8_t>(value >> 8);
  };
  const auto put_bit = [&](size_t lane, size_t word, size_t bit) {
    uint8_t& byte = expected[512 + lane * 16 + word * 4 + bit / 8];
    byte = static_cast<uint8_t>(byte | 1U << bit % 8);
  };
  // Upward runs, each in its lane's column.
  put16(0, 0, 0, 0x3C00);
  put16(1, 0, 0, 0xBC00);
  put16(2, 0, 0, 0xC200);
  put16(3, 0, 0, 0x4200);
  put16(0, 4, 0, 0x0001);
  put16(0, 10, 0, 0x7E01);
  put16(0, 11, 0, 0x7C00);
  // Four rows hold the longest, so pattern 0 will do. Downward runs of strip 0, longest first:
  // lanes 0 (two values), 6 (one), then 31, 30 ... 1 without 6. They take the columns with the
  // shortest upward runs first: 1, 2, 3, 5 ... 31 (empty), then 4, 10, 11 and at last 0.
  put16(3, 1, 0, 0x4400);
  put16(2, 1, 0, 0xC400);
  put16(3, 2, 0, 0x4000);
  // Strip 1: lanes 1, 31, 30 ... 2, 0 take columns 0, 1 ... 31.
  put16(3, 0, 1, 0xFFFF);

  for (const size_t bit : {0U, 8U, 16U, 24U}) put_bit(0, 0, bit);
  put_bit(4, 0, 10);
  put_bit(10, 0, 8);
  put_bit(11, 0, 15);
  put_bit(0, 2, 0);
  put_bit(0, 2, 8);
  put_bit(6, 2, 8);
  put_bit(1, 3, 0);

  const std::array<uint8_t, 64> sigma = {
      4,   126, 0,   2,  44,  122, 40,  118, 16,  114, 124, 110, 8,  106, 120, 102,
      116, 98,  112, 94, 108, 90,  104, 86,  100, 82,  96,  78,  92, 74,  88,  70,
      84,  66,  80,  62, 76,  58,  72,  54,  68,  50,  64,  46,  60, 42,  56,  38,
      52,  34,  48,  30, 36,  26,  32,  22,  28,  18,  24,  14,  20, 10,  12,  6};
  std::copy(sigma.begin(), sigma.end(), expected.end() - 64);

  std::vector<uint8_t> bytes(packed.payload.size() * 4);
  std::memcpy(bytes.data(), packed.payload.data(), bytes.size());
  EXPECT_EQ(bytes, expected);
}

TEST(PackBitmap, AStripBorrowsTheOthersSlotsWhereThatSavesRows) {
  // Strip 1 is empty, in strip 0 every upward run is full and every second downward run is. In the
  // strip's own slots that takes 64 rows; with strip 1's slots in the odd columns (pattern 1) 32.
  DenseMatrix dense = zeros(32, 128);
  for (int64_t row = 0; row < 16; ++row) {
    for (int64_t col = 0; col < (row % 8 < 4 ? 128 : 64); ++col) dense.at(row, col) = kHalfOne;
  }
  Packed packed = pack_bitmap(dense);
  const Status status = check(packed);
  ASSERT_TRUE(status.ok()) << status.message;
  const Chunk chunk(packed, 0);
  ASSERT_EQ(chunk.rows, 32);
  for (int i = 0; i < 16; ++i) {
    // The full runs belong to lanes 15 ... 0 (equal lengths: the last lane comes first).
    EXPECT_EQ(chunk.sigma(15 - i, 0), 4 * (2 * i + 1) + 2);
    EXPECT_EQ(chunk.sigma(31 - i, 0), 4 * (2 * i));
    // Strip 1 has no values; its own slots in the even columns are the empty ones.
    EXPECT_EQ(chunk.sigma(31 - i, 1), 4 * (2 * i) + 2);
    EXPECT_EQ(chunk.sigma(15 - i, 1), 4 * (2 * i + 1));
  }
}

TEST(PackBitmap, EmptyFullAndSingleChunksInOneWeight) {
  // Four chunks: empty, completely full, one element in the last corner, empty but for -0.
  DenseMatrix dense = zeros(32, 4 * 128);
  for (int64_t row = 0; row < 32; ++row) {
    for (int64_t col = 0; col < 128; ++col) {
      dense.at(row, 128 + col) = static_cast<uint16_t>(1 + row * 128 + col);
    }
  }
  dense.at(31, 3 * 128 - 1) = 0xFFFF;
  Packed packed = pack_bitmap(dense);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 0, 137, 148, 148}));
  EXPECT_EQ(packed.header.nnz, 4096 + 1);
  const Status status = check(packed);
  EXPECT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(unpack(packed, serial_for), dense.values);

  const Chunk full(packed, 1);
  ASSERT_EQ(full.rows, 64);
  for (int byte = 0; byte < 64 * 128; byte += 2) ASSERT_NE(full.value(byte), 0) << byte;

  dense.at(5, 3 * 128 + 7) = 0x8000;
  const Packed same = pack_bitmap(dense);
  EXPECT_EQ(same.offsets, packed.offsets);
  EXPECT_EQ(same.payload, packed.payload);
}

TEST(ChunkOrder, EveryChunkHasAPlaceAndAColumnOfABandLiesTogether) {
  for (const int64_t rows : {1, 15, 16, 17, 40}) {
    for (const int64_t cols : {1, 3, 56}) {
      std::set<int64_t> places;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
          const int64_t place = chunk_index(row, col, rows, cols);
          places.insert(place);
          if (row % 16 != 15 && row + 1 < rows) {
            EXPECT_EQ(chunk_index(row + 1, col, rows, cols), place + 1);
          }
        }
      }
      EXPECT_EQ(static_cast<int64_t>(places.size()), rows * cols);
      EXPECT_EQ(*places.begin(), 0);
      EXPECT_EQ(*places.rbegin(), rows * cols - 1);
    }
  }
}

class BitmapDensity : public ::testing::TestWithParam<double> {};

TEST_P(BitmapDensity, AnIndependentReaderFindsEveryElement) {
  for (const auto& [m, k] : {std::pair<int64_t, int64_t>{1, 1},
                             {32, 128},
                             {16, 64},
                             {33, 129},
                             {31, 257},
                             {70, 100},
                             {550, 200}}) {
    const DenseMatrix dense = random_patterns(m, k, GetParam(), 21);
    Packed packed = pack_bitmap(dense);
    const int64_t chunk_cols = (k + 127) / 128;
    ASSERT_EQ(packed.offsets.size(), static_cast<size_t>((m + 31) / 32 * chunk_cols + 1));
    // All of each chunk, so that nothing is stored outside a ragged matrix either.
    for (int64_t row = 0; row < (m + 31) / 32 * 32; ++row) {
      for (int64_t col = 0; col < chunk_cols * 128; ++col) {
        // Bands of 16 chunk rows, column after column within a band; the last may be lower.
        const int64_t chunk_rows = (m + 31) / 32, band_row = row / 512 * 16;
        const int64_t height = std::min<int64_t>(16, chunk_rows - band_row);
        const Chunk chunk(packed, band_row * chunk_cols + col / 128 * height + row / 32 - band_row);
        const uint16_t value = row < m && col < k ? dense.at(row, col) : uint16_t{0};
        ASSERT_EQ(chunk.element(static_cast<int>(row % 32), static_cast<int>(col % 128)),
                  is_zero_pattern(value) ? 0 : value)
            << "row " << row << ", column " << col << " of " << m << "x" << k;
      }
    }
  }
}

TEST_P(BitmapDensity, EveryStoredHalfwordIsAValueAndNoBankIsReadTwice) {
  Packed packed = pack_bitmap(random_patterns(100, 300, GetParam(), 22));
  int64_t stored = 0;
  for (int64_t idx = 0; idx + 1 < static_cast<int64_t>(packed.offsets.size()); ++idx) {
    const Chunk chunk(packed, idx);
    if (chunk.rows < 0) continue;
    for (int byte = 0; byte < chunk.rows * 128; byte += 2) stored += chunk.value(byte) != 0;
    // A row of values is as wide as shared memory: the column is the bank. Lanes of one load have
    // one strip and one half, each lane in any row.
    std::set<int> slots;
    for (int strip = 0; strip < 2; ++strip) {
      std::set<int> banks;
      for (int lane = 0; lane < kLanes; ++lane) {
        banks.insert(chunk.sigma(lane, strip) / 4);
        slots.insert(chunk.sigma(lane, strip));
      }
      EXPECT_EQ(banks.size(), 32U) << "chunk " << idx << ", strip " << strip;
      EXPECT_EQ(*banks.rbegin(), 31);
    }
    EXPECT_EQ(slots.size(), 64U) << "chunk " << idx;
  }
  EXPECT_EQ(stored, packed.header.nnz);
}

INSTANTIATE_TEST_SUITE_P(Sparsities, BitmapDensity,
                         ::testing::Values(0.0, 0.05, 0.3, 0.5, 0.6, 0.8, 0.95, 0.999, 1.0));

TEST(BitmapSize, StaysCloseToTheBitsAndTheValues) {
  struct Limit {
    double sparsity, factor;
  };
  for (const Limit& limit : {Limit{0.5, 1.10}, Limit{0.6, 1.10}, Limit{0.9, 1.35}}) {
    const int64_t size = 1024;
    DenseMatrix dense = zeros(size, size);
    std::mt19937 rng(5);
    std::bernoulli_distribution keep(1.0 - limit.sparsity);
    for (auto& value : dense.values) value = keep(rng) ? kHalfOne : uint16_t{0};
    std::vector<int32_t> offsets(static_cast<size_t>(size / 32 * size / 128 + 1));
    int64_t nnz = 0;
    ASSERT_TRUE(
        bitmap_count(dense.values.data(), size, size, size, serial_for, offsets.data(), &nnz).ok());
    const double bytes = 64.0 * offsets.back() + 4.0 * static_cast<double>(offsets.size());
    const double ideal = static_cast<double>(size * size) * (2.0 * (1.0 - limit.sparsity) + 0.125);
    EXPECT_LT(bytes, limit.factor * ideal) << limit.sparsity;
    RecordProperty("overhead_at_" + std::to_string(static_cast<int>(100 * limit.sparsity)),
                   std::to_string(bytes / ideal));
  }
}

TEST(BitmapSizes, NnzBeyondThePayload) {
  PackedHeader header;
  header.format = Format::kBitmap;
  header.m = 33;
  header.k = 128;
  // Two chunks of at most 137 units.
  const auto status_of = [&](int64_t units, int64_t nnz) {
    header.payload_words = 16 * units;
    header.nnz = nnz;
    return bitmap_check_sizes(header, 3, header.payload_words);
  };
  EXPECT_TRUE(status_of(0, 0).ok());
  EXPECT_TRUE(status_of(2 * 137, 33 * 128).ok());
  EXPECT_EQ(status_of(2 * 137 + 1, 33 * 128).message,
            "header says nnz = 4224, which does not fit a payload of 4400 words in 2 chunks");
  EXPECT_EQ(status_of(11, 11 * 32 + 1).message,
            "header says nnz = 353, which does not fit a payload of 176 words in 2 chunks");
  EXPECT_EQ(status_of(0, 1).message,
            "header says nnz = 1, which does not fit a payload of 0 words in 2 chunks");
}

TEST(BitmapSizes, AWeightWithoutElementsHasNoChunks) {
  PackedHeader header;
  header.format = Format::kBitmap;
  for (const auto& [m, k] : {std::pair<int64_t, int64_t>{0, 0}, {0, 128}, {INT32_MAX, 0}}) {
    header.m = m;
    header.k = k;
    EXPECT_TRUE(bitmap_check_sizes(header, 1, 0).ok());
    EXPECT_FALSE(bitmap_check_sizes(header, 2, 0).ok());
    header.payload_words = 16;
    EXPECT_FALSE(bitmap_check_sizes(header, 1, 16).ok());
    header.payload_words = 0;
  }
}

// Every invariant, broken one at a time in a weight that is valid otherwise: the second chunk row
// of two, so that messages must name the chunk.
class MalformedBitmap : public ::testing::Test {
 protected:
  Packed good_;

  void SetUp() override {
    const DenseMatrix golden = golden_matrix();
    DenseMatrix dense = zeros(kChunkM + golden.m, golden.k);
    dense.at(0, 0) = kHalfOne;
    std::copy(golden.values.begin(), golden.values.end(), dense.values.end() - golden.m * golden.k);
    good_ = pack_bitmap(dense);
    ASSERT_EQ(good_.offsets, (std::vector<int32_t>{0, 11, 28}));
    const Status status = check(good_);
    ASSERT_TRUE(status.ok()) << status.message;
  }

  Chunk chunk() { return {good_, 1}; }

  void expect_refused(const std::string& message) const {
    const Status status = check(good_);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue);
    EXPECT_EQ(status.message, message);
  }
};

TEST_F(MalformedBitmap, OddSigma) {
  ++chunk().sigma(5, 1);  // from 110
  expect_refused("chunk 1: lane 5 of strip 1: sigma must be even and below 128, got 111");
}

TEST_F(MalformedBitmap, SigmaBeyondARow) {
  chunk().sigma(5, 1) = 128;
  expect_refused("chunk 1: lane 5 of strip 1: sigma must be even and below 128, got 128");
}

TEST_F(MalformedBitmap, ColumnTakenTwiceByOneStrip) {
  const uint8_t taken = chunk().sigma(6, 0);  // column 2
  chunk().sigma(7, 0) = taken;
  expect_refused("chunk 1: lane 7 of strip 0: column 2 is taken twice");
  // The other slot does not help: two lanes of one load would read one bank. Strip 1's lane 30,
  // which has that slot, is only met later.
  chunk().sigma(7, 0) = static_cast<uint8_t>(taken + 2);
  expect_refused("chunk 1: lane 7 of strip 0: column 2 is taken twice");
}

TEST_F(MalformedBitmap, SlotTakenByBothStrips) {
  // Each strip's columns stay distinct. Lane 6 of strip 0 and lane 30 of strip 1 share column 2.
  ASSERT_EQ(chunk().sigma(6, 0), 8);
  ASSERT_EQ(chunk().sigma(30, 1), 10);
  chunk().sigma(30, 1) = 8;
  expect_refused("chunk 1: lane 30 of strip 1: column 2 is taken twice");
}

TEST_F(MalformedBitmap, RunsThatOverlap) {
  // Lane 0's two values, sent down onto the four of its own column.
  ASSERT_EQ(chunk().sigma(1, 0), 0);
  std::swap(chunk().sigma(0, 0), chunk().sigma(1, 0));
  expect_refused("chunk 1: lane 0 of strip 0: runs of 4 and 2 values overlap in 4 rows");
}

TEST_F(MalformedBitmap, UpwardRunLongerThanTheChunk) {
  // Nothing comes down in that column: the lane named is the one whose empty run it is.
  chunk().set_bits(0, 0, 0, 0x0101011FU);
  expect_refused("chunk 1: lane 1 of strip 0: runs of 8 and 0 values overlap in 4 rows");
}

TEST_F(MalformedBitmap, DownwardRunLongerThanTheChunk) {
  chunk().set_bits(0, 1, 0, 0x0000001FU);
  expect_refused("chunk 1: lane 0 of strip 0: runs of 0 and 5 values overlap in 4 rows");
}

TEST_F(MalformedBitmap, PaddingThatIsNotZero) {
  chunk().set_value(128 + 20, kHalfOne);
  expect_refused("chunk 1: padding must be 0, got 15360 at byte 148");
  chunk().set_value(128 + 20, 0x8000);
  expect_refused("chunk 1: padding must be 0, got 32768 at byte 148");
}

TEST_F(MalformedBitmap, ColumnOutsideTheMatrix) {
  // The value of (1, 69) moves to the next quad: the matrix ends at column 70.
  chunk().set_bits(6, 1, 0, 1U << chunk_bit(1, 1));
  expect_refused("chunk 1: row 1, column 77 of the chunk lies outside the matrix");
}

TEST_F(MalformedBitmap, RowOutsideTheMatrix) {
  // The value of (16, 66) moves eight rows down: the chunk has 17.
  chunk().set_bits(1, 1, 1, 1U << chunk_bit(0, 2));
  expect_refused("chunk 1: row 24, column 66 of the chunk lies outside the matrix");
}

TEST_F(MalformedBitmap, StoredZeros) {
  for (const uint16_t zero : {uint16_t{0x0000}, uint16_t{0x8000}}) {
    chunk().set_value(2 * 128, zero);
    expect_refused("chunk 1: a stored value must not be zero (row 8, column 1 of the chunk)");
  }
}

TEST_F(MalformedBitmap, ABitWithoutAValue) {
  chunk().set_bits(4, 0, 0, chunk().bits(4, 0, 0) | 1U << chunk_bit(7, 2));
  expect_refused("chunk 1: a stored value must not be zero (row 9, column 56 of the chunk)");
}

TEST_F(MalformedBitmap, AValueWithoutABit) {
  chunk().set_bits(4, 0, 0, 0);
  expect_refused("chunk 1: padding must be 0, got 1 at byte 16");
}

TEST_F(MalformedBitmap, NnzThatIsNotTheNumberOfBits) {
  chunk().set_bits(4, 0, 0, 0);
  chunk().set_value(16, 0);
  expect_refused("header says nnz = 12, the payload holds 11");
}

TEST_F(MalformedBitmap, SizesThatNoChunkHas) {
  const auto expect_units = [&](int chunk, int units) {
    expect_refused("chunk " + std::to_string(chunk) + " holds " + std::to_string(units) +
                   " units; 0 or 9, 11, ... 137 are sizes");
  };
  good_.offsets[1] = 12;
  expect_units(0, 12);
  good_.offsets[1] = 7;
  expect_units(0, 7);
  good_.offsets[1] = 11;
  good_.offsets[2] = 11 + 139;
  expect_units(1, 139);
  good_.offsets[2] = INT32_MAX;
  expect_units(1, INT32_MAX - 11);
  good_.offsets[1] = 137;
  good_.offsets[2] = 28;
  expect_refused("offsets must never decrease, got offsets[1] = 137 and offsets[2] = 28");
}

TEST_F(MalformedBitmap, OffsetsThatEndPastOrBeforeThePayload) {
  good_.offsets[2] = 30;
  expect_refused("offsets must end at 28, the payload's units, got 30");
  good_.offsets[2] = 26;
  expect_refused("offsets must end at 28, the payload's units, got 26");
}

TEST(ValidateBitmap, SmallestOffendingChunkIsReportedWhateverTheThreads) {
  Packed packed = pack_bitmap(random_patterns(kChunkM, 64 * kChunkK, 0.5, 5));
  for (const int chunk : {60, 41, 22}) Chunk(packed, chunk).sigma(3, 1) = 255;
  const std::string expected =
      "chunk 22: lane 3 of strip 1: sigma must be even and below 128, got 255";
  EXPECT_EQ(check(packed).message, expected);
  for (int repeat = 0; repeat < 20; ++repeat) {
    EXPECT_EQ(check(packed, threaded_for).message, expected);
  }
}

TEST(ValidateBitmap, AnyPairingThatFitsIsRead) {
  // Only packing is canonical. Two empty downward runs trade places; a row nobody needs is added.
  const DenseMatrix golden = golden_matrix();
  Packed packed = pack_bitmap(golden);
  const std::vector<uint16_t> expected = unpack(packed, serial_for);
  std::swap(Chunk(packed, 0).sigma(20, 0), Chunk(packed, 0).sigma(21, 0));
  EXPECT_TRUE(check(packed).ok());
  EXPECT_EQ(unpack(packed, serial_for), expected);

  DenseMatrix one = zeros(1, 1);
  one.at(0, 0) = kHalfOne;
  packed = pack_bitmap(one);
  packed.payload.insert(packed.payload.begin() + 32, 32, 0);
  packed.offsets[1] += 2;
  packed.header.payload_words += 32;
  const Status status = check(packed);
  EXPECT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(unpack(packed, serial_for), one.values);
}

}  // namespace
}  // namespace flash_llm::testing
