// The CPU kernels: the reference, for every format, and the fast kernels against a naive product of
// the dense matrix; all of them against exact integers; and the conversions that they use.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "base/cpu_isa.h"
#include "cpu/spmm.h"
#include "format/element.h"
#include "plan/cpu.h"
#include "plan/problem.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

constexpr uint16_t kPoison = 0x7E55;  // a NaN that no kernel writes

float to_float_of(uint16_t raw, ValueType type) {
  return type == ValueType::kFloat16 ? to_float<ValueType::kFloat16>(raw)
                                     : to_float<ValueType::kBfloat16>(raw);
}

uint16_t from_float_of(float value, ValueType type) {
  return type == ValueType::kFloat16 ? from_float<ValueType::kFloat16>(value)
                                     : from_float<ValueType::kBfloat16>(value);
}

// The value of a pattern, by the definition of fp16 and bf16.
double pattern_value(uint16_t raw, ValueType type) {
  const int mantissa_bits = type == ValueType::kFloat16 ? 10 : 7;
  const int bias = type == ValueType::kFloat16 ? 15 : 127;
  const int max_exponent = type == ValueType::kFloat16 ? 31 : 255;
  const int exponent = (raw & 0x7FFF) >> mantissa_bits;
  const int mantissa = raw & ((1 << mantissa_bits) - 1);
  const double sign = raw & 0x8000 ? -1.0 : 1.0;
  if (exponent == max_exponent) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

class Element : public ::testing::TestWithParam<ValueType> {};

TEST_P(Element, EveryPatternConvertsExactlyAndBack) {
  for (int i = 0; i <= 0xFFFF; ++i) {
    const auto raw = static_cast<uint16_t>(i);
    const double expected = pattern_value(raw, GetParam());
    const float value = to_float_of(raw, GetParam());
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << i;
      ASSERT_TRUE(std::isnan(to_float_of(from_float_of(value, GetParam()), GetParam()))) << i;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected) << i;
      ASSERT_EQ(std::signbit(value), std::signbit(expected)) << i;
      ASSERT_EQ(from_float_of(value, GetParam()), raw) << i;
    }
  }
}

TEST_P(Element, RoundsToNearestTiesToEven) {
  const uint16_t infinity = GetParam() == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
  for (uint16_t raw = 0; raw + 1 < infinity; ++raw) {
    const auto low = to_float_of(raw, GetParam());
    const auto high = to_float_of(static_cast<uint16_t>(raw + 1), GetParam());
    const auto middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    const auto even = static_cast<uint16_t>(raw % 2 == 0 ? raw : raw + 1);
    ASSERT_EQ(from_float_of(middle, GetParam()), even) << raw;
    ASSERT_EQ(from_float_of(-middle, GetParam()), even | 0x8000) << raw;
    ASSERT_EQ(from_float_of(std::nextafter(middle, low), GetParam()), raw);
    ASSERT_EQ(from_float_of(std::nextafter(middle, high), GetParam()), raw + 1);
  }
}

TEST_P(Element, DoublesRoundOnce) {
  // Halfway between two neighbours, and slightly above: rounded to float first, both would round to
  // even.
  const int mantissa_bits = GetParam() == ValueType::kFloat16 ? 10 : 7;
  const double half_ulp = std::ldexp(1.0, -mantissa_bits - 1);
  for (const double sign : {1.0, -1.0}) {
    const auto rounded = [&](double value) {
      return static_cast<double>(
          to_float_of(from_float_of(round_to_odd(sign * value), GetParam()), GetParam()));
    };
    EXPECT_EQ(rounded(1.0 + half_ulp), sign);
    EXPECT_EQ(rounded(1.0 + half_ulp + std::ldexp(1.0, -40)), sign * (1.0 + 2 * half_ulp));
    EXPECT_EQ(rounded(1.0 + 3 * half_ulp - std::ldexp(1.0, -40)), sign * (1.0 + 2 * half_ulp));
    EXPECT_EQ(rounded(1e300), sign * std::numeric_limits<double>::infinity());
    EXPECT_EQ(rounded(1e-300), sign * 0.0);
  }
  EXPECT_TRUE(std::isnan(round_to_odd(std::numeric_limits<double>::quiet_NaN())));
  EXPECT_EQ(round_to_odd(0.5), 0.5F);
}

