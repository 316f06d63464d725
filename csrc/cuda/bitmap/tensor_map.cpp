#include "cuda/bitmap/tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "plan/bitmap_sm90a.h"

namespace flash_llm {
namespace {

// cuTensorMapEncodeTiled is looked up at run time: linking to it would make the library depend on
// the driver.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Status find_encode_tiled(EncodeTiled* out) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult result;
  const Status found =
      cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                                   cudaEnableDefault, &result),
                  "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
  if (!found.ok()) return found;
  if (result != cudaDriverEntryPointSuccess) {
    return Status::unsupported("the NVIDIA driver has no cuTensorMapEncodeTiled: CUDA 12 needed");
  }
  *out = reinterpret_cast<EncodeTiled>(symbol);
  return Status::success();
}

}  // namespace

Status map_x(const SpmmArgs& args, int tokens, CUtensorMap* map) {
  EncodeTiled encode = nullptr;
  const Status found = find_encode_tiled(&encode);
  if (!found.ok()) return found;
  const int64_t k = args.weight.k;
  // x_stride means nothing for a single token, but the map needs a valid stride.
  const int64_t stride = args.n > 1 ? args.x_stride : (k + 7) / 8 * 8;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(args.n)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kXBoxK, static_cast<cuuint32_t>(tokens)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUtensorMapDataType type = args.weight.value_type == ValueType::kFloat16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<uint16_t*>(args.x), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::success();
  return Status::runtime("cuTensorMapEncodeTiled failed with error " + std::to_string(result) +
                         " for x of " + std::to_string(args.n) + "x" + std::to_string(k));
}

}  // namespace flash_llm
