// Large buffers that are read from one end to the other are read faster from huge pages: on an EPYC
// (Zen 4) 35 instead of 27 GB/s, because fewer pages have to be looked up. Linux gives them where
// it is asked to, in most distributions' setting ("madvise").
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace flash_llm {

// To be called before the buffer is first written. A wish: where it is not granted nothing changes.
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
