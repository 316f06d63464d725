#include "core/packed_format.h"

#include "core/bitmap.h"
#include "core/row_bitmap.h"
#include "core/tiled_csl.h"

namespace flash_llm {
namespace {

constexpr PackedFormat kFormats[] = {
    {Format::kTiledCsl, "tiled_csl", kTileM, kTileK, kVectorEntries, tiled_csl_count,
     tiled_csl_pack, tiled_csl_unpack_tile_row, tiled_csl_check_sizes, tiled_csl_validate},
    {Format::kBitmap, "bitmap", kChunkM, kChunkK, kChunkUnitWords, bitmap_count, bitmap_pack,
     bitmap_unpack_tile_row, bitmap_check_sizes, bitmap_validate},
    // A tile is a block of whole rows, however long.
    {Format::kRowBitmap, "row_bitmap", kBlockRows, INT32_MAX, kBlockUnitWords, row_bitmap_count,
     row_bitmap_pack, row_bitmap_unpack_block, row_bitmap_check_sizes, row_bitmap_validate},
};

}  // namespace

const PackedFormat& packed_format(Format id) {
  for (const PackedFormat& format : kFormats) {
    if (format.id == id) return format;
  }
  return kFormats[0];
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

void unpack(const PackedFormat& format, const PackedView& view, const ParallelFor& parallel_for,
            uint16_t* dense) {
  parallel_for(format.tile_rows(view.m), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      format.unpack_tile_row(view, row, dense + row * format.tile_m * view.k);
    }
  });
}

}  // namespace flash_llm
