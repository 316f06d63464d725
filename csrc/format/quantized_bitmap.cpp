#include "format/quantized_bitmap.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "format/element.h"
#include "format/packed_checks.h"

namespace flash_llm {
namespace {

constexpr int kLanes = 32;

int popcount(uint32_t word) { return static_cast<int>(std::bitset<32>(word).count()); }

using LaneBits = std::array<std::array<uint32_t, kQuantWords>, kLanes>;  // [lane][word]

// The stored form of a quantised value, a byte or a nibble, and its inverse.
uint8_t encode(ValueType type, uint8_t raw) {
  switch (value_traits(type).kind) {
    case ValueKind::kInt8:
      return static_cast<uint8_t>(raw ^ kQuantZero);
    case ValueKind::kInt4:
      return to_nibble(raw);
    case ValueKind::kFp8E4m3:
    case ValueKind::k16Bit:
      break;
  }
  return raw;
}
uint8_t decode(ValueType type, uint8_t code) {
  return value_traits(type).kind == ValueKind::kInt4 ? from_nibble(code) : encode(type, code);
}

// Calls visit(lane, word, bit, row, col) for each element of a plane in the order of the runs.
template <typename Visit>
void for_each_element(const Visit& visit) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int word = 0; word < kQuantWords; ++word) {
      for (int fragment = 0; fragment < kQuantFragments; ++fragment) {
        for (int i = 0; i < 8; ++i) {
          const int high = i / 4, elem = high == 0 ? i : 7 - i;
          visit(lane, word, quant_bit(fragment, high, elem), quant_row(lane, high),
                quant_col(word, fragment, lane, elem));
        }
      }
    }
  }
}

// What a plane of a chunk stores.
struct Plane {
  LaneBits bits{};
  std::array<uint8_t, kLanes> columns{};  // as they are stored

  bool has_bit(int lane, int word, int bit) const {
    return (bits[static_cast<size_t>(lane)][static_cast<size_t>(word)] >> bit & 1U) != 0;
  }
  int stored(int lane, int down) const {
    const auto& words = bits[static_cast<size_t>(lane)];
    const size_t first = down == 0 ? 0 : 2;
    return popcount(words[first]) + popcount(words[first + 1]);
  }
  int nnz() const {
    int count = 0;
    for (int lane = 0; lane < kLanes; ++lane) count += stored(lane, 0) + stored(lane, 1);
    return count;
  }

  // Pairs the runs, which sets `columns`. Returns the rows that they need.
  int pair_runs() {
    std::array<int, kLanes> up{}, down{};
    for (int lane = 0; lane < kLanes; ++lane) up[lane] = down[lane] = lane;
    const auto order_by = [this](std::array<int, kLanes>& lanes, int run) {
      std::stable_sort(lanes.begin(), lanes.end(),
                       [&](int a, int b) { return stored(a, run) < stored(b, run); });
    };
    order_by(up, 0);
    order_by(down, 1);
    int values = 0;
    for (int i = 0; i < kLanes; ++i) {
      const int column = up[i], lane = down[kLanes - 1 - i];
      columns[static_cast<size_t>(lane)] = static_cast<uint8_t>(4 * column);
      values = std::max(values, stored(column, 0) + stored(lane, 1));
    }
    return (values + 3) / 4;
  }
};

// What a chunk stores, and where.
struct Layout {
  ValueType type;
  std::array<Plane, kQuantMaxPlanes> planes{};
  int rows = 0;

  explicit Layout(ValueType value_type) : type(value_type) {}

  int num_planes() const { return quant_planes(type); }
  int nnz() const { return planes[0].nnz() + planes[1].nnz(); }
  int units() const { return rows == 0 ? 0 : rows * kQuantRowUnits + quant_fixed_units(type); }

  void pair_runs() {
    rows = 0;
    for (int p = 0; p < num_planes(); ++p) {
      rows = std::max(rows, planes[static_cast<size_t>(p)].pair_runs());
    }
  }

