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

// The units of a block with `nnz` values; 0 if it has none.
int64_t block_units(int64_t groups, int64_t nnz) {
  if (nnz == 0) return 0;
  const int64_t words = 1 + groups * kBlockRows + (nnz + 1) / 2;
  return (words + kBlockUnitWords - 1) / kBlockUnitWords;
}

// The number of columns of a group that lie inside the matrix.
int cols_of(int64_t k, int64_t group) {
  return static_cast<int>(std::min<int64_t>(kGroupCols, k - group * kGroupCols));
}

// What is wrong with a block, or ""; adds its nonzeros to *nnz.
std::string block_problem(const PackedView& view, int64_t block, int64_t* nnz) {
  const int64_t groups = num_groups(view.k);
  const int64_t units = int64_t{view.offsets[block + 1]} - view.offsets[block];
  if (units == 0) return "";
  // masks is null if the block is too short for them and lies at the payload's end.
  const RowBlock parts = row_block(view, block);
  int64_t stored = 0;
  for (int64_t i = 0; parts.masks != nullptr && i < groups * kBlockRows; ++i) {
    const int64_t group = i / kBlockRows, row = i % kBlockRows;
    const int cols = cols_of(view.k, group);
    const uint32_t inside = cols == kGroupCols ? ~0U : (1U << cols) - 1;
    if ((parts.masks[i] & ~(row < rows_of_block(view.m, block) ? inside : 0U)) != 0) {
      return "row " + std::to_string(row) + ", group " + std::to_string(group) +
             ": a bit lies outside the matrix";
    }
    stored += popcount(parts.masks[i]);
  }
  if (stored == 0 || units != block_units(groups, stored)) {
    return "must have " + std::to_string(block_units(groups, stored)) +
           " units for the bits of its masks, got " + std::to_string(units);
  }
  uint32_t smallest = kMagnitudeMask;
  for (int64_t i = 0; i < stored; ++i) {
    if (is_zero(parts.values[i])) {
      return "value " + std::to_string(i) + " is zero, which is never stored";
    }
    smallest = std::min<uint32_t>(smallest, parts.values[i] & kMagnitudeMask);
  }
  if (parts.smallest != smallest) {
    return "word 0 must be the smallest magnitude, " + std::to_string(smallest) + ", got " +
           std::to_string(parts.smallest);
  }
  const auto* end = reinterpret_cast<const uint16_t*>(
      view.payload + int64_t{view.offsets[block + 1]} * kBlockUnitWords);
  if (std::any_of(parts.values + stored, end, [](uint16_t value) { return value != 0; })) {
    return "padding after the last value must be 0";
  }
  *nnz += stored;
  return "";
}

}  // namespace

Status row_bitmap_count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                        const ParallelFor& parallel_for, int32_t* offsets, int64_t* nnz) {
  // Without columns there are no groups and no blocks.
  const int64_t blocks = k == 0 ? 0 : num_row_blocks(m);
  std::vector<int64_t> stored(static_cast<size_t>(blocks));
  parallel_for(blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t count = 0;
      for (int row = 0; row < rows_of_block(m, block); ++row) {
        const uint16_t* from = dense + (block * kBlockRows + row) * ld;
        count += std::count_if(from, from + k, [](uint16_t value) { return !is_zero(value); });
      }
      stored[static_cast<size_t>(block)] = count;
    }
  });
  *nnz = 0;
  for (const int64_t count : stored) *nnz += count;
  return fill_offsets(
      m, k, blocks,
      [&](int64_t block) { return block_units(num_groups(k), stored[static_cast<size_t>(block)]); },
      offsets);
}

PackedBlock row_bitmap_pack_block(const uint16_t* dense, int64_t ld, int rows, int64_t k,
                                  uint32_t* masks, uint16_t* values, const uint16_t* end) {
  uint16_t below = kMagnitudeMask;  // one less than the smallest value
  for (int64_t group = 0; group < num_groups(k); ++group) {
    for (int row = 0; row < rows; ++row) {
      const uint16_t* from = dense + row * ld + group * kGroupCols;
      // Every element is written, and `count` moves on only for nonzeros: a branch per element
      // would be mispredicted, and this is three times as fast. It needs room for one more element.
      uint16_t kept[kGroupCols + 1];
      uint32_t mask = 0, count = 0;
      for (int col = 0; col < cols_of(k, group); ++col) {
        const uint16_t value = from[col];
        const int magnitude = value & kMagnitudeMask;
        const uint32_t stored = magnitude != 0 ? 1 : 0;
        kept[count] = value;
        count += stored;
        mask |= stored << col;
        below =
            std::min(below, static_cast<uint16_t>(magnitude - 1));  // 0 wraps around to the largest
      }
      if (count > end - values) return {};
      values = std::copy_n(kept, count, values);
      masks[group * kBlockRows + row] = mask;
    }
  }
  return {below + 1U, values};
}

