// The gather format: its bytes, its order, and what only its validation finds.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "format/gather.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

Packed pack_gather(const DenseMatrix& dense) { return pack_or_die(dense, Format::kGather); }

uint8_t* bytes_of(Packed& packed) { return reinterpret_cast<uint8_t*>(packed.payload.data()); }

void append(std::vector<uint8_t>& bytes, uint16_t value) {
  bytes.push_back(static_cast<uint8_t>(value));
  bytes.push_back(static_cast<uint8_t>(value >> 8));
}

// 2 x 16 with three nonzeros, computed by hand. Runs of 2 nonzeros have 0, 1, 0 and 1 of them, of 1
// nonzero 0, 0, 0 and 1, so lanes 1, 3 and 7 store them in step 0. The other lanes take the free
// classes of columns 8 to 15, and from step 1 on all lanes fill up the quad.
TEST(PackGather, GoldenBytes) {
  DenseMatrix dense = zeros(2, 16);
  dense.at(0, 0) = 0x3C00;
  dense.at(0, 5) = 0x7E01;
  dense.at(1, 3) = 0xC200;
  dense.at(1, 4) = 0x8000;  // -0 is dropped
  std::vector<uint8_t> expected;
  for (uint16_t row = 0; row < 8; ++row) append(expected, row);
  for (const uint16_t quads : std::array<uint16_t, 8>{1}) append(expected, quads);
  for (const uint16_t col : std::array<uint16_t, 8>{9, 0, 10, 5, 12, 14, 15, 3})
    append(expected, col);
  for (uint16_t lane = 8; lane < 32; ++lane) append(expected, 8 + lane % 8);
  std::array<std::array<int8_t, 4>, 32> steps{};
  const std::array<int8_t, 8> second = {-1, 1, 0, -2, 0, -1, -1, 4};
  for (size_t lane = 0; lane < second.size(); ++lane) steps[lane][1] = second[lane];
  for (const auto& lane : steps) {
    for (const int8_t step : lane) expected.push_back(static_cast<uint8_t>(step));
  }
  std::array<std::array<uint16_t, 4>, 32> values{};
  values[1][0] = 0x3C00;
  values[3][0] = 0x7E01;
  values[7][0] = 0xC200;
  for (const auto& lane : values) {
    for (const uint16_t value : lane) append(expected, value);
  }

  Packed packed = pack_gather(dense);
  const std::array<int64_t, kPackedHeaderInts> header = {kPackedMagic, 1, 4, 1, 2, 16, 3, 120};
  EXPECT_EQ(packed.header.to_ints(), header);
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 30}));
  EXPECT_EQ(std::vector<uint8_t>(bytes_of(packed), bytes_of(packed) + 480), expected);
}

// The quads of a weight of one slice.
int quads_of(Packed& packed) {
  uint16_t quads;
  std::memcpy(&quads, bytes_of(packed) + 16, sizeof(quads));
  return quads;
}

TEST(PackGather, FillersBridgeGapsThatAStepCannotCross) {
  // Run 3 of a row of five nonzeros has two of them.
  for (const auto& [gap, quads] : {std::pair{127, 1}, std::pair{128, 1}, std::pair{2000, 5}}) {
    DenseMatrix dense = zeros(1, 8192 + 5);
    for (const int64_t col : {0, 1, 2, 100, 100 + gap}) dense.at(0, col) = kHalfOne;
    dense.at(0, 8192 + 4) = kHalfOne;  // in a tile of five columns
    Packed packed = pack_gather(dense);
    ASSERT_TRUE(check(packed).ok()) << check(packed).message;
    EXPECT_EQ(quads_of(packed), quads) << gap;
    EXPECT_EQ(unpack(packed, serial_for), dense.values);
  }
}

// Rows of many densities in two tile rows and two tile columns, against the bytes that the first
// packer of the format wrote (FNV-1a).
TEST(PackGather, TheOrderIsThatOfTheFirstPacker) {
  DenseMatrix dense = zeros(520, 9000);
  std::mt19937 rng(1);
  constexpr std::array<uint32_t, 8> kOneOf = {1, 2, 3, 5, 10, 30, 200, 4000};
  for (int64_t row = 0; row < 520; row += 9) {
    for (int64_t col = 0; col < 9000; ++col) {
      const bool stored = rng() % kOneOf[static_cast<size_t>(row % 8)] == 0;
      dense.at(row, col) = stored ? static_cast<uint16_t>(1 + rng() % 0x7BFF) : uint16_t{0};
    }
  }
  Packed packed = pack_gather(dense);
  uint64_t hash = 0xCBF29CE484222325U;
  for (size_t i = 0; i < packed.payload.size() * 4; ++i) {
    hash = (hash ^ bytes_of(packed)[i]) * 0x100000001B3U;
  }
  EXPECT_EQ(packed.offsets.back(), 37424);
  EXPECT_EQ(hash, 6166473892201592088U);
}