TEST_P(Element, OverflowGivesInfinity) {
  const uint16_t infinity = GetParam() == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
  const float largest = std::numeric_limits<float>::max();
  EXPECT_EQ(from_float_of(largest, GetParam()), infinity);
  EXPECT_EQ(from_float_of(-largest, GetParam()), infinity | 0x8000);
  if (GetParam() == ValueType::kFloat16) {
    EXPECT_EQ(from_float_of(65519.996F, GetParam()), 0x7BFF);
    EXPECT_EQ(from_float_of(65520.0F, GetParam()), infinity);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Element,
                         ::testing::Values(ValueType::kFloat16, ValueType::kBfloat16));

// A kernel, and a format that it multiplies.
struct Kernel {
  const char* name;
  Format format;
  void (*multiply)(const SpmmArgs&, const ParallelFor&);
};

template <CpuIsa kIsa>
void spmm_cpu_rows_of(const SpmmArgs& args, const ParallelFor& parallel_for) {
  spmm_cpu_row_bitmap(args, kIsa, parallel_for);
}

template <CpuIsa kIsa>
void spmm_cpu_int8x_rows_of(const SpmmArgs& args, const ParallelFor& parallel_for) {
  spmm_cpu_row_bitmap_int8x(args, kIsa, parallel_for);
}

// Of each instruction set that this CPU has, the kernel that quantises X.
const std::vector<Kernel> kInt8X = [] {
  std::vector<Kernel> kernels;
  const auto add = [&](CpuIsa isa, auto* multiply) {
    if (has_cpu_isa(isa)) kernels.push_back({cpu_isa_name(isa), Format::kRowBitmap, multiply});
  };
  add(CpuIsa::kPortable, spmm_cpu_int8x_rows_of<CpuIsa::kPortable>);
  add(CpuIsa::kAvx2, spmm_cpu_int8x_rows_of<CpuIsa::kAvx2>);
  add(CpuIsa::kAvx512, spmm_cpu_int8x_rows_of<CpuIsa::kAvx512>);
  add(CpuIsa::kNeon, spmm_cpu_int8x_rows_of<CpuIsa::kNeon>);
  return kernels;
}();

const Kernel kReference{"reference", Format::kTiledCsl, spmm_cpu_reference};
const Kernel kBitmapReference{"reference, bitmap", Format::kBitmap, spmm_cpu_reference};
const Kernel kRowsReference{"reference, row bitmap", Format::kRowBitmap, spmm_cpu_reference};

// The kernels that sum in fp32, one for each instruction set that this CPU has.
std::vector<Kernel> fast_kernels() {
  std::vector<Kernel> kernels{{"tiles", Format::kTiledCsl, spmm_cpu_tiled_csl}};
  const auto add = [&](CpuIsa isa, auto* multiply) {
    if (has_cpu_isa(isa)) kernels.push_back({cpu_isa_name(isa), Format::kRowBitmap, multiply});
  };
  add(CpuIsa::kPortable, spmm_cpu_rows_of<CpuIsa::kPortable>);
  add(CpuIsa::kAvx2, spmm_cpu_rows_of<CpuIsa::kAvx2>);
  add(CpuIsa::kAvx512, spmm_cpu_rows_of<CpuIsa::kAvx512>);
  add(CpuIsa::kAvx512Bf16, spmm_cpu_rows_of<CpuIsa::kAvx512Bf16>);
  add(CpuIsa::kNeon, spmm_cpu_rows_of<CpuIsa::kNeon>);
  return kernels;
}

const std::vector<Kernel> kFast = fast_kernels();
const std::vector<Kernel> kKernels = [] {
  std::vector<Kernel> kernels = kFast;
  kernels.insert(kernels.end(), {kReference, kBitmapReference, kRowsReference});
  return kernels;
}();

// One product: weight, strided x, optional bias, and the output between guard bands.
struct Product {
  ValueType type = ValueType::kFloat16;
  DenseMatrix weight;
  int64_t n = 0;
  int64_t x_stride = 0;
  std::vector<uint16_t> x;
  std::vector<uint16_t> bias;
  Activation activation = Activation::kNone;

  std::vector<uint16_t> run(const Kernel& kernel,
                            const ParallelFor& parallel_for = serial_for) const {
    return run(kernel, pack_or_die(weight, kernel.format, type), parallel_for);
  }

  std::vector<uint16_t> run(const Kernel& kernel, const Packed& packed,
                            const ParallelFor& parallel_for) const {
    constexpr size_t kGuard = 64;
    const auto elems = static_cast<size_t>(n * weight.m);
    std::vector<uint16_t> y(elems + 2 * kGuard, kPoison);
    SpmmArgs args;
    args.x = x.data();
    args.x_stride = x_stride;
    args.format = packed.header.format;
    args.weight = packed.view();
    args.bias = bias.empty() ? nullptr : bias.data();
    args.y = y.data() + kGuard;
    args.n = n;
    args.activation = activation;
    kernel.multiply(args, parallel_for);
    for (size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(y[i], kPoison) << "wrote before y";
      EXPECT_EQ(y[kGuard + elems + i], kPoison) << "wrote past y";
    }
    return {y.begin() + kGuard, y.begin() + kGuard + static_cast<std::ptrdiff_t>(elems)};
  }

  // The exact sum of one output, bias included, from the dense matrix; with `absolute` that of the
  // absolute values of its terms.
  double exact(int64_t token, int64_t row, bool absolute) const {
    double sum = bias.empty() ? 0.0 : pattern_value(bias[static_cast<size_t>(row)], type);
    if (absolute) sum = std::abs(sum);
    for (int64_t col = 0; col < weight.k; ++col) {
      const double term = pattern_value(weight.at(row, col), type) *
                          pattern_value(x[static_cast<size_t>(token * x_stride + col)], type);
      sum += absolute ? std::abs(term) : term;
    }
    return sum;
  }
};

double activate(double value, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return value;
    case Activation::kRelu:
      return std::max(value, 0.0);
    case Activation::kGelu:
      return 0.5 * value * std::erfc(-value / std::sqrt(2.0));
    case Activation::kSilu:
      return value / (1.0 + std::exp(-value));
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// `integers`: every product and partial sum is an integer that both fp32 and the output type hold.
Product random_product(int64_t m, int64_t n, int64_t k, double sparsity, ValueType type,
                       bool integers, bool with_bias, uint32_t seed) {
  Product product;
  product.type = type;
  product.n = n;
  product.x_stride = k + 5;
  product.weight = random_patterns(m, k, sparsity, seed, 3);
  std::mt19937 rng(seed + 1);
  std::uniform_int_distribution<int> small(1, 3);
  std::uniform_int_distribution<int> coin(0, 1);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  std::uniform_int_distribution<int> one_in_16(0, 15);
  const auto draw = [&](bool rare) {
    if (!integers) return from_float_of(normal(rng), type);
    // bf16 holds all integers up to 256; sparse inputs keep the sums below that.
    if (rare && one_in_16(rng) != 0) return uint16_t{0};
    return from_float_of(static_cast<float>(coin(rng) ? small(rng) : -small(rng)), type);
  };
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t col = 0; col < k; ++col) {
      if (!is_zero_pattern(product.weight.at(row, col))) product.weight.at(row, col) = draw(false);
    }
  }
  // The gaps between the rows of x must not be read, so they are poisoned.
  product.x.assign(static_cast<size_t>(n * product.x_stride), kPoison);
  for (int64_t token = 0; token < n; ++token) {
    for (int64_t col = 0; col < k; ++col) {
      product.x[static_cast<size_t>(token * product.x_stride + col)] = draw(true);
    }
  }
  if (with_bias) {
    for (int64_t row = 0; row < m; ++row) product.bias.push_back(draw(false));
  }
  return product;
}

