// Decodes the runs of a chunk of the quantised bitmap (format/quantized_bitmap.h) in shared memory.
// A run's values are bytes of a column of words, and one byte permutation takes up to four of them
// to their elements. It reads a window of four bytes that begins or ends where the fragment does:
// the low elements are read forward from the fragment's begin, the high ones backward from its end
// (in a downward run the other way round). Each border between fragments therefore serves two
// windows, which two funnel shifts cut from three neighbouring words.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/status.h"
#include "format/quantized_bitmap.h"

namespace flash_llm {

// Not volatile, unlike the loads of ptx/: their addresses depend on bits that were loaded after the
// wait, and the compiler may interleave the runs.
template <int kOffset>
__device__ __forceinline__ uint32_t load_run_word(uint32_t smem) {
  uint32_t word;
  asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(smem), "n"(kOffset));
  return word;
}

// The first loads of a chunk. Volatile: nothing but their place orders them after the wait.
template <int kOffset>
__device__ __forceinline__ uint32_t load_first_word(uint32_t smem) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(smem), "n"(kOffset) : "memory");
  return word;
}

// prmt.b32. (__byte_perm masks the selector first.)
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Constants of RunReader: what a position moves by for each value, the bytes of a column, and what
// RunReader::take() adds to products. They are kernel parameters because of what the compiler does
// with known numbers: it would replace the multiplications by shifts, which take the busiest pipe,
// and keep the six factors of those products in registers instead of the two addends.
struct RunSteps {
  uint32_t up_bits = 8, up_address = kQuantRowBytes / 4;
  uint32_t down_bits = 0U - 8, down_address = 0U - kQuantRowBytes / 4;
  uint32_t column = 4;
  uint32_t forward = 0x4444U, backward = 0x7777U;
};

// The upper half of `pair`, as the lower half of the result. A shift takes the busiest pipe, so on
// Hopper the pipe of floating-point numbers adds -0 to it, which is exact unless it is a NaN of
// fp16. (mul.hi.u32 takes longer than a shift, and other GPUs were not timed.)
__device__ __forceinline__ uint32_t upper_half(uint32_t pair) {
#if __CUDA_ARCH__ == 900
  uint32_t result;
  asm("{\n"
      ".reg .b16 low, high;\n"
      ".reg .b32 twice;\n"
      "mov.b32 {low, high}, %1;\n"
      "mov.b32 twice, {high, high};\n"
      "add.rn.f16x2 %0, twice, %2;\n"
      "}"
      : "=r"(result)
      : "r"(pair), "r"(0x80008000U));
  return result;
#else
  return pair >> 16;
#endif
}

// What a run's windows hold. Every struct has
//   kZero        four bytes of an element that is not stored
//   first_bit()  where in a run's first byte its first window begins
//   kept()       the four bytes of a window as they go to elements
template <uint8_t kByte>
struct StoredBytes {
  static constexpr uint32_t kZero = 0x01010101U * kByte;
  __device__ __forceinline__ static constexpr int first_bit(int /*plane*/) { return 0; }
  __device__ __forceinline__ static uint32_t kept(uint32_t window) { return window; }
};

// Nibbles at bit kBit of a window's bytes, with the bits kFlipped of each nibble inverted. Plane 0
// has the low nibbles of the run's bytes, so its windows begin kBit bits before the bytes do.
template <int kBit, uint32_t kFlipped>
struct StoredNibbles {
  static constexpr uint32_t kMask = 0x0F0F0F0FU << kBit, kFlips = 0x01010101U * kFlipped << kBit;
  // A nibble is value + 8.
  static constexpr uint32_t kZero = 0x08080808U << kBit ^ kFlips;
  __device__ __forceinline__ static constexpr int first_bit(int plane) { return 4 * plane - kBit; }
  // (window & kMask) ^ kFlips by one instruction. The compiler makes two, since an instruction
  // holds one constant; here it keeps the other in a register.
  __device__ __forceinline__ static uint32_t kept(uint32_t window) {
    if constexpr (kFlips == 0) return window & kMask;
    uint32_t nibbles;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(nibbles) : "r"(window), "n"(kMask), "n"(kFlips));
    return nibbles;
  }
};

