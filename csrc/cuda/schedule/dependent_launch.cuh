// Programmatic dependent launch (sm_90): a kernel may begin while its predecessor in the stream
// still runs. It must wait before it reads anything that the predecessor may write, and before it
// writes anything that the predecessor may read or write.
#pragma once

#include <cuda_runtime.h>

#include "base/status.h"
#include "cuda/launch.h"

namespace flash_llm {

// Waits until the previous kernel in the stream has finished and its writes are visible. Returns at
// once if this kernel was not launched dependently.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets a dependent successor begin as soon as every CTA of this kernel has called this or has
// exited.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Sets *waits to whether a kernel, as the current device runs it, waits for its predecessor, so
// that it may be launched dependently. Only code that was compiled for sm_90 or newer does, but a
// device of compute capability 9.0 may also run code that was built for sm_80.
template <typename... Params>
Status waits_for_previous_kernel(const char* what, void (*kernel)(Params...), bool* waits) {
  cudaFuncAttributes code = {};
  const Status described = cuda::check(cudaFuncGetAttributes(&code, kernel), what);
  *waits = described.ok() && code.ptxVersion >= 90;
  return described;
}

// Allows a kernel dynamic shared memory of `smem_bytes`, on the current device; more than 48 KB
// need it. Idempotent and legal during graph capture.
template <typename... Params>
Status allow_smem(const char* what, void (*kernel)(Params...), int smem_bytes) {
  return cuda::check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes), what);
}

// Launches a kernel in clusters of `cluster` CTAs. `dependent` lets it begin before the previous
// kernel in the stream has finished.
template <typename... Params, typename... Args>
Status launch_clusters(const char* what, void (*kernel)(Params...), unsigned cluster, dim3 grid,
                       int threads, int smem_bytes, bool dependent, cudaStream_t stream,
                       Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (dependent) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  return cuda::check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), what);
}

template <typename... Params, typename... Args>
Status launch_kernel(const char* what, void (*kernel)(Params...), dim3 grid, int threads,
                     int smem_bytes, bool dependent, cudaStream_t stream, Args... args) {
  return launch_clusters(what, kernel, 1, grid, threads, smem_bytes, dependent, stream, args...);
}

}  // namespace flash_llm
