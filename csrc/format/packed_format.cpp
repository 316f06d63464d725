#include "format/packed_format.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "format/bitmap.h"
#include "format/element.h"
#include "format/gather.h"
#include "format/quantized_bitmap.h"
#include "format/row_bitmap.h"
#include "format/tiled_csl.h"

namespace flash_llm {
namespace {

// The columns of a tile, for formats in which the value type does not matter.
template <int kCols>
int columns(ValueType /*type*/) {
  return kCols;
}

constexpr std::array<PackedFormat, kNumFormats> kFormats = {{
    {Format::kTiledCsl, "tiled_csl", 1, kTileM, columns<kTileK>, kVectorEntries, kTileM, k16Bit,
     [](double density, int /*value_bits*/) { return 4 * density; }, tiled_csl_count,
     tiled_csl_pack, tiled_csl_unpack_tile_row, tiled_csl_count_stored, tiled_csl_check_sizes,
     tiled_csl_validate},
    // slice_rows is a band: the kind of a pair of chunk columns is chosen for a whole band.
    {Format::kBitmap, "bitmap", 2, kChunkM, columns<kChunkK>, kChunkUnitWords,
     kBandChunkRows* kChunkM, k16Bit,
     // The fixed part of a plain chunk without the padding of its values: 576 bytes (bits and down
     // offsets) for 4096 elements. Packed weights take 0.18 to 0.21 + 2 * density, so in bytes this
     // format breaks even with Tiled-CSL just under density 0.10, not at the 0.07 that this
     // estimate gives. Which kernel is faster in between was not measured.
     [](double density, int value_bits) { return 0.14 + value_bits / 8.0 * density; }, bitmap_count,
     bitmap_pack, bitmap_unpack_tile_row, bitmap_count_stored, bitmap_check_sizes, bitmap_validate},
    // A tile is a block of whole rows, however long.
    {Format::kRowBitmap, "row_bitmap", 1, kBlockRows, columns<INT32_MAX>, kBlockUnitWords,
     kBlockRows, kEveryType,
     // One bit for each element. The padding is 0.1 % at 50 % zeros of a large weight.
     [](double density, int value_bits) { return 0.125 + value_bits / 8.0 * density; },
     row_bitmap_count, row_bitmap_pack, row_bitmap_unpack_block, row_bitmap_count_stored,
     row_bitmap_check_sizes, row_bitmap_validate},
    {Format::kGather, "gather", 1, kGatherTileM, columns<kGatherTileK>, kGatherUnitWords,
     kGatherTileM, k16Bit,
     // Measured: 28672x7168 at 70, 80 and 90 % zeros takes 0.925, 0.622 and 0.317.
     [](double density, int /*value_bits*/) { return 0.012 + 3.05 * density; }, gather_count,
     gather_pack, gather_unpack_tile_row, gather_count_stored, gather_check_sizes, gather_validate},
    // Beside its bits a plane has 32 bytes for its columns, and a chunk 5 to 8 % of padding in its
    // values.
    {Format::kQuantizedBitmap, "quantized_bitmap", 1, kQuantStripM, quant_chunk_k, kQuantUnitWords,
     kQuantStripM, kQuantizedTypes,
     [](double density, int value_bits) { return 0.134 + 1.06 * value_bits / 8.0 * density; },
     quantized_bitmap_count, quantized_bitmap_pack, quantized_bitmap_unpack_strip,
     quantized_bitmap_count_stored, quantized_bitmap_check_sizes, quantized_bitmap_validate},
}};

// Row i is the format of number i + 1.
constexpr bool rows_are_in_order() {
  for (size_t i = 0; i < kFormats.size(); ++i) {
    if (kFormats[i].id != static_cast<Format>(i + 1)) return false;
  }
  return true;
}
static_assert(rows_are_in_order());

template <ValueType kType>
void dequantize_row(const uint8_t* values, const float* scales, int64_t k, uint16_t* dense) {
  if constexpr (value_traits(kType).scales == ScaleGroup::kRowGroup) {
    for (int64_t first = 0; first < k; first += kScaleGroupCols) {
      const int64_t last = std::min(k, first + kScaleGroupCols);
      for (int64_t col = first; col < last; ++col) {
        dense[col] = dequantize<kType>(values[col], *scales);
      }
      ++scales;
    }
  } else {
    for (int64_t col = 0; col < k; ++col) dense[col] = dequantize<kType>(values[col], *scales);
  }
}

using DequantizeRow = void (*)(const uint8_t* values, const float* scales, int64_t k,
                               uint16_t* dense);

// Null for 16-bit values.
DequantizeRow dequantizer_of(ValueType type) {
  switch (type) {
    case ValueType::kInt8Float16:
      return dequantize_row<ValueType::kInt8Float16>;
    case ValueType::kInt8Bfloat16:
      return dequantize_row<ValueType::kInt8Bfloat16>;
    case ValueType::kFp8Float16:
      return dequantize_row<ValueType::kFp8Float16>;
    case ValueType::kFp8Bfloat16:
      return dequantize_row<ValueType::kFp8Bfloat16>;
    case ValueType::kInt4Float16:
      return dequantize_row<ValueType::kInt4Float16>;
    case ValueType::kInt4Bfloat16:
      return dequantize_row<ValueType::kInt4Bfloat16>;
    case ValueType::kFloat16:
    case ValueType::kBfloat16:
      break;
  }
  return nullptr;
}

}  // namespace

const std::array<PackedFormat, kNumFormats>& all_formats() { return kFormats; }

const PackedFormat& packed_format(Format id) { return kFormats[static_cast<size_t>(id) - 1]; }

Status format_of(int64_t number, const PackedFormat** out) {
  std::string known;
  for (const PackedFormat& format : kFormats) {
    if (number == static_cast<int64_t>(format.id)) {
      *out = &format;
      return Status::success();
    }
    known += (known.empty() ? "" : ", ") + std::to_string(static_cast<int64_t>(format.id)) + " (" +
             format.name + ")";
  }
  return Status::unsupported("header names format " + std::to_string(number) +
                             ", this build knows " + known);
}

Status parse_format(const std::string& name, Format* out) {
  std::string known;
  for (const PackedFormat& format : kFormats) {
    if (name == format.name) {
      *out = format.id;
      return Status::success();
    }
    known += (known.empty() ? "\"" : " or \"") + std::string(format.name) + "\"";
  }
  return Status::invalid_value("format must be \"auto\" or " + known + ", got \"" + name + "\"");
}

Status check_holds(const PackedFormat& format, ValueType type) {
  if (format.value_types.contains(type)) return Status::success();
  std::string others;
  for (const PackedFormat& other : kFormats) {
    if (other.value_types.contains(type)) {
      others += (others.empty() ? "\"" : ", \"") + std::string(other.name) + "\"";
    }
  }
  return Status::invalid_type("format \"" + std::string(format.name) + "\" cannot hold " +
                              value_traits(type).values + " values; formats that can: " + others);
}

void unpack_values(const PackedFormat& format, const PackedView& view,
                   const ParallelFor& parallel_for, void* values, float* scales) {
  const int64_t row_bytes = view.k * raw_bytes(view.value_type);
  const int64_t row_scales = scales_per_row(view.value_type, view.k);
  parallel_for(format.tile_rows(view.m), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      const int64_t row0 = tile_row * format.tile_m;
      format.unpack_tile_row(view, tile_row, static_cast<uint8_t*>(values) + row0 * row_bytes,
                             scales == nullptr ? nullptr : scales + row0 * row_scales);
    }
  });
}

