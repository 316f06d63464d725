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

// Calls visit(lane, word, bit, row, col) for each element of a chunk in the order of the runs.
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

bool has_bit(const LaneBits& bits, int lane, int word, int bit) {
  return (bits[static_cast<size_t>(lane)][static_cast<size_t>(word)] >> bit & 1U) != 0;
}

// What a chunk stores, and where.
struct Layout {
  LaneBits bits{};
  int rows = 0;
  std::array<uint8_t, kLanes> columns{};  // as they are stored

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
  int units() const { return rows == 0 ? 0 : rows * kQuantRowUnits + kQuantFixedUnits; }

  // Pairs the runs, which sets `rows` and `columns`.
  void pair_runs() {
    std::array<int, kLanes> up{}, down{};
    for (int lane = 0; lane < kLanes; ++lane) up[lane] = down[lane] = lane;
    const auto order_by = [this](std::array<int, kLanes>& lanes, int run) {
      std::stable_sort(lanes.begin(), lanes.end(),
                       [&](int a, int b) { return stored(a, run) < stored(b, run); });
    };
    order_by(up, 0);
    order_by(down, 1);
    int bytes = 0;
    for (int i = 0; i < kLanes; ++i) {
      const int column = up[i], lane = down[kLanes - 1 - i];
      columns[static_cast<size_t>(lane)] = static_cast<uint8_t>(4 * column);
      bytes = std::max(bytes, stored(column, 0) + stored(lane, 1));
    }
    rows = (bytes + 3) / 4;
  }

  // Calls visit(row, col, offset) for each value, where `offset` is its byte from the chunk's
  // begin, unless it lies outside the rows, which only a malformed chunk does.
  template <typename Visit>
  void for_each_value(const Visit& visit) const {
    std::array<std::array<int, 2>, kLanes> next{};
    for_each_element([&](int lane, int word, int bit, int row, int col) {
      if (!has_bit(bits, lane, word, bit)) return;
      const int run = word / 2, n = next[static_cast<size_t>(lane)][static_cast<size_t>(run)]++;
      const int place = run == 0 ? n : 4 * rows - 1 - n;
      const int column = run == 0 ? 4 * lane : columns[static_cast<size_t>(lane)] & 0x7C;
      if (place < 0 || place >= 4 * rows) return;
      visit(row, col, place / 4 * kQuantRowBytes + column + place % 4);
    });
  }
};

// The chunk `col` of a strip of the matrix. `values` are the strip's rows.
Layout lay_out(const ValueMatrix& matrix, int64_t strip, int64_t chunk) {
  const int64_t row0 = strip * kQuantStripM, col0 = chunk * kQuantChunkK;
  Layout layout;
  for_each_element([&](int lane, int word, int bit, int row, int col) {
    if (row0 + row >= matrix.m || col0 + col >= matrix.k) return;
    if (is_zero(matrix.row<uint8_t>(row0 + row)[col0 + col])) return;
    layout.bits[static_cast<size_t>(lane)][static_cast<size_t>(word)] |= 1U << bit;
  });
  layout.pair_runs();
  return layout;
}

// The bytes of a chunk, without scales; empty if it has none or, in a malformed weight, lies
// outside the payload or has a size that no chunk has.
struct Chunk {
  const uint8_t* bytes = nullptr;
  int64_t units = 0;

  int rows() const { return bytes == nullptr ? 0 : quant_value_rows(units); }

  // What is stored, as the chunk itself says.
  Layout layout() const {
    Layout layout;
    layout.rows = rows();
    if (bytes == nullptr) return layout;
    const uint8_t* bits = bytes + ptrdiff_t{layout.rows} * kQuantRowBytes;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t word = 0; word < kQuantWords; ++word) {
        std::memcpy(&layout.bits[lane][word], bits + (word * kLanes + lane) * 4, 4);
      }
    }
    std::memcpy(layout.columns.data(), bits + kQuantBitsBytes, kQuantColumnsBytes);
    return layout;
  }
};

// Whether a strip has bytes, and so scales before its first chunk.
bool has_scales(const PackedView& view, int64_t strip) {
  const int64_t chunks = num_quant_chunks(view.k);
  const int64_t begin = view.offsets[strip * chunks], end = view.offsets[(strip + 1) * chunks];
  return begin >= 0 && end > begin &&
         (begin + kQuantScaleUnits) * kQuantUnitWords <= view.payload_words;
}

