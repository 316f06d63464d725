// The steps of magnitude pruning on the GPU; format/prune.h defines their results.
#include <cstdint>

#include "cuda/dense_matrix.cuh"
#include "cuda/launch.h"

namespace flash_llm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// A magnitude has 15 bits. A row's threshold is found in two passes with histograms in shared
// memory: the high 8 bits first, then the low 7.
constexpr int kHighBins = 256;
constexpr int kLowBins = 128;
constexpr int kLowBits = 7;
static_assert(kHighBins * kLowBins == kNumMagnitudes && kLowBins == 1 << kLowBits);

// The bin of the `left`-th smallest element. Subtracts the counts of the bins below it from `left`.
__device__ int find_bin(const int* histogram, int bins, int64_t& left) {
  int bin = 0;
  while (bin < bins - 1 && histogram[bin] < left) left -= histogram[bin++];
  return bin;
}

__global__ void __launch_bounds__(kThreads)
    row_cuts_kernel(DenseMatrix dense, int64_t count, int32_t* thresholds, int64_t* ties) {
  __shared__ int histogram[kHighBins];
  __shared__ int high;
  __shared__ int64_t left;
  const uint16_t* row = dense.row(blockIdx.x);
  for (int i = threadIdx.x; i < kHighBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < dense.k; i += kThreads) {
    atomicAdd(&histogram[magnitude(row[i]) >> kLowBits], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    left = count;
    high = find_bin(histogram, kHighBins, left);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kLowBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < dense.k; i += kThreads) {
    const int level = magnitude(row[i]);
    if (level >> kLowBits == high) atomicAdd(&histogram[level & (kLowBins - 1)], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int low = find_bin(histogram, kLowBins, left);
    thresholds[blockIdx.x] = count == 0 ? 0 : high << kLowBits | low;
    ties[blockIdx.x] = left;
  }
}

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(DenseMatrix dense, unsigned long long* histogram) {
  const int64_t total = dense.m * dense.k;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * kThreads) {
    atomicAdd(&histogram[magnitude(dense.row(i / dense.k)[i % dense.k])], 1ULL);
  }
}

__global__ void __launch_bounds__(kThreads)
    count_ties_kernel(DenseMatrix dense, int threshold, int64_t* counts) {
  const uint16_t* row = dense.row(blockIdx.x);
  int count = 0;
  for (int64_t i = threadIdx.x; i < dense.k; i += kThreads) count += magnitude(row[i]) == threshold;
  count = cta_sum(count);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

__global__ void __launch_bounds__(kThreads)
    apply_cuts_kernel(DenseMatrix dense, const int32_t* thresholds, const int64_t* ties,
                      uint16_t* out) {
  __shared__ int warp_ties[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint16_t* row = dense.row(blockIdx.x);
  uint16_t* out_row = out + int64_t{blockIdx.x} * dense.k;
  const int threshold = thresholds[blockIdx.x];
  const int64_t num_ties = ties[blockIdx.x];
  // Ties are counted from the beginning of the row, kThreads elements at a time.
  int64_t seen = 0;
  for (int64_t base = 0; base < dense.k; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const uint16_t value = i < dense.k ? row[i] : uint16_t{0};
    const int level = magnitude(value);
    const bool tie = i < dense.k && level == threshold;
    const uint32_t mask = __ballot_sync(~0U, tie);
    if (lane == 0) warp_ties[warp] = __popc(mask);
    __syncthreads();
    int before = __popc(mask & ((1U << lane) - 1U)), sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? warp_ties[w] : 0;
      sum += warp_ties[w];
    }
    const bool pruned = level < threshold || (tie && seen + before < num_ties);
    if (i < dense.k) out_row[i] = pruned ? uint16_t{0} : value;
    seen += sum;
    __syncthreads();  // warp_ties has been read
  }
}

__global__ void __launch_bounds__(kThreads)
    groups_kernel(DenseMatrix dense, int keep, int group, int64_t groups_per_row, uint16_t* out) {
  const int64_t idx = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (idx >= dense.m * groups_per_row) return;
  const int64_t r = idx / groups_per_row, col0 = idx % groups_per_row * group;
  const uint16_t* in = dense.row(r) + col0;
  const int count = static_cast<int>(min(int64_t{group}, dense.k - col0));
  for (int i = 0; i < count; ++i) {
    out[r * dense.k + col0 + i] = kept_in_group(in, count, keep, i) ? in[i] : uint16_t{0};
  }
}

}  // namespace

namespace cuda {

Status prune_row_cuts(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int64_t count,
                      int32_t* thresholds, int64_t* ties, cudaStream_t stream) {
  if (m == 0) return Status::success();
  row_cuts_kernel<<<static_cast<unsigned>(m), kThreads, 0, stream>>>({dense, ld, m, k}, count,
                                                                     thresholds, ties);
  return check(cudaGetLastError(), "row_cuts_kernel launch");
}

Status prune_histogram(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int64_t* histogram,
                       cudaStream_t stream) {
  if (m == 0 || k == 0) return Status::success();
  const int64_t blocks = (m * k + kThreads - 1) / kThreads;
  histogram_kernel<<<static_cast<unsigned>(blocks < 2048 ? blocks : 2048), kThreads, 0, stream>>>(
      {dense, ld, m, k}, reinterpret_cast<unsigned long long*>(histogram));
  return check(cudaGetLastError(), "histogram_kernel launch");
}

Status prune_count_ties(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int threshold,
                        int64_t* counts, cudaStream_t stream) {
  if (m == 0) return Status::success();
  count_ties_kernel<<<static_cast<unsigned>(m), kThreads, 0, stream>>>({dense, ld, m, k}, threshold,
                                                                       counts);
  return check(cudaGetLastError(), "count_ties_kernel launch");
}

Status prune_apply_cuts(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                        const int32_t* thresholds, const int64_t* ties, uint16_t* out,
                        cudaStream_t stream) {
  if (m == 0 || k == 0) return Status::success();
  apply_cuts_kernel<<<static_cast<unsigned>(m), kThreads, 0, stream>>>({dense, ld, m, k},
                                                                       thresholds, ties, out);
  return check(cudaGetLastError(), "apply_cuts_kernel launch");
}

Status prune_groups(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int keep, int group,
                    uint16_t* out, cudaStream_t stream) {
  const int64_t groups_per_row = (k + group - 1) / group;
  const int64_t blocks = (m * groups_per_row + kThreads - 1) / kThreads;
  if (blocks == 0) return Status::success();
  groups_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>({dense, ld, m, k}, keep,
                                                                        group, groups_per_row, out);
  return check(cudaGetLastError(), "groups_kernel launch");
}

}  // namespace cuda
}  // namespace flash_llm
