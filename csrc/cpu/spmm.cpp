#include "cpu/spmm.h"

namespace flash_llm {

Status run_spmm(const SpmmPlan& plan, const SpmmArgs& args, CpuIsa isa,
                const ParallelFor& parallel_for) {
  if (Status fits = check_plan(plan, plan.family, args); !fits.ok()) return fits;
  switch (plan.family) {
    case KernelFamily::kReference:
      spmm_cpu_reference(args, parallel_for);
      return Status::success();
    case KernelFamily::kTiledCslCpu:
      spmm_cpu_tiled_csl(args, parallel_for);
      return Status::success();
    case KernelFamily::kRowBitmapCpu:
      spmm_cpu_row_bitmap(args, isa, parallel_for);
      return Status::success();
    case KernelFamily::kRowBitmapInt8XCpu:
      spmm_cpu_row_bitmap_int8x(args, isa, parallel_for);
      return Status::success();
    case KernelFamily::kRowBitmapBlocks:
    case KernelFamily::kTiledCslSm80:
    case KernelFamily::kBitmapRowsSm90:
    case KernelFamily::kBitmapSm90a:
    case KernelFamily::kBitmapSm90:
    case KernelFamily::kBitmapSm80:
    case KernelFamily::kGatherSm90:
    case KernelFamily::kGatherSm80:
    case KernelFamily::kQuantizedBitmapSm90a:
    case KernelFamily::kQuantizedBitmapSm90:
    case KernelFamily::kQuantizedBitmapSm80:
    case KernelFamily::kDenseFp8X:
    case KernelFamily::kDense:
      break;
  }
  return Status::invalid_value("plan " + plan.to_string() + " is not for a kernel of the CPU");
}

}  // namespace flash_llm
