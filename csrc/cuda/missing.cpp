// In place of the kernels where the library is built without CUDA.
#include "cuda/kernels.h"

namespace lora_ortho::cuda {

Status current_device(Device&) { return LORA_ORTHO_NO_CUDA; }
const Kernels* kernels_float32() { return nullptr; }
const Kernels* kernels_bfloat16() { return nullptr; }
const Kernels* kernels_float16() { return nullptr; }

}  // namespace lora_ortho::cuda
