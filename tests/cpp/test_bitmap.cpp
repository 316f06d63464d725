// Bitmap: the elements of a lane, golden bytes, the pairing of runs, an independent reader of the
// format, its size, and that validate refuses every broken invariant of this format. What holds for
// every format is in test_packed_format.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "format/bitmap.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

constexpr int kLanes = 32;

Packed pack_bitmap(const DenseMatrix& dense) { return pack_or_die(dense, Format::kBitmap); }

// The residual offset of a column of the chunk.
int offset_of_column(int col) { return 16 * (col ^ (col / 8 % 8)); }

// Access to a chunk's bytes, to read and to damage them, by the layout that bitmap.h describes.
struct Chunk {
  uint8_t* bytes = nullptr;
  int units = 0;
  bool two_four = false;
  int rows = -1;  // of values; -1 where the chunk has no bytes
  int steps[2] = {0, 0};

  Chunk(Packed& packed, int64_t idx) {
    const auto i = static_cast<size_t>(idx);
    units = packed.offsets[i + 1] - packed.offsets[i];
    bytes = reinterpret_cast<uint8_t*>(packed.payload.data()) + int64_t{packed.offsets[i]} * 64;
    if (units == 0) return;
    two_four = units % 2 == 0;
    if (two_four) {
      rows = size_at(0);
      steps[0] = size_at(8);
      steps[1] = size_at(16);
    } else {
      rows = (units - 9) / 2;
    }
  }

  uint16_t value(int byte) const {
    uint16_t out;
    std::memcpy(&out, bytes + byte, sizeof(out));
    return out;
  }
  void set_value(int byte, uint16_t value) const {
    std::memcpy(bytes + byte, &value, sizeof(value));
  }
  uint8_t* values() const { return bytes + (two_four ? 1088 : 0); }
  uint8_t* residual() const { return bytes + 1088 + 128 * rows; }
  uint8_t& down_offset(int lane, int strip) const {
    return bytes[(two_four ? 1024 : rows * 128 + 512) + 2 * lane + strip];
  }
  // Bit `lane` of R | G0 << 8 | G1 << 16.
  int size_at(int lane) const {
    int size = 0;
    for (int bit = 0; bit < 8; ++bit) size |= (bytes[1024 + 2 * (lane + bit)] & 1) << bit;
    return size;
  }

  // The words of a plain chunk's bits.
  uint32_t bits(int lane, int half, int strip) const {
    uint32_t out;
    std::memcpy(&out, word_at(lane, half, strip), sizeof(out));
    return out;
  }
  void set_bits(int lane, int half, int strip, uint32_t word) const {
    std::memcpy(word_at(lane, half, strip), &word, sizeof(word));
  }
  // The bits of the group of a 2:4 chunk that has the element at (row, col).
  int group(int row, int col) const {
    const int i = row / 16, g = row % 8, h = col / 32 % 2, u = col / 16 % 2;
    const int n = row % 16 / 8 * 4 + col % 16 / 4, p = col / 64;
    int group = 0;
    for (int k = 0; k < 4; ++k) {
      uint32_t word;
      std::memcpy(&word, bytes + 512 * i + 16 * (4 * g + 2 * h + u) + 4 * k, sizeof(word));
      group |= static_cast<int>(word >> (4 * n + p) & 1U) << k;
    }
    return group;
  }

  // How many values of a lane's quad (the n-th of its run) are stored.
  int stored_in_quad(int lane, int half, int strip, int n) const {
    if (!two_four)
      return static_cast<int>(std::bitset<32>(bits(lane, half, strip) >> n & 0x01010101U).count());
    const int quad = n / 2 + n % 2 * 4, row = 16 * strip + lane / 4;
    const int col = 64 * (quad % 4) + 32 * half + 16 * (quad / 4) + 4 * (lane % 4);
    int stored = 0;
    for (const int r : {row, row + 8}) {
      stored += std::min(
          2, static_cast<int>(std::bitset<4>(static_cast<unsigned>(group(r, col))).count()));
    }
    return stored;
  }

  // Value and residual offset of a row in a step of its strip.
  std::pair<uint16_t, uint16_t> residual_entry(int row, int step) const {
    const int at = static_cast<int>(residual() - bytes) + 64 * (step + (row < 16 ? 0 : steps[0]));
    return {value(at + row % 8 * 4 + row / 8 % 2 * 2), value(at + 32 + row % 16 * 2)};
  }

  // One element, decoded as the text of bitmap.h describes.
  uint16_t element(int row, int col) const {
    if (rows < 0) return 0;
    return two_four ? two_four_element(row, col) : plain_element(row, col);
  }

 private:
  uint8_t* word_at(int lane, int half, int strip) const {
    return bytes + rows * 128 + 16 * lane + 4 * (2 * half + strip);
  }

  uint16_t run_value(int lane, int half, int strip, int rank) const {
    const int row = half == 0 ? rank : rows - 1 - rank;
    const int offset = half == 0 ? 4 * lane + 2 * strip : down_offset(lane, strip) & 0xFE;
    uint16_t out;
    std::memcpy(&out, values() + 128 * row + offset, sizeof(out));
    return out;
  }

  // Finds the element's bit, then its rank in the run.
  uint16_t plain_element(int row, int col) const {
    const int strip = row / 16, half = col / 64, quad = col % 64 / 8;
    const int lane = row % 8 * 4 + col % 8 / 2, elem = row % 16 / 8 * 2 + col % 2;
    const uint32_t word = bits(lane, half, strip);
    int rank = 0;
    for (int q = 0; q < 8; ++q) {
      for (const int j : {0, 1, 3, 2}) {
        const bool stored = (word >> (8 * j + q) & 1U) != 0;
        if (q == quad && j == elem) return stored ? run_value(lane, half, strip, rank) : 0;
        rank += stored;
      }
    }
    return 0;
  }

  // Finds the element's bit, then its slot in the group (or that it has none), then its rank.
  uint16_t two_four_element(int row, int col) const {
    const int bits = group(row, col), k = col % 4;
    if ((bits >> k & 1) == 0) return 0;
    const auto before = std::bitset<4>(static_cast<unsigned>(bits & ((1 << k) - 1))).count();
    const int strip = row / 16;
    if (before >= 2) {
      std::vector<uint16_t> found;
      for (int step = 0; step < steps[strip]; ++step) {
        const auto [value, offset] = residual_entry(row, step);
        if (value != 0 && offset == offset_of_column(col)) found.push_back(value);
      }
      EXPECT_EQ(found.size(), 1U) << "row " << row << ", column " << col;
      return found.empty() ? uint16_t{0} : found[0];
    }
    const int half = col / 32 % 2, lane = row % 8 * 4 + col / 4 % 4;
    int rank = 0;
    for (const int q : {0, 4, 1, 5, 2, 6, 3, 7}) {
      for (const int j : {0, 1, 3, 2}) {
        const int r = 16 * strip + row % 8 + j / 2 * 8;
        const int first = 64 * (q % 4) + 32 * half + 16 * (q / 4) + 4 * (lane % 4);
        const int column = first + slot_column(group(r, first), j % 2);
        if (r == row && column == col) return run_value(lane, half, strip, rank);
        rank += (group(r, first) >> column % 4 & 1) != 0;
      }
    }
    ADD_FAILURE() << "row " << row << ", column " << col << " has no slot";
    return 0;
  }

