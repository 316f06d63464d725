// What holds for every packed format: the table, the header, round trips, and the checks that do
// not read the contents of a tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/cpu_isa.h"
#include "format/element.h"
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
  const std::pair<Format, int64_t> newest_of[] = {{Format::kTiledCsl, 1},
                                                  {Format::kBitmap, 2},
                                                  {Format::kRowBitmap, 1},
                                                  {Format::kGather, 1},
                                                  {Format::kQuantizedBitmap, 1}};
  for (const auto& [format, newest] : newest_of) {
    PackedHeader header = PackedHeader::of(format), back;
    header.value_type = packed_format(format).value_types.first();
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

// The formats and types of quantised values.
using QuantizedType = std::tuple<Format, ValueType>;

const std::vector<QuantizedType> kQuantized = [] {
  std::vector<QuantizedType> found;
  for (const Format format : {Format::kRowBitmap, Format::kQuantizedBitmap}) {
    for (const ValueType type : kValueTypes) {
      if (is_quantized(type) && packed_format(format).value_types.contains(type)) {
        found.emplace_back(format, type);
      }
    }
  }
  return found;
}();

class Quantized : public ::testing::TestWithParam<QuantizedType> {
 protected:
  const Format format_ = std::get<0>(GetParam());
  const ValueType type_ = std::get<1>(GetParam());
};

TEST_P(Quantized, KeepsValuesAndScales) {
  for (const auto& [m, k] :
       {Shape{0, 5}, Shape{5, 0}, Shape{1, 1}, Shape{3, 31}, Shape{4, 32}, Shape{37, 33},
        Shape{17, 256}, Shape{33, 257}, Shape{16, 512}, Shape{130, 600}}) {
    for (const double sparsity : {0.0, 0.5, 0.9, 1.0}) {
      const QuantizedMatrix dense = random_quantized(type_, m, k, sparsity, 7, 3);
      const Packed packed = pack_or_die(dense, format_, type_);
      const Status status = check(packed);
      ASSERT_TRUE(status.ok()) << status.message;
      const QuantizedMatrix back = unpack_quantized(packed, serial_for);
      int64_t nnz = 0;
      for (int64_t row = 0; row < m; ++row) {
        std::vector<float> scales(static_cast<size_t>(scales_per_row(type_, k)), 1.0F);
        const auto of_row = static_cast<size_t>(row) * scales.size();
        for (int64_t col = 0; col < k; ++col) {
          ASSERT_EQ(back.at(row, col), dense.at(row, col)) << row << ", " << col;
          const auto group = static_cast<size_t>(scale_group(type_, col));
          if (dense.at(row, col) != 0) scales[group] = dense.scales[of_row + group];
          nnz += dense.at(row, col) != 0;
        }
        for (size_t i = 0; i < scales.size(); ++i) {
          EXPECT_EQ(back.scales[of_row + i], scales[i]) << row << ", " << i;
        }
      }
      EXPECT_EQ(packed.header.nnz, nnz);
      Packed threaded;
      ASSERT_TRUE(pack(dense, format_, threaded_for, &threaded, type_).ok());
      EXPECT_EQ(threaded.offsets, packed.offsets);
      EXPECT_EQ(threaded.payload, packed.payload);
      EXPECT_EQ(unpack(packed, threaded_for), unpack(packed, serial_for));
      EXPECT_TRUE(check(packed, threaded_for).ok());
    }
  }
}

// All values times scales at both ends of the range of the 16-bit type and in between.
TEST_P(Quantized, ElementsAreTheRoundedProducts) {
  const bool half = value_traits(type_).dense == ValueType::kFloat16;
  const std::vector<uint8_t> values = nonzero_values(type_);
  const auto k = static_cast<int64_t>(values.size());
  QuantizedMatrix dense{0, k, k, {}, {}};
  std::vector<float> scales = {1.0F, 1.0F / 127, 0.007F, 3e-8F, 600.0F, 1e-38F, 1e36F};
  if (scale_bytes(type_) == 2) scales = {1.0F, 0x1.24p-3F, 0x1p-14F, 65504.0F};
  for (const float scale : scales) {
    dense.scales.insert(dense.scales.end(), static_cast<size_t>(scales_per_row(type_, k)), scale);
    ++dense.m;
    dense.values.insert(dense.values.end(), values.begin(), values.end());
  }
  const std::vector<uint16_t> elements = unpack(pack_or_die(dense, format_, type_), serial_for);
  for (size_t i = 0; i < elements.size(); ++i) {
    // With -ffp-contract=off or without, this is one product in fp32.
    const float product =
        value_of(type_, dense.values[i]) * scales[i / static_cast<size_t>(dense.k)];
    ASSERT_EQ(elements[i], half ? from_float<ValueType::kFloat16>(product)
                                : from_float<ValueType::kBfloat16>(product))
        << i;
  }
}

TEST_P(Quantized, WritesStayWithinWhatWasCounted) {
  for (const double later : {0.0, 0.5, 1.0}) {
    Packed packed;
    ASSERT_TRUE(
        count(random_quantized(type_, 37, 300, 0.5, 5), format_, serial_for, &packed, type_).ok());
    // The sanitizers see a write behind the payload.
    const Status status = fill(random_quantized(type_, 37, 300, later, 6), serial_for, &packed);
    EXPECT_EQ(status.code, StatusCode::kRuntime);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Quantized, ::testing::ValuesIn(kQuantized));

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
        packed.format().pack(after.matrix(ValueType::kFloat16), packed.offsets.data(),
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
    for (int i = 0; i < 50; ++i) {
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
  const int64_t tiles = good_.format().tiles(good_.header.value_type, 300, 150);
  expect_refused(good_, StatusCode::kInvalidValue,
                 {"offsets ", std::to_string(tiles + 1), "300x150"});
}

TEST_P(Malformed, ValueTypeThatTheFormatDoesNotHold) {
  for (const ValueType type : kValueTypes) {
    if (packed_format(GetParam()).value_types.contains(type)) continue;
    good_.header.value_type = type;
    expect_refused(good_, StatusCode::kInvalidType,
                   {name_of(GetParam()), value_traits(type).values});
  }
}

// These checks read no buffer, so sizes that no test can allocate are tested too.
TEST_P(Malformed, PayloadBeyondWhatOffsetsCanAddress) {
  PackedHeader header = PackedHeader::of(GetParam());
  header.m = header.k = INT32_MAX;
  const PackedFormat& format = packed_format(header.format);
  const int64_t num_offsets = format.tiles(header.value_type, header.m, header.k) + 1;
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

// Row bitmap of int8 values: one block of rows 0 and 1 of 5 columns, written by hand.
class Int8Block : public ::testing::Test {
 protected:
  static constexpr size_t kScales = 1, kMasks = 5, kValues = 9;
  QuantizedMatrix dense_{2, 5, 5, {0, 3, 0x81, 0, 0, 0, 0, 0, 0, 0}, {0.5F, 7.0F}};
  Packed packed_ = pack_or_die(dense_, Format::kRowBitmap, ValueType::kInt8Bfloat16);

  void expect_refused(size_t word, uint32_t bits, std::initializer_list<std::string> parts) {
    Packed packed = packed_;
    packed.payload[word] = bits;
    const Status status = check(packed);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue);
    EXPECT_TRUE(mentions(status.message, parts)) << status.message;
  }
};

TEST_F(Int8Block, GoldenBytes) {
  EXPECT_EQ(packed_.header.to_ints(), (std::array<int64_t, 8>{kPackedMagic, 1, 3, 4, 2, 5, 2, 12}));
  EXPECT_EQ(packed_.offsets, (std::vector<int32_t>{0, 3}));
  // Word 0, four scales (the rows without values have 1), four masks, two values, padding.
  EXPECT_EQ(packed_.payload,
            (std::vector<uint32_t>{0, 0x3F000000, 0x3F800000, 0x3F800000, 0x3F800000, 0b00110, 0, 0,
                                   0, 0x00008103, 0, 0}));
  EXPECT_EQ(unpack(packed_, serial_for),
            (std::vector<uint16_t>{0, 0x3FC0, 0xC27E, 0, 0, 0, 0, 0, 0, 0}));
}

TEST_F(Int8Block, RefusesScalesThatAreNoPositiveNormalNumbers) {
  // 0, -0.5, the largest subnormal, infinity, NaN.
  for (const uint32_t bits : {0U, 0xBF000000U, 0x007FFFFFU, 0x7F800000U, 0x7FC00000U}) {
    expect_refused(kScales, bits, {"block 0", "row 0", "scale"});
  }
  expect_refused(kScales + 1, 0x3F000000, {"block 0", "row 1", "scale", "1", "0.5"});
  expect_refused(kScales + 3, 0, {"block 0", "row 3", "scale", "1"});
}

TEST_F(Int8Block, RefusesValuesOutsideTheGrid) {
  expect_refused(kValues, 0x00008003, {"block 0", "value 1", "-128"});
  expect_refused(kValues, 0x00008100, {"block 0", "value 0", "zero"});
  expect_refused(kValues, 0x01008103, {"block 0"});  // padding
  expect_refused(0, 1, {"block 0", "word 0"});
  expect_refused(kMasks, 0b100110, {"block 0", "outside"});
}

// int4 values in the row bitmap: two rows of 131 columns, written by hand. Row 0 has three values
// in group 0, whose nibbles end in half a byte, and one in group 4, of the second group of scales.
TEST(PackRowBitmap, GoldenBytesOfInt4) {
  QuantizedMatrix dense{2, 131, 131, std::vector<uint8_t>(2 * 131, 0), {0.5F, 2.0F, 0.25F, 4.0F}};
  dense.at(0, 0) = 7;
  dense.at(0, 3) = 0xF9;  // -7
  dense.at(0, 31) = 1;
  dense.at(0, 130) = 0xFF;  // -1
  dense.at(1, 1) = 2;
  const Packed packed = pack_or_die(dense, Format::kRowBitmap, ValueType::kInt4Float16);
  EXPECT_EQ(packed.header.to_ints(),
            (std::array<int64_t, 8>{kPackedMagic, 1, 3, 7, 2, 131, 5, 28}));
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 7}));
  // Word 0; scales of columns 0 ... 127 and then 128 ... 130 of the four rows; masks; values.
  std::vector<uint32_t> expected = {0, 0x34003800, 0x3C003C00, 0x3C004000, 0x3C003C00};
  std::vector<uint32_t> masks(20, 0);
  masks[0] = 0x80000009;
  masks[1] = 2;
  masks[16] = 4;
  expected.insert(expected.end(), masks.begin(), masks.end());
  expected.insert(expected.end(), {0x070A091F, 0, 0});
  EXPECT_EQ(packed.payload, expected);

  Packed half = packed;  // a nibble behind an odd number of them
  half.payload[25] |= 0x00001000;
  EXPECT_TRUE(mentions(check(half).message, {"block 0", "nibble", "value 2"}));
  half.payload[25] = 0x070A0910;
  EXPECT_TRUE(mentions(check(half).message, {"block 0", "value 0", "-8"}));
  half.payload[25] = 0x070A091F;
  half.payload[1] = 0x34000200;  // a subnormal scale
  EXPECT_TRUE(mentions(check(half).message, {"block 0", "row 0", "scale"}));
}

