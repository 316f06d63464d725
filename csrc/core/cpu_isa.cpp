#include "core/cpu_isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace flash_llm {
namespace {

#if defined(__x86_64__)
// Not among the names that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool detect(CpuIsa isa) {
#if defined(__x86_64__)
  // These ask the operating system, too, whether it saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
  switch (isa) {
    case CpuIsa::kPortable:
      return true;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx512;
    case CpuIsa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == CpuIsa::kPortable;
}

CpuIsa fastest() {
  CpuIsa best = CpuIsa::kPortable;
  for (const CpuIsa isa : kCpuIsas) {
    if (detect(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

bool has_cpu_isa(CpuIsa isa) { return detect(isa); }

Status select_cpu_isa(CpuIsa* out) {
  static const CpuIsa best = fastest();
  // Read at each call, so that a test can change it; it takes a few nanoseconds.
  const char* forced = std::getenv("FLASH_LLM_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    *out = best;
    return Status::success();
  }
  std::string known;
  for (const CpuIsa isa : kCpuIsas) {
    const std::string name = cpu_isa_name(isa);
    if (name == forced) {
      if (!detect(isa)) {
        return Status::unsupported("FLASH_LLM_CPU_ISA=" + name +
                                   " forces an instruction set that this CPU lacks; the best that "
                                   "it has is \"" +
                                   cpu_isa_name(best) + "\"");
      }
      *out = isa;
      return Status::success();
    }
    known += (known.empty() ? "\"" : ", \"") + name + "\"";
  }
  return Status::invalid_value("FLASH_LLM_CPU_ISA must be one of " + known + ", got \"" + forced +
                               "\"");
}

}  // namespace flash_llm