  // i0 and i1 of bitmap.h.
  static int slot_column(int bits, int slot) {
    const bool b0 = bits & 1, b1 = bits & 2, b2 = bits & 4;
    if (slot == 0) return b0 ? 0 : b1 ? 1 : 2;
    return b0 && b1 ? 1 : b2 && (b0 || b1) ? 2 : 3;
  }
};

TEST(ChunkElements, AreTheAFragmentsOfMmaM16N8K16) {
  std::bitset<kChunkM * kChunkK> seen;
  for (int strip = 0; strip < 2; ++strip) {
    for (int fragment = 0; fragment < kChunkK / 16; ++fragment) {
      for (int lane = 0; lane < kLanes; ++lane) {
        // PTX ISA: lane 4 g + t holds in registers a0..a3, of two elements each, rows g, g + 8, g
        // and g + 8; in a0 and a1 columns 2 t + 0..1, in a2 and a3 columns 2 t + 8..9.
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
            const auto index = static_cast<size_t>(row * kChunkK + col);
            ASSERT_FALSE(seen.test(index)) << "row " << row << " column " << col;
            seen.set(index);
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

TEST(TwoFourElements, AreTheAFragmentsOfMmaSpM16N8K32) {
  std::bitset<kChunkM * kTwoFourK / 4> seen;  // groups
  for (int strip = 0; strip < 2; ++strip) {
    for (int half = 0; half < 2; ++half) {
      for (int fragment = 0; fragment < 4; ++fragment) {
        for (int lane = 0; lane < kLanes; ++lane) {
          // PTX ISA: of the 32 columns lane 4 g + t holds in registers a0 and a1 two of the four
          // from 4 t on, of rows g and g + 8, and in a2 and a3 two of the four from 4 t + 16 on.
          const int g = lane / 4, t = lane % 4;
          for (int reg = 0; reg < 4; ++reg) {
            const int quad = two_four_quad_order(2 * fragment + reg / 2);
            EXPECT_EQ(quad, fragment + reg / 2 * 4);
            const int row = chunk_row(strip, lane, reg % 2 * 2);
            const int col = two_four_col(half, lane, quad);
            ASSERT_EQ(row, 16 * strip + g + reg % 2 * 8);
            ASSERT_EQ(col, 64 * fragment + 32 * half + 16 * (reg / 2) + 4 * t);
            const auto group = static_cast<size_t>((row * kTwoFourK + col) / 4);
            ASSERT_FALSE(seen.test(group)) << "row " << row << " column " << col;
            seen.set(group);
          }
        }
      }
    }
  }
  EXPECT_TRUE(seen.all());
}

TEST(TwoFourElements, ANibbleNamesTheFirstTwoOfAGroup) {
  for (int group = 0; group < 16; ++group) {
    std::vector<int> stored;
    for (int k = 0; k < 4; ++k) {
      if ((group >> k & 1) != 0 && stored.size() < 2) stored.push_back(k);
    }
    const int nibble = two_four_nibble(group), slots[] = {nibble & 3, nibble >> 2};
    // The hardware requires different columns in rising order.
    EXPECT_LT(slots[0], slots[1]) << group;
    EXPECT_LT(nibble, 16);
    std::vector<int> named;
    for (const int slot : slots) {
      if ((group >> slot & 1) != 0) named.push_back(slot);
    }
    EXPECT_EQ(named, stored) << group;
  }
}

TEST(TwoFourElements, SwappingWordsTransposesEveryNibble) {
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    std::array<uint32_t, 4> before, words;
    for (uint32_t& word : before) word = static_cast<uint32_t>(random());
    words = before;
    swap_two_four_words(words.data());
    for (size_t k = 0; k < 4; ++k) {
      for (size_t p = 0; p < 4; ++p) {
        for (size_t n = 0; n < 8; ++n) {
          ASSERT_EQ(words[k] >> (4 * n + p) & 1U, before[p] >> (4 * n + k) & 1U);
        }
      }
    }
    swap_two_four_words(words.data());
    EXPECT_EQ(words, before);
  }
}

TEST(ChunkSize, TwoFourChunksHaveTheSizesThatPlainOnesHaveNot) {
  std::set<int> sizes;
  for (int rows = 1; rows <= 64; ++rows) {
    for (int steps = 0; steps <= 256; ++steps) {
      const int first = std::min(steps, 128), units = two_four_units(rows, first, steps - first);
      EXPECT_EQ(units * 64, 1024 + 64 + rows * 128 + (steps % 2 == 0 ? steps + 1 : steps) * 64);
      EXPECT_EQ(is_two_four(units), units <= 146) << units;
      EXPECT_EQ(chunk_value_rows(units), -1);
      sizes.insert(units);
    }
  }
  EXPECT_EQ(*sizes.begin(), 20);
  EXPECT_FALSE(is_two_four(0));
  for (int rows = 0; rows <= 64; ++rows) EXPECT_FALSE(is_two_four(chunk_units(rows)));
  for (const int64_t units : {int64_t{-20}, int64_t{16}, int64_t{148}, INT64_MAX - 1}) {
    EXPECT_FALSE(is_two_four(units)) << units;
  }
}

TEST(ChunkSize, APairIsTwoFourUpToA64thMoreBytes) {
  EXPECT_TRUE(prefers_two_four(64, 65));
  EXPECT_FALSE(prefers_two_four(64, 66));
  EXPECT_FALSE(prefers_two_four(63, 64));
  EXPECT_TRUE(prefers_two_four(6400, 6500));
  EXPECT_FALSE(prefers_two_four(6400, 6501));
  EXPECT_FALSE(prefers_two_four(0, 0));
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

// 17 x 70: one chunk that is cut off on both sides. All expected bytes are computed by hand from
// bitmap.h.
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

std::vector<uint8_t> golden_bytes() {
  std::vector<uint8_t> expected(17 * 64, 0);
  const auto put16 = [&](size_t row, size_t column, size_t slot, uint16_t value) {
    expected[row * 128 + column * 4 + slot * 2] = static_cast<uint8_t>(value);
    expected[row * 128 + column * 4 + slot * 2 + 1] = static_cast<uint8_t>(value >> 8);
  };
  const auto put_bit = [&](size_t lane, size_t word, size_t bit) {
    uint8_t& byte = expected[512 + lane * 16 + word * 4 + bit / 8];
    byte = static_cast<uint8_t>(byte | 1U << bit % 8);
  };
  // The upward runs, each in its lane's column.
  put16(0, 0, 0, 0x3C00);
  put16(1, 0, 0, 0xBC00);
  put16(2, 0, 0, 0xC200);
  put16(3, 0, 0, 0x4200);
  put16(0, 4, 0, 0x0001);
  put16(0, 10, 0, 0x7E01);
  put16(0, 11, 0, 0x7C00);
  // The longest run needs four rows and pattern 0 needs no more, so it is used. Downward runs of
  // strip 0, longest first:
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

  const std::array<uint8_t, 64> down_offsets = {
      4,   126, 0,   2,  44,  122, 40,  118, 16,  114, 124, 110, 8,  106, 120, 102,
      116, 98,  112, 94, 108, 90,  104, 86,  100, 82,  96,  78,  92, 74,  88,  70,
      84,  66,  80,  62, 76,  58,  72,  54,  68,  50,  64,  46,  60, 42,  56,  38,
      52,  34,  48,  30, 36,  26,  32,  22,  28,  18,  24,  14,  20, 10,  12,  6};
  std::copy(down_offsets.begin(), down_offsets.end(), expected.end() - 64);
  return expected;
}

std::vector<uint8_t> bytes_of(const Packed& packed) {
  std::vector<uint8_t> bytes(packed.payload.size() * 4);
  std::memcpy(bytes.data(), packed.payload.data(), bytes.size());
  return bytes;
}

TEST(PackBitmap, GoldenBytes) {
  const Packed packed = pack_bitmap(golden_matrix());
  const std::array<int64_t, kPackedHeaderInts> header = {kPackedMagic, 2, 2, 1, 17, 70, 11, 272};
  EXPECT_EQ(packed.header.to_ints(), header);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 17}));
  EXPECT_EQ(bytes_of(packed), golden_bytes());
}

TEST(ReadBitmap, VersionOneIsRead) {
  Packed packed;
  packed.header = {kPackedMagic, 1, Format::kBitmap, ValueType::kFloat16, 17, 70, 11, 272};
  packed.offsets = {0, 17};
  const std::vector<uint8_t> bytes = golden_bytes();
  packed.payload.resize(bytes.size() / 4);
  std::memcpy(packed.payload.data(), bytes.data(), bytes.size());
  const Status status = check(packed);
  ASSERT_TRUE(status.ok()) << status.message;
  DenseMatrix expected = golden_matrix();
  expected.at(0, 40) = 0;
  EXPECT_EQ(unpack(packed, serial_for), expected.values);
}

// 17 x 140: one pair that is cut off on both sides. As 2:4 it takes as many units (28) as plain (15
// for three rows and 13 for two), so it is stored as 2:4. Also computed by hand.
DenseMatrix golden_two_four_matrix() {
  DenseMatrix dense = zeros(17, 140);
  dense.at(0, 0) = 0x3C00;  // b0, b1 and b2 of group 0: lane 0, half 0, quad 0; the third is
  dense.at(0, 1) = 0xBC00;  // the residual
  dense.at(0, 2) = 0x4500;
  dense.at(8, 17) = 0x4200;  // b1 and b3: lane 0, half 0, quad 4, j = 2 and 3
  dense.at(8, 19) = 0xC200;
  dense.at(3, 32) = 0x4400;  // b0 and b3: lane 12, half 1, quad 0, j = 0 and 1
  dense.at(3, 35) = 0xC400;
  dense.at(1, 129) = 0x0001;   // b1: lane 4, half 0, quad 2, j = 0
  dense.at(2, 131) = 0x7E01;   // b3: lane 8, half 0, quad 2, j = 1
  dense.at(16, 48) = 0xFFFF;   // b0: strip 1, lane 0, half 1, quad 4, j = 0
  dense.at(16, 136) = 0x7C00;  // b0, b1 and b2: strip 1, lane 2, half 0, quad 2
  dense.at(16, 137) = 0xFC00;
  dense.at(16, 138) = 0x8001;
  dense.at(16, 139) = 0x8000;  // -0 is dropped
  return dense;
}

TEST(PackBitmap, GoldenBytesOfATwoFourPair) {
  const Packed packed = pack_bitmap(golden_two_four_matrix());
  const std::array<int64_t, kPackedHeaderInts> header = {kPackedMagic, 2, 2, 1, 17, 140, 13, 448};
  EXPECT_EQ(packed.header.to_ints(), header);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 28, 28}));

  std::vector<uint8_t> expected(28 * 64, 0);
  const auto put16 = [&](size_t byte, uint16_t value) {
    expected[byte] = static_cast<uint8_t>(value);
    expected[byte + 1] = static_cast<uint8_t>(value >> 8);
  };
  const auto put_bits = [&](size_t strip, size_t lane, size_t word, uint32_t bits) {
    put16(512 * strip + 16 * lane + 4 * word, static_cast<uint16_t>(bits));
    put16(512 * strip + 16 * lane + 4 * word + 2, static_cast<uint16_t>(bits >> 16));
  };
  // Word k has column k of all groups; bit 4 n + p is group n of the p-th 64 columns.
  for (const size_t k : {0U, 1U, 2U}) put_bits(0, 0, k, 1U << 0);   // row 0, columns 0..2
  for (const size_t k : {1U, 3U}) put_bits(0, 1, k, 1U << 16);      // row 8, columns 17 and 19
  for (const size_t k : {0U, 3U}) put_bits(0, 14, k, 1U << 0);      // row 3, columns 32 and 35
  put_bits(0, 4, 1, 1U << 2);                                       // row 1, column 129
  put_bits(0, 8, 3, 1U << 2);                                       // row 2, column 131
  put_bits(1, 3, 0, 1U << 0);                                       // row 16, column 48
  for (const size_t k : {0U, 1U, 2U}) put_bits(1, 0, k, 1U << 10);  // row 16, columns 136..138

  // The longest run needs four rows and pattern 0 needs no more, so it is used. Strip 0: lane 12,
  // with two values, then 31, 30 ... 0 without 12 take the columns 1, 2, 3, 5, 6, 7, 9 ... 31
  // (empty), 4, 8 (one value) and 0. Strip 1: lanes 0, 31 ... 1 take the columns 0, 1, 3 ... 31
  // and 2.
  const std::array<uint8_t, 64> down_offsets = {
      0,   2,   32,  10, 16, 126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106,
      104, 102, 100, 98, 96, 94,  92,  90,  4,   86,  88,  82,  84,  78,  80,  74,
      76,  70,  72,  66, 68, 62,  64,  58,  60,  54,  56,  50,  52,  46,  48,  42,
      44,  38,  40,  34, 36, 30,  28,  26,  24,  22,  20,  18,  12,  14,  8,   6};
  std::copy(down_offsets.begin(), down_offsets.end(), expected.begin() + 1024);
  // R = 4, G0 = 1, G1 = 1: bits 2, 8 and 16.
  for (const size_t lane : {2U, 8U, 16U}) expected[1024 + 2 * lane] |= 1;

  const auto put_value = [&](size_t row, size_t column, size_t slot, uint16_t value) {
    put16(1088 + 128 * row + 4 * column + 2 * slot, value);
  };
  put_value(0, 0, 0, 0x3C00);
  put_value(1, 0, 0, 0xBC00);
  put_value(2, 0, 0, 0xC200);  // quad 4, j = 3 before j = 2
  put_value(3, 0, 0, 0x4200);
  put_value(0, 4, 0, 0x0001);
  put_value(0, 8, 0, 0x7E01);
  put_value(3, 1, 0, 0x4400);
  put_value(2, 1, 0, 0xC400);
  put_value(0, 2, 1, 0x7C00);
  put_value(1, 2, 1, 0xFC00);
  put_value(3, 0, 1, 0xFFFF);

  // One step of each strip, and one that makes their number odd.
  put16(1600, 0x4500);
  put16(1664, 0x8001);
  // The seven rows without an element repeat the residual offset of the first.
  for (size_t row = 0; row < 8; ++row) {
    put16(1600 + 32 + 2 * row, 16 * 2);
    put16(1664 + 32 + 2 * row, 16 * 139);  // 138 / 8 % 8 = 1
  }

  EXPECT_EQ(bytes_of(packed), expected);
  const Status status = check(packed);
  EXPECT_TRUE(status.ok()) << status.message;
}