Chunk chunk_of(const PackedView& view, int64_t strip, int64_t col) {
  const int64_t index = strip * num_quant_chunks(view.k) + col;
  int64_t begin = view.offsets[index];
  const int64_t end = view.offsets[index + 1];
  if (col == 0 && has_scales(view, strip)) begin += kQuantScaleUnits;
  if (begin < 0 || end <= begin || end * kQuantUnitWords > view.payload_words ||
      quant_value_rows(end - begin) < 0) {
    return {};
  }
  return {reinterpret_cast<const uint8_t*>(view.payload + begin * kQuantUnitWords), end - begin};
}

const uint32_t* scales_of(const PackedView& view, int64_t strip) {
  return view.payload + int64_t{view.offsets[strip * num_quant_chunks(view.k)]} * kQuantUnitWords;
}

// What is wrong with a chunk, or "". Adds its values to stored[kQuantStripM], by row.
std::string chunk_problem(const PackedView& view, int64_t strip, int64_t col, int64_t* stored) {
  const int64_t index = strip * num_quant_chunks(view.k) + col;
  const int64_t scale_units = col == 0 && has_scales(view, strip) ? kQuantScaleUnits : 0;
  const int64_t units = int64_t{view.offsets[index + 1]} - view.offsets[index] - scale_units;
  if (units == 0) return "";
  const Chunk chunk = chunk_of(view, strip, col);
  if (chunk.bytes == nullptr) return "no chunk has " + std::to_string(units) + " units";
  const Layout layout = chunk.layout();
  bool inside = true;
  for_each_element([&](int lane, int word, int bit, int row, int c) {
    inside &= !has_bit(layout.bits, lane, word, bit) ||
              (strip * kQuantStripM + row < view.m && col * kQuantChunkK + c < view.k);
  });
  if (!inside) return "a bit lies outside the matrix";
  Layout expected = layout;
  expected.pair_runs();
  if (expected.units() != units) {
    return "must have " + std::to_string(expected.units()) + " units for its bits, got " +
           std::to_string(units);
  }
  if (expected.columns != layout.columns)
    return "the columns of the downward runs are not canonical";
  std::vector<uint8_t> rest(chunk.bytes, chunk.bytes + ptrdiff_t{layout.rows} * kQuantRowBytes);
  std::string problem;
  layout.for_each_value([&](int row, int /*col*/, int offset) {
    uint8_t& byte = rest[static_cast<size_t>(offset)];
    if (byte == 0 || byte == kQuantZero) {
      problem =
          std::string("a value is ") + (byte == 0 ? "-128" : "zero") + ", which is never stored";
    }
    byte = 0;
    ++stored[row];
  });
  if (problem.empty() && std::any_of(rest.begin(), rest.end(), [](uint8_t b) { return b != 0; })) {
    problem = "bytes outside the runs must be 0";
  }
  return problem;
}

}  // namespace

Status quantized_bitmap_count(const ValueMatrix& matrix, const ParallelFor& parallel_for,
                              int32_t* offsets, int64_t* nnz) {
  const int64_t strips = num_quant_strips(matrix.m), chunks = num_quant_chunks(matrix.k);
  std::vector<int32_t> units(static_cast<size_t>(strips * chunks));
  *nnz = sum_over(strips, 1, parallel_for, [&](int64_t strip) {
    int64_t stored = 0;
    for (int64_t col = 0; col < chunks; ++col) {
      const Layout layout = lay_out(matrix, strip, col);
      units[static_cast<size_t>(strip * chunks + col)] = layout.units();
      stored += layout.nnz();
    }
    if (stored > 0) units[static_cast<size_t>(strip * chunks)] += kQuantScaleUnits;
    return stored;
  });
  return fill_offsets(
      matrix.m, matrix.k, strips * chunks,
      [&](int64_t chunk) { return units[static_cast<size_t>(chunk)]; }, offsets);
}