using Shape = std::tuple<int64_t, int64_t, int64_t>;  // M, N, K

class SpmmCpu : public ::testing::TestWithParam<std::tuple<Shape, double, ValueType>> {
 protected:
  Product make(bool integers, bool with_bias) const {
    const auto& [shape, sparsity, type] = GetParam();
    const auto& [m, n, k] = shape;
    return random_product(m, n, k, sparsity, type, integers, with_bias, 11);
  }
};

TEST_P(SpmmCpu, IntegersAreExact) {
  for (const bool with_bias : {false, true}) {
    const Product product = make(true, with_bias);
    std::vector<uint16_t> expected;
    for (int64_t token = 0; token < product.n; ++token) {
      for (int64_t row = 0; row < product.weight.m; ++row) {
        const double sum = product.exact(token, row, false);
        ASSERT_LE(std::abs(sum), 256.0) << "the inputs of this test must stay exact";
        expected.push_back(from_float_of(static_cast<float>(sum), product.type));
      }
    }
    for (const Kernel& kernel : kKernels) EXPECT_EQ(product.run(kernel), expected) << kernel.name;
  }
}

TEST_P(SpmmCpu, RealsStayWithinRounding) {
  for (const Activation activation :
       {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kSilu}) {
    Product product = make(false, true);
    product.activation = activation;
    const auto reference = product.run(kReference);
    std::vector<std::vector<uint16_t>> fast;
    fast.reserve(kFast.size());
    for (const Kernel& kernel : kFast) fast.push_back(product.run(kernel));
    // The order of summation is the same for every format.
    EXPECT_EQ(product.run(kBitmapReference), reference);
    EXPECT_EQ(product.run(kRowsReference), reference);
    // The bound adds half an ulp of the output, its smallest subnormal and, for fp32 sums, the
    // classical bound (K + 2) u sum|w x|. No activation here has a slope above 1.13. GELU in
    // torch's form, v (1 + erf) / 2, has cancellation for negative v, which adds |v| times the unit
    // roundoff.
    const bool half = product.type == ValueType::kFloat16;
    const double output_ulp = half ? std::ldexp(1.0, -11) : std::ldexp(1.0, -8);
    const double tiny = std::ldexp(1.0, half ? -24 : -133);
    const double fp32 = static_cast<double>(product.weight.k + 2) * std::ldexp(1.0, -24) * 1.13;
    for (int64_t token = 0; token < product.n; ++token) {
      for (int64_t row = 0; row < product.weight.m; ++row) {
        const auto i = static_cast<size_t>(token * product.weight.m + row);
        const double sum = product.exact(token, row, false);
        const double expected = activate(sum, activation);
        const double magnitude = product.exact(token, row, true);
        const double rounding = output_ulp * std::abs(expected) + tiny;
        ASSERT_NEAR(pattern_value(reference[i], product.type), expected,
                    rounding + 1e-6 * std::abs(expected) + std::ldexp(std::abs(sum), -52))
            << "reference, token " << token << ", row " << row;
        for (size_t j = 0; j < kFast.size(); ++j) {
          ASSERT_NEAR(pattern_value(fast[j][i], product.type), expected,
                      rounding * (1.0 + output_ulp) + fp32 * magnitude + 2e-6 * std::abs(expected))
              << kFast[j].name << ", token " << token << ", row " << row;
        }
      }
    }
  }
}