TEST(PackGather, LanesThatLoadTogetherHaveDifferentClasses) {
  DenseMatrix dense = zeros(8, 4096);
  std::mt19937 rng(1);
  for (uint16_t& value : dense.values) value = rng() % 5 == 0 ? kHalfOne : 0;
  Packed packed = pack_gather(dense);
  const uint8_t* at = bytes_of(packed) + 32;
  int wavefronts = 0, steps = 0;
  std::array<int, kGatherLanes> cols{};
  for (int quad = 0; quad < quads_of(packed); ++quad) {
    if (quad % kGatherSegmentQuads == 0) {
      for (size_t lane = 0; lane < kGatherLanes; ++lane)
        cols[lane] = at[2 * lane] | at[2 * lane + 1] << 8;
      at += kGatherHeadBytes;
    }
    for (size_t i = 0; i < kGatherQuadSteps; ++i, ++steps) {
      for (size_t phase = 0; phase < 4; ++phase) {
        std::array<int, 8> lanes{};
        for (size_t lane = 8 * phase; lane < 8 * phase + 8; ++lane) {
          cols[lane] += static_cast<int8_t>(at[4 * lane + i]);
          ++lanes[static_cast<size_t>(cols[lane] % 8)];
        }
        wavefronts += *std::max_element(lanes.begin(), lanes.end());
      }
    }
    at += kGatherQuadBytes;
  }
  // 4 without conflicts; 10.2 in the order of columns.
  EXPECT_LT(wavefronts, 4.6 * steps);
}

class MalformedGather : public ::testing::Test {
 protected:
  Packed good_ = pack_gather(random_patterns(12, 300, 0.8, 3));
  // Two slices: rows take 32 bytes, quads 16. Then follow the first slice's segments.
  static constexpr size_t kQuads = 32, kFirstColumns = 48;
  static constexpr size_t kSteps = kFirstColumns + kGatherHeadBytes;
  static constexpr size_t kValues = kSteps + kGatherLanes * kGatherQuadSteps;

  void set(size_t byte, uint16_t value) { std::memcpy(bytes_of(good_) + byte, &value, 2); }
  uint16_t get(size_t byte) {
    uint16_t value;
    std::memcpy(&value, bytes_of(good_) + byte, 2);
    return value;
  }
  // The first value that is not zero.
  size_t stored() {
    size_t at = kValues;
    while (get(at) == 0) at += 2;
    return at;
  }
  void expect_refused(std::initializer_list<std::string> parts) {
    ASSERT_FALSE(check(good_).ok());
    EXPECT_TRUE(mentions(check(good_).message, parts)) << check(good_).message;
    unpack(good_, serial_for);  // does not read or write outside
  }
};

TEST_F(MalformedGather, RowThatOccursTwice) {
  set(0, get(2));
  expect_refused({"tile 0", "row " + std::to_string(get(2)), "position 1"});
}

TEST_F(MalformedGather, RowOutsideTheTile) {
  set(2, 16);
  expect_refused({"tile 0", "row 16", "position 1"});
}

TEST_F(MalformedGather, PaddingOfTheQuads) {
  set(kQuads + 4, 1);
  expect_refused({"tile 0", "quads"});
}

TEST_F(MalformedGather, QuadsThatAreNotThere) {
  set(kQuads + 2, get(kQuads + 2) + 1);
  expect_refused({"tile 0", "quads"});
  set(kQuads, 0xFFFF);
  expect_refused({"tile 0", "quads"});
}

TEST_F(MalformedGather, ColumnOutsideTheMatrix) {
  set(kFirstColumns, 300);
  expect_refused({"tile 0", "column 300"});
}

TEST_F(MalformedGather, FirstStepThatIsNotZero) {
  bytes_of(good_)[kSteps] = 1;
  expect_refused({"tile 0", "segment"});
}

TEST_F(MalformedGather, NegativeZero) {
  set(stored(), 0x8000);
  expect_refused({"tile 0", "row ", "column ", "-0"});
}

TEST_F(MalformedGather, AnElementThatOccursTwice) {
  // The lane stands still, so its second step stores the same element again.
  const size_t lane = (stored() - kValues) / 8;
  for (size_t i = 0; i < kGatherQuadSteps; ++i) {
    bytes_of(good_)[kSteps + lane * 4 + i] = 0;
    set(kValues + (lane * 4 + i) * 2, kHalfOne);
  }
  expect_refused({"tile 0", "row ", "column ", "twice"});
}

}  // namespace
}  // namespace flash_llm::testing