Status row_bitmap_pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                       const int32_t* offsets, int64_t nnz, const ParallelFor& parallel_for,
                       uint32_t* payload) {
  CpuIsa isa = CpuIsa::kPortable;
  // All write the same bytes, so an unknown FLASH_LLM_CPU_ISA is no error here. It is one in spmm.
  if (!select_cpu_isa(&isa).ok()) isa = CpuIsa::kPortable;
  const auto pack_block = row_bitmap_block_packer(isa);
  const int64_t blocks = k == 0 ? 0 : num_row_blocks(m), groups = num_groups(k);
  return pack_tiles(blocks, 16, nnz, parallel_for, [&](int64_t block) -> int64_t {
    const int64_t units = int64_t{offsets[block + 1]} - offsets[block];
    if (units == 0) return 0;
    uint32_t* words = payload + int64_t{offsets[block]} * kBlockUnitWords;
    uint32_t* words_end = std::fill_n(words, units * kBlockUnitWords, 0U);
    uint32_t* masks = words + 1;
    auto* values = reinterpret_cast<uint16_t*>(masks + groups * kBlockRows);
    const PackedBlock packed =
        pack_block(dense + block * kBlockRows * ld, ld, rows_of_block(m, block), k, masks, values,
                   reinterpret_cast<const uint16_t*>(words_end));
    const int64_t stored = packed.end == nullptr ? 0 : packed.end - values;
    if (block_units(groups, stored) != units) return kTileChanged;
    words[0] = packed.smallest;
    return stored;
  });
}

void row_bitmap_decode_block(const RowBlock& block, int rows, int64_t k, uint16_t* dense) {
  std::fill_n(dense, rows * k, uint16_t{0});
  const uint32_t* masks = block.masks;
  const uint16_t* values = block.values;
  for (int64_t group = 0; group < num_groups(k); ++group) {
    for (int row = 0; row < kBlockRows; ++row) {
      const int cols = row < rows ? cols_of(k, group) : 0;
      uint16_t* to = dense + row * k + group * kGroupCols;
      for (uint32_t mask = *masks++; mask != 0 && values != block.end; mask &= mask - 1) {
        const uint16_t value = *values++;
        const int col = __builtin_ctz(mask);
        if (col < cols) to[col] = value;
      }
    }
  }
}

void row_bitmap_unpack_block(const PackedView& view, int64_t block, uint16_t* dense) {
  const int rows = rows_of_block(view.m, block);
  const RowBlock parts = row_block(view, block);
  if (parts.masks == nullptr) {
    std::fill_n(dense, rows * view.k, uint16_t{0});
  } else {
    row_bitmap_decode_block(parts, rows, view.k, dense);
  }
}

Status row_bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets,
                              int64_t payload_words) {
  const int64_t blocks = header.k == 0 ? 0 : num_row_blocks(header.m);
  if (Status status = check_lengths(header, blocks, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  if (header.nnz > 2 * payload_words || (blocks == 0 && payload_words > 0)) {
    return nnz_does_not_fit(header, blocks, "block");
  }
  return Status::success();
}

Status row_bitmap_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t blocks = view.k == 0 ? 0 : num_row_blocks(view.m);
  const int64_t least = block_units(num_groups(view.k), 1);
  Status offsets = check_offsets(view, blocks, kBlockUnitWords, [&](int64_t block, int64_t units) {
    if (units == 0 || units >= least) return Status::success();
    return Status::invalid_value("block " + std::to_string(block) + " must have no units or at " +
                                 "least " + std::to_string(least) + ", got " +
                                 std::to_string(units));
  });
  if (!offsets.ok()) return offsets;
  return check_tiles(view, blocks, "block", parallel_for, tile_check(view, block_problem));
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
