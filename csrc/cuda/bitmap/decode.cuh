// Decodes the runs of a bitmap chunk (format/bitmap.h) into A fragments of the tensor cores. A
// quad, 4 elements of a lane, takes one LOP3 that isolates its four bits, one dp4a that advances
// the position by their number, four 16-bit loads of the values that may be stored there, and two
// PRMTs that arrange values and zeros, with a selector from one dp2a each: 2.6 instructions per
// element, no branch and no predicate. The format guarantees that each load of a warp accesses 32
// different banks.
//
// The elements of a quad of a 2:4 chunk are slots, half as many as elements of W. Deriving the
// slots' bits from those of the elements takes another 0.4 instructions per element. Decoded into a
// plain fragment instead, its elements take 4.4 instructions each: the slots are spread over the
// columns of their group, and columns are exchanged between the four lanes of a row.
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
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

// A PRMT selector for two zero halves, see below.
inline constexpr uint32_t kZeroSelector = 0x3232;

// Adds kFirst * b0 + kSecond * b1 (mod 2^16) to a PRMT selector, by one dp2a. b0 and b1 are bit
// kBit of the lower or the upper two bytes of `bits`.
template <uint32_t kFirst, uint32_t kSecond, int kBit, bool kUpper>
__device__ __forceinline__ uint32_t add_selector(uint32_t selector, uint32_t bits) {
  constexpr uint32_t kFactors = (kSecond >> kBit) << 16 | kFirst >> kBit;
  static_assert(kFirst >> kBit << kBit == kFirst && kSecond >> kBit << kBit == kSecond,
                "must divide");
  uint32_t value;
  if constexpr (kUpper) {
    asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(value) : "r"(kFactors), "r"(bits), "r"(selector));
  } else {
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(value) : "r"(kFactors), "r"(bits), "r"(selector));
  }
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
  return add_selector<0x43DE, 0xDE00, kBit, kUpper>(kZeroSelector, quad_bits);
}