// A residual whose order is computed by hand. Values are 1 + column.
DenseMatrix residual_matrix() {
  DenseMatrix dense = zeros(32, 256);
  const auto put = [&dense](int64_t row, std::initializer_list<int64_t> residual) {
    for (const int64_t col : residual) {
      const int64_t group = col / 4 * 4;
      for (const int64_t c : {group, group + 1, col}) {
        dense.at(row, c) = static_cast<uint16_t>(1 + c);
      }
    }
  };
  put(0, {2, 11});
  put(1, {7, 38});
  put(2, {3});
  put(3, {2, 15, 22});
  put(12, {2});
  put(15, {47});
  put(24, {255});
  dense.at(0, 200) = dense.at(4, 204) = kHalfOne;  // otherwise the pair's second column is empty
  return dense;
}

TEST(PackBitmap, AResidualGoesWhereNoOtherRowHasItsClass) {
  Packed packed = pack_bitmap(residual_matrix());
  const Status status = check(packed);
  ASSERT_TRUE(status.ok()) << status.message;
  const Chunk chunk(packed, 0);
  ASSERT_TRUE(chunk.two_four);
  ASSERT_EQ(chunk.steps[0], 3);
  ASSERT_EQ(chunk.steps[1], 1);
  using Row = std::array<int, 16>;
  // Row 1's column 38 is of the class that row 0 has in steps 0 and 1, so it goes to step 2. Then
  // all steps have the class of row 3's column 2, so it goes to the first; its column 15 goes to
  // the first of the others, none of which has class 6; its column 22 goes to the last.
  const std::array<Row, 3> stored = {
      Row{2, 7, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0},
      Row{11, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 47},
      Row{0, 38, 0, 22, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
  };
  const std::array<Row, 3> offsets = {
      Row{2, 7, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2},
      Row{10, 10, 10, 14, 10, 10, 10, 10, 42, 42, 42, 42, 42, 42, 42, 42},
      Row{34, 34, 34, 20, 34, 34, 34, 34, 0, 0, 0, 0, 0, 0, 0, 0},
  };
  for (size_t step = 0; step < 3; ++step) {
    for (size_t row = 0; row < 16; ++row) {
      const auto [value, offset] =
          chunk.residual_entry(static_cast<int>(row), static_cast<int>(step));
      EXPECT_EQ(value, stored[step][row] == 0 ? 0 : 1 + stored[step][row]) << step << ", " << row;
      EXPECT_EQ(offset, 16 * offsets[step][row]) << step << ", " << row;
    }
  }
  for (int row = 16; row < 32; ++row) {
    EXPECT_EQ(chunk.residual_entry(row, 0),
              (std::pair<uint16_t, uint16_t>{row == 24 ? 256 : 0, row < 24 ? 0 : 16 * 248}));
  }
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
    EXPECT_EQ(chunk.down_offset(15 - i, 0), 4 * (2 * i + 1) + 2);
    EXPECT_EQ(chunk.down_offset(31 - i, 0), 4 * (2 * i));
    // Strip 1 has no values; its own slots in the even columns are the empty ones.
    EXPECT_EQ(chunk.down_offset(31 - i, 1), 4 * (2 * i) + 2);
    EXPECT_EQ(chunk.down_offset(15 - i, 1), 4 * (2 * i + 1));
  }
}