TEST_P(SpmmCpu, ThreadsDoNotChangeABit) {
  const Product product = make(false, true);
  for (const Kernel& kernel : kKernels) {
    EXPECT_EQ(product.run(kernel, threaded_for), product.run(kernel)) << kernel.name;
  }
}

INSTANTIATE_TEST_SUITE_P(
    AwkwardShapes, SpmmCpu,
    ::testing::Combine(::testing::Values(Shape{1, 1, 1}, Shape{128, 8, 64}, Shape{127, 7, 63},
                                         Shape{129, 9, 65}, Shape{300, 2, 200}, Shape{40, 65, 33},
                                         Shape{200, 0, 100}, Shape{0, 3, 64}, Shape{64, 3, 0},
                                         Shape{64, 9, 0}, Shape{257, 5, 130}, Shape{5, 3, 31},
                                         Shape{7, 17, 32}, Shape{33, 6, 300}),
                       ::testing::Values(0.0, 0.5, 0.95, 1.0),
                       ::testing::Values(ValueType::kFloat16, ValueType::kBfloat16)));

// Products of int8 values. X and bias are those of a product of 16-bit values of the same dtype.
class SpmmInt8 : public ::testing::TestWithParam<std::tuple<Shape, double, ValueType>> {
 protected:
  const ValueType type_ = std::get<2>(GetParam());
  Product product_;
  QuantizedMatrix weight_;