void unpack_tile_rows(const PackedFormat& format, const PackedView& view, int64_t first,
                      int64_t last, const ParallelFor& parallel_for, uint16_t* dense) {
  const DequantizeRow dequantize = dequantizer_of(view.value_type);
  const int64_t row_scales = scales_per_row(view.value_type, view.k);
  parallel_for(last - first, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> values(
        dequantize == nullptr ? 0 : static_cast<size_t>(format.tile_m * view.k));
    std::vector<float> scales(static_cast<size_t>(format.tile_m * row_scales));
    for (int64_t i = begin; i < end; ++i) {
      uint16_t* to = dense + i * format.tile_m * view.k;
      if (dequantize == nullptr) {
        format.unpack_tile_row(view, first + i, to, nullptr);
        continue;
      }
      format.unpack_tile_row(view, first + i, values.data(), scales.data());
      const int64_t rows = std::min<int64_t>(format.tile_m, view.m - (first + i) * format.tile_m);
      for (int64_t row = 0; row < rows; ++row) {
        dequantize(values.data() + row * view.k, scales.data() + row * row_scales, view.k,
                   to + row * view.k);
      }
    }
  });
}

void unpack(const PackedFormat& format, const PackedView& view, const ParallelFor& parallel_for,
            uint16_t* dense) {
  unpack_tile_rows(format, view, 0, format.tile_rows(view.m), parallel_for, dense);
}

}  // namespace flash_llm
