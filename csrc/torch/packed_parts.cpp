#include "torch/packed_parts.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <utility>
#include <vector>

namespace flash_llm {
namespace {

using at::Tensor;

int64_t count_stored(const PackedHeader& header, const Tensor& offsets, const Tensor& payload) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_llm::count_stored", "")
                             .typed<int64_t(at::IntArrayRef, const Tensor&, const Tensor&)>();
  return op.call(header.to_ints(), offsets, payload);
}

Tensor unpack(const PackedWeight& weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_llm::unpack", "")
                             .typed<Tensor(at::IntArrayRef, const Tensor&, const Tensor&)>();
  return op.call(weight.header.to_ints(), weight.offsets, weight.payload);
}

Packed pack(const Tensor& dense, Format format) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_llm::pack", "")
                             .typed<Packed(const Tensor&, c10::string_view, int64_t)>();
  return op.call(dense, packed_format(format).name, 0);
}

Quantized unpack_quantized(const PackedWeight& weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_llm::unpack_quantized", "")
                             .typed<Quantized(at::IntArrayRef, const Tensor&, const Tensor&)>();
  return op.call(weight.header.to_ints(), weight.offsets, weight.payload);
}

// Packs values and scales as a weight of the type and format that `like` has.
Packed pack_quantized(const Tensor& values, const Tensor& scales, const PackedHeader& like) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("flash_llm::pack_quantized", "")
          .typed<Packed(const Tensor&, const Tensor&, at::ScalarType, c10::string_view)>();
  return op.call(values, scales, scalar_type(like.value_type), packed_format(like.format).name);
}

// Whether the bytes are those that this build's packer writes.
bool is_current(const PackedWeight& weight) {
  return weight.header.version == weight.format().version;
}

void check_range(const char* what, int64_t first, int64_t last, int64_t size) {
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= size, "flash_llm::slice: ", what,
                    " must satisfy 0 <= first <= last <= ", size, ", got ", first, " and ", last);
}

// Rows [first_row, last_row), whole tile rows, by copying a part of both buffers.
Packed copy_rows(const PackedWeight& weight, int64_t first_row, int64_t last_row) {
  const PackedFormat& format = weight.format();
  const int64_t tile_cols = format.tile_cols(weight.header.value_type, weight.header.k);
  const int64_t first = first_row / format.tile_m * tile_cols;
  const int64_t last = format.tile_rows(last_row) * tile_cols;
  const Tensor range = weight.offsets.narrow(0, first, last - first + 1);
  const Tensor ends = at::stack({range[0], range[last - first]}).cpu();
  const int64_t begin = ends[0].item<int64_t>(), end = ends[1].item<int64_t>();
  TORCH_CHECK_VALUE(
      0 <= begin && begin <= end && end <= weight.header.payload_words / format.unit_words,
      "flash_llm::slice: offsets are malformed: rows ", first_row, " to ", last_row,
      " lie in units ", begin, " to ", end);
  const Tensor offsets = (range - begin).to(at::kInt);
  const Tensor payload =
      weight.payload.narrow(0, begin * format.unit_words, (end - begin) * format.unit_words)
          .clone();
  PackedHeader header = weight.header;
  header.m = last_row - first_row;
  header.payload_words = payload.numel();
  header.nnz = payload.numel();  // every format's check_sizes accepts this; counted next
  header.nnz = count_stored(header, offsets, payload);
  return {header_tensor(header), offsets, payload};
}

std::vector<PackedWeight> check_parts(at::IntArrayRef headers, at::TensorList offsets,
                                      at::TensorList payloads) {
  const size_t count = offsets.size();
  TORCH_CHECK_VALUE(count > 0, "flash_llm::concat: weights must not be empty");
  TORCH_CHECK_VALUE(payloads.size() == count && headers.size() == count * kPackedHeaderInts,
                    "flash_llm::concat: ", count, " weights need as many payloads and ",
                    kPackedHeaderInts, " integers each, got ", payloads.size(), " payloads and ",
                    headers.size(), " integers");
  std::vector<PackedWeight> parts;
  for (size_t i = 0; i < count; ++i) {
    parts.push_back(check_packed("concat", headers.slice(i * kPackedHeaderInts, kPackedHeaderInts),
                                 offsets[i], payloads[i]));
    const PackedHeader &first = parts.front().header, &h = parts.back().header;
    TORCH_CHECK_VALUE(h.k == first.k, "flash_llm::concat: all weights must have K=", first.k,
                      " columns, weight ", i, " has ", h.k);
    TORCH_CHECK_TYPE(h.format == first.format && h.value_type == first.value_type,
                     "flash_llm::concat: all weights must have format \"",
                     packed_format(first.format).name, "\" and values of type ",
                     value_traits(first.value_type).name, ", weight ", i, " has \"",
                     packed_format(h.format).name, "\" and ", value_traits(h.value_type).name);
    TORCH_CHECK_TYPE(payloads[i].device() == payloads[0].device(),
                     "flash_llm::concat: all weights must be on ", payloads[0].device(),
                     ", weight ", i, " is on ", payloads[i].device());
  }
  return parts;
}

}  // namespace

