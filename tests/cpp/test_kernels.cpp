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
#include <array>
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
#include "plan/quantized_bitmap.h"
#include "plan/quantized_bitmap_sm90a.h"
#include "plan/spmm_plan.h"
#include "testing.h"

namespace flash_llm {
namespace {

using testing::DenseMatrix;
using testing::DenseMatrixOf;
using testing::Packed;
using testing::QuantizedMatrix;

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

// Prunes columns in pairs to different sparsity, some of them to none or all: neighbouring chunks
// in a ring are of either kind and of any size.
template <typename Raw>
DenseMatrixOf<Raw> pruned_by_pair(DenseMatrixOf<Raw> dense, uint32_t seed) {
  const double sparsities[] = {0.9, 0.0, 0.97, 0.5, 0.85, 1.0, 0.999, 0.7};
  std::mt19937 rng(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int64_t row = 0; row < dense.m; ++row) {
    for (int64_t col = 0; col < dense.k; ++col) {
      if (uniform(rng) < sparsities[(col / 256 + row / 512) % 8]) dense.at(row, col) = 0;
    }
  }
  return dense;
}

// The byte of an integer of -3 ... 3 as a value of a kind.
uint8_t byte_of(int number, ValueKind kind) {
  if (kind != ValueKind::kFp8E4m3) return static_cast<uint8_t>(number);
  const uint8_t magnitudes[] = {0x00, 0x38, 0x40, 0x44};
  return static_cast<uint8_t>(magnitudes[std::abs(number)] | (number < 0 ? 0x80 : 0));
}

// Integers of -3 ... 3 as quantised values, with powers of two as scales.
QuantizedMatrix quantized(const DenseMatrix& integers, ValueType type) {
  const ValueTraits traits = value_traits(type);
  QuantizedMatrix out{integers.m, integers.k, integers.ld, {}, {}};
  for (const uint16_t value : integers.values) {
    const float number = traits.dense == ValueType::kFloat16
                             ? to_float<ValueType::kFloat16>(value)
                             : to_float<ValueType::kBfloat16>(value);
    out.values.push_back(byte_of(static_cast<int>(number), traits.kind));
  }
  const int64_t row_scales = scales_per_row(type, integers.k);
  for (int64_t i = 0; i < integers.m * row_scales; ++i) {
    out.scales.push_back(static_cast<float>(1 << (i + i / row_scales) % 3));
  }
  return out;
}

// Packs integers of -3 ... 3 as values of a type.
Packed pack_integers(const DenseMatrix& dense, Format format, ValueType type) {
  return is_quantized(type) ? testing::pack_or_die(quantized(dense, type), format, type)
                            : testing::pack_or_die(dense, format, type);
}

struct Kernel {
  Format format;
  std::string config;
  int64_t tile_n;
  ValueKind kind;

  ValueType type(ValueType dense) const {
    for (const ValueType type : kValueTypes) {
      if (value_traits(type).kind == kind && value_traits(type).dense == dense) return type;
    }
    return dense;
  }
};

std::string name_of(const Kernel& kernel) {
  const ValueType type = kernel.type(ValueType::kFloat16);
  return kernel.config + (is_quantized(type) ? std::string("_") + value_traits(type).values : "");
}

void PrintTo(const Kernel& kernel, std::ostream* out) { *out << name_of(kernel); }

std::vector<Kernel> every_kernel() {
  std::vector<Kernel> kernels;
  for (const KernelFamilyRow& family : kernel_families()) {
    if (family.place != Place::kCuda || family.id == KernelFamily::kDenseFp8X) continue;
    for (const Format format :
         {Format::kTiledCsl, Format::kBitmap, Format::kGather, Format::kQuantizedBitmap}) {
      if (!family.formats.contains(format)) continue;
      for (const KernelConfig& config : family.configs()) {
        int64_t tile_n = 0;
        for (const auto& [name, value] : config.facts) {
          if (name == std::string("tile_n")) tile_n = value;
        }
        for (const ValueType type : kValueTypes) {
          if (value_traits(type).dense == ValueType::kFloat16 &&
              family.value_types.contains(type)) {
            kernels.push_back({format, config.name, tile_n, value_traits(type).kind});
          }
        }
      }
    }
  }
  return kernels;
}

// The least bytes of rings with which a family's configuration works; 0 if it has none.
int least_ring_bytes(const SpmmPlan& plan, ValueType type) {
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
    case KernelFamily::kQuantizedBitmapSm90a:
      return quant_wgmma_min_ring_bytes(quant_wgmma_configs()[config], type);
    case KernelFamily::kQuantizedBitmapSm90:
    case KernelFamily::kQuantizedBitmapSm80:
      return plan.warps * quant_min_ring_bytes(type);
    default:
      return 0;
  }
}

class KernelOnGpu : public ::testing::TestWithParam<Kernel> {
 protected:
  void SetUp() override {
    if (this_gpu().is_cpu()) GTEST_SKIP() << "no GPU";
    SpmmPlan plan;
    const Status status = select_plan(problem(1, 1, 1, 1, GetParam().type(ValueType::kFloat16)),
                                      this_gpu(), GetParam().config, 0, &plan);
    // The GPU, or the configuration, has no kernel for such values.
    if (!status.ok()) GTEST_SKIP() << status.message;
  }