Status quantized_bitmap_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                             const ParallelFor& parallel_for, uint32_t* payload) {
  const int64_t chunks = num_quant_chunks(matrix.k);
  const int64_t strips = chunks == 0 ? 0 : num_quant_strips(matrix.m);
  return pack_tiles(strips, 1, nnz, parallel_for, [&](int64_t strip) -> int64_t {
    const int32_t* own = offsets + strip * chunks;
    auto* next = reinterpret_cast<uint8_t*>(payload + int64_t{own[0]} * kQuantUnitWords);
    auto* scales = reinterpret_cast<float*>(next);
    const bool empty = own[chunks] == own[0];
    if (!empty) {
      std::fill_n(scales, kQuantStripM, kNoScale);
      next += ptrdiff_t{kQuantScaleUnits} * kQuantUnitBytes;
    }
    int64_t stored = 0;
    for (int64_t col = 0; col < chunks; ++col) {
      const Layout layout = lay_out(matrix, strip, col);
      const int scale_units = col == 0 && !empty ? kQuantScaleUnits : 0;
      if (own[col + 1] - own[col] != layout.units() + scale_units) return kTileChanged;
      const int64_t bytes = int64_t{layout.units()} * kQuantUnitBytes;
      if (bytes == 0) continue;
      std::memset(next, 0, static_cast<size_t>(bytes));
      bool changed = false;
      layout.for_each_value([&](int row, int c, int offset) {
        const int64_t m = strip * kQuantStripM + row;
        const uint8_t value = matrix.row<uint8_t>(m)[col * kQuantChunkK + c];
        next[offset] = static_cast<uint8_t>(value ^ kQuantZero);
        scales[row] = matrix.scales[m];
        changed |= is_zero(value);
      });
      if (changed) return kTileChanged;
      uint8_t* bits = next + ptrdiff_t{layout.rows} * kQuantRowBytes;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        for (size_t word = 0; word < kQuantWords; ++word) {
          std::memcpy(bits + (word * kLanes + lane) * 4, &layout.bits[lane][word], 4);
        }
      }
      std::memcpy(bits + kQuantBitsBytes, layout.columns.data(), kQuantColumnsBytes);
      next += bytes;
      stored += layout.nnz();
    }
    return stored;
  });
}

void quantized_bitmap_unpack_strip(const PackedView& view, int64_t strip, void* values,
                                   float* scales) {
  const int64_t row0 = strip * kQuantStripM, rows = std::min<int64_t>(kQuantStripM, view.m - row0);
  auto* out = static_cast<uint8_t*>(values);
  std::fill_n(out, rows * view.k, uint8_t{0});
  if (scales != nullptr) std::fill_n(scales, rows, kNoScale);
  if (view.k == 0 || view.payload == nullptr) return;
  if (scales != nullptr && has_scales(view, strip)) {
    for (int64_t row = 0; row < rows; ++row) {
      scales[row] = bits_to_float(scales_of(view, strip)[row]);
    }
  }
  for (int64_t col = 0; col < num_quant_chunks(view.k); ++col) {
    const Chunk chunk = chunk_of(view, strip, col);
    if (chunk.bytes == nullptr) continue;
    chunk.layout().for_each_value([&](int row, int c, int offset) {
      const int64_t k = col * kQuantChunkK + c;
      if (row >= rows || k >= view.k) return;
      out[row * view.k + k] = static_cast<uint8_t>(chunk.bytes[offset] ^ kQuantZero);
    });
  }
}

int64_t quantized_bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for) {
  if (view.k == 0 || view.payload == nullptr) return 0;
  return sum_over(num_quant_strips(view.m), 1, parallel_for, [&](int64_t strip) {
    int64_t count = 0;
    for (int64_t col = 0; col < num_quant_chunks(view.k); ++col) {
      count += chunk_of(view, strip, col).layout().nnz();
    }
    return count;
  });
}

Status quantized_bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets,
                                    int64_t payload_words) {
  const int64_t chunks = num_quant_strips(header.m) * num_quant_chunks(header.k);
  if (Status status = check_lengths(header, chunks, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  if (header.nnz > 4 * payload_words || (chunks == 0 && payload_words > 0)) {
    return nnz_does_not_fit(header, chunks, "chunk");
  }
  return Status::success();
}

Status quantized_bitmap_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t chunks = num_quant_chunks(view.k);
  const int64_t strips = chunks == 0 ? 0 : num_quant_strips(view.m);
  Status offsets = check_offsets(view, strips * chunks, kQuantUnitWords,
                                 [](int64_t, int64_t) { return Status::success(); });
  if (!offsets.ok()) return offsets;
  return check_tiles(view, strips, "strip", parallel_for, [&](int64_t strip, auto& failure) {
    int64_t stored[kQuantStripM] = {}, total = 0;
    for (int64_t col = 0; col < chunks; ++col) {
      const std::string problem = chunk_problem(view, strip, col, stored);
      if (!problem.empty()) {
        failure.report(strip, "chunk " + std::to_string(col) + ": " + problem);
        return int64_t{0};
      }
    }
    const bool scaled = has_scales(view, strip);
    for (int64_t row = 0; row < kQuantStripM; ++row) {
      total += stored[row];
      const std::string problem =
          scaled ? scale_problem(row, scales_of(view, strip)[row], stored[row]) : "";
      if (!problem.empty()) failure.report(strip, problem);
    }
    if (scaled && total == 0) failure.report(strip, "has bytes but no nonzero");
    return total;
  });
}

}  // namespace flash_llm