Packed slice(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload,
             int64_t first_row, int64_t last_row, int64_t first_col, int64_t last_col) {
  const PackedWeight weight = check_packed("slice", header, offsets, payload);
  const PackedHeader& h = weight.header;
  check_range("rows", first_row, last_row, h.m);
  check_range("columns", first_col, last_col, h.k);
  const int64_t border = weight.format().slice_rows;
  const bool at_borders = first_row % border == 0 && (last_row % border == 0 || last_row == h.m);
  if (first_col == 0 && last_col == h.k && at_borders && is_current(weight)) {
    return copy_rows(weight, first_row, last_row);
  }
  const int64_t rows = last_row - first_row, cols = last_col - first_col;
  if (is_quantized(h.value_type)) {
    const auto [values, all_scales] = unpack_quantized(weight);
    Tensor scales = all_scales.narrow(0, first_row, rows);
    if (value_traits(h.value_type).scales == ScaleGroup::kRowGroup) {
      TORCH_CHECK_VALUE(cols == 0 || first_col % kScaleGroupCols == 0,
                        "flash_llm::slice: columns of ", value_traits(h.value_type).values,
                        " values must begin at a multiple of ", kScaleGroupCols,
                        ", which share a scale, got ", first_col);
      scales = scales.narrow(1, first_col / kScaleGroupCols, scales_per_row(h.value_type, cols));
    }
    return pack_quantized(values.narrow(0, first_row, rows).narrow(1, first_col, cols), scales, h);
  }
  return pack(unpack(weight).narrow(0, first_row, rows).narrow(1, first_col, cols), h.format);
}

Packed concat(at::IntArrayRef headers, at::TensorList offsets, at::TensorList payloads) {
  const std::vector<PackedWeight> parts = check_parts(headers, offsets, payloads);
  const PackedFormat& format = parts.front().format();
  PackedHeader joined = PackedHeader::of(format.id);
  joined.value_type = parts.front().header.value_type;
  joined.k = parts.front().header.k;
  bool copies = true;
  for (size_t i = 0; i < parts.size(); ++i) {
    const PackedHeader& h = parts[i].header;
    copies &= is_current(parts[i]) && (i + 1 == parts.size() || h.m % format.slice_rows == 0);
    joined.m += h.m;
    joined.nnz += h.nnz;
    joined.payload_words += h.payload_words;
  }
  if (!copies && is_quantized(joined.value_type)) {
    std::vector<Tensor> all_values, all_scales;
    for (const PackedWeight& part : parts) {
      auto [values, scales] = unpack_quantized(part);
      all_values.push_back(std::move(values));
      all_scales.push_back(std::move(scales));
    }
    return pack_quantized(at::cat(all_values), at::cat(all_scales), joined);
  }
  if (!copies) {
    std::vector<Tensor> dense;
    for (const PackedWeight& part : parts) dense.push_back(unpack(part));
    return pack(at::cat(dense), format.id);
  }
  TORCH_CHECK_VALUE(joined.m <= INT32_MAX && joined.payload_words / format.unit_words <= INT32_MAX,
                    "flash_llm::concat: ", joined.m, " rows with ", joined.nnz,
                    " nonzeros are more than 31-bit offsets can address");
  std::vector<Tensor> all_offsets, all_payloads;
  int64_t units = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Tensor& own = parts[i].offsets;
    // The last offset of a weight is the first of the next.
    const Tensor kept = i + 1 == parts.size() ? own : own.narrow(0, 0, own.numel() - 1);
    all_offsets.push_back((kept + units).to(at::kInt));
    all_payloads.push_back(parts[i].payload);
    units += parts[i].header.payload_words / format.unit_words;
  }
  return {header_tensor(joined), at::cat(all_offsets), at::cat(all_payloads)};
}

}  // namespace flash_llm
