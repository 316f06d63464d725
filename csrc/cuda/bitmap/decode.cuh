// Decodes the runs of a bitmap chunk (format/bitmap.h) into A fragments of the tensor cores. A
// quad, 4 elements of a lane, takes one LOP3 that isolates its four bits, one dp4a that advances
// the position by their number, four 16-bit loads of the values that may be stored there, and two
// PRMTs that arrange values and zeros, with a selector from one dp2a each: 2.6 instructions per
// element, no branch and no predicate. The format guarantees that each load of a warp accesses 32
// different banks.
//
// The elements of a quad of a 2:4 chunk are slots, half as many as elements of W. Deriving the
// slots' bits from those of the elements takes another 0.4 instructions per element.
#pragma once

#include <cstdint>

#include "format/bitmap.h"

namespace flash_llm {

template <int kOffset>
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t smem) {
  uint32_t value;
  // Volatile: the load must not move above the wait for the chunk.
  asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=r"(value) : "r"(smem), "n"(kOffset));
  return value;
}

// prmt.b32 without the AND that __byte_perm applies to the selector: the hardware ignores all but
// the low 16 bits anyway.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t value;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(selector));
  return value;
}

// The PRMT selector that builds a register (two elements) from the next two values of a run, which
// are zero-extended, so that bytes 2, 3, 6 and 7 of PRMT's input are zero. If b0 and b1 say whether
// the low and the high element are stored, the four selectors
//   neither 3232   b0 7610   b1 1032   both 5410
// all equal 0x3232 + b0 * 0x43DE + b1 * 0xDE00 (mod 2^16). (Bytes 6 and 7 are zero, like 2 and 3.)
// b0 and b1 are in the lower or the upper two bytes of `quad_bits`, so that this is one dp2a.
template <int kBit, bool kUpper>
__device__ __forceinline__ uint32_t selector(uint32_t quad_bits) {
  constexpr uint32_t kNone = 0x3232, kFirst = 0x43DE >> kBit, kSecond = 0xDE00 >> kBit;
  static_assert(kFirst << kBit == 0x43DE && kSecond << kBit == 0xDE00, "must divide");
  uint32_t value;
  if constexpr (kUpper) {
    asm("dp2a.hi.u32.u32 %0, %1, %2, %3;"
        : "=r"(value)
        : "r"(kSecond << 16 | kFirst), "r"(quad_bits), "r"(kNone));
  } else {
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;"
        : "=r"(value)
        : "r"(kSecond << 16 | kFirst), "r"(quad_bits), "r"(kNone));
  }
  return value;
}

// Adds kStep times the number of a quad's set bits to `position`; the bits are bit kBit of each
// byte.
template <int kBit, int kStep>
__device__ __forceinline__ uint32_t advance(uint32_t position, uint32_t quad_bits) {
  static_assert(kStep == kChunkRowBytes || kStep == -kChunkRowBytes, "one row of values");
  constexpr uint32_t kBytes = (kChunkRowBytes >> kBit) * 0x01010101U;
  if constexpr (kStep > 0) {
    return __dp4a(quad_bits, kBytes, position);  // unsigned bytes: 128 fits
  } else {
    constexpr uint32_t kNegative = ((256U - (kChunkRowBytes >> kBit)) & 0xFFU) * 0x01010101U;
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(position) : "r"(quad_bits), "r"(kNegative));
    return position;
  }
}

// Loads the values that may be stored for the quad whose bits are bit kBit of each byte of `word`.
// kBit is 0 or 1, as the factors above must be divisible by 2^kBit. `position` is the shared-memory
// address of the run's next value and is advanced.
template <int kBit, int kStep>
__device__ __forceinline__ void load_quad(uint32_t word, uint32_t& position, uint32_t* values) {
  values[0] = load_shared_u16<0>(position);
  values[1] = load_shared_u16<kStep>(position);
  position = advance<kBit, kStep>(position, word & (0x01010101U << kBit));
  // The other register's elements are stored backwards from the quad's end.
  values[2] = load_shared_u16<-kStep>(position);
  values[3] = load_shared_u16<-2 * kStep>(position);
}

// Arranges the values of a quad in two registers of a fragment.
template <int kBit>
__device__ __forceinline__ void arrange_quad(uint32_t word, const uint32_t* values, uint32_t* reg) {
  const uint32_t bits = word & (0x01010101U << kBit);
  reg[0] = byte_permute(values[0], values[1], selector<kBit, false>(bits));
  reg[1] = byte_permute(values[2], values[3], selector<kBit, true>(bits));
}

// How the four registers of a fragment are decoded from a word of bits: in two quads, first all
// loads, then the arranging. Fragment kFragment (0..3) of a half of a plain chunk.
template <int kFragment>
struct PlainFragment {
  template <int kStep>
  __device__ __forceinline__ static void load(uint32_t word, uint32_t& position, uint32_t* values) {
    load_quad<0, kStep>(word >> (2 * kFragment), position, values);
    load_quad<1, kStep>(word >> (2 * kFragment), position, values + 4);
  }
  __device__ __forceinline__ static void arrange(uint32_t word, const uint32_t* values,
                                                 uint32_t* reg) {
    arrange_quad<0>(word >> (2 * kFragment), values, reg);
    arrange_quad<1>(word >> (2 * kFragment), values + 4, reg + 2);
  }
};

// The same for a 2:4 chunk, whose fragments have 16 slots for 32 columns.
template <int kFragment>
struct TwoFourFragment {
  static constexpr int kShift = kFragment / 2 * 2, kBit = kFragment % 2;