  // Calls visit(row, col, byte, shift) for each value, where `byte` is its byte from the chunk's
  // begin and `shift` its lowest bit there, unless it lies outside the rows, which only a malformed
  // chunk does.
  template <typename Visit>
  void for_each_value(const Visit& visit) const {
    for (int p = 0; p < num_planes(); ++p) {
      const Plane& plane = planes[static_cast<size_t>(p)];
      std::array<std::array<int, 2>, kLanes> next{};
      for_each_element([&](int lane, int word, int bit, int row, int col) {
        if (!plane.has_bit(lane, word, bit)) return;
        const int run = word / 2, n = next[static_cast<size_t>(lane)][static_cast<size_t>(run)]++;
        const int place = run == 0 ? n : 4 * rows - 1 - n;
        const int column = run == 0 ? 4 * lane : plane.columns[static_cast<size_t>(lane)] & 0x7C;
        if (place < 0 || place >= 4 * rows) return;
        visit(row, p * kQuantPlaneK + col, place / 4 * kQuantRowBytes + column + place % 4, 4 * p);
      });
    }
  }
};

// The bits of a value in its byte, before they are shifted.
int value_mask(ValueType type) { return (1 << value_traits(type).bits) - 1; }

// Calls visit(bits, columns) for each plane of a chunk, with pointers to those that it stores,
// where `after_values` points behind its values.
template <typename Byte, typename Visit>
void for_each_plane(ValueType type, Byte* after_values, const Visit& visit) {
  for (int p = 0; p < quant_planes(type); ++p) {
    visit(static_cast<size_t>(p), after_values + p * kQuantBitsBytes,
          after_values + quant_planes(type) * kQuantBitsBytes + p * kQuantColumnsBytes);
  }
}

// The chunk `chunk` of a strip of the matrix.
Layout lay_out(const ValueMatrix& matrix, int64_t strip, int64_t chunk) {
  const int64_t row0 = strip * kQuantStripM;
  Layout layout(matrix.type);
  for (int p = 0; p < layout.num_planes(); ++p) {
    const int64_t col0 = chunk * quant_chunk_k(matrix.type) + int64_t{kQuantPlaneK} * p;
    LaneBits& bits = layout.planes[static_cast<size_t>(p)].bits;
    for_each_element([&](int lane, int word, int bit, int row, int col) {
      if (row0 + row >= matrix.m || col0 + col >= matrix.k) return;
      if (is_zero(matrix.row<uint8_t>(row0 + row)[col0 + col])) return;
      bits[static_cast<size_t>(lane)][static_cast<size_t>(word)] |= 1U << bit;
    });
  }
  layout.pair_runs();
  return layout;
}

// The bytes of a chunk, without scales; empty if it has none or, in a malformed weight, lies
// outside the payload or has a size that no chunk has.
struct Chunk {
  ValueType type;
  const uint8_t* bytes = nullptr;
  int64_t units = 0;

  // What is stored, as the chunk itself says.
  Layout layout() const {
    Layout layout(type);
    if (bytes == nullptr) return layout;
    layout.rows = quant_value_rows(type, units);
    for_each_plane(type, bytes + ptrdiff_t{layout.rows} * kQuantRowBytes,
                   [&](size_t p, const uint8_t* bits, const uint8_t* columns) {
                     Plane& plane = layout.planes[p];
                     for (size_t lane = 0; lane < kLanes; ++lane) {
                       for (size_t word = 0; word < kQuantWords; ++word) {
                         std::memcpy(&plane.bits[lane][word], bits + (word * kLanes + lane) * 4, 4);
                       }
                     }
                     std::memcpy(plane.columns.data(), columns, kQuantColumnsBytes);
                   });
    return layout;
  }

  uint8_t value(int byte, int shift) const {
    return decode(type, static_cast<uint8_t>(bytes[byte] >> shift & value_mask(type)));
  }
};

