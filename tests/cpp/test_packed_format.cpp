// What holds for every packed format: the table, the header, round trips, and the checks that do
// not read the contents of a tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/cpu_isa.h"
#include "format/packed_format.h"
#include "format/packed_header.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

constexpr Format kFormats[] = {Format::kTiledCsl, Format::kBitmap, Format::kRowBitmap,
                               Format::kGather};

std::string name_of(Format format) { return packed_format(format).name; }

TEST(Formats, EachHasARowAndANameOfItsOwn) {
  std::set<std::string> names;
  for (const Format format : kFormats) {
    EXPECT_EQ(packed_format(format).id, format);
    EXPECT_TRUE(names.insert(name_of(format)).second) << name_of(format);
    Format parsed{};
    ASSERT_TRUE(parse_format(name_of(format), &parsed).ok());
    EXPECT_EQ(parsed, format);
  }
  Format parsed{};
  EXPECT_TRUE(mentions(parse_format("csr", &parsed).message,
                       {"format ", "auto", "tiled_csl", "bitmap", "row_bitmap", "gather", "csr"}));
}

TEST(Header, MagicSpellsTheName) {
  std::string text;
  for (int byte = 0; byte < 8; ++byte) {
    text += static_cast<char>(static_cast<uint64_t>(kPackedMagic) >> (8 * byte) & 0xFF);
  }
  EXPECT_EQ(text, "FLASHLLM");
}

TEST(Header, RefusesTheWrongNumberOfIntegers) {
  const auto ints = PackedHeader::of(Format::kTiledCsl).to_ints();
  PackedHeader header;
  EXPECT_TRUE(
      mentions(PackedHeader::from_ints(ints.data(), 7, &header).message, {"header ", "8", "7"}));
  EXPECT_TRUE(PackedHeader::from_ints(ints.data(), 8, &header).ok());
}

TEST(Header, ReadsWhatItWrites) {
  for (const Format format : kFormats) {
    PackedHeader header = PackedHeader::of(format);
    header.value_type = ValueType::kBfloat16;
    header.m = 5;
    header.k = 6;
    header.nnz = 7;
    header.payload_words = 8;
    const auto ints = header.to_ints();
    PackedHeader back;
    ASSERT_TRUE(PackedHeader::from_ints(ints.data(), 8, &back).ok());
    EXPECT_EQ(back.to_ints(), ints);
  }
}

TEST(Header, EveryVersionUpToTheNewestIsReadAndNoOther) {
  const std::pair<Format, int64_t> newest_of[] = {
      {Format::kTiledCsl, 1}, {Format::kBitmap, 2}, {Format::kRowBitmap, 1}, {Format::kGather, 1}};
  for (const auto& [format, newest] : newest_of) {
    PackedHeader header = PackedHeader::of(format), back;
    EXPECT_EQ(header.version, newest);
    for (int64_t version = 1; version <= newest; ++version) {
      header.version = version;
      const auto ints = header.to_ints();
      EXPECT_TRUE(PackedHeader::from_ints(ints.data(), 8, &back).ok());
      EXPECT_EQ(back.version, version);
    }
    for (const int64_t version : {int64_t{-1}, int64_t{0}, newest + 1, INT64_MAX, INT64_MIN}) {
      header.version = version;
      const auto ints = header.to_ints();
      const Status status = PackedHeader::from_ints(ints.data(), 8, &back);
      EXPECT_EQ(status.code, StatusCode::kUnsupported);
      EXPECT_TRUE(mentions(status.message, {"version " + std::to_string(version), "version",
                                            std::to_string(newest)}))
          << status.message;
    }
  }
}

using Shape = std::pair<int64_t, int64_t>;  // M, K

class RoundTrip : public ::testing::TestWithParam<std::tuple<Format, Shape, double>> {};

