// One PTX instruction (with its operand set-up) per function, for GPUs newer than sm_80. Bulk
// copies, tensor maps, clusters and stmatrix exist from sm_90 on, setmaxnreg and wgmma only in code
// for sm_90a; the table in csrc/plan/kernel_family.cpp says which kernels need them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
#include "format/packed_header.h"

// Defined where code may use what GPUs from sm_90 on have, and what only sm_90a has.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FLASH_LLM_SM90 1
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLASH_LLM_SM90A 1
#endif

namespace flash_llm {

// Whether the code is compiled for sm_90 or newer.
#ifdef FLASH_LLM_SM90
inline constexpr bool kHasSm90 = true;
#else
inline constexpr bool kHasSm90 = false;
#endif

}  // namespace flash_llm

namespace flash_llm::ptx {

// Makes initialised barriers visible to the asynchronous copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives and makes the current phase wait for `bytes` bytes of asynchronous copies too.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// cp.async.bulk from global to shared memory: both addresses 16-byte aligned, `bytes` a multiple of
// 16. The data is read once, so L2 may evict it first.
__device__ __forceinline__ void bulk_copy_streaming(uint32_t smem, const void* gmem, uint32_t bytes,
                                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(gmem), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

// The same for data that other CTAs read too.
__device__ __forceinline__ void bulk_copy(uint32_t smem, const void* gmem, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(gmem), "r"(bytes), "r"(barrier)
      : "memory");
}

// Prefetches a tensor map that is a kernel parameter.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at element (x, y) of a two-dimensional tensor map to shared memory.
__device__ __forceinline__ void tensor_copy_2d(uint32_t smem, const CUtensorMap* map, int x, int y,
                                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same for all CTAs of the cluster in `cta_mask`: the box goes to the same shared-memory
// address in each of them, and completes on the barrier at the same address.
__device__ __forceinline__ void tensor_copy_2d_multicast(uint32_t smem, const CUtensorMap* map,
                                                         int x, int y, uint32_t barrier,
                                                         uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(cta_mask)
      : "memory");
}

// mbarrier.arrive on the barrier at this address in CTA `rank` of the cluster. It signals that
// memory has been read, so it need not make this thread's writes visible to the cluster, which is
// slow (N = 64: 111 us with .release.cluster, 79 us without).
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in CTA `rank` of the cluster that corresponds to an address in this CTA.
__device__ __forceinline__ uint32_t cluster_address(uint32_t smem, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}

// Stores four registers at a 16-byte aligned address of cluster_address().
__device__ __forceinline__ void store_cluster_v4(uint32_t remote, uint4 four) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(four.x),
               "r"(four.y), "r"(four.z), "r"(four.w)
               : "memory");
}

// Synchronises all threads of the cluster; their earlier accesses to each other's shared memory are
// complete afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// stmatrix.x4.trans: stores four 8x8 matrices of 16-bit elements transposed; lane l gives the
// address of row l % 8 of matrix l / 8 as it will lie in memory.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t smem, const uint32_t (&reg)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(reg[0]), "r"(reg[1]), "r"(reg[2]), "r"(reg[3])
               : "memory");
}