// Adds kStep times the number of a quad's set bits to `position`; the bits are bit kBit of those
// bytes that kCounted has a 1 in.
template <int kBit, int kStep, uint32_t kCounted = 0x01010101U>
__device__ __forceinline__ uint32_t advance(uint32_t position, uint32_t quad_bits) {
  static_assert(kStep == kChunkRowBytes || kStep == -kChunkRowBytes, "one row of values");
  constexpr uint32_t kBytes = (kChunkRowBytes >> kBit) * kCounted;
  if constexpr (kStep > 0) {
    return __dp4a(quad_bits, kBytes, position);  // unsigned bytes: 128 fits
  } else {
    constexpr uint32_t kNegative = ((256U - (kChunkRowBytes >> kBit)) & 0xFFU) * kCounted;
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

template <int kBit, int kStep>
__device__ __forceinline__ void decode_quad(uint32_t word, uint32_t& position, uint32_t* reg) {
  uint32_t values[4];
  load_quad<kBit, kStep>(word, position, values);
  arrange_quad<kBit>(word, values, reg);
}

// Decodes a fragment quad by quad, where registers are scarce: all loads first takes four more.
template <int kFragment, int kStep>
__device__ __forceinline__ void decode_fragment(uint32_t word, uint32_t& position, uint32_t* reg) {
  decode_quad<0, kStep>(word >> (2 * kFragment), position, reg);
  decode_quad<1, kStep>(word >> (2 * kFragment), position, reg + 2);
}

template <int kFragment, int kStep>
__device__ __forceinline__ void decode_two_four_fragment(uint32_t word, uint32_t& position,
                                                         uint32_t* reg) {
  using Fragment = TwoFourFragment<kFragment>;
  decode_quad<Fragment::kBit, kStep>(word >> Fragment::kShift, position, reg);
  decode_quad<Fragment::kBit, kStep>(word >> (Fragment::kShift + 4), position, reg + 2);
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

// What a lane derives from its bits of one strip of a 2:4 chunk to decode it into plain fragments.
// Byte j of a word belongs to row g (j = 0, 1) or g + 8 (j = 2, 3); bit 4 u + p of it to the group
// of columns 64 p + 32 half + 16 u + 4 t and the next three.
struct TwoFourGroups {
  // [half][0]: whether columns 0 and 1 of the group are stored.
  // [half][1]: whether one of these two is, and whether column 2 is stored in a slot.
  // [half][2]: whether one of columns 0 to 2 is (not two of them), and whether column 3 is stored
  //            in a slot. Elements of the residual count as not stored.
  uint32_t words[2][3];
};

// All lanes of a warp must call it. `bits` are this lane's four words of a strip.
__device__ __forceinline__ TwoFourGroups two_four_groups(const uint32_t (&bits)[4], int lane) {
  const uint32_t b0 = bits[0], b1 = bits[1], b2 = bits[2], b3 = bits[3];
  const uint32_t column0 = transpose_nibbles(b0, lane), column1 = transpose_nibbles(b1, lane);
  const uint32_t column2 = transpose_nibbles(b2 & ~(b0 & b1), lane);
  const uint32_t column3 = transpose_nibbles(b3 & ~((b0 & b1) | (b2 & (b0 | b1))), lane);
  const uint32_t one = column0 ^ column1, odd = one ^ column2;
  TwoFourGroups groups;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t order = half == 0 ? 0x6240 : 0x7351;
    groups.words[half][0] = byte_permute(column0, column1, order);
    groups.words[half][1] = byte_permute(one, column2, order);
    groups.words[half][2] = byte_permute(odd, column3, order);
  }
  return groups;
}

// Decodes a lane's groups of rows g and g + 8 whose bits are bit kBit of each byte of `words`: the
// registers low[i] and high[i] get columns 0, 1 and columns 2, 3 of row g + 8 i. The group's values
// are the next two of the run for row g, and the last two of the quad for row g + 8. Of them
//   low:  column 0 is the first value;  column 1 the first, or the second if column 0 is stored
//   high: column 2 is the first value, or the second if one of columns 0 and 1 is stored (if both
//         are, it is in the residual); column 3 likewise with columns 0 to 2
// which gives selectors like those of selector(): adding 0x44 to a half that selects zeros or the
// first value selects other zeros or the second value.
template <int kBit, int kStep>
__device__ __forceinline__ void decode_two_four_groups(const uint32_t (&words)[3],
                                                       uint32_t& position, uint32_t (&low)[2],
                                                       uint32_t (&high)[2]) {
  constexpr uint32_t kMask = 0x01010101U << kBit;
  const uint32_t columns01 = words[0] & kMask, column2 = words[1] & kMask,
                 column3 = words[2] & kMask;
  const uint32_t first = load_shared_u16<0>(position);
  const uint32_t second = load_shared_u16<kStep>(position);
  position = advance<kBit, kStep>(position, columns01);
  position = advance<kBit, kStep, 0x01000100U>(position, column2);
  position = advance<kBit, kStep, 0x01000100U>(position, column3);
  const uint32_t last = load_shared_u16<-kStep>(position);
  const uint32_t before_last = load_shared_u16<-2 * kStep>(position);
  low[0] = byte_permute(first, second, selector<kBit, false>(columns01));
  low[1] = byte_permute(last, before_last, selector<kBit, true>(columns01));
  uint32_t select[2] = {add_selector<0x0044, 0xFFDE, kBit, false>(kZeroSelector, column2),
                        add_selector<0x0044, 0xFFDE, kBit, true>(kZeroSelector, column2)};
  select[0] = add_selector<0x4400, 0xDE00, kBit, false>(select[0], column3);
  select[1] = add_selector<0x4400, 0xDE00, kBit, true>(select[1], column3);
  high[0] = byte_permute(first, second, select[0]);
  high[1] = byte_permute(last, before_last, select[1]);
}

// Adds to `high` of decode_two_four_groups() those elements of a strip's residual that belong to
// the lane's groups of plain fragment `fragment` (0..15, of 16 columns). `step` is the
// shared-memory address of the residual's first step.
__device__ __forceinline__ void insert_residual(uint32_t step, int steps, int fragment, int lane,
                                                uint32_t (&high)[2]) {
  // The residual offset of column 2 of the group; that of column 3 differs in bit 4.
  const unsigned t = lane % 4U, column = t / 2 * 8 + t % 2 * 4 + 2;
  const uint32_t offset = 16 * (fragment * 16 + (column ^ (fragment * 2 + t / 2) % 8));
  const uint32_t own = lane / 4 * 4;
#pragma unroll 1
  for (int i = 0; i < steps; ++i, step += kResidualStepBytes) {
    const uint32_t pair = ptx::load_shared_u32(step + own);
    const uint32_t differ[2] = {load_shared_u16<32>(step + own / 2) ^ offset,
                                load_shared_u16<48>(step + own / 2) ^ offset};
#pragma unroll
    for (int row8 = 0; row8 < 2; ++row8) {
      const uint32_t value = row8 == 0 ? pair & 0xFFFF : pair >> 16;
      high[row8] |= differ[row8] == 0 ? value : differ[row8] == 16 ? value << 16 : 0;
    }
  }
}

// The plain fragments (bit 0..15) that elements of a strip's residual belong to, at least. All
// lanes of a warp must call it, and get the same.
__device__ __forceinline__ uint32_t fragments_of_residual(uint32_t step, int steps, int lane) {
  uint32_t fragments = 0;
  const uint32_t own = 32 + lane % 16 * 2;
#pragma unroll 1
  for (int i = 0; i < steps; ++i, step += kResidualStepBytes) {
    fragments |= 1U << (load_shared_u16<0>(step + own) >> 8 & 15);
  }
  return __reduce_or_sync(~0U, fragments);
}

// Turns a lane's groups, columns 4 t to 4 t + 3 of a block of 16, into the registers of a plain
// fragment, which has columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. Each pair of columns moves at most
// once between the four lanes of a row: every lane gives away one of its pairs in the first
// shuffle, and the two lanes in the middle the other one in the second.
__device__ __forceinline__ void exchange_pairs(const uint32_t (&low)[2], const uint32_t (&high)[2],
                                               int lane, uint32_t* reg) {
  const bool upper = (lane & 2) != 0, odd = (lane & 1) != 0;
  const int around = 0x1302 >> (lane % 4 * 4) & 3, across = 0x3120 >> (lane % 4 * 4) & 3;
#pragma unroll
  for (int row8 = 0; row8 < 2; ++row8) {
    const uint32_t a = __shfl_sync(~0U, upper ? low[row8] : high[row8], around, 4);
    const uint32_t b = __shfl_sync(~0U, upper ? high[row8] : low[row8], across, 4);
    reg[row8] = odd ? a : b;
    reg[row8 + 2] = odd ? b : a;
  }
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
