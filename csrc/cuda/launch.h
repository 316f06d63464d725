// The CUDA layer's host interface: plain pointers and a stream, no torch. All pointers are device
// pointers unless a name says host. Nothing here allocates or synchronises.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/packed_format.h"
#include "core/prune.h"
#include "core/spmm.h"
#include "core/spmm_plan.h"
#include "core/status.h"

namespace flash_llm::cuda {

// Y = act(X . W^T + bias) by the plan's kernel. Needs m, n, k > 0; payload 16-byte aligned; y
// 8-byte aligned; workspace 16-byte aligned, of plan.workspace_bytes. `prefetch` launches
// dependently, on sm_90: the kernel starts to fetch the weight while the kernel before it in the
// stream still runs, so that one must not be writing the weight.
//
// Route kLscd, Tiled-CSL: unless the configuration has packed_x, x must be 16-byte aligned,
// x_stride a multiple of 8 (or n = 1), and rows readable, and zero, up to the next multiple of
// kTileK.
Status spmm_lscd(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                 cudaStream_t stream);

// Route kBitmap, Bitmap on sm_90: x must be 16-byte aligned and x_stride a multiple of 8 (or n =
// 1).
Status spmm_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                   cudaStream_t stream);

// One format's packer on the device: the steps of core/packed_format.h.
struct PackKernels {
  // Pass 1: units[tiles] and nonzeros nnz[tiles] of each tile.
  Status (*count)(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int32_t* units,
                  int32_t* nnz, cudaStream_t stream);
  // Pass 2: the same bytes as the host's. `offsets` and `nnz` come from pass 1. Sets *changed,
  // which is 0 before, and leaves tiles out, where `dense` no longer is what pass 1 saw.
  Status (*pack)(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
                 const int32_t* nnz, uint32_t* payload, int32_t* changed, cudaStream_t stream);
  // dense[m, k] (contiguous, 16-byte aligned) from a packed weight.
  Status (*unpack)(const PackedView& view, uint16_t* dense, cudaStream_t stream);
};

// To be called after the kernels that wrote a weight, with 4 bytes of scratch: what comes later in
// the stream, even a dependent launch that reads weights before it waits, finds them written.
Status end_weight_writes(void* scratch, cudaStream_t stream);

PackKernels tiled_csl_kernels();
PackKernels bitmap_kernels();

// The steps of magnitude pruning; csrc/torch chains them. Cuts are one per row.
// Finds each row's cut that drops `count` elements.
Status prune_row_cuts(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int64_t count,
                      int32_t* thresholds, int64_t* ties, cudaStream_t stream);
// Adds to histogram[kNumMagnitudes].
Status prune_histogram(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int64_t* histogram,
                       cudaStream_t stream);
// counts[m]: elements of each row whose magnitude equals `threshold`.
Status prune_count_ties(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int threshold,
                        int64_t* counts, cudaStream_t stream);
// out[m, k] (contiguous) = dense with each row cut.
Status prune_apply_cuts(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                        const int32_t* thresholds, const int64_t* ties, uint16_t* out,
                        cudaStream_t stream);
// N:M pruning of every aligned group of columns.
Status prune_groups(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int keep, int group,
                    uint16_t* out, cudaStream_t stream);

// kOk, or kRuntime with CUDA's own words.
Status check(cudaError_t error, const char* what);

}  // namespace flash_llm::cuda