TEST(PackBitmap, EmptyFullAndSingleChunksInOneWeight) {
  // Four chunks: an empty one, a full one, one with only its last element, one with nothing but -0.
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

TEST(ChunkOrder, IndicesAreDistinctAndAColumnOfABandIsContiguous) {
  for (const int64_t rows : {1, 15, 16, 17, 40}) {
    for (const int64_t cols : {1, 3, 56}) {
      std::set<int64_t> indices;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
          const int64_t index = chunk_index(row, col, rows, cols);
          indices.insert(index);
          if (row % 16 != 15 && row + 1 < rows) {
            EXPECT_EQ(chunk_index(row + 1, col, rows, cols), index + 1);
          }
        }
      }
      EXPECT_EQ(static_cast<int64_t>(indices.size()), rows * cols);
      EXPECT_EQ(*indices.begin(), 0);
      EXPECT_EQ(*indices.rbegin(), rows * cols - 1);
    }
  }
}

// Each pair of each band has its own sparsity, so that both kinds occur; in some pairs one column
// is full and one empty.
DenseMatrix mixed_pairs(int64_t m, int64_t k, uint32_t seed) {
  const double sparsities[] = {0.9, 0.0, 0.97, 0.5, 0.85, 1.0, 0.999, 0.7};
  DenseMatrix dense = random_patterns(m, k, 0.0, seed);
  std::mt19937 rng(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t col = 0; col < k; ++col) {
      const int64_t pair = row / 512 * 5 + col / 256 + seed;
      const bool split = pair % 9 == 8;
      const double sparsity = split ? (col / 128 % 2 == 0 ? 1.0 : 0.0) : sparsities[pair % 8];
      if (uniform(rng) < sparsity) dense.at(row, col) = uniform(rng) < 0.5 ? 0x0000 : 0x8000;
    }
  }
  return dense;
}

// Bands of 16 chunk rows, column after column within a band; the last may be lower.
int64_t index_of_chunk(int64_t row, int64_t col, int64_t m, int64_t k) {
  const int64_t chunk_rows = (m + 31) / 32, chunk_cols = (k + 127) / 128, band = row / 16 * 16;
  return band * chunk_cols + col * std::min<int64_t>(16, chunk_rows - band) + row - band;
}

// How many chunks are 2:4 and how many plain.
std::pair<int, int> kinds_of(const Packed& packed) {
  std::pair<int, int> kinds{0, 0};
  for (size_t i = 0; i + 1 < packed.offsets.size(); ++i) {
    const int units = packed.offsets[i + 1] - packed.offsets[i];
    kinds.first += units > 0 && units % 2 == 0;
    kinds.second += units % 2 == 1;
  }
  return kinds;
}

