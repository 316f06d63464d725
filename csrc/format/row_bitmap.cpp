#include "format/row_bitmap.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstddef>
#include <string>
#include <vector>

#include "base/cpu_isa.h"
#include "format/element.h"
#include "format/packed_checks.h"

namespace flash_llm {
namespace {

int popcount(uint32_t mask) { return static_cast<int>(std::bitset<32>(mask).count()); }

// The units of a block with `bytes` bytes of values; 0 if it has none.
int64_t block_units(ValueType type, int64_t k, int64_t bytes) {
  if (bytes == 0) return 0;
  const int64_t words =
      row_block_head_words(type, k) + num_groups(k) * kBlockRows + (bytes + 3) / 4;
  return (words + kBlockUnitWords - 1) / kBlockUnitWords;
}

// Value `i` of a row in a group whose values begin at `values`.
template <typename Raw>
Raw value_at(ValueType type, const Raw* values, int i) {
  if (value_traits(type).bits == 4) {
    return from_nibble(static_cast<uint8_t>(values[i / 2] >> (4 * (i % 2)) & 0xF));
  }
  return values[i];
}

// The number of columns of a group that lie inside the matrix.
int cols_of(int64_t k, int64_t group) {
  return static_cast<int>(std::min<int64_t>(kGroupCols, k - group * kGroupCols));
}

// What is wrong with a block, or ""; adds its nonzeros to *nnz.
template <typename Raw>
std::string block_problem(const PackedView& view, int64_t block, int64_t* nnz) {
  const int64_t groups = num_groups(view.k);
  const int64_t units = int64_t{view.offsets[block + 1]} - view.offsets[block];
  if (units == 0) return "";
  // masks is null if the block is too short for them and lies at the payload's end.
  const RowBlockOf<Raw> parts = row_block<Raw>(view, block);
  int64_t stored = 0, bytes = 0;
  std::vector<int64_t> stored_of(  // of each scale
      static_cast<size_t>(scales_per_row(view.value_type, view.k) * kBlockRows));
  for (int64_t i = 0; parts.masks != nullptr && i < groups * kBlockRows; ++i) {
    const int64_t group = i / kBlockRows, row = i % kBlockRows;
    const int cols = cols_of(view.k, group);
    const uint32_t inside = cols == kGroupCols ? ~0U : (1U << cols) - 1;
    if ((parts.masks[i] & ~(row < rows_of_block(view.m, block) ? inside : 0U)) != 0) {
      return "row " + std::to_string(row) + ", group " + std::to_string(group) +
             ": a bit lies outside the matrix";
    }
    const int count = popcount(parts.masks[i]);
    if (!stored_of.empty()) {
      const int64_t scale = row_block_scale(view.value_type, row, group * kGroupCols);
      stored_of[static_cast<size_t>(scale)] += count;
    }
    stored += count;
    bytes += group_bytes(view.value_type, count);
  }
  const int64_t expected = block_units(view.value_type, view.k, bytes);
  if (stored == 0 || units != expected) {
    return "must have " + std::to_string(expected) + " units for the bits of its masks, got " +
           std::to_string(units);
  }
  std::string problem;
  uint32_t smallest = kMagnitudeMask;
  int64_t read = 0;
  const Raw* values = parts.values;
  for (int64_t i = 0; i < groups * kBlockRows; ++i) {
    const int count = popcount(parts.masks[i]);
    for (int j = 0; j < count; ++j, ++read) {
      const Raw value = value_at(view.value_type, values, j);
      const char* what = nullptr;
      if constexpr (sizeof(Raw) == 1) {
        what = unstorable(view.value_type, value);
      } else if (is_zero(value)) {
        what = "zero";
      }
      if (what != nullptr) {
        return "value " + std::to_string(read) + " is " + what + ", which is never stored";
      }
      smallest = std::min<uint32_t>(smallest, value & kMagnitudeMask);
    }
    values += group_bytes(view.value_type, count) / static_cast<int64_t>(sizeof(Raw));
    if (value_traits(view.value_type).bits == 4 && count % 2 == 1 && values[-1] >> 4 != 0) {
      return "the nibble after value " + std::to_string(read - 1) + " must be 0";
    }
  }
  if (sizeof(Raw) == 1) smallest = 0;
  if (parts.smallest != smallest) {
    return "word 0 must be " + std::to_string(smallest) + ", got " + std::to_string(parts.smallest);
  }
  for (size_t i = 0; i < stored_of.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    problem = scale_problem(view.value_type, index % kBlockRows, index / kBlockRows,
                            load_scale(view.value_type, parts.scales, index), stored_of[i]);
    if (!problem.empty()) return problem;
  }
  const auto* end = reinterpret_cast<const Raw*>(view.payload + int64_t{view.offsets[block + 1]} *
                                                                    kBlockUnitWords);
  if (std::any_of(values, end, [](Raw value) { return value != 0; })) {
    return "padding after the last value must be 0";
  }
  *nnz += stored;
  return "";
}

// Calls function(Raw{}) with the raw type of a value type's values.
template <typename Function>
auto with_raw_type(ValueType type, const Function& function) {
  return value_traits(type).bits == 16 ? function(uint16_t{}) : function(uint8_t{});
}

// Returns the mask of a group of `cols` columns and writes its nonzeros to kept[0], kept[1], ...;
// the element after them may be overwritten.
template <typename Raw>
uint32_t keep_nonzeros(const Raw* from, int cols, Raw* kept) {
  // Every element is written, and `count` moves on only for nonzeros: a branch per element would be
  // mispredicted, and this is three times as fast. It needs room for one more element.
  uint32_t mask = 0, count = 0;
  for (int col = 0; col < cols; ++col) {
    const uint32_t stored = is_zero(from[col]) ? 0 : 1;
    kept[count] = from[col];
    count += stored;
    mask |= stored << col;
  }
  return mask;
}

// As RowBitmapPackBlock, for values of any width, which must be zero before. Returns the end of the
// values, null if they did not fit or there is one that no weight stores.
template <typename Raw>
const Raw* pack_block(ValueType type, const Raw* dense, int64_t ld, int rows, int64_t k,
                      uint32_t* masks, Raw* values, const Raw* end) {
  const bool nibbles = value_traits(type).bits == 4;
  for (int64_t group = 0; group < num_groups(k); ++group) {
    for (int row = 0; row < rows; ++row) {
      Raw kept[kGroupCols + 1] = {};
      const uint32_t mask =
          keep_nonzeros(dense + row * ld + group * kGroupCols, cols_of(k, group), kept);
      const int count = popcount(mask);
      if constexpr (sizeof(Raw) == 1) {
        const auto wrong = [&](Raw value) { return unstorable(type, value) != nullptr; };
        if (std::any_of(kept, kept + count, wrong)) return nullptr;
      }
      if ((nibbles ? (count + 1) / 2 : count) > end - values) return nullptr;
      if (nibbles) {
        for (int i = 0; i < count; ++i) {
          values[i / 2] |=
              static_cast<Raw>(to_nibble(static_cast<uint8_t>(kept[i])) << 4 * (i % 2));
        }
        values += (count + 1) / 2;
      } else {
        values = std::copy_n(kept, count, values);
      }
      masks[group * kBlockRows + row] = mask;
    }
  }
  return values;
}

template <typename Raw>
void decode_block(ValueType type, const RowBlockOf<Raw>& block, int rows, int64_t k, Raw* dense) {
  const bool nibbles = value_traits(type).bits == 4;
  std::fill_n(dense, rows * k, Raw{0});
  const uint32_t* masks = block.masks;
  const Raw* values = block.values;
  for (int64_t group = 0; group < num_groups(k); ++group) {
    for (int row = 0; row < kBlockRows; ++row) {
      const int cols = row < rows ? cols_of(k, group) : 0;
      Raw* to = dense + row * k + group * kGroupCols;
      uint32_t mask = *masks++;
      for (int i = 0; mask != 0 && values != block.end; mask &= mask - 1, ++i) {
        const Raw value = value_at(type, values, nibbles ? i % 2 : 0);
        const int col = __builtin_ctz(mask);
        if (col < cols) to[col] = value;
        // A byte of nibbles ends with its second one, or with the last of the row.
        values += !nibbles || i % 2 == 1 || (mask & (mask - 1)) == 0;
      }
    }
  }
}

}  // namespace

Status row_bitmap_count(const ValueMatrix& matrix, const ParallelFor& parallel_for,
                        int32_t* offsets, int64_t* nnz) {
  // Without columns there are no groups and no blocks.
  const int64_t blocks = matrix.k == 0 ? 0 : num_row_blocks(matrix.m);
  std::vector<int64_t> stored(static_cast<size_t>(blocks)), bytes(static_cast<size_t>(blocks));
  // Nibbles begin anew in each group.
  const int64_t step = value_traits(matrix.type).bits == 4 ? kGroupCols : matrix.k;
  parallel_for(blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const auto i = static_cast<size_t>(block);
      for (int row = 0; row < rows_of_block(matrix.m, block); ++row) {
        for (int64_t first = 0; first < matrix.k; first += step) {
          const int64_t cols = std::min(step, matrix.k - first);
          const int64_t count = with_raw_type(matrix.type, [&](auto raw) {
            using Raw = decltype(raw);
            const auto* from = matrix.row<Raw>(block * kBlockRows + row) + first;
            return std::count_if(from, from + cols, [](Raw value) { return !is_zero(value); });
          });
          stored[i] += count;
          bytes[i] += group_bytes(matrix.type, count);
        }
      }
    }
  });
  *nnz = 0;
  for (const int64_t count : stored) *nnz += count;
  return fill_offsets(
      matrix.m, matrix.k, blocks,
      [&](int64_t block) {
        return block_units(matrix.type, matrix.k, bytes[static_cast<size_t>(block)]);
      },
      offsets);
}