TEST_P(RoundTrip, KeepsEveryPatternAndDropsSignedZeros) {
  const auto [format, shape, sparsity] = GetParam();
  const auto [m, k] = shape;
  const Packed contiguous = pack_or_die(random_patterns(m, k, sparsity, 7), format);
  for (const int64_t row_gap : {int64_t{0}, int64_t{3}}) {
    const DenseMatrix dense = random_patterns(m, k, sparsity, 7, row_gap);
    const Packed packed = pack_or_die(dense, format);
    const Status status = check(packed);
    ASSERT_TRUE(status.ok()) << status.message;
    EXPECT_EQ(packed.payload, contiguous.payload) << "the row stride shows in the bytes";
    const std::vector<uint16_t> back = unpack(packed, serial_for);
    int64_t nnz = 0;
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t col = 0; col < k; ++col) {
        const uint16_t value = dense.at(row, col);
        const uint16_t expected = is_zero_pattern(value) ? uint16_t{0} : value;
        nnz += expected != 0;
        ASSERT_EQ(back[static_cast<size_t>(row * k + col)], expected) << row << ", " << col;
      }
    }
    EXPECT_EQ(packed.header.nnz, nnz);

    Packed threaded;
    ASSERT_TRUE(pack(dense, format, threaded_for, &threaded).ok());
    EXPECT_EQ(threaded.offsets, packed.offsets);
    EXPECT_EQ(threaded.payload, packed.payload);
    EXPECT_EQ(threaded.header.nnz, nnz);
    EXPECT_EQ(unpack(packed, threaded_for), back);
    EXPECT_TRUE(check(packed, threaded_for).ok());
  }
}

INSTANTIATE_TEST_SUITE_P(
    AwkwardShapes, RoundTrip,
    ::testing::Combine(::testing::ValuesIn(kFormats),
                       ::testing::Values(Shape{0, 0}, Shape{0, 5}, Shape{5, 0}, Shape{1, 1},
                                         Shape{1, 64}, Shape{16, 64}, Shape{17, 65}, Shape{31, 127},
                                         Shape{32, 128}, Shape{33, 129}, Shape{128, 1},
                                         Shape{128, 64}, Shape{127, 63}, Shape{129, 65},
                                         Shape{300, 200}, Shape{3, 1000}, Shape{40, 256},
                                         Shape{545, 257}, Shape{530, 640}),
                       ::testing::Values(0.0, 0.1, 0.5, 0.9, 1.0)));

// The matrix changes after it was counted and before it is packed, as if another thread wrote to
// it.
class Changed : public ::testing::TestWithParam<std::tuple<Format, CpuIsa>> {
 protected:
  void SetUp() override {
    const CpuIsa isa = std::get<1>(GetParam());
    if (!has_cpu_isa(isa)) GTEST_SKIP() << "this CPU has no " << cpu_isa_name(isa);
    ASSERT_TRUE(force_cpu_isa(cpu_isa_name(isa)).ok());
  }
  void TearDown() override { ASSERT_TRUE(force_cpu_isa("").ok()); }

  // Packs `after` with the counts of `before` and returns the status. Checks that nothing outside
  // the payload is written, and that the weight is valid if the status is success.
  static StatusCode pack_changed(const DenseMatrix& before, const DenseMatrix& after) {
    constexpr uint32_t kGuard = 0xDEADBEEF;
    constexpr size_t kGuardWords = 4096;
    Packed packed;
    EXPECT_TRUE(count(before, std::get<0>(GetParam()), serial_for, &packed).ok());
    const size_t words = packed.payload.size();
    packed.payload.insert(packed.payload.begin(), kGuardWords, kGuard);
    packed.payload.insert(packed.payload.end(), kGuardWords, kGuard);
    const Status status =
        packed.format().pack(after.values.data(), after.ld, after.m, after.k, packed.offsets.data(),
                             packed.header.nnz, serial_for, packed.payload.data() + kGuardWords);
    const auto begin = packed.payload.begin(), values = begin + kGuardWords;
    const auto values_end = values + static_cast<std::ptrdiff_t>(words);
    EXPECT_EQ(std::count(begin, values, kGuard), kGuardWords) << "written before the payload";
    EXPECT_EQ(std::count(values_end, packed.payload.end(), kGuard), kGuardWords)
        << "written behind the payload";
    packed.payload = std::vector<uint32_t>(values, values_end);
    if (status.ok()) {
      EXPECT_TRUE(check(packed).ok()) << "accepted, but is no valid weight";
    } else {
      EXPECT_TRUE(mentions(status.message, {"dense"})) << status.message;
    }
    return status.code;
  }
};