void expect_independent_reader_agrees(const DenseMatrix& dense) {
  Packed packed = pack_bitmap(dense);
  const int64_t m = dense.m, k = dense.k, chunk_rows = (m + 31) / 32, chunk_cols = (k + 127) / 128;
  ASSERT_EQ(packed.offsets.size(), static_cast<size_t>(chunk_rows * chunk_cols + 1));
  // Reads all of each chunk, to see that nothing is stored outside the matrix.
  for (int64_t row = 0; row < chunk_rows; ++row) {
    for (int64_t col = 0; col < chunk_cols; ++col) {
      const int64_t even = col / 2 * 2;
      const Chunk first(packed, index_of_chunk(row, even, m, k));
      const Chunk own(packed, index_of_chunk(row, col, m, k));
      ASSERT_TRUE(!first.two_four || col == even || own.rows < 0);
      const Chunk& chunk = first.two_four ? first : own;
      for (int64_t r = 32 * row; r < 32 * row + 32; ++r) {
        for (int64_t c = 128 * col; c < 128 * col + 128; ++c) {
          const uint16_t value = r < m && c < k ? dense.at(r, c) : uint16_t{0};
          const int64_t begin = 128 * (first.two_four ? even : col);
          ASSERT_EQ(chunk.element(static_cast<int>(r - 32 * row), static_cast<int>(c - begin)),
                    is_zero_pattern(value) ? 0 : value)
              << "row " << r << ", column " << c << " of " << m << "x" << k;
        }
      }
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
                             {40, 512},
                             {550, 200}}) {
    expect_independent_reader_agrees(random_patterns(m, k, GetParam(), 21));
  }
}

TEST_P(BitmapDensity, EveryStoredHalfwordIsAValueAndNoBankIsReadTwice) {
  Packed packed = pack_bitmap(random_patterns(100, 300, GetParam(), 22));
  int64_t stored = 0;
  for (int64_t idx = 0; idx + 1 < static_cast<int64_t>(packed.offsets.size()); ++idx) {
    const Chunk chunk(packed, idx);
    if (chunk.rows < 0) continue;
    const int begin = static_cast<int>(chunk.values() - chunk.bytes);
    for (int byte = 0; byte < chunk.rows * 128; byte += 2) stored += chunk.value(begin + byte) != 0;
    if (chunk.two_four) {
      const int residual = static_cast<int>(chunk.residual() - chunk.bytes);
      for (int byte = residual; byte < 64 * chunk.units; byte += 2) {
        stored += (byte - residual) % 64 < 32 && chunk.value(byte) != 0;
      }
    }
    // A row of values is as wide as all banks of shared memory, so the column is the bank. In one
    // load all lanes read the same strip and half, each lane in any row.
    std::set<int> slots;
    for (int strip = 0; strip < 2; ++strip) {
      std::set<int> banks;
      for (int lane = 0; lane < kLanes; ++lane) {
        banks.insert(chunk.down_offset(lane, strip) / 4);
        slots.insert(chunk.down_offset(lane, strip) / 2);
      }
      EXPECT_EQ(banks.size(), 32U) << "chunk " << idx << ", strip " << strip;
      EXPECT_EQ(*banks.rbegin(), 31);
    }
    EXPECT_EQ(slots.size(), 64U) << "chunk " << idx;
  }
  EXPECT_EQ(stored, packed.header.nnz);
}

// The bytes, relative to the chunk, that a reader of whole quads loads (cuda/bitmap/decode.cuh):
// the two values from a quad's position on, and the two before the next quad's. It advances by a
// row of values for each value that is stored.
std::pair<int, int> loaded_bytes(const Chunk& chunk) {
  int first = 0, end = 64 * chunk.units;
  const int values = static_cast<int>(chunk.values() - chunk.bytes);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int strip = 0; strip < 2; ++strip) {
      for (int half = 0; half < 2; ++half) {
        const int step = half == 0 ? 128 : -128;
        int position =
            half == 0 ? values + 4 * lane + 2 * strip
                      : values + 128 * (chunk.rows - 1) + (chunk.down_offset(lane, strip) & 0xFE);
        for (int quad = 0; quad < 8; ++quad) {
          const int next = position + step * chunk.stored_in_quad(lane, half, strip, quad);
          for (const int load : {position, position + step, next - step, next - 2 * step}) {
            first = std::min(first, load);
            end = std::max(end, load + 2);
          }
          position = next;
        }
      }
    }
  }
  // Of the residual it loads one step more than there are.
  if (chunk.two_four) {
    const int residual = values + 128 * chunk.rows;
    end = std::max(end, residual + 64 * (chunk.steps[0] + chunk.steps[1] + 1));
  }
  return {first, end};
}