// The units of the scales before a strip's first chunk.
int64_t scale_units_of(const PackedView& view, int64_t strip) {
  const int64_t chunks = num_quant_chunks(view.value_type, view.k);
  const bool empty = view.offsets[strip * chunks] == view.offsets[(strip + 1) * chunks];
  return empty ? 0 : quant_scale_units(view.value_type, view.k);
}

// Those scales; null if there are none or, in a malformed weight, if they lie outside the payload.
const uint32_t* scales_of(const PackedView& view, int64_t strip) {
  const int64_t begin = view.offsets[strip * num_quant_chunks(view.value_type, view.k)];
  const int64_t units = scale_units_of(view, strip);
  const bool stored =
      units > 0 && begin >= 0 && (begin + units) * kQuantUnitWords <= view.payload_words;
  return stored ? view.payload + begin * kQuantUnitWords : nullptr;
}

Chunk chunk_of(const PackedView& view, int64_t strip, int64_t col) {
  const ValueType type = view.value_type;
  const int64_t index = strip * num_quant_chunks(type, view.k) + col;
  int64_t begin = view.offsets[index];
  const int64_t end = view.offsets[index + 1];
  if (col == 0) begin += scale_units_of(view, strip);
  if (begin < 0 || end <= begin || end * kQuantUnitWords > view.payload_words ||
      quant_value_rows(type, end - begin) < 0) {
    return {type};
  }
  return {type, reinterpret_cast<const uint8_t*>(view.payload + begin * kQuantUnitWords),
          end - begin};
}

// How many values have each scale of a strip: [scales_per_row][kQuantStripM].
using StoredCounts = std::vector<int64_t>;

// The index of a scale in the payload of a strip, and in StoredCounts.
int64_t scale_index(ValueType type, int64_t row, int64_t col) {
  return scale_group(type, col) * kQuantStripM + row;
}

// What is wrong with a chunk, or "". Adds its values to `stored`.
std::string chunk_problem(const PackedView& view, int64_t strip, int64_t col,
                          StoredCounts& stored) {
  const ValueType type = view.value_type;
  const int64_t index = strip * num_quant_chunks(type, view.k) + col;
  const int64_t col0 = col * quant_chunk_k(type);
  const int64_t scale_units = col == 0 ? scale_units_of(view, strip) : 0;
  const int64_t units = int64_t{view.offsets[index + 1]} - view.offsets[index] - scale_units;
  if (units == 0) return "";
  const Chunk chunk = chunk_of(view, strip, col);
  if (chunk.bytes == nullptr) return "no chunk has " + std::to_string(units) + " units";
  const Layout layout = chunk.layout();
  bool inside = true;
  for (int p = 0; p < layout.num_planes(); ++p) {
    for_each_element([&](int lane, int word, int bit, int row, int c) {
      inside &=
          !layout.planes[static_cast<size_t>(p)].has_bit(lane, word, bit) ||
          (strip * kQuantStripM + row < view.m && col0 + int64_t{kQuantPlaneK} * p + c < view.k);
    });
  }
  if (!inside) return "a bit lies outside the matrix";
  Layout expected = layout;
  expected.pair_runs();
  if (expected.units() != units) {
    return "must have " + std::to_string(expected.units()) + " units for its bits, got " +
           std::to_string(units);
  }
  for (size_t p = 0; p < kQuantMaxPlanes; ++p) {
    if (expected.planes[p].columns != layout.planes[p].columns) {
      return "the columns of the downward runs are not canonical";
    }
  }
  std::vector<uint8_t> rest(chunk.bytes, chunk.bytes + ptrdiff_t{layout.rows} * kQuantRowBytes);
  std::string problem;
  layout.for_each_value([&](int row, int c, int byte, int shift) {
    if (const char* what = unstorable(type, chunk.value(byte, shift)); what != nullptr) {
      problem = std::string("a value is ") + what + ", which is never stored";
    }
    rest[static_cast<size_t>(byte)] &= static_cast<uint8_t>(~(value_mask(type) << shift));
    ++stored[static_cast<size_t>(scale_index(type, row, col0 + c))];
  });
  if (problem.empty() && std::any_of(rest.begin(), rest.end(), [](uint8_t b) { return b != 0; })) {
    problem = "bytes outside the runs must be 0";
  }
  return problem;
}

}  // namespace

