// Marks functions that both host code and CUDA kernels call, so that both agree on every byte.
#pragma once

#ifdef __CUDACC__
#define FLASH_LLM_HOST_DEVICE __host__ __device__
#else
#define FLASH_LLM_HOST_DEVICE
#endif
