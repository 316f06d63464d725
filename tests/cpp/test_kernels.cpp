// The CUDA kernels on a GPU, without torch: every configuration of every family against the CPU's
// oracle, bit for bit, and the packers against the host's bytes. Skipped where there is no GPU.
//
// The tests named Small are for compute-sanitizer, under which a kernel takes a hundred times as
// long. racecheck needs a build with -DFLASH_LLM_RACECHECK=ON (cuda/schedule/warp_arrival.cuh).
//   for tool in memcheck initcheck synccheck racecheck; do
//     compute-sanitizer --tool $tool build/cmake/flash_llm_kernel_tests --gtest_filter='*Small*'
//   done
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/spmm.h"
#include "cuda/launch.h"
#include "format/bitmap.h"
#include "format/element.h"
#include "plan/bitmap_mma_sync.h"
#include "plan/bitmap_rows_sm90.h"
#include "plan/bitmap_sm90a.h"
#include "plan/gather.h"
#include "plan/spmm_plan.h"
#include "testing.h"

namespace flash_llm {
namespace {

using testing::DenseMatrix;
using testing::Packed;

constexpr uint16_t kNaN = 0x7FFF;  // in both types

void expect_success(cudaError_t error) {
  EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

// A copy of host values on the GPU.
template <typename T>
class OnGpu {
 public:
  explicit OnGpu(const std::vector<T>& values) : size_(values.size()) {
    void* memory = nullptr;
    expect_success(cudaMalloc(&memory, std::max<size_t>(bytes(), 1)));
    memory_.reset(static_cast<T*>(memory));
    expect_success(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice));
  }

  T* data() const { return memory_.get(); }

  std::vector<T> to_host() const {
    std::vector<T> values(size_);
    expect_success(cudaMemcpy(values.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  struct Free {
    void operator()(T* memory) const { cudaFree(memory); }
  };

  size_t bytes() const { return size_ * sizeof(T); }

  size_t size_;
  std::unique_ptr<T, Free> memory_;
};

const DeviceInfo& this_gpu() {
  static const DeviceInfo device = [] {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return DeviceInfo{};
    return gpu(properties.major * 10 + properties.minor, properties.multiProcessorCount,
               static_cast<int>(properties.sharedMemPerMultiprocessor), FLASH_LLM_CUDA_ARCHS);
  }();
  return device;
}

uint16_t element_of(int value, ValueType type) {
  return type == ValueType::kFloat16 ? from_float<ValueType::kFloat16>(static_cast<float>(value))
                                     : from_float<ValueType::kBfloat16>(static_cast<float>(value));
}

// Integers of which any sum here is exact in fp32, in [-3, 3]; `sparsity` of them are zero. Zeros
// of a row and of a group are not alike: runs, and the residual's rows, have different lengths.
DenseMatrix integers(int64_t m, int64_t k, double sparsity, ValueType type, uint32_t seed) {
  DenseMatrix dense = testing::random_patterns(m, k, sparsity, seed);
  std::mt19937 rng(seed);
  for (uint16_t& value : dense.values) {
    const int magnitude = static_cast<int>(rng() % 3) + 1;
    const bool negative = rng() % 2 != 0;
    if (!testing::is_zero_pattern(value)) {
      value = element_of(negative ? -magnitude : magnitude, type);
    }
  }
  return dense;
}

// Columns in pairs of different sparsity, some of them empty or full: neighbouring chunks in a ring
// are of either kind and of any size.
DenseMatrix integers_by_pair(int64_t m, int64_t k, ValueType type, uint32_t seed) {
  const double sparsities[] = {0.9, 0.0, 0.97, 0.5, 0.85, 1.0, 0.999, 0.7};
  DenseMatrix dense = integers(m, k, 0.0, type, seed);
  std::mt19937 rng(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t col = 0; col < k; ++col) {
      if (uniform(rng) < sparsities[(col / 256 + row / 512) % 8]) dense.at(row, col) = 0;
    }
  }
  return dense;
}

struct Kernel {
  Format format;
  std::string config;
  int64_t tile_n;
};

void PrintTo(const Kernel& kernel, std::ostream* out) { *out << kernel.config; }

std::vector<Kernel> every_kernel() {
  std::vector<Kernel> kernels;
  for (const KernelFamilyRow& family : kernel_families()) {
    if (family.place != Place::kCuda) continue;
    for (const Format format : {Format::kTiledCsl, Format::kBitmap, Format::kGather}) {
      if (!family.formats.contains(format)) continue;
      for (const KernelConfig& config : family.configs()) {
        int64_t tile_n = 0;
        for (const auto& [name, value] : config.facts) {
          if (name == std::string("tile_n")) tile_n = value;
        }
        kernels.push_back({format, config.name, tile_n});
      }
    }
  }
  return kernels;
}

// The least bytes of rings with which a family's configuration works; 0 if it has none.
int least_ring_bytes(const SpmmPlan& plan) {
  const auto config = static_cast<size_t>(plan.config);
  switch (plan.family) {
    case KernelFamily::kBitmapRowsSm90:
      return kBitmapRowsMinRingBytes;
    case KernelFamily::kBitmapSm90a:
      return bitmap_min_ring_bytes(bitmap_configs()[config]);
    case KernelFamily::kBitmapSm90:
    case KernelFamily::kBitmapSm80:
      return mma_sync_min_ring_bytes(mma_sync_configs(plan.family)[config]);
    case KernelFamily::kGatherSm90:
    case KernelFamily::kGatherSm80:
      return gather_ring_bytes(kGatherMinWarps);
    default:
      return 0;
  }
}

class KernelOnGpu : public ::testing::TestWithParam<Kernel> {
 protected:
  void SetUp() override {
    if (this_gpu().is_cpu()) GTEST_SKIP() << "no GPU";
    SpmmPlan plan;
    const Status status = select_plan(problem(1, 1, 1, 1, ValueType::kFloat16), this_gpu(),
                                      GetParam().config, 0, &plan);
    if (status.code == StatusCode::kUnsupported) GTEST_SKIP() << status.message;
  }

  SpmmProblem problem(int64_t m, int64_t n, int64_t k, int64_t nnz, ValueType type) const {
    return {m, n, k, nnz, GetParam().format, type};
  }

  // Multiplies n tokens, with rings of the least size if `small_rings`, and compares each bit.
  void expect_exact(const DenseMatrix& dense, int64_t n, int64_t ctas, bool small_rings,
                    ValueType type) const {
    const int64_t m = dense.m, k = dense.k;
    const Packed packed = testing::pack_or_die(dense, GetParam().format, type);
    SpmmPlan plan;
    const Status planned = select_plan(problem(m, n, k, packed.header.nnz, type), this_gpu(),
                                       GetParam().config, ctas, &plan);
    ASSERT_TRUE(planned.ok()) << planned.message;
    if (small_rings) plan.ring_bytes = least_ring_bytes(plan);
    SCOPED_TRACE(plan.to_string() + " " + std::to_string(m) + "x" + std::to_string(k) +
                 " N=" + std::to_string(n) + " nnz=" + std::to_string(packed.header.nnz) + " " +
                 value_traits(type).name);

    const int64_t stride = (k + plan.x_multiple - 1) / plan.x_multiple * plan.x_multiple;
    const DenseMatrix tokens = integers(n, k, 0.2, type, 5), biases = integers(1, m, 0.2, type, 6);
    std::vector<uint16_t> x(static_cast<size_t>(n * stride), 0);
    for (int64_t token = 0; token < n; ++token) {
      std::copy_n(&tokens.values[static_cast<size_t>(token * k)], k,
                  &x[static_cast<size_t>(token * stride)]);
    }
    std::vector<uint16_t> y(static_cast<size_t>(n * m), kNaN), want(y.size());
    SpmmArgs args;
    args.format = GetParam().format;
    args.n = n;
    args.x = x.data();
    args.x_stride = stride;
    args.weight = packed.view();
    args.bias = biases.values.data();
    args.y = want.data();
    spmm_cpu_reference(args, testing::threaded_for);

    const OnGpu<uint16_t> gpu_x(x), gpu_bias(biases.values), gpu_y(y);
    const OnGpu<int32_t> gpu_offsets(packed.offsets);
    const OnGpu<uint32_t> gpu_payload(packed.payload);
    const OnGpu<uint8_t> workspace(
        std::vector<uint8_t>(static_cast<size_t>(plan.workspace_bytes), 0xFF));  // NaNs
    args.x = gpu_x.data();
    args.weight.offsets = gpu_offsets.data();
    args.weight.payload = gpu_payload.data();
    args.bias = gpu_bias.data();
    args.y = gpu_y.data();
    const Status launched = cuda::run_spmm(plan, args, workspace.data(), true, nullptr);
    ASSERT_TRUE(launched.ok()) << launched.message;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<uint16_t> got = gpu_y.to_host();
    int64_t wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i] != want[i] && ++wrong == 1) {
        ADD_FAILURE() << "token " << i / static_cast<size_t>(m) << ", row "
                      << i % static_cast<size_t>(m) << ": " << got[i] << " instead of " << want[i];
      }
    }
    EXPECT_EQ(wrong, 0);
  }
};

INSTANTIATE_TEST_SUITE_P(Configurations, KernelOnGpu, ::testing::ValuesIn(every_kernel()),
                         [](const auto& kernel) { return kernel.param.config; });

TEST_P(KernelOnGpu, AwkwardShapesAndAllDensities) {
  const int64_t tile = GetParam().tile_n;
  for (const ValueType type : {ValueType::kFloat16, ValueType::kBfloat16}) {
    for (const auto& [m, k] :
         {std::pair<int64_t, int64_t>{1, 1}, {33, 129}, {600, 1999}, {17, 8321}}) {
      for (const double sparsity : {0.0, 0.5, 0.8, 0.93, 1.0}) {
        const DenseMatrix dense = integers(m, k, sparsity, type, 1);
        expect_exact(dense, 1, 0, false, type);
        expect_exact(dense, tile + 1, 3, false, type);
      }
    }
  }
}

// One CTA copies many columns through rings that hold one group of full chunks, so that each place
// in a ring is written again and again while neighbours are read.
TEST_P(KernelOnGpu, SmallRings) {
  const int64_t tile = std::min<int64_t>(GetParam().tile_n, 8);
  const DenseMatrix dense = integers_by_pair(520, 4100, ValueType::kFloat16, 3);
  expect_exact(dense, tile, 2, true, ValueType::kFloat16);
}

class PackerOnGpu : public ::testing::TestWithParam<Format> {};

INSTANTIATE_TEST_SUITE_P(Formats, PackerOnGpu,
                         ::testing::Values(Format::kTiledCsl, Format::kBitmap, Format::kGather),
                         [](const auto& format) { return packed_format(format.param).name; });

TEST_P(PackerOnGpu, SmallWeightsHaveTheHostsBytes) {
  if (this_gpu().is_cpu()) GTEST_SKIP() << "no GPU";
  const cuda::PackKernels& kernels = *cuda::pack_kernels(GetParam(), ValueType::kFloat16);
  const DenseMatrix dense = integers_by_pair(520, 1100, ValueType::kFloat16, 4);
  const Packed packed = testing::pack_or_die(dense, GetParam());
  const size_t tiles = packed.offsets.size() - 1;
  const OnGpu<uint16_t> gpu_dense(dense.values);
  const OnGpu<int32_t> units(std::vector<int32_t>(tiles, -1)), nnz(std::vector<int32_t>(tiles, -1));
  const OnGpu<uint8_t> scratch(
      std::vector<uint8_t>(tiles * static_cast<size_t>(kernels.scratch_bytes), 0xFF));
  Status status = kernels.count(gpu_dense.data(), dense.ld, dense.m, dense.k, units.data(),
                                nnz.data(), scratch.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  const std::vector<int32_t> counted = units.to_host();
  for (size_t i = 0; i < tiles; ++i) {
    ASSERT_EQ(counted[i], packed.offsets[i + 1] - packed.offsets[i]) << "tile " << i;
  }
  const OnGpu<int32_t> offsets(packed.offsets), changed(std::vector<int32_t>(1, 0));
  const OnGpu<uint32_t> payload(std::vector<uint32_t>(packed.payload.size(), 0xFFFFFFFF));
  status = kernels.pack(gpu_dense.data(), dense.ld, dense.m, dense.k, offsets.data(), nnz.data(),
                        payload.data(), changed.data(), scratch.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(payload.to_host(), packed.payload);
  EXPECT_EQ(changed.to_host()[0], 0);
  const OnGpu<uint16_t> unpacked(std::vector<uint16_t>(dense.values.size(), kNaN));
  PackedView view = packed.view();
  view.offsets = offsets.data();
  view.payload = payload.data();
  status = kernels.unpack(view, unpacked.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(unpacked.to_host(), testing::unpack(packed, testing::threaded_for));
  const OnGpu<int64_t> total(std::vector<int64_t>(1, 0));
  status = kernels.count_stored(view, total.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(total.to_host()[0], packed.header.nnz);
}

}  // namespace
}  // namespace flash_llm
