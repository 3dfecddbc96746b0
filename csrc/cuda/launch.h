// One launch on a stream.
#pragma once

#include "cuda/kernels.h"

#if !defined(__CUDACC__)
#include "launch_host.h"
#else
#include <cuda_runtime.h>

namespace lora_ortho::cuda {

template <class Arguments>
Status launch(void (*kernel)(const Arguments), std::int64_t blocks, int threads, int shared_bytes,
              void* stream, const Arguments& arguments) {
    if (blocks == 0) return LORA_ORTHO_OK;
    if (blocks > 0x7fffffff) return LORA_ORTHO_BAD_SIZE;
    constexpr int kWithoutAsking = 48 << 10;
    if (shared_bytes > kWithoutAsking &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) !=
            cudaSuccess) {
        return LORA_ORTHO_CUDA_ERROR;
    }
    // clang-format off: it does not know <<< >>>
    kernel<<<static_cast<unsigned>(blocks), threads, static_cast<std::size_t>(shared_bytes),
             static_cast<cudaStream_t>(stream)>>>(arguments);
    // clang-format on
    return cudaGetLastError() == cudaSuccess ? LORA_ORTHO_OK : LORA_ORTHO_CUDA_ERROR;
}

}  // namespace lora_ortho::cuda
#endif
