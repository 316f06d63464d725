// Which instruction set the CPU kernels use: chosen when they run, so that one binary serves every
// CPU. FLASH_LLM_CPU_ISA forces one.
#pragma once

#include "core/status.h"

namespace flash_llm {

// From what every CPU has to the fastest.
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

// The one that FLASH_LLM_CPU_ISA names, else the fastest that this CPU has. Fails for a name that
// is none, and for one that this CPU lacks.
Status select_cpu_isa(CpuIsa* out);

}  // namespace flash_llm