TEST_P(Changed, WritesStayWithinWhatWasCounted) {
  for (const auto& [m, k] : {Shape{1, 1}, Shape{4, 32}, Shape{37, 300}, Shape{130, 600}}) {
    for (const double sparsity : {0.0, 0.3, 0.75, 0.9, 0.99}) {
      const DenseMatrix before = random_patterns(m, k, sparsity, 5);
      for (const double later : {0.0, 0.5, 0.85, 1.0}) {
        const DenseMatrix after = random_patterns(m, k, later, 6);
        pack_changed(before, after);
      }
      EXPECT_EQ(pack_changed(before, before), StatusCode::kOk);
    }
    const DenseMatrix full = random_patterns(m, k, 0.0, 5);
    EXPECT_EQ(pack_changed(full, zeros(m, k)), StatusCode::kRuntime);
    EXPECT_EQ(pack_changed(random_patterns(m, k, 0.5, 5), full),
              m * k > 1 ? StatusCode::kRuntime : StatusCode::kOk);
  }
}

TEST_P(Changed, OneElementMoreOrLessIsSeen) {
  for (const double sparsity : {0.1, 0.5, 0.9}) {
    DenseMatrix before = random_patterns(66, 290, sparsity, 5);
    for (int64_t row = 0; row < before.m; ++row) before.at(row, 0) = kHalfOne;  // no tile is empty
    std::mt19937 rng(1);
    for (int i = 0; i < 200; ++i) {
      DenseMatrix after = before;
      uint16_t& value = after.values[rng() % after.values.size()];
      value = is_zero_pattern(value) ? kHalfOne : uint16_t{0x8000};
      EXPECT_EQ(pack_changed(before, after), StatusCode::kRuntime);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Packers, Changed,
                         ::testing::Values(std::tuple{Format::kTiledCsl, CpuIsa::kPortable},
                                           std::tuple{Format::kBitmap, CpuIsa::kPortable},
                                           std::tuple{Format::kGather, CpuIsa::kPortable},
                                           std::tuple{Format::kRowBitmap, CpuIsa::kPortable},
                                           std::tuple{Format::kRowBitmap, CpuIsa::kAvx2},
                                           std::tuple{Format::kRowBitmap, CpuIsa::kAvx512}));

// Each test breaks one thing in a weight that is valid otherwise.
class Malformed : public ::testing::TestWithParam<Format> {
 protected:
  Packed good_ = pack_or_die(random_patterns(1100, 150, 0.7, 3), GetParam());

  void SetUp() override {
    const Status status = check(good_);
    ASSERT_TRUE(status.ok()) << status.message;
  }

  static void expect_refused(const Packed& packed, StatusCode code,
                             std::initializer_list<std::string> parts) {
    const Status status = check(packed);
    EXPECT_EQ(static_cast<int>(status.code), static_cast<int>(code)) << status.message;
    EXPECT_TRUE(mentions(status.message, parts)) << status.message;
  }
};

TEST_P(Malformed, FirstOffset) {
  good_.offsets[0] = 1;
  expect_refused(good_, StatusCode::kInvalidValue, {"offsets[0] ", "1"});
}

TEST_P(Malformed, DecreasingOffsets) {
  good_.offsets[2] = good_.offsets[1] - 1;
  expect_refused(good_, StatusCode::kInvalidValue, {"offsets[1] = ", "offsets[2] = "});
}

TEST_P(Malformed, NegativeOffset) {
  good_.offsets[1] = -5;
  expect_refused(good_, StatusCode::kInvalidValue, {"offsets[0] = 0", "offsets[1] = -5"});
}

TEST_P(Malformed, OffsetsThatEndEarly) {
  // The last tile is missing, which no other check detects.
  good_.offsets.back() = good_.offsets[good_.offsets.size() - 2];
  expect_refused(good_, StatusCode::kInvalidValue, {"offsets "});
}

TEST_P(Malformed, TooFewOffsets) {
  const std::string tiles = std::to_string(good_.offsets.size());
  good_.offsets.pop_back();
  expect_refused(good_, StatusCode::kInvalidValue, {"offsets ", tiles});
}

TEST_P(Malformed, TooManyOffsets) {
  const std::string tiles = std::to_string(good_.offsets.size());
  good_.offsets.push_back(good_.offsets.back());
  expect_refused(good_, StatusCode::kInvalidValue, {"offsets ", tiles});
}

TEST_P(Malformed, TruncatedPayload) {
  good_.payload.resize(good_.payload.size() - static_cast<size_t>(good_.format().unit_words));
  expect_refused(good_, StatusCode::kInvalidValue, {"payload "});
}

TEST_P(Malformed, PayloadThatGoesOn) {
  good_.payload.resize(good_.payload.size() + static_cast<size_t>(good_.format().unit_words));
  expect_refused(good_, StatusCode::kInvalidValue, {"payload "});
}

TEST_P(Malformed, PayloadThatIsNotWholeUnits) {
  good_.payload.push_back(0);
  good_.header.payload_words += 1;
  expect_refused(good_, StatusCode::kInvalidValue,
                 {"payload ", std::to_string(good_.format().unit_words),
                  std::to_string(good_.payload.size())});
}

TEST_P(Malformed, NnzThatIsNotThePayloads) {
  for (const int64_t nnz : {good_.header.nnz - 1, good_.header.nnz + 1, int64_t{0}, INT64_MAX,
                            2 * good_.header.payload_words + 1}) {
    good_.header.nnz = nnz;
    expect_refused(good_, StatusCode::kInvalidValue, {"nnz = " + std::to_string(nnz)});
  }
}

TEST_P(Malformed, HeaderOfAnotherFile) {
  good_.header.magic += 1;
  expect_refused(good_, StatusCode::kInvalidValue, {"magic"});
}

TEST_P(Malformed, NewerVersion) {
  const int64_t newer = packed_format(GetParam()).version + 1;
  good_.header.version = newer;
  expect_refused(good_, StatusCode::kUnsupported, {"version " + std::to_string(newer)});
}

TEST_P(Malformed, UnknownFormat) {
  good_.header.format = static_cast<Format>(77);
  expect_refused(good_, StatusCode::kUnsupported, {"format 77"});
}

TEST_P(Malformed, FormatOfAnotherWeight) {
  for (const Format format : kFormats) {
    if (format == GetParam()) continue;
    good_.header.format = format;
    good_.header.version = packed_format(format).version;
    expect_refused(good_, StatusCode::kInvalidValue, {"offsets "});
  }
}

TEST_P(Malformed, UnknownValueType) {
  good_.header.value_type = static_cast<ValueType>(0);
  expect_refused(good_, StatusCode::kInvalidType, {"value type 0"});
}

TEST_P(Malformed, ShapesOutOfRange) {
  for (int64_t PackedHeader::*field :
       {&PackedHeader::m, &PackedHeader::k, &PackedHeader::nnz, &PackedHeader::payload_words}) {
    Packed packed = good_;
    packed.header.*field = -1;
    expect_refused(packed, StatusCode::kInvalidValue, {"-1"});
  }
  for (int64_t PackedHeader::*field : {&PackedHeader::m, &PackedHeader::k}) {
    Packed packed = good_;
    packed.header.*field = int64_t{1} << 31;
    expect_refused(packed, StatusCode::kInvalidValue, {"2147483648"});
  }
}

TEST_P(Malformed, ShapeOfAnotherWeight) {
  good_.header.m = 300;
  const int64_t tiles = good_.format().tiles(300, 150);
  expect_refused(good_, StatusCode::kInvalidValue,
                 {"offsets ", std::to_string(tiles + 1), "300x150"});
}

// These checks read no buffer, so sizes that no test can allocate are tested too.
TEST_P(Malformed, PayloadBeyondWhatOffsetsCanAddress) {
  PackedHeader header = PackedHeader::of(GetParam());
  header.m = header.k = INT32_MAX;
  const PackedFormat& format = packed_format(header.format);
  const int64_t num_offsets = format.tiles(header.m, header.k) + 1;
  header.payload_words = int64_t{INT32_MAX} * format.unit_words;
  header.nnz = header.payload_words;
  const Status largest = format.check_sizes(header, num_offsets, header.payload_words);
  EXPECT_TRUE(largest.ok()) << largest.message;
  header.payload_words += format.unit_words;
  EXPECT_TRUE(mentions(format.check_sizes(header, num_offsets, header.payload_words).message,
                       {"payload ", std::to_string(header.payload_words)}));
}

INSTANTIATE_TEST_SUITE_P(Formats, Malformed, ::testing::ValuesIn(kFormats),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace flash_llm::testing
