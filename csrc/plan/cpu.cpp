#include "plan/cpu.h"

#include <algorithm>
#include <limits>

#include "format/row_bitmap.h"

namespace flash_llm {
namespace {

// Above this many tokens the CPU unpacks Tiled-CSL and calls the dense GEMM. The kernel decodes
// each tile once per 8 tokens, so this allows two decodes, where unpacking takes one. (Not
// measured.)
constexpr int64_t kTiledCslMaxTokens = 16;

// kRowBitmapCpu / kRowBitmapBlocks / torch's product of the dense weight in milliseconds, for
// 4096x4096 at 50 % zeros on 2 cores.
// An EPYC (Zen 4; 2026-11-24):
//   bf16  N = 16   2.1 / 3.8 / 2.5     64   6.2 / 6.8 / 5.9    128   11.5 / 11.7 / 10.5
//         N = 256  22.6 / 21.3 / 19.8  512  44.8 / 41.6 / 39.2
//   fp16  N = 16   3.5 / 12.6 / 11.7   32   5.7 / 24 / 23      512   89 / 406 / 726
// A Xeon (Emerald Rapids without AMX; 2026-11-26), on which our kernels multiply bf16 as fp32
// (base/cpu_isa.cpp):
//   bf16  N = 16   2.5 / 6.2 / 4.8     64   8.3 / 16.0 / 13.8  128   17.7 / 28.5 / 26.6
//         N = 256  35.2 / 53.3 / 51.7  512  70.7 / 105 / 102
//   fp16  N = 32   4.6 / 6.8 / 5.3     64   8.9 / 12.3 / 8.3   128   18.7 / 18.3 / 15.0
//         N = 512  73 / 57 / 55
// An EPYC with AVX2 alone (2026-11-30; one thread's CPU time, on a shared machine):
//   bf16  N = 16   25 / 57 / 51    32   38 / 108 / 101    128   163 / 421 / 437
//         N = 512  1063 / 1904 / 1730
// For portable C++ blocks take less time from 17 tokens on. The same is assumed, but was not
// measured, for NEON and where the dense product has matrix instructions (AMX).
constexpr int64_t kRowsMaxTokensDot = 128;
constexpr int64_t kRowsMaxTokensFastDense = 128;
constexpr int64_t kRowsMaxTokensSlow = 16;
constexpr int64_t kAnyTokens = std::numeric_limits<int64_t>::max();

// Decoded bytes per block: a part of the last-level cache, but enough rows for torch's product.
// (Blocks of 2 / 8 MB on the EPYC: N = 512 49.7 / 41.5 ms.)
constexpr int64_t kBlockBytes = int64_t{8} << 20;

// The largest number of tokens for which kRowBitmapCpu is chosen.
int64_t most_tokens_of_rows(ValueType type, const DeviceInfo& device) {
  if (device.cpu_isa == CpuIsa::kPortable || device.cpu_isa == CpuIsa::kNeon) {
    return kRowsMaxTokensSlow;
  }
  if (value_traits(type).dense == ValueType::kFloat16) {
    if (!device.cpu_fast_dense_fp16) return kAnyTokens;
    return device.cpu_isa == CpuIsa::kAvx2 ? kRowsMaxTokensSlow : kRowsMaxTokensFastDense;
  }
  if (device.cpu_fast_dense_bf16) return kRowsMaxTokensSlow;
  return device.cpu_isa == CpuIsa::kAvx512Bf16 ? kRowsMaxTokensDot : kAnyTokens;
}

// The largest number of tokens for which kRowBitmapInt8XCpu is chosen, if it may be.
// kRowBitmapInt8XCpu / kRowBitmapBlocks in milliseconds, 4096x4096 at 50 % zeros, bf16, on two
// cores of a Xeon with AMX (2026-11-30): N = 16 1.3 / 6.2, 32 2.4 / 6.5, 128 11.0 / 11.7, 512 43.7
// / 36.9.
int64_t most_tokens_of_int8x(ValueType type, const DeviceInfo& device) {
  if (device.cpu_isa == CpuIsa::kPortable || device.cpu_isa == CpuIsa::kNeon) {
    return kRowsMaxTokensSlow;
  }
  const bool bf16 = value_traits(type).dense == ValueType::kBfloat16;
  return bf16 && device.cpu_fast_dense_bf16 ? kRowsMaxTokensFastDense : kAnyTokens;
}

}  // namespace

int64_t cpu_block_rows(int64_t k) {
  const int64_t rows = kBlockBytes / (2 * std::max<int64_t>(k, 1)) / kBlockRows * kBlockRows;
  return std::max<int64_t>(rows, kBlockRows);
}

bool takes_tiled_csl_cpu(const PlanRequest& request, std::string* reason) {
  if (request.problem.n > kTiledCslMaxTokens) {
    explain(reason, "N > 16: the dense GEMM is compute-bound, unpacking costs less");
    return false;
  }
  explain(reason, "N <= 16: each tile is decoded once per 8 tokens");
  return true;
}

bool takes_row_bitmap_int8x(const PlanRequest& request, std::string* reason) {
  if (!request.problem.rounds_x || request.problem.k > kCpuMaxInt8K ||
      request.problem.n > most_tokens_of_int8x(request.problem.value_type, request.device)) {
    return false;
  }
  explain(reason, "X may be quantised: products of int8 take less time");
  return true;
}

Status plan_row_bitmap_int8x(const PlanRequest& request, SpmmPlan* out) {
  if (request.problem.k > kCpuMaxInt8K) {
    return Status::invalid_value("config \"" + request.config + "\" takes K up to " +
                                 std::to_string(kCpuMaxInt8K) + ", got " +
                                 std::to_string(request.problem.k));
  }
  out->config = 0;
  return Status::success();
}

bool takes_row_bitmap_cpu(const PlanRequest& request, std::string* reason) {
  const int64_t most = most_tokens_of_rows(request.problem.value_type, request.device);
  if (most == kAnyTokens) {
    explain(reason, "torch's dense product, which needs the decoded weight, takes longer at any N");
    return true;
  }
  if (request.problem.n <= most) {
    if (reason != nullptr) {
      *reason = "N <= " + std::to_string(most) + ": each weight is decoded once for several tokens";
    }
    return true;
  }
  if (reason != nullptr) {
    *reason = "N > " + std::to_string(most) + ": decoding blocks and the dense product cost less";
  }
  return false;
}

// The reason is why kRowBitmapCpu, the row before this one in the table, did not take the problem.
bool takes_row_bitmap_blocks(const PlanRequest& /*request*/, std::string* /*reason*/) {
  return true;
}

}  // namespace flash_llm
