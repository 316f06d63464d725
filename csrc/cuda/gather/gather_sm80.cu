// The gather kernel for GPUs from sm_80 on, which copies weights by cp.async.
#include "cuda/gather/gather_kernel.cuh"

namespace flash_llm {

Status cuda::spmm_gather_sm80(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                              bool prefetch, cudaStream_t stream) {
  return spmm_gather<GatherSm80>(plan, args, workspace, prefetch, stream);
}

}  // namespace flash_llm
