// Decodes the runs of a chunk of the quantised bitmap (format/quantized_bitmap.h) in shared memory.
// A run's values are bytes of a column of words, and one byte permutation takes up to four of them
// to their elements. It reads a window of four bytes that begins or ends where the fragment does:
// the low elements are read forward from the fragment's begin, the high ones backward from its end
// (in a downward run the other way round). Each border between fragments therefore serves two
// windows, which two funnel shifts cut from three neighbouring words.
#pragma once

#include <cstdint>

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

// prmt.b32. (__byte_perm masks the selector first.)
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// What a position moves by for each value, in units of RunReader, and the bytes of a column. They
// are kernel parameters, so that the compiler multiplies by them: a shift would take the busiest
// pipe.
struct RunSteps {
  uint32_t up_bits = 8, up_address = kQuantRowBytes / 4;
  uint32_t down_bits = 0U - 8, down_address = 0U - kQuantRowBytes / 4;
  uint32_t column = 4;
};

// A position in a lane's run: between two bytes of its column.
template <bool kUp>
struct RunReader {
  uint32_t address;  // of row 0, plus 32 times the byte's number in the column
  uint32_t bits;     // 8 times the byte's number
  uint32_t column;   // byte offset of the column in a row
  uint32_t window;   // the next four bytes in the direction of the run

  // The run begins at `row`, the 128-byte aligned address of the row above the position.
  __device__ __forceinline__ RunReader(uint32_t row, uint32_t own_column)
      : address(row), bits(0), column(own_column) {
    // Volatile: nothing orders it after the wait.
    asm volatile("ld.shared.u32 %0, [%1 + %2];"
                 : "=r"(window)
                 : "r"(row + own_column), "n"(kUp ? 0 : -kQuantRowBytes));
  }

  // Returns the low and the high elements of fragment kFragment of a word, one in each byte, and
  // moves on. An element that is not stored is the byte `zero` holds in all its bytes.
  template <int kFragment>
  __device__ __forceinline__ void take(uint32_t word, const RunSteps& steps, uint32_t zero,
                                       uint32_t& low, uint32_t& high) {
    // With the fragment's bits b0 ... b3 at bits 0, 4, 8, 12 of s, nibble e of
    //   0x4444 + s * 0x110C  is b0 + ... + b(e-1) if b_e, else 4 to 7, which select `zero`
    //   0x7777 - s * 0x1114  is 3 - (b0 + ... + b(e-1)) if b_e, else 4 to 7
    // The factors make up for the shift of the bits by kFragment, except that a factor would not be
    // whole for the last fragment. prmt ignores the upper half of a selector.
    constexpr int kShift = kFragment == 3 ? 0 : kFragment;
    constexpr uint32_t kForward = 0x110CU >> kShift, kBackward = 0x1114U >> kShift;
    const uint32_t stored = (kFragment == 3 ? word >> 3 : word) & (0x11111111U << kShift);
    const uint32_t low_bits = stored, high_bits = stored >> 16;
    const uint32_t forward = (kUp ? low_bits : high_bits) * kForward + 0x4444U;
    const uint32_t backward = (kUp ? high_bits : low_bits) * (0U - kBackward) + 0x7777U;
    const uint32_t count = __popc(stored);
    bits = count * (kUp ? steps.up_bits : steps.down_bits) + bits;
    address = count * (kUp ? steps.up_address : steps.down_address) + address;
    const uint32_t at = (address & ~(kQuantRowBytes - 1U)) | column;
    const uint32_t w0 = load_run_word<-kQuantRowBytes>(at), w1 = load_run_word<0>(at),
                   w2 = load_run_word<kQuantRowBytes>(at);
    const uint32_t before = __funnelshift_r(w0, w1, bits), after = __funnelshift_r(w1, w2, bits);
    if constexpr (kUp) {
      low = permute_bytes(window, zero, forward);
      high = permute_bytes(before, zero, backward);
      window = after;
    } else {
      low = permute_bytes(window, zero, backward);
      high = permute_bytes(after, zero, forward);
      window = before;
    }
  }
};

// A lane's part of a chunk in shared memory: what lies above its values.
struct QuantChunk {
  uint32_t bits[kQuantWords];
  uint32_t column;  // of the downward run

  // `top` is the 128-byte aligned address of the row above the values.
  __device__ __forceinline__ QuantChunk(uint32_t top, int lane) {
#pragma unroll
    for (int q = 0; q < kQuantWords; ++q) bits[q] = ptx::load_shared_u32(top + (q * 32 + lane) * 4);
    column = ptx::load_shared_u8(top + kQuantBitsBytes + lane) & (kQuantRowBytes - 4U);
  }
};

// What the bytes of a kind of values become. Every one has
//   kDense     the type of the weight's elements
//   kZero      four bytes of a value that is not stored
//   widen()    two elements of a register of four bytes, as 16-bit numbers: 0 and 1, or 2 and 3;
//              each is the value divided by kUnit
template <ValueType kType>
struct QuantValues;

template <>
struct QuantValues<ValueType::kInt8Float16> {
  static constexpr ValueType kDense = ValueType::kFloat16;
  static constexpr uint32_t kZero = 0x01010101U * kQuantZero;

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
  static constexpr uint32_t kZero = 0x01010101U * kQuantZero;

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

}  // namespace flash_llm
