// The interface between the C functions (api.cpp, which checks every argument) and the kernels (one
// translation unit per element type, which assume that all was checked).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/layout.h"
#include "lora_ortho/cuda.h"

namespace lora_ortho::cuda {

// What the device is, as far as the launches depend on it.
struct Device {
    std::int64_t multiprocessors;
};
// The current device, or why its kernels cannot run.
Status current_device(Device& device);

// What a call works with, made once of checked factors.
struct Problem {
    Device device;
    Layout layout;
    Draw draw;
};

// Pointers of one backward call; null where not wanted.
struct Gradients {
    void *grad_x, *grad_A, *grad_B;
    float* grad_gains;
    std::int32_t factor_dtype;
};

struct Kernels {
    Status (*pack)(const Problem&, const lora_ortho_factors&, void* packed, void* stream);
    std::size_t (*forward_bytes)(const Problem&, std::int64_t tokens);
    Status (*forward)(const Problem&, const void* packed, const lora_ortho_cuda_call&,
                      const lora_ortho_matrix& x, const lora_ortho_matrix* base, void* y, void* s,
                      void* workspace);
    std::size_t (*backward_bytes)(const Problem&, std::int64_t tokens);
    Status (*backward)(const Problem&, const void* packed, const lora_ortho_cuda_call&,
                       const lora_ortho_matrix& grad, const lora_ortho_matrix& x, const void* s,
                       const Gradients& out, void* workspace);
};

const Kernels* kernels_float32();
const Kernels* kernels_bfloat16();
const Kernels* kernels_float16();

}  // namespace lora_ortho::cuda