Status quantized_bitmap_count(const ValueMatrix& matrix, const ParallelFor& parallel_for,
                              int32_t* offsets, int64_t* nnz) {
  const int64_t strips = num_quant_strips(matrix.m);
  const int64_t chunks = num_quant_chunks(matrix.type, matrix.k);
  std::vector<int64_t> units(static_cast<size_t>(strips * chunks));
  *nnz = sum_over(strips, 1, parallel_for, [&](int64_t strip) {
    int64_t stored = 0;
    for (int64_t col = 0; col < chunks; ++col) {
      const Layout layout = lay_out(matrix, strip, col);
      units[static_cast<size_t>(strip * chunks + col)] = layout.units();
      stored += layout.nnz();
    }
    if (stored > 0) {
      units[static_cast<size_t>(strip * chunks)] += quant_scale_units(matrix.type, matrix.k);
    }
    return stored;
  });
  return fill_offsets(
      matrix.m, matrix.k, strips * chunks,
      [&](int64_t chunk) { return units[static_cast<size_t>(chunk)]; }, offsets);
}

Status quantized_bitmap_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                             const ParallelFor& parallel_for, uint32_t* payload) {
  const ValueType type = matrix.type;
  const int64_t chunks = num_quant_chunks(type, matrix.k);
  const int64_t strips = chunks == 0 ? 0 : num_quant_strips(matrix.m);
  const int64_t row_scales = scales_per_row(type, matrix.k);
  return pack_tiles(strips, 1, nnz, parallel_for, [&](int64_t strip) -> int64_t {
    const int32_t* own = offsets + strip * chunks;
    auto* scales = reinterpret_cast<uint8_t*>(payload + int64_t{own[0]} * kQuantUnitWords);
    uint8_t* next = scales;
    const bool empty = own[chunks] == own[0];
    if (!empty) {
      for (int64_t i = 0; i < row_scales * kQuantStripM; ++i) {
        store_scale(type, kNoScale, scales, i);
      }
      next += quant_scale_units(type, matrix.k) * kQuantUnitBytes;
    }
    int64_t stored = 0;
    for (int64_t col = 0; col < chunks; ++col) {
      const Layout layout = lay_out(matrix, strip, col);
      const int64_t scale_units = col == 0 && !empty ? quant_scale_units(type, matrix.k) : 0;
      if (own[col + 1] - own[col] != layout.units() + scale_units) return kTileChanged;
      const int64_t bytes = int64_t{layout.units()} * kQuantUnitBytes;
      if (bytes == 0) continue;
      std::memset(next, 0, static_cast<size_t>(bytes));
      bool changed = false;
      layout.for_each_value([&](int row, int c, int byte, int shift) {
        const int64_t m = strip * kQuantStripM + row, k = col * quant_chunk_k(type) + c;
        const uint8_t value = matrix.row<uint8_t>(m)[k];
        next[byte] |= static_cast<uint8_t>(encode(type, value) << shift);
        store_scale(type, matrix.scales[m * row_scales + scale_group(type, k)], scales,
                    scale_index(type, row, k));
        changed |= unstorable(type, value) != nullptr;
      });
      if (changed) return kTileChanged;
      for_each_plane(type, next + ptrdiff_t{layout.rows} * kQuantRowBytes,
                     [&](size_t p, uint8_t* bits, uint8_t* columns) {
                       const Plane& plane = layout.planes[p];
                       for (size_t lane = 0; lane < kLanes; ++lane) {
                         for (size_t word = 0; word < kQuantWords; ++word) {
                           std::memcpy(bits + (word * kLanes + lane) * 4, &plane.bits[lane][word],
                                       4);
                         }
                       }
                       std::memcpy(columns, plane.columns.data(), kQuantColumnsBytes);
                     });
      next += bytes;
      stored += layout.nnz();
    }
    return stored;
  });
}

