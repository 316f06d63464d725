// Marks what the CUDA kernels share with the host, so that both sides agree on every byte.
#pragma once

#ifdef __CUDACC__
#define FLASH_LLM_HOST_DEVICE __host__ __device__
#else
#define FLASH_LLM_HOST_DEVICE
#endif