  void make(bool integers) {
    const auto& [shape, sparsity, type] = GetParam();
    const auto& [m, n, k] = shape;
    product_ = random_product(m, n, k, 0.0, value_traits(type).dense, integers, true, 11);
    weight_ = random_int8(m, k, sparsity, 12, 3);
    if (!integers) return;
    for (float& scale : weight_.scales) scale = 0.25F;
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t col = 0; col < k; ++col) {
        uint8_t& value = weight_.at(row, col);
        value = static_cast<uint8_t>(static_cast<int8_t>(value) % 3 * 4);  // elements -2 ... 2
      }
    }
  }

  // As Product::exact, with value * scale as the element of the weight.
  double exact(int64_t token, int64_t row, bool absolute) const {
    double sum = pattern_value(product_.bias[static_cast<size_t>(row)], product_.type);
    if (absolute) sum = std::abs(sum);
    for (int64_t col = 0; col < weight_.k; ++col) {
      const auto i = static_cast<size_t>(token * product_.x_stride + col);
      const double term = static_cast<double>(static_cast<int8_t>(weight_.at(row, col))) *
                          static_cast<double>(weight_.scales[static_cast<size_t>(row)]) *
                          pattern_value(product_.x[i], product_.type);
      sum += absolute ? std::abs(term) : term;
    }
    return sum;
  }

  static bool takes(const Kernel& kernel) { return kernel.format == Format::kRowBitmap; }
};

TEST_P(SpmmInt8, IntegersAreExact) {
  make(true);
  std::vector<uint16_t> expected;
  for (int64_t token = 0; token < product_.n; ++token) {
    for (int64_t row = 0; row < weight_.m; ++row) {
      const double sum = exact(token, row, false);
      ASSERT_LE(std::abs(sum), 256.0) << "the inputs of this test must stay exact";
      expected.push_back(from_float_of(static_cast<float>(sum), product_.type));
    }
  }
  const Packed packed = pack_or_die(weight_, Format::kRowBitmap, type_);
  for (const Kernel& kernel : kKernels) {
    if (!takes(kernel)) continue;
    EXPECT_EQ(product_.run(kernel, packed, serial_for), expected) << kernel.name;
  }
}

TEST_P(SpmmInt8, RealsStayWithinRounding) {
  make(false);
  const Packed packed = pack_or_die(weight_, Format::kRowBitmap, type_);
  // Half an ulp of the output, its smallest subnormal and, for fp32 sums, (K + 3) u sum|w x|: one
  // more rounding than for 16-bit values, for the scale.
  const bool half = product_.type == ValueType::kFloat16;
  const double output_ulp = std::ldexp(1.0, half ? -11 : -8);
  const double tiny = std::ldexp(1.0, half ? -24 : -133);
  const double fp32 = static_cast<double>(weight_.k + 3) * std::ldexp(1.0, -24);
  for (const Kernel& kernel : kKernels) {
    if (!takes(kernel)) continue;
    const auto y = product_.run(kernel, packed, serial_for);
    EXPECT_EQ(product_.run(kernel, packed, threaded_for), y) << kernel.name;
    for (int64_t token = 0; token < product_.n; ++token) {
      for (int64_t row = 0; row < weight_.m; ++row) {
        const double expected = exact(token, row, false);
        ASSERT_NEAR(pattern_value(y[static_cast<size_t>(token * weight_.m + row)], product_.type),
                    expected,
                    (1.0 + output_ulp) * fp32 * exact(token, row, true) +
                        output_ulp * std::abs(expected) + tiny)
            << kernel.name << ", token " << token << ", row " << row;
      }
    }
  }
}

