// The quantised bitmap kernel for GPUs from sm_80 on, which copies weights by cp.async.
#include "cuda/quantized_bitmap/quantized_bitmap_kernel.cuh"

namespace flash_llm {

Status cuda::spmm_quantized_bitmap_sm80(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                                        bool prefetch, cudaStream_t stream) {
  return spmm_quantized_bitmap<QuantSm80>(plan, args, workspace, prefetch, stream);
}

}  // namespace flash_llm
