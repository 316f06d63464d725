// PackedHeader: the eight integers that describe a packed weight of any format. They travel with
// every packed weight (as an int64[8] tensor in checkpoints, as a list of ints in operator calls),
// so that the shape and format are known without reading a buffer from the device.
#pragma once

#include <array>
#include <cstdint>

#include "base/status.h"
#include "format/value_type.h"

namespace flash_llm {

// "FLASHLLM" read as a little-endian 64-bit integer.
inline constexpr int64_t kPackedMagic = 0x4D4C4C4853414C46;
inline constexpr int kPackedHeaderInts = 8;

// The numbers are stored in headers, so they never change. packed_format.cpp has a row for each.
enum class Format : int64_t {
  kTiledCsl = 1,
  kBitmap = 2,
  kRowBitmap = 3,
  kGather = 4,
  kQuantizedBitmap = 5,
};

struct PackedHeader {
  int64_t magic = kPackedMagic;
  int64_t version = 0;  // from 1 to the version that this build writes
  Format format = Format::kTiledCsl;
  ValueType value_type = ValueType::kFloat16;
  int64_t m = 0;              // rows of the weight: out_features
  int64_t k = 0;              // columns of the weight: in_features
  int64_t nnz = 0;            // values that are not zero
  int64_t payload_words = 0;  // 32-bit words in the payload, padding included

  // A header of the version that this build writes, with all sizes 0.
  static PackedHeader of(Format format);

  std::array<int64_t, kPackedHeaderInts> to_ints() const;
  // Reads and checks `count` ints: magic, known format, version and type, sizes within range.
  static Status from_ints(const int64_t* ints, int64_t count, PackedHeader* out);
};

}  // namespace flash_llm