  SpmmProblem problem(int64_t m, int64_t n, int64_t k, int64_t nnz, ValueType type) const {
    return {m, n, k, nnz, GetParam().format, type};
  }

  // Multiplies n tokens of X of type `dense_type` by the plan for `device`, with rings of the least
  // size if `small_rings`, and compares each bit.
  void expect_exact(const DenseMatrix& dense, int64_t n, int64_t ctas, bool small_rings,
                    ValueType dense_type, const DeviceInfo& device = this_gpu()) const {
    const int64_t m = dense.m, k = dense.k;
    const ValueType type = GetParam().type(dense_type);
    const Packed packed = pack_integers(dense, GetParam().format, type);
    SpmmPlan plan;
    const Status planned =
        select_plan(problem(m, n, k, packed.header.nnz, packed.header.value_type), device,
                    GetParam().config, ctas, &plan);
    ASSERT_TRUE(planned.ok()) << planned.message;
    if (small_rings) plan.ring_bytes = least_ring_bytes(plan, type);
    SCOPED_TRACE(plan.to_string() + " " + std::to_string(m) + "x" + std::to_string(k) +
                 " N=" + std::to_string(n) + " nnz=" + std::to_string(packed.header.nnz) + " " +
                 value_traits(type).name);

    const int64_t stride = (k + plan.x_multiple - 1) / plan.x_multiple * plan.x_multiple;
    const DenseMatrix biases = integers(1, m, 0.2, dense_type, 6);
    DenseMatrix tokens = integers(n, k, 0.2, dense_type, 5);
    // Kernels that round X then have a scale of 1 and round nothing.
    const int largest = GetParam().kind == ValueKind::kFp8E4m3 ? 448 : 127;
    for (int64_t token = 0; token < n; ++token) {
      tokens.at(token, 0) = element_of(largest, dense_type);
    }
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
                         [](const auto& kernel) { return name_of(kernel.param); });

TEST_P(KernelOnGpu, AwkwardShapesAndAllDensities) {
  const int64_t tile = GetParam().tile_n;
  for (const ValueType type : {ValueType::kFloat16, ValueType::kBfloat16}) {
    for (const auto& [m, k] :
         {std::pair<int64_t, int64_t>{1, 1}, {33, 129}, {600, 1999}, {17, 8321}}) {
      for (const double sparsity : {0.0, 0.5, 0.8, 0.93, 1.0}) {
        const DenseMatrix dense = integers(m, k, sparsity, type, 1);
        expect_exact(dense, 1, 0, false, type);
        expect_exact(dense, tile + 1, 3, false, type);
        expect_exact(dense, tile + 1, 0, false, type);
      }
    }
  }
}

// One CTA copies many columns through rings that hold one group of full chunks, so that each place
// in a ring is written again and again while neighbours are read.
TEST_P(KernelOnGpu, SmallRings) {
  const int64_t tile = std::min<int64_t>(GetParam().tile_n, 8);
  const DenseMatrix dense = pruned_by_pair(integers(520, 4100, 0.0, ValueType::kFloat16, 3), 3);
  expect_exact(dense, tile, 2, true, ValueType::kFloat16);
}

// A plan for a GPU with 100 KB of shared memory, of which there is none here, has fewer warps and
// more sections of K.
TEST_P(KernelOnGpu, PlansForLessSharedMemory) {
  DeviceInfo small = this_gpu();
  small.smem_per_sm_bytes = 100 * 1024;
  const ValueType stored = GetParam().type(ValueType::kFloat16);
  SpmmPlan plan;
  const Status status = select_plan(problem(300, GetParam().tile_n, 8100, 1, stored), small,
                                    GetParam().config, 0, &plan);
  if (!status.ok()) GTEST_SKIP() << status.message;
  const DenseMatrix dense = integers(300, 8100, 0.5, ValueType::kFloat16, 7);
  expect_exact(dense, GetParam().tile_n, 0, false, ValueType::kFloat16, small);
}

// One format's packer on the GPU, and what it needs of a matrix.
template <typename Raw>
class GpuPacker {
 public:
  GpuPacker(Format format, ValueType type, size_t tiles)
      : type_(type),
        kernels_(*cuda::pack_kernels(format, type)),
        scratch_(std::vector<uint8_t>(tiles * static_cast<size_t>(kernels_.scratch_bytes), 0xFF)),
        units_(std::vector<int32_t>(tiles, -1)),
        nnz_(std::vector<int32_t>(tiles, -1)),
        changed_(std::vector<int32_t>(1, 0)) {}

