// fuzz_packed SECONDS [SEED]: passes damaged packed weights of every format to header parsing,
// validate, unpack and a CPU kernel. It is meant for a build with ASan and UBSan, which stop at the
// first bad access.
//
// Each round packs a random matrix, damages the result (in a few places, not at all, or by
// replacing it with noise) and checks:
//   * an undamaged weight is valid, and unpacks to what was packed;
//   * a weight that is valid stands for one matrix: unpacking it, packing that in any format and
//     unpacking again gives the same matrix and the same nnz;
//   * unpack and spmm access only the weight's own memory if the cheap size check passes;
//   * packing a matrix that changed after it was counted does so too, and gives a valid weight or
//     an error.
// A failure prints the seed and the round, which reproduce it.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/cpu_isa.h"
#include "cpu/spmm.h"
#include "format/element.h"
#include "format/packed_format.h"
#include "format/packed_header.h"
#include "plan/problem.h"
#include "testing.h"

namespace flash_llm::testing {
namespace {

constexpr Format kFormats[] = {Format::kTiledCsl, Format::kBitmap, Format::kRowBitmap,
                               Format::kGather, Format::kQuantizedBitmap};

struct Outcomes {
  uint64_t accepted = 0;
  uint64_t refused = 0;
};

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : seed_(seed) {}

  void run_round(uint64_t round) {
    round_ = round;
    rng_.seed(static_cast<uint32_t>(seed_ * 0x9E3779B9U + round));
    const Format format = kFormats[below(std::size(kFormats))];
    const int64_t m = pick_size(), k = pick_size();
    const double sparsity = pick_of(0.0, 0.3, 0.7, 0.97, 1.0);
    const auto seed = static_cast<uint32_t>(rng_());
    const int64_t row_gap = below(3);
    const EnumSet<ValueType> held = packed_format(format).value_types;
    auto type = kValueTypes[below(std::size(kValueTypes))];
    if (!held.contains(type)) type = held.first();
    if (value_traits(type).bits == 16) {
      run_matrix(random_patterns(m, k, sparsity, seed, row_gap), format, type);
    } else {
      run_matrix(random_quantized(type, m, k, sparsity, seed, row_gap), format, type);
    }
  }

  Outcomes outcomes(Format format) { return outcomes_[format]; }

