#include "cuda/launch.h"

#include <string>

namespace flash_llm::cuda {

Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::success();
  return Status::runtime(std::string(what) + ": " + cudaGetErrorString(error));
}

Status check_launch(const SpmmPlan& plan, int64_t workspace_bytes) {
  const int64_t units = plan.work.units();
  if (units < 1 || units > INT32_MAX || plan.work.workers < 1 || plan.work.workers > units) {
    return Status::invalid_value("plan " + plan.to_string() + " divides " + std::to_string(units) +
                                 " units of work between " + std::to_string(plan.work.workers) +
                                 " workers");
  }
  if (plan.workspace_bytes < workspace_bytes) {
    return Status::invalid_value("plan " + plan.to_string() + " has a workspace of " +
                                 std::to_string(plan.workspace_bytes) +
                                 " bytes, the kernel needs " + std::to_string(workspace_bytes));
  }
  return Status::success();
}

Status end_weight_writes(void* scratch, cudaStream_t stream) {
  // A dependent launch can overlap with a kernel before it, but not with a memset.
  return check(cudaMemsetAsync(scratch, 0, 4, stream), "cudaMemsetAsync after packing");
}

Status run_spmm(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                cudaStream_t stream) {
  switch (plan.family) {
    case KernelFamily::kTiledCslSm80:
      return spmm_lscd(plan, args, workspace, prefetch, stream);
    case KernelFamily::kBitmapRowsSm90:
      return spmm_bitmap_rows(plan, args, prefetch, stream);
    case KernelFamily::kBitmapSm90a:
      return spmm_bitmap(plan, args, workspace, prefetch, stream);
    case KernelFamily::kBitmapSm90:
      return spmm_bitmap_sm90(plan, args, workspace, prefetch, stream);
    case KernelFamily::kBitmapSm80:
      return spmm_bitmap_sm80(plan, args, workspace, prefetch, stream);
    case KernelFamily::kGatherSm90:
      return spmm_gather_sm90(plan, args, workspace, prefetch, stream);
    case KernelFamily::kGatherSm80:
      return spmm_gather_sm80(plan, args, workspace, prefetch, stream);
    case KernelFamily::kQuantizedBitmapSm90a:
      return spmm_quantized_bitmap_sm90a(plan, args, workspace, prefetch, stream);
    case KernelFamily::kQuantizedBitmapSm90:
      return spmm_quantized_bitmap_sm90(plan, args, workspace, prefetch, stream);
    case KernelFamily::kQuantizedBitmapSm80:
      return spmm_quantized_bitmap_sm80(plan, args, workspace, prefetch, stream);
    case KernelFamily::kReference:
    case KernelFamily::kTiledCslCpu:
    case KernelFamily::kRowBitmapCpu:
    case KernelFamily::kRowBitmapInt8XCpu:
    case KernelFamily::kRowBitmapBlocks:
    case KernelFamily::kDenseFp8X:
    case KernelFamily::kDense:
      break;
  }
  return Status::invalid_value("plan " + plan.to_string() + " is not for a GPU kernel");
}

const PackKernels* pack_kernels(Format format, ValueType type) {
  static const PackKernels tiled_csl = tiled_csl_kernels(), bitmap = bitmap_kernels(),
                           gather = gather_kernels(), quantized_bitmap = quantized_bitmap_kernels();
  switch (format) {
    case Format::kTiledCsl:
      return &tiled_csl;
    case Format::kBitmap:
      return &bitmap;
    case Format::kGather:
      return &gather;
    case Format::kQuantizedBitmap:
      return &quantized_bitmap;
    case Format::kRowBitmap:
      return nullptr;
  }
  return nullptr;  // never: the switch is exhaustive
}

}  // namespace flash_llm::cuda