// A position in a lane's run: between two bytes of its column, or a few bits before or after that.
template <bool kUp>
struct RunReader {
  uint32_t address;  // of row 0, plus 4 times the position in the column, in bits
  uint32_t bits;     // that position
  uint32_t column;   // byte offset of the column in a row
  uint32_t window;   // the next four bytes in the direction of the run

  // The run begins at `row`, the 128-byte aligned address of the row above the position.
  __device__ __forceinline__ RunReader(uint32_t row, uint32_t own_column, int first_bit = 0)
      : address(row + 4 * first_bit),
        bits(first_bit),
        column(own_column),
        window(load_first_word<(kUp ? 0 : -kQuantRowBytes)>(row + own_column)) {
    window = __funnelshift_r(window, window, first_bit);  // no nibble wraps around
  }

  // Returns the low and the high elements of fragment kFragment of a word, one in each byte, and
  // moves on. Bytes says what they are.
  template <int kFragment, typename Bytes>
  __device__ __forceinline__ void take(uint32_t word, const RunSteps& steps, uint32_t& low,
                                       uint32_t& high) {
    // With the fragment's bits b0 ... b3 at bits 0, 4, 8, 12 of s, nibble e of
    //   0x4444 + s * 0x110C  is b0 + ... + b(e-1) if b_e, else 4 to 7, which select kZero
    //   0x7777 - s * 0x1114  is 3 - (b0 + ... + b(e-1)) if b_e, else 4 to 7
    // The factors make up for the shift of the bits by kFragment, except that a factor would not be
    // whole for the last fragment. prmt ignores the upper half of a selector. 0x4444 and 0x7777 are
    // steps.forward and steps.backward.
    constexpr int kShift = kFragment == 3 ? 0 : kFragment;
    constexpr uint32_t kForward = 0x110CU >> kShift, kBackward = 0x1114U >> kShift;
    const uint32_t stored = (kFragment == 3 ? word >> 3 : word) & (0x11111111U << kShift);
    const uint32_t low_bits = stored, high_bits = upper_half(stored);
    const uint32_t forward = (kUp ? low_bits : high_bits) * kForward + steps.forward;
    const uint32_t backward = (kUp ? high_bits : low_bits) * (0U - kBackward) + steps.backward;
    const uint32_t count = __popc(stored);
    bits = count * (kUp ? steps.up_bits : steps.down_bits) + bits;
    address = count * (kUp ? steps.up_address : steps.down_address) + address;
    const uint32_t at = (address & ~(kQuantRowBytes - 1U)) | column;
    const uint32_t w0 = load_run_word<-kQuantRowBytes>(at), w1 = load_run_word<0>(at),
                   w2 = load_run_word<kQuantRowBytes>(at);
    const uint32_t before = __funnelshift_r(w0, w1, bits), after = __funnelshift_r(w1, w2, bits);
    if constexpr (kUp) {
      low = permute_bytes(Bytes::kept(window), Bytes::kZero, forward);
      high = permute_bytes(Bytes::kept(before), Bytes::kZero, backward);
      window = after;
    } else {
      low = permute_bytes(Bytes::kept(window), Bytes::kZero, backward);
      high = permute_bytes(Bytes::kept(after), Bytes::kZero, forward);
      window = before;
    }
  }
};

// A lane's part of a plane of a chunk in shared memory: what lies above its values.
template <int kPlanes>
struct QuantPlane {
  uint32_t bits[kQuantWords];
  uint32_t column;  // of the downward run

  // `top` is the 128-byte aligned address of the row above the values.
  __device__ __forceinline__ QuantPlane(uint32_t top, int plane, int lane) {
    const uint32_t words = top + plane * kQuantBitsBytes + lane * 4;
    bits[0] = load_first_word<0>(words);
    bits[1] = load_first_word<128>(words);
    bits[2] = load_first_word<2 * 128>(words);
    bits[3] = load_first_word<3 * 128>(words);
    const uint32_t columns = top + kPlanes * kQuantBitsBytes + plane * kQuantColumnsBytes;
    column = ptx::load_shared_u8(columns + lane) & (kQuantRowBytes - 4U);
  }
};

