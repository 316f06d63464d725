// Which instruction set the CPU kernels use: chosen when they run, so that one binary serves every
// CPU. FLASH_LLM_CPU_ISA forces one.
#pragma once

#include <string>

#include "base/status.h"

namespace flash_llm {

// From what every CPU has to what few have, which mostly is the fastest.
enum class CpuIsa {
  kPortable,    // C++
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, VL, DQ, VBMI2
  kAvx512Bf16,  // and BF16
};

inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512,
                                      CpuIsa::kAvx512Bf16};

// "portable", "avx2", "avx512" or "avx512_bf16".
const char* cpu_isa_name(CpuIsa isa);

// Whether this CPU has it, and this build code for it.
bool has_cpu_isa(CpuIsa isa);

// The one that was forced, else the one that FLASH_LLM_CPU_ISA named when the library was loaded,
// else the fastest on this CPU. Fails if the variable held a name that is none, or that of one that
// this CPU lacks.
Status select_cpu_isa(CpuIsa* out);

// Forces one for all threads, from their next call on; "" ends that. For tests and benchmarks.
// Fails, and changes nothing, for a name that is none and for one that this CPU lacks.
Status force_cpu_isa(const std::string& name);

// Whether this CPU multiplies dense matrices of a type faster than it does fp32: AMX for bf16,
// AVX-512 FP16 for fp16. Libraries use these; we have nothing of the kind.
bool has_fast_dense_bf16();
bool has_fast_dense_fp16();

}  // namespace flash_llm
