// The bitmap kernel, for Hopper: bulk copies stream the weights into shared memory, consumer warps
// decode them in registers and multiply them from there on the tensor cores.
//
//   X        [n, x_stride] fp16/bf16, see launch.h
//   offsets  int32[chunks + 1], payload: the bitmap format, see format/bitmap.h
//   Y        [n, m]; fp32 partial sums in a workspace
//
// One persistent CTA per SM, a warpgroup of producer warps and 2 or 4 warpgroups of consumer warps:
//
//              W                                              X
//              |  1 producer warp per ring                    |  1 producer thread
//              v  (producer.cuh)                              v  (producer.cuh)
//   +------------------------------------+        +------------------------------------+
//   | ring of chunks, column by column   |        | 4 or 8 stages of 64 or 128 columns |
//   | + chunk descriptors                |        | by tile_n tokens                   |
//   | full, empty: per group of chunks   |        | full, empty: per stage             |
//   +------------------------------------+        +------------------------------------+
//              |                                              |   +------------------------+
//              |                                              |   | X transposed           |
//              |                                              |   | full, empty: one each  |
//              |                                              |   +------------------------+
//              |                                              |       ^ written and read by the
//              v                                              v       v consumers, for residuals
//   +--------------------------------------------------------------------------------------+
//   | 8 or 16 consumer warps (consumer.cuh), each with a chunk or one strip of it          |
//   |   decode to A fragments (decode.cuh) -> wgmma / mma.sync, or wgmma.sp + residual     |
//   |   -> fp32 sums of an output tile in registers                                        |
//   +--------------------------------------------------------------------------------------+
//              |                                              |  above 64 tokens, if the cluster
//              v                                              |  has the tile's first column and
//   workspace: partial sums                                   |  the last one, or adds the others'
//              |                                              |
//              v                                              v
//   finishing kernel (finish.cuh): adds them, bias, act  ->   Y
//
// The three upper boxes are shared memory (smem.cuh). A work range (stream_k.cuh) is a
// sequence of columns of chunks, which may begin and end within an output tile. A CTA's part of a
// column is 512 rows of W by 128 columns (2:4: 256) up to 32 tokens, 256 rows for 64 and 128 tokens
// and for small layers at 32, 128 rows for 256 tokens. Above 64 tokens clusters of two CTAs take
// two such parts and share X by multicast.
//
// With dependent launches the start of a call overlaps with the end of the previous one: when a CTA
// of the previous call exits, a CTA of this call takes over its SM and copies weights while the
// other CTAs of the previous call still run.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/bitmap/consumer.cuh"
#include "cuda/bitmap/finish.cuh"
#include "cuda/bitmap/producer.cuh"
#include "cuda/bitmap/smem.cuh"
#include "cuda/bitmap/tensor_map.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/stream_k.cuh"
#include "format/bitmap.h"
#include "plan/bitmap_sm90a.h"