PackedBlock row_bitmap_pack_block(const uint16_t* dense, int64_t ld, int rows, int64_t k,
                                  uint32_t* masks, uint16_t* values, const uint16_t* end) {
  const uint16_t* values_end =
      pack_block(ValueType::kFloat16, dense, ld, rows, k, masks, values, end);
  if (values_end == nullptr) return {};
  uint16_t smallest = kMagnitudeMask;
  for (const uint16_t* value = values; value != values_end; ++value) {
    smallest = std::min(smallest, static_cast<uint16_t>(*value & kMagnitudeMask));
  }
  return {smallest, values_end};
}

Status row_bitmap_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                       const ParallelFor& parallel_for, uint32_t* payload) {
  CpuIsa isa = CpuIsa::kPortable;
  // All write the same bytes, so an unknown FLASH_LLM_CPU_ISA is no error here. It is one in spmm.
  if (!select_cpu_isa(&isa).ok()) isa = CpuIsa::kPortable;
  const auto pack_16_bit = row_bitmap_block_packer(isa);
  const int64_t k = matrix.k, groups = num_groups(k);
  const int64_t blocks = k == 0 ? 0 : num_row_blocks(matrix.m);
  const int64_t head_words = row_block_head_words(matrix.type, k);
  const int64_t row_scales = scales_per_row(matrix.type, k);
  return pack_tiles(blocks, 16, nnz, parallel_for, [&](int64_t block) -> int64_t {
    const int64_t units = int64_t{offsets[block + 1]} - offsets[block];
    if (units == 0) return 0;
    uint32_t* words = payload + int64_t{offsets[block]} * kBlockUnitWords;
    uint32_t* words_end = std::fill_n(words, units * kBlockUnitWords, 0U);
    uint32_t* masks = words + head_words;
    const int rows = rows_of_block(matrix.m, block);
    const int64_t bytes = with_raw_type(matrix.type, [&](auto raw) -> int64_t {
      using Raw = decltype(raw);
      const Raw* dense = matrix.row<Raw>(block * kBlockRows);
      auto* values = reinterpret_cast<Raw*>(masks + groups * kBlockRows);
      const auto* end = reinterpret_cast<const Raw*>(words_end);
      if constexpr (sizeof(Raw) == 2) {
        const PackedBlock packed = pack_16_bit(dense, matrix.ld, rows, k, masks, values, end);
        words[0] = packed.smallest;
        return packed.end == nullptr ? 0 : (packed.end - values) * int64_t{sizeof(Raw)};
      } else {
        const Raw* values_end =
            pack_block(matrix.type, dense, matrix.ld, rows, k, masks, values, end);
        return values_end == nullptr ? 0 : values_end - values;
      }
    });
    if (block_units(matrix.type, k, bytes) != units) return kTileChanged;
    if (row_scales == 0) return bytes / int64_t{sizeof(uint16_t)};
    for (int64_t i = 0; i < row_scales * kBlockRows; ++i) {
      store_scale(matrix.type, kNoScale, words + 1, i);
    }
    int64_t stored = 0;
    for (int64_t i = 0; i < groups * kBlockRows; ++i) {
      stored += popcount(masks[i]);
      if (masks[i] == 0) continue;
      const int64_t row = i % kBlockRows, col = i / kBlockRows * kGroupCols;
      const float* scales = matrix.scales + (block * kBlockRows + row) * row_scales;
      store_scale(matrix.type, scales[scale_group(matrix.type, col)], words + 1,
                  row_block_scale(matrix.type, row, col));
    }
    return stored;
  });
}