// X is rounded by the rule that flash_llm.spmm documents, here in fp64; its sums are exact.
TEST_P(SpmmInt8, QuantisedTokensGiveExactSums) {
  make(false);
  const int64_t k = weight_.k, stride = product_.x_stride;
  const auto x_at = [&](int64_t token, int64_t col) -> uint16_t& {
    return product_.x[static_cast<size_t>(token * stride + col)];
  };
  for (int64_t col = 0; col < k && product_.n > 1; ++col) {  // an awkward token: half steps
    x_at(1, col) =
        from_float_of(col % 5 == 0 ? 127.0F : static_cast<float>(col % 7) - 2.5F, product_.type);
  }
  if (product_.n > 2 && k > 2) x_at(2, k / 2) = from_float_of(INFINITY, product_.type);
  std::vector<uint16_t> expected;
  for (int64_t token = 0; token < product_.n; ++token) {
    float largest = 0x1p-100F;
    bool finite = true;
    for (int64_t col = 0; col < k; ++col) {
      const float magnitude = std::abs(to_float_of(x_at(token, col), product_.type));
      finite &= std::isfinite(magnitude);
      largest = std::max(largest, magnitude);
    }
    const float inverse = 127.0F / largest;
    const float scale = finite ? largest / 127.0F : NAN;
    for (int64_t row = 0; row < weight_.m; ++row) {
      int64_t sum = 0;
      for (int64_t col = 0; col < k && finite; ++col) {
        const double step = std::nearbyint(pattern_value(x_at(token, col), product_.type) *
                                           static_cast<double>(inverse));
        ASSERT_LE(std::abs(step), 127.0);
        sum += static_cast<int64_t>(step) * static_cast<int8_t>(weight_.at(row, col));
      }
      const auto i = static_cast<size_t>(row);
      const float product = static_cast<float>(sum) * scale * weight_.scales[i];
      expected.push_back(
          from_float_of(product + to_float_of(product_.bias[i], product_.type), product_.type));
    }
  }
  const Packed packed = pack_or_die(weight_, Format::kRowBitmap, type_);
  for (const Kernel& kernel : kInt8X) {
    EXPECT_EQ(product_.run(kernel, packed, serial_for), expected) << kernel.name;
    EXPECT_EQ(product_.run(kernel, packed, threaded_for), expected) << kernel.name;
  }
}