// The kernels leave a gap of this size beside chunks, in which nothing is written while they read.
TEST_P(BitmapDensity, AReaderOfWholeQuadsStaysWithinItsReach) {
  for (const uint32_t seed : {31U, 32U, 33U}) {
    Packed packed = pack_bitmap(random_patterns(100, 600, GetParam(), seed));
    for (int64_t idx = 0; idx + 1 < static_cast<int64_t>(packed.offsets.size()); ++idx) {
      const Chunk chunk(packed, idx);
      if (chunk.rows < 0) continue;
      const auto [first, end] = loaded_bytes(chunk);
      EXPECT_GE(first, chunk.two_four ? 0 : -kDecodeReachBytes) << "chunk " << idx;
      EXPECT_LE(end - 64 * chunk.units, chunk.two_four ? 192 : 0) << "chunk " << idx;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sparsities, BitmapDensity,
                         ::testing::Values(0.0, 0.05, 0.3, 0.5, 0.6, 0.8, 0.95, 0.999, 1.0));

class BitmapPairs : public ::testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(BitmapPairs, MayMixKindsInOneWeight) {
  const auto [m, k] = GetParam();
  for (uint32_t seed = 0; seed < 3; ++seed) {
    const DenseMatrix dense = mixed_pairs(m, k, seed);
    expect_independent_reader_agrees(dense);
    const Packed packed = pack_bitmap(dense);
    const Status status = check(packed);
    ASSERT_TRUE(status.ok()) << status.message;
    std::vector<uint16_t> expected = dense.values;
    for (auto& value : expected) value = is_zero_pattern(value) ? uint16_t{0} : value;
    EXPECT_EQ(unpack(packed, serial_for), expected);
    const auto [two_four, plain] = kinds_of(packed);
    EXPECT_GT(two_four, 0);
    EXPECT_GT(plain, 0);
  }
}

// Odd and even numbers of chunk columns, and a last band of one to three chunk rows.
INSTANTIATE_TEST_SUITE_P(Shapes, BitmapPairs,
                         ::testing::Values(std::pair<int64_t, int64_t>{32, 1024},
                                           std::pair<int64_t, int64_t>{50, 1200},
                                           std::pair<int64_t, int64_t>{530, 1153},
                                           std::pair<int64_t, int64_t>{600, 1100}));

TEST(BitmapKinds, FollowTheUnitsOfTheWholePair) {
  // As 2:4 the first chunk row takes 20 units instead of 11, each of the others 20 instead of 22:
  // four of the others are enough for 2:4.
  DenseMatrix dense = zeros(160, 256);
  dense.at(0, 0) = kHalfOne;
  EXPECT_EQ(kinds_of(pack_bitmap(dense)), (std::pair<int, int>{0, 1}));
  for (const int64_t row : {32, 64, 96}) dense.at(row, 0) = dense.at(row, 132) = kHalfOne;
  EXPECT_EQ(kinds_of(pack_bitmap(dense)), (std::pair<int, int>{0, 7}));
  dense.at(128, 0) = dense.at(128, 132) = kHalfOne;
  EXPECT_EQ(kinds_of(pack_bitmap(dense)), (std::pair<int, int>{5, 0}));
}

TEST(BitmapKinds, AChunkThatIsTooLargeMakesItsPairPlain) {
  // The first chunk row is a full 2:4 pattern with two more elements in one row. The other fifteen
  // have one element in each chunk column and are smaller as 2:4.
  DenseMatrix dense = zeros(512, 256);
  for (int64_t row = 0; row < 32; ++row) {
    for (int64_t col = 0; col < 256; ++col) {
      if (col % 4 < 2) dense.at(row, col) = kHalfOne;
    }
  }
  for (int64_t row = 32; row < 512; row += 32) dense.at(row, 0) = dense.at(row, 255) = kHalfOne;
  dense.at(0, 2) = dense.at(0, 6) = kHalfOne;
  EXPECT_EQ(kinds_of(pack_bitmap(dense)), (std::pair<int, int>{0, 32}));
  // With one of the two it fits.
  dense.at(0, 6) = 0;
  const Packed packed = pack_bitmap(dense);
  EXPECT_EQ(kinds_of(packed), (std::pair<int, int>{16, 0}));
  EXPECT_EQ(packed.offsets[1], 146);
}

TEST(BitmapKinds, ALastColumnWithoutAPartnerIsPlain) {
  DenseMatrix dense = zeros(32, 384);
  for (const int64_t col : {0, 140, 256, 300, 383}) dense.at(3, col) = kHalfOne;
  const Packed packed = pack_bitmap(dense);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 20, 20, 31}));
  EXPECT_EQ(unpack(packed, serial_for), dense.values);
}

TEST(BitmapKinds, BandsChooseForThemselves) {
  DenseMatrix dense = zeros(512 + 32, 256);
  for (int64_t row = 0; row < 512; row += 32) dense.at(row, 0) = dense.at(row, 132) = kHalfOne;
  for (int64_t row = 512; row < 544; ++row) {
    for (int64_t col = 0; col < 256; ++col) dense.at(row, col) = kHalfOne;
  }
  const Packed packed = pack_bitmap(dense);
  EXPECT_EQ(kinds_of(packed), (std::pair<int, int>{16, 2}));
  EXPECT_EQ(packed.offsets.back(), 16 * 20 + 2 * 137);
  EXPECT_TRUE(check(packed).ok());
}

TEST(BitmapKinds, ChunksWithoutNonzerosHaveNoBytesInEitherKind) {
  DenseMatrix dense = zeros(96, 512);
  // The second chunk of the pair is empty, and so is the second pair.
  dense.at(0, 0) = dense.at(0, 132) = dense.at(64, 0) = dense.at(64, 255) = kHalfOne;
  const Packed packed = pack_bitmap(dense);
  EXPECT_EQ(packed.offsets,
            (std::vector<int32_t>{0, 20, 20, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40}));
  const Status status = check(packed);
  EXPECT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(unpack(packed, serial_for), dense.values);
}

TEST(BitmapResidual, FewColumnsOfAStepAreOfOneClass) {
  DenseMatrix dense = zeros(1024, 1024);
  std::mt19937 rng(5);
  std::bernoulli_distribution keep(0.15);
  for (auto& value : dense.values) value = keep(rng) ? kHalfOne : uint16_t{0};
  Packed packed = pack_bitmap(dense);
  EXPECT_EQ(unpack(packed, serial_for), dense.values);
  // ldmatrix loads the columns of eight rows at once, different columns of one class one by one.
  int64_t phases = 0, cycles = 0, found = 0, expected = 0;
  for (int64_t idx = 0; idx + 1 < static_cast<int64_t>(packed.offsets.size()); ++idx) {
    const Chunk chunk(packed, idx);
    if (!chunk.two_four) continue;
    for (int row = 0; row < 32; ++row) {
      for (int col = 0; col < 256; col += 4) {
        const std::bitset<4> group(static_cast<unsigned>(chunk.group(row, col)));
        expected += std::max(0, static_cast<int>(group.count()) - 2);
      }
    }
    for (int row = 0; row < 32; row += 8) {
      for (int step = 0; step < chunk.steps[row / 16]; ++step) {
        std::array<std::set<int>, 8> classes;
        for (int i = 0; i < 8; ++i) {
          const auto [value, offset] = chunk.residual_entry(row + i, step);
          classes[offset / 16 % 8].insert(offset);
          found += value != 0;
        }
        size_t most = 0;
        for (const auto& offsets : classes) most = std::max(most, offsets.size());
        cycles += static_cast<int64_t>(most);
        ++phases;
      }
    }
  }
  EXPECT_GT(found, 2000);
  EXPECT_EQ(found, expected);
  // It is 1.06; 1.65 if each row's columns are taken in rising order.
  EXPECT_LT(static_cast<double>(cycles) / static_cast<double>(phases), 1.1);
}

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
  PackedHeader header = PackedHeader::of(Format::kBitmap);
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
  const auto is_refused = [&](int64_t units, int64_t nnz) {
    return mentions(status_of(units, nnz).message,
                    {"nnz = " + std::to_string(nnz), std::to_string(16 * units), "2 chunks"});
  };
  EXPECT_TRUE(is_refused(2 * 137 + 1, 33 * 128));
  EXPECT_TRUE(is_refused(11, 11 * 32 + 1));
  EXPECT_TRUE(is_refused(0, 1));
}

TEST(BitmapSizes, AWeightWithoutElementsHasNoChunks) {
  PackedHeader header = PackedHeader::of(Format::kBitmap);
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

// Each test breaks one invariant of a weight that is valid otherwise, in the second of two chunk
// rows, so that messages must name the chunk.
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

  void expect_refused(std::initializer_list<std::string> parts) const {
    const Status status = check(good_);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue);
    EXPECT_TRUE(mentions(status.message, parts)) << status.message;
  }
};

TEST_F(MalformedBitmap, OddDownOffset) {
  ++chunk().down_offset(5, 1);  // from 110
  expect_refused({"chunk 1: lane 5 of strip 1: ", "111"});
}

TEST_F(MalformedBitmap, DownOffsetBeyondARow) {
  chunk().down_offset(5, 1) = 128;
  expect_refused({"chunk 1: lane 5 of strip 1: ", "128"});
}

