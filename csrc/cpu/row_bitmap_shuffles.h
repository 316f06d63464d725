// The byte shuffles that expand eight elements of a row: a table for instructions that fill a
// vector of 16 bytes from another one by an index for each byte (x86's pshufb, Arm's tbl).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "format/row_bitmap.h"

namespace flash_llm {

// A group is expanded in parts: eight columns, whose bits are one byte of its mask.
inline constexpr int64_t kPartCols = 8;
inline constexpr int64_t kParts = kGroupCols / kPartCols;

// Row `bits`: 16 indices of bytes.
using Shuffles = std::array<std::array<uint8_t, 2 * kPartCols>, 256>;

// For each column the indices of the two bytes of its value among the packed values, or 0x80, which
// gives zero, if the column is not stored.
constexpr Shuffles make_expansions() {
  Shuffles table{};
  for (size_t bits = 0; bits < table.size(); ++bits) {
    size_t rank = 0;
    for (size_t col = 0; col < kPartCols; ++col) {
      const bool stored = (bits >> col & 1U) != 0;
      table[bits][2 * col] = static_cast<uint8_t>(stored ? 2 * rank : 0x80);
      table[bits][2 * col + 1] = static_cast<uint8_t>(stored ? 2 * rank + 1 : 0x80);
      if (stored) ++rank;
    }
  }
  return table;
}

alignas(64) inline constexpr Shuffles kExpansions = make_expansions();

}  // namespace flash_llm