// fp8 values are the numbers' bytes.
TEST(PackRowBitmap, GoldenBytesOfFp8) {
  const QuantizedMatrix dense{1, 3, 3, {0x80, 0xFE, 0x01}, {0.5F}};  // -0, -448, 2^-9
  const Packed packed = pack_or_die(dense, Format::kRowBitmap, ValueType::kFp8Bfloat16);
  EXPECT_EQ(packed.payload, (std::vector<uint32_t>{0, 0x3F000000, 0x3F800000, 0x3F800000,
                                                   0x3F800000, 0b110, 0, 0, 0, 0x000001FE, 0, 0}));
  Packed nan = packed;
  nan.payload[9] = 0x00007FFE;
  EXPECT_TRUE(mentions(check(nan).message, {"block 0", "value 1", "NaN"}));
}

// 9 x 131 with four values, computed by hand. Lane 0 has all of them: 3, -127 and 7 (row 8) are its
// upward run in column 0, 5 its downward run, which goes on top of the shortest upward run: that of
// lane 1. The other lanes have empty runs, whose columns follow from their order.
TEST(PackQuantizedBitmap, GoldenBytes) {
  QuantizedMatrix dense{9, 131, 131, std::vector<uint8_t>(size_t{9} * 131, 0), {}};
  dense.scales.assign(9, 0.25F);  // that of rows without values becomes 1
  dense.scales[0] = 0.5F;
  dense.scales[8] = 2.0F;
  dense.at(0, 1) = 3;
  dense.at(0, 2) = 0x81;
  dense.at(8, 1) = 7;
  dense.at(0, 130) = 5;
  std::vector<uint32_t> expected(16, 0x3F800000);  // scales
  expected[0] = 0x3F000000;
  expected[8] = 0x40000000;
  std::vector<uint32_t> values(32, 0), bits(128, 0);
  values[0] = 0x00870183;
  values[1] = 0x85000000;
  bits[0] = 1U << 4 | 1U << 8 | 1U << 20;
  bits[64] = 1U << 8;  // word 2 of lane 0
  expected.insert(expected.end(), values.begin(), values.end());
  expected.insert(expected.end(), bits.begin(), bits.end());
  for (uint32_t lane = 0; lane < 32; lane += 4) {  // a byte for each lane
    uint32_t word = 0;
    for (uint32_t i = 0; i < 4; ++i) word |= 4 * ((33 - lane - i) % 32) << 8 * i;
    expected.push_back(word);
  }

  const Packed packed = pack_or_die(dense, Format::kQuantizedBitmap, ValueType::kInt8Float16);
  EXPECT_EQ(packed.header.to_ints(),
            (std::array<int64_t, 8>{kPackedMagic, 1, 5, 3, 9, 131, 4, 184}));
  EXPECT_EQ(packed.offsets, (std::vector<int32_t>{0, 23}));
  EXPECT_EQ(packed.payload, expected);
}