TEST_F(MalformedBitmap, ColumnTakenTwiceByOneStrip) {
  const uint8_t taken = chunk().down_offset(6, 0);  // column 2
  chunk().down_offset(7, 0) = taken;
  expect_refused({"chunk 1: lane 7 of strip 0: ", "column 2 "});
  // The other slot is no better: two lanes of one load would read one bank. Strip 1's lane 30,
  // which has that slot, is checked later.
  chunk().down_offset(7, 0) = static_cast<uint8_t>(taken + 2);
  expect_refused({"chunk 1: lane 7 of strip 0: ", "column 2 "});
}

TEST_F(MalformedBitmap, SlotTakenByBothStrips) {
  // The columns of each strip stay distinct. Lane 6 of strip 0 and lane 30 of strip 1 share
  // column 2.
  ASSERT_EQ(chunk().down_offset(6, 0), 8);
  ASSERT_EQ(chunk().down_offset(30, 1), 10);
  chunk().down_offset(30, 1) = 8;
  expect_refused({"chunk 1: lane 30 of strip 1: ", "column 2 "});
}

TEST_F(MalformedBitmap, RunsThatOverlap) {
  // Lane 0's two values of half 1 now run downward into the four of its own column.
  ASSERT_EQ(chunk().down_offset(1, 0), 0);
  std::swap(chunk().down_offset(0, 0), chunk().down_offset(1, 0));
  expect_refused({"chunk 1: lane 0 of strip 0: ", "4 and 2", "4 rows"});
}

TEST_F(MalformedBitmap, UpwardRunLongerThanTheChunk) {
  // The downward run of that column is empty; the message names its lane.
  chunk().set_bits(0, 0, 0, 0x0101011FU);
  expect_refused({"chunk 1: lane 1 of strip 0: ", "8 and 0", "4 rows"});
}

TEST_F(MalformedBitmap, DownwardRunLongerThanTheChunk) {
  chunk().set_bits(0, 1, 0, 0x0000001FU);
  expect_refused({"chunk 1: lane 0 of strip 0: ", "0 and 5", "4 rows"});
}

TEST_F(MalformedBitmap, PaddingThatIsNotZero) {
  chunk().set_value(128 + 20, kHalfOne);
  expect_refused({"chunk 1: ", "15360 at byte 148"});
  chunk().set_value(128 + 20, 0x8000);
  expect_refused({"chunk 1: ", "32768 at byte 148"});
}

TEST_F(MalformedBitmap, ColumnOutsideTheMatrix) {
  // The value of (1, 69) moves to the next quad: the matrix ends at column 70.
  chunk().set_bits(6, 1, 0, 1U << chunk_bit(1, 1));
  expect_refused({"chunk 1: row 1, column 77 "});
}

TEST_F(MalformedBitmap, RowOutsideTheMatrix) {
  // The value of (16, 66) moves eight rows down: the chunk has 17.
  chunk().set_bits(1, 1, 1, 1U << chunk_bit(0, 2));
  expect_refused({"chunk 1: row 24, column 66 "});
}

TEST_F(MalformedBitmap, StoredZeros) {
  for (const uint16_t zero : {uint16_t{0x0000}, uint16_t{0x8000}}) {
    chunk().set_value(2 * 128, zero);
    expect_refused({"chunk 1: ", "row 8, column 1 "});
  }
}

TEST_F(MalformedBitmap, ABitWithoutAValue) {
  chunk().set_bits(4, 0, 0, chunk().bits(4, 0, 0) | 1U << chunk_bit(7, 2));
  expect_refused({"chunk 1: ", "row 9, column 56 "});
}

TEST_F(MalformedBitmap, AValueWithoutABit) {
  chunk().set_bits(4, 0, 0, 0);
  expect_refused({"chunk 1: ", "1 at byte 16"});
}

TEST_F(MalformedBitmap, NnzThatIsNotTheNumberOfBits) {
  chunk().set_bits(4, 0, 0, 0);
  chunk().set_value(16, 0);
  expect_refused({"nnz = 12", "11"});
}