TEST(SpmmInt8X, TheLargestSumsAreExact) {
  // Values and X of 127 and -127 in the longest rows whose sums fit 32 bits.
  Product product = random_product(8, 9, kCpuMaxInt8K, 0.0, ValueType::kBfloat16, true, false, 5);
  QuantizedMatrix weight = random_int8(8, kCpuMaxInt8K, 0.0, 6);
  for (int64_t row = 0; row < 8; ++row) {
    weight.scales[static_cast<size_t>(row)] = 1.0F;
    for (int64_t col = 0; col < weight.k; ++col) weight.at(row, col) = row % 2 ? 0x81 : 0x7F;
  }
  for (auto& x : product.x) x = from_float<ValueType::kBfloat16>(-254.0F);
  const auto sum = static_cast<float>(int64_t{127} * 127 * kCpuMaxInt8K) * 2;
  for (const Kernel& kernel : kInt8X) {
    const Packed packed = pack_or_die(weight, Format::kRowBitmap, ValueType::kInt8Bfloat16);
    const auto y = product.run(kernel, packed, serial_for);
    for (size_t i = 0; i < y.size(); ++i) {
      ASSERT_EQ(y[i], from_float<ValueType::kBfloat16>(i % 2 ? sum : -sum)) << kernel.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    AwkwardShapes, SpmmInt8,
    ::testing::Combine(::testing::Values(Shape{1, 1, 1}, Shape{127, 7, 63}, Shape{129, 9, 65},
                                         Shape{200, 0, 100}, Shape{0, 3, 64}, Shape{64, 3, 0},
                                         Shape{5, 3, 31}, Shape{7, 17, 32}, Shape{33, 6, 300},
                                         Shape{9, 8, 2200}),
                       ::testing::Values(0.0, 0.5, 0.95, 1.0),
                       ::testing::Values(ValueType::kInt8Float16, ValueType::kInt8Bfloat16)));

TEST(SpmmCpuSpecial, EmptyWeightGivesActivatedBias) {
  Product product = random_product(5, 2, 0, 0.0, ValueType::kFloat16, true, true, 1);
  product.activation = Activation::kRelu;
  std::vector<uint16_t> expected;
  for (int token = 0; token < 2; ++token) {
    for (const uint16_t value : product.bias) expected.push_back(value & 0x8000 ? 0 : value);
  }
  const auto equal_up_to_zero_sign = [](std::vector<uint16_t> y) {
    for (auto& value : y) value = is_zero_pattern(value) ? uint16_t{0} : value;
    return y;
  };
  for (const Kernel& kernel : kKernels) {
    EXPECT_EQ(equal_up_to_zero_sign(product.run(kernel)), expected) << kernel.name;
  }
}

TEST(SpmmCpuSpecial, NanAndInfinityReachExactlyTheirOutputs) {
  // W has NaN at (3, 70) and Inf at (130, 1); x is all ones, so other rows stay finite.
  Product product = random_product(140, 3, 80, 0.5, ValueType::kFloat16, true, false, 2);
  product.weight.at(3, 70) = 0x7E00;
  product.weight.at(130, 1) = 0x7C00;
  for (int64_t token = 0; token < 3; ++token) {
    for (int64_t col = 0; col < 80; ++col) {
      product.x[static_cast<size_t>(token * product.x_stride + col)] = kHalfOne;
    }
  }
  for (const Kernel& kernel : kKernels) {
    SCOPED_TRACE(kernel.name);
    const auto y = product.run(kernel);
    for (size_t i = 0; i < y.size(); ++i) {
      const double value = pattern_value(y[i], product.type);
      if (i % 140 == 3) {
        EXPECT_TRUE(std::isnan(value)) << i;
      } else if (i % 140 == 130) {
        EXPECT_EQ(y[i], 0x7C00) << i;
      } else {
        EXPECT_TRUE(std::isfinite(value)) << i;
      }
    }
  }
}

TEST(SpmmCpuSpecial, ActivationsPassNan) {
  Product product = random_product(2, 1, 4, 0.0, ValueType::kBfloat16, true, false, 3);
  product.weight.at(1, 2) = 0x7FC0;
  for (const Activation activation : {Activation::kRelu, Activation::kGelu, Activation::kSilu}) {
    product.activation = activation;
    for (const Kernel& kernel : kKernels) {
      EXPECT_TRUE(std::isnan(pattern_value(product.run(kernel)[1], product.type))) << kernel.name;
    }
  }
}

TEST(SpmmCpuSpecial, AMalformedWeightNeverReachesForeignMemory) {
  // For the sanitizers: offsets and payloads that validate refuses must not cause bad accesses.
  const Product product = random_product(200, 3, 150, 0.7, ValueType::kFloat16, false, false, 4);
  for (const Kernel& kernel : kKernels) {
    Packed packed = pack_or_die(product.weight, kernel.format);
    for (size_t i = 0; i < packed.payload.size(); i += 3) packed.payload[i] |= 0xFFFF0000U;
    product.run(kernel, packed, serial_for);
    packed.offsets[1] = INT32_MAX;
    packed.offsets[2] = -7;
    packed.offsets[4] = 1;
    EXPECT_FALSE(check(packed).ok());
    product.run(kernel, packed, serial_for);
    EXPECT_EQ(unpack(packed, serial_for).size(), 200U * 150U);
    if (kernel.format != Format::kRowBitmap) continue;
    Packed quantized =
        pack_or_die(random_int8(200, 150, 0.7, 4), kernel.format, ValueType::kInt8Float16);
    for (size_t i = 5; i < quantized.payload.size(); i += 3) quantized.payload[i] |= 0xFFFF0000U;
    product.run(kernel, quantized, serial_for);
    for (const Kernel& int8x : kInt8X) product.run(int8x, quantized, serial_for);
    quantized.offsets[1] = INT32_MAX;
    product.run(kernel, quantized, serial_for);
    for (const Kernel& int8x : kInt8X) product.run(int8x, quantized, serial_for);
    EXPECT_EQ(unpack(quantized, serial_for).size(), 200U * 150U);
  }
}

// Blocks of rows are decoded for the dense GEMM. The last values of a payload are those that a
// load could read past.
TEST(RowBitmapDecode, EveryInstructionSetGivesTheRowsBack) {
  for (const auto& [m, k] : {std::pair{5, 1}, {4, 32}, {7, 33}, {12, 63}, {9, 200}}) {
    for (const double sparsity : {0.0, 0.5, 0.95, 1.0}) {
      const DenseMatrix dense = random_patterns(m, k, sparsity, 7);
      const Packed packed = pack_or_die(dense, Format::kRowBitmap);
      const int64_t first = m > 4 ? 4 : 0;
      std::vector<uint16_t> expected;
      for (int64_t row = first; row < m; ++row) {
        for (int64_t col = 0; col < k; ++col) {
          const uint16_t value = dense.at(row, col);
          expected.push_back(is_zero_pattern(value) ? uint16_t{0} : value);
        }
      }
      for (const CpuIsa isa : kCpuIsas) {
        if (!has_cpu_isa(isa)) continue;
        std::vector<uint16_t> decoded(expected.size(), kPoison);
        row_bitmap_decode(packed.view(), first, m, isa, serial_for, decoded.data());
        EXPECT_EQ(decoded, expected) << cpu_isa_name(isa) << ", " << m << "x" << k;
      }
    }
  }
}

TEST(RowBitmapDecode, EveryInstructionSetDequantises) {
  for (const ValueType type : {ValueType::kInt8Float16, ValueType::kInt8Bfloat16}) {
    for (const auto& [m, k] : {std::pair{5, 1}, {4, 32}, {7, 33}, {12, 63}, {9, 200}}) {
      for (const double sparsity : {0.0, 0.5, 0.95, 1.0}) {
        const QuantizedMatrix values = random_int8(m, k, sparsity, 7);
        const Packed packed = pack_or_die(values, Format::kRowBitmap, type);
        const int64_t first = m > 4 ? 4 : 0;
        std::vector<uint16_t> expected;
        for (int64_t row = first; row < m; ++row) {
          for (int64_t col = 0; col < k; ++col) {
            const float scale = values.scales[static_cast<size_t>(row)];
            expected.push_back(type == ValueType::kInt8Float16
                                   ? dequantize<ValueType::kFloat16>(values.at(row, col), scale)
                                   : dequantize<ValueType::kBfloat16>(values.at(row, col), scale));
          }
        }
        for (const CpuIsa isa : kCpuIsas) {
          if (!has_cpu_isa(isa)) continue;
          std::vector<uint16_t> decoded(expected.size(), kPoison);
          row_bitmap_decode(packed.view(), first, m, isa, serial_for, decoded.data());
          EXPECT_EQ(decoded, expected) << cpu_isa_name(isa) << ", " << m << "x" << k;
        }
      }
    }
  }
}

TEST(ParseActivation, KnowsFourNames) {
  Activation activation = Activation::kSilu;
  EXPECT_TRUE(parse_activation("none", &activation).ok());
  EXPECT_EQ(activation, Activation::kNone);
  EXPECT_TRUE(parse_activation("relu", &activation).ok());
  EXPECT_EQ(activation, Activation::kRelu);
  EXPECT_TRUE(parse_activation("gelu", &activation).ok());
  EXPECT_EQ(activation, Activation::kGelu);
  EXPECT_TRUE(parse_activation("silu", &activation).ok());
  EXPECT_EQ(activation, Activation::kSilu);
  for (const char* name : {"", "tanh", "ReLU", "relu "}) {
    const Status status = parse_activation(name, &activation);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue);
    EXPECT_TRUE(mentions(status.message, {"activation ", "\"" + std::string(name) + "\""}))
        << status.message;
  }
}

}  // namespace
}  // namespace flash_llm::testing
