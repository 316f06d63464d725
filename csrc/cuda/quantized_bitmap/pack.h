// The first two functions of quantized_bitmap_kernels() (cuda/launch.h, PackKernels).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/status.h"
#include "format/packed_format.h"

namespace flash_llm::cuda {

Status count_quantized_bitmap(const ValueMatrix& matrix, int32_t* units, int32_t* nnz,
                              void* scratch, cudaStream_t stream);
Status pack_quantized_bitmap(const ValueMatrix& matrix, const int32_t* offsets, const int32_t* nnz,
                             uint32_t* payload, int32_t* changed, void* scratch,
                             cudaStream_t stream);

}  // namespace flash_llm::cuda