void quantized_bitmap_unpack_strip(const PackedView& view, int64_t strip, void* values,
                                   float* scales) {
  const ValueType type = view.value_type;
  const int64_t row0 = strip * kQuantStripM, rows = std::min<int64_t>(kQuantStripM, view.m - row0);
  const int64_t row_scales = scales_per_row(type, view.k);
  auto* out = static_cast<uint8_t*>(values);
  std::fill_n(out, rows * view.k, uint8_t{0});
  if (scales != nullptr) std::fill_n(scales, rows * row_scales, kNoScale);
  if (view.k == 0 || view.payload == nullptr) return;
  if (const uint32_t* stored = scales_of(view, strip); scales != nullptr && stored != nullptr) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t group = 0; group < row_scales; ++group) {
        scales[row * row_scales + group] = load_scale(type, stored, group * kQuantStripM + row);
      }
    }
  }
  for (int64_t col = 0; col < num_quant_chunks(type, view.k); ++col) {
    const Chunk chunk = chunk_of(view, strip, col);
    if (chunk.bytes == nullptr) continue;
    chunk.layout().for_each_value([&](int row, int c, int byte, int shift) {
      const int64_t k = col * quant_chunk_k(type) + c;
      if (row < rows && k < view.k) out[row * view.k + k] = chunk.value(byte, shift);
    });
  }
}

int64_t quantized_bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for) {
  if (view.k == 0 || view.payload == nullptr) return 0;
  return sum_over(num_quant_strips(view.m), 1, parallel_for, [&](int64_t strip) {
    int64_t count = 0;
    for (int64_t col = 0; col < num_quant_chunks(view.value_type, view.k); ++col) {
      count += chunk_of(view, strip, col).layout().nnz();
    }
    return count;
  });
}

Status quantized_bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets,
                                    int64_t payload_words) {
  const int64_t chunks = num_quant_strips(header.m) * num_quant_chunks(header.value_type, header.k);
  if (Status status = check_lengths(header, chunks, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  const int values_per_word = 32 / value_traits(header.value_type).bits;
  if (header.nnz > values_per_word * payload_words || (chunks == 0 && payload_words > 0)) {
    return nnz_does_not_fit(header, chunks, "chunk");
  }
  return Status::success();
}

Status quantized_bitmap_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const ValueType type = view.value_type;
  const int64_t chunks = num_quant_chunks(type, view.k);
  const int64_t strips = chunks == 0 ? 0 : num_quant_strips(view.m);
  Status offsets = check_offsets(view, strips * chunks, kQuantUnitWords,
                                 [](int64_t, int64_t) { return Status::success(); });
  if (!offsets.ok()) return offsets;
  return check_tiles(view, strips, "strip", parallel_for, [&](int64_t strip, auto& failure) {
    StoredCounts stored(static_cast<size_t>(scales_per_row(type, view.k) * kQuantStripM));
    for (int64_t col = 0; col < chunks; ++col) {
      const std::string problem = chunk_problem(view, strip, col, stored);
      if (!problem.empty()) {
        failure.report(strip, "chunk " + std::to_string(col) + ": " + problem);
        return int64_t{0};
      }
    }
    const uint32_t* scales = scales_of(view, strip);
    int64_t total = 0;
    for (size_t i = 0; i < stored.size(); ++i) {
      total += stored[i];
      if (scales == nullptr) continue;
      const auto index = static_cast<int64_t>(i);
      const std::string problem = scale_problem(type, index % kQuantStripM, index / kQuantStripM,
                                                load_scale(type, scales, index), stored[i]);
      if (!problem.empty()) failure.report(strip, problem);
    }
    if (scales != nullptr && total == 0) failure.report(strip, "has bytes but no nonzero");
    return total;
  });
}

}  // namespace flash_llm