void row_bitmap_decode_block(const RowBlock& block, int rows, int64_t k, uint16_t* dense) {
  decode_block(ValueType::kFloat16, block, rows, k, dense);
}

void row_bitmap_unpack_block(const PackedView& view, int64_t block, void* values, float* scales) {
  const int rows = rows_of_block(view.m, block);
  with_raw_type(view.value_type, [&](auto raw) {
    using Raw = decltype(raw);
    const RowBlockOf<Raw> parts = row_block<Raw>(view, block);
    if (parts.masks == nullptr) {
      std::fill_n(static_cast<Raw*>(values), rows * view.k, Raw{0});
    } else {
      decode_block(view.value_type, parts, rows, view.k, static_cast<Raw*>(values));
    }
    const int64_t row_scales = scales_per_row(view.value_type, view.k);
    for (int64_t i = 0; i < rows * row_scales; ++i) {
      const int64_t index = i % row_scales * kBlockRows + i / row_scales;
      scales[i] =
          parts.masks == nullptr ? kNoScale : load_scale(view.value_type, parts.scales, index);
    }
  });
}

Status row_bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets,
                              int64_t payload_words) {
  const int64_t blocks = header.k == 0 ? 0 : num_row_blocks(header.m);
  if (Status status = check_lengths(header, blocks, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  const int values_per_word = 32 / value_traits(header.value_type).bits;
  if (header.nnz > values_per_word * payload_words || (blocks == 0 && payload_words > 0)) {
    return nnz_does_not_fit(header, blocks, "block");
  }
  return Status::success();
}

Status row_bitmap_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t blocks = view.k == 0 ? 0 : num_row_blocks(view.m);
  const int64_t least = block_units(view.value_type, view.k, 1);
  Status offsets = check_offsets(view, blocks, kBlockUnitWords, [&](int64_t block, int64_t units) {
    if (units == 0 || units >= least) return Status::success();
    return Status::invalid_value("block " + std::to_string(block) + " must have no units or at " +
                                 "least " + std::to_string(least) + ", got " +
                                 std::to_string(units));
  });
  if (!offsets.ok()) return offsets;
  const auto check_block = [&](int64_t block, FirstFailure& failure) {
    int64_t nnz = 0;
    const std::string problem = with_raw_type(
        view.value_type, [&](auto raw) { return block_problem<decltype(raw)>(view, block, &nnz); });
    if (!problem.empty()) failure.report(block, problem);
    return nnz;
  };
  return check_tiles(view, blocks, "block", parallel_for, check_block);
}

int64_t row_bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for) {
  return sum_over(num_row_blocks(view.m), 16, parallel_for, [&](int64_t block) {
    const uint32_t* masks = row_block(view, block).masks;
    int64_t count = 0;
    for (int64_t i = 0; masks != nullptr && i < num_groups(view.k) * kBlockRows; ++i) {
      count += popcount(masks[i]);
    }
    return count;
  });
}

}  // namespace flash_llm