// setmaxnreg.dec: lowers the registers per thread to kRegisters and releases the others. All warps
// of a warpgroup must call it.
template <int kRegisters>
__device__ __forceinline__ void dealloc_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.inc: raises the registers per thread to kRegisters; waits until enough are free.
template <int kRegisters>
__device__ __forceinline__ void alloc_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// To be called after wgmma_wait<0>, which does not name the sums that it waits for: keeps the
// compiler from moving reads of them before it. If it does, ptxas makes each wgmma of the kernel
// wait for the one before, and says so in its message C7514.
template <int kNumSums>
__device__ __forceinline__ void wgmma_complete(float (&sums)[kNumSums]) {
#pragma unroll
  for (int i = 0; i < kNumSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int kNumSums>
__device__ __forceinline__ void wgmma_complete(int (&sums)[kNumSums]) {
#pragma unroll
  for (int i = 0; i < kNumSums; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// The matrix descriptor of a K-major B operand in shared memory with 128-byte swizzle: rows of 128
// bytes (64 elements of K), in groups of 8 rows or 1024 bytes. The operand begins at smem + offset,
// a multiple of 1024 bytes plus 32 bytes for each k16 step.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem, uint32_t offset) {
  constexpr uint32_t kSwizzle128 = 1U << 30, kGroupStride = 1024 / 16, kUnusedStride = 1U << 16;
  // Shared memory is smaller than the 256 KB that the address field covers, so the sum never
  // carries into the next field, and the offset takes a single addition.
  const uint32_t low = (kUnusedStride | smem >> 4) + (offset >> 4);
  return uint64_t{kSwizzle128 | kGroupStride} << 32 | low;
}

// wgmma's operands as PTX text: FLASH_LLM_R<n>(t) is the list of n registers from %t0 on, and
// FLASH_LLM_D<n>(i) are the output operands d[i], d[i + 1] and so on.
// clang-format off
#define FLASH_LLM_R2(t) "%" #t "0, %" #t "1"
#define FLASH_LLM_R4(t) FLASH_LLM_R2(t) ", %" #t "2, %" #t "3"
#define FLASH_LLM_R6(t) FLASH_LLM_R4(t) ", %" #t "4, %" #t "5"
#define FLASH_LLM_R8(t) FLASH_LLM_R6(t) ", %" #t "6, %" #t "7"
#define FLASH_LLM_R10(t) FLASH_LLM_R8(t) ", %" #t "8, %" #t "9, "
#define FLASH_LLM_R30 FLASH_LLM_R10() FLASH_LLM_R10(1) FLASH_LLM_R10(2)
#define FLASH_LLM_R60 FLASH_LLM_R30 FLASH_LLM_R10(3) FLASH_LLM_R10(4) FLASH_LLM_R10(5)
#define FLASH_LLM_R120 \
  FLASH_LLM_R60 FLASH_LLM_R10(6) FLASH_LLM_R10(7) FLASH_LLM_R10(8) FLASH_LLM_R10(9) \
  FLASH_LLM_R10(10) FLASH_LLM_R10(11)
#define FLASH_LLM_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FLASH_LLM_D8(i) FLASH_LLM_D4(i), FLASH_LLM_D4((i) + 4)
#define FLASH_LLM_D16(i) FLASH_LLM_D8(i), FLASH_LLM_D8((i) + 8)
#define FLASH_LLM_D32(i) FLASH_LLM_D16(i), FLASH_LLM_D16((i) + 16)
#define FLASH_LLM_D64(i) FLASH_LLM_D32(i), FLASH_LLM_D32((i) + 32)
#define FLASH_LLM_D128(i) FLASH_LLM_D64(i), FLASH_LLM_D64((i) + 64)
// For each kN: d, a, b and the two operands after them (of wgmma.sp) as text, then the outputs.
#define FLASH_LLM_WGMMA_SHAPES(row) \
  row(8, FLASH_LLM_R4(), "%4, %5, %6, %7", "%8", "%9", "%10", FLASH_LLM_D4(0)) \
  row(16, FLASH_LLM_R8(), "%8, %9, %10, %11", "%12", "%13", "%14", FLASH_LLM_D8(0)) \
  row(32, FLASH_LLM_R10() FLASH_LLM_R6(1), "%16, %17, %18, %19", "%20", "%21", "%22", \
      FLASH_LLM_D16(0)) \
  row(64, FLASH_LLM_R30 FLASH_LLM_R2(3), "%32, %33, %34, %35", "%36", "%37", "%38", \
      FLASH_LLM_D32(0)) \
  row(128, FLASH_LLM_R60 FLASH_LLM_R4(6), "%64, %65, %66, %67", "%68", "%69", "%70", \
      FLASH_LLM_D64(0)) \
  row(256, FLASH_LLM_R120 FLASH_LLM_R8(12), "%128, %129, %130, %131", "%132", "%133", "%134", \
      FLASH_LLM_D128(0))

// `types` begins with k; `scales` are the immediate operands at the end.
#define FLASH_LLM_WGMMA(types, scales, n, d_text, a_text, b_text, t1, t2, ...) \
  if constexpr (kN == n) { \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n" #n types " " \
        "{" d_text "}, {" a_text "}, " b_text ", " scales ";" \
        : __VA_ARGS__ \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define FLASH_LLM_WGMMA_SP(type, n, d_text, a_text, b_text, t1, t2, ...) \
  if constexpr (kN == n) { \
    asm volatile( \
        "wgmma.mma_async.sp.sync.aligned.m64n" #n "k32.f32." type " " \
        "{" d_text "}, {" a_text "}, " b_text ", " t1 ", " t2 \
        ", 1, 1, 1, 0;" \
        : __VA_ARGS__ \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), \
          "n"(kSelector)); \
  }
#define FLASH_LLM_I4(i) "+r"(d[i]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3])
#define FLASH_LLM_I8(i) FLASH_LLM_I4(i), FLASH_LLM_I4((i) + 4)
#define FLASH_LLM_I16(i) FLASH_LLM_I8(i), FLASH_LLM_I8((i) + 8)
#define FLASH_LLM_I32(i) FLASH_LLM_I16(i), FLASH_LLM_I16((i) + 16)
#define FLASH_LLM_I64(i) FLASH_LLM_I32(i), FLASH_LLM_I32((i) + 32)
#define FLASH_LLM_WGMMA_F16(...) FLASH_LLM_WGMMA("k16.f32.f16.f16", "1, 1, 1, 0", __VA_ARGS__)
#define FLASH_LLM_WGMMA_BF16(...) FLASH_LLM_WGMMA("k16.f32.bf16.bf16", "1, 1, 1, 0", __VA_ARGS__)
#define FLASH_LLM_WGMMA_E4M3(...) FLASH_LLM_WGMMA("k32.f32.e4m3.e4m3", "1, 1, 1", __VA_ARGS__)
#define FLASH_LLM_WGMMA_U8_S8(n, d_text, a_text, b_text, ...) \
  FLASH_LLM_WGMMA("k32.s32.u8.s8", "1", n, d_text, a_text, b_text, , , __VA_ARGS__)
#define FLASH_LLM_WGMMA_SP_F16(...) FLASH_LLM_WGMMA_SP("f16.f16", __VA_ARGS__)
#define FLASH_LLM_WGMMA_SP_BF16(...) FLASH_LLM_WGMMA_SP("bf16.bf16", __VA_ARGS__)
// clang-format on

// wgmma.m64nNk16: d[64, kN] += a[64, 16] . b[16, kN], fp32 accumulation, a in registers. Each warp
// of the warpgroup holds 16 rows of a and d in the layout of mma.m16n8k16, d as blocks of 8
// columns.
template <ValueType kType, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t* a, uint64_t b) {
  if constexpr (kType == ValueType::kFloat16) {
    FLASH_LLM_WGMMA_SHAPES(FLASH_LLM_WGMMA_F16)
  } else {
    FLASH_LLM_WGMMA_SHAPES(FLASH_LLM_WGMMA_BF16)
  }
}

// wgmma.sp.m64nNk32: the same for a 2:4 sparse a[64, 32]. `a` holds two of each four neighbours in
// a row, and `metadata` their positions, two bits each (as for mma.sp.m16n8k32). Of every four
// lanes only lanes 2 kSelector and 2 kSelector + 1 provide it.
template <ValueType kType, int kN, int kSelector>
__device__ __forceinline__ void wgmma_sp(float (&d)[kN / 2], const uint32_t* a, uint64_t b,
                                         uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "two pairs of lanes");
  if constexpr (kType == ValueType::kFloat16) {
    FLASH_LLM_WGMMA_SHAPES(FLASH_LLM_WGMMA_SP_F16)
  } else {
    FLASH_LLM_WGMMA_SHAPES(FLASH_LLM_WGMMA_SP_BF16)
  }
}

// wgmma.m64nNk32: the same for e4m3 a[64, 32] and b[32, kN]; each warp holds 16 rows of a in the
// layout of mma.m16n8k32. The descriptor is as for 16-bit elements: a row of 128 bytes has 128
// elements of K. The tensor cores align the products and the sum to the largest of them, and keep
// about 13 bits behind its leading one (measured; see benchmarks/README.md).
template <int kN>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[kN / 2], const uint32_t* a, uint64_t b) {
  FLASH_LLM_WGMMA_SHAPES(FLASH_LLM_WGMMA_E4M3)
}

// wgmma.m64nNk32: d[64, kN] += a[64, 32] . b[32, kN] for unsigned bytes a, in registers, and signed
// bytes b. Each warp holds 16 rows of a and d in the layout of mma.m16n8k32. The descriptor is as
// for 16-bit elements: a row of 128 bytes has 128 elements of K.
template <int kN>
__device__ __forceinline__ void wgmma_u8_s8(int (&d)[kN / 2], const uint32_t* a, uint64_t b) {
  FLASH_LLM_WGMMA_U8_S8(16, FLASH_LLM_R8(), "%8, %9, %10, %11", "%12", FLASH_LLM_I8(0))
  FLASH_LLM_WGMMA_U8_S8(32, FLASH_LLM_R10() FLASH_LLM_R6(1), "%16, %17, %18, %19", "%20",
                        FLASH_LLM_I16(0))
  FLASH_LLM_WGMMA_U8_S8(64, FLASH_LLM_R30 FLASH_LLM_R2(3), "%32, %33, %34, %35", "%36",
                        FLASH_LLM_I32(0))
  FLASH_LLM_WGMMA_U8_S8(128, FLASH_LLM_R60 FLASH_LLM_R4(6), "%64, %65, %66, %67", "%68",
                        FLASH_LLM_I64(0))
}

}  // namespace flash_llm::ptx
