// The instruction set of the CPU kernels. It is chosen at run time, so that one binary runs on
// every CPU. FLASH_LLM_CPU_ISA forces one.
#pragma once

#include <string>

#include "base/status.h"

namespace flash_llm {

// Of each architecture from the most common to the rarest, which usually is the fastest.
enum class CpuIsa {
  kPortable,    // C++
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, VL, DQ, VBMI2, VNNI (every CPU with VBMI2 has VNNI)
  kAvx512Bf16,  // kAvx512 and BF16
  kNeon,        // AArch64's NEON; tested under qemu only, never timed
};

inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512,
                                      CpuIsa::kAvx512Bf16, CpuIsa::kNeon};

// "portable", "avx2", "avx512", "avx512_bf16" or "neon".
const char* cpu_isa_name(CpuIsa isa);

// Whether this CPU has the instruction set and this build has code for it.
bool has_cpu_isa(CpuIsa isa);

// Selects the instruction set that was forced, else the one that FLASH_LLM_CPU_ISA named when the
// library was loaded, else the fastest on this CPU. Fails if the variable named an unknown
// instruction set, or one that this CPU lacks.
Status select_cpu_isa(CpuIsa* out);

// Forces an instruction set for all threads, from their next call on; "" ends that. For tests and
// benchmarks. Fails, and changes nothing, for an unknown name or one that this CPU lacks.
Status force_cpu_isa(const std::string& name);

// Whether this CPU multiplies dense matrices of this type faster than fp32 ones: by AMX for bf16,
// by AVX-512 FP16 for fp16. The dense GEMMs of libraries use these instructions; our kernels do
// not.
bool has_fast_dense_bf16();
bool has_fast_dense_fp16();

}  // namespace flash_llm