// What the bytes of a kind of values become. Every one has
//   kDense     the type of the weight's elements
//   Bytes      what is read of the runs
//   widen()    two elements of a register of four bytes, as 16-bit numbers: 0 and 1, or 2 and 3;
//              each is the value divided by kUnit
template <ValueType kType>
struct QuantValues;

template <>
struct QuantValues<ValueType::kInt8Float16> {
  static constexpr ValueType kDense = ValueType::kFloat16;
  using Bytes = StoredBytes<kQuantZero>;

  // A byte is a subnormal fp16 number, so no register has to hold a bias.
  static constexpr float kUnit = 0x1p24F;
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen(uint32_t bytes) {
    const uint32_t biased = permute_bytes(bytes, 0, kHalf == 0 ? 0x4140U : 0x4342U);
    const __half2 bias = __half2half2(__ushort_as_half(kQuantZero));
    const __half2 value = __hsub2(reinterpret_cast<const __half2&>(biased), bias);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

template <>
struct QuantValues<ValueType::kInt8Bfloat16> {
  static constexpr ValueType kDense = ValueType::kBfloat16;
  using Bytes = StoredBytes<kQuantZero>;

  static constexpr float kUnit = 1.0F;
  // As the low half of a bfloat16 number a byte is 256 + value below 0 and 256 + 2 * value above,
  // from which the positive value is subtracted once. All steps are exact, and the busiest pipe, of
  // integer logic, has only the first.
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen(uint32_t bytes) {
    const uint32_t wide = permute_bytes(bytes, 0x43434343U, kHalf == 0 ? 0x4140U : 0x4342U);
    const auto& number = reinterpret_cast<const __nv_bfloat162&>(wide);
    const __nv_bfloat162 positive =
        __hfma2_relu(number, __float2bfloat162_rn(0.5F), __float2bfloat162_rn(-float{kQuantZero}));
    const __nv_bfloat162 value =
        __hsub2(__hadd2(number, __float2bfloat162_rn(-2.0F * kQuantZero)), positive);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

// int4 values become int8 values that are 16 times as large. Besides, these types have
//   GroupScale     a scale of some columns of a row
//   widen_scaled() as widen(), but each element is the value times the scale, rounded to nearest:
//                  the element of the weight
template <>
struct QuantValues<ValueType::kInt4Float16> : QuantValues<ValueType::kInt8Float16> {
  using Bytes = StoredNibbles<4, 0>;
  static constexpr float kUnit = QuantValues<ValueType::kInt8Float16>::kUnit / 16;

  struct GroupScale {
    __half2 scale;

    __device__ __forceinline__ explicit GroupScale(uint16_t bits)
        : scale(__half2half2(__ushort_as_half(bits))) {}
  };
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen_scaled(uint32_t bytes, const GroupScale& group) {
    // A byte is 16 * value + 128, and 1024 + byte a number of the same upper byte.
    const uint32_t wide = permute_bytes(bytes, 0x64646464U, kHalf == 0 ? 0x4140U : 0x4342U);
    const __half2 value = __hfma2(reinterpret_cast<const __half2&>(wide),
                                  __float2half2_rn(1.0F / 16), __float2half2_rn(-72.0F));
    const __half2 scaled = __hmul2(value, group.scale);
    return reinterpret_cast<const uint32_t&>(scaled);
  }
};
template <>
struct QuantValues<ValueType::kInt4Bfloat16> {
  static constexpr ValueType kDense = ValueType::kBfloat16;
  using Bytes = StoredNibbles<3, 0>;

  static constexpr float kUnit = 1.0F / 8;
  // 8 * (value + 8) as the low half of a bfloat16 number is 128 more than that.
  template <int kHalf>
  __device__ __forceinline__ static __nv_bfloat162 biased(uint32_t bytes) {
    const uint32_t biased = permute_bytes(bytes, 0x43434343U, kHalf == 0 ? 0x4140U : 0x4342U);
    return reinterpret_cast<const __nv_bfloat162&>(biased);
  }
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen(uint32_t bytes) {
    const __nv_bfloat162 value =
        __hsub2(biased<kHalf>(bytes), __float2bfloat162_rn(128.0F + 8 * 8));
    return reinterpret_cast<const uint32_t&>(value);
  }

  // The sum of two bfloat16 numbers, exactly: the second one has the scale's last three bits, so
  // its product with a value is exact too, and the scaled value is rounded once.
  struct GroupScale {
    __nv_bfloat162 upper, lower;

    __device__ __forceinline__ explicit GroupScale(uint16_t bits) {
      const float scale = __half2float(__ushort_as_half(bits));
      const __nv_bfloat16 most = __float2bfloat16_rn(scale);
      upper = __bfloat162bfloat162(most);
      lower = __float2bfloat162_rn(scale - __bfloat162float(most));
    }
  };
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen_scaled(uint32_t bytes, const GroupScale& group) {
    const __nv_bfloat162 value = __hfma2(biased<kHalf>(bytes), __float2bfloat162_rn(1.0F / 8),
                                         __float2bfloat162_rn(-(128.0F / 8 + 8)));
    const __nv_bfloat162 scaled = __hfma2(value, group.upper, __hmul2(value, group.lower));
    return reinterpret_cast<const uint32_t&>(scaled);
  }
};

// Two fp8 numbers, each as the upper byte of 16 bits.
template <int kHalf>
__device__ __forceinline__ uint32_t spread_fp8(uint32_t bytes) {
  return permute_bytes(bytes, 0, kHalf == 0 ? 0x1404U : 0x3424U);
}

// An fp8 number whose exponent and mantissa stand where those of a wider type do, with the smaller
// bias of its exponent, is the value divided by a power of two; subnormals too. All steps are
// exact.
template <>
struct QuantValues<ValueType::kFp8Float16> {
  static constexpr ValueType kDense = ValueType::kFloat16;
  using Bytes = StoredBytes<0>;
  static constexpr float kUnit = 1.0F;
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen(uint32_t bytes) {
#if __CUDA_ARCH__ >= 890
    uint32_t value;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
        : "=r"(value)
        : "h"(static_cast<uint16_t>(kHalf == 0 ? bytes : bytes >> 16)));
    return value;
#else
    const uint32_t wide = spread_fp8<kHalf>(bytes);
    const uint32_t scaled = (wide & 0x80008000U) | (wide >> 1 & 0x3F803F80U);
    const __half2 value =
        __hmul2(reinterpret_cast<const __half2&>(scaled), __float2half2_rn(0x1p8F));
    return reinterpret_cast<const uint32_t&>(value);
#endif
  }
};

template <>
struct QuantValues<ValueType::kFp8Bfloat16> {
  static constexpr ValueType kDense = ValueType::kBfloat16;
  using Bytes = StoredBytes<0>;
  static constexpr float kUnit = 1.0F;
  template <int kHalf>
  __device__ __forceinline__ static uint32_t widen(uint32_t bytes) {
    const uint32_t wide = spread_fp8<kHalf>(bytes);
    const uint32_t scaled = (wide & 0x80008000U) | (wide >> 4 & 0x07F007F0U);
    const __nv_bfloat162 value =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(scaled), __float2bfloat162_rn(0x1p120F));
    return reinterpret_cast<const uint32_t&>(value);
  }
};

// Returns run(std::integral_constant<ValueType, type>()), for a type that has QuantValues.
template <typename Run>
Status run_for_type(ValueType type, const Run& run) {
  switch (type) {
    case ValueType::kInt8Float16:
      return run(std::integral_constant<ValueType, ValueType::kInt8Float16>());
    case ValueType::kInt8Bfloat16:
      return run(std::integral_constant<ValueType, ValueType::kInt8Bfloat16>());
    case ValueType::kFp8Float16:
      return run(std::integral_constant<ValueType, ValueType::kFp8Float16>());
    case ValueType::kFp8Bfloat16:
      return run(std::integral_constant<ValueType, ValueType::kFp8Bfloat16>());
    case ValueType::kInt4Float16:
      return run(std::integral_constant<ValueType, ValueType::kInt4Float16>());
    case ValueType::kInt4Bfloat16:
      return run(std::integral_constant<ValueType, ValueType::kInt4Bfloat16>());
    case ValueType::kFloat16:
    case ValueType::kBfloat16:
      break;
  }
  return Status::invalid_type("the quantised bitmap kernels have no code for this value type");
}

}  // namespace flash_llm
