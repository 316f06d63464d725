// Decoding bitmap runs into A fragments of the tensor cores: format/bitmap.h says how a chunk is
// laid out. Per quad, that is 4 elements of a lane: one LOP3 isolates its four bits, one dp4a
// advances the position by their number, four 16-bit loads fetch what could be stored there, and
// two PRMTs with selectors that a dp2a each computes put values and zeros in place: 2.6
// instructions per element, no branch and no predicate. Every load of a warp touches 32 different
// banks, by construction of the format.
//
// In a 2:4 chunk the elements of a quad are slots, of which there are half as many, and the bits of
// elements must first become those of slots: 0.4 instructions per element.
#pragma once

#include <cstdint>

#include "format/bitmap.h"

namespace flash_llm {

template <int kOffset>
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t smem) {
  uint32_t value;
  // Volatile: must not move above the wait for the chunk.
  asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=r"(value) : "r"(smem), "n"(kOffset));
  return value;
}

// prmt.b32 without the masking of the selector that __byte_perm adds: the hardware ignores all but
// its low 16 bits.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t value;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(selector));
  return value;
}

// The PRMT selector that builds a register from the next two values of a run, first and second,
// each zero-extended (so bytes 2, 3, 6, 7 of the pair are zero). With b0, b1 telling whether its
// low and high element are stored, the four wanted selectors
//   neither 3232   b0 7610   b1 1032   both 5410
// are all 0x3232 + b0 * 0x43DE + b1 * 0xDE00 (mod 2^16). (76 is as zero as 32.) With b0 and b1 in
// two bytes of `quad_bits`, the lower or the upper two, that is one dp2a.
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

// Adds `step` times the number of set bits to `position`; a quad's bits are `bit` in each byte.
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

// Two registers of a fragment from the quad whose bits are kBit of each byte of `word` (kBit is 0
// or 1, else the factors above would not divide). `position` is the shared-memory address of the
// run's next value and moves on.
template <int kBit, int kStep>
__device__ __forceinline__ void decode_quad(uint32_t word, uint32_t& position, uint32_t* reg) {
  const uint32_t bits = word & (0x01010101U << kBit);
  const uint32_t first = load_shared_u16<0>(position);
  const uint32_t second = load_shared_u16<kStep>(position);
  position = advance<kBit, kStep>(position, bits);
  // The other register's elements are stored backwards from the quad's end.
  const uint32_t last = load_shared_u16<-kStep>(position);
  const uint32_t before_last = load_shared_u16<-2 * kStep>(position);
  reg[0] = byte_permute(first, second, selector<kBit, false>(bits));
  reg[1] = byte_permute(last, before_last, selector<kBit, true>(bits));
}

// The four registers of fragment kFragment (0..3) of a half.
template <int kFragment, int kStep>
__device__ __forceinline__ void decode_fragment(uint32_t word, uint32_t& position, uint32_t* reg) {
  const uint32_t shifted = word >> (2 * kFragment);
  decode_quad<0, kStep>(shifted, position, reg);
  decode_quad<1, kStep>(shifted, position, reg + 2);
}

// The four registers of fragment kFragment (0..3) of a half of a 2:4 chunk: 16 slots, 32 columns.
template <int kFragment, int kStep>
__device__ __forceinline__ void decode_two_four_fragment(uint32_t word, uint32_t& position,
                                                         uint32_t* reg) {
  constexpr int kShift = kFragment / 2 * 2;
  decode_quad<kFragment % 2, kStep>(word >> kShift, position, reg);
  decode_quad<kFragment % 2, kStep>(word >> (kShift + 4), position, reg + 2);
}

// What a lane needs of the bits of one strip of a 2:4 chunk.
struct TwoFourWords {
  uint32_t metadata[4];  // sparsity metadata of fragments p of both halves, as wgmma.sp takes it
  uint32_t runs[2];      // by half: the bits of slots, as decode_two_four_fragment takes them
};

// (a & mask) | (b & ~mask). Spelt out, because from constants the compiler makes two instructions.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t value;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(value) : "r"(mask), "r"(a), "r"(b));
  return value;
}

// Four lanes hold four nibbles each, twice, in the low and the high halves of their words; lane t
// gets nibble t of every one of them.
__device__ __forceinline__ uint32_t transpose_nibbles(uint32_t word, int lane) {
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
  const uint32_t turned = __funnelshift_l(word, word, odd ? 4 : 28);
  const uint32_t near = __shfl_xor_sync(~0U, turned, 1);
  word = select_bits(odd ? 0xF0F0F0F0U : 0x0F0F0F0FU, word, near);
  const uint32_t far = __shfl_xor_sync(~0U, word, 2);
  return byte_permute(word, far, upper ? 0x3715U : 0x6240U);
}

// All lanes of a warp must call it: `bits` are this lane's four words of a strip, one for each
// column of 32 groups. So each function of a group's bits is one LOP3 for all groups.
__device__ __forceinline__ TwoFourWords two_four_words(const uint32_t (&bits)[4], int lane) {
  const uint32_t b0 = bits[0], b1 = bits[1], b2 = bits[2], b3 = bits[3];
  // The places of all groups, bit by bit: i0 is 2 unless b0 or b1; i1 is 3 unless b0 and b1, or b2
  // and one of them. Bit p of each nibble of plane[i] is to become bit i of the nibble of
  // places[p], so 4 x 4 bits are transposed: within 2 x 2 first, then those.
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
  // Whether the slots are stored.
  const uint32_t slot0 = transpose_nibbles(b0 | b1 | b2, lane);
  const uint32_t slot1 = transpose_nibbles((b0 & b1) | (b2 & (b0 | b1)) | b3, lane);
  words.runs[0] = byte_permute(slot0, slot1, 0x6240U);
  words.runs[1] = byte_permute(slot0, slot1, 0x7351U);
  return words;
}

// A lane's bits and the start of its runs, read from a plain chunk in shared memory.
struct ChunkCursor {
  uint32_t bits[4];  // [2 half + strip]
  uint32_t up[2];    // positions by strip: half 0
  uint32_t down[2];  // half 1

  // `value_bytes` is what the values take, and so where the bits begin. A chunk that is not
  // `stored` is all zeros, wherever it points.
  __device__ __forceinline__ ChunkCursor(uint32_t smem_chunk, uint32_t value_bytes, bool stored,
                                         int lane) {
    const uint32_t smem_bits = smem_chunk + value_bytes;
    uint32_t sigma;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                 : "r"(smem_bits + lane * 16));
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=r"(sigma)
                 : "r"(smem_bits + kChunkBitsBytes + lane * 2));
#pragma unroll
    for (uint32_t& word : bits) word = stored ? word : 0;
    const uint32_t last_row = smem_bits - kChunkRowBytes;
    up[0] = smem_chunk + lane * 4;
    up[1] = up[0] + 2;
    down[0] = last_row + (sigma & 0x7EU);
    down[1] = last_row + (sigma >> 8 & 0x7EU);
  }
};

}  // namespace flash_llm
