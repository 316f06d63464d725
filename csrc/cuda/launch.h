// The CUDA layer's host interface: plain pointers and a stream, no torch. All pointers are device
// pointers unless a name says host. Nothing here allocates or synchronises.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/status.h"
#include "format/packed_format.h"
#include "format/prune.h"
#include "plan/problem.h"
#include "plan/spmm_plan.h"

namespace flash_llm::cuda {

// Y = act(X . W^T + bias) by the plan's kernel. Needs m, n, k > 0; payload 16-byte aligned; y
// 8-byte aligned; workspace 16-byte aligned, of plan.workspace_bytes. On sm_90 `prefetch` makes it
// a dependent launch: the kernel starts to load the weight while the previous kernel in the stream
// still runs, which therefore must not write the weight. A plan for kDense or kDenseFp8X, which
// need a dense GEMM, is refused: the caller runs it.
Status run_spmm(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                cudaStream_t stream);

// The kernel families that run_spmm() dispatches to. kTiledCslSm80: unless the configuration has
// packed_x, x must be 16-byte aligned, x_stride a multiple of 8 (or n = 1), and each row of x
// followed by zeros up to the next multiple of kTileK columns.
Status spmm_lscd(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                 cudaStream_t stream);
// kBitmapRowsSm90: as kBitmapSm90a, without a workspace.
Status spmm_bitmap_rows(const SpmmPlan& plan, const SpmmArgs& args, bool prefetch,
                        cudaStream_t stream);
// kBitmapSm90a, kBitmapSm90, kBitmapSm80: x must be 16-byte aligned, x_stride a multiple of 8 (or
// n = 1), and each row of x followed by zeros up to the next multiple of 8 columns.
Status spmm_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                   cudaStream_t stream);
Status spmm_bitmap_sm90(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                        cudaStream_t stream);
Status spmm_bitmap_sm80(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                        cudaStream_t stream);
// kGatherSm90, kGatherSm80: x must be 16-byte aligned, x_stride a multiple of 8 (or n = 1), and
// each row of x followed by zeros up to the next multiple of 8 columns.
Status spmm_gather_sm90(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                        cudaStream_t stream);
Status spmm_gather_sm80(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                        cudaStream_t stream);
// kQuantizedBitmapSm90a, kQuantizedBitmapSm90, kQuantizedBitmapSm80: likewise.
Status spmm_quantized_bitmap_sm90a(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                                   bool prefetch, cudaStream_t stream);
Status spmm_quantized_bitmap_sm90(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                                  bool prefetch, cudaStream_t stream);
Status spmm_quantized_bitmap_sm80(const SpmmPlan& plan, const SpmmArgs& args, void* workspace,
                                  bool prefetch, cudaStream_t stream);

// One format's packer on the device: the steps of format/packed_format.h. A matrix's values and
// scales are device pointers.
struct PackKernels {
  // Pass 1: units[tiles] and nonzeros nnz[tiles] of each tile.
  Status (*count)(const ValueMatrix& matrix, int32_t* units, int32_t* nnz, void* scratch,
                  cudaStream_t stream);
  // Pass 2: writes the same bytes as the host's packer. `offsets` and `nnz` come from pass 1. Where
  // the matrix has changed since pass 1, it sets *changed, which is 0 before, and leaves tiles out.
  Status (*pack)(const ValueMatrix& matrix, const int32_t* offsets, const int32_t* nnz,
                 uint32_t* payload, int32_t* changed, void* scratch, cudaStream_t stream);
  // dense[m, k] (contiguous, 16-byte aligned) from a packed weight.
  Status (*unpack)(const PackedView& view, uint16_t* dense, cudaStream_t stream);
  // Adds the number of stored values to *total.
  Status (*count_stored)(const PackedView& view, int64_t* total, cudaStream_t stream);
  // What `scratch` holds for each tile, from pass 1 to pass 2; 16-byte aligned.
  int scratch_bytes = 0;
};

// To be called after the kernels that write a weight, with 4 bytes of scratch memory. It makes the
// weight visible to everything later in the stream, even to a dependent launch, which reads weights
// before it waits for its predecessor.
Status end_weight_writes(void* scratch, cudaStream_t stream);

// What a dense FP8 product takes (kDenseFp8X), all contiguous and 16-byte aligned. Of a weight with
// fp8 values in the quantised bitmap, of K that 16 divides: values[m, k] and the scale of each row.
Status unpack_fp8(const PackedView& view, uint8_t* values, float* scales, cudaStream_t stream);
// Of X, as spmm_quantized_bitmap_sm90a() takes it but with k a multiple of 8: values[n, k] rounded
// to e4m3, and the scale of each token. `type` is that of the weight.
Status round_fp8(ValueType type, const uint16_t* x, int64_t x_stride, int64_t n, int64_t k,
                 uint8_t* values, float* scales, cudaStream_t stream);

PackKernels tiled_csl_kernels();
PackKernels bitmap_kernels();
PackKernels gather_kernels();
PackKernels quantized_bitmap_kernels();

// The kernels of a format for a type of values; null if they are packed and unpacked on the host.
const PackKernels* pack_kernels(Format format, ValueType type);

// The steps of magnitude pruning, which csrc/torch calls in turn. A cut says what is pruned in a
// row: all magnitudes below a threshold, and the first `ties` of those equal to it
// (format/prune.h). Finds the cut of each row that prunes `count` elements: thresholds[m] and
// ties[m].
Status prune_row_cuts(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int64_t count,
                      int32_t* thresholds, int64_t* ties, cudaStream_t stream);
// Adds the number of elements of each magnitude to histogram[kNumMagnitudes].
Status prune_histogram(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int64_t* histogram,
                       cudaStream_t stream);
// counts[m] = the number of elements of each row whose magnitude equals `threshold`.
Status prune_count_ties(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int threshold,
                        int64_t* counts, cudaStream_t stream);
// out[m, k] (contiguous) = dense with zeros where the cuts prune.
Status prune_apply_cuts(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                        const int32_t* thresholds, const int64_t* ties, uint16_t* out,
                        cudaStream_t stream);
// N:M pruning of every aligned group of columns.
Status prune_groups(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int keep, int group,
                    uint16_t* out, cudaStream_t stream);

// Refuses a plan whose workspace is smaller than the `workspace_bytes` that its kernel needs, or
// whose work cannot be divided between its workers.
Status check_launch(const SpmmPlan& plan, int64_t workspace_bytes);

// kOk, or kRuntime with CUDA's description of the error.
Status check(cudaError_t error, const char* what);

}  // namespace flash_llm::cuda
