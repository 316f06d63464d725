// Decoding bitmap runs into A fragments of the tensor cores: core/bitmap.h says how a chunk is laid
// out. Per quad, that is 4 elements of a lane: one LOP3 isolates its four bits, one dp4a advances
// the position by their number, four 16-bit loads fetch what could be stored there, and two PRMTs
// with computed selectors put values and zeros in place: 2.9 instructions per element, no branch
// and no predicate. Every load of a warp touches 32 different banks, by construction of the format.
#pragma once

#include <cstdint>

#include "core/bitmap.h"

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
// are all 0x3232 + b0 * 0x43DE + b1 * 0xDE00 (mod 2^16), and 0xDE00 = 0x43DE << 8: with b0 at bit 0
// and b1 at bit 8 that is one multiply-add. (76 is as zero as 32.)
inline constexpr uint32_t kSelectNone = 0x3232;
inline constexpr uint32_t kSelectStep = 0x43DE;

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
// or 1, else the multiplier above would not divide). `position` is the shared-memory address of the
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
  constexpr uint32_t kMultiplier = kSelectStep >> kBit;
  reg[0] = byte_permute(first, second, bits * kMultiplier + kSelectNone);
  reg[1] = byte_permute(last, before_last, (bits >> 16) * kMultiplier + kSelectNone);
}

// The four registers of fragment kFragment (0..3) of a half.
template <int kFragment, int kStep>
__device__ __forceinline__ void decode_fragment(uint32_t word, uint32_t& position, uint32_t* reg) {
  const uint32_t shifted = word >> (2 * kFragment);
  decode_quad<0, kStep>(shifted, position, reg);
  decode_quad<1, kStep>(shifted, position, reg + 2);
}

// A lane's bits and the start of its runs, read from a chunk in shared memory.
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
