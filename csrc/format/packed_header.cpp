#include "format/packed_header.h"

#include <cstddef>
#include <string>

#include "format/packed_format.h"

namespace flash_llm {

PackedHeader PackedHeader::of(Format format) {
  PackedHeader header;
  header.version = packed_format(format).version;
  header.format = format;
  return header;
}

std::array<int64_t, kPackedHeaderInts> PackedHeader::to_ints() const {
  return {magic, version,      static_cast<int64_t>(format), static_cast<int64_t>(value_type), m, k,
          nnz,   payload_words};
}

Status PackedHeader::from_ints(const int64_t* ints, int64_t count, PackedHeader* out) {
  if (count != kPackedHeaderInts) {
    return Status::invalid_value("header must hold " + std::to_string(kPackedHeaderInts) +
                                 " integers, got " + std::to_string(count));
  }
  if (ints[0] != kPackedMagic) {
    return Status::invalid_value("header must begin with the magic number " +
                                 std::to_string(kPackedMagic) + ", got " + std::to_string(ints[0]));
  }
  const PackedFormat* format = nullptr;
  if (Status status = format_of(ints[2], &format); !status.ok()) return status;
  if (ints[1] < 1 || ints[1] > format->version) {
    return Status::unsupported(
        "header has format version " + std::to_string(ints[1]) + ", this build reads version" +
        (format->version == 1 ? std::string(" 1") : "s 1 to " + std::to_string(format->version)));
  }
  if (Status status = value_type_of(ints[3], &out->value_type); !status.ok()) return status;
  if (Status status = check_holds(*format, out->value_type); !status.ok()) return status;
  static constexpr const char* kSizeNames[] = {"m", "k", "nnz", "payload_words"};
  for (size_t i = 0; i < 4; ++i) {
    if (ints[4 + i] < 0) {
      return Status::invalid_value(std::string("header field ") + kSizeNames[i] +
                                   " must not be negative, got " + std::to_string(ints[4 + i]));
    }
  }
  // With this bound the product of m and k fits 64 bits.
  for (size_t i = 0; i < 2; ++i) {
    if (ints[4 + i] > INT32_MAX) {
      return Status::invalid_value(std::string("header field ") + kSizeNames[i] +
                                   " must fit 31 bits, got " + std::to_string(ints[4 + i]));
    }
  }
  out->magic = ints[0];
  out->version = ints[1];
  out->format = format->id;
  out->m = ints[4];
  out->k = ints[5];
  out->nnz = ints[6];
  out->payload_words = ints[7];
  return Status::success();
}

}  // namespace flash_llm
