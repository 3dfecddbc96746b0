// What the launches need to know of the current device.
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace lora_ortho::cuda {

Status current_device(Device& device) {
    int count = 0, index = 0, major = 0, multiprocessors = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        cudaGetLastError();  // or the next launch would report it
        return LORA_ORTHO_NO_DEVICE;
    }
    if (cudaGetDevice(&index) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) !=
            cudaSuccess) {
        return LORA_ORTHO_CUDA_ERROR;
    }
    device.multiprocessors = multiprocessors;
    return major >= 8 ? LORA_ORTHO_OK : LORA_ORTHO_UNSUPPORTED_DEVICE;
}

}  // namespace lora_ortho::cuda
