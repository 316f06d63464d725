// Conversions between raw fp16 / bf16 patterns and float, written so that loops over them
// vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "format/packed_header.h"

namespace flash_llm {

// All bits of a value but its sign. Compared as integers they have the order of the magnitudes.
inline constexpr uint16_t kMagnitudeMask = 0x7FFF;

// Whether a value is ±0, which packing drops.
inline bool is_zero(uint16_t raw) { return (raw & kMagnitudeMask) == 0; }

// The same for quantised values, which are a byte here, however few bits are stored. 0x80 is -0 in
// fp8, and no integer that a weight has.
inline bool is_zero(uint8_t raw) { return (raw & 0x7F) == 0; }

// What a quantised value that no weight stores is; null for one that is on its grid and not zero.
inline const char* unstorable(ValueType type, uint8_t raw) {
  if (raw == 0) return "zero";
  const auto integer = static_cast<int8_t>(raw);
  switch (value_traits(type).kind) {
    case ValueKind::kInt8:
      return integer == -128 ? "-128" : nullptr;
    case ValueKind::kFp8E4m3:
      return raw == 0x80 ? "zero" : (raw & 0x7F) == 0x7F ? "NaN" : nullptr;
    case ValueKind::kInt4:
      return integer == -8 ? "-8" : integer < -7 || integer > 7 ? "outside -7 ... 7" : nullptr;
    case ValueKind::k16Bit:
      break;
  }
  return nullptr;  // never: `type` is quantised
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The raw pattern of a value. int4 values are sign-extended to a byte here; stored, they are a
// nibble of value + 8.
template <ValueType kType>
using RawOf = std::conditional_t<value_traits(kType).bits == 16, uint16_t, uint8_t>;
inline int raw_bytes(ValueType type) { return value_traits(type).bits == 16 ? 2 : 1; }
inline uint8_t to_nibble(uint8_t raw) { return static_cast<uint8_t>((raw + 8) & 0xF); }
inline uint8_t from_nibble(uint8_t nibble) { return static_cast<uint8_t>(nibble - 8); }

// Exact for every pattern, NaN payloads included.
template <ValueType kType>
inline float to_float(RawOf<kType> raw) {
  const uint32_t wide = raw;
  if constexpr (value_traits(kType).kind == ValueKind::kFp8E4m3) {
    // As fp16 below: a subnormal mantissa is put under an implicit one, which is subtracted.
    const uint32_t magnitude = (wide & 0x7FU) << 20;
    const uint32_t normal = magnitude + 0x3C000000U;
    const uint32_t subnormal =
        float_to_bits(bits_to_float(magnitude + 0x3C800000U) - bits_to_float(0x3C800000U));
    uint32_t bits = magnitude < 0x00800000U ? subnormal : normal;
    bits = magnitude == 0x07F00000U ? 0x7FC00000U : bits;
    return bits_to_float(bits | (wide & 0x80U) << 24);
  } else if constexpr (is_quantized(kType)) {
    return static_cast<float>(static_cast<int8_t>(raw));
  } else if constexpr (kType == ValueType::kBfloat16) {
    return bits_to_float(wide << 16);
  } else {
    // Normal: move exponent and mantissa up and rebias. Subnormal: put the mantissa under an
    // implicit one and subtract that one, which normalises it. No fp32 operand is subnormal, so
    // torch.set_flush_denormal changes nothing. Inf and NaN keep an exponent of all ones.
    const uint32_t magnitude = (wide & 0x7FFFU) << 13;
    const uint32_t normal = magnitude + 0x38000000U;
    const uint32_t subnormal =
        float_to_bits(bits_to_float(magnitude + 0x38800000U) - bits_to_float(0x38800000U));
    uint32_t bits = magnitude < 0x00800000U ? subnormal : normal;
    bits = magnitude >= 0x0F800000U ? magnitude | 0x7F800000U : bits;
    return bits_to_float(bits | (wide & 0x8000U) << 16);
  }
}

// Rounds to nearest, ties to even; overflow gives Inf, NaN stays NaN.
template <ValueType kType>
inline uint16_t from_float(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  uint32_t magnitude = bits & 0x7FFFFFFFU;
  if constexpr (kType == ValueType::kBfloat16) {
    if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7FC0U);
    return static_cast<uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
  } else {
    if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
    if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // >= 65520
    if (magnitude < 0x38800000U) {
      // Subnormal result: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
      const float shifted = bits_to_float(magnitude) + 0.5F;
      return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3F000000U));
    }
    magnitude += 0xFFFU + (magnitude >> 13 & 1U);
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000U) >> 13));
  }
}

// The element of the weight that a quantised value of type kType stands for, as a 16-bit pattern.
// It is what torch computes by (value.float() * scale).to(dtype).
template <ValueType kType>
inline uint16_t dequantize(uint8_t value, float scale) {
  return from_float<value_traits(kType).dense>(to_float<kType>(value) * scale);
}

// Reads and writes scales as payloads store them: as fp32 or fp16.
inline float load_scale(ValueType type, const void* scales, int64_t index) {
  const auto* from = static_cast<const char*>(scales) + index * scale_bytes(type);
  if (scale_bytes(type) == 2) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    return to_float<ValueType::kFloat16>(bits);
  }
  float scale;
  std::memcpy(&scale, from, sizeof(scale));
  return scale;
}
inline void store_scale(ValueType type, float scale, void* scales, int64_t index) {
  auto* to = static_cast<char*>(scales) + index * scale_bytes(type);
  if (scale_bytes(type) == 2) {
    const uint16_t bits = from_float<ValueType::kFloat16>(scale);
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    std::memcpy(to, &scale, sizeof(scale));
  }
}

// Whether a scale is a positive normal number of the type that stores it. (It may still need more
// digits than that type has.)
inline bool is_normal_scale(ValueType type, float scale) {
  const bool half = scale_bytes(type) == 2;
  return scale >= (half ? 0x1p-14F : 0x1p-126F) && scale <= (half ? 65504.0F : 0x1.FFFFFEp127F);
}

// Rounds to odd: returns `value` if it is a float, else the neighbouring float whose last bit is 1.
// Rounding that to 16 bits gives the same as rounding `value` directly: no tie appears or vanishes.
inline float round_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  const double difference = value - static_cast<double>(nearest);
  const uint32_t bits = float_to_bits(nearest);
  if (!(difference != 0.0) || (bits & 1U) != 0 || difference != difference) return nearest;
  // `nearest` is the even neighbour; the odd one lies on the other side of `value`.
  const bool away_from_zero = (difference > 0.0) == (value > 0.0);
  return bits_to_float(away_from_zero ? bits + 1 : bits - 1);
}

}  // namespace flash_llm