  template <int kStep>
  __device__ __forceinline__ static void load(uint32_t word, uint32_t& position, uint32_t* values) {
    load_quad<kBit, kStep>(word >> kShift, position, values);
    load_quad<kBit, kStep>(word >> (kShift + 4), position, values + 4);
  }
  __device__ __forceinline__ static void arrange(uint32_t word, const uint32_t* values,
                                                 uint32_t* reg) {
    arrange_quad<kBit>(word >> kShift, values, reg);
    arrange_quad<kBit>(word >> (kShift + 4), values + 4, reg + 2);
  }
};

template <int kFragment, int kStep>
__device__ __forceinline__ void decode_fragment(uint32_t word, uint32_t& position, uint32_t* reg) {
  uint32_t values[8];
  PlainFragment<kFragment>::template load<kStep>(word, position, values);
  PlainFragment<kFragment>::arrange(word, values, reg);
}

template <int kFragment, int kStep>
__device__ __forceinline__ void decode_two_four_fragment(uint32_t word, uint32_t& position,
                                                         uint32_t* reg) {
  uint32_t values[8];
  TwoFourFragment<kFragment>::template load<kStep>(word, position, values);
  TwoFourFragment<kFragment>::arrange(word, values, reg);
}

// What a lane derives from its bits of one strip of a 2:4 chunk.
struct TwoFourWords {
  uint32_t metadata[4];  // wgmma.sp's sparsity metadata for fragment p of either half
  uint32_t runs[2];      // by half: the slots' bits, for decode_two_four_fragment
};

// (a & mask) | (b & ~mask) as one LOP3; the compiler makes two if the mask is a constant.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t value;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(value) : "r"(mask), "r"(a), "r"(b));
  return value;
}

// Transposes 4 x 4 nibbles across each four lanes, separately in the low and in the high halves of
// their words: lane t gets nibble t of each of the four lanes.
__device__ __forceinline__ uint32_t transpose_nibbles(uint32_t word, int lane) {
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
  const uint32_t turned = __funnelshift_l(word, word, odd ? 4 : 28);
  const uint32_t near = __shfl_xor_sync(~0U, turned, 1);
  word = select_bits(odd ? 0xF0F0F0F0U : 0x0F0F0F0FU, word, near);
  const uint32_t far = __shfl_xor_sync(~0U, word, 2);
  return byte_permute(word, far, upper ? 0x3715U : 0x6240U);
}

// All lanes of a warp must call it. `bits` are this lane's four words of a strip: word k holds the
// bits of column k of 32 groups, so that a LOP3 evaluates a function of a group's bits for all 32.
__device__ __forceinline__ TwoFourWords two_four_words(const uint32_t (&bits)[4], int lane) {
  const uint32_t b0 = bits[0], b1 = bits[1], b2 = bits[2], b3 = bits[3];
  // plane[i] is bit i of the metadata nibble i0 | i1 << 2 of all groups (format/bitmap.h). Bit p of
  // each nibble of plane[i] becomes bit i of that nibble of metadata[p]: in every nibble 4 x 4 bits
  // are transposed, first within blocks of 2 x 2, then the blocks.
  const uint32_t plane[4] = {~b0 & b1, ~(b0 | b1), (b0 & b1) | ~(b2 & (b0 | b1)), ~(b0 & b1)};
  TwoFourWords words;
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = select_bits(0x55555555U, plane[i], plane[i + 1] << 1);
    pairs[i + 1] = select_bits(0x55555555U, plane[i] >> 1, plane[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    words.metadata[i] = select_bits(0x33333333U, pairs[i], pairs[i + 2] << 2);
    words.metadata[i + 2] = select_bits(0x33333333U, pairs[i] >> 2, pairs[i + 2]);
  }
  // Whether slot 0 and slot 1 of each group are stored.
  const uint32_t slot0 = transpose_nibbles(b0 | b1 | b2, lane);
  const uint32_t slot1 = transpose_nibbles((b0 & b1) | (b2 & (b0 | b1)) | b3, lane);
  words.runs[0] = byte_permute(slot0, slot1, 0x6240U);
  words.runs[1] = byte_permute(slot0, slot1, 0x7351U);
  return words;
}

// Loads a lane's four words of bits. Volatile, as load_shared_u16.
__device__ __forceinline__ void load_bits(uint32_t (&bits)[4], uint32_t smem) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(smem));
}

// A lane's bits, and the addresses where its runs begin, in a plain chunk in shared memory.
struct ChunkCursor {
  uint32_t bits[4];  // [2 half + strip]
  uint32_t up[2];    // [strip]: the upward runs, of half 0
  uint32_t down[2];  // [strip]: the downward runs, of half 1

  // `value_bytes` is the size of the values, which precede the bits. If `stored` is false, the
  // chunk is treated as all zeros; `smem_chunk` must be readable even then.
  __device__ __forceinline__ ChunkCursor(uint32_t smem_chunk, uint32_t value_bytes, bool stored,
                                         int lane) {
    const uint32_t smem_bits = smem_chunk + value_bytes;
    uint32_t down_offsets;  // where the downward runs begin in the last row, one byte per strip
    load_bits(bits, smem_bits + lane * 16);
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=r"(down_offsets)
                 : "r"(smem_bits + kChunkBitsBytes + lane * 2));
#pragma unroll
    for (uint32_t& word : bits) word = stored ? word : 0;
    const uint32_t last_row = smem_bits - kChunkRowBytes;
    up[0] = smem_chunk + lane * 4;
    up[1] = up[0] + 2;
    down[0] = last_row + (down_offsets & 0x7EU);
    down[1] = last_row + (down_offsets >> 8 & 0x7EU);
  }
};

}  // namespace flash_llm
