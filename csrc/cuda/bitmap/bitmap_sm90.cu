// The bitmap kernel for GPUs from sm_90 on, which copies weights by bulk copies. It uses nothing
// that only sm_90a has, so its PTX runs on newer GPUs too.
#include "cuda/bitmap/mma_sync_kernel.cuh"

namespace flash_llm {

Status cuda::spmm_bitmap_sm90(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                              bool prefetch, cudaStream_t stream) {
  return spmm_mma_sync<BitmapSm90>(plan, args, workspace, prefetch, stream);
}

}  // namespace flash_llm