 private:
  template <typename Raw>
  void run_matrix(DenseMatrixOf<Raw> dense, Format format, ValueType type) {
    const int64_t m = dense.m, k = dense.k;
    if (below(2)) thin_out(dense);
    Packed packed;
    require(pack(dense, format, serial_for, &packed, type).ok(), "pack refused a small matrix");

    const int64_t damages = below(4);
    for (int64_t i = 0; i < damages; ++i) damage(packed);
    if (damages == 0) {
      const Status status = check(packed);
      require(status.ok(), "an undamaged weight was refused: " + status.message);
      std::vector<Raw> back(static_cast<size_t>(m * k));
      const int64_t row_scales = scales_per_row(type, k);
      std::vector<float> scales(static_cast<size_t>(m * row_scales));
      unpack_values(packed.format(), packed.view(), serial_for, back.data(),
                    value_traits(type).bits == 16 ? nullptr : scales.data());
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t col = 0; col < k; ++col) {
          const Raw value = dense.at(row, col);
          require(back[static_cast<size_t>(row * k + col)] == (is_zero(value) ? Raw{0} : value),
                  "unpack changed a value");
          const auto scale = static_cast<size_t>(row * row_scales + scale_group(type, col));
          require(is_zero(value) || dense.scales.empty() || scales[scale] == dense.scales[scale],
                  "unpack changed a scale");
        }
      }
    }
    ++(exercise(packed) ? outcomes_[format].accepted : outcomes_[format].refused);
    pack_changed(dense, format, type);
  }

  int64_t below(int64_t bound) {
    return static_cast<int64_t>(rng_() % static_cast<uint64_t>(bound));
  }

  template <typename T, typename... More>
  T pick_of(T first, More... more) {
    const T values[] = {first, more...};
    return values[below(1 + static_cast<int64_t>(sizeof...(more)))];
  }

  int64_t pick_size() {
    return pick_of<int64_t>(0, 1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 256, 260, 400);
  }

  // Zeroes most elements at random, so that the bitmap format uses 2:4 chunks.
  template <typename Raw>
  void thin_out(DenseMatrixOf<Raw>& dense) {
    const int64_t kept = pick_of<int64_t>(5, 30, 100, 200);
    for (int64_t row = 0; row < dense.m; ++row) {
      for (int64_t col = 0; col < dense.k; ++col) {
        if (below(1000) >= kept) dense.at(row, col) = 0;
      }
    }
  }

  int64_t interesting() {
    return pick_of<int64_t>(0, 1, -1, 3, 4, 9, 18, 20, 127, 136, 137, 139, 2048, 2049, 8191, 8192,
                            8193, 65535, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN,
                            int64_t{1} << 31, int64_t{1} << 62);
  }

  template <typename Raw>
  void pack_changed(DenseMatrixOf<Raw>& dense, Format format, ValueType type) {
    Packed packed;
    require(count(dense, format, serial_for, &packed, type).ok(), "count refused a small matrix");
    for (int64_t i = below(200); i > 0 && !dense.values.empty(); --i) {
      Raw& value = dense.values[pick_index(dense.values.size())];
      value = below(2) ? Raw{0} : static_cast<Raw>(rng_());
    }
    if (fill(dense, serial_for, &packed).ok()) {
      require(check(packed).ok(), "packing a matrix that had changed gave a malformed weight");
    }
  }

  // The value plus -2 to 2; wraps around on overflow.
  int64_t nudged(int64_t value) {
    return static_cast<int64_t>(static_cast<uint64_t>(value) + static_cast<uint64_t>(below(5)) -
                                2U);
  }

  void require(bool condition, const std::string& what) const {
    if (condition) return;
    std::fprintf(stderr, "fuzz_packed: seed %llu round %llu: %s\n",
                 static_cast<unsigned long long>(seed_), static_cast<unsigned long long>(round_),
                 what.c_str());
    std::abort();
  }

  void damage(Packed& packed) {
    switch (below(13)) {
      case 0: {  // a header field
        auto ints = packed.header.to_ints();
        const size_t field = pick_index(ints.size());
        ints[field] = below(2) ? interesting() : nudged(ints[field]);
        packed.header = {ints[0],
                         ints[1],
                         static_cast<Format>(ints[2]),
                         static_cast<ValueType>(ints[3]),
                         ints[4],
                         ints[5],
                         ints[6],
                         ints[7]};
        break;
      }
      case 1:  // an offset
        packed.offsets[pick_index(packed.offsets.size())] = static_cast<int32_t>(interesting());
        break;
      case 2: {  // an offset, slightly
        int32_t& offset = packed.offsets[pick_index(packed.offsets.size())];
        offset = static_cast<int32_t>(nudged(offset));
        break;
      }
      case 3:  // length of offsets
        packed.offsets.resize(
            static_cast<size_t>(1 + below(static_cast<int64_t>(packed.offsets.size()) + 2)), 0);
        break;
      case 4:  // length of the payload, with or without the header's
        packed.payload.resize(
            static_cast<size_t>(below(static_cast<int64_t>(packed.payload.size()) + 9)), 0);
        if (below(2)) packed.header.payload_words = static_cast<int64_t>(packed.payload.size());
        break;
      case 5:  // one bit
        if (!packed.payload.empty()) {
          packed.payload[pick_index(packed.payload.size())] ^= 1U << below(32);
        }
        break;
      case 6:  // one whole word
        if (!packed.payload.empty()) {
          packed.payload[pick_index(packed.payload.size())] = static_cast<uint32_t>(rng_());
        }
        break;
      case 7:  // swaps two words: within a tile of Tiled-CSL the weight stays valid
        if (!packed.payload.empty()) {
          std::swap(packed.payload[pick_index(packed.payload.size())],
                    packed.payload[pick_index(packed.payload.size())]);
        }
        break;
      case 8:  // a run of noise
        for (size_t i = packed.payload.empty() ? 0 : pick_index(packed.payload.size());
             i < packed.payload.size() && below(16) != 0; ++i) {
          packed.payload[i] = static_cast<uint32_t>(rng_());
        }
        break;
      case 9:  // a transposed or grown shape
        if (below(2)) {
          std::swap(packed.header.m, packed.header.k);
        } else {
          packed.header.m = nudged(packed.header.m);
        }
        break;
      case 10: {  // two bytes near a tile's end: in a bitmap, down offsets or bits
        const auto bytes = reinterpret_cast<uint8_t*>(packed.payload.data());
        const int64_t end = byte_at(packed, pick_offset(packed));
        if (end < 64 || end > 4 * static_cast<int64_t>(packed.payload.size())) break;
        const int64_t reach = below(2) ? 64 : std::min<int64_t>(end, 576);
        std::swap(bytes[end - 1 - below(reach)], bytes[end - 1 - below(reach)]);
        break;
      }
      case 11: {  // near a tile's beginning: the bits, down offsets and sizes of a 2:4 chunk
        const auto bytes = reinterpret_cast<uint8_t*>(packed.payload.data());
        const int64_t begin = byte_at(packed, pick_offset(packed));
        if (begin < 0 || begin + 1088 > 4 * static_cast<int64_t>(packed.payload.size())) break;
        const int64_t first = begin + pick_of<int64_t>(0, 1024), reach = begin + 1088 - first;
        if (below(2)) {
          std::swap(bytes[first + below(reach)], bytes[first + below(reach)]);
        } else {
          bytes[first + below(reach / 2) * 2] ^= 1;
        }
        break;
      }
      case 12: {  // a tile grows or shrinks by some units; offsets and header stay consistent
        const size_t tile = pick_index(packed.offsets.size());
        const int64_t unit = unit_words(packed), units = 1 + below(2);
        const int64_t at = unit * int64_t{packed.offsets[tile]};
        const bool grows = below(2) != 0;
        const auto words = static_cast<int64_t>(packed.payload.size());
        if (at < 0 || at > words || (!grows && at + unit * units > words)) break;
        const auto begin = packed.payload.begin() + at;
        if (grows) {
          packed.payload.insert(begin, static_cast<size_t>(unit * units), 0);
        } else {
          packed.payload.erase(begin, begin + unit * units);
        }
        for (size_t i = tile + 1; i < packed.offsets.size(); ++i) {
          packed.offsets[i] = static_cast<int32_t>(packed.offsets[i] + (grows ? units : -units));
        }
        packed.header.payload_words = static_cast<int64_t>(packed.payload.size());
        break;
      }
    }
  }

  size_t pick_index(size_t size) { return static_cast<size_t>(below(static_cast<int64_t>(size))); }

  int32_t pick_offset(const Packed& packed) {
    return packed.offsets[pick_index(packed.offsets.size())];
  }

  // Payload words of a unit; 0 where the header's format is damaged.
  static int64_t unit_words(const Packed& packed) {
    const PackedFormat* format = nullptr;
    const auto number = static_cast<int64_t>(packed.header.format);
    return format_of(number, &format).ok() ? format->unit_words : 0;
  }

  static int64_t byte_at(const Packed& packed, int64_t offset) {
    return 4 * unit_words(packed) * offset;
  }

  // Runs all checks on a weight. Returns whether it is valid.
  bool exercise(const Packed& packed) {
    if (!check_sizes(packed).ok()) return false;
    const PackedHeader& header = packed.header;
    // The matrix takes at most 32 MB; a header may have a huge K with M = 0, or the reverse.
    if (header.m > 4096 || header.k > 4096) return false;
    const bool valid = check(packed).ok();
    require(valid == check(packed, threaded_for).ok(), "validate depends on threads");

    const std::vector<uint16_t> dense = unpack(packed, serial_for);
    multiply(packed, valid);
    if (!valid) return false;
    if (is_quantized(header.value_type)) {
      Packed again;
      const QuantizedMatrix values = unpack_quantized(packed, serial_for);
      require(pack(values, header.format, serial_for, &again, header.value_type).ok() &&
                  again.payload == packed.payload && again.offsets == packed.offsets,
              "a second packing of values and scales gave other bytes");
      return true;
    }
    for (const Format format : kFormats) {
      if (!packed_format(format).value_types.contains(ValueType::kFloat16)) continue;
      Packed again;
      require(pack(DenseMatrix{header.m, header.k, header.k, dense, {}}, format, serial_for, &again)
                  .ok(),
              "pack refused");
      require(again.header.nnz == header.nnz, "nnz changed in a second packing");
      require(unpack(again, serial_for) == dense, "a second packing changed the matrix");
    }
    return true;
  }

  // What a malformed weight unpacks to may depend on the instruction set: a scale may be NaN.
  void multiply(const Packed& packed, bool valid) {
    SpmmArgs args;
    args.format = packed.header.format;
    args.weight = packed.view();
    args.n = below(10);
    args.x_stride = packed.header.k;
    std::vector<uint16_t> x(static_cast<size_t>(args.n * args.x_stride));
    for (auto& value : x) value = static_cast<uint16_t>(rng_());
    std::vector<uint16_t> y(static_cast<size_t>(args.n * packed.header.m));
    args.x = x.data();
    args.y = y.data();
    if (args.format == Format::kTiledCsl) {
      spmm_cpu_tiled_csl(args, serial_for);
    } else if (args.format == Format::kRowBitmap) {
      for (const CpuIsa isa : kCpuIsas) {
        if (!has_cpu_isa(isa)) continue;
        spmm_cpu_row_bitmap(args, isa, serial_for);
        std::vector<uint16_t> dense(static_cast<size_t>(packed.header.m * packed.header.k));
        if (!dense.empty()) {
          row_bitmap_decode(args.weight, 0, packed.header.m, isa, serial_for, dense.data());
        }
        require(!valid || dense == unpack(packed, serial_for),
                "an instruction set unpacks differently");
      }
    } else {
      spmm_cpu_reference(args, serial_for);
    }
  }

  uint64_t seed_;
  uint64_t round_ = 0;
  std::mt19937 rng_;
  std::map<Format, Outcomes> outcomes_;
};

}  // namespace
}  // namespace flash_llm::testing

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s SECONDS [SEED]\n", argv[0]);
    return 2;
  }
  const double seconds = std::atof(argv[1]);
  const uint64_t seed = argc == 3 ? std::strtoull(argv[2], nullptr, 10) : 1;
  flash_llm::testing::Fuzzer fuzzer(seed);
  const auto start = std::chrono::steady_clock::now();
  uint64_t rounds = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
         seconds) {
    fuzzer.run_round(rounds++);
  }
  bool covered = true;
  for (const auto format : flash_llm::testing::kFormats) {
    const auto outcomes = fuzzer.outcomes(format);
    std::printf("fuzz_packed: %s: %llu weights accepted, %llu refused\n",
                flash_llm::packed_format(format).name,
                static_cast<unsigned long long>(outcomes.accepted),
                static_cast<unsigned long long>(outcomes.refused));
    covered = covered && outcomes.accepted > 0 && outcomes.refused > 0;
  }
  std::printf("fuzz_packed: seed %llu, %llu rounds in %.0f s, clean\n",
              static_cast<unsigned long long>(seed), static_cast<unsigned long long>(rounds),
              seconds);
  // Every format must have had both outcomes, else the run proves nothing.
  return covered ? 0 : 1;
}
