// What the C++ tests and the fuzzer share: seeded inputs, a packed weight that owns its buffers,
// and a ParallelFor with real threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/parallel.h"
#include "base/status.h"
#include "format/element.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm::testing {

inline constexpr uint16_t kHalfOne = 0x3C00;

// Whether a message holds these parts, one after the other. Tests look for the names and numbers of
// an error, not for the words between them.
inline bool mentions(const std::string& message, std::initializer_list<std::string> parts) {
  size_t from = 0;
  for (const std::string& part : parts) {
    from = message.find(part, from);
    if (from == std::string::npos) return false;
    from += part.size();
  }
  return true;
}

// Divides the range into pieces of `grain` and distributes them to four threads, in another order
// than serial code has.
inline void threaded_for(int64_t count, int64_t grain, const ParallelBody& body) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([=, &body] {
      for (int64_t begin = (kThreads - 1 - thread) * grain; begin < count;
           begin += kThreads * grain) {
        body(begin, std::min(count, begin + grain));
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

// Raw is uint16_t, or uint8_t for quantised values, which have scales.
template <typename Raw>
struct DenseMatrixOf {
  int64_t m = 0;
  int64_t k = 0;
  int64_t ld = 0;                  // row stride; elements past column k are never zero
  std::vector<Raw> values;         // [m * ld]
  std::vector<float> scales = {};  // [m, scales_per_row] if quantised

  Raw& at(int64_t row, int64_t col) { return values[static_cast<size_t>(row * ld + col)]; }
  Raw at(int64_t row, int64_t col) const { return values[static_cast<size_t>(row * ld + col)]; }
  ValueMatrix matrix(ValueType type) const {
    return {values.data(), ld, m, k, type, scales.empty() ? nullptr : scales.data()};
  }
};
using DenseMatrix = DenseMatrixOf<uint16_t>;
using QuantizedMatrix = DenseMatrixOf<uint8_t>;

inline DenseMatrix zeros(int64_t m, int64_t k) {
  return {m, k, k, std::vector<uint16_t>(static_cast<size_t>(m * k), 0), {}};
}

inline bool is_zero_pattern(uint16_t value) { return (value & 0x7FFF) == 0; }

// Random 16-bit patterns of every kind (NaN, Inf, subnormals, -0 among them). Each row has
// a random sparsity around `sparsity`, so tiles differ; 0 gives no zeros at all, 1 only zeros.
inline DenseMatrix random_patterns(int64_t m, int64_t k, double sparsity, uint32_t seed,
                                   int64_t row_gap = 0) {
  DenseMatrix dense{m, k, k + row_gap, {}, {}};
  dense.values.assign(static_cast<size_t>(m * dense.ld), 0x7BFF);
  std::mt19937 rng(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  std::uniform_int_distribution<int> pattern(0, 0xFFFF);
  for (int64_t row = 0; row < m; ++row) {
    const bool extreme = sparsity <= 0.0 || sparsity >= 1.0;
    const double row_sparsity = extreme ? sparsity : std::min(1.0, 2.0 * sparsity * uniform(rng));
    for (int64_t col = 0; col < k; ++col) {
      auto value = static_cast<uint16_t>(pattern(rng));
      if (is_zero_pattern(value)) value = kHalfOne;
      if (uniform(rng) < row_sparsity) value = uniform(rng) < 0.5 ? 0x0000 : 0x8000;
      dense.at(row, col) = value;
    }
  }
  return dense;
}

// What a raw value stands for, by the definitions of the types.
inline float value_of(ValueType type, uint8_t raw) {
  if (value_traits(type).kind != ValueKind::kFp8E4m3) {
    return static_cast<float>(static_cast<int8_t>(raw));
  }
  const int exponent = raw >> 3 & 0xF, mantissa = raw & 7;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (raw & 0x80) != 0 ? -magnitude : magnitude;
}

// Every value of a quantised type but 0.
inline std::vector<uint8_t> nonzero_values(ValueType type) {
  std::vector<uint8_t> values;
  for (int raw = 0; raw < 256; ++raw) {
    if (unstorable(type, static_cast<uint8_t>(raw)) == nullptr) {
      values.push_back(static_cast<uint8_t>(raw));
    }
  }
  return values;
}

// Random values of a quantised type and scales, distributed as random_patterns distributes zeros.
inline QuantizedMatrix random_quantized(ValueType type, int64_t m, int64_t k, double sparsity,
                                        uint32_t seed, int64_t row_gap = 0) {
  const DenseMatrix pattern = random_patterns(m, k, sparsity, seed, row_gap);
  QuantizedMatrix dense{m, k, pattern.ld, std::vector<uint8_t>(pattern.values.size(), 1), {}};
  std::mt19937 rng(seed + 1);
  const std::vector<uint8_t> values = nonzero_values(type);
  std::uniform_int_distribution<size_t> index(0, values.size() - 1);
  std::uniform_int_distribution<int> exponent(-8, 2);
  std::uniform_real_distribution<float> mantissa(1.0F, 2.0F);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < scales_per_row(type, k); ++i) {
      const float scale = std::ldexp(mantissa(rng), exponent(rng));
      store_scale(type, scale, &dense.scales.emplace_back(), 0);
      dense.scales.back() = load_scale(type, &dense.scales.back(), 0);  // as it is stored
    }
    for (int64_t col = 0; col < k; ++col) {
      const uint8_t drawn = values[index(rng)];
      dense.at(row, col) = is_zero_pattern(pattern.at(row, col)) ? uint8_t{0} : drawn;
    }
  }
  return dense;
}

struct Packed {
  PackedHeader header;
  std::vector<int32_t> offsets;
  std::vector<uint32_t> payload;

  const PackedFormat& format() const { return packed_format(header.format); }
  PackedView view() const {
    return {header.m,         header.k,       header.nnz,
            offsets.data(),   payload.data(), static_cast<int64_t>(payload.size()),
            header.value_type};
  }
};

// The first pass of packing. It also fills the payload with words that are invalid in every format,
// so that tests detect a word that the second pass does not write.
template <typename Raw>
Status count(const DenseMatrixOf<Raw>& dense, Format format, const ParallelFor& parallel_for,
             Packed* out, ValueType type = ValueType::kFloat16) {
  out->header = PackedHeader::of(format);
  out->header.value_type = type;
  out->header.m = dense.m;
  out->header.k = dense.k;
  const PackedFormat& row = out->format();
  out->offsets.assign(static_cast<size_t>(row.tiles(type, dense.m, dense.k) + 1), -1);
  Status status =
      row.count(dense.matrix(type), parallel_for, out->offsets.data(), &out->header.nnz);
  if (!status.ok()) return status;
  out->payload.assign(
      static_cast<size_t>(out->offsets.back()) * static_cast<size_t>(row.unit_words), 0xFFFFFFFF);
  out->header.payload_words = static_cast<int64_t>(out->payload.size());
  return status;
}

// The second pass.
template <typename Raw>
Status fill(const DenseMatrixOf<Raw>& dense, const ParallelFor& parallel_for, Packed* out) {
  return out->format().pack(dense.matrix(out->header.value_type), out->offsets.data(),
                            out->header.nnz, parallel_for, out->payload.data());
}

template <typename Raw>
Status pack(const DenseMatrixOf<Raw>& dense, Format format, const ParallelFor& parallel_for,
            Packed* out, ValueType type = ValueType::kFloat16) {
  Status status = count(dense, format, parallel_for, out, type);
  return status.ok() ? fill(dense, parallel_for, out) : status;
}

template <typename Raw>
Packed pack_or_die(const DenseMatrixOf<Raw>& dense, Format format,
                   ValueType type = ValueType::kFloat16) {
  Packed packed;
  const Status status = pack(dense, format, serial_for, &packed, type);
  if (!status.ok()) {
    std::fprintf(stderr, "pack: %s\n", status.message.c_str());
    std::abort();
  }
  return packed;
}

// Row-major [m, k]; poisoned first, so that tests detect an element that unpack does not write.
inline std::vector<uint16_t> unpack(const Packed& packed, const ParallelFor& parallel_for) {
  std::vector<uint16_t> dense(static_cast<size_t>(packed.header.m * packed.header.k), 0xDEAD);
  unpack(packed.format(), packed.view(), parallel_for, dense.data());
  return dense;
}

// The values and scales of a quantised weight; poisoned first.
inline QuantizedMatrix unpack_quantized(const Packed& packed, const ParallelFor& parallel_for) {
  const int64_t m = packed.header.m, k = packed.header.k;
  QuantizedMatrix dense{
      m, k, k, std::vector<uint8_t>(static_cast<size_t>(m * k), 0xAD),
      std::vector<float>(static_cast<size_t>(m * scales_per_row(packed.header.value_type, k)),
                         -1.0F)};
  unpack_values(packed.format(), packed.view(), parallel_for, dense.values.data(),
                dense.scales.data());
  return dense;
}

// Checks the header and the sizes, as every operator call does.
inline Status check_sizes(const Packed& packed) {
  const auto ints = packed.header.to_ints();
  PackedHeader header;
  Status status = PackedHeader::from_ints(ints.data(), static_cast<int64_t>(ints.size()), &header);
  if (!status.ok()) return status;
  return packed.format().check_sizes(header, static_cast<int64_t>(packed.offsets.size()),
                                     static_cast<int64_t>(packed.payload.size()));
}

// Checks every invariant too, as the operator validate does.
inline Status check(const Packed& packed, const ParallelFor& parallel_for = serial_for) {
  Status status = check_sizes(packed);
  return status.ok() ? packed.format().validate(packed.view(), parallel_for) : status;
}

}  // namespace flash_llm::testing
