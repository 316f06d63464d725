// One PTX instruction (with its predicate or operand set-up) per function; all need sm_80 or newer.
#pragma once

#include <cstdint>

#include "format/packed_header.h"

namespace flash_llm::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// movmatrix.trans: transposes an 8x8 matrix of 16-bit elements, of which lane l has elements
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// Returns `value` and hides from the compiler how it was computed. The compiler can then neither
// compute it again instead of keeping it in a register, nor move computations that depend on it to
// before this call.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ const uint4* opaque(const uint4* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// threadIdx.x, read from the special register at each call instead of kept in a register.
__device__ __forceinline__ uint32_t read_thread_idx() {
  uint32_t idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}

// ld.global with no L1 allocation: packed weights are read once.
__device__ __forceinline__ uint4 load_streaming(const uint4* gmem) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(gmem));
  return v;
}

// The same where `active`; else `v` keeps its value.
__device__ __forceinline__ void load_streaming_if(bool active, const uint4* gmem, uint4& v) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %4, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%5];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "r"(static_cast<int>(active)), "l"(gmem));
}

// cp.async.bulk.prefetch.L2: one instruction that prefetches `bytes` bytes into L2. `gmem` must be
// 16-byte aligned and `bytes` a multiple of 16. Does nothing before sm_90.
__device__ __forceinline__ void prefetch_l2(const void* gmem, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(gmem), "r"(bytes) : "memory");
#endif
}

// st.shared.b16 of the low half of `value`, where `active`.
__device__ __forceinline__ void store_shared_u16_if(bool active, uint32_t smem, uint32_t value) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b16 low, high;\n"
      "setp.ne.s32 p, %0, 0;\n"
      "mov.b32 {low, high}, %2;\n"
      "@p st.shared.b16 [%1], low;\n"
      "}\n" ::"r"(static_cast<int>(active)),
      "r"(smem), "r"(value)
      : "memory");
}

__device__ __forceinline__ void store_shared_zero16(uint32_t smem) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(smem), "r"(0) : "memory");
}

__device__ __forceinline__ void store_shared_v2(uint32_t smem, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(smem), "r"(first), "r"(second) : "memory");
}

__device__ __forceinline__ void store_shared_u32(uint32_t smem, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_v4(uint32_t smem, const float (&values)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// red.shared.add.s32.
__device__ __forceinline__ void add_shared(uint32_t smem, int value) {
  asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(smem), "r"(value) : "memory");
}

// red.shared.max.u32.
__device__ __forceinline__ void max_shared(uint32_t smem, uint32_t value) {
  asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(smem), "r"(value) : "memory");
}

// red.global.add.s32.
__device__ __forceinline__ void add_global(int* gmem, int value) {
  asm volatile("red.global.add.s32 [%0], %1;" ::"l"(gmem), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_shared_u32(uint32_t smem) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(smem) : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared_v2(uint32_t smem) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "r"(smem)
               : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_v4(uint32_t smem) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(smem)
               : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_u8(uint32_t smem) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(smem) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_u16(uint32_t smem) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(smem) : "memory");
  return value;
}

// Makes this thread's earlier writes, and those that it has synchronised with, visible to a thread
// that reads `value` by load_acquire().
__device__ __forceinline__ void store_release(uint32_t* gmem, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(gmem), "r"(value) : "memory");
}

// Adds, and returns what was there before. Orders this thread's memory accesses before it and after
// it as store_release() and load_acquire() do.
__device__ __forceinline__ uint32_t add_acq_rel(uint32_t* gmem, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(gmem), "r"(value)
               : "memory");
  return before;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* gmem) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(gmem) : "memory");
  return value;
}

// cp.async: four bytes from global to shared memory, or zeros where `valid` is false.
__device__ __forceinline__ void copy_async4(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(gmem),
               "r"(valid ? 4 : 0)
               : "memory");
}

// cp.async: 16 bytes, or zeros where `valid` is false.
__device__ __forceinline__ void copy_async16(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The L2 policy for data that is read once: what createpolicy.fractional.L2::evict_first returns
// for 1.0. Creating it takes five instructions, and using it two more if it is not a constant.
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;

// cp.async: 16 bytes, which are read once, at these offsets from the addresses. The hardware has 12
// bits for a kGmemOffset: others cost an addition.
template <int kSmemOffset, int kGmemOffset>
__device__ __forceinline__ void copy_async16_streaming(uint32_t smem, const void* gmem) {
  static_assert(-2048 <= kGmemOffset && kGmemOffset < 2048, "takes one instruction");
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0 + %3], [%1 + %4], 16, %2;" ::"r"(smem),
               "l"(gmem), "l"(kEvictFirst), "n"(kSmemOffset), "n"(kGmemOffset)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits until all of this thread's cp.async are complete.
__device__ __forceinline__ void copy_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once this thread's earlier cp.async are complete, as one of the expected arrivals.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of parity `parity` has completed. (On a new barrier parity 1 counts as
// completed.) From sm_90 on the hardware suspends the thread for a while.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define FLASH_LLM_WAIT "try_wait"
#else
#define FLASH_LLM_WAIT "test_wait"
#endif
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier." FLASH_LLM_WAIT
      ".parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef FLASH_LLM_WAIT
}

// ldmatrix.x4: four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&reg)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(smem)
               : "memory");
}

// ldmatrix.x2.trans: two 8x8 matrices, transposed; lanes 0..15 give the addresses of their rows.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&reg)[2], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(reg[0]), "=r"(reg[1])
               : "r"(smem)
               : "memory");
}

// ldmatrix.x4.trans: the same for four matrices and all lanes.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&reg)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(smem)
               : "memory");
}

// mma.m16n8k16: acc[16, 8] += a[16, 16] . b[16, 8], fp32 accumulation; `acc` points to four
// registers.
template <ValueType kType>
__device__ __forceinline__ void mma_m16n8k16(float* acc, const uint32_t* a, uint32_t b0,
                                             uint32_t b1) {
  if constexpr (kType == ValueType::kFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// mma.m16n8k32: acc[16, 8] += a[16, 32] . b[32, 8] for bytes times signed bytes.
template <bool kUnsignedA>
__device__ __forceinline__ void mma_m16n8k32_int8(int* acc, const uint32_t* a, uint32_t b0,
                                                  uint32_t b1) {
  if constexpr (kUnsignedA) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// mma.sp.m16n8k32: acc[16, 8] += a[16, 32] . b[32, 8] for a 2:4 sparse a of 16-bit elements. `a`
// holds two of each four neighbours in a row, in rising order, and `metadata` their positions, two
// bits each. Of every four lanes only lanes 2 kSelector and 2 kSelector + 1 provide it.
template <ValueType kType, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float* acc, const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "two pairs of lanes");
  if constexpr (kType == ValueType::kFloat16) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  }
}

// bar.sync: waits for `threads` threads (a multiple of 32) at barrier `id` (1..15; 0 is the CTA's).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flash_llm::ptx
