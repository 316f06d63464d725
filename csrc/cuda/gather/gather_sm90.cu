// The gather kernel for GPUs from sm_90 on, which copies weights by bulk copies.
#include "cuda/gather/gather_kernel.cuh"

namespace flash_llm {

Status cuda::spmm_gather_sm90(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                              bool prefetch, cudaStream_t stream) {
  return spmm_gather<GatherSm90>(plan, args, workspace, prefetch, stream);
}

}  // namespace flash_llm
