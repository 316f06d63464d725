// Large buffers are read sequentially faster from huge pages: at 35 instead of 27 GB/s on an EPYC
// (Zen 4), because fewer page translations are needed. In the setting of most distributions
// ("madvise") Linux provides huge pages for memory that asks for them.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace flash_llm {

// Call it before the buffer is first written. It is a hint; if it fails nothing else changes.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace flash_llm