  void count(const DenseMatrixOf<Raw>& dense) const {
    const OnGpu<Raw> values(dense.values);
    const Status status = kernels_.count(matrix(dense, values.data(), nullptr), units_.data(),
                                         nnz_.data(), scratch_.data(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  void pack(const DenseMatrixOf<Raw>& dense, const int32_t* offsets, uint32_t* payload) const {
    const OnGpu<Raw> values(dense.values);
    const OnGpu<float> scales(dense.scales);
    const Status status =
        kernels_.pack(matrix(dense, values.data(), scales.data()), offsets, nnz_.data(), payload,
                      changed_.data(), scratch_.data(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  std::vector<int32_t> units() const { return units_.to_host(); }
  bool changed() const { return changed_.to_host()[0] != 0; }

 private:
  ValueMatrix matrix(const DenseMatrixOf<Raw>& dense, const Raw* values,
                     const float* scales) const {
    return {values, dense.ld, dense.m, dense.k, type_, scales};
  }

  ValueType type_;
  const cuda::PackKernels& kernels_;
  OnGpu<uint8_t> scratch_;
  OnGpu<int32_t> units_, nnz_, changed_;
};

// Packs a matrix, and one that another thread has changed to `other` between the passes.
template <typename Raw>
void expect_the_hosts_bytes(const DenseMatrixOf<Raw>& dense, const DenseMatrixOf<Raw>& other,
                            Format format, ValueType type) {
  SCOPED_TRACE(std::to_string(dense.m) + "x" + std::to_string(dense.k));
  const Packed packed = testing::pack_or_die(dense, format, type);
  const size_t tiles = packed.offsets.size() - 1;
  const GpuPacker<Raw> packer(format, type, tiles);
  packer.count(dense);
  const std::vector<int32_t> counted = packer.units();
  for (size_t i = 0; i < tiles; ++i) {
    ASSERT_EQ(counted[i], packed.offsets[i + 1] - packed.offsets[i]) << "tile " << i;
  }
  constexpr size_t kGuard = 4096;  // words after the payload, which nothing may write
  const OnGpu<int32_t> offsets(packed.offsets);
  std::vector<uint32_t> expected = packed.payload;
  expected.resize(expected.size() + kGuard, 0xFFFFFFFF);
  const OnGpu<uint32_t> payload(std::vector<uint32_t>(expected.size(), 0xFFFFFFFF));
  packer.pack(dense, offsets.data(), payload.data());
  EXPECT_EQ(payload.to_host(), expected);
  EXPECT_FALSE(packer.changed());

  const cuda::PackKernels& kernels = *cuda::pack_kernels(format, type);
  const std::vector<uint16_t> elements = testing::unpack(packed, testing::threaded_for);
  const OnGpu<uint16_t> unpacked(std::vector<uint16_t>(elements.size(), kNaN));
  PackedView view = packed.view();
  view.offsets = offsets.data();
  view.payload = payload.data();
  Status status = kernels.unpack(view, unpacked.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(unpacked.to_host(), elements);
  const OnGpu<int64_t> total(std::vector<int64_t>(1, 0));
  status = kernels.count_stored(view, total.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(total.to_host()[0], packed.header.nnz);

  packer.pack(other, offsets.data(), payload.data());
  EXPECT_TRUE(packer.changed());
  const std::vector<uint32_t> after = payload.to_host();
  EXPECT_TRUE(std::all_of(after.end() - kGuard, after.end(),
                          [](uint32_t word) { return word == 0xFFFFFFFF; }));
}

class PackerOnGpu : public ::testing::TestWithParam<Format> {
 protected:
  void SetUp() override {
    if (this_gpu().is_cpu()) GTEST_SKIP() << "no GPU";
  }
};

INSTANTIATE_TEST_SUITE_P(Formats, PackerOnGpu,
                         ::testing::Values(Format::kTiledCsl, Format::kBitmap, Format::kGather,
                                           Format::kQuantizedBitmap),
                         [](const auto& format) { return packed_format(format.param).name; });

TEST_P(PackerOnGpu, SmallWeightsHaveTheHostsBytes) {
  // Rows that begin at any byte, one row, and strips and chunks without elements.
  for (const auto& [m, k, gap] :
       {std::array<int64_t, 3>{520, 1100, 0}, {33, 1029, 2}, {1, 31, 0}}) {
    if (GetParam() == Format::kQuantizedBitmap) {
      for (const ValueType type : kValueTypes) {
        if (!is_quantized(type)) continue;
        const QuantizedMatrix full = testing::random_quantized(type, m, k, 0.0, 4, gap);
        QuantizedMatrix sparse = pruned_by_pair(full, 4);
        for (int64_t row = 0; row < std::min<int64_t>(m - 1, 16); ++row) {
          for (int64_t col = 0; col < k; ++col) sparse.at(row, col) = 0;
        }
        expect_the_hosts_bytes(sparse, full, GetParam(), type);
        expect_the_hosts_bytes(full, sparse, GetParam(), type);
      }
    } else {
      const DenseMatrix full = testing::random_patterns(m, k, 0.0, 4, gap);
      const DenseMatrix sparse = pruned_by_pair(full, 4);
      expect_the_hosts_bytes(sparse, full, GetParam(), ValueType::kFloat16);
    }
  }
}

}  // namespace
}  // namespace flash_llm