TEST_F(MalformedBitmap, SizesThatNoChunkHas) {
  const auto expect_units = [&](int chunk, int units) {
    expect_refused({"chunk " + std::to_string(chunk) + " ", std::to_string(units)});
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
  expect_refused({"offsets[1] = 137", "offsets[2] = 28"});
}

TEST_F(MalformedBitmap, OffsetsThatEndPastOrBeforeThePayload) {
  good_.offsets[2] = 30;
  expect_refused({"offsets ", "28", "30"});
  good_.offsets[2] = 26;
  expect_refused({"offsets ", "28", "26"});
}

// The same for a pair of 2:4 chunks, again in the second chunk row.
class MalformedTwoFour : public MalformedBitmap {
 protected:
  void SetUp() override {
    const DenseMatrix golden = golden_two_four_matrix();
    DenseMatrix dense = zeros(kChunkM + golden.m, golden.k);
    std::copy(golden.values.begin(), golden.values.end(), dense.values.begin());
    std::copy(golden.values.begin(), golden.values.end(), dense.values.end() - golden.m * golden.k);
    good_ = pack_bitmap(dense);
    ASSERT_EQ(good_.offsets, (std::vector<int32_t>{0, 28, 56, 56, 56}));
    const Status status = check(good_);
    ASSERT_TRUE(status.ok()) << status.message;
  }

  // Flips a bit of R | G0 << 8 | G1 << 16.
  void flip_size_bit(int bit) { chunk().bytes[1024 + 2 * bit] ^= 1; }
  // Flips the bit of an element.
  void flip(int row, int col) {
    const int lane = row % 8 * 4 + col / 16 % 4,
              bit = (row / 8 % 2 * 4 + col / 4 % 4) * 4 + col / 64;
    chunk().bytes[row / 16 * 512 + 16 * lane + 4 * (col % 4) + bit / 8] ^=
        static_cast<uint8_t>(1 << bit % 8);
  }
};

TEST_F(MalformedTwoFour, RowsAndStepsThatAreNotTheSize) {
  flip_size_bit(0);
  expect_refused({"chunk 1: ", "R = 5, G0 = 1, G1 = 1", "0", "28"});
  flip_size_bit(0);
  flip_size_bit(9);
  expect_refused({"chunk 1: ", "R = 4, G0 = 3, G1 = 1", "0", "28"});
  flip_size_bit(9);
  for (int bit = 17; bit < 24; ++bit) flip_size_bit(bit);
  expect_refused({"chunk 1: ", "R = 4, G0 = 1, G1 = 255", "0", "28"});
}

TEST_F(MalformedTwoFour, SpareBitsThatAreNotZero) {
  flip_size_bit(24);
  expect_refused({"chunk 1: ", "R = 4, G0 = 1, G1 = 1", "1", "28"});
  flip_size_bit(24);
  chunk().down_offset(24, 1) ^= 1;
  expect_refused({"chunk 1: lane 24 of strip 1: ", "39"});
  chunk().down_offset(24, 1) ^= 1;
  chunk().down_offset(0, 0) = 128;
  expect_refused({"chunk 1: lane 0 of strip 0: ", "128"});
}

TEST_F(MalformedTwoFour, ColumnTakenTwice) {
  chunk().down_offset(9, 0) = chunk().down_offset(10, 0);
  expect_refused({"chunk 1: lane 10 of strip 0: ", "column 24 "});
}

TEST_F(MalformedTwoFour, RunsThatOverlap) {
  for (const int col : {16, 17}) flip(0, col);  // lane 0, quad 4
  expect_refused({"chunk 1: lane 0 of strip 0: ", "6 and 0", "4 rows"});
}

TEST_F(MalformedTwoFour, BitsOutsideTheMatrix) {
  for (int col = 140; col < 144; ++col) flip(0, col);  // the matrix has 140
  expect_refused({"chunk 1: row 0, column 140 "});
  for (int col = 140; col < 144; ++col) flip(0, col);
  flip(31, 255);  // the last of all
  expect_refused({"chunk 1: row 31, column 255 "});
}

TEST_F(MalformedTwoFour, StoredZeros) {
  const int residual = static_cast<int>(chunk().residual() - chunk().bytes);
  for (const uint16_t zero : {uint16_t{0x0000}, uint16_t{0x8000}}) {
    chunk().set_value(1088 + 128, zero);
    expect_refused({"chunk 1: ", "row 0, column 1 "});
  }
  chunk().set_value(1088 + 128, kHalfOne);
  for (const uint16_t zero : {uint16_t{0x0000}, uint16_t{0x8000}}) {
    chunk().set_value(residual + 64, zero);
    expect_refused({"chunk 1: ", "row 16, column 138 "});
  }
}

TEST_F(MalformedTwoFour, ResidualWithMoreOrFewerStepsThanItsRowsNeed) {
  flip(0, 3);  // now row 0's group is full and takes two steps
  expect_refused({"chunk 1: ", "strip 0", "2 steps", "1"});
  for (const int col : {2, 3}) flip(0, col);  // and now none
  expect_refused({"chunk 1: ", "strip 0", "0 steps", "1"});
  flip(0, 2);
  flip(16, 138);
  expect_refused({"chunk 1: ", "strip 1", "0 steps", "1"});
}

TEST_F(MalformedTwoFour, StepsThatChangeStrips) {
  // G0 = 2 and G1 = 0 give the same size.
  for (const int bit : {8, 9, 16}) flip_size_bit(bit);
  expect_refused({"chunk 1: ", "strip 0", "1 steps", "2"});
}

TEST_F(MalformedTwoFour, ResidualOffsetThatIsNotTheBits) {
  const int residual = static_cast<int>(chunk().residual() - chunk().bytes);
  chunk().set_value(residual + 32, 33);
  expect_refused({"chunk 1: step 0 of row 0", "32", "33"});
  chunk().set_value(residual + 32, 32);
  chunk().set_value(residual + 64 + 32, 0xFFFF);
  expect_refused({"chunk 1: step 0 of row 16", "2224", "65535"});
}

TEST_F(MalformedTwoFour, ResidualOffsetOfARowWithoutAnElement) {
  // It must be that of the first of its eight rows that has an element, or 0.
  const int residual = static_cast<int>(chunk().residual() - chunk().bytes);
  chunk().set_value(residual + 32 + 2 * 7, 0);
  expect_refused({"chunk 1: step 0 of row 7", "32", "0"});
  chunk().set_value(residual + 32 + 2 * 7, 32);
  chunk().set_value(residual + 64 + 32 + 2 * 8, 2224);
  expect_refused({"chunk 1: step 0 of row 24", "0", "2224"});
}

TEST_F(MalformedTwoFour, PaddingThatIsNotZero) {
  const int residual = static_cast<int>(chunk().residual() - chunk().bytes);
  const int padding[] = {1088 + 4,         // values that no run has
                         residual + 2,     // a row that needs no step
                         residual + 128,   // the step that makes them odd
                         residual + 190};  // to its end
  for (const int byte : padding) {
    chunk().set_value(byte, 1);
    expect_refused({"chunk 1: ", "1 at byte " + std::to_string(byte)});
    chunk().set_value(byte, 0);
  }
  EXPECT_TRUE(check(good_).ok());
}

TEST_F(MalformedTwoFour, ChunkWithoutNonzeros) {
  Packed empty = good_;
  Chunk cleared(empty, 1);
  std::fill_n(cleared.bytes, 1024, uint8_t{0});
  EXPECT_TRUE(mentions(check(empty).message, {"chunk 1: "}));
}

TEST_F(MalformedTwoFour, KindsThatDiffer) {
  // The second chunk moves to the second column; then a plain chunk replaces or follows it.
  good_.offsets = {0, 28, 28, 28, 56};
  expect_refused({"chunk 3 ", "28", "2:4"});
  good_.offsets = {0, 28, 45, 45, 56};
  expect_refused({"chunk 1 ", "chunk 0 ", "2:4"});
  good_.offsets = {0, 28, 28, 39, 56};
  expect_refused({"chunk 2 ", "chunk 0 ", "2:4"});
}

TEST_F(MalformedTwoFour, AColumnWithoutAPartner) {
  // A weight of one chunk column with the same bytes.
  good_.header.k = 128;
  good_.offsets = {0, 28, 56};
  expect_refused({"chunk 0 ", "28", "2:4"});
  EXPECT_EQ(unpack(good_, serial_for).size(), 49U * 128U);
}

TEST(ValidateBitmap, SmallestOffendingChunkIsReportedWhateverTheThreads) {
  Packed packed = pack_bitmap(random_patterns(kChunkM, 64 * kChunkK, 0.5, 5));
  for (const int chunk : {60, 41, 22}) Chunk(packed, chunk).down_offset(3, 1) = 255;
  const std::string expected = check(packed).message;
  EXPECT_TRUE(mentions(expected, {"chunk 22: lane 3 of strip 1: ", "255"})) << expected;
  for (int repeat = 0; repeat < 20; ++repeat) {
    EXPECT_EQ(check(packed, threaded_for).message, expected);
  }
}

TEST(ValidateBitmap, AResidualInAnotherOrderIsRefused) {
  Packed packed = pack_bitmap(residual_matrix());
  uint8_t* steps = Chunk(packed, 0).residual();
  std::swap_ranges(steps, steps + 64, steps + 64);
  EXPECT_TRUE(mentions(check(packed).message, {"chunk 0: step 0 of row 0", "32", "160"}));
}

TEST(ValidateBitmap, AnyPairingThatFitsIsRead) {
  // Only packing is canonical: two empty downward runs are swapped, and a row that no run needs is
  // added.
  const DenseMatrix golden = golden_matrix();
  Packed packed = pack_bitmap(golden);
  const std::vector<uint16_t> expected = unpack(packed, serial_for);
  std::swap(Chunk(packed, 0).down_offset(20, 0), Chunk(packed, 0).down_offset(21, 0));
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
