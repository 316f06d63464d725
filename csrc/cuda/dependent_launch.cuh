// Programmatic dependent launch (sm_90): a kernel may begin while its predecessor in the stream
// still runs. It waits before it touches anything that the predecessor writes or reads anew.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "cuda/launch.h"

namespace flash_llm {

// Waits until the kernel before this one in the stream has finished and its writes are visible; at
// once if this was no dependent launch.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets a dependent successor begin as soon as every CTA has come here or has finished.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename... Params, typename... Args>
Status launch_kernel(const char* what, void (*kernel)(Params...), dim3 grid, int threads,
                     int smem_bytes, bool dependent, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cuda::check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), what);
}

}  // namespace flash_llm