namespace flash_llm {
namespace {

#ifdef FLASH_LLM_SM90A

// Synchronises all threads of the cluster.
template <typename C>
__device__ __forceinline__ void sync() {
  if constexpr (C::kCluster == 1) {
    __syncthreads();
  } else {
    __syncwarp();
    ptx::cluster_sync();
  }
}

template <typename C>
__device__ __forceinline__ void init_smem(const BitmapSmem<C>& smem, int warp) {
  for (uint32_t i = threadIdx.x; i < kTwoFourFixedBytes / 16; i += C::kThreads) {
    ptx::store_shared_zero16(smem.empty_chunk() + i * 16);
  }
  // An mbarrier.init takes about 30 cycles, so one lane of each warp initialises some of them.
  if (threadIdx.x % 32 == 0) {
    for (int i = warp; i < static_cast<int>(BitmapSmem<C>::kBarrierCount); i += C::kAllWarps) {
      ptx::mbarrier_init(smem.barrier(i), BitmapSmem<C>::arrivals(i));
    }
    ptx::mbarrier_init_fence();
  }
  sync<C>();
}

// What a consumer warp does: multiplies the CTA's work range, output tile by output tile.
template <typename C>
__device__ __forceinline__ void multiply(const BitmapParams& p, const BitmapSmem<C>& smem, int warp,
                                         int lane) {
  BitmapConsumer<C> consumer(smem, warp, lane);
  for (;;) {
    const uint32_t flags = consumer.multiply_tile();
    finish_tile<C>(p, flags, consumer.columns(), consumer.sums);
    if ((flags & kColumnIsLast) != 0) return;
    consumer.begin_sums();
  }
}

#endif  // FLASH_LLM_SM90A

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    bitmap_kernel(const __grid_constant__ BitmapParams p, const __grid_constant__ CUtensorMap map) {
#ifdef FLASH_LLM_SM90A
  extern __shared__ uint8_t smem_bytes[];
  const uint32_t base = (ptx::smem_address(smem_bytes) + 1023) / 1024 * 1024;
  const BitmapSmem<C> smem = {ptx::opaque(base),
                              C::kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank())};
  const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  allow_next_kernel();
  int ring = warp - C::kWarps;  // index of a producer warp, and of its ring; negative in consumers
  ChunkProducer<C> producer(p, smem, ring, lane);
  if (ring >= 0 && ring < C::kRings) producer.begin();
  init_smem(smem, warp);
  // Opaque: otherwise the compiler branches on the role earlier and duplicates the barrier above.
  ring = static_cast<int>(ptx::opaque(ring));
  if (ring >= 0) {
    ptx::dealloc_registers<C::kProducerRegisters>();
    if (ring < C::kRings) {
      producer.run();
    } else if (ring == C::kRings && lane == 0) {
      produce_x(p, map, smem);
    }
  } else {
    ptx::alloc_registers<C::kConsumerRegisters>();
    multiply<C>(p, smem, warp, lane);
  }
  // Other CTAs of the cluster may still arrive at this CTA's barriers.
  if constexpr (C::kCluster > 1) sync<C>();
#endif
}

template <typename C>
Status launch(const BitmapParams& params, const SpmmArgs& args, int smem_bytes, bool prefetch,
              cudaStream_t stream) {
  CUtensorMap map;
  const Status mapped = map_x(args, C::kTileN / C::kCluster, &map);
  if (!mapped.ok()) return mapped;
  const Status sized =
      allow_smem("cudaFuncSetAttribute(bitmap_kernel)", bitmap_kernel<C>, smem_bytes);
  if (!sized.ok()) return sized;
  if (params.stored != nullptr) {
    const Status cleared = launch_clear<C>(params, prefetch, stream);
    if (!cleared.ok()) return cleared;
  }
  const Status multiplied =
      launch_clusters("bitmap_kernel launch", bitmap_kernel<C>, C::kCluster,
                      static_cast<unsigned>(params.schedule.workers) * C::kCluster, C::kThreads,
                      smem_bytes, prefetch, stream, params, map);
  if (!multiplied.ok() || params.stored != nullptr) return multiplied;
  if (!C::kFinishesAll && !params.schedule.shares_rows()) return multiplied;
  return launch_finish<C>(params, true, stream);
}

template <ValueType kType>
Status launch_config(int config, const BitmapParams& params, const SpmmArgs& args, int smem_bytes,
                     bool prefetch, cudaStream_t stream) {
  int idx = 0;
#define FLASH_LLM_ROW(name, tile_n, warps, strips, cluster, x_stages)                   \
  if (config == idx++) {                                                                \
    return launch<BitmapKernelConfig<kType, tile_n, warps, strips, cluster, x_stages>>( \
        params, args, smem_bytes, prefetch, stream);                                    \
  }
  FLASH_LLM_BITMAP_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no bitmap configuration has index " + std::to_string(config));
}

}  // namespace

Status cuda::spmm_bitmap(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                         cudaStream_t stream) {
  if (plan.config < 0 || plan.config >= static_cast<int>(bitmap_configs().size())) {
    return Status::invalid_value("no bitmap configuration has index " +
                                 std::to_string(plan.config));
  }
  const BitmapConfig& config = bitmap_configs()[static_cast<size_t>(plan.config)];
  if (Status fits = check_plan(plan, KernelFamily::kBitmapSm90a, args); !fits.ok()) return fits;
  if (plan.ctas != plan.work.workers * config.cluster ||
      plan.ring_bytes < bitmap_min_ring_bytes(config)) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  if (Status fits = cuda::check_launch(plan, bitmap_workspace_bytes(config, plan.work));
      !fits.ok()) {
    return fits;
  }
  BitmapParams params(plan, args, workspace, config.block_m(), config.rings());
  if (bitmap_adds_shared(config.tile_n, plan.work) && params.schedule.shares_rows()) {
    params.stored = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) +
                                                bitmap_sums_bytes(config, plan.work));
  }
  const int smem_bytes = bitmap_smem_bytes(config, plan.ring_bytes);
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return launch_config<ValueType::kFloat16>(plan.config, params, args, smem_bytes, prefetch,
                                                stream);
    case ValueType::kBfloat16:
      return launch_config<ValueType::kBfloat16>(plan.config, params, args, smem_bytes, prefetch,
                                                 stream);
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
    case ValueType::kFp8Float16:
    case ValueType::kFp8Bfloat16:
    case ValueType::kInt4Float16:
    case ValueType::kInt4Bfloat16:
      break;
  }
  return Status::invalid_type("the bitmap kernel has no code for this value type");
}

}  // namespace flash_llm