// The same values as int4, twice: in both planes of a chunk.
TEST(PackQuantizedBitmap, GoldenBytesOfInt4) {
  QuantizedMatrix dense{9, 387, 387, std::vector<uint8_t>(9 * 387, 0), {}};
  dense.scales.assign(9 * 4, 0.25F);
  for (const int64_t plane : {0, 256}) {
    dense.at(0, plane + 1) = 3;
    dense.at(0, plane + 2) = 0xF9;  // -7
    dense.at(8, plane + 1) = 7;
    dense.at(0, plane + 130) = plane == 0 ? 5 : 6;
  }
  std::vector<uint32_t> expected(32, 0x3C003C00);  // scales of 4 groups of columns, 16 rows each
  for (size_t group = 0; group < 4; ++group) {
    expected[8 * group] = 0x3C003400;                          // row 0
    if (group % 2 == 0) expected[8 * group + 4] = 0x3C003400;  // row 8
  }
  std::vector<uint32_t> values(32, 0), bits(128, 0);
  values[0] = 0x00FF11BB;
  values[1] = 0xED000000;
  bits[0] = 1U << 4 | 1U << 8 | 1U << 20;
  bits[2 * 32] = 1U << 8;
  expected.insert(expected.end(), values.begin(), values.end());
  for (int plane = 0; plane < 2; ++plane) {
    expected.insert(expected.end(), bits.begin(), bits.end());
  }
  for (uint32_t lane = 0; lane < 64; lane += 4) {  // a byte for each lane of both planes
    uint32_t word = 0;
    for (uint32_t i = 0; i < 4; ++i) word |= 4 * ((33 - lane % 32 - i) % 32) << 8 * i;
    expected.push_back(word);
  }
  const Packed packed = pack_or_die(dense, Format::kQuantizedBitmap, ValueType::kInt4Bfloat16);
  EXPECT_EQ(packed.header.to_ints(),
            (std::array<int64_t, 8>{kPackedMagic, 1, 5, 8, 9, 387, 8, 336}));
  EXPECT_EQ(packed.payload, expected);
}

}  // namespace
}  // namespace flash_llm::testing
